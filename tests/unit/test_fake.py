"""Rounding with gradients: what is rounded is what a client reads; gradients are those of the papers."""

from __future__ import annotations

import pytest
import torch

from bitpress import formats
from bitpress.math.fake import learned_weight, round_weight, shares_of, shifted
from bitpress.math.grid import dequantize, quantize
from bitpress.math.scales import find_all, find_qparams
from bitpress.schemes import preset

SCHEMES = ["W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_BLOCK", "NVFP4A16", "MXFP4A16"]


def weight(rows=128, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCHEMES)
def test_straight_through(name):
    grid = formats.grid_of(preset(name), torch.bfloat16)
    w = weight().requires_grad_(True)
    qparams = find_qparams(w.detach(), grid)
    out = round_weight(w, qparams, grid)
    torch.testing.assert_close(out, dequantize(quantize(w.detach(), qparams, grid), qparams).float(), atol=1e-6, rtol=0)
    (out * weight(seed=1)).sum().backward()
    torch.testing.assert_close(w.grad, weight(seed=1))


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK"])
def test_learned_scales_have_the_gradient_of_the_paper(name):
    """By finite differences of the mean over many scales: rounding is a staircase, LSQ's gradient its slope; and by
    the formula, exactly."""
    grid = formats.grid_of(preset(name), torch.float32)
    w = weight().requires_grad_(True)
    start, size = find_qparams(w.detach(), grid, share=0.6), w.detach().abs().mean()  # some weights are cut
    shift = torch.zeros(grid.scale_shape(128, 128), requires_grad=True)
    out = learned_weight(w, shift, start, size, grid)
    assert torch.equal(out.detach(), dequantize(quantize(w.detach(), start, grid), start))
    g = weight(seed=1)
    (out * g).sum().backward()
    s = start.effective().repeat_interleave(128 // start.scale.shape[1], 1)
    z = 0 if start.zero_point is None else start.zero_point.float().repeat_interleave(128 // start.scale.shape[1], 1)
    codes = quantize(w.detach(), start, grid).float()
    x = w.detach() / s
    low, high = (grid.qmin, grid.qmax) if grid.values == "int" else (-grid.full, grid.full)
    inside = (x + z > low - 0.5) & (x + z < high + 0.5)
    assert 0.8 < float(inside.float().mean()) < 0.999
    torch.testing.assert_close(w.grad, g * inside)
    per = torch.where(inside, codes - z - x, codes - z) * g * s / size
    blocks = per.reshape(128 // grid.block_rows, grid.block_rows, start.scale.shape[1], -1).sum((1, 3))
    count = 128 * 128 // shift.numel()
    largest = grid.qmax if grid.values == "int" else grid.full
    torch.testing.assert_close(shift.grad, blocks / (count * largest) ** 0.5, atol=1e-4, rtol=1e-4)


def test_learning_finds_better_scales():
    grid = formats.grid_of(preset("W4A16"), torch.bfloat16)
    w = weight()
    best = find_qparams(w, grid, search=True)
    start, size = find_qparams(w, grid, share=0.5 * best.scale.sign().float()), w.abs().mean()  # cuts more than is good
    shift = torch.zeros(grid.scale_shape(128, 128), requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=0.02)
    losses = []
    for _ in range(100):
        loss = (learned_weight(w, shift, start, size, grid) - w).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    least = float((dequantize(quantize(w, best, grid), best).float() - w).square().sum())
    assert losses[-1] < 0.5 * losses[0] and losses[-1] < 1.1 * least
    assert shifted(start, shift.detach(), size, grid).scale.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SCHEMES)
def test_a_share_of_the_range_is_what_the_search_found(name):
    grid = formats.grid_of(preset(name), torch.bfloat16)
    weights = [weight(seed=i) for i in range(2)]
    found = find_all(weights, grid, shares=shares_of(weights, grid))
    for a, b, w in zip(found, find_all(weights, grid, search=True), weights, strict=True):
        errors = [float((dequantize(quantize(w, q, grid), q).float() - w).square().sum()) for q in (a, b)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)
