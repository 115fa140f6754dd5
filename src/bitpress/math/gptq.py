"""GPTQ: round column by column, compensating with second-order information (Frantar et al. 2022, arXiv 2210.17323).

Differences to the paper: all scales are fixed before the sweep, and may be searched with the Gram matrix's diagonal
as weights; columns may be taken in order of falling Gram diagonal while groups stay as they lie (static order).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitpress.errors import NumericsError
from bitpress.math.grid import Grid, QParams, Solved, find_all, solved
from bitpress.math.stats import InputStats
from bitpress.math.sweep import inverse_factor, sweep


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
    codes = sweep(stacked[:, perm], inverse_factor(hessian), both, groups, grid, block_size)
    in_place = torch.empty_like(codes)
    in_place[:, perm] = codes
    return [
        solved(w, part.contiguous(), q, gram)
        for w, part, q in zip(weights, torch.split(in_place, rows), qparams, strict=True)
    ]
