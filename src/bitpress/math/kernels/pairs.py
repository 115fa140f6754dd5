"""The normal equations of the scale refit on a GPU: z_g H z_k^T of every row and every pair of groups, in one launch.

Legend: R out features, C in features, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZES = (16, 32, 64, 128)  # of groups; matrix units take no others
ROWS = 64  # of a tile


@triton.jit  # type: ignore[untyped-decorator]
def _pairs(z, hessian, normal, R, C, G, S: tl.constexpr, T: tl.constexpr):  # type: ignore[no-untyped-def]
    first, other = tl.program_id(1), tl.program_id(2)
    if other >= first:
        rows = tl.program_id(0) * T + tl.arange(0, T)
        inside = rows < R
        column = tl.arange(0, S)
        tile = z + rows[:, None] * C + column[None, :]
        h = tl.load(hessian + (first * S + column)[:, None] * C + other * S + column[None, :])
        own = tl.load(tile + first * S, mask=inside[:, None], other=0.0)
        # z fits into TF32's 11 bits, H does in two parts: float32's products on the matrix units
        high = (h.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        product = tl.dot(own, h - high)
        product = tl.dot(own, high, product)
        theirs = tl.load(tile + other * S, mask=inside[:, None], other=0.0)
        pair = tl.sum(product * theirs, axis=1)
        tl.store(normal + (rows * G + first) * G + other, pair, mask=inside)
        tl.store(normal + (rows * G + other) * G + first, pair, mask=inside)


def normal_matrices(z: Tensor, hessian: Tensor, groups: int) -> Tensor:
    """A (R, G, G) float32 with A[r, g, k] = z_g H z_k^T.

    Args:
        z: (R, C) float32, whole numbers or others of at most 11 bits.
        hessian: H (C, C) float32, symmetric.
        groups: G; C / G is one of `SIZES`.
    """
    R, C = z.shape
    normal = torch.empty(R, groups, groups, device=z.device)
    grid = (triton.cdiv(R, ROWS), groups, groups)
    _pairs[grid](z, hessian, normal, R, C, groups, S=C // groups, T=ROWS, num_warps=4)
    return normal
