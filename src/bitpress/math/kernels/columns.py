"""The column walk on a GPU: one program takes a tile of rows through a block of columns, without a launch a column.

The same algorithm as `bitpress.math.sweep.walk` with `Rounding` as its projection: rows are independent given the
factor, so a program keeps its tile of some columns in registers; what comes later within the block is updated when its
turn comes, what is after the block by a matrix product.

Legend: E problems, R out features, C in features, G groups. All tensors are transposed: (E, C, R), (E, G, R).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitpress.math.grid import Grid
from bitpress.math.kernels.rounding import nearest, numbers_of

COLUMNS = 256  # of a block
STRIP, ROWS, WARPS = 32, 32, 1  # of a tile: what one warp holds in registers


@triton.jit  # type: ignore[untyped-decorator]
def begun(  # type: ignore[no-untyped-def]
    work, factor, errors, start, columns, there, rows, inside, C, R, S: tl.constexpr
):  # fmt: skip
    """A tile (S, T) of the columns from `start` on, with the errors of the block's columns before taken from it."""
    strip = tl.arange(0, S)
    tile = tl.load(work + columns[:, None] * R + rows[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    for before in range(0, start, S):
        left = before + strip
        u = tl.load(factor + left[None, :] * C + columns[:, None], mask=there[:, None], other=0.0)
        error = tl.load(errors + left[:, None] * R + rows[None, :], mask=inside[None, :], other=0.0)
        tile -= tl.dot(u, error, input_precision="tf32x3")
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def leave(errors, split, error, at, rows, live, R, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Leave a column's error for the block's later columns, and its halves for the columns after the block."""
    tl.store(errors + at * R + rows, error, mask=live)
    half = error.to(split.dtype.element_ty)
    tl.store(split + at * R + rows, half, mask=live)
    tl.store(split + (B + at) * R + rows, half, mask=live)
    rest = (error - half.to(tl.float32)).to(split.dtype.element_ty)
    tl.store(split + (2 * B + at) * R + rows, rest, mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def _block(  # type: ignore[no-untyped-def]  # the compiler reads annotations
    work, factor, scale, zero, groups, keep, dense, steps, values,
    errors, split, base, C, R, G, low, high, least, fraction,
    FLOAT: tl.constexpr, ZERO: tl.constexpr, KEEP: tl.constexpr, DESCEND: tl.constexpr,
    COUNT: tl.constexpr, B: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    # every place is counted from the block's first column: counted from zero it may be beyond int32
    problem = tl.program_id(1).to(tl.int64)
    first = problem * C + base
    last = C - 1 - base
    factor += first * C + base
    steps += first
    groups += first
    errors += problem * B * R
    split += problem * 3 * B * R
    scale += problem * G * R
    work += first * R
    values += first * R
    if ZERO:
        zero += problem * G * R
    if KEEP:
        keep += first * R
    if DESCEND:
        dense += first * R
    rows = tl.program_id(0) * T + tl.arange(0, T)
    inside = rows < R
    strip = tl.arange(0, S)
    for start in range(0, COUNT, S):
        columns = start + strip
        there = columns < COUNT
        at = start
        tile = begun(work, factor, errors, start, columns, there, rows, inside, C, R, S)
        # what a column needs is loaded while the one before it is at work
        s = tl.load(scale + tl.load(groups + at) * R + rows, mask=inside, other=1.0)
        group = tl.load(groups + tl.minimum(at + 1, last))
        step = tl.load(steps + at)
        u = tl.load(factor + at * C + columns, mask=there & (strip > 0), other=0.0)
        for j in range(0, S):
            live = inside & (start + j < COUNT)
            ahead = tl.minimum(at + 1, last)
            s_ahead = tl.load(scale + group * R + rows, mask=inside, other=1.0)
            u_ahead = tl.load(factor + ahead * C + columns, mask=there & (strip > j + 1), other=0.0)
            step_ahead = tl.load(steps + ahead)
            w = tl.sum(tl.where((strip == j)[:, None], tile, 0.0), axis=0)
            if DESCEND:
                was = tl.load(dense + at * R + rows, mask=inside, other=0.0)
                w = was + w * step
            x = tl.div_rn(w, s)
            if KEEP:
                x = x * tl.load(keep + at * R + rows, mask=inside, other=0.0)
            z = tl.load(zero + tl.load(groups + at) * R + rows, mask=inside, other=0.0) if ZERO else 0.0
            x = nearest(x + z, low, high, least, fraction, FLOAT)
            q = (x - z) * s
            if DESCEND:
                error = q - was
                tl.store(dense + at * R + rows, q, mask=live)
            else:
                error = tl.div_rn(w - q, step)
            tl.store(values + at * R + rows, x, mask=live)
            leave(errors, split, error, start + j, rows, live, R, B)
            tile = tile - u[:, None] * error[None, :]
            s, u, step, at = s_ahead, u_ahead, step_ahead, ahead
            group = tl.load(groups + tl.minimum(at + 1, last))
        tl.debug_barrier()  # the errors are read again, by other threads


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
        work: (E, C, R) float32, changed: the weights, or (with `dense`) the gradient of the descent.
        factor: (E, C, C) float32; its upper triangle is read.
        scale, zero: (E, G, R) float32.
        groups: (E, C), the group of each column.
        grid: what to round to.
        steps: (E, C) float32: the pivots, by which errors are divided, or the steps of the descent.
        keep: (E, C, R) float32, 0 where the weight is pruned.
        dense: (E, C, R) float32, changed: makes it coordinate descent, from these weights.

    Returns:
        The codes' values (E, C, R) float32.
    """
    E, C, R = work.shape
    values = torch.empty_like(work)
    errors = torch.empty(E, COLUMNS, R, device=work.device)
    exact = torch.bfloat16 if work.is_cuda else torch.float32  # Triton's interpreter cannot make bfloat16
    split = torch.empty(E, 3 * COLUMNS, R, dtype=exact, device=work.device)
    groups, factor = groups.to(torch.int32).contiguous(), factor.contiguous()
    left = split_rows(factor, COLUMNS)
    for base in range(0, C, COLUMNS):
        count = min(COLUMNS, C - base)
        _block[(triton.cdiv(R, ROWS), E)](
            work, factor, scale, work if zero is None else zero, groups, work if keep is None else keep,
            work if dense is None else dense, steps, values, errors, split, base, C, R, scale.shape[1],
            *numbers_of(grid),
            FLOAT=grid.values != "int", ZERO=zero is not None, KEEP=keep is not None, DESCEND=dense is not None,
            COUNT=count, B=COLUMNS, S=STRIP, T=ROWS, num_warps=WARPS,
        )  # fmt: skip
        end = base + count
        if end < C:
            subtract(work[:, end:], left[:, base // COLUMNS, :, end:], split)
    return values


def split_rows(factor: Tensor, width: int) -> Tensor:
    """The rows of every block of `width` but the last as bfloat16 halves, high, low and high again:
    (E, blocks, 3 * width, C).

    Against the halves of the errors, high twice and low, that is a product of float32 good to 16 bits in one launch.
    """
    E, C, _ = factor.shape
    blocks = -(-C // width) - 1
    rows = factor[:, : blocks * width].reshape(E, blocks, width, C)
    left = torch.empty(E, blocks, 3, width, C, dtype=torch.bfloat16, device=factor.device)
    left[:, :, 0] = rows
    left[:, :, 2] = left[:, :, 0]
    torch.sub(rows, left[:, :, 0], out=left[:, :, 1])
    return left.reshape(E, blocks, 3 * width, C)


def subtract(out: Tensor, left: Tensor, right: Tensor) -> None:
    """`out -= left^T right` in float32, of bfloat16; left: (E, K, M), right: (E, K, N), out: (E, M, N)."""
    if out.device.type != "cuda":
        out.baddbmm_(left.float().mT, right.float(), alpha=-1)
    elif len(out) == 1:
        torch.addmm(out[0], left[0].T, right[0], out_dtype=torch.float32, alpha=-1, out=out[0])
    else:
        torch.baddbmm(out, left.mT, right, out_dtype=torch.float32, alpha=-1, out=out)
