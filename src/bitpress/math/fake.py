"""Rounding that gradients pass through, for training a model with the rounding that it will be served with.

Straight-through (Bengio et al. 2013, arXiv 1308.3432): forward rounds, backward does as if it had not. Learned step
sizes (LSQ, Esser et al. 2020, arXiv 1902.08153): a weight beyond the ends of the grid gets no gradient, a scale gets
sum (code - w / s), or the end that was met, over its weights, times 1 / sqrt(weights * largest code).

Departure from LSQ: what is learned is a shift of each scale, s = s0 (1 + shift / mean |w|). The paper wants scales to
move as much as weights do, in relation to their size; Adam, which undoes the size of gradients, then does that.

Legend: R out features, C in features, G groups of columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitpress.math.grid import Grid, QParams, dequantize, quantize, values_of
from bitpress.math.scales import find_all


def straight(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` with the gradient of `x`."""
    return x + (rounded.to(x.dtype) - x).detach()


def shares_of(weights: list[Tensor], grid: Grid) -> list[Tensor]:
    """Of weights (R_i, C) with the same columns: the share (R_i, G) of its range that each scale covers best."""
    best = find_all(weights, grid, search=True)
    if grid.scales == "free":
        return [b.effective() / wide.effective() for b, wide in zip(best, find_all(weights, grid), strict=True)]
    # coarse scales: from the range itself, so that rounding gives the very same ones
    absmax = [w.reshape(len(w), grid.groups(w.shape[1]), -1).abs().amax(-1) for w in weights]
    return [torch.where(m > 0, b.effective() * grid.full / m, 1.0) for b, m in zip(best, absmax, strict=True)]


def round_weight(weight: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """The weight (R, C) that a client reads, with straight-through gradients."""
    with torch.no_grad():
        dense = dequantize(quantize(weight.detach().float(), qparams, grid), qparams)
    return straight(weight, dense)


def shifted(qparams: QParams, shift: Tensor, size: Tensor, grid: Grid) -> QParams:
    """Learned scales as they are stored.

    Args:
        qparams: s0 and zero points.
        shift: one for each stored scale, see above.
        size: mean |w|, scalar.
    """
    factor = (1 + shift.float() / size).clamp(min=0.05)
    factor = grid.repeated(factor, len(qparams.scale))
    scale = (qparams.scale.float() * factor).to(grid.scale_dtype)
    return QParams(scale, qparams.zero_point)


def learned_weight(weight: Tensor, shift: Tensor, qparams: QParams, size: Tensor, grid: Grid) -> Tensor:
    """The rounded weight (R, C), with LSQ's gradients of weight and shift."""
    out: Tensor = _Learned.apply(weight, shift, qparams, size, grid)  # type: ignore[no-untyped-call]
    return out


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, shift: Tensor, start: QParams, size: Tensor, grid: Grid) -> Tensor:
        R, C = weight.shape
        qparams = shifted(start, shift, size, grid)
        G = qparams.scale.shape[1]
        w = weight.float()
        codes = quantize(w, qparams, grid)
        x = w.reshape(R, G, C // G) / qparams.effective()[..., None]
        held = values_of(codes).reshape(R, G, C // G)
        zero = 0.0 if qparams.zero_point is None else qparams.zero_point.float()[..., None]
        low, high = (grid.qmin, grid.qmax) if grid.values == "int" else (-grid.full, grid.full)
        inside = (x + zero >= low - 0.5) & (x + zero <= high + 0.5)
        # of the scale: what rounding did to the weight, or the end that it was cut to
        per_weight = torch.where(inside, held - zero - x, held - zero)
        ctx.save_for_backward(inside.reshape(R, C), per_weight.reshape(R, C))
        ctx.scale, ctx.grid, ctx.shape, ctx.dtype = start.effective() / size, grid, shift.shape, shift.dtype
        return dequantize(codes, qparams).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        inside, per_weight = ctx.saved_tensors
        grid: Grid = ctx.grid
        R, C = d_out.shape
        G = ctx.scale.shape[1]
        d_scale = (d_out.float() * per_weight).reshape(R, G, C // G).sum(-1) * ctx.scale
        count = R * C // ctx.shape.numel()
        largest = grid.qmax if grid.values == "int" else grid.full
        if grid.per_tensor:
            d_shift = d_scale.sum().reshape(ctx.shape)
        else:
            d_shift = d_scale.reshape(R // grid.block_rows, grid.block_rows, G).sum(1)
        d_shift = d_shift / (count * largest) ** 0.5
        return d_out * inside, d_shift.to(ctx.dtype), None, None, None
