"""AWQ and SmoothQuant end to end: both forms, streamed and in memory, resumed, with every kind of quantizer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitpress import NumericsError, chain, oneshot, output
from bitpress.folds import Fold
from bitpress.math.grid import Solved
from bitpress.modifiers.awq import AWQModifier
from bitpress.modifiers.obcq import SparseGPTModifier
from bitpress.modifiers.quantization import GPTQModifier, QuantizationModifier
from bitpress.modifiers.smoothquant import SmoothQuantModifier
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import FAMILIES, build, save, token_rows, with_outliers
from helpers import OPTIONS, PLAIN, assert_same_tensors, client, distance, logits, report_of, tensors

ROWS = token_rows()
G16 = {"group_size": 16, "ignore": ["lm_head"]}
RECIPES = {
    "awq": [AWQModifier(scheme="W4A16_ASYM", n_grid=5, **G16)],
    "awq, then gptq": [AWQModifier(n_grid=5), GPTQModifier(scheme="W4A16", refine=0, **G16)],
    "smoothquant, then gptq": [
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(scheme="W8A8", ignore=["lm_head"], **PLAIN),
    ],
}
METHODS = dict(zip(RECIPES, ("awq+rtn", "awq+gptq", "smoothquant+gptq"), strict=True))


def run(model, recipe, out=None, **more):
    return oneshot(model, ROWS, recipe, output_dir=out, **{**OPTIONS, **more})


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a model with outliers, and what a recipe makes of it; each is run once."""
    made = {}

    def get(family, name):
        if (family, name) not in made:
            place = tmp_path_factory.mktemp("straight")
            base = save(with_outliers(family), place / "base")
            run(base, RECIPES[name], place / "out")
            made[family, name] = base, place / "out"
        return made[family, name]

    return get


@pytest.mark.parametrize("name", RECIPES)
def test_streamed_and_in_memory_are_the_same(name, straight, tmp_path):
    model = with_outliers()
    base, out = straight("llama", name)
    written, before = tensors(out), tensors(base)
    changed = run(model, RECIPES[name])
    changed.save_pretrained(tmp_path / "memory", save_compressed=True)
    assert_same_tensors(tensors(tmp_path / "memory"), written)

    rows = report_of(out)["layers"]
    assert {r["method"] for r in rows} == {METHODS[name]} and {r["error_of"] for r in rows} == {"output"}
    norms = [n for n in before if n.endswith("layernorm.weight")]
    moved = [n for n in norms if not torch.equal(before[n], written[n])]
    assert len(norms) == 4 and moved
    assert moved == norms or name == "awq, then gptq"  # there a scale must save a tenth of the error
    assert torch.equal(before["model.norm.weight"], written["model.norm.weight"])
    original = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    assert distance(client(out), original) < 0.5
    if "smoothquant" not in name:  # there transformers rounds activations too
        assert torch.equal(logits(client(out)), logits(changed))


OTHERS = ["qwen2", "gemma2", "phi3", "opt", "gpt_neox", "falcon", "olmo2", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("family", OTHERS)
def test_every_family_computes_the_same_with_its_scales(family, monkeypatch):
    """With a solver that leaves weights as they are, nothing but the folds is done."""
    monkeypatch.setitem(FAMILIES, "olmo2", ("Olmo2Config", FAMILIES["llama"][1]))

    def keep(steps, problems, dtype):
        return [[Solved(None, None, torch.zeros(()), weight=w) for w in weights] for weights, _ in problems]

    monkeypatch.setattr(chain, "solve_each", keep)
    model = with_outliers(family, torch.float32)
    before, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    run(model, [SmoothQuantModifier(), QuantizationModifier(scheme="W8A16", **G16)])
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, weights[n])]
    assert len(changed) >= 2 * 4
    assert float((logits(model) - before).norm() / before.norm()) < 1e-4


def test_outlier_channels_cost_less_with_awq(tmp_path):
    base = save(with_outliers(dtype=torch.float32), tmp_path / "base")
    scheme = {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}
    run(base, {"QuantizationModifier": scheme}, tmp_path / "rtn")
    run(base, {"AWQModifier": {**scheme, "n_grid": 8, "clip": False}}, tmp_path / "awq")
    run(base, {"AWQModifier": {**scheme, "n_grid": 8}}, tmp_path / "clip")
    run(base, {"AWQModifier": {"n_grid": 8}, "GPTQModifier": scheme}, tmp_path / "gptq")
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    off = {n: distance(client(tmp_path / n, torch.float32), original) for n in ("rtn", "awq", "clip", "gptq")}
    assert off["awq"] < off["rtn"] and off["gptq"] < off["awq"], off
    errors = {n: sum(r["rel_error"] for r in report_of(tmp_path / n)["layers"]) for n in ("awq", "clip")}
    assert errors["clip"] < errors["awq"]


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llama", r) for r in RECIPES), pytest.param("mixtral", "awq, then gptq", marks=pytest.mark.slow)],
)
def test_resumed_after_every_block_it_ends_with_the_same_bytes(family, name, straight, tmp_path, monkeypatch):
    base, whole = straight(family, name)
    expected = tensors(whole)
    real = output.Output.write
    stops = iter((1, 2, None))

    def write(self, at, *args, **options):
        if at == stop:
            raise KeyboardInterrupt
        real(self, at, *args, **options)

    monkeypatch.setattr(output.Output, "write", write)
    while (stop := next(stops)) is not None:
        with pytest.raises(KeyboardInterrupt):
            run(base, RECIPES[name], tmp_path / "out")
    run(base, RECIPES[name], tmp_path / "out", resume=True)
    assert_same_tensors(tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_little_memory_gives_the_same_bytes(family, tmp_path, monkeypatch):
    """Statistics that are not held at once are collected again once the scales are known."""
    base = save(with_outliers(family), tmp_path / "base")
    recipe = [AWQModifier(n_grid=5), GPTQModifier(scheme="W4A16", correct=0.5, **G16, **PLAIN)]
    run(base, recipe, tmp_path / "a")
    from bitpress import plan

    real = plan.budget
    monkeypatch.setattr(plan, "budget", lambda *a, **k: {**real(*a, **k), "gram_bytes": 1})
    run(base, recipe, tmp_path / "b")
    assert_same_tensors(tensors(tmp_path / "b"), tensors(tmp_path / "a"))


def test_both_kinds_of_smoothing_in_one_stage(tmp_path):
    base = save(build("llama"), tmp_path / "base")
    recipe = [SmoothQuantModifier(), AWQModifier(n_grid=5), QuantizationModifier(scheme="W8A8", ignore=["lm_head"])]
    run(base, recipe, tmp_path / "out")
    assert {r["method"] for r in report_of(tmp_path / "out")["layers"]} == {"smoothquant+awq+rtn"}
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert distance(client(tmp_path / "out", torch.float32), original) < 0.06


@pytest.mark.parametrize(
    "recipe",
    {
        "clip off": [AWQModifier(scheme="W4A16", clip=False, **G16)],
        "floats of two levels": [AWQModifier(scheme="NVFP4A16", ignore=["lm_head"])],
        "floats by channel": [AWQModifier(), QuantizationModifier(scheme="FP8_DYNAMIC", ignore=["lm_head"])],
        "static inputs": [SmoothQuantModifier(), GPTQModifier(scheme="FP8", ignore=["lm_head"])],
        "pruned too": [AWQModifier(n_grid=5), SparseGPTModifier(sparsity=0.5, mask_structure="2:4", ignore=["lm_head"]),
                       GPTQModifier(scheme="W4A16", refine=0, **G16)],
        "log": [SmoothQuantModifier(algorithm="log_equalization"),
                QuantizationModifier(scheme="W8A8", ignore=["lm_head"])],
    }.items(),
    ids=lambda item: item[0],
)  # fmt: skip
def test_with_every_kind_of_quantizer(recipe, tmp_path):
    base = save(build("llama", torch.bfloat16), tmp_path / "base")
    run(base, recipe[1], tmp_path / "out")
    rows = report_of(tmp_path / "out")["layers"]
    assert all(r["error_of"] == "output" or "smoothquant" in r["method"] for r in rows)
    assert all(0 < r["rel_error"] < (0.5 if "pruned" in recipe[0] else 0.05) for r in rows)
    if "pruned" in recipe[0]:
        assert all(abs(r["sparsity"] - 0.5) < 0.1 for r in rows)
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    new = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert distance(new, original) < (0.9 if "pruned" in recipe[0] else 0.35)


def test_a_stage_that_only_smooths(tmp_path):
    """It writes a dense model that computes the same, for a later stage or another tool to quantize."""
    base = save(with_outliers(dtype=torch.float32), tmp_path / "base")
    recipe = {
        "smooth_stage": {"smooth_modifiers": {"SmoothQuantModifier": {"smoothing_strength": 0.8}}},
        "quant_stage": {"quant_modifiers": {"GPTQModifier": {"scheme": "W8A8", "ignore": ["lm_head"]}}},
    }
    run(base, recipe, tmp_path / "out", stage="smooth_stage")
    out = tmp_path / "out/smooth_stage"
    original, smooth = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (base, out))
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys() and not torch.equal(before[NORM], after[NORM])
    assert distance(smooth, original) < 1e-4
    assert {r["method"] for r in report_of(out)["layers"]} == {"smoothquant"}

    run(base, recipe, tmp_path / "whole")
    assert torch.equal(tensors(tmp_path / "whole")[NORM], after[NORM])
    assert distance(client(tmp_path / "whole", torch.float32), original) < 0.06


NORM = "model.layers.0.input_layernorm.weight"


def test_a_producer_that_is_not_compressed_is_scaled_exactly(tmp_path):
    """Its rows are stored as they are, so the scale is a power of two: no bit of a weight is lost."""
    base = save(with_outliers(), tmp_path / "base")
    recipe = [SmoothQuantModifier(), QuantizationModifier(scheme="W8A8", targets=["o_proj"])]
    run(base, recipe, tmp_path / "out")
    before, after = (tensors(f)["model.layers.0.self_attn.v_proj.weight"].float() for f in (base, tmp_path / "out"))
    ratio = (before / after).nan_to_num(1)
    assert torch.equal(ratio, ratio[:, :1].expand_as(ratio))
    assert torch.equal(ratio.log2(), ratio.log2().round()) and not torch.equal(before, after)
    assert len(report_of(tmp_path / "out")["layers"]) == 2


def test_a_wrong_fold_is_caught_on_real_data(tmp_path, monkeypatch):
    """Whatever the plan says, the block's output on a real sequence has the last word."""
    base = save(with_outliers(), tmp_path / "base")
    from bitpress import foldplan

    wrong = Fold("self_attn.q_proj", ("self_attn.o_proj",), layout="all rows")
    real = foldplan.find_folds

    def found(*args):
        return dataclasses.replace(real(*args), folds=(wrong,))

    monkeypatch.setattr(foldplan, "find_folds", found)
    with pytest.raises(NumericsError, match=r"model.layers.0: with its scales folded.*self_attn.q_proj"):
        run(base, [AWQModifier(), QuantizationModifier(scheme="W8A16", **G16)], tmp_path / "out")
