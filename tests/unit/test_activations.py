"""Static scales of activations, against arithmetic by hand in float64."""

import pytest
import torch

from bitpress import chain
from bitpress.errors import NumericsError
from bitpress.math.activations import OutputRange, rounded, static_scale
from bitpress.math.stats import InputStats
from bitpress.rounding import grid_of_inputs
from bitpress.schemes import PRESETS, QuantArgs, Scheme, preset
from fake_quant import fake_quantized

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANGES = [(-3.0, 5.0), (-5.0, 3.0), (1.0, 4.0), (-4.0, -1.0), (-1e-3, 2e-3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low, high", RANGES)
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_cover_the_range_and_zero(bits, low, high, dtype):
    x = torch.linspace(low, high, 1001, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    for symmetric in (True, False):
        scale, zero = static_scale(torch.tensor(low), torch.tensor(high), "int", bits, symmetric, dtype)
        assert scale.dtype == dtype and (zero is None) == symmetric
        s, z = scale.double(), 0 if zero is None else zero.double()
        codes = (x / s + z).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        # half a step, and what rounding the scale takes from the far end
        assert float(((codes - z) * s - x).abs().max()) <= float(s) * (0.5 + 2**bits * eps) + 1e-9
        span = max(high, 0) - min(low, 0)
        exact = 2 * max(abs(low), abs(high)) / (2**bits - 1) if symmetric else span / (2**bits - 1)
        assert float(s) == pytest.approx(max(exact, torch.finfo(dtype).tiny), rel=2 * eps)
        zeros = (torch.zeros((), dtype=torch.float64) + z).round()
        assert float((zeros - z) * s) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low, high", RANGES)
def test_the_largest_value_is_the_largest_float(low, high, dtype):
    scale, zero = static_scale(torch.tensor([low]), torch.tensor([high]), "e4m3", 8, True, dtype)
    assert zero is None and scale.shape == (1,)
    exact = max(max(abs(low), abs(high)) / 448, torch.finfo(dtype).tiny)
    assert float(scale) == pytest.approx(exact, rel=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_are_always_zero(symmetric):
    scale, zero = static_scale(torch.zeros(1), torch.zeros(1), "int", 8, symmetric, torch.bfloat16)
    assert scale.item() == 1.0
    assert symmetric or zero.item() == -128


def test_one_scale_a_head():
    low, high = torch.tensor([-1.0, -8.0]), torch.tensor([2.0, 4.0])
    scale, _ = static_scale(low, high, "e4m3", 8, True, torch.float32)
    torch.testing.assert_close(scale, torch.tensor([2.0, 8.0]) / 448)


def test_ranges_of_two_token_sets():
    both = OutputRange(torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 3.0])).merge(
        OutputRange(torch.tensor([-0.5, -4.0]), torch.tensor([5.0, 1.0]))
    )
    assert both.low.tolist() == [-1.0, -4.0] and both.high.tolist() == [5.0, 3.0]


def stats(low, high):
    return InputStats(None, 7, low=torch.tensor(low), high=torch.tensor(high))


def test_the_tensors_beside_a_linear():
    seen = stats([-1.0, -2.0], [3.0, 0.5])
    static = QuantArgs(num_bits=8, symmetric=False, strategy="tensor")
    int8 = Scheme(name=None, weights=QuantArgs(strategy="channel"), input_activations=static)
    found = chain.input_scales(int8, seen, torch.float32)
    torch.testing.assert_close(found["input_scale"], torch.tensor([5 / 255]))
    assert found["input_zero_point"].tolist() == [-26] and found["input_zero_point"].dtype == torch.int8
    found = chain.input_scales(preset("NVFP4"), seen, torch.bfloat16)
    torch.testing.assert_close(found["input_global_scale"], torch.tensor([448 * 6 / 3.0]))
    for name in ("W8A8", "W4A16", "MXFP8"):
        assert chain.input_scales(preset(name), None, torch.bfloat16) == {}
    with pytest.raises(NumericsError, match="NaN or infinity in the input activations"):
        chain.input_scales(preset("FP8"), stats([-1.0], [float("inf")]), torch.bfloat16)


INPUTS = {n: s.input_activations for n, s in PRESETS.items() if s.input_activations is not None} | {
    "int8 static asym": QuantArgs(num_bits=8, symmetric=False, strategy="tensor"),
    "int8 token asym": QuantArgs(num_bits=8, symmetric=False, strategy="token", dynamic=True),
    "int8 tensor": QuantArgs(num_bits=8, strategy="tensor", dynamic=True),
    "int4 groups": QuantArgs(num_bits=4, strategy="group", group_size=32, dynamic=True),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_rounded_as_clients_do(name):
    args = INPUTS[name]
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1)).mul(3)
    x[0, 0] = 0
    beside = {}
    if args.dynamic == "local":
        beside = {"input_global_scale": torch.tensor([448 * 6 / 11.0])}
    elif not args.dynamic:
        beside = {"input_scale": torch.tensor([0.05])}
        beside |= {} if args.symmetric else {"input_zero_point": torch.tensor([-9], dtype=torch.int8)}
    grid, before = grid_of_inputs(args), x.clone()
    found = rounded(x, grid, beside)
    assert found.dtype == x.dtype and found.shape == x.shape and torch.equal(x, before)
    expected = fake_quantized(x, args, beside).nan_to_num(0)  # a token of zeros has no scale there
    off = (found - expected).abs() > 1e-5 * expected.abs() + 1e-6
    assert off.float().mean() < 0.002  # a value between two codes may go either way
    assert not torch.equal(found, x) and not found[0, 0].any()
    half = rounded(x.bfloat16(), grid, beside)
    assert half.dtype == torch.bfloat16 and float((half.float() - found).norm() / found.norm()) < 0.2
