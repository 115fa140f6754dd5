"""GPTQ: round column by column, compensating with second-order information (Frantar et al. 2022, arXiv 2210.17323).

Differences to the paper: all scales are fixed before the sweep, and may be searched with the Gram matrix's diagonal
as weights; columns may be taken in order of falling Gram diagonal while groups stay as they lie (static order).
After the sweep, codes and scales are refined in turn: `bitpress.math.descent`, `bitpress.math.refit`. A pruned weight
stays exactly zero (what counts as pruned: `bitpress.math.masks.pruned`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from bitpress.errors import NumericsError
from bitpress.math.correct import correction
from bitpress.math.descent import descend
from bitpress.math.grid import Grid, QParams, Solved, find_all, solved
from bitpress.math.masks import pruned
from bitpress.math.products import product
from bitpress.math.refit import refit_scales
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
        block_size: columns per block of the sweep.
        dampening_frac: share of the mean Gram diagonal that is added to the diagonal.
        refine: rounds of coordinate descent on the codes and least squares on the scales after the sweep.
        correct: share of the drift of the inputs that the weights are to undo; needs `stats.drift`.

    Returns:
        One `Solved` per weight; its error is relative to the output energy on the calibration data.

    Raises:
        NumericsError: NaN or infinity in the statistics, or a Gram matrix that is not positive definite.
    """
    gram = stats.needed_gram
    diagonal = gram.diagonal().clone()
    if not torch.isfinite(gram).all():
        raise NumericsError("NaN or infinity in the input activations")
    C = gram.shape[0]
    original = target = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    if correct:
        assert stats.drift is not None and stats.paired is not None
        change = correction(stats.drift, stats.paired, correct)
        masks_before = [pruned(w) for w in weights]
        weights = [
            w + (w @ change if m is None else (w @ change) * m) for w, m in zip(weights, masks_before, strict=True)
        ]
        target = torch.cat(list(weights))
    importance = None if observer == "mse" else diagonal
    found = find_all(weights, grid, importance, search=observer != "minmax")
    rows = [len(w) for w in weights]
    qparams = _together(found)
    top = qparams.global_scale
    keep = _stacked([pruned(w) for w in weights], weights)

    perm = torch.argsort(diagonal, descending=True, stable=True) if order else torch.arange(C, device=gram.device)
    back = torch.argsort(perm)
    groups = perm // (grid.group_size or C)
    # an input that is always zero says nothing: unit curvature rounds its column to nearest
    hessian = gram.clone()
    hessian.diagonal().add_(dampening_frac * diagonal.mean()).add_((diagonal == 0).float())
    ordered, wanted = hessian[perm][:, perm], target.T[perm].T  # columns contiguous, as the walks want them
    kept = None if keep is None else keep[:, perm]
    codes = sweep(wanted, inverse_factor(ordered), qparams, groups, grid, block_size, kept)
    if keep is not None:  # the sweep's compensation counted on weights that were to become zero
        some = torch.cat([torch.full((len(w),), pruned(w) is not None) for w in weights]).to(codes.device)
        mine = QParams(qparams.scale[some], None if qparams.zero_point is None else qparams.zero_point[some], top)
        codes[some] = descend(
            wanted[some], codes[some], ordered, mine, groups, grid, block_size, passes=PASSES, keep=keep[some][:, perm]
        )
    weight_gram = product(target, hessian) if refine else target
    del target, weights
    for _ in range(refine):
        codes = descend(wanted, codes, ordered, qparams, groups, grid, block_size, passes=1, keep=kept)
        qparams = refit_scales(weight_gram, codes[:, back], hessian, qparams, grid)
    in_place = codes[:, back]
    return [
        solved(w, part.contiguous(), qparams.rows(end - len(w), end), gram)
        for w, part, end in zip(torch.split(original, rows), torch.split(in_place, rows), accumulate(rows), strict=True)
    ]


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
