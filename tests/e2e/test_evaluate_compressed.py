"""Compressed checkpoints are judged as clients serve them: every scheme, experts, rounded inputs and caches."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from packaging.version import Version

from bitpress import oneshot
from bitpress.errors import CheckpointError
from bitpress.evaluate import evaluate, load_model
from bitpress.reading import modifier_of, reload
from bitpress.subject import ModuleSubject
from conftest import build, save, token_rows
from fake_quant import quantized_inputs
from helpers import OPTIONS, config_of, logits, make_tokenizer, report_of, tensors


def test_compressed_tensors_are_decompressed(rows, tmp_path):
    base = save(build("llama"), tmp_path / "base")
    make_tokenizer(base)
    text = " ".join(f"w{7 * i % 90}" for i in range(100))
    oneshot(
        base,
        rows,
        {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}},
        output_dir=tmp_path / "out",
        **OPTIONS,
    )
    result = evaluate(base, tmp_path / "out", text=text, windows=2, length=32)
    assert 0 < result.kl < 1 and result.bytes < result.base_bytes
    loaded = load_model(tmp_path / "out")
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    assert all(len(row.unique()) <= 16 for row in weight.data[:, :16])  # 4 bits in the first group


# what transformers has learnt in a release of the range
LOADS_SINCE = {("falcon", "W4A16")} if Version(transformers.__version__) >= Version("5.23") else set()


@pytest.mark.parametrize(
    ("family", "scheme", "own"),
    [("mixtral", "W4A16", False), ("mixtral", "W4A16_ASYM", True), ("falcon", "W4A16", True)],
)
def test_what_transformers_cannot_load_is_read_by_bitpress(family, scheme, own, tmp_path):
    model = build(family, torch.bfloat16)
    base = save(copy.deepcopy(model), tmp_path / "base")
    make_tokenizer(base)
    wanted = {"QuantizationModifier": {"scheme": scheme, "group_size": 16, "ignore": ["lm_head"]}}
    oneshot(model, None, wanted)
    model.save_pretrained(tmp_path / "out")
    for dtype in ("float32", "auto"):
        result = evaluate(base, tmp_path / "out", windows=1, length=32, dtype=dtype)
        assert 0 < result.kl < 1
        said = [note for note in result.notes if "bitpress's own loader was used" in note]
        assert len(said) == (own and (family, scheme) not in LOADS_SINCE) and all(
            str(tmp_path / "out") in note for note in said
        )
    loaded = load_model(tmp_path / "out")
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key].to(weight.dtype), weight), key


def test_a_cache_is_not_left_out_in_silence(tmp_path):
    model = build("mixtral", torch.bfloat16)
    base = save(copy.deepcopy(model), tmp_path / "base")
    make_tokenizer(base)
    cache = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    oneshot(model, None, {"QuantizationModifier": {"kv_cache_scheme": cache, "ignore": ["lm_head"]}})
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not round the cache of keys and values"):
        load_model(tmp_path / "out")
    notes = evaluate(base, tmp_path / "out", windows=1, length=32).notes
    assert any("own loader was used; the cache of keys and values is not rounded" in note for note in notes)


def test_experts_that_differ_in_scheme(tmp_path):
    """transformers reads all experts by one scheme: what is judged is what is stored, and the run has said so."""
    base, out = save(build("mixtral", torch.bfloat16), tmp_path / "base"), tmp_path / "out"
    make_tokenizer(base)
    weights = {"type": "int", "strategy": "group", "group_size": 16}
    groups = {
        "a": {"targets": ["re:.*layers.0.*experts.*"], "weights": {**weights, "num_bits": 8}},
        "b": {"targets": ["Linear"], "weights": {**weights, "num_bits": 4}},
    }
    oneshot(base, None, {"QuantizationModifier": {"config_groups": groups, "ignore": ["lm_head"]}}, output_dir=out)
    notes = report_of(out)["notes"]
    assert any("experts quantized in 2 schemes: transformers reads all experts by one" in note for note in notes)
    result = evaluate(base, out, windows=1, length=32)
    assert any("own loader" in note for note in result.notes)
    reference = evaluate(
        load_model(base), reload(out, dtype="float32"), windows=1,
        length=32, tokenizer=str(base),
    )  # fmt: skip
    assert result.kl == pytest.approx(reference.kl, rel=1e-5)


def test_experts_of_one_scheme_go_first_in_the_configuration(tmp_path):
    """transformers takes the first group with a class or a name for that of the experts."""
    base, out = save(build("mixtral", torch.bfloat16, num_local_experts=2), tmp_path / "base"), tmp_path / "out"
    weights = {"type": "int", "strategy": "group", "group_size": 16}
    groups = {
        "a": {"targets": ["re:.*experts.*w1"], "weights": {**weights, "num_bits": 8}},
        "b": {"targets": ["Linear"], "weights": {**weights, "num_bits": 4}},
    }
    recipe = {"QuantizationModifier": {"config_groups": groups, "ignore": ["lm_head", "re:.*w2", "re:.*w3"]}}
    oneshot(base, None, recipe, output_dir=out)
    config = config_of(out)["quantization_config"]["config_groups"]
    first = config["group_0"]
    assert first["targets"] == ["Linear"] and first["weights"]["num_bits"] == 8
    assert len(config["group_1"]["targets"]) == 2 * 4  # more linears, but no experts
    notes = report_of(out)["notes"]
    assert any("experts quantized in part" in note for note in notes)


STATIC = {"num_bits": 8, "symmetric": False, "strategy": "tensor"}
EXPERTS = {
    "W8A8": {"scheme": "W8A8"},
    "static": {"config_groups": {"a": {"weights": {"strategy": "channel"}, "input_activations": STATIC}}},
    "FP8": {"scheme": "FP8"},
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC"},
    "NVFP4": {"scheme": "NVFP4"},
    "MXFP8": {"scheme": "MXFP8"},
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_round_their_inputs(name, tmp_path):
    """What is judged is the model that clients serve: held against arithmetic of our own on dense weights."""
    model = build("mixtral", torch.bfloat16, num_local_experts=2)
    base, out = save(model, tmp_path / "base"), tmp_path / "out"
    make_tokenizer(base)
    oneshot(base, token_rows(), {"QuantizationModifier": {**EXPERTS[name], "ignore": ["lm_head"]}}, output_dir=out,
            **OPTIONS)  # fmt: skip
    result = evaluate(base, out, windows=1, length=32)
    assert any("own loader was used" in note and "not rounded" not in note for note in result.notes)
    loaded, plain = load_model(out), reload(out, dtype="float32")
    dense = logits(plain)
    args = modifier_of(out).groups()[0].scheme.input_activations
    stored = tensors(out)
    subject = ModuleSubject(plain)  # experts are Linears from here on
    names = {n: subject.layout.disk_of[f"{n}.weight"].removesuffix(".weight")
             for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}  # fmt: skip
    assert sum(".experts." in n for n in names) == 2 * 2 * 3
    renamed = {f"{n}.{k.removeprefix(disk + '.')}": t for n, disk in names.items()
               for k, t in stored.items() if k.startswith(disk + ".")}  # fmt: skip
    with quantized_inputs(plain, args, renamed, list(names)):
        expected = logits(plain)
    noise = float((expected - dense).norm())
    assert noise > 0 and float((logits(loaded) - expected).norm()) < 0.05 * noise


def test_schemes_and_activations_are_those_of_the_checkpoint(tmp_path):
    """transformers' own dequantize=True reads all by the first scheme and drops activations, since 5.23."""
    model = build("llama", torch.bfloat16)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
    groups = {
        "attention": {"weights": {**weights, "num_bits": 8}, "targets": ["re:.*self_attn.*"]},
        "mlp": {"weights": weights, "targets": ["re:.*mlp.*"]},
    }
    oneshot(model, None, {"QuantizationModifier": {"config_groups": groups, "ignore": ["lm_head"]}})
    model.save_pretrained(tmp_path / "mixed")
    assert torch.equal(logits(load_model(tmp_path / "mixed", "auto")), logits(model))

    model = build("llama", torch.bfloat16)
    oneshot(model, None, {"QuantizationModifier": {"scheme": "W8A8", "ignore": ["lm_head"]}})
    model.save_pretrained(tmp_path / "out")
    loaded = load_model(tmp_path / "out", "auto")
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(logits(loaded), logits(model))  # bitpress's model in memory keeps activations as they are
