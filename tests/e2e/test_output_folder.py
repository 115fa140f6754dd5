"""What a run writes beside the codes, what it verifies, and the limit on memory that it keeps to."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bitpress import CheckpointError, PlanError, Recipe, budget, formats, oneshot, states
from bitpress.checkpoint import Source
from bitpress.modifiers.quantization import GPTQModifier, QuantizationModifier
from conftest import build, save, token_rows
from helpers import OPTIONS, W4, assert_same_tensors, bytes_of, client, config_of, logits, report_of, tensors

BF16 = torch.bfloat16


@pytest.mark.parametrize("modifier", ["GPTQModifier", "QuantizationModifier"])
def test_an_untied_head_is_quantized_unless_ignored(modifier, tmp_path, rows):
    model = build("llama", BF16)
    base = save(model, tmp_path / "base")
    everything = {modifier: {"scheme": "W4A16", "group_size": 16, "observer": "minmax"}}
    oneshot(base, rows, everything, output_dir=tmp_path / "out", **OPTIONS)
    assert "lm_head.weight_packed" in Source(tmp_path / "out").tensors
    assert "lm_head" not in config_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert report_of(tmp_path / "out")["layers"][-1]["name"] == "lm_head"
    oneshot(model, rows, everything, **OPTIONS)
    model.save_pretrained(tmp_path / "memory")
    assert_same_tensors(tensors(tmp_path / "memory"), tensors(tmp_path / "out"))
    assert torch.equal(logits(client(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("modifier", ["GPTQModifier", "QuantizationModifier"])
def test_a_tied_head_is_refused(modifier, tmp_path, rows):
    base = save(build("llama_tied"), tmp_path / "base")
    for model in (base, build("llama_tied")):
        with pytest.raises(PlanError, match=r"lm_head: tied to the input embedding.*add it to ignore"):
            oneshot(model, rows, {modifier: {"scheme": "W4A16", "group_size": 16}}, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_recipe_beside_the_weights_reads_as_it_was(tmp_path, rows):
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"a": {"targets": ["re:.*self_attn.*"], "weights": eight}}
    modifiers = [
        GPTQModifier(scheme="W4A16", group_size=16, targets=["re:.*mlp.*"], dampening_frac=0.02, actorder=None),
        QuantizationModifier(config_groups=groups, observer="mse"),
    ]
    model = build("llama")
    oneshot(model, rows, modifiers, output_dir=tmp_path / "out", **OPTIONS)
    model.save_pretrained(tmp_path / "saved")
    for folder in ("out", "saved"):
        assert Recipe.load(tmp_path / folder / "recipe.yaml") == Recipe.load(modifiers)


def test_the_report_has_a_row_a_layer_and_the_rest(tmp_path, rows):
    base = save(build("llama", BF16), tmp_path / "base")
    oneshot(base, rows, W4, output_dir=tmp_path / "out", seed=7, **OPTIONS)
    report = report_of(tmp_path / "out")
    stored = Source(tmp_path / "out").tensors
    names = [n.removesuffix(".weight_packed") for n in stored if n.endswith("_packed")]
    assert sorted(r["name"] for r in report["layers"]) == sorted(names) and len(names) == 14
    for row in report["layers"]:
        assert row["method"] == "gptq" and row["scheme"] == "W4A16 g16" and row["policy"] == ""
        assert row["error_of"] == "output" and 0 < row["rel_error"] < 0.1
        assert row["bits_per_weight"] == 4 + 16 / 16
        assert row["tokens"] == 12 * 32 and 0 <= row["sparsity"] < 0.5 and row["seconds"] >= 0
    totals = report["totals"]
    assert totals["layers"] == 14 and totals["bits_per_weight"] == 5
    assert totals["weights"] == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert totals["output_bytes"] == bytes_of(tmp_path / "out")
    assert totals["peak_host_bytes"] > 100 << 20 and totals["seconds"] > 0
    assert report["seed"] == 7 and report["data"]["sequences"] == 12
    assert {"bitpress", "torch", "transformers", "compressed-tensors", "python"} <= set(report["versions"])


@pytest.mark.parametrize("compressed", [True, False])
def test_a_wrong_packing_is_caught_unless_verification_is_off(compressed, tmp_path, rows, monkeypatch):
    base = save(build("llama"), tmp_path / "base")
    name = "pack" if compressed else "dense"
    real = getattr(formats, name)

    def wrong(solved, scheme, *stored):
        parts = real(solved, scheme, *stored)
        if compressed:
            parts["weight_packed"][3, 1] ^= 1 << 9  # one bit of one code
        else:
            parts["weight"][3, 1] += 8 * parts["weight_scale"][3, 0]
        return parts

    monkeypatch.setattr(formats, name, wrong)
    options = {"save_compressed": compressed, **OPTIONS}
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj: .* not the one that was solved"):
        oneshot(base, rows, W4, output_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out/config.json").exists()
    oneshot(base, rows, W4, output_dir=tmp_path / "blind", verify=False, **options)
    monkeypatch.undo()
    oneshot(base, rows, W4, output_dir=tmp_path / "out", **options)  # the shard is written anew
    assert (tmp_path / "out/config.json").exists()
    key = "model.layers.0.self_attn.q_proj.weight" + ("_packed" if compressed else "")
    assert int((tensors(tmp_path / "out")[key] != tensors(tmp_path / "blind")[key]).sum()) == 1


def test_a_limit_that_no_block_fits_into(tmp_path, rows):
    base = save(build("llama"), tmp_path / "base")
    with pytest.raises(PlanError, match=r"one block needs .* but the limit is 1\.00 GiB: raise --max-memory"):
        oneshot(base, [{"input_ids": [5] * 100}], W4, output_dir=tmp_path / "out", max_memory="1GiB",
                max_seq_length=4_000_000)  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_under_a_small_limit_hidden_states_go_to_disk(family, tmp_path, monkeypatch):
    rows = token_rows(24, 128)
    base = save(build(family, BF16), tmp_path / "base")
    options = {"max_seq_length": 128, "num_calibration_samples": 24, "batch_size": 1}
    oneshot(base, rows, W4, output_dir=tmp_path / "roomy", **options)

    made = []
    real = states.HiddenStates.__setitem__
    monkeypatch.setattr(states.HiddenStates, "__setitem__", lambda s, i, x: (made.append(s.where), real(s, i, x))[1])
    monkeypatch.setattr(budget, "PROCESS_BYTES", 0)
    with pytest.raises(PlanError, match="one block needs") as refused:
        oneshot(base, rows, W4, output_dir=tmp_path / "tight", max_memory=1000, **options)
    needed = budget.parse_bytes(re.search(r"needs ([\d.]+ [KM]iB)", str(refused.value))[1])
    limit = needed + 100 * 2**10  # leaves less than twice the 192 KiB of hidden states
    oneshot(base, rows, W4, output_dir=tmp_path / "tight", max_memory=limit, **options)
    assert set(made) == {"disk"}
    assert_same_tensors(tensors(tmp_path / "tight"), tensors(tmp_path / "roomy"))
    assert not list((tmp_path / "tight").glob("**/states-*"))


def test_a_stage_is_saved_into_a_folder_of_its_name(tmp_path, rows):
    base = save(build("llama"), tmp_path / "base")
    text = """
    quantization_stage:
      quantization_modifiers:
        GPTQModifier: {scheme: W4A16, group_size: 16, ignore: [lm_head]}
    other_stage:
      other_modifiers:
        QuantizationModifier: {scheme: W8A16, group_size: 16, ignore: [lm_head]}
    """
    oneshot(base, rows, text, stage="other_stage", output_dir=tmp_path / "out", **OPTIONS)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["other_stage"]
    written = tmp_path / "out/other_stage"
    assert config_of(written)["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    assert [s.name for s in Recipe.load(written / "recipe.yaml").stages] == ["other_stage"]
    oneshot(build("llama"), rows, text, stage="quantization", output_dir=tmp_path / "out", **OPTIONS)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["other_stage", "quantization_stage"]


def test_a_config_keeps_what_the_model_says(tmp_path, rows):
    model = build("qwen3", BF16)
    base = save(model, tmp_path / "base")
    oneshot(base, rows, W4, output_dir=tmp_path / "out", **OPTIONS)
    old, new = config_of(base), config_of(tmp_path / "out")
    assert {k: v for k, v in new.items() if k != "quantization_config"} == old
    assert "null" not in json.dumps(new["quantization_config"])
    oneshot(model, rows, W4, **OPTIONS)
    model.save_pretrained(tmp_path / "memory")
    ours, theirs = AutoConfig.from_pretrained(tmp_path / "memory"), AutoConfig.from_pretrained(tmp_path / "out")
    assert {k: v for k, v in ours.to_dict().items() if k != "_name_or_path"} == {
        k: v for k, v in theirs.to_dict().items() if k != "_name_or_path"
    }
    assert AutoModelForCausalLM.from_pretrained(base).config.architectures == new["architectures"]
