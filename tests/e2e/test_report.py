"""The report of a run: complete from a folder, from memory, over stages, after a kill; and none of a failed run."""

from __future__ import annotations

import importlib
import json
import shlex
from dataclasses import replace
from html import escape

import pytest
import torch
from typer.testing import CliRunner

from bitpress import CheckpointError, ConfigError, NumericsError, oneshot, output, samples
from bitpress.again import again
from bitpress.cli import app
from bitpress.generation import generate
from bitpress.result import SavedModel
from conftest import build, save, token_rows
from helpers import OPTIONS, W4, assert_same_tensors, make_tokenizer, report_of, tensors

ROWS = token_rows()
LINEARS = 2 * 7


@pytest.fixture
def base(tmp_path):
    make_tokenizer(save(build("llama", torch.bfloat16), tmp_path / "base"))
    return tmp_path / "base"


def page_of(folder):
    return (folder / "report.html").read_text().replace("<wbr>", "")


def assert_whole(folder, linears=LINEARS):
    """The page says what report.json says: all of its layers, totals, data, recipe, versions."""
    report, page = report_of(folder), page_of(folder)
    assert len({row["name"] for row in report["layers"]}) == linears
    for row in report["layers"]:
        assert row["name"] in page
    for section in ("kinds-of-layers", "layer-by-layer", "what-is-most-sensitive", "time-and-memory",
                    "calibration-data", "generations", "recipe", "versions", "all-layers"):  # fmt: skip
        assert f'<section id="{section}">' in page
    assert (folder / "recipe.yaml").read_text().strip().splitlines()[-1].strip() in page
    assert all(version in page for version in report["versions"].values())
    totals = report["totals"]
    assert (
        set(totals["peak_bytes_by_phase"]) == set(totals["seconds_by_phase"]) >= {"prepare", "load", "solve", "write"}
    )
    assert all(0 < p["host"] <= totals["peak_host_bytes"] for p in totals["peak_bytes_by_phase"].values())
    assert 0 < sum(totals["seconds_by_phase"].values()) <= totals["seconds"] * 1.01 + 0.05
    return report, page


def test_of_a_folder(base, tmp_path):
    oneshot(base, ROWS, W4, output_dir=tmp_path / "out", prompts=["w1 w2"], **OPTIONS)
    report, page = assert_whole(tmp_path / "out")
    (said,) = report["generations"]["answers"]
    assert said["prompt"] == "w1 w2"
    for side, folder in (("before", base), ("after", tmp_path / "out")):
        assert said[side] == generate(folder, "w1 w2", 64, dtype="auto")
    assert said["before"] in page and said["after"][-20:] in page
    assert "12 of 32 tokens, 384 in all" in page and report["data"]["fingerprint"] in page
    assert "resumed_shards" not in report["totals"]


def test_of_a_model_in_memory(base, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.train()
    oneshot(model, ROWS, W4, tokenizer=tokenizer, prompts="w1 w2", output_dir=tmp_path / "out", **OPTIONS)
    report, _ = assert_whole(tmp_path / "out")
    (said,) = report["generations"]["answers"]
    assert said["before"] == generate(base, "w1 w2", 64, dtype="auto")
    assert said["after"] == generate(model, "w1 w2", 64, tokenizer=tokenizer) and model.training
    assert model.bitpress_report["generations"] == report["generations"]
    model.save_pretrained(tmp_path / "saved")
    saved, _ = assert_whole(tmp_path / "saved")
    assert saved["generations"] == report["generations"]


@pytest.mark.parametrize("blocks", [1, 2])
def test_of_a_run_that_was_killed(base, tmp_path, monkeypatch, blocks):
    out, real = tmp_path / "out", output.Output.write

    def write(self, shard, *args, **options):
        if shard == blocks:
            raise KeyboardInterrupt
        real(self, shard, *args, **options)

    monkeypatch.setattr(output.Output, "write", write)
    with pytest.raises(KeyboardInterrupt):
        oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)
    monkeypatch.undo()
    assert not (out / "report.html").exists() and not (out / "report.json").exists()
    log = [json.loads(line) for line in (out / ".bitpress/journal.jsonl").read_text().splitlines()]
    before = sum(p["seconds"] for entry in log[1:] for p in entry["phases"].values())
    oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)
    report, page = assert_whole(out)
    assert report["totals"]["resumed_shards"] == blocks and "The run was interrupted" in page
    assert before > 0 and report["totals"]["seconds"] > before
    # solving of the first blocks was in the attempt that was killed
    solved = sum(entry["phases"]["solve"]["seconds"] for entry in log[1:])
    assert report["totals"]["seconds_by_phase"]["solve"] + 0.01 >= solved > 0


def test_of_stages_and_of_one_killed_between_them(base, tmp_path, monkeypatch):
    recipe = {
        "sparsity_stage": {"sparsity_modifiers": {
            "SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4", "ignore": ["lm_head"]}}},
        "quantization_stage": {"quantization_modifiers": W4},
    }  # fmt: skip
    oneshot(base, ROWS, recipe, output_dir=tmp_path / "straight", **OPTIONS)
    real = output.Output.write

    def write(self, shard, *args, **options):
        if self.folder == tmp_path / "out":  # the last stage
            raise KeyboardInterrupt
        real(self, shard, *args, **options)

    monkeypatch.setattr(output.Output, "write", write)
    with pytest.raises(KeyboardInterrupt):
        oneshot(base, ROWS, recipe, output_dir=tmp_path / "out", **OPTIONS)
    monkeypatch.undo()
    oneshot(base, ROWS, recipe, output_dir=tmp_path / "out", **OPTIONS)
    for name in ("straight", "out"):
        report, page = assert_whole(tmp_path / name)
        assert len(report["layers"]) == 2 * LINEARS and "sparsity_stage" in page and "2:4" in page


def test_a_failed_run_has_none(tmp_path):
    model = build("llama", torch.bfloat16)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    make_tokenizer(save(model, tmp_path / "base"))
    with pytest.raises(NumericsError):
        oneshot(tmp_path / "base", ROWS, W4, output_dir=tmp_path / "out", prompts=["w1"], **OPTIONS)
    assert not list((tmp_path / "out").glob("report*"))
    good = tmp_path / "good"
    make_tokenizer(save(build("llama", torch.bfloat16), good))
    oneshot(good, ROWS, W4, output_dir=tmp_path / "out", fresh=True, **OPTIONS)
    with pytest.raises(NumericsError):  # what an earlier run has left is gone before this one starts
        oneshot(tmp_path / "base", ROWS, W4, output_dir=tmp_path / "out", fresh=True, **OPTIONS)
    assert not list((tmp_path / "out").glob("report*"))


@pytest.mark.parametrize(("family", "linears"), [("mixtral", 2 * 16), ("gpt_neox", 2 * 4)])
def test_experts_share_a_cell(tmp_path, family, linears):
    make_tokenizer(save(build(family, torch.bfloat16), tmp_path / "base"))
    ignore = {"GPTQModifier": {**W4["GPTQModifier"], "ignore": ["lm_head", "embed_out"]}}
    oneshot(tmp_path / "base", ROWS, ignore, output_dir=tmp_path / "out", **OPTIONS)
    _, page = assert_whole(tmp_path / "out", linears)
    assert ("Experts of a block share a cell" in page) == (family == "mixtral")


def test_of_a_size_target_and_of_owl(tmp_path):
    save(build("llama", torch.bfloat16, hidden_size=128, intermediate_size=256), tmp_path / "base")
    oneshot(tmp_path / "base", ROWS, bits=4.4, output_dir=tmp_path / "out", **OPTIONS)
    report, page = assert_whole(tmp_path / "out")
    assert "By the survey" in page and {"survey", "comparison"} & set(report["totals"]["seconds_by_phase"])
    owl = {"WandaPruningModifier": {"sparsity": 0.5, "sparsity_profile": "owl", "ignore": ["lm_head"]}}
    oneshot(tmp_path / "base", ROWS, owl, output_dir=tmp_path / "owl", **OPTIONS)
    _, page = assert_whole(tmp_path / "owl")
    assert "by its share of outliers" in page


def test_rounding_without_data(base, tmp_path):
    recipe = {"QuantizationModifier": {"scheme": "FP8_DYNAMIC", "ignore": ["lm_head"]}}
    oneshot(base, None, recipe, output_dir=tmp_path / "out")
    _, page = assert_whole(tmp_path / "out")
    assert "None was needed." in page and "lost energy of the weight" in page


def test_the_line_in_the_report_does_the_same_run(base, tmp_path, monkeypatch):
    text = tmp_path / "a text.jsonl"
    text.write_text(
        "\n".join(json.dumps({"body": " ".join(f"w{(7 * i + j) % 90}" for j in range(40))}) for i in range(9))
    )
    monkeypatch.chdir(tmp_path)
    words = ["--group-size", "16", "--effort", "fast", "--dataset", text.name, "--text-column", "body", "--no-pack",
             "--num-samples", "5", "--max-seq-length", "24", "--seed", "7", "--batch-size", "2", "--dtype", "float32",
             "--format", "gptq", "--no-verify", "-q", "--no-generate"]  # fmt: skip
    assert run("oneshot", base.name, "--scheme", "W4A16", *words, "-o", "out").exit_code == 0
    report, page = report_of(tmp_path / "out"), page_of(tmp_path / "out")
    assert escape(report["again"]) in page
    monkeypatch.chdir("/")  # it can be pasted anywhere
    name, *again = shlex.split(report["again"])
    done = run(*again, "-q", "--no-generate")
    assert name == "bitpress" and done.exit_code == 0, done.exception
    other = report_of(tmp_path / "out-again")
    assert other["run"] == report["run"] and other["seed"] == 7 and other["data"]["sequences"] == 5
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "out-again"))


def test_what_only_python_can_give_is_a_call(base, tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    oneshot(base, rows, W4, output_dir=tmp_path / "out", min_expert_tokens=3, **OPTIONS)
    again = report_of(tmp_path / "out")["again"]
    compile(again, "again", "exec")
    for line in ("from bitpress import oneshot", f"    model={str(base)!r},", "    dataset=...,  # list",
                 "    min_expert_tokens=3,", "    max_seq_length=32,", "    num_calibration_samples=12,",
                 f"    recipe={str(tmp_path / 'out/recipe.yaml')!r},"):  # fmt: skip
        assert line in again.splitlines()


@pytest.mark.parametrize("verb", ["train", "apply"])
def test_the_line_of_a_run_that_trains_says_how(verb, base, tmp_path, monkeypatch):
    words = [verb, str(base), "--recipe", "r.yaml", "--dataset", "ultrachat-200k", "--train-split", "a[:5%]",
             "--epochs", "1.5", "--no-mask-prompts", "--distill-teacher", str(base), "--distill-hardness", "0.5",
             "--set", "lr_scheduler_type=cosine", "--set", "warmup_steps=3", "--seed", "3", "-o", str(tmp_path / "out"),
             "--no-generate", "-q"]  # fmt: skip
    given = []

    def stop(args):
        given.append(args)
        raise ConfigError("seen")

    monkeypatch.setattr(importlib.import_module(f"bitpress.{verb}"), "run", stop)
    assert str(run(*words).exception) == "seen"
    (tmp_path / "recipe.yaml").write_text("")
    line = again(given[0], tmp_path / "recipe.yaml")
    assert str(run(*shlex.split(line)[1:]).exception) == "seen"
    first, second = given
    assert (second.recipe, second.output_dir) == (tmp_path / "recipe.yaml", tmp_path / "out-again")
    own = {"recipe": None, "output_dir": None, "progress": None}
    assert replace(first, **own) == replace(second, **own)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert again(first, tmp_path / "recipe.yaml") == f"torchrun --nproc-per-node=2 -m {line}"
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4"), ("MASTER_ADDR", "one"), ("MASTER_PORT", "7")):
        monkeypatch.setenv(name, value)
    nodes = "--nproc-per-node=4 --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=one:7"
    assert again(first, tmp_path / "recipe.yaml") == f"torchrun {nodes} -m {line}"
    assert again(first, None).startswith(f"# in script.py, started by: torchrun {nodes} script.py\nfrom bitpress")


# the command line


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_makes_generations_where_they_take_no_more_memory(base, tmp_path, monkeypatch):
    words = ["oneshot", base, "--scheme", "W4A16", "--group-size", "16", "--method", "rtn", "-q", "-o"]
    assert run(*words, tmp_path / "out").exit_code == 0
    (said,) = report_of(tmp_path / "out")["generations"]["answers"]
    assert "France" in said["prompt"] and "capital of France" in page_of(tmp_path / "out")
    assert run(*words, tmp_path / "none", "--no-generate").exit_code == 0
    assert "generations" not in report_of(tmp_path / "none")
    assert "bitpress report OUT --prompt TEXT" in page_of(tmp_path / "none")
    real = samples.open_checkpoint
    monkeypatch.setattr(samples, "open_checkpoint", lambda *args: replace(real(*args), bytes=1 << 50))
    assert run(*words, tmp_path / "large").exit_code == 0
    assert "more than the run did" in report_of(tmp_path / "large")["generations"]["note"]
    assert run(*words, tmp_path / "asked", "--prompt", "w1").exit_code == 0
    assert [a["prompt"] for a in report_of(tmp_path / "asked")["generations"]["answers"]] == ["w1"]


def test_the_command_report(base, tmp_path):
    out = tmp_path / "out"
    oneshot(base, None, {"QuantizationModifier": {"scheme": "FP8_DYNAMIC", "ignore": ["lm_head"]}}, output_dir=out)
    (out / "report.html").unlink()
    assert run("report", out).exit_code == 0
    assert_whole(out)
    done = run("report", out, "--base", base, "--prompt", "w3", "--prompt", "w4 w5")
    assert done.exit_code == 0, done.exception
    assert [a["prompt"] for a in report_of(out)["generations"]["answers"]] == ["w3", "w4 w5"]
    assert "w4 w5" in page_of(out) and "report.html" in done.output
    done = run("report", out, "--prompt", "w7", "-q")  # the report says where the model is
    assert done.exit_code == 0 and done.output == ""
    assert "w7" in page_of(out)
    # the run is the same run still
    recipe = {"QuantizationModifier": {"scheme": "FP8_DYNAMIC", "ignore": ["lm_head"]}}
    assert isinstance(oneshot(base, None, recipe, output_dir=out), SavedModel)
    for words, wrong, text in [
        (("report", out, "--base", base), ConfigError, "--base: goes with --prompt"),
        (("report", base), CheckpointError, "no report of a bitpress run"),
        (("report", tmp_path / "nowhere"), CheckpointError, "no report of a bitpress run"),
        (("report", out, "--base", tmp_path / "nowhere", "--prompt", "w3"), ConfigError, "no such model folder"),
    ]:
        done = run(*words)
        assert isinstance(done.exception, wrong) and text in str(done.exception), done.exception


def test_prompts_that_cannot_be_answered(tmp_path):
    save(build("llama", torch.bfloat16), tmp_path / "base")  # no tokenizer
    with pytest.raises(ConfigError, match="the model brings none"):
        oneshot(tmp_path / "base", ROWS, W4, output_dir=tmp_path / "out", prompts=["w1"], **OPTIONS)
    with pytest.raises(ConfigError, match="prompts: expected texts"):
        oneshot(tmp_path / "base", ROWS, W4, output_dir=tmp_path / "out", prompts=["w1", ""], **OPTIONS)
    assert not (tmp_path / "out").exists()
