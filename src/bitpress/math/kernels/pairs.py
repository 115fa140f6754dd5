"""The normal equations of the scale refit on a GPU: z_g H z_k^T of every row and every pair of groups, in one launch.

Legend: R out features, C in features, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitpress.math.products import halves

SIZES = (16, 32, 64, 128)  # of groups; matrix units take no others
ROWS = 128  # of a tile


@triton.jit  # type: ignore[untyped-decorator]
def _pairs(z, high, low, normal, R, C, G: tl.constexpr, S: tl.constexpr, T: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(1)
    rows = tl.program_id(0) * T + tl.arange(0, T)
    inside = rows < R
    column = tl.arange(0, S)
    tile = z + rows[:, None] * C + column[None, :]
    own = tl.load(tile + first * S, mask=inside[:, None], other=0.0)
    block = first.to(tl.int64) * S * C + column[:, None] * C + column[None, :]  # beyond int32 for many columns
    for step in range(0, G // 2 + 1):  # half of the others, going round: the rest is symmetric
        other = (first + step) % G
        product = tl.dot(own, tl.load(low + block + other * S))
        product = tl.dot(own, tl.load(high + block + other * S), product)
        theirs = tl.load(tile + other * S, mask=inside[:, None], other=0.0)
        pair = tl.sum(product * theirs.to(tl.float32), axis=1)
        tl.store(normal + (rows * G + first) * G + other, pair, mask=inside)
        tl.store(normal + (rows * G + other) * G + first, pair, mask=inside)


def normal_matrices(z: Tensor, hessian: Tensor, groups: int) -> Tensor:
    """A (R, G, G) float32 with A[r, g, k] = z_g H z_k^T.

    Args:
        z: (R, C) float32, whole numbers or others that bfloat16's 8 bits hold.
        hessian: H (C, C) float32, symmetric; its products are good to 16 bits.
        groups: G; C / G is one of `SIZES`.
    """
    R, C = z.shape
    normal = torch.empty(R, groups, groups, device=z.device)
    exact = torch.bfloat16 if z.is_cuda else torch.float32  # Triton's interpreter cannot multiply bfloat16
    high, low = (half.to(exact) for half in halves(hessian))
    grid = (triton.cdiv(R, ROWS), groups)
    _pairs[grid](z.to(exact), high, low, normal, R, C, groups, S=C // groups, T=ROWS, num_warps=8, num_stages=2)
    return normal
