"""Pickle weights: read where they are trusted, like safetensors, and never otherwise."""

from __future__ import annotations

import io
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from bitpress import CheckpointError, oneshot
from bitpress.progress import Lines
from conftest import build, save, token_rows
from helpers import OPTIONS, W4, assert_same_tensors, make_tokenizer, tensors

ROWS = token_rows()


class Marker:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def pickled(family, place, form="zip", extra=None):
    """A model folder with pickle weights, and the same with safetensors."""
    model = build(family, torch.bfloat16)
    plain = save(model, place / "plain")
    folder = save(model, place / "pickled")
    make_tokenizer(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if form == "sharded":
        parts = {f"pytorch_model-{i + 1:05d}-of-00002.bin": names for i, names in enumerate(halves(sorted(state)))}
        for name, names in parts.items():
            torch.save({n: state[n] for n in names}, folder / name)
        weight_map = {n: name for name, names in parts.items() for n in names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        whole = state if extra is None else {**state, "step": extra}
        torch.save(whole, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form != "legacy")
    return folder, plain


def halves(names):
    return names[: len(names) // 2], names[len(names) // 2 :]


@pytest.mark.parametrize(
    ("family", "form"),
    [("llama", "zip"), ("llama", "legacy"), ("llama", "sharded"), ("llama_tied", "zip"), ("mixtral", "sharded")],
)
def test_they_give_what_safetensors_give(family, form, tmp_path):
    folder, plain = pickled(family, tmp_path, form)
    with pytest.raises(CheckpointError, match=r"holds pickle weights.*trust_pickle=True \(--trust-pickle\)"):
        oneshot(folder, ROWS, W4, output_dir=tmp_path / "out", **OPTIONS)
    oneshot(folder, ROWS, W4, output_dir=tmp_path / "out", trust_pickle=True, **OPTIONS)
    oneshot(plain, ROWS, W4, output_dir=tmp_path / "straight", **OPTIONS)
    found = tensors(tmp_path / "out")
    if family == "llama_tied":  # pickles hold the head a second time, and that is kept
        assert torch.equal(found.pop("lm_head.weight"), found["model.embed_tokens.weight"])
    assert_same_tensors(found, tensors(tmp_path / "straight"))
    assert not list((tmp_path / "out").glob("*.bin*"))
    model = oneshot(folder, ROWS, W4, trust_pickle=True, **OPTIONS)
    assert model.name_or_path == str(folder)
    model.save_pretrained(tmp_path / "memory")
    assert_same_tensors(tensors(tmp_path / "memory"), tensors(tmp_path / "straight"))


def test_code_runs_only_where_it_is_trusted(tmp_path):
    folder, plain = pickled("llama", tmp_path, extra=Marker(tmp_path / "ran"))
    with pytest.raises(CheckpointError):
        oneshot(folder, ROWS, W4, output_dir=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "ran").exists()
    # beside safetensors pickles are left alone, trusted or not
    (plain / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes())
    oneshot(plain, ROWS, W4, output_dir=tmp_path / "plain-out", trust_pickle=True, **OPTIONS)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_more_than_tensors_is_said(tmp_path):
    from rich.console import Console

    folder, plain = pickled("llama", tmp_path, extra=torch.nn.Linear(2, 2))  # a module is more than a tensor
    said = io.StringIO()
    lines = Lines(Console(file=said, width=300))
    oneshot(folder, ROWS, W4, output_dir=tmp_path / "out", trust_pickle=True, progress=lines, **OPTIONS)
    assert "pytorch_model.bin: more than tensors; read by running what the pickle says" in said.getvalue()
    oneshot(plain, ROWS, W4, output_dir=tmp_path / "straight", **OPTIONS)
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "straight"))


@pytest.mark.parametrize("content", [b"", b"no pickle", None])
def test_damaged_pickles(content, tmp_path):
    folder, _ = pickled("llama", tmp_path)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: cannot be read, download it again"):
        oneshot(folder, ROWS, W4, output_dir=tmp_path / "out", trust_pickle=True, **OPTIONS)
    torch.save([torch.zeros(3)], file)
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        oneshot(folder, ROWS, W4, output_dir=tmp_path / "out", trust_pickle=True, **OPTIONS)


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    from bitpress.cli import main

    folder, _ = pickled("llama", tmp_path)
    words = ["bitpress", "plan", str(folder), "--scheme", "W4A16", "--group-size", "16"]
    for trust in (False, True):
        monkeypatch.setattr("sys.argv", [*words, *(["--trust-pickle"] if trust else [])])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == (0 if trust else 1)
    assert "--trust-pickle" in capsys.readouterr().err
