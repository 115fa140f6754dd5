"""The column sweep: quantize a column, push its error into the columns that are still free.

Legend: R out features, C in features, G groups. H = Gram + damping, U the upper factor of its inverse,
inv(H) = U^T U.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitpress.errors import NumericsError
from bitpress.math.grid import Grid, QParams

LEAF = 16  # columns updated one by one; wider blocks are halved and updated by matrix products


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U (C, C) with inv(H) = U^T U, from a symmetric positive definite H (C, C).

    With J the reversal of indices and J H J = L L^T, U = J inv(L) J: one Cholesky and one triangular inverse,
    half the work of Cholesky, inverse, Cholesky (Frantar et al. 2022, arXiv 2210.17323), and more accurate.

    Raises:
        NumericsError: H is not positive definite in float32 nor in float64.
    """
    flipped = hessian.flip(0, 1)
    lower, info = torch.linalg.cholesky_ex(flipped)
    if info.item() != 0:
        flipped = flipped.double()
        lower, info = torch.linalg.cholesky_ex(flipped)
        if info.item() != 0:
            raise NumericsError("the Gram matrix is not positive definite: raise dampening_frac or give more data")
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    factor: Tensor = inverse.flip(0, 1).to(hessian.dtype)
    return factor


def sweep(weight: Tensor, factor: Tensor, qparams: QParams, groups: Tensor, grid: Grid, block_size: int) -> Tensor:
    """Quantize the columns in order, compensating each one's error in the later ones (GPTQ, arXiv 2210.17323).

    All scales are fixed before, so the result does not depend on `block_size` but for rounding.

    Args:
        weight: (R, C) float32, columns in the order in which they are to be quantized.
        factor: U (C, C) of the same order.
        qparams: scale and zero point (R, G).
        groups: (C,) int64, the group of each column.
        grid: what to round to.
        block_size: columns between two updates of all the later columns.

    Returns:
        codes (R, C), columns in the order given.
    """
    R, C = weight.shape
    block_size = min(block_size, C)
    state = _State(
        work=weight.T.clone(memory_format=torch.contiguous_format),  # a single row is contiguous already
        factor=factor,
        pivots=factor.diagonal().tolist() if factor.device.type == "cpu" else list(factor.diagonal()),
        scale=qparams.scale.T.float().contiguous(),
        zero=None if qparams.zero_point is None else qparams.zero_point.T.float().contiguous(),
        groups=groups.tolist(),
        grid=grid,
        codes=torch.empty(C, R, dtype=grid.code_dtype, device=weight.device),
        errors=torch.empty(block_size, R, device=weight.device),
    )
    for base in range(0, C, block_size):
        end = min(base + block_size, C)
        _solve(state, base, end, base)
        if end < C:
            state.work[end:].addmm_(factor[base:end, end:].T, state.errors[: end - base], alpha=-1)
    return state.codes.T.contiguous()


@dataclass
class _State:
    """What a sweep works on, transposed: a column of the weight is a contiguous row here."""

    work: Tensor  # (C, R)
    factor: Tensor  # (C, C)
    pivots: list[float] | list[Tensor]
    scale: Tensor  # (G, R)
    zero: Tensor | None
    groups: list[int]
    grid: Grid
    codes: Tensor  # (C, R)
    errors: Tensor  # (block_size, R), of the block at work


def _solve(state: _State, lo: int, hi: int, base: int) -> None:
    """Columns lo to hi of the block that starts at `base`: halves, so that most updates are matrix products."""
    work, factor, errors = state.work, state.factor, state.errors
    if hi - lo > LEAF:
        mid = (lo + hi) // 2
        _solve(state, lo, mid, base)
        work[mid:hi].addmm_(factor[lo:mid, mid:hi].T, errors[lo - base : mid - base], alpha=-1)
        _solve(state, mid, hi, base)
        return
    for j in range(lo, hi):
        _column(state, j, errors[j - base])
        if j + 1 < hi:
            work[j + 1 : hi].addr_(factor[j, j + 1 : hi], errors[j - base], alpha=-1)


def _column(state: _State, j: int, error: Tensor) -> None:
    """Quantize one column; leaves its error over the pivot in `error` (R,)."""
    w, s, grid = state.work[j], state.scale[state.groups[j]], state.grid
    q = w / s
    if state.zero is None:
        state.codes[j] = grid.nearest_(q)
    else:
        z = state.zero[state.groups[j]]
        state.codes[j] = grid.nearest_(q.add_(z))
        q.sub_(z)
    torch.div(torch.sub(w, q.mul_(s), out=q), state.pivots[j], out=error)
