"""The column sweep: project a column, push its error into the columns that are still free.

What a projection does is its own: it rounds, or prunes, or both. The same walk over the columns with the Hessian in
place of the factor is coordinate descent: see `bitpress.math.descent`.

Legend: R out features, C in features, G groups. H = Gram + damping, U the upper factor of its inverse,
inv(H) = U^T U.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitpress.errors import NumericsError
from bitpress.math.grid import Grid, QParams, values_of
from bitpress.math.products import product

IN_FLOAT64 = "the Gram matrix was factored in float64, as it is not positive definite in float32"
SUBSTITUTED = 1024  # rows of a triangular matrix that is not halved
LEAF = 16  # columns updated one by one; wider blocks are halved and updated by matrix products


class NotDefiniteError(NumericsError):
    """A Gram matrix that is not positive definite, in the dtype in which it was tried."""

    def __init__(self) -> None:
        super().__init__("the Gram matrix is not positive definite: raise dampening_frac or give more data")

    def __reduce__(self) -> tuple[type[NotDefiniteError], tuple[()]]:  # between processes
        return NotDefiniteError, ()


def inverse_factors(hessian: Tensor) -> tuple[Tensor, list[int]]:
    """Upper triangular U (..., C, C) with inv(H) = U^T U, from symmetric positive definite H (..., C, C), and which of
    several (0: the one) were factored in float64, as they are not positive definite in float32.

    With J the reversal of indices and J H J = L L^T, U = J inv(L) J: one Cholesky and one triangular inverse,
    half the work of Cholesky, inverse, Cholesky (Frantar et al. 2022, arXiv 2210.17323), and more accurate.

    Raises:
        NotDefiniteError: H, or one of several, is not positive definite in float32 nor in float64.
    """
    lower, info = torch.linalg.cholesky_ex(hessian.flip(-2, -1))
    factor = triangular_inverse(lower).flip(-2, -1)
    again: list[int] = info.reshape(-1).nonzero()[:, 0].tolist()
    for e in again:
        one = hessian.reshape(-1, *hessian.shape[-2:])[e]
        lower, info = torch.linalg.cholesky_ex(one.flip(0, 1).double())
        if info.any():
            raise NotDefiniteError
        factor.view(-1, *one.shape)[e] = triangular_inverse(lower).flip(0, 1).to(hessian.dtype)
    return factor, again


def triangular_inverse(lower: Tensor) -> Tensor:
    """The inverse of lower triangular matrices (..., C, C); on a GPU by halves, where products beat substitution."""
    if lower.device.type == "cuda" and lower.shape[-1] > SUBSTITUTED:
        return inverse_by_halves(lower, SUBSTITUTED)
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye.expand(lower.shape), upper=False)
    return inverse


def inverse_by_halves(lower: Tensor, leaf: int) -> Tensor:
    """`triangular_inverse`: blocks on the diagonal of at most `leaf` columns by substitution, all of them at once; then
    two neighbours become one, with - inv(B) X inv(A) below, until one is left."""
    C = lower.shape[-1]
    count = 1 << max(0, math.ceil(math.log2(C / leaf)))
    size = -(-C // count)
    whole = lower.reshape(-1, C, C)
    if size * count > C:
        whole = torch.eye(size * count, dtype=lower.dtype, device=lower.device).repeat(len(whole), 1, 1)
        whole[:, :C, :C] = lower.reshape(-1, C, C)
    E = len(whole)
    blocks = whole.reshape(E, count, size, count, size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    done = triangular_inverse(blocks.reshape(E * count, size, size))
    while count > 1:
        count //= 2
        below = whole.reshape(E, count, 2, size, count, 2, size)[:, :, 1, :, :, 0]
        below = below.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(E * count, size, size)
        first, second = done[0::2], done[1::2]
        joined = done.new_zeros(E * count, 2 * size, 2 * size)
        joined[:, :size, :size], joined[:, size:, size:] = first, second
        joined[:, size:, :size] = product(second, product(below, first)).neg_()
        done, size = joined, 2 * size
    return done[:, :C, :C].reshape(lower.shape)


def sweep(
    weight: Tensor,
    factor: Tensor,
    qparams: QParams,
    groups: Tensor,
    grid: Grid,
    block_size: int,
    keep: Tensor | None = None,
) -> Tensor:
    """Quantize the columns in order, compensating each one's error in the later ones (GPTQ, arXiv 2210.17323).

    All scales are fixed before, so the result does not depend on `block_size` but for rounding. Every tensor may have
    a dimension of problems before those named; on a GPU they are solved together.

    Args:
        weight: (R, C) float32, columns in the order in which they are to be quantized.
        factor: U (C, C) of the same order.
        qparams: scale and zero point (R, G).
        groups: (C,) int64, the group of each column.
        grid: the target grid.
        block_size: columns between two updates of all the later columns.
        keep: (R, C) bool; the other weights become exactly zero, and what that costs is compensated too.

    Returns:
        codes (R, C), columns in the order given.
    """
    if weight.device.type == "cuda":
        return sweep_by_kernel(weight, factor, qparams, groups, grid, keep)
    if weight.dim() == 3:
        return torch.stack([
            sweep(w, factor[e], qparams.of(e), groups[e], grid, block_size, None if keep is None else keep[e])
            for e, w in enumerate(weight)
        ])  # fmt: skip
    work = by_columns(weight)
    rounding = Rounding.of(qparams, groups, grid, keep)
    codes = torch.empty(work.shape, dtype=grid.code_dtype, device=weight.device)
    pivots = pivots_of(factor)
    q = torch.empty_like(work[0])

    def project(j: int, error: Tensor) -> None:
        w = work[j]
        rounding.project(j, w, codes[j], q)
        torch.div(torch.sub(w, q, out=q), pivots[j], out=error)

    walk(work, factor, project, block_size)
    return codes.T.contiguous()


def sweep_by_kernel(
    weight: Tensor, factor: Tensor, qparams: QParams, groups: Tensor, grid: Grid, keep: Tensor | None = None
) -> Tensor:
    """`sweep` by `bitpress.math.kernels.columns`, whose blocks have a width of their own."""
    from bitpress.math.kernels import columns

    C = weight.shape[-1]
    scale, zero, kept = (batched(t) for t in transposed(qparams, keep))
    pivots = factor.diagonal(dim1=-2, dim2=-1).reshape(-1, C).contiguous()
    work, factor = by_columns(weight), factor.reshape(-1, C, C)
    assert scale is not None
    values = columns.walk(batched(work), factor, scale, zero, groups.reshape(-1, C), grid, pivots, kept)
    return grid.codes(values).reshape(work.shape).mT.contiguous()


def batched(x: Any) -> Any:
    """A tensor with a dimension of problems, if it has none; None stays None."""
    return x[None] if x is not None and x.dim() == 2 else x


@dataclass(frozen=True)
class Rounding:
    """Projects a column onto its grid, and onto zero where the weight is pruned.

    Everything is transposed: a column of the weight is a contiguous row here.
    """

    scale: Tensor  # (G, R)
    zero: Tensor | None
    groups: list[int]
    grid: Grid
    keep: Tensor | None  # (C, R) float32, 0 or 1

    @classmethod
    def of(cls, qparams: QParams, groups: Tensor, grid: Grid, keep: Tensor | None) -> Rounding:
        """From tensors as solvers have them: (R, G), (C,), (R, C)."""
        scale, zero, kept = transposed(qparams, keep)
        return cls(scale, zero, groups.tolist(), grid, kept)

    def project(self, j: int, w: Tensor, codes: Tensor, q: Tensor) -> None:
        """Writes the codes of column `j`, whose weights are `w` (R,), and what they mean into `q` (R,)."""
        s = self.scale[self.groups[j]]
        torch.div(w, s, out=q)
        if self.keep is not None:
            q.mul_(self.keep[j])  # zero is on every grid, and at a zero point that is its code
        if self.zero is None:
            codes.copy_(self.grid.nearest_(q))
        else:
            z = self.zero[self.groups[j]]
            codes.copy_(self.grid.nearest_(q.add_(z)))
            q.sub_(z)
        q.mul_(s)

    def read(self, j: int, codes: Tensor, q: Tensor) -> None:
        """Writes what the codes of column `j` mean into `q` (R,)."""
        q.copy_(values_of(codes))
        if self.zero is not None:
            q.sub_(self.zero[self.groups[j]])
        q.mul_(self.scale[self.groups[j]])


def transposed(qparams: QParams, keep: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales and zero points (G, R), kept weights (C, R), float32."""
    zero = None if qparams.zero_point is None else qparams.zero_point.mT.float().contiguous()
    return qparams.effective().mT.contiguous(), zero, None if keep is None else keep.mT.float().contiguous()


Project = Callable[[int, Tensor], None]


def walk(work: Tensor, factor: Tensor, project: Project, block_size: int, unit: int = 1) -> None:
    """Visit the columns in order; what each one leaves behind is taken from all later columns.

    Args:
        work: (C, R), changed in place: after column j, `work[k] -= factor[j, k] * error` for all k > j.
        factor: (C, C), its upper triangle.
        project: called with j and where to leave the error (R,) of column j. It may read `work[j]`, and
            `work[j : j + unit]` where j is a multiple of `unit`: these columns have all updates so far.
        block_size: columns between two updates of all the later columns; rounded up to whole units.
        unit: columns that are updated together.
    """
    C, R = work.shape
    block_size = min(-(-block_size // unit) * unit, C)
    errors = work.new_empty(block_size, R)
    state = _Walk(work, factor, project, errors, -(-LEAF // unit) * unit, unit)
    for base in range(0, C, block_size):
        end = min(base + block_size, C)
        _visit(state, base, end, base)
        if end < C:
            work[end:].addmm_(factor[base:end, end:].T, errors[: end - base], alpha=-1)


@dataclass(frozen=True)
class _Walk:
    work: Tensor  # (C, R)
    factor: Tensor  # (C, C)
    project: Project
    errors: Tensor  # (block_size, R), of the block at work
    leaf: int
    unit: int


def _visit(state: _Walk, lo: int, hi: int, base: int) -> None:
    """Columns lo to hi of the block that starts at `base`: halves, so that most updates are matrix products."""
    work, factor, errors = state.work, state.factor, state.errors
    if hi - lo > state.leaf:
        mid = lo + -(-(hi - lo) // (2 * state.unit)) * state.unit
        _visit(state, lo, mid, base)
        work[mid:hi].addmm_(factor[lo:mid, mid:hi].T, errors[lo - base : mid - base], alpha=-1)
        _visit(state, mid, hi, base)
        return
    for j in range(lo, hi):
        error = errors[j - base]
        state.project(j, error)
        if j + 1 < hi:
            work[j + 1 : hi].addr_(factor[j, j + 1 : hi], error, alpha=-1)


def by_columns(weight: Tensor) -> Tensor:
    """A copy of (R, C) as (C, R): columns are contiguous and may be changed."""
    return weight.mT.clone(memory_format=torch.contiguous_format)  # a single row is contiguous already


def pivots_of(factor: Tensor) -> list[float] | list[Tensor]:
    """The factor's diagonal, one scalar a column; on a GPU they stay there."""
    diagonal = factor.diagonal()
    return diagonal.tolist() if diagonal.device.type == "cpu" else list(diagonal)
