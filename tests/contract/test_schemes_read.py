"""Every kind of scheme that bitpress writes: as compressed-tensors decompresses it, and as transformers runs it."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from bitpress import formats, oneshot
from bitpress.math.grid import Solved, quantize, values_of
from bitpress.math.scales import find_qparams
from bitpress.schemes import QuantArgs, Scheme, preset, scheme_from_group
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build, save, token_rows
from fake_quant import quantized_inputs
from helpers import client, logits, tensors

RELEASE = tuple(int(part) for part in version("compressed-tensors").split(".")[:2])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIX_BITS = RELEASE >= (0, 20)
NAMES = (
    "W8A8", "W2A8", "W4A8", "W4A4", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4",
    "MXFP4A16", "MXFP4XFP8", "MXFP6A16", "MXFP6A8", "MXFP8", "MXFP8A16",
)  # fmt: skip
INT8 = {"num_bits": 8, "strategy": "channel"}
GROUPS = {
    "int8 static": {"weights": INT8, "input_activations": {"num_bits": 8, "strategy": "tensor"}},
    "int8 static asym": {
        "weights": {"num_bits": 8, "strategy": "tensor"},
        "input_activations": {"num_bits": 8, "strategy": "tensor", "symmetric": False},
    },
    "int8 dynamic asym": {
        "weights": INT8,
        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False},
    },
    "W4A8 packed": {
        "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
        "format": "pack-quantized",
    },
    "fp8 weights": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
    "fp8 groups": {"weights": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 64}},
}
SCHEMES: dict[str, Scheme] = {n: preset(n) for n in NAMES} | {n: scheme_from_group(g) for n, g in GROUPS.items()}


def skip_six_bits(scheme: Scheme) -> None:
    if scheme.weights.num_bits == 6 and scheme.weights.type == "float" and not SIX_BITS:
        pytest.skip("6-bit floats came with compressed-tensors 0.20, which plan says")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_decompressed(name, dtype):
    scheme = SCHEMES[name]
    skip_six_bits(scheme)
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(5)) * 0.05
    weight[7, :128] = 0
    grid = formats.grid_of(scheme, dtype)
    qparams = find_qparams(weight, grid)
    solved = Solved(quantize(weight, qparams, grid), qparams, torch.tensor(0.0))
    theirs = QuantizationScheme(targets=["Linear"], **scheme.to_dict(), format=scheme.format)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    packed = formats.pack(solved, scheme)
    read = compressor.decompress(packed, theirs)["weight"]
    ours = solved.dense()
    if scheme.format.startswith(("mxfp", "nvfp4")):  # bfloat16 whatever the model has
        exact = values_of(solved.codes).reshape(256, -1, scheme.weights.group_size or 1)
        ours = (exact * qparams.effective()[..., None]).reshape(256, 256).to(torch.bfloat16)
    assert read.dtype == ours.dtype and torch.equal(read, ours)
    if dtype == torch.bfloat16 and (scheme.weights.type == "float" or scheme.weights.num_bits < 8):
        # they divide in bfloat16, which cannot tell neighbours of 8 bits apart; all else they store as we do
        stored = compressor.compress(formats.dense(solved, scheme), theirs)
        for part in set(stored) & set(packed):
            both = (stored[part].reshape(packed[part].shape), packed[part])
            assert torch.equal(*(values_of(t) if t.dtype == torch.float8_e4m3fn else t for t in both)), part


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = build("llama", hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    return save(model, tmp_path_factory.mktemp("schemes") / "base")


def run(base, out, keys):
    recipe = {"QuantizationModifier": {**keys, "ignore": ["lm_head"]}}
    oneshot(base, token_rows(), recipe, output_dir=out, max_seq_length=32, num_calibration_samples=12)
    return tensors(out), json.loads((out / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_runs_it_as_it_is_meant(name, base, tmp_path):
    scheme = SCHEMES[name]
    skip_six_bits(scheme)
    keys = {"config_groups": {"a": {**GROUPS[name], "targets": ["Linear"]}}} if name in GROUPS else {"scheme": name}
    stored, config = run(base, tmp_path / "out", keys)
    assert config["format"] == scheme.format
    theirs, ours = client(tmp_path / "out", torch.float32), SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = ours.float()
    for key, weight in ours.state_dict().items():
        assert torch.equal(
            theirs.get_parameter(key).float(), weight.bfloat16().float() if _halved(key, scheme) else weight
        )
    theirs = theirs.float()
    for key, weight in theirs.named_parameters():
        if key in ours.state_dict():
            ours.get_parameter(key).data.copy_(weight)
    linears = [n.removesuffix(".weight_scale") for n in stored if n.endswith(".weight_scale")]
    plain = logits(ours)
    if scheme.input_activations is None:
        torch.testing.assert_close(logits(theirs), plain, rtol=1e-4, atol=1e-4)
        return
    with quantized_inputs(ours, scheme.input_activations, stored, linears):
        expected = logits(ours)
    noise = float((expected - plain).norm())
    # a value on a boundary may be rounded the other way by either
    assert float((logits(theirs) - expected).norm()) < 0.05 * noise


def _halved(key: str, scheme: Scheme) -> bool:
    return "proj" in key and scheme.format.startswith(("mxfp", "nvfp4"))


CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(
    "keys", [{}, {"strategy": "attn_head"}, {"type": "int"}, {"strategy": "token", "dynamic": True}]
)
def test_transformers_quantizes_the_cache(keys, base, tmp_path):
    scheme = {**CACHE, **keys}
    stored, config = run(base, tmp_path / "out", {"kv_cache_scheme": scheme})
    assert config["kv_cache_scheme"] == scheme and config["config_groups"] == {}
    theirs = client(tmp_path / "out", torch.float32)
    ours = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out")
    attention = ours.model.layers[0].self_attn
    args = QuantArgs(**{k: v for k, v in scheme.items() if k != "dynamic"}, dynamic=scheme["dynamic"])

    class Rounding:
        def update(self, keys, values, *rest, **named):
            return self.rounded("k", keys), self.rounded("v", values)

        def rounded(self, which, x):
            if args.dynamic:
                # one scale a batch entry and head: what compressed-tensors calls a token of (B, H, L, D)
                scale = x.abs().amax((2, 3), keepdim=True) / 448
            else:
                scale = stored[f"model.layers.0.self_attn.{which}_scale"]
            if args.type == "int":
                return (x / scale).round().clamp(-128, 127) * scale
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    handle = attention.register_forward_pre_hook(
        lambda m, a, k: (a, {**k, "past_key_values": Rounding()}), with_kwargs=True
    )
    plain = logits(SparseAutoModelForCausalLM.from_pretrained(base))
    expected = logits(ours)
    handle.remove()
    assert float((logits(theirs) - expected).norm()) < 0.05 * float((expected - plain).norm())
