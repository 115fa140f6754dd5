"""What a recipe means for a model: which linears, under which scheme, and what the user is told."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpress import PlanError, oneshot
from bitpress.inspection import inspect_checkpoint
from conftest import FAMILIES, build, save, token_rows
from helpers import OPTIONS

ROUND = {"QuantizationModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}


def group(bits, *targets):
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
    return {"weights": weights, "targets": list(targets)}


def run(base, out, recipe, **options):
    oneshot(base, recipe=recipe, output_dir=out, **options)
    return json.loads((out / "report.json").read_text()), json.loads((out / "config.json").read_text())


@pytest.fixture
def base(tmp_path):
    return save(build("llama"), tmp_path / "base")


@pytest.mark.parametrize("order", [("all", "down", "one"), ("one", "down", "all"), ("down", "all", "one")])
def test_a_name_goes_before_an_expression_and_that_before_a_class(base, tmp_path, order):
    groups = {
        "all": group(4, "Linear"),
        "down": group(8, "re:.*down_proj"),
        "one": group(2, "model.layers.1.mlp.down_proj"),
    }
    recipe = {"QuantizationModifier": {"config_groups": {n: groups[n] for n in order}, "ignore": ["lm_head"]}}
    run(base, tmp_path / "out", recipe)
    bits = {layer.name: layer.num_bits for layer in inspect_checkpoint(tmp_path / "out").layers}
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert bits["model.layers.1.mlp.down_proj"] == 2
    assert bits["model.layers.1.mlp.up_proj"] == 4


def test_a_group_that_is_left_without_linears_is_a_fault(base, tmp_path):
    groups = {"a": group(4, "Linear"), "b": group(8, "re:.*"), "c": group(8, "Linear")}
    with pytest.raises(PlanError, match=r"config_groups\.a: others name all of its linears"):
        run(base, tmp_path / "out", {"QuantizationModifier": {"config_groups": groups, "ignore": ["lm_head"]}})


def test_a_slip_in_ignore_is_told(base, tmp_path):
    recipe = {"QuantizationModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_haed"]}}
    report, _ = run(base, tmp_path / "out", recipe)
    assert any("'lm_haed' matches no linear" in note and "lm_head" in note for note in report["notes"])
    # vLLM takes the head for no Linear, so it is named
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear", "lm_head"]


@pytest.mark.parametrize("left", ["q_proj", "k_proj"])
def test_partners_that_vllm_fuses_are_told(base, tmp_path, left):
    recipe = {"QuantizationModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head", f"re:.*{left}"]}}
    report, _ = run(base, tmp_path / "out", recipe)
    assert any("vLLM fuses them" in note for note in report["notes"])
    report, _ = run(base, tmp_path / "whole", ROUND)
    assert not any("vLLM fuses them" in note for note in report["notes"])


def test_a_gate_with_one_output_is_left(tmp_path):
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    arguments = {**FAMILIES["qwen3_moe"][1], "shared_expert_intermediate_size": 32}
    arguments = {k: v for k, v in arguments.items() if k not in ("head_dim",)}
    save(AutoModelForCausalLM.from_config(Qwen2MoeConfig(**arguments)), tmp_path / "base")
    report, config = run(tmp_path / "base", tmp_path / "out", ROUND)
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert gate in config["quantization_config"]["ignore"]
    assert gate not in {row["name"] for row in report["layers"]}
    assert any("one output" in note for note in report["notes"])


def test_what_the_model_has_no_place_for_is_carried_over_and_ignored(base, tmp_path):
    file = base / "model.safetensors"
    extra = {"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    save_file({"stray": torch.ones(2)}, base / "consolidated.safetensors")
    report, config = run(base, tmp_path / "out", ROUND)
    assert "model.layers.2.mlp.up_proj" in config["quantization_config"]["ignore"]
    assert any("carried over" in note for note in report["notes"])
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.2.mlp.up_proj.weight" in index and "stray" not in index


def test_more_tokens_than_learned_positions(tmp_path):
    save(build("opt"), tmp_path / "base")
    recipe = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
    with pytest.raises(Exception, match="sequences of 200 tokens, but the model has 128 positions"):
        oneshot(tmp_path / "base", token_rows(2, 200), recipe, output_dir=tmp_path / "out", max_seq_length=200)


def test_faults_of_recipe_and_data_come_together(base, tmp_path):
    recipe = {"GPTQModifier": {"scheme": "W4A16", "group_size": 24, "ignore": ["lm_head"]}}
    with pytest.raises(PlanError) as caught:
        oneshot(base, "nowhere/data.jsonl", recipe, output_dir=tmp_path / "out", **OPTIONS)
    assert "group_size 24" in str(caught.value) and "nowhere/data.jsonl" in str(caught.value)


def test_a_module_that_a_failed_run_has_changed_is_refused():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(Exception, match=r"model\.layers\.1\.mlp\.down_proj: NaN"):
        oneshot(model, recipe=ROUND)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 0
    with pytest.raises(PlanError, match="quantized already"):
        oneshot(model, recipe=ROUND)


def test_fresh_takes_the_earlier_tokenizer_away(base, tmp_path):
    out = tmp_path / "out"
    run(base, out, ROUND)
    (out / "tokenizer.json").write_text("{}")
    run(base, out, {"QuantizationModifier": {"scheme": "W8A16", "group_size": 16, "ignore": ["lm_head"]}}, fresh=True)
    assert not (out / "tokenizer.json").exists()
