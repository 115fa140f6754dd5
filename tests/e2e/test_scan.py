"""The sensitivity of layers: errors by hand, a curve that falls, recipes that oneshot runs as they are."""

from __future__ import annotations

import json
import shlex
import shutil
import sys

import pytest
import torch
from typer.testing import CliRunner

from bitpress import ConfigError, DataError, PlanError, inspect_checkpoint, journal, oneshot, scan
from bitpress.cli import app
from bitpress.math.masks import Structure, holds
from conftest import build, save, token_rows
from helpers import make_tokenizer, tensors

ROWS = token_rows(8, 32)
OPTIONS = {"num_calibration_samples": 8, "max_seq_length": 32}
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan") / "base"
    make_tokenizer(save(build("llama", torch.bfloat16, **WIDE), folder))
    return folder


@pytest.fixture(scope="module")
def place(base):
    return base.parent / "scan"


@pytest.fixture(scope="module")
def found(base, place):
    return scan(base, ROWS, output_dir=place, **OPTIONS)


def logits(model, ids):
    with torch.no_grad():
        return model.float()(input_ids=ids).logits.log_softmax(-1)


def test_the_kl_is_that_of_the_model_with_one_group_changed(base, found, tmp_path):
    """2:4 of one layer alone: its recipe run by oneshot, judged by hand."""
    from transformers import AutoModelForCausalLM

    layer = next(x for x in found.layers if x.name == "model.layers.1.mlp.down_proj")
    recipe = {"SparseGPTModifier": {"mask_structure": "2:4", "targets": [layer.name]}}
    oneshot(base, ROWS[:4], recipe, output_dir=tmp_path / "out", shuffle_calibration_samples=False,
            num_calibration_samples=4, max_seq_length=32)  # fmt: skip
    assert holds(tensors(tmp_path / "out")[f"{layer.name}.weight"], Structure(2, 4))
    once = scan(base, ROWS, shuffle_calibration_samples=False, **OPTIONS)
    ids = torch.tensor([row["input_ids"] for row in ROWS[:4]])  # half of the data
    p, q = (logits(AutoModelForCausalLM.from_pretrained(f), ids) for f in (base, tmp_path / "out"))
    by_hand = float((p.exp() * (p - q)).sum(-1).mean())
    measured = next(x for x in once.layers if x.name == layer.name).errors["2:4"]
    assert measured == pytest.approx(by_hand, rel=0.05) and by_hand > 0


def test_every_layer_has_every_width(found):
    assert len(found.layers) == 2 * 4  # q/k/v and gate/up are one
    assert sum(x.weights for x in found.layers) == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    for layer in found.layers:
        assert set(layer.errors) == {"2", "3", "4", "8", "2:4"}
        assert layer.errors["2"] > layer.errors["3"] > layer.errors["4"] > layer.errors["8"] > 0
        assert layer.errors["2:4"] > layer.errors["8"]
        size = "g128" if "down" in layer.name else "g64"  # 128 where it fits
        assert layer.schemes["4"] == f"W4A16 {size}" and layer.bits["2:4"] == 16
    assert found.uniform["4"].error == pytest.approx(sum(x.errors["4"] for x in found.layers), rel=1e-3)
    json.dumps(found.to_dict())


def test_the_curve_falls_and_no_uniform_width_is_below_it(found):
    sizes, errors = [p.bits_per_weight for p in found.curve], [p.error for p in found.curve]
    assert sizes == sorted(set(sizes)) and errors == sorted(set(errors), reverse=True) and len(sizes) > 10
    for column, alone in found.uniform.items():
        if column != "2:4":
            better = [p for p in found.curve if p.bits_per_weight <= alone.bits_per_weight + 1e-6]
            assert not better or alone.error >= better[-1].error * 0.999 or alone.bits_per_weight > sizes[-1]


@pytest.mark.parametrize("asked", [{"bits": 4.3}, {"bits": 3}, {"error": 0.01}, {"size": "60kB"}])
def test_what_is_suggested_runs_as_it_is(base, found, place, tmp_path, asked):
    if asked != {"bits": 4.3}:  # this one measures, the others take what was measured
        shutil.copytree(place, tmp_path / "scan")
    made = scan(base, ROWS, output_dir=tmp_path / "scan", **asked, **OPTIONS)
    point, out = made.suggestion.point, tmp_path / "out"
    if "bits" in asked:
        assert point.bits_per_weight <= asked["bits"]
    if "error" in asked:
        assert point.error <= 0.01
        assert all(p.error > 0.01 for p in made.curve if p.bits_per_weight < point.bits_per_weight - 0.05)
    if "size" in asked:
        assert point.bytes <= 60_000
    oneshot(base, ROWS, tmp_path / "scan/recipe.yaml", output_dir=out, **OPTIONS)
    held = inspect_checkpoint(out)
    report = json.loads((out / "report.json").read_text())
    assert report["totals"]["bits_per_weight"] == pytest.approx(point.bits_per_weight, abs=0.01) or any(
        "UNQUANTIZED" in line for line in made.suggestion.recipe.splitlines()
    )
    files = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert 0.99 * point.bytes <= files <= 1.01 * point.bytes and held.bytes < point.bytes
    assert "size_target" not in report  # no survey again


def test_by_gram_runs_no_probe(base, found, monkeypatch):
    monkeypatch.setattr("bitpress.survey._Survey._perturbed", None)
    quick = scan(base, ROWS, measure="gram", bits=4.2, **OPTIONS)
    for layer in quick.layers:
        assert 1 > layer.errors["2"] > layer.errors["3"] > layer.errors["4"] > layer.errors["8"] > 0
        assert 0 < layer.errors["2:4"] < 1
    whole = sum(x.weights for x in quick.layers)
    mean = sum(x.errors["4"] * x.weights for x in quick.layers) / whole
    assert quick.uniform["4"].error == pytest.approx(mean, rel=1e-3)
    assert quick.suggestion.point.bits_per_weight <= 4.2


@pytest.mark.parametrize("family", ["mixtral", "opt", "gemma3"])
def test_other_families(family, tmp_path):
    save(build(family, torch.bfloat16), tmp_path / "base")
    made = scan(tmp_path / "base", ROWS, measure="gram", bits=4.6, output_dir=tmp_path / "scan", **OPTIONS)
    assert all(x.errors["4"] > 0 for x in made.layers)
    oneshot(tmp_path / "base", ROWS, tmp_path / "scan/recipe.yaml", output_dir=tmp_path / "out", **OPTIONS)
    assert inspect_checkpoint(tmp_path / "out").bits_per_weight <= 4.61


def test_a_model_in_memory_stays_as_it_is(base, found):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    before = {n: p.clone() for n, p in model.named_parameters()}
    made = scan(model, ROWS, **OPTIONS)
    assert all(torch.equal(p, before[n]) and p.dtype == before[n].dtype for n, p in model.named_parameters())
    assert [x.errors for x in made.layers] == [x.errors for x in found.layers]
    assert not hasattr(model, "bitpress_report")


def test_killed_it_goes_on_and_measures_nothing_twice(base, tmp_path, found, monkeypatch):
    real, out = journal.Journal.note, tmp_path / "scan"

    def note(self, entry):
        real(self, entry)
        raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "note", note)
    with pytest.raises(KeyboardInterrupt):
        scan(base, ROWS, output_dir=out, **OPTIONS)
    monkeypatch.undo()
    assert not (out / "scan.json").exists()
    made = scan(base, ROWS, output_dir=out, **OPTIONS)
    assert [x.errors for x in made.layers] == [x.errors for x in found.layers]
    assert {f.name for f in out.iterdir()} == {"scan.json", "scan.html"}
    monkeypatch.setattr("bitpress.survey.survey", None)
    again = scan(base, ROWS, bits=4.2, output_dir=out, **OPTIONS)
    assert again.layers == made.layers and (out / "recipe.yaml").is_file()
    with pytest.raises(PlanError, match="holds another scan"):
        scan(base, ROWS, measure="gram", output_dir=out, **OPTIONS)
    with pytest.raises(PlanError, match="holds another scan"):
        scan(base, ROWS[1:], output_dir=out, **OPTIONS)


def test_faults(base, tmp_path):
    with pytest.raises(ConfigError) as caught:
        scan(base, ROWS, measure="hessian", bits=-1, error=0.1, group_size=0)
    assert len(caught.value.problems) == 4
    with pytest.raises(ConfigError, match="size: 'large' is not a size"):
        scan(base, ROWS, size="large")
    with pytest.raises(PlanError, match=r"out of reach: the least is 2\.\d+ bits per weight"):
        scan(base, ROWS, bits=1.5, measure="gram", **OPTIONS)
    with pytest.raises(PlanError, match="out of reach"):
        scan(base, ROWS, size="1kB", measure="gram", **OPTIONS)
    with pytest.raises(PlanError, match="nothing to do"):
        scan(base, ROWS, bits=20, measure="gram", **OPTIONS)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/thesis.txt").write_text("mine")
    with pytest.raises(PlanError, match="holds other files"):
        scan(base, ROWS, output_dir=tmp_path / "theirs", **OPTIONS)
    with pytest.raises(PlanError) as several:  # all at once
        scan(tmp_path / "nowhere", tmp_path / "no.jsonl", measure="x", output_dir=tmp_path / "theirs")
    assert {"measure", "nowhere", "no.jsonl", "holds other files"} <= {
        word for word in ("measure", "nowhere", "no.jsonl", "holds other files") if word in str(several.value)
    }
    with pytest.raises(DataError):
        scan(base, [], **OPTIONS)
    assert (tmp_path / "theirs/thesis.txt").read_text() == "mine"


def test_the_command(base, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    words = ["scan", str(base), "--dataset", str(tmp_path / "rows.jsonl"), "--num-samples", "8", "--max-seq-length",
             "32", "--measure", "gram", "-q"]  # fmt: skip
    done = CliRunner().invoke(app, [*words, "--bits", "4.2"])
    assert done.exit_code == 0, done.exception
    assert "suggested for at most 4.2 bits" in done.stdout and "config_groups:" in done.stdout
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "scan"), "--bits", "4.2"])
    assert f"--recipe {tmp_path}/scan/recipe.yaml" in done.stdout and "scan.html" in done.stdout
    done = CliRunner().invoke(app, [*words, "--json"])
    data = json.loads(done.stdout)
    assert len(data["layers"]) == 8 and data["suggestion"] is None and data["curve"]


def test_the_command_it_prints_runs_the_recipe_on_the_same_data(base, tmp_path, monkeypatch):
    (tmp_path / "my rows.jsonl").write_text("\n".join(json.dumps({"body": "w1 w2 w3 w4 " * 9}) for _ in range(6)))
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", "my rows.jsonl", "--text-column", "body", "--no-pack", "--num-samples", "4",
             "--max-seq-length", "24", "--batch-size", "2", "--seed", "7", "--trust-remote-code"]  # fmt: skip
    asked = ["--measure", "gram", "--bits", "4.3", "-q", "-o", "a scan"]
    done = CliRunner().invoke(app, ["scan", str(base), *words, *asked])
    assert done.exit_code == 0, done.exception
    monkeypatch.chdir("/")  # it can be pasted anywhere
    name, *line = shlex.split(done.stdout.splitlines()[-1])
    assert name == "bitpress" and line.count("--trust-remote-code") == 1 and line[-2:] == ["--output", "OUT"]
    done = CliRunner().invoke(app, [*line[:-1], str(tmp_path / "out"), "-q", "--no-generate"])
    assert done.exit_code == 0, done.exception
    report, scanned = (json.loads((tmp_path / f).read_text()) for f in ("out/report.json", "a scan/scan.json"))
    assert (
        report["data"]["fingerprint"] == scanned["data"]["fingerprint"]
        and report["seed"] == 7
        and report["data"]["sequences"] == 4
    )


def test_a_group_size_that_does_not_fit_is_told(base, monkeypatch):
    found = scan(base, ROWS, measure="gram", group_size=128, **OPTIONS)  # fits down_proj alone
    assert {x.schemes["4"] for x in found.layers if "down" in x.name} == {"W4A16 g128"}
    (note,) = found.notes
    assert "q_proj: 64 input columns are not divisible by group_size 128 (try 16, 32, 64, -1)" in note
    assert "[and 11 more linears]; what fits of 128, 64, 32 and a row is taken there" in note
    monkeypatch.setattr(sys.modules["bitpress.scan"], "_measured", lambda *a, **k: pytest.fail("measured"))
    for size in (7, 48):
        with pytest.raises(PlanError, match=f"q_proj: 64 input columns are not divisible by group_size {size} .try"):
            scan(base, ROWS, group_size=size, **OPTIONS)


def test_what_is_out_of_reach_is_told_before_anything_is_measured(base, monkeypatch):
    monkeypatch.setattr(sys.modules["bitpress.scan"], "_measured", lambda *a, **k: pytest.fail("measured"))
    for target in ({"bits": 0.1}, {"size": "1kB"}):
        with pytest.raises(PlanError, match=r"at most (0.1 bits|1.0 kB).*: out of reach: the least is.* kB with"):
            scan(base, ROWS, **target, **OPTIONS)
