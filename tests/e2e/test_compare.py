"""Comparing checkpoints of several formats: the figures of `evaluate` for each, in a table, as JSON and as a page."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bitpress import CheckpointError, ConfigError, PlanError, compare, convert, evaluate, oneshot
from bitpress.cli import app
from bitpress.evaluate import generate, load_model
from bitpress.tables import comparison_table
from conftest import build, save
from helpers import make_tokenizer, tensors

PROMPTS = ["w1 w2 w3", "w4 <b>&"]
TEXT = " ".join(f"w{(i * 37) % 90}" for i in range(90))
KEYS = {"text": TEXT, "windows": 2, "length": 40}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, an int4 checkpoint, an fp8 one with rounded activations, and a pruned dense one."""
    path = tmp_path_factory.mktemp("models")
    make_tokenizer(save(build("llama", torch.bfloat16), path / "base"))
    recipes = {
        "int4": {"QuantizationModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}},
        "fp8": {"QuantizationModifier": {"scheme": "FP8_DYNAMIC", "ignore": ["lm_head"]}},
        "pruned": {"MagnitudePruningModifier": {"sparsity": 0.5, "ignore": ["lm_head"]}},
    }
    for name, recipe in recipes.items():
        oneshot(path / "base", None, recipe, output_dir=path / name)
    return path


@pytest.fixture(scope="module")
def result(place):
    return compare(place / "base", place / "int4", place / "fp8", place / "pruned", prompts=PROMPTS, max_new_tokens=5,
                   **KEYS)  # fmt: skip


def test_each_has_the_figures_of_evaluate(place, result):
    assert [m.name for m in result.checkpoints] == ["int4", "fp8", "pruned"] and not result.failed
    for row in result.checkpoints:
        one = evaluate(place / "base", place / row.name, **KEYS)
        assert (row.perplexity, row.kl, row.kl_p99, row.top1) == (one.perplexity, one.kl, one.kl_p99, one.top1)
        assert row.bytes == one.bytes and row.tokens_per_second > 0 and row.load_seconds > 0
        assert result.base.perplexity == one.base_perplexity and result.base.bytes == one.base_bytes
    assert result.base.kl is None and result.base.bits_per_weight is None and result.base.bits_per_parameter == 16
    int4, fp8, pruned = result.checkpoints
    assert int4.bits_per_weight == 5 and "W4A16 g16" in int4.kind and "FP8_DYNAMIC" in fp8.kind
    assert pruned.kind == "dense" and pruned.bits_per_weight is None
    assert (result.windows, result.length, result.tokens) == (2, 40, 78)


def test_answers_are_those_of_generate(place, result):
    for row in (result.base, *result.checkpoints):
        assert row.generated_per_second > 0
        assert list(row.answers) == [generate(place / row.name, prompt, 5) for prompt in PROMPTS]


def test_what_is_shown(place, result, tmp_path):
    console = Console(width=110)
    with console.capture() as captured:
        console.print(comparison_table(result))
    text = captured.get()
    for word in ("int4", "fp8", "pruned", "perplexity", "load (s)", "generation (tokens/s)", PROMPTS[1], "5.000"):
        assert word in text
    assert f"{result.checkpoints[0].kl:.5f}" in text and "failed" not in text
    many = replace(result, checkpoints=result.checkpoints * 2)
    narrow = Console(width=80)
    with narrow.capture() as captured:
        narrow.print(comparison_table(many))
    text = captured.get()
    assert text.count("generation (tokens/s)") == 2 and "…" not in text  # three checkpoints a table, nothing cut
    page = tmp_path / "page.html"
    words = [str(place / n) for n in ("base", "int4", "fp8")]
    done = CliRunner().invoke(
        app,
        ["compare", *words, "--windows", "1", "--length", "20", "--prompt", PROMPTS[1], "--max-new-tokens", "3",
         "--html", str(page), "--json", "-q"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [c["name"] for c in data["checkpoints"]] == ["int4", "fp8"] and data["prompts"] == PROMPTS[1:]
    html = page.read_text()
    assert "w4 &lt;b&gt;&amp;" in html and "<b>&amp;" not in html
    assert not re.search(r"""(src|href)=(?!["']?data:)|<script|@import|url\(""", html)


def test_a_model_in_memory_and_the_same_checkpoint_twice(place):
    base = load_model(place / "base")
    found = compare(place / "base", base, place / "int4", place / "int4", **KEYS)
    memory, first, second = found.checkpoints
    assert (memory.kind, memory.kl, memory.top1, memory.load_seconds) == ("in memory", 0.0, 1.0, None)
    assert first.kl == second.kl and first.name != second.name


def test_what_cannot_be_loaded_keeps_its_place(place, tmp_path):
    broken = tmp_path / "broken"
    save(build("llama", torch.bfloat16), broken)
    config = json.loads((broken / "config.json").read_text())
    config["num_hidden_layers"] = 3  # weights that the file lacks
    (broken / "config.json").write_text(json.dumps(config))
    found = compare(place / "base", broken, place / "int4", prompts=PROMPTS[:1], max_new_tokens=2, **KEYS)
    assert [m.name for m in found.failed] == ["broken"] and "missing" in found.failed[0].error
    assert found.failed[0].kl is None and found.checkpoints[1].kl > 0
    with pytest.raises(CheckpointError, match=r"broken: .*missing"):
        compare(place / "base", broken, **KEYS)
    files = broken_files(place, tmp_path)
    found = compare(place / "base", *files.values(), place / "int4", prompts=PROMPTS[:1], max_new_tokens=2, **KEYS)
    for row, reason in zip(found.checkpoints, files, strict=False):
        assert row.name == files[reason].name and reason in row.error and row.kl is None and row.bytes is None
        assert row.kind == "unreadable"
    assert found.checkpoints[-1].error is None and len(found.failed) == len(files)
    with pytest.raises(CheckpointError) as caught:  # none is left
        compare(place / "base", *files.values(), **KEYS)
    assert len(caught.value.problems) == len(files)
    words = [str(p) for p in (place / "base", broken, *files.values(), place / "int4")]
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["compare", *words, "--windows", "1", "--length", "20", "--html", str(page)])
    assert done.exit_code == 1 and "cut: left out: " in done.stderr
    assert "1 window of 20 tokens" in page.read_text() and 'id="failed"' in page.read_text()
    for name in ("broken", *(file.name for file in files.values())):
        assert f"failed: {name}: " in done.stdout and f"<li>{name}: " in page.read_text()


def changed(source, folder, change):
    """A copy whose first down_proj is changed."""
    name = "model.layers.0.mlp.down_proj.weight"
    shutil.copytree(source, folder)
    held = tensors(folder)
    save_file({**held, name: change(held[name]).contiguous()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_damaged_weight_is_named(place, tmp_path):
    cut = changed(place / "base", tmp_path / "cut", lambda w: w[:16])
    with pytest.raises(CheckpointError, match=r"proj.weight is 16 x 64, by its config.json 32 x 64") as caught:
        compare(place / "base", cut, **KEYS)
    assert str(caught.value).startswith(f"{cut}: 1 weight of another shape (model.layers.0.mlp.down_proj")
    codes = shutil.copytree(place / "int4", tmp_path / "codes")
    (file,) = [f for f in codes.glob("*.safetensors") if "model.layers.0.mlp.down_proj.weight_packed" in load_file(f)]
    held = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight_packed"
    save_file({**held, name: held[name][:8].contiguous()}, file, metadata={"format": "pt"})
    for read in (
        lambda: compare(place / "base", codes, **KEYS),
        lambda: convert(codes, tmp_path / "out", format="gptq"),
    ):
        with pytest.raises(CheckpointError, match=r"down_proj.weight_packed: holds 8 x 8 in place of 32 x 8"):
            read()
    nan = changed(place / "base", tmp_path / "nan", lambda w: w * torch.nan)
    large = changed(place / "base", tmp_path / "large", lambda w: w.new_full(w.shape, 3e38))
    for folder, dtype, why in (
        (nan, "float32", "its model.layers.0.mlp.down_proj.weight holds NaN"),
        (nan, "bfloat16", "holds NaN"),
        (large, "bfloat16", "its weights are finite, so products overflow in its dtype: run it in float32"),
        (large, "float32", "its weights are finite, also in float32"),
    ):
        with pytest.raises(CheckpointError, match=f"gives NaN logits: .*{why}"):
            compare(place / "base", folder, dtype=dtype, **KEYS)


def test_a_base_without_a_tokenizer_takes_one_by_name(place, tmp_path):
    save(build("llama", torch.bfloat16), tmp_path / "bare")
    for command in ("compare", "eval"):
        words = [command, str(tmp_path / "bare"), str(place / "int4"), "--windows", "1", "--length", "20", "-q"]
        done = CliRunner().invoke(app, words)
        assert "holds none of tokenizer.json" in str(done.exception) and "--tokenizer of eval" in str(done.exception)
        done = CliRunner().invoke(app, [*words, "--tokenizer", str(place / "base")])
        assert done.exit_code == 0, done.exception


def broken_files(place, tmp_path):
    """Checkpoints with a fault in a file, by a word of what is said of it."""

    def copy(name):
        return shutil.copytree(place / "int4", tmp_path / name)

    cut, gone, config, words, half = map(copy, ("cut", "gone", "config", "words", "half"))
    shard = next(cut.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    next(gone.glob("*.safetensors")).unlink()
    (config / "config.json").write_text("{")
    (words / "tokenizer.json").write_text('{"version"')
    (half / "config.json").unlink()
    return {
        "its header asks for": cut, "not there": gone, "cannot be read": config, "tokenizer cannot be loaded": words,
        "no config.json": half,
    }  # fmt: skip


def test_one_that_cannot_answer_keeps_its_figures(place, monkeypatch):
    real, asked = sys.modules["bitpress.compare"].answer, []

    def answer(model, *more):
        asked.append(model)
        if len(asked) == 6:  # the second model, in its second answer (the first call warms up)
            raise RuntimeError("no such kernel")
        return real(model, *more)

    monkeypatch.setattr(sys.modules["bitpress.compare"], "answer", answer)
    found = compare(place / "base", place / "int4", place / "pruned", prompts=PROMPTS, max_new_tokens=2, **KEYS)
    assert found.checkpoints[0].error == "RuntimeError: no such kernel" and found.checkpoints[0].kl > 0
    assert found.checkpoints[1].error is None and found.checkpoints[1].answers


def test_all_faults_come_at_once_and_before_any_load(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["bitpress.compare"], "load_checkpoint", None)
    with pytest.raises(PlanError) as caught:
        compare(place / "base", tmp_path / "nowhere", tmp_path, windows=0, dtype="int3", prompts=["ok", " "],
                html=tmp_path / "no" / "x.html", text="")  # fmt: skip
    found = "\n".join(caught.value.problems)
    for word in ("nowhere", "not a checkpoint", "windows 0", "'int3'", "the prompt is empty", "no such folder",
                 "the text is empty"):  # fmt: skip
        assert word in found
    with pytest.raises(ConfigError, match="expected a folder, a hub id, a GGUF file or a model in memory, got 5"):
        compare(place / "base", 5)
    with pytest.raises(ConfigError, match="name at least one"):
        compare(place / "base")
    other = tmp_path / "other"
    tokens = make_tokenizer(save(build("llama", torch.bfloat16), other))
    tokens.add_tokens(["more"])
    tokens.save_pretrained(other)
    with pytest.raises(CheckpointError, match="its tokenizer is not that of"):
        compare(place / "base", other)


def test_prompts_from_a_file(place, tmp_path):
    (tmp_path / "prompts.txt").write_text("w1 w2\n\nw3\n")
    words = ["compare", str(place / "base"), str(place / "int4"), "--windows", "1", "--length", "20", "-q", "--json"]
    more = ["--prompts", str(tmp_path / "prompts.txt"), "--prompt", "w9", "--max-new-tokens", "2"]
    done = CliRunner().invoke(app, [*words, *more])
    assert json.loads(done.stdout)["prompts"] == ["w9", "w1 w2", "w3"]
    (tmp_path / "prompts.txt").write_text("\n")
    done = CliRunner().invoke(app, [*words, *more])
    assert "holds no prompt" in str(done.exception)
