"""A turn of the mask search on a GPU in one launch: see `bitpress.math.admm.search`, for N:M patterns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitpress.math.masks import Structure

SIZES = (4, 8, 16)  # M: a group lies in a program's registers, each pair of its weights compared
ELEMENTS = 1024  # of a program


@triton.jit  # type: ignore[untyped-decorator]
def _turn(  # type: ignore[no-untyped-def]  # the compiler reads annotations
    free, dual, fixed, gone, pruned, mixed, keep, groups, penalty, following,
    N: tl.constexpr, M: tl.constexpr, GONE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    place = tl.arange(0, M)
    at = group[:, None] * M + place[None, :]
    mask = (group < groups)[:, None] & (place < M)[None, :]
    f = tl.load(free + at, mask=mask, other=0.0)
    d = tl.load(dual + at, mask=mask, other=0.0)
    p = f + d / penalty
    score = tl.abs(p)
    if GONE:
        never = tl.load(gone + at, mask=mask, other=0) != 0
        score = tl.where(never, -1.0, score)
    mine, other = score[:, :, None], score[:, None, :]
    earlier = place[None, None, :] < place[None, :, None]
    lower = (other < mine) | ((other == mine) & earlier)
    kept = tl.sum(lower.to(tl.int32), axis=2) >= N
    if GONE:
        kept = kept & (never == 0)
    p = tl.where(kept, p, 0.0)
    d += penalty * (f - p)
    tl.store(pruned + at, p, mask=mask)
    tl.store(dual + at, d, mask=mask)
    tl.store(mixed + at, tl.load(fixed + at, mask=mask, other=0.0) - d + following * p, mask=mask)
    tl.store(keep + at, kept.to(tl.int8), mask=mask)


def turn(
    free: Tensor,
    dual: Tensor,
    fixed: Tensor,
    pruned: Tensor,
    mixed: Tensor,
    keep: Tensor,
    penalty: float,
    following: float,
    *,
    pattern: Structure,
    gone: Tensor | None,
) -> None:
    """From the ridge solution to the next one's right-hand side; all (R, C), float32 but for the masks, bool.

    Args:
        free: the ridge solution.
        dual: changed: what the two copies still differ by, summed.
        fixed: W H.
        pruned, mixed: filled: the pruned copy, and `fixed - dual + following * pruned`.
        keep: filled: the mask.
        penalty, following: of this turn and the next.
        pattern: its size is one of `SIZES`.
        gone: weights that are zero and stay so.
    """
    groups = free.numel() // pattern.size
    tile = ELEMENTS // pattern.size
    _turn[(triton.cdiv(groups, tile),)](
        free, dual, fixed, keep.view(torch.int8) if gone is None else gone.view(torch.int8), pruned, mixed,
        keep.view(torch.int8), groups, penalty, following,
        N=pattern.pruned, M=pattern.size, GONE=gone is not None, T=tile, num_warps=4,
    )  # fmt: skip
