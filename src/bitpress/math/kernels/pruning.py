"""SparseGPT's sweep on a GPU: one program takes a tile of rows through a block of columns, masks included.

The walk of `bitpress.math.kernels.columns` with another projection. An N:M mask is chosen when its group's turn comes,
from the weights as they are then; the mask of a layer without a pattern is chosen for a block of columns before it.

Legend: R out features, C in features, N of every M adjacent columns are pruned, K sets of N columns. All tensors are
transposed: (C, R).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitpress.math.kernels.columns import COLUMNS, ROWS, STRIP, WARPS, begun, leave, split_rows, subtract
from bitpress.math.masks import Structure

SIZES = (2, 4, 8, 16)  # M: a group lies in a program's registers, and in one strip


@triton.jit  # type: ignore[untyped-decorator]
def _block(  # type: ignore[no-untyped-def]  # the compiler reads annotations
    work, factor, pivots, keep, gone, costs, sets, values, errors, split, base, C, R,
    K: tl.constexpr, N: tl.constexpr, M: tl.constexpr, SETS: tl.constexpr, RANKS: tl.constexpr, GONE: tl.constexpr,
    COUNT: tl.constexpr, B: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    first = base.to(tl.int64)  # places are counted from the block's first column, as in `columns`
    last = C - 1 - base
    factor += first * C + base
    pivots += first
    work += first * R
    values += first * R
    keep += first * R
    if GONE:
        gone += first * R
    costs += first // M * K * M * M
    rows = tl.program_id(0) * T + tl.arange(0, T)
    inside = rows < R
    strip = tl.arange(0, S)
    member = tl.arange(0, M)
    for start in range(0, COUNT, S):
        columns = start + strip
        there = columns < COUNT
        tile = begun(work, factor, errors, start, columns, there, rows, inside, C, R, S)
        for lo in range(0, S, M):
            if SETS or RANKS:
                group = tl.zeros((M, T), tl.float32)
                for i in tl.static_range(M):
                    w = tl.sum(tl.where((strip == lo + i)[:, None], tile, 0.0), axis=0)
                    group = tl.where((member == i)[:, None], w[None, :], group)
            if SETS:
                pairs = group[:, None, :] * group[None, :, :]
                least = tl.full((T,), float("inf"), tl.float32)
                found = tl.zeros((T,), tl.int32)
                table = costs + tl.minimum(start + lo, last) // M * K * M * M
                for k in range(0, K):
                    a = tl.load(table + k * M * M + member[:, None] * M + member[None, :])
                    cost = tl.sum(tl.sum(a[:, :, None] * pairs, axis=1), axis=0)
                    found = tl.where(cost < least, k, found)
                    least = tl.minimum(cost, least)
                kept = (tl.load(sets + found)[None, :] >> member[:, None]) & 1
            elif RANKS:
                pivot = tl.load(pivots + tl.minimum(start + lo + member, last))
                score = tl.div_rn(group, tl.broadcast_to(pivot[:, None], (M, T)))
                score = score * score
                if GONE:
                    of = (start + lo + member)[:, None]
                    never = tl.load(gone + of * R + rows[None, :], mask=(of < COUNT) & inside[None, :], other=0)
                    score = tl.where(never != 0, -1.0, score)
                mine, other = score[:, None, :], score[None, :, :]
                earlier = (member[None, :] < member[:, None])[:, :, None]
                lower = (other < mine) | ((other == mine) & earlier)
                kept = (tl.sum(lower.to(tl.int32), axis=1) >= N).to(tl.int32)
                if GONE:
                    kept = tl.where(never != 0, 0, kept)
            for i in range(0, M):
                j = lo + i
                at = start + j
                live = inside & (at < COUNT)
                w = tl.sum(tl.where((strip == j)[:, None], tile, 0.0), axis=0)
                if SETS or RANKS:
                    stays = tl.sum(tl.where((member == i)[:, None], kept, 0), axis=0)
                else:
                    stays = tl.load(keep + at * R + rows, mask=live, other=0).to(tl.int32)
                q = tl.where(stays != 0, w, 0.0)
                error = tl.div_rn(w - q, tl.broadcast_to(tl.load(pivots + tl.minimum(at, last)), (T,)))
                tl.store(values + at * R + rows, q, mask=live)
                leave(errors, split, error, at, rows, live, R, B)
                u = tl.load(factor + at * C + columns, mask=there & (strip > j), other=0.0)
                tile = tile - u[:, None] * error[None, :]
        tl.debug_barrier()  # the errors are read again, by other threads


def prune(
    work: Tensor,
    factor: Tensor,
    structure: Structure | None,
    choose: Callable[[int, int], Tensor],
    width: int,
    gone: Tensor | None,
    costs: Tensor | None,
    sets: Tensor | None,
) -> Tensor:
    """Prune column by column, each one's error taken from all later columns.

    Args:
        work: (C, R) float32, changed: the weights.
        factor: U (C, C) float32.
        structure: its size is one of `SIZES`; None: the mask is chosen for `width` columns at a time.
        choose: without a structure, the mask (B, R) of columns lo to hi, given that `work` has all updates for them.
        width: columns that `choose` takes.
        gone: (C, R) bool, weights that are zero and stay so.
        costs: (G, K, M, M), with w^T costs[g, k] w what it costs to prune set k of group g; None: weights are scored
            one by one.
        sets: (K, M) bool, what each set keeps.

    Returns:
        The pruned weights (C, R) float32.
    """
    C, R = work.shape
    values = torch.empty_like(work)
    keep = torch.empty(work.shape, dtype=torch.int8, device=work.device)
    block = COLUMNS if structure is not None else max(n for n in range(1, COLUMNS + 1) if width % n == 0)
    errors = torch.empty(1, block, R, device=work.device)
    exact = torch.bfloat16 if work.is_cuda else torch.float32  # Triton's interpreter cannot make bfloat16
    split = torch.empty(1, 3 * block, R, dtype=exact, device=work.device)
    factor = factor.contiguous()
    pivots, left = factor.diagonal().contiguous(), split_rows(factor[None], block)
    size = STRIP if structure is None else structure.size
    bits = None if sets is None else (sets.long() << torch.arange(size, device=work.device)).sum(1).to(torch.int32)
    for base in range(0, C, block):
        if structure is None and base % width == 0:
            keep[base : base + width] = choose(base, min(base + width, C))
        count = min(block, C - base)
        _block[(triton.cdiv(R, ROWS),)](
            work, factor, pivots, keep, keep if gone is None else gone.view(torch.int8),
            work if costs is None else costs, pivots if bits is None else bits, values, errors, split, base, C, R,
            K=0 if sets is None else len(sets), N=0 if structure is None else structure.pruned, M=size,
            SETS=costs is not None, RANKS=structure is not None and costs is None, GONE=gone is not None,
            COUNT=count, B=block, S=STRIP, T=ROWS, num_warps=WARPS,
        )  # fmt: skip
        end = base + count
        if end < C:
            subtract(work[None, end:], left[:, base // block, :, end:], split)
    return values
