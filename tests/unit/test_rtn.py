"""Rounding to nearest, and the error that is told of it."""

import pytest
import torch

from bitpress.math.grid import quantize
from bitpress.math.lost import solved
from bitpress.math.rtn import round_to_nearest
from bitpress.math.scales import find_qparams
from grids import C, R, by_hand, float_grid, grid, random


def test_error_is_the_share_of_the_output_that_is_lost():
    weight, x = random(R, C), random(200, C, seed=2)
    g = grid(3)
    found = find_qparams(weight, g)
    codes = quantize(weight, found, g)
    delta = by_hand(weight, found.scale, None, g) - weight
    own = float(delta.square().sum() / weight.double().square().sum())
    output = float((x.double() @ delta.T).square().sum() / (x.double() @ weight.double().T).square().sum())
    assert float(solved(weight, codes, found, None).error) == pytest.approx(own, rel=1e-4)
    assert float(solved(weight, codes, found, x.T @ x).error) == pytest.approx(output, rel=0.02)
    assert float(solved(torch.zeros(R, C), torch.zeros_like(codes), found, None).error) == 0


@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_to_nearest(symmetric, observer):
    weight, g = random(R, C), grid(3, symmetric, "group", torch.bfloat16)
    result = round_to_nearest(weight, g, observer=observer)
    expected = find_qparams(weight, g, search=observer == "mse")
    assert torch.equal(result.qparams.scale, expected.scale)
    assert torch.equal(result.codes, quantize(weight, expected, g))
    assert result.dense().dtype == torch.bfloat16
    other = round_to_nearest(weight, g, observer="mse" if observer == "minmax" else "minmax")
    assert (result.error < other.error) == (observer == "mse")


def test_float_round_to_nearest():
    weight = random(64, C) * 0.05
    plain = round_to_nearest(weight, float_grid("e2m1", "two-level", dtype=torch.bfloat16))
    searched = round_to_nearest(weight, float_grid("e2m1", "two-level", dtype=torch.bfloat16), observer="mse")
    assert searched.error < 0.95 * plain.error
