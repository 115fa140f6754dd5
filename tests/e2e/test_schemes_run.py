"""Schemes from a recipe to a folder: what needs data and what does not, what partners share, what comes back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from bitpress import PlanError, evaluate, oneshot, plan
from bitpress.blocks import Blocks
from bitpress.inspection import inspect_checkpoint
from bitpress.subject import ModuleSubject
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build, save, token_rows
from helpers import OPTIONS, assert_same_tensors, assert_told_alike, client, logits, make_tokenizer, report_of, tensors
from scheme_runs import CACHE, SIZES, STATIC, recipe, run

NO_DATA = (
    "W8A8", "W4A8", "W4AFP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4", "MXFP4XFP8", "MXFP6A8", "MXFP8",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(build("llama", torch.bfloat16, **SIZES), tmp_path_factory.mktemp("schemes") / "base")


@pytest.mark.parametrize("name", NO_DATA)
def test_without_data_and_without_a_forward(name, base, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(Blocks, "_drive", refuse)
    _, _, report = run(base, tmp_path / "out", data=False, scheme=name)
    assert report["data"] is None
    assert all(row["tokens"] == 0 and row["error_of"] == "weight" for row in report["layers"])
    layers = inspect_checkpoint(tmp_path / "out").layers
    assert {layer.scheme.split()[0] for layer in layers} == {name}
    assert_told_alike(tmp_path / "out")


def test_scales_that_move_are_chosen_on_the_built_in_text(base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    make_tokenizer(folder)
    smoothed = [{"SmoothQuantModifier": {}}, recipe(scheme="W8A8")]
    oneshot(folder, None, smoothed, output_dir=tmp_path / "out", **OPTIONS)
    report = report_of(tmp_path / "out")
    assert "no dataset was given: the built-in text calibrates" in report["notes"]
    assert report["layers"][0]["method"] == "smoothquant+rtn"


def test_the_plan_says_what_data_are_for():
    from bitpress.modifiers import GPTQModifier, QuantizationModifier

    def reads(*modifiers):
        made = plan.make(
            modifiers, ModuleSubject(build("llama", **SIZES)), samples=4, length=32, device=torch.device("cpu")
        )
        return made.to_dict()["needs_data"]

    assert reads(QuantizationModifier(scheme="FP8_DYNAMIC", ignore="lm_head")) == []
    assert reads(QuantizationModifier(scheme="FP8", ignore="lm_head")) == ["ranges of inputs (FP8 tensor)"]
    assert reads(GPTQModifier(scheme="NVFP4", ignore="lm_head", kv_cache_scheme=CACHE)) == [
        "second moments of inputs (gptq)",
        "ranges of inputs (NVFP4 g16)",
        "ranges of keys and values (kv_cache_scheme)",
    ]


@pytest.mark.parametrize(
    ("kind", "name", "shared"),
    [
        ("QuantizationModifier", "NVFP4A16", "weight_global_scale"),
        ("QuantizationModifier", "NVFP4", "weight_global_scale"),
        ("GPTQModifier", "NVFP4", "weight_global_scale"),
        ("QuantizationModifier", "FP8", "weight_scale"),
        ("GPTQModifier", "FP8", "weight_scale"),
    ],
)
def test_partners_of_one_product_share_the_scale_on_top(kind, name, shared, base, tmp_path):
    stored, _, _ = run(base, tmp_path / "out", kind=kind, scheme=name, data=name != "NVFP4A16")
    weights = tensors(base)
    for block in (0, 1):
        tops = {}
        for parent, leaves in (("self_attn", ("q", "k", "v")), ("self_attn", ("o",)), ("mlp", ("gate", "up"))):
            names = [f"model.layers.{block}.{parent}.{leaf}_proj" for leaf in leaves]
            values = {stored[f"{n}.{shared}"].item() for n in names}
            assert len(values) == 1
            tops[leaves] = values.pop()
            if shared == "weight_global_scale":
                absmax = max(weights[f"{n}.weight"].float().abs().max().item() for n in names)
                assert tops[leaves] == pytest.approx(448 * 6 / absmax, rel=1e-6)
        assert len(set(tops.values())) == 3


def test_experts_share_by_expert(tmp_path):
    model = build("mixtral", torch.bfloat16, num_hidden_layers=1)
    for i, expert in enumerate(range(4)):
        model.model.layers[0].mlp.experts.gate_up_proj.data[expert] *= i + 1
    base = save(model, tmp_path / "base")
    stored, _, report = run(base, tmp_path / "out", data=False, scheme="NVFP4A16")
    path = "model.layers.0.block_sparse_moe.experts"
    tops = [stored[f"{path}.{e}.w1.weight_global_scale"].item() for e in range(4)]
    assert tops == [stored[f"{path}.{e}.w3.weight_global_scale"].item() for e in range(4)]
    assert len(set(tops)) == 4
    assert any("transformers misreads experts of this scheme" in n for n in report["notes"])
    # which is why eval does not leave them to it
    make_tokenizer(base)
    make_tokenizer(tmp_path / "out")
    text = " ".join(f"w{7 * i % 90}" for i in range(100))
    result = evaluate(base, tmp_path / "out", text=text, windows=2, length=32, dtype="auto")
    assert any("bitpress's own loader was used" in n and "not rounded" not in n for n in result.notes)
    memory = evaluate(
        SparseAutoModelForCausalLM.from_pretrained(base), SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        text=text, windows=2, length=32, tokenizer=str(base),
    )  # fmt: skip
    assert result.kl == pytest.approx(memory.kl, rel=1e-3)


def test_mixed_schemes(base, tmp_path):
    groups = {
        "FP8_DYNAMIC": ["re:.*mlp.*"],
        "a": {**STATIC, "targets": ["re:.*self_attn.*"]},
        "unquantized": ["re:.*o_proj"],
        "NVFP4": ["model.layers.1.mlp.down_proj"],
    }
    stored, config, _ = run(base, tmp_path / "out", config_groups=groups)
    assert config["format"] == "mixed-precision"
    kinds = {group["format"] for group in config["config_groups"].values()}
    assert kinds == {"float-quantized", "int-quantized", "nvfp4-pack-quantized"}
    assert {"model.layers.0.self_attn.o_proj", "lm_head"} <= set(config["ignore"])
    assert stored["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert stored["model.layers.1.mlp.down_proj.weight_packed"].dtype == torch.uint8
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
    assert "null" not in json.dumps(config)
    theirs, ours = client(tmp_path / "out"), SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, weight in ours.state_dict().items():
        assert torch.equal(theirs.get_parameter(name), weight), name
    original = logits(SparseAutoModelForCausalLM.from_pretrained(base)).float()
    assert float((logits(theirs).float() - original).norm() / original.norm()) < 0.5


PACKED = {"weights": {"num_bits": 4, "group_size": 32}, "format": "pack-quantized"}
PACKED["input_activations"] = {"num_bits": 8, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    "keys",
    [
        {"scheme": "FP8"},
        {"scheme": "FP8_BLOCK"},
        {"kind": "GPTQModifier", "scheme": "NVFP4"},
        {"scheme": "MXFP4", "kv_cache_scheme": CACHE},
        {"scheme": "MXFP6A16"},
        {"config_groups": {"a": STATIC}},
        {"config_groups": {"a": PACKED}},
    ],
    ids=str,
)
def test_dense_beside_scales_packs_to_the_same_bytes(keys, base, tmp_path):
    packed, _, _ = run(base, tmp_path / "packed", **keys)
    made = recipe(**keys)
    oneshot(base, token_rows(), made, output_dir=tmp_path / "dense", save_compressed=False, **OPTIONS)
    again = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    again.save_pretrained(tmp_path / "again", save_compressed=True)
    assert_same_tensors(tensors(tmp_path / "again"), packed)
    # a model in memory, and what was loaded packed, save the same
    model = SparseAutoModelForCausalLM.from_pretrained(base)
    oneshot(model, token_rows(), made, **OPTIONS).save_pretrained(tmp_path / "memory")
    assert_same_tensors(tensors(tmp_path / "memory"), packed)
    loaded = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    loaded.save_pretrained(tmp_path / "loaded")
    assert_same_tensors(tensors(tmp_path / "loaded"), packed)


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"scheme": "FP8_BLOCK"}, r"32 x 32 is not divisible into blocks of 128 x 128, as vLLM needs; add it to ign"),
        ({"scheme": "MXFP4XFP8"}, "32 input columns are not divisible by the activations' group_size 128"),
        (
            {"scheme": "W4A8"},
            r"32 input columns are not divisible by group_size 128 \(try 8, 16, 32, -1\)",
        ),
    ],
)
def test_shapes_that_do_not_fit(keys, fault, tmp_path):
    with pytest.raises(PlanError, match=r"model.layers.0.self_attn.q_proj: " + fault):
        run(save(build("llama"), tmp_path / "base"), tmp_path / "out", **keys)


def test_columns_that_a_format_cannot_group(tmp_path):
    model = build("llama", hidden_size=24, num_attention_heads=2, num_key_value_heads=2, head_dim=12)
    with pytest.raises(PlanError, match="24 input columns are not divisible by group_size 16, which its format fixes"):
        run(save(model, tmp_path / "base"), tmp_path / "out", scheme="NVFP4")


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ({"scheme": "NVFP4A16"}, "NVFP4A16 g16: vLLM serves it on GPUs, not on CPUs"),
        ({"scheme": "W4AFP8"}, "W4AFP8 g128: vLLM serves it on Hopper GPUs only"),
        (
            {"scheme": "W4A8"},
            "W4A8 g128: vLLM serves 4 bits stored as int8 on Arm CPUs only. With format: pack-quant",
        ),
        ({"scheme": "MXFP6A16"}, "MXFP6A16 g32: needs compressed-tensors 0.20 or later"),
        ({"scheme": "W3A16"}, "W3A16 g128: needs compressed-tensors 0.19 or later"),
        ({"scheme": "FP8_BLOCK"}, "FP8_BLOCK 128 x 128: needs compressed-tensors 0.19 or later (older ones misread"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: vLLM serves caches of 8-bit floats only"),
        (
            {"config_groups": {"a": {"weights": {"num_bits": 8, "type": "float", "group_size": 32}}}},
            "float8 g32: vLLM does not serve it; this loads in transformers",
        ),
    ],
)
def test_what_clients_cannot_do_is_told(keys, note, base, tmp_path):
    _, _, report = run(base, tmp_path / "out", **keys)
    assert any(n.startswith(note) for n in report["notes"]), report["notes"]


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC"])
def test_what_all_clients_serve_has_no_note(name, base, tmp_path):
    _, _, report = run(base, tmp_path / "out", scheme=name)
    assert not any(name in note for note in report["notes"])
