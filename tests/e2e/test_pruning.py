"""Pruning, alone and before quantization, from recipe to checkpoint."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitpress import PlanError, oneshot
from bitpress.inspection import inspect_checkpoint
from bitpress.math.masks import Structure, find_structure, holds
from bitpress.tables import inspection_table
from conftest import build, save, token_rows
from helpers import assert_same_tensors, client, tensors

DATA = {"dataset": token_rows(), "max_seq_length": 32, "num_calibration_samples": 12}
TWO_FOUR = Structure(2, 4)
SPARSITY = """
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      targets: ["Linear"]
      ignore: ["re:.*lm_head"]
"""
OLDER = """
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      sequential_update: false
      targets: ["Linear"]
      ignore: ["re:.*lm_head"]
"""
QUANTIZATION = """
quantization_stage:
  run_type: oneshot
  quantization_modifiers:
    GPTQModifier:
      ignore: ["lm_head"]
      config_groups:
        group_0:
          weights: {num_bits: 4, type: "int", symmetric: true, strategy: "channel"}
          targets: ["Linear"]
"""


def text_of(table):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def rows_of(folder):
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["layers"]}


def linears(model, without=("lm_head",)):
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in without}


def assert_two_of_four(weights, *, exactly=True):
    for name, weight in weights.items():
        assert holds(weight, TWO_FOUR), name
        assert not exactly or int((weight == 0).sum()) == weight.numel() // 2, name


@pytest.fixture
def base(tmp_path):
    return save(build("llama", torch.bfloat16), tmp_path / "base")


@pytest.mark.parametrize(("strategy", "recipe"), [("channel", OLDER), ("group", SPARSITY)], ids=["older", "newer"])
def test_two_stages(base, tmp_path, recipe, strategy):
    recipe += QUANTIZATION
    if strategy == "group":
        recipe = recipe.replace('strategy: "channel"', 'strategy: "group", group_size: 16')
    oneshot(base, recipe=recipe, stage="sparsity_stage", output_dir=tmp_path / "out", **DATA)
    sparse = tmp_path / "out" / "sparsity_stage"
    assert "quantization_config" not in json.loads((sparse / "config.json").read_text())
    reloaded = AutoModelForCausalLM.from_pretrained(sparse)
    assert_two_of_four(linears(reloaded))
    assert torch.equal(reloaded.lm_head.weight, AutoModelForCausalLM.from_pretrained(base).lm_head.weight)
    for row in rows_of(sparse).values():
        assert (row["method"], row["scheme"], row["mask"]) == ("sparsegpt", "dense", "2:4")
        assert row["sparsity"] == 0.5 and row["error_of"] == "output" and 0 < row["rel_error"] < 1
        assert row["bits_per_weight"] == 16

    oneshot(sparse, recipe=recipe, stage="quantization_stage", output_dir=tmp_path / "out", **DATA)
    quantized = tmp_path / "out" / "quantization_stage"
    after = linears(client(quantized))
    assert_two_of_four(after, exactly=False)
    before = linears(reloaded)
    for name, weight in after.items():
        assert not weight[before[name] == 0].any(), name
    for row in rows_of(quantized).values():
        assert row["method"] == "gptq" and row["mask"] == "2:4" and row["sparsity"] >= 0.5
        assert 0 < row["rel_error"] < 0.2


@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize("quantizer", ["GPTQModifier", "QuantizationModifier"])
def test_one_stage(base, tmp_path, quantizer, symmetric):
    both = SPARSITY + QUANTIZATION.partition("oneshot")[2].replace("GPTQModifier", quantizer)
    both = both.replace("symmetric: true", f"symmetric: {symmetric}")
    oneshot(base, recipe=both, output_dir=tmp_path / "out", **DATA)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 14
    method = "sparsegpt+gptq" if quantizer == "GPTQModifier" else "sparsegpt+rtn"
    assert {(r["method"], r["mask"]) for r in rows.values()} == {(method, "2:4")}
    assert_two_of_four(linears(client(tmp_path / "out")), exactly=False)


def test_all_stages_in_one_call_and_what_comes_back(base, tmp_path):
    oneshot(base, recipe=SPARSITY + QUANTIZATION, output_dir=tmp_path / "both", **DATA)
    # each stage reads the checkpoint of the one before: the last one finds the zeros there
    assert {(r["method"], r["mask"]) for r in rows_of(tmp_path / "both").values()} == {("gptq", "2:4")}
    assert_two_of_four(linears(client(tmp_path / "both")), exactly=False)
    pruned = oneshot(base, recipe=SPARSITY, output_dir=tmp_path / "pruned", **DATA)
    for compressed in (True, False):
        pruned.save_pretrained(tmp_path / f"copy_{compressed}", save_compressed=compressed)
        assert_same_tensors(tensors(tmp_path / f"copy_{compressed}"), tensors(tmp_path / "pruned"))


def test_a_module_in_memory(tmp_path):
    model = build("llama", torch.bfloat16)
    dense = {n: w.clone() for n, w in linears(model).items()}
    returned = oneshot(model, recipe=SPARSITY, **DATA)
    assert returned is model
    assert_two_of_four(linears(model))
    assert all(not torch.equal(w, dense[n]) for n, w in linears(model).items())
    model.save_pretrained(tmp_path / "saved", save_compressed=True)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(w, linears(model)[n]) for n, w in linears(again).items())
    oneshot(model, recipe={"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}, **DATA)
    model.save_pretrained(tmp_path / "packed", save_compressed=True)
    assert_two_of_four(linears(client(tmp_path / "packed")), exactly=False)


@pytest.mark.parametrize("name", ["SparseGPTModifier", "WandaPruningModifier", "MagnitudePruningModifier"])
def test_shares_by_block_and_by_pattern(base, tmp_path, name):
    data = {} if name.startswith("Magnitude") else DATA
    key = "final_sparsity" if name.startswith("Magnitude") else "sparsity"
    recipe = {name: {key: [0, 0.75], "ignore": ["lm_head"]}}
    oneshot(base, recipe=recipe, output_dir=tmp_path / "blocks", **data)
    rows = rows_of(tmp_path / "blocks")
    assert {r["sparsity"] for n, r in rows.items() if ".layers.1." in n} == {0.75}
    assert {r["mask"] for n, r in rows.items() if ".layers.0." in n} == {""}
    before, after = tensors(base), tensors(tmp_path / "blocks")
    assert all(torch.equal(before[n], after[n]) for n in before if ".layers.0." in n)

    recipe = {name: {key: {"re:.*mlp.*": 0.25, "re:.*self_attn.*": [0.5, 0.75], "model.layers.1.mlp.up_proj": 0}}}
    oneshot(base, recipe=recipe, output_dir=tmp_path / "patterns", **data)
    shares = {n: r["sparsity"] for n, r in rows_of(tmp_path / "patterns").items()}
    assert shares["model.layers.0.mlp.up_proj"] == shares["model.layers.1.mlp.down_proj"] == 0.25
    assert shares["model.layers.0.self_attn.q_proj"] == 0.5 and shares["model.layers.1.self_attn.o_proj"] == 0.75
    assert "lm_head" not in shares


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts(family, tmp_path):
    base = save(build(family, torch.bfloat16), tmp_path / "base")
    recipe = {"SparseGPTModifier": {"mask_structure": "2:4", "ignore": ["lm_head", "re:.*gate$"]}}
    oneshot(base, recipe=recipe, output_dir=tmp_path / "out", min_expert_tokens=16, **DATA)
    rows = rows_of(tmp_path / "out")
    assert sum("experts" in name for name in rows) == 2 * 4 * 3
    weights = {n: w for n, w in tensors(tmp_path / "out").items() if n.removesuffix(".weight") in rows}
    assert len(weights) == len(rows)
    assert_two_of_four(weights)


def test_faults(base, tmp_path):
    odd = save(build("llama", intermediate_size=66), tmp_path / "odd")
    with pytest.raises(PlanError) as error:
        oneshot(odd, recipe=SPARSITY, output_dir=tmp_path / "out", **DATA)
    (fault,) = error.value.problems
    assert fault.startswith("model.layers.0.mlp.down_proj: 66 input columns are not divisible into groups of 4")
    with pytest.raises(PlanError) as error:
        oneshot(base, recipe={"WandaPruningModifier": {"sparsity": [0.5] * 3}}, output_dir=tmp_path / "out", **DATA)
    assert "WandaPruningModifier.sparsity: a list of 3 values for 2 decoder blocks" in error.value.problems
    with pytest.raises(PlanError, match=r"sparsity: a list has values for decoder blocks only"):
        oneshot(base, recipe={"WandaPruningModifier": {"sparsity": [0.5] * 2}}, output_dir=tmp_path / "out", **DATA)
    groups = {"sparsity": {"re:.*nothing": 0.5, "q_proj": 0.5}}
    with pytest.raises(PlanError, match=r"'re:\.\*nothing' matches no linear"):
        oneshot(base, recipe={"MagnitudePruningModifier": groups}, output_dir=tmp_path / "out")


def test_inspection_says_what_was_pruned(base, tmp_path):
    recipe = {"WandaPruningModifier": {"sparsity": {"re:.*mlp.*": 0.25, "re:.*self_attn.*": [0.5, 0]}}}
    oneshot(base, recipe=recipe, output_dir=tmp_path / "out", **DATA)
    found = inspect_checkpoint(tmp_path / "out")
    assert (found.method, found.pruned) == ("dense", "10 linears, 35.0% zeros, unstructured")
    assert "10 linears, 35.0% zeros, unstructured (report.json)" in text_of(inspection_table(found))
    oneshot(base, recipe=SPARSITY + QUANTIZATION, output_dir=tmp_path / "two", **DATA)
    pruned = inspect_checkpoint(tmp_path / "two").pruned
    assert pruned.startswith("14 linears, 50.") and pruned.endswith("% zeros, 2:4")
    (tmp_path / "two/report.json").unlink()
    assert inspect_checkpoint(tmp_path / "two").pruned is None


def test_other_zeros_do_not_make_a_layer_pruned(base, tmp_path):
    recipe = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
    oneshot(base, recipe=recipe, output_dir=tmp_path / "out", **DATA)
    assert {row["mask"] for row in rows_of(tmp_path / "out").values()} == {""}
    assert all(find_structure(w) is None for w in linears(client(tmp_path / "out")).values())


def test_zeros_that_no_step_made_are_told(base, tmp_path):
    shutil.copytree(base, tmp_path / "coarse")
    held = load_file(tmp_path / "coarse/model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    held[name + ".weight"].view(-1)[::20] = 0
    save_file(held, tmp_path / "coarse/model.safetensors", {"format": "pt"})
    recipe = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
    oneshot(tmp_path / "coarse", recipe=recipe, output_dir=tmp_path / "out", **DATA)
    rows = rows_of(tmp_path / "out")
    assert {n for n, row in rows.items() if "note" in row or row["mask"]} == {name}
    assert rows[name]["mask"] == "unstructured" and "5.0% of its weights were exactly zero" in rows[name]["note"]


def notes_of(folder):
    return json.loads((folder / "report.json").read_text())["notes"]


def test_a_share_that_prunes_nothing_is_told(base, tmp_path):
    mixed = {"sparsity": {"re:.*layers.0.*": 0.0, "re:.*layers.1.*": 0.5}, "ignore": ["lm_head"]}
    oneshot(base, recipe={"SparseGPTModifier": mixed}, output_dir=tmp_path / "a", **DATA)
    told = "SparseGPTModifier: a share of zeros of 0 prunes nothing of model.layers.0.self_attn.q_proj (and 6 more)"
    assert told in notes_of(tmp_path / "a")
    # Wanda prunes in every row, and one weight in fifty is none of 16
    few = {"sparsity": 0.02, "targets": ["re:.*(q|down)_proj"]}
    narrow = save(build("llama", hidden_size=16, head_dim=8), tmp_path / "narrow")
    oneshot(narrow, recipe={"WandaPruningModifier": few}, output_dir=tmp_path / "b", **DATA)
    told = [n for n in notes_of(tmp_path / "b") if "prunes nothing" in n]
    assert told == ["WandaPruningModifier: a share of zeros of 0.02 prunes nothing of model.layers.0.self_attn.q_proj"
                    " (and 1 more)"]  # fmt: skip
    assert [r["sparsity"] > 0 for r in rows_of(tmp_path / "b").values()] == [False, True] * 2
    oneshot(narrow, recipe={"MagnitudePruningModifier": few}, output_dir=tmp_path / "c")
    assert not any("prunes nothing" in n for n in notes_of(tmp_path / "c"))
