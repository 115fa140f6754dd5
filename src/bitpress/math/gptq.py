"""GPTQ: round column by column, compensating with second-order information (Frantar et al. 2022, arXiv 2210.17323).

Differences to the paper: all scales are fixed before the sweep, and may be searched with the Gram matrix's diagonal
as weights; columns may be taken in order of falling Gram diagonal while groups stay as they lie (static order).
A pruned weight stays exactly zero (what counts as pruned: `bitpress.math.masks.pruned`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitpress.errors import NumericsError
from bitpress.math.descent import descend
from bitpress.math.grid import Grid, QParams, Solved, find_all, solved
from bitpress.math.masks import pruned
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
    importance = None if observer == "mse" else diagonal
    search = observer != "minmax"
    qparams = find_all(weights, grid, importance, search)
    rows = [len(w) for w in weights]
    stacked = torch.cat(list(weights))
    scale = torch.cat([q.effective() for q in qparams])
    zeros = [q.zero_point for q in qparams if q.zero_point is not None]
    both = QParams(scale, torch.cat(zeros) if zeros else None)

    perm = torch.argsort(diagonal, descending=True, stable=True) if order else torch.arange(C, device=gram.device)
    groups = perm // (grid.group_size or C)
    # an input that is always zero says nothing: unit curvature rounds its column to nearest
    damping = dampening_frac * diagonal.mean()
    hessian = gram[perm][:, perm] if order else gram.clone()
    hessian.diagonal().add_(damping).add_((diagonal[perm] == 0).float())
    target = stacked[:, perm]
    masks = [pruned(w) for w in weights]
    keep = _stacked(masks, weights)
    keep = None if keep is None else keep[:, perm]
    codes = sweep(target, inverse_factor(hessian), both, groups, grid, block_size, keep)
    if keep is not None:
        some = torch.cat([torch.full((len(w),), m is not None) for w, m in zip(weights, masks, strict=True)])
        some = some.to(codes.device)
        found = QParams(scale[some], both.zero_point[some] if both.zero_point is not None else None)
        codes[some] = descend(
            target[some], codes[some], hessian, found, groups, grid, block_size, passes=PASSES, keep=keep[some]
        )
    in_place = torch.empty_like(codes)
    in_place[:, perm] = codes
    return [
        solved(w, part.contiguous(), q, gram)
        for w, part, q in zip(weights, torch.split(in_place, rows), qparams, strict=True)
    ]


def _stacked(masks: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    """The masks of all weights together, None if all are dense."""
    if all(mask is None for mask in masks):
        return None
    whole = [torch.ones_like(w, dtype=torch.bool) if m is None else m for w, m in zip(weights, masks, strict=True)]
    return torch.cat(whole)
