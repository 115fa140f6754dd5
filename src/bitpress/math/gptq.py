"""GPTQ: round column by column, compensating with second-order information (Frantar et al. 2022, arXiv 2210.17323).

Differences to the paper: all scales are fixed before the sweep, and may be searched with the Gram matrix's diagonal
as weights; columns may be taken in order of falling Gram diagonal while groups stay as they lie (static order), or
with groups of columns that follow each other in that order, as in the paper's code.
After the sweep, codes and scales are refined in turn: `bitpress.math.descent`, `bitpress.math.refit`. A pruned weight
stays exactly zero (what counts as pruned: `bitpress.math.masks.pruned`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from bitpress.errors import NumericsError
from bitpress.math.correct import correction
from bitpress.math.descent import descend
from bitpress.math.grid import Grid, QParams, Solved, find_all
from bitpress.math.lost import solved
from bitpress.math.masks import pruned_each
from bitpress.math.products import product
from bitpress.math.refit import refit_each
from bitpress.math.stats import InputStats
from bitpress.math.sweep import inverse_factor, sweep

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
        correct: share of the drift of the inputs that the weights are to undo; needs `stats.drift`.

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
    if not torch.stack([torch.isfinite(stats.needed_gram).all() for _, stats in problems]).all():
        raise NumericsError("NaN or infinity in the input activations")
    masks = iter(pruned_each([w for weights, _ in problems for w in weights]))
    posed = [
        _pose(weights, [next(masks) for _ in weights], stats, grid, observer, order, dampening_frac, correct)
        for weights, stats in problems
    ]
    wanted, ordered, groups = (_stack([getattr(p, name) for p in posed]) for name in ("wanted", "ordered", "groups"))
    keep = None
    if any(p.keep is not None for p in posed):
        keep = _stack([torch.ones_like(p.wanted, dtype=torch.bool) if p.keep is None else p.keep for p in posed])
    found = [p.qparams for p in posed]
    codes = sweep(wanted, inverse_factor(ordered), _stack_qparams(found), groups, grid, block_size, keep)
    for p, mine in zip(posed, _each(codes), strict=True):
        if p.keep is not None:  # the sweep's compensation counted on weights that were to become zero
            some = p.keep.logical_not().any(1)
            part = p.qparams.of(some)
            mine[some] = descend(
                p.wanted[some],
                mine[some],
                p.ordered,
                part,
                p.groups,
                grid,
                block_size,
                passes=PASSES,
                keep=p.keep[some],
            )
    products = [product(p.target, p.hessian) for p in posed] if refine else []
    for _ in range(refine):
        codes = descend(wanted, codes, ordered, _stack_qparams(found), groups, grid, block_size, passes=1, keep=keep)
        stored = [mine[:, p.back] for mine, p in zip(_each(codes), posed, strict=True)]
        found = refit_each(products, stored, [p.hessian for p in posed], found, grid)
    return [
        _solved(weights, mine[:, p.back], q, stats.needed_gram)
        for (weights, stats), mine, p, q in zip(problems, _each(codes), posed, found, strict=True)
    ]


@dataclass(frozen=True)
class _Posed:
    """One input's linears as the solvers take them, one below the other.

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


def _pose(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    stats: InputStats,
    grid: Grid,
    observer: str,
    order: bool,
    dampening_frac: float,
    correct: float,
) -> _Posed:
    gram = stats.needed_gram
    diagonal = gram.diagonal().clone()
    C = gram.shape[0]
    if correct:
        assert stats.drift is not None and stats.paired is not None
        change = correction(stats.drift, stats.paired, correct)
        weights = [w + (w @ change if m is None else (w @ change) * m) for w, m in zip(weights, masks, strict=True)]
    target = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    found = find_all(weights, grid, None if observer == "mse" else diagonal, search=observer != "minmax")
    keep = _stacked(masks, weights)
    perm = torch.argsort(diagonal, descending=True, stable=True) if order else torch.arange(C, device=gram.device)
    # an input that is always zero says nothing: unit curvature rounds its column to nearest
    hessian = gram.clone()
    hessian.diagonal().add_(dampening_frac * diagonal.mean()).add_((diagonal == 0).float())
    return _Posed(
        target, hessian, _together(found), torch.argsort(perm),
        wanted=target.T[perm].T,  # columns contiguous, as the walks want them
        ordered=hessian[perm][:, perm],
        groups=perm // (grid.group_size or C),
        keep=None if keep is None else keep[:, perm],
    )  # fmt: skip


def _solved(weights: Sequence[Tensor], codes: Tensor, qparams: QParams, gram: Tensor) -> list[Solved]:
    """Codes (R, C) in stored order, one `Solved` a weight."""
    rows = [len(w) for w in weights]
    return [
        solved(w, part.contiguous(), qparams.rows(end - len(w), end), gram)
        for w, part, end in zip(weights, torch.split(codes, rows), accumulate(rows), strict=True)
    ]


def _stack(each: Sequence[Tensor]) -> Tensor:
    """Several problems in one tensor; a single one stays as it is."""
    return each[0] if len(each) == 1 else torch.stack(list(each))


def _stack_qparams(each: Sequence[QParams]) -> QParams:
    return each[0] if len(each) == 1 else QParams.stack(each)


def _each(codes: Tensor) -> Sequence[Tensor]:
    """What `_stack` put together."""
    return codes.unbind() if codes.dim() == 3 else [codes]


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


def _stacked(masks: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    """The masks of all weights together, None if all are dense."""
    if all(mask is None for mask in masks):
        return None
    whole = [torch.ones_like(w, dtype=torch.bool) if m is None else m for w, m in zip(weights, masks, strict=True)]
    return torch.cat(whole)
