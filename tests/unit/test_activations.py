"""Static scales of activations, against arithmetic by hand in float64."""

import pytest
import torch

from bitpress import chain
from bitpress.errors import NumericsError
from bitpress.math.activations import OutputRange, static_scale
from bitpress.math.stats import InputStats
from bitpress.schemes import QuantArgs, Scheme, preset

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
