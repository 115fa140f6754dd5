"""Judging a checkpoint: equal to a computation by hand, zero for the model itself, one clear error for bad input."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from bitpress import evaluate as package_evaluate
from bitpress import oneshot
from bitpress.cli import app
from bitpress.errors import CheckpointError, ConfigError, DataError, NumericsError
from bitpress.evaluate import BUILT_IN, evaluate, generate, load_model
from bitpress.inspection import inspect_checkpoint
from bitpress.tables import evaluation_table, inspection_table, report_table
from conftest import VOCAB, build, save

WORDS = [f"w{i}" for i in range(VOCAB - 1)]


def tokenizer(words=WORDS, chat: str | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, **{word: i + 1 for i, word in enumerate(words)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>")
    made.chat_template = chat
    return made


def perturbed(model, scale=0.05):
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn_like(parameter)
    return other


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a perturbed copy, and a text of 100 tokens."""
    path = tmp_path_factory.mktemp("models")
    base = build("llama")
    for name, model in (("base", base), ("other", perturbed(base))):
        save(model, path / name)
        tokenizer().save_pretrained(path / name)
    torch.manual_seed(2)
    ids = torch.randint(1, VOCAB, (100,))
    (path / "text.txt").write_text(" ".join(WORDS[i - 1] for i in ids))
    return path


def token_ids(place):
    return torch.tensor([WORDS.index(word) + 1 for word in (place / "text.txt").read_text().split()])


def by_hand(base, other, windows):
    """The definitions, one position at a time, in float64."""
    kl, agreed, nll, count = [], 0, [0.0, 0.0], 0
    for window in windows:
        with torch.no_grad():
            p, q = (m(input_ids=window[None]).logits[0].double().softmax(-1) for m in (base, other))
        for t in range(len(window)):
            kl.append((p[t] * (p[t].log() - q[t].log())).sum().item())
            agreed += int(p[t].argmax() == q[t].argmax())
            if t + 1 < len(window):
                nll[0] -= math.log(p[t, window[t + 1]])
                nll[1] -= math.log(q[t, window[t + 1]])
                count += 1
    kl.sort()
    tail = kl[math.ceil(0.99 * len(kl)) - 1]
    return [math.exp(n / count) for n in nll], sum(kl) / len(kl), tail, agreed / len(kl), count


@pytest.mark.parametrize("chunk", [1 << 24, 5 * VOCAB])
def test_equals_the_definitions(place, chunk, monkeypatch):
    monkeypatch.setattr(sys.modules[evaluate.__module__], "_CHUNK", chunk)
    result = evaluate(place / "base", place / "other", text=place / "text.txt", windows=4, length=24)
    base, other = load_model(place / "base"), load_model(place / "other")
    perplexity, kl, tail, top1, count = by_hand(base, other, token_ids(place)[:96].split(24))
    assert [result.base_perplexity, result.perplexity] == pytest.approx(perplexity, rel=1e-5)
    assert (result.kl, result.kl_p99) == pytest.approx((kl, tail), rel=1e-4)
    assert (result.top1, result.tokens) == (top1, count)
    assert result.kl > 0.001 and 0 < result.top1 < 1 and result.perplexity != result.base_perplexity
    assert (result.windows, result.length, result.notes) == (4, 24, ())
    assert result.text.endswith("text.txt") and result.bytes == result.base_bytes > 0
    assert result.tokens_per_second > 0 and result.base_tokens_per_second > 0


def test_the_model_itself_has_no_distance(place):
    result = evaluate(place / "base", place / "base", text=place / "text.txt", windows=2, length=20)
    assert (result.kl, result.kl_p99, result.top1) == (0.0, 0.0, 1.0)
    assert result.base_perplexity == result.perplexity
    assert package_evaluate is evaluate


def test_what_oneshot_returned_is_evaluated(place, tmp_path, capfd, monkeypatch):
    wanted = {"QuantizationModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
    saved = oneshot(place / "base", None, wanted, output_dir=tmp_path / "out")
    tqdm = pytest.importorskip("tqdm").tqdm
    untold = tqdm.__init__

    def told(self, *args, **kwargs):  # as without the tests' TQDM_DISABLE
        untold(self, *args, **{"disable": False, **kwargs})

    monkeypatch.setattr(tqdm, "__init__", told)
    capfd.readouterr()
    kwargs = {"text": place / "text.txt", "windows": 2, "length": 20}
    found = evaluate(place / "base", saved, **kwargs)
    assert capfd.readouterr().err == ""
    assert tqdm.__init__ is told
    assert found.kl == evaluate(place / "base", tmp_path / "out", **kwargs).kl > 0
    assert found.bytes < found.base_bytes and saved._model is None
    assert generate(saved, "w5 w6", 4) == generate(tmp_path / "out", "w5 w6", 4)


def test_names_in_tables_are_folded_and_never_cut(place, tmp_path):
    wanted = {"QuantizationModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
    oneshot(place / "base", None, wanted, output_dir=tmp_path / "out")
    found = inspect_checkpoint(tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {layer.scheme for layer in found.layers} == {"W4A16 g16"}
    for table in (report_table(report, None), inspection_table(found)):
        console = Console(width=80, soft_wrap=True)
        with console.capture() as captured:
            console.print(table)
        lines = captured.get().splitlines()
        names = "".join(line.split("\u2502")[1].strip() for line in lines if line.startswith("\u2502"))
        assert all(layer.name in names for layer in found.layers) and "\u2026" not in captured.get()
        assert "W4A16 g16" in captured.get()


def test_models_in_memory_are_left_as_they_were(place):
    base = load_model(place / "base")
    other = load_model(place / "other").train()
    other.model.layers[0].eval()
    kwargs = {"text": place / "text.txt", "windows": 2, "length": 20}
    found = evaluate(base, other, tokenizer=tokenizer(), **kwargs)
    expected = evaluate(place / "base", place / "other", **kwargs)
    assert (found.kl, found.perplexity) == (expected.kl, expected.perplexity)
    assert other.training and not other.model.layers[0].training
    assert found.bytes >= expected.bytes
    with pytest.raises(ConfigError, match="tokenizer"):
        evaluate(base, other, **kwargs)


def test_a_short_text_is_said(place):
    result = evaluate(place / "base", place / "other", text=place / "text.txt", windows=8, length=60)
    assert (result.windows, result.length, result.tokens) == (2, 60, 98)
    assert "the text has 100 tokens: 2 windows of 60, the last of 40 in place of 8 of 60" in result.notes
    result = evaluate(place / "base", place / "other", text=place / "text.txt", windows=1, length=500)
    assert result.length == 100 and "128 tokens in place of 500" in result.notes[0]
    long = evaluate(place / "base", place / "other", windows=1, length=500)
    assert (long.length, long.notes) == (128, result.notes[:1])
    caption = str(evaluation_table(result).caption)
    assert all(note in caption for note in result.notes) and "text.txt" in caption
    assert json.loads(json.dumps(result.to_dict()))["notes"] == list(result.notes)


def test_the_built_in_text_and_a_text_given_as_such(place):
    built_in = evaluate(place / "base", place / "other", windows=2, length=64)
    assert built_in.text == BUILT_IN and built_in.tokens == 126
    words = (place / "text.txt").read_text()
    given = evaluate(place / "base", place / "other", text=words, windows=2, length=20)
    assert given.kl == evaluate(place / "base", place / "other", text=place / "text.txt", windows=2, length=20).kl


def test_padded_vocabulary(place, tmp_path):
    wide = load_model(place / "other")
    wide.resize_token_embeddings(VOCAB + 32, mean_resizing=False)
    save(wide, tmp_path / "wide")
    kwargs = {"text": place / "text.txt", "windows": 2, "length": 20}
    with pytest.raises(CheckpointError, match=f"vocabulary of {VOCAB} and the checkpoint of {VOCAB + 32}"):
        evaluate(place / "base", tmp_path / "wide", **kwargs)
    tokenizer().save_pretrained(tmp_path / "wide")
    result = evaluate(place / "base", tmp_path / "wide", **kwargs)
    # the rows beyond the common ones are left out, so that the copy's own distribution is back
    assert result.kl == pytest.approx(evaluate(place / "base", place / "other", **kwargs).kl, rel=1e-5)
    assert f"first {VOCAB} entries" in result.notes[0]


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_the_command_prints_json_alone_and_says_where_it_is_beside(place, quiet):
    words = ["eval", place / "base", place / "other", "--text", place / "text.txt", "--length", "20", "--json", *quiet]
    ended = CliRunner().invoke(app, [str(word) for word in words])
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    assert found == {**evaluate(place / "base", place / "other", text=place / "text.txt", length=20).to_dict(),
                     "base_tokens_per_second": found["base_tokens_per_second"],
                     "tokens_per_second": found["tokens_per_second"]}  # fmt: skip
    assert ended.stderr.splitlines() == ([] if quiet else [f"window {i} of 5" for i in range(1, 6)])


def test_another_tokenizer_is_refused(place, tmp_path):
    shutil.copytree(place / "other", tmp_path / "other")
    tokenizer(WORDS[::-1]).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="its tokenizer is not that of"):
        evaluate(place / "base", tmp_path / "other", text=place / "text.txt")
    many = tokenizer([*WORDS, "more"])
    with pytest.raises(CheckpointError, match=f"token {VOCAB} and the base a vocabulary of {VOCAB}"):
        evaluate(place / "base", place / "other", text="w1 w2 more", tokenizer=many)


def test_folders_that_cannot_be_loaded(place, tmp_path):
    base = place / "base"
    with pytest.raises(CheckpointError, match="no such model folder"):
        evaluate(base, tmp_path / "none")
    (tmp_path / "run" / ".bitpress").mkdir(parents=True)
    (tmp_path / "run" / ".bitpress" / "journal.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="unfinished bitpress run"):
        evaluate(base, tmp_path / "run")
    shutil.copytree(base, tmp_path / "holes")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weight missing .*layers\.1\.mlp\.up_proj"):
        load_model(tmp_path / "holes")
    shutil.copytree(base, tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(load_file(base / "model.safetensors"), tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle weights"):
        load_model(tmp_path / "pickle")
    assert load_model(tmp_path / "pickle", trust_pickle=True) is not None


def test_arguments_and_text_that_make_no_sense(place, tmp_path):
    base = place / "base"
    with pytest.raises(ConfigError, match="windows 0"):
        evaluate(base, base, windows=0)
    with pytest.raises(ConfigError, match="Did you mean 'bfloat16'"):
        load_model(base, "bfloat")
    with pytest.raises(ConfigError, match="'nowhere' is unknown"):
        load_model(base, device="nowhere")
    with pytest.raises(DataError, match="no such file"):
        evaluate(base, base, text=tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        evaluate(base, base, text=tmp_path / "binary.txt")
    with pytest.raises(DataError, match="empty"):
        evaluate(base, base, text="  ")
    with pytest.raises(DataError, match="1 tokens"):
        evaluate(base, base, text="w1")
    broken = load_model(base)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(NumericsError, match="the checkpoint gives NaN"):
        evaluate(load_model(base), broken, tokenizer=tokenizer(), text=place / "text.txt", length=20)


def test_generate_is_greedy_and_uses_the_chat_template(place, tmp_path):
    model, prompt = load_model(place / "base"), "w5 w6"
    ids = torch.tensor([[6, 7]])
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    expected = tokenizer().decode(ids[0, 2:], skip_special_tokens=True)
    assert generate(place / "base", prompt, 4) == generate(model, prompt, 4, tokenizer=tokenizer()) == expected
    chat = tokenizer(chat="{% for m in messages %}w9 {{ m['content'] }} w8{% endfor %}")
    assert generate(model, prompt, 4, tokenizer=chat) == generate(model, f"w9 {prompt} w8", 4, tokenizer=tokenizer())
    assert generate(model, prompt, 4, tokenizer=chat) != expected
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate(model, prompt, 0, tokenizer=chat)
    with pytest.raises(DataError, match="prompt is empty"):
        generate(model, "", 4, tokenizer=chat)
