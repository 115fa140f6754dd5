"""The values of a grid, rounding to them and back, against arithmetic by hand in float64."""

import pytest
import torch

from bitpress.math.grid import Grid, QParams, dequantize, quantize, values_of
from bitpress.math.lost import solved
from bitpress.math.scales import find_qparams
from grids import KINDS, LARGEST, STRATEGIES, C, R, float_grid, grid, random, spread


@pytest.mark.parametrize("bits", range(2, 9))
def test_limits(bits):
    g = grid(bits)
    assert (g.qmin, g.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert g.groups(C) == 3
    assert grid(strategy="channel").groups(C) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_belong_to_the_stored_scale(symmetric, dtype):
    weight, g = random(64, C), grid(8, symmetric, "channel", dtype)
    found = find_qparams(weight, g)
    zero = 0 if symmetric else found.zero_point.float()
    codes = quantize(weight, found, g)
    assert torch.equal(codes.float(), (weight / found.scale.float() + zero).round().clamp(-128, 127))
    exact = find_qparams(weight, grid(8, symmetric, "channel"))
    assert not torch.equal(codes, quantize(weight, QParams(exact.scale, found.zero_point), g))


def test_zeros_have_no_sign():
    found = dequantize(torch.zeros(1, 4, dtype=torch.int8), QParams(torch.tensor([[-0.5]]), None))
    assert not found.signbit().any()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_and_back(symmetric, strategy):
    g = grid(4, symmetric, strategy)
    found = find_qparams(random(R, C), g)
    codes = torch.randint(g.qmin, g.qmax + 1, (R, C), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    dense = dequantize(codes, found)
    zero = 0 if symmetric else spread(found.zero_point, g)
    expected = (codes.double() - zero) * spread(found.scale, g)
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(quantize(dense, found, g), codes)


def test_half_steps_round_to_even_and_the_ends_are_clamped():
    weight = torch.tensor([[0.5, 1.5, -0.5, -2.5, 9.0, -9.0, 6.6, -7.6]])
    found = QParams(torch.ones(1, 1), None)
    codes = quantize(weight, found, Grid(4, True, None, False, torch.float32))
    assert codes.tolist() == [[0, 2, 0, -2, 7, -8, 7, -8]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inputs_stay_as_they_are(strategy):
    weight, importance = random(R, C), random(C).abs()
    before = weight.clone(), importance.clone()
    for symmetric in (True, False):
        g = grid(4, symmetric, strategy)
        found = find_qparams(weight, g, importance, search=True)
        solved(weight, quantize(weight, found, g), found, torch.eye(C))
    assert torch.equal(weight, before[0]) and torch.equal(importance, before[1])


def test_rows_of_parameters():
    found = find_qparams(random(R, C), grid(4, False))
    part = found.rows(2, 5)
    assert torch.equal(part.scale, found.scale[2:5]) and torch.equal(part.zero_point, found.zero_point[2:5])
    assert found.to("cpu").scale.device.type == "cpu"


def nearest_by_hand(x, values):
    """The value at the least distance in float64; of two, the one with the even code."""
    table = KINDS[values]
    distance = (x.double().abs()[:, None] - table).abs()
    nearest = distance.amin(1, keepdim=True)
    codes = torch.arange(len(table)).expand_as(distance)
    odd_is_far = torch.where(distance == nearest, codes % 2 * 1000 + codes, 10_000)
    return table[odd_is_far.argmin(1)] * x.double().sign()


@pytest.mark.parametrize("values", KINDS)
def test_floats_round_to_the_nearest_value(values):
    table = KINDS[values]
    middles = ((table[1:] + table[:-1]) / 2).float()
    beyond = torch.tensor([1.0, 1.03, 1.2, 50.0]) * LARGEST[values]
    random_ones = random(4000).abs() * LARGEST[values] / 4
    small = random(1000).abs() * float(table[1]) * 4
    close = torch.cat([torch.nextafter(middles, torch.tensor(0.0)), torch.nextafter(middles, torch.tensor(1e9))])
    x = torch.cat([table.float(), middles, close, beyond, random_ones, small])
    x = torch.cat([x, -x])
    g = float_grid(values)
    found = g.nearest_(x.clone())
    assert torch.equal(found.double(), nearest_by_hand(x, values))
    assert torch.equal(values_of(g.codes(found)), found)
    assert bool((g.codes(found).view(torch.uint8) != 0x80).all()), "there is one zero"


def test_every_code_of_e4m3_has_its_value():
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    finite = (codes.view(torch.uint8) & 0x7F) != 0x7F
    assert torch.equal(values_of(codes)[finite], codes.float()[finite])
