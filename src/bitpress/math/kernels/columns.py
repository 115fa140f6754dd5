"""The column walk on a GPU: one program takes a tile of rows through a block of columns, without a launch a column.

The same algorithm as `bitpress.math.sweep.walk` with `Rounding` as its projection: rows are independent given the
factor, so a program keeps its tile of the block in registers; what is after the block is updated by a matrix product.

Legend: R out features, C in features, G groups. All tensors are transposed: (C, R), (G, R).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitpress.math.grid import Grid
from bitpress.math.kernels.rounding import nearest, numbers_of
from bitpress.math.products import subtract_product

COLUMNS, ROWS = 128, 16  # of a tile


@triton.jit  # type: ignore[untyped-decorator]
def _block(  # type: ignore[no-untyped-def]  # the compiler reads annotations
    work, factor, scale, zero, groups, keep, dense, steps, values,
    errors, base, C, R, low, high, least, fraction,
    FLOAT: tl.constexpr, ZERO: tl.constexpr, KEEP: tl.constexpr, DESCEND: tl.constexpr,
    COUNT: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * T + tl.arange(0, T)
    columns = tl.arange(0, B)
    inside = rows < R
    tile = tl.load(
        work + (base + columns)[:, None] * R + rows[None, :],
        mask=(columns < COUNT)[:, None] & inside[None, :],
        other=0.0,
    )
    for j in range(0, COUNT):
        at = base + j
        group = tl.load(groups + at)
        s = tl.load(scale + group * R + rows, mask=inside, other=1.0)
        step = tl.load(steps + at)
        w = tl.sum(tl.where((columns == j)[:, None], tile, 0.0), axis=0)
        if DESCEND:
            before = tl.load(dense + at * R + rows, mask=inside, other=0.0)
            w = before + w * step
        x = tl.div_rn(w, s)
        if KEEP:
            x = x * tl.load(keep + at * R + rows, mask=inside, other=0.0)
        z = tl.load(zero + group * R + rows, mask=inside, other=0.0) if ZERO else 0.0
        x = nearest(x + z, low, high, least, fraction, FLOAT)
        q = (x - z) * s
        if DESCEND:
            error = q - before
            tl.store(dense + at * R + rows, q, mask=inside)
        else:
            error = tl.div_rn(w - q, step)
        tl.store(values + at * R + rows, x, mask=inside)
        tl.store(errors + j * R + rows, error, mask=inside)
        u = tl.load(factor + at * C + base + columns, mask=(columns > j) & (columns < COUNT), other=0.0)
        tile = tile - u[:, None] * error[None, :]


def walk(
    work: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    groups: Tensor,
    grid: Grid,
    steps: Tensor,
    keep: Tensor | None,
    dense: Tensor | None = None,
) -> Tensor:
    """Project column by column, each one's error taken from all later columns.

    Args:
        work: (C, R) float32, changed: the weights, or (with `dense`) the gradient of the descent.
        factor: (C, C) float32; its upper triangle is read.
        scale, zero: (G, R) float32.
        groups: (C,), the group of each column.
        grid: what to round to.
        steps: (C,) float32: the pivots, by which errors are divided, or the steps of the descent.
        keep: (C, R) float32, 0 where the weight is pruned.
        dense: (C, R) float32, changed: makes it coordinate descent, from these weights.

    Returns:
        The codes' values (C, R) float32.
    """
    C, R = work.shape
    values = torch.empty_like(work)
    errors = torch.empty(COLUMNS, R, device=work.device)
    groups, factor = groups.to(torch.int32), factor.contiguous()
    for base in range(0, C, COLUMNS):
        count = min(COLUMNS, C - base)
        _block[(triton.cdiv(R, ROWS),)](
            work, factor, scale, work if zero is None else zero, groups, work if keep is None else keep,
            work if dense is None else dense, steps, values, errors, base, C, R, *numbers_of(grid),
            FLOAT=grid.values != "int", ZERO=zero is not None, KEEP=keep is not None, DESCEND=dense is not None,
            COUNT=count, B=COLUMNS, T=ROWS, num_warps=4,
        )  # fmt: skip
        end = base + count
        if end < C:
            subtract_product(work[end:], factor[base:end, end:], errors[:count])
    return values
