"""What is said of clients, preset by preset."""

import pytest

from bitpress.clients import (
    OLDER_GPUS,
    ON_GPUS,
    UNSERVED,
    loads_as_experts,
    misread_as_experts,
    processor_notes,
    release_limit,
    vllm_limit,
)  # fmt: skip
from bitpress.schemes import PRESETS, QuantArgs, Scheme, preset, scheme_from_group

EVERYWHERE = {"W4A16", "W4A16_ASYM", "W8A8", "INT8", "FP8_DYNAMIC", "FP8_BLOCK"}
GPUS = {"W8A16", "W8A16_ASYM", "FP8", "NVFP4A16", "MXFP4A16", "MXFP4XFP8", "MXFP8A16"}


@pytest.mark.parametrize("name", PRESETS)
def test_what_vllm_serves(name):
    said = vllm_limit(preset(name))
    if name in EVERYWHERE:
        assert said is None
    elif name in GPUS:
        assert said == ON_GPUS
    elif name in ("NVFP4", "MXFP4", "MXFP8"):
        assert said == OLDER_GPUS
    elif name.startswith("MXFP6"):
        assert said == UNSERVED
    elif name == "W4AFP8":
        assert said == "vLLM serves it on Hopper GPUs only"
    elif "A16" in name:
        assert said == "vLLM serves 4 and 8 bits only; this loads in transformers"
    else:
        assert said.endswith(". With format: pack-quantized in config_groups vLLM serves it on GPUs")


def scheme(inputs=None, stored=None, **weights):
    group = {
        "weights": {"num_bits": 8, "strategy": "channel", **weights},
        "input_activations": inputs,
        "format": stored,
    }
    return scheme_from_group(group)


TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "strategy": "tensor"}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (scheme(STATIC), None),
        (scheme({**STATIC, "symmetric": False}, strategy="tensor"), None),
        (scheme({**TOKEN, "symmetric": False}), None),
        (scheme(TOKEN, symmetric=False), UNSERVED),
        (scheme({**STATIC, "dynamic": True}), UNSERVED),
        (scheme(TOKEN, "pack-quantized", num_bits=4), ON_GPUS),
        (scheme({**TOKEN, "symmetric": False}, "pack-quantized", num_bits=4), UNSERVED),
        (scheme(type="float"), None),
        (scheme(type="float", strategy="group", group_size=64), UNSERVED),
        (scheme({**TOKEN, "type": "float"}, num_bits=4, strategy="group", group_size=64), UNSERVED),
        (scheme(strategy="tensor", num_bits=4), "vLLM serves strategy group or channel only; this loads in transform"),
    ],
)
def test_what_vllm_serves_of_groups(found, said):
    if said is None:
        assert vllm_limit(found) is None
    else:
        assert vllm_limit(found).startswith(said)


def test_a_processor_without_the_kernel(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    (said,) = processor_notes("compressed-tensors", [preset("W4A16_ASYM")])
    assert "AVX-512, which this processor has not" in said
    assert processor_notes("awq", [preset("W4A16_ASYM")]) == processor_notes("gptq", [preset("W4A16")]) == [said]
    for stored, name in (("gptq_v2", "W4A16_ASYM"), ("gguf", "W4A16"), ("dense", "W4A16")):
        assert processor_notes(stored, [preset(name)]) == []  # it does not serve these anywhere, or needs no kernel
    for name in ("W8A8", "W8A16", "FP8_DYNAMIC", "W3A16", "NVFP4A16"):
        assert processor_notes("compressed-tensors", [preset(name)]) == []
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    assert processor_notes("compressed-tensors", [preset("W4A16")]) == []


def test_releases():
    needs = {name: release_limit(preset(name), []) for name in PRESETS}
    assert {n for n, text in needs.items() if text and "0.20" in text} == {"MXFP6A16", "MXFP6A8"}
    odd = {f"W{b}A16{s}" for b in (3, 5, 6, 7) for s in ("", "_ASYM")}
    assert {n for n, text in needs.items() if text and "0.19" in text} == odd


def test_experts():
    good = {n for n in PRESETS if loads_as_experts(preset(n))}
    packed = {f"W{b}A16" for b in range(2, 9)} | {"W4AFP8"}
    assert good == packed | {"FP8", "FP8_DYNAMIC", "MXFP4", "MXFP4A16", "MXFP4XFP8", "MXFP6A16", "MXFP6A8"}
    assert {n for n in PRESETS if misread_as_experts(preset(n))} == {"NVFP4", "NVFP4A16"}
    assert loads_as_experts(Scheme(name=None, weights=QuantArgs(type="float", strategy="channel")))
