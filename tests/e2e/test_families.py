"""Every supported architecture: blocks run one at a time, compressed from a folder, loaded by transformers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from bitpress import oneshot
from bitpress.checkpoint import Source
from bitpress.inspection import inspect_checkpoint
from bitpress.transformers import SparseAutoModelForCausalLM
from bitpress.verified import VERIFIED, mismatch
from conftest import FAMILIES, build, save, token_rows
from helpers import PLAIN

RECIPE = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
QUICK = {"GPTQModifier": {**RECIPE["GPTQModifier"], **PLAIN}}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_at_a_time_equal_the_whole_forward(family):
    model = build(family)
    assert model.config.model_type in VERIFIED
    assert mismatch(model) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compress_and_reload(family, dtype, tmp_path, rows):
    base = save(build(family, dtype), tmp_path / "base")
    recipe = RECIPE if dtype == torch.bfloat16 else QUICK
    oneshot(base, rows, recipe, output_dir=tmp_path / "out", max_seq_length=32, num_calibration_samples=12)

    written, config = Source(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    report = json.loads((tmp_path / "out/report.json").read_text())
    packed = {n.removesuffix(".weight_packed") for n in written.tensors if n.endswith(".weight_packed")}
    assert packed == {row["name"] for row in report["layers"]}
    # every tensor of the base is there under its own name, packed or as it was
    for name in Source(base).tensors:
        assert name in written.tensors or name.removesuffix(".weight") in packed, name
    assert not packed & set(config["quantization_config"]["ignore"])

    if family == "falcon":  # transformers does not decompress its FalconLinear; the run says so
        assert any("FalconLinear" in note for note in report["notes"])
        model = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True), dtype=dtype
        ).eval()
    original = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    ids = torch.tensor([r["input_ids"] for r in token_rows(2, seed=9)])
    with torch.no_grad():
        new, old = model(input_ids=ids).logits.float(), original(input_ids=ids).logits.float()
    assert torch.isfinite(new).all()
    assert 0 < float((new - old).norm() / old.norm()) < 0.6
    tied = bool(getattr(original.config, "tie_word_embeddings", False))
    same = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert same == tied


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_keep_their_names_on_disk_and_routers_are_ignored(family, tmp_path, rows):
    base = save(build(family), tmp_path / "base")
    oneshot(base, rows, QUICK, output_dir=tmp_path / "out", max_seq_length=32, num_calibration_samples=12)
    names = set(Source(tmp_path / "out").tensors)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    if family == "mixtral":
        assert "model.layers.1.block_sparse_moe.experts.3.w2.weight_packed" in names
        assert "model.layers.0.block_sparse_moe.gate" in config["ignore"]
    else:
        assert "model.layers.1.mlp.experts.3.down_proj.weight_packed" in names
        assert "model.layers.0.mlp.gate" in config["ignore"]


def test_starved_experts_take_all_tokens_and_the_report_says_so(tmp_path, rows):
    model = build("mixtral")
    save(model, tmp_path / "base")
    options = {"max_seq_length": 32, "num_calibration_samples": 12}
    oneshot(tmp_path / "base", rows, QUICK, output_dir=tmp_path / "a", min_expert_tokens=10_000, **options)
    oneshot(tmp_path / "base", rows, QUICK, output_dir=tmp_path / "b", min_expert_tokens=0, **options)
    starved = json.loads((tmp_path / "a/report.json").read_text())["layers"]
    fed = json.loads((tmp_path / "b/report.json").read_text())["layers"]
    experts = [r for r in starved if ".experts." in r["name"]]
    assert experts and all("all tokens" in r["policy"] and r["tokens"] == 12 * 32 for r in experts)
    assert all(r["policy"] == "" for r in fed)
    assert all(r["tokens"] < 12 * 32 for r in fed if ".experts." in r["name"])


def test_an_expert_that_sees_no_token_is_still_solved(tmp_path, rows):
    model = build("mixtral", num_local_experts=8)
    with torch.no_grad():
        for layer in model.model.layers:  # the router never picks the last experts: their logits are far below
            layer.mlp.gate.weight[2:] = 0
            layer.mlp.gate.weight[:2] = 5 * torch.randn(2, 32)
            layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
    save(model, tmp_path / "base")
    oneshot(
        tmp_path / "base",
        rows,
        QUICK,
        output_dir=tmp_path / "out",
        max_seq_length=32,
        num_calibration_samples=12,
    )
    rows_out = json.loads((tmp_path / "out/report.json").read_text())["layers"]
    experts = [r for r in rows_out if ".experts." in r["name"]]
    assert len(experts) == 2 * 8 * 3
    assert all(r["tokens"] > 0 for r in experts)


def test_falcon_new_architecture_and_other_forms(tmp_path, rows):
    model = build("falcon", new_decoder_architecture=True, num_kv_heads=2, bias=True, parallel_attn=True)
    assert mismatch(model) == 0
    save(model, tmp_path / "base")
    oneshot(
        tmp_path / "base",
        rows,
        QUICK,
        output_dir=tmp_path / "out",
        max_seq_length=32,
        num_calibration_samples=12,
    )
    assert inspect_checkpoint(tmp_path / "out").method == "compressed-tensors"


@pytest.mark.parametrize("kind", ["OlmoConfig", "SmolLM3Config"])  # the second has a list with a value for each layer
def test_a_type_that_is_not_listed_is_checked_on_a_tiny_copy(kind, tmp_path, rows):
    import transformers
    from transformers import AutoModelForCausalLM

    common = FAMILIES["llama"][1]
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**common))
    assert model.config.model_type not in VERIFIED
    model.save_pretrained(tmp_path / "base")
    oneshot(
        tmp_path / "base",
        rows,
        QUICK,
        output_dir=tmp_path / "out",
        max_seq_length=32,
        num_calibration_samples=12,
    )
    assert inspect_checkpoint(tmp_path / "out").finished
