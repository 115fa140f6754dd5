"""GPTQ: round column by column, compensating with second-order information (Frantar et al. 2022, arXiv 2210.17323).

Differences to the paper: all scales are fixed before the sweep, and may be searched with the Gram matrix's diagonal
as weights; columns may be taken in order of falling Gram diagonal while groups stay as they lie (static order), or
with groups of columns that follow each other in that order, as in the paper's code.
After the sweep, codes and scales are refined in turn: `bitpress.math.descent`, `bitpress.math.refit`. A pruned weight
stays exactly zero (what counts as pruned: `bitpress.math.masks.pruned`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitpress.errors import NumericsError
from bitpress.math.correct import changes
from bitpress.math.descent import descend
from bitpress.math.grid import Grid, QParams, Solved
from bitpress.math.lost import solved_each
from bitpress.math.masks import pruned_each
from bitpress.math.products import product
from bitpress.math.refit import refit_scales
from bitpress.math.scales import find_all, find_qparams
from bitpress.math.stats import InputStats
from bitpress.math.sweep import IN_FLOAT64, inverse_factors, sweep

PASSES = 3  # of coordinate descent where weights are pruned; seven more took off another hundredth of the error


def gptq(
    weights: Sequence[Tensor],
    stats: InputStats,
    grid: Grid,
    *,
    observer: str = "hessian",
    order: bool = True,
    regroup: bool = False,
    block_size: int = 128,
    dampening_frac: float = 0.01,
    refine: int = 0,
    correct: float = 0.0,
) -> list[Solved]:
    """Quantize the weights of linears that read the same input, in one sweep.

    Args:
        weights: each (R_i, C) float32; not modified.
        stats: statistics of the common input.
        grid: the target grid.
        observer: "minmax", "mse" (scale search by weight error) or "hessian" (weighted by the Gram diagonal).
        order: take columns by falling Gram diagonal.
        regroup: with groups in that order too, so that which column is in which group has to be stored (`g_idx`).
        block_size: columns per block of the sweep.
        dampening_frac: share of the mean Gram diagonal that is added to the diagonal.
        refine: rounds of coordinate descent on the codes and least squares on the scales after the sweep.
        correct: share of the drift of the inputs that the weights are to undo; needs `stats.drift` or `stats.lag`.

    Returns:
        One `Solved` per weight; its error is relative to the output energy on the calibration data.

    Raises:
        NumericsError: NaN or infinity in the statistics, or a Gram matrix that is not positive definite.
    """
    return gptq_each(
        [(weights, stats)], grid, observer=observer, order=order, regroup=regroup, block_size=block_size,
        dampening_frac=dampening_frac, refine=refine, correct=correct,
    )[0]  # fmt: skip


def gptq_each(
    problems: Sequence[tuple[Sequence[Tensor], InputStats]],
    grid: Grid,
    *,
    observer: str,
    order: bool,
    regroup: bool,
    block_size: int,
    dampening_frac: float,
    refine: int,
    correct: float,
) -> list[list[Solved]]:
    """`gptq` for several inputs, such as those of a block's experts, whose linears have the same shapes.

    On a GPU they are solved together: one expert alone is too small to fill it. There may be but one where the grid has
    a global scale.
    """
    if regroup and grid.group_size is not None:
        perms = [torch.argsort(s.needed_gram.diagonal(), descending=True, stable=True) for _, s in problems]
        in_order = gptq_each(
            [([w[:, p] for w in ws], s.permuted(p)) for (ws, s), p in zip(problems, perms, strict=True)], grid,
            observer=observer, order=False, regroup=False, block_size=block_size, dampening_frac=dampening_frac,
            refine=refine, correct=correct,
        )  # fmt: skip
        return [[_unsorted(z, p, grid.group_size) for z in zs] for zs, p in zip(in_order, perms, strict=True)]
    grams = _stack([stats.needed_gram for _, stats in problems])
    if not torch.isfinite(grams).all():
        raise NumericsError("NaN or infinity in the input activations")
    each = iter(pruned_each([w for weights, _ in problems for w in weights]))
    masks = [[next(each) for _ in weights] for weights, _ in problems]
    p = _pose(problems, grams, masks, grid, observer, order, dampening_frac, correct)
    factor, again = inverse_factors(p.ordered)
    codes = sweep(p.wanted, factor, p.qparams, p.groups, grid, block_size, p.keep)
    for e, of_input in enumerate(masks):  # the sweep's compensation counted on weights that were to become zero
        for rows in _runs([mask is not None for mask in of_input], [len(w) for w in problems[e][0]]):
            _descend_pruned(p.of(e), codes if codes.dim() == 2 else codes[e], rows, grid, block_size)
    qparams, pulled = p.qparams, product(p.target, p.hessian) if refine else None
    if pulled is not None:
        for _ in range(refine):
            codes = descend(p.wanted, codes, p.ordered, qparams, p.groups, grid, block_size, passes=1, keep=p.keep)
            qparams = refit_scales(pulled, _permuted(codes, p.back, -1), p.hessian, qparams, grid)
    codes, pulled = _permuted(codes, p.back, -1), None
    del p, factor  # what is measured next takes as much
    found = solved_each([weights for weights, _ in problems], codes, qparams, grams)
    for e in again:
        found[e] = [replace(z, note=IN_FLOAT64) for z in found[e]]
    return found


@dataclass(frozen=True)
class _Posed:
    """An input's linears as the solvers take them, one below the other; of several inputs, with a dimension before.

    Attributes:
        target: (R, C), what the output is to be like.
        hessian: H (C, C), damped.
        back: (C,), where each column is in the order of the sweep.
        wanted, ordered, groups, keep: target, H, group of each column and what is not pruned, in that order.
    """

    target: Tensor
    hessian: Tensor
    qparams: QParams
    back: Tensor
    wanted: Tensor
    ordered: Tensor
    groups: Tensor
    keep: Tensor | None

    def of(self, e: int) -> _Posed:
        """Those of one input."""
        if self.target.dim() == 2:
            return self
        return _Posed(
            self.target[e], self.hessian[e], self.qparams.of(e), self.back[e], self.wanted[e], self.ordered[e],
            self.groups[e], None if self.keep is None else self.keep[e],
        )  # fmt: skip


def _pose(
    problems: Sequence[tuple[Sequence[Tensor], InputStats]],
    grams: Tensor,
    masks: Sequence[Sequence[Tensor | None]],
    grid: Grid,
    observer: str,
    order: bool,
    dampening_frac: float,
    correct: float,
) -> _Posed:
    C = grams.shape[-1]
    diagonal = grams.diagonal(dim1=-2, dim2=-1).clone()
    towards = [_corrected(ws, stats, mine, correct) for (ws, stats), mine in zip(problems, masks, strict=True)]
    target = _stack([_joined(weights) for weights in towards])
    keep = None
    if any(mask is not None for of_input in masks for mask in of_input):
        keep = _stack([
            torch.cat([torch.ones_like(w, dtype=torch.bool) if m is None else m for w, m in zip(ws, mine, strict=True)])
            for ws, mine in zip(towards, masks, strict=True)
        ])  # fmt: skip
    qparams = _find(towards, target, grid, None if observer == "mse" else diagonal, search=observer != "minmax")
    perm = torch.arange(C, device=grams.device).expand(diagonal.shape)
    if order:
        perm = torch.argsort(diagonal, dim=-1, descending=True, stable=True)
    # an input that is always zero says nothing: unit curvature rounds its column to nearest
    hessian = grams.clone()
    damping = dampening_frac * diagonal.mean(-1, keepdim=True)
    hessian.diagonal(dim1=-2, dim2=-1).add_(damping).add_((diagonal == 0).float())
    return _Posed(
        target, hessian, qparams, torch.argsort(perm, dim=-1),
        wanted=_permuted(target.mT, perm, -2).mT,  # columns contiguous, as the walks want them
        ordered=_permuted(_permuted(hessian, perm, -2), perm, -1),
        groups=perm // (grid.group_size or C),
        keep=None if keep is None else _permuted(keep, perm, -1),
    )  # fmt: skip


def _descend_pruned(p: _Posed, codes: Tensor, rows: slice, grid: Grid, block_size: int) -> None:
    """Better codes of some rows of an input, in place."""
    assert p.keep is not None
    codes[rows] = descend(
        p.wanted[rows], codes[rows], p.ordered, p.qparams.of(rows), p.groups, grid, block_size, passes=PASSES,
        keep=p.keep[rows],
    )  # fmt: skip


def _corrected(
    weights: Sequence[Tensor], stats: InputStats, masks: Sequence[Tensor | None], correct: float
) -> Sequence[Tensor]:
    """The weights that undo this share of the drift of their input, or of the lag of the block's output; what is pruned
    stays so."""
    if not correct:
        return weights
    found = changes(weights, stats, correct)
    return [w + (d if m is None else d * m) for w, d, m in zip(weights, found, masks, strict=True)]


def _find(
    weights: Sequence[Sequence[Tensor]], target: Tensor, grid: Grid, importance: Tensor | None, *, search: bool
) -> QParams:
    """Scales and zero points of all inputs' linears; `target` are the same weights in one tensor."""
    if grid.rows_alone:
        return find_qparams(target.reshape(-1, target.shape[-1]), grid, importance, search).reshaped(*target.shape[:-1])
    each = [importance] * len(weights) if target.dim() == 2 or importance is None else importance.unbind()
    of_inputs = [_together(find_all(ws, grid, mine, search)) for ws, mine in zip(weights, each, strict=True)]
    return of_inputs[0] if target.dim() == 2 else QParams.stack(of_inputs)


def _permuted(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """Rows (dim -2) or columns (-1) of x (..., R, C) in an order (C,), or in one of several inputs' each (E, C)."""
    if x.dtype.itemsize == 1 and x.dtype.is_floating_point:  # torch does not gather these everywhere
        return _permuted(x.view(torch.uint8), order, dim).view(x.dtype)
    if order.dim() == 1:
        return x.index_select(dim, order)
    return x.take_along_dim(order[:, None, :] if dim == -1 else order[:, :, None], dim)


def _runs(chosen: Sequence[bool], sizes: Sequence[int]) -> Iterator[slice]:
    """The rows of chosen linears that lie one below the other, neighbours as one."""
    start = end = 0
    for yes, size in zip([*chosen, False], [*sizes, 0], strict=True):
        if not yes and start < end:
            yield slice(start, end)
        end += size
        start = start if yes else end


def _stack(each: Sequence[Tensor]) -> Tensor:
    """Several inputs' tensors in one; a single one stays as it is."""
    return each[0] if len(each) == 1 else torch.stack(list(each))


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """Weights one below the other."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _unsorted(z: Solved, perm: Tensor, group_size: int) -> Solved:
    """A linear solved with its columns in the order `perm`, with them in their own."""
    codes, qparams = z.quantized
    back = torch.argsort(perm)
    return replace(z, codes=codes[:, back].contiguous(), qparams=replace(qparams, g_idx=back // group_size))


def _together(found: Sequence[QParams]) -> QParams:
    """The parameters of all weights, one below the other. A global scale is the same in all."""
    zeros = [q.zero_point for q in found if q.zero_point is not None]
    scale = torch.cat([q.scale for q in found])
    return QParams(scale, torch.cat(zeros) if zeros else None, found[0].global_scale)
