"""The scale search on a GPU: what every candidate scale costs, in one launch.

Legend: R out features, C in features, G groups, K candidates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitpress.math.grid import Grid, QParams
from bitpress.math.kernels.rounding import nearest, numbers_of

COLUMNS, ROWS = 128, 16  # of a tile


@triton.jit  # type: ignore[untyped-decorator]
def _loss(  # type: ignore[no-untyped-def]  # the compiler reads annotations
    weight, scale, zero, importance, loss, R, C, G, each, low, high, least, fraction,
    SIZE: tl.constexpr, FLOAT: tl.constexpr, ZERO: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    # the candidates of one tile follow each other, so that it is read from memory once
    candidate, group = tl.program_id(0).to(tl.int64), tl.program_id(2)
    rows = tl.program_id(1).to(tl.int64) * T + tl.arange(0, T)
    inside = rows < R
    at = (candidate * R + rows) * G + group
    s = tl.load(scale + at, mask=inside, other=1.0)
    z = tl.load(zero + at, mask=inside, other=0.0) if ZERO else tl.zeros([T], tl.float32)
    total = tl.zeros([T], tl.float32)
    for start in range(0, SIZE, B):
        column = start + tl.arange(0, B)
        mask = inside[:, None] & (column < SIZE)[None, :]
        w = tl.load(weight + rows[:, None] * C + group * SIZE + column[None, :], mask=mask, other=0.0)
        place = (rows // each)[:, None] * C + group * SIZE + column[None, :]
        share = tl.load(importance + place, mask=mask, other=0.0)
        x = nearest(tl.div_rn(w, s[:, None]) + z[:, None], low, high, least, fraction, FLOAT)
        error = (x - z[:, None]) * s[:, None] - w
        total += tl.sum(error * error * share, axis=1)
    tl.store(loss + at, total, mask=inside)


def losses_of(weight: Tensor, tried: QParams, importance: Tensor, grid: Grid) -> Tensor:
    """What each of the stacked candidates (K, R, G) costs, (K, R, G)."""
    zero = None if tried.zero_point is None else tried.zero_point.float().contiguous()
    scale = tried.effective().contiguous()
    return losses(weight.contiguous(), scale, zero, importance.float().contiguous(), grid)


def losses(weight: Tensor, scale: Tensor, zero: Tensor | None, importance: Tensor, grid: Grid) -> Tensor:
    """sum over a group of importance * (rounded - weight)^2, for each candidate.

    Args:
        weight: (R, C) float32.
        scale, zero: (K, R, G) float32; zero None if symmetric.
        importance: (C,) float32, or (P, C) of each P-th of the rows.
        grid: what to round to.

    Returns:
        (K, R, G) float32.
    """
    K, R, G = scale.shape
    C = weight.shape[1]
    loss = torch.empty_like(scale)
    _loss[(K, triton.cdiv(R, ROWS), G)](
        weight, scale, scale if zero is None else zero, importance, loss, R, C, G, R // (importance.numel() // C),
        *numbers_of(grid),
        SIZE=C // G, FLOAT=grid.values != "int", ZERO=zero is not None, B=COLUMNS, T=ROWS, num_warps=4,
    )  # fmt: skip
    return loss
