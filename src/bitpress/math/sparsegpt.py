"""SparseGPT: prune with second-order information (Frantar & Alistarh 2023, arXiv 2301.00774), and better masks.

Differences to the paper: the pair (or N of M) that goes from a group of columns is the one whose removal costs least
together, not the weights that cost least one by one; groups of columns may be taken in order of falling Gram
diagonal; by default the mask is not the sweep's but searched for over the whole layer, and the kept weights are
solved for exactly (`bitpress.math.admm`), which leaves a quarter less error.

Legend: R out features, C in features, N of every M adjacent columns are pruned. H = Gram + damping, U the upper factor
of its inverse.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bitpress.errors import NumericsError
from bitpress.math.admm import refit, search
from bitpress.math.correct import correction
from bitpress.math.masks import Structure, keep_best, keep_in_groups, keep_largest
from bitpress.math.stats import InputStats
from bitpress.math.sweep import by_columns, inverse_factor, pivots_of, walk

MOST_CHOICES = 70  # sets of weights that are compared in a group; beyond (4:8 has 70), weights are scored one by one
REFIT_STEPS = 10


def sparsegpt(
    weights: Sequence[Tensor],
    stats: InputStats,
    sparsity: float,
    structure: Structure | None,
    *,
    block_size: int = 128,
    dampening_frac: float = 0.01,
    preserve: bool = False,
    rounds: int = 30,
    correct: float = 0.0,
) -> list[Tensor]:
    """Prune the weights of linears that read the same input, and correct what is kept.

    Args:
        weights: each (R_i, C) float32; not modified.
        stats: statistics of the common input.
        sparsity: share of zeros of each layer, if there is no structure; exact.
        structure: zeros in each group of columns.
        block_size: columns per block of the sweep; without a structure, the columns whose weights compete.
        dampening_frac: share of the mean Gram diagonal that is added to the diagonal.
        preserve: weights that are zero stay zero and count.
        rounds: of the search for the mask; 0: the mask is the sweep's, and the weights are as it leaves them.
        correct: share of the drift of the inputs that the weights are to undo; needs `stats.drift`.

    Raises:
        NumericsError: NaN or infinity in the statistics, or a Gram matrix that is not positive definite.
    """
    hessian = damped(stats.needed_gram, dampening_frac)
    heights = [len(w) for w in weights]
    stacked = torch.cat(list(weights))
    gone = stacked == 0 if preserve else None
    if correct:
        assert stats.drift is not None and stats.paired is not None
        stacked = stacked + stacked @ correction(stats.drift, stats.paired, correct)

    def choose(scores: Tensor) -> Tensor:
        if gone is not None:
            scores = scores.masked_fill(gone, -1)
        keep = torch.cat([keep_best(part, sparsity, structure) for part in torch.split(scores, heights)])
        return keep if gone is None else keep & ~gone

    if rounds:
        start, keep = search(stacked, hessian, choose, rounds, structure, gone)
        found = refit(stacked, start, hessian, keep, REFIT_STEPS)
    else:
        found = prune_in_order(stacked, heights, hessian, sparsity, structure, block_size, gone)
    return [w.contiguous() for w in torch.split(found, heights)]


def damped(gram: Tensor, dampening_frac: float) -> Tensor:
    """H of a Gram matrix (C, C).

    Raises:
        NumericsError: NaN or infinity in the statistics.
    """
    if not torch.isfinite(gram).all():
        raise NumericsError("NaN or infinity in the input activations")
    diagonal, hessian = gram.diagonal(), gram.clone()
    mean = diagonal.mean()
    hessian.diagonal().add_(dampening_frac * mean)
    # an input that is always zero goes first, and its weights may stay where there is room
    tiny = 1e-6 * mean
    hessian.diagonal().copy_(torch.where(diagonal == 0, torch.where(tiny > 0, tiny, 1.0), hessian.diagonal()))
    return hessian


def prune_in_order(
    weight: Tensor,
    heights: Sequence[int],
    hessian: Tensor,
    sparsity: float,
    structure: Structure | None,
    block_size: int,
    gone: Tensor | None,
) -> Tensor:
    """The paper's sweep: choose what goes when its columns' turn comes, and let the later columns make up for it."""
    C = weight.shape[1]
    unit = structure.size if structure else 1
    order = _group_order(hessian.diagonal(), unit)
    factor = inverse_factor(hessian[order][:, order])
    gone = None if gone is None else gone[:, order]
    work = by_columns(weight[:, order])
    pruned = work.clone()
    pivots = pivots_of(factor)
    block_size = min(block_size, C)
    keep = torch.ones_like(work, dtype=torch.bool)
    zeros = [0] * len(heights)

    def project(j: int, error: Tensor) -> None:
        if structure is not None and j % unit == 0:
            keep[j : j + unit] = _group_mask(work[j : j + unit], factor[j : j + unit, j : j + unit], structure, gone, j)
        elif structure is None and j % block_size == 0:
            end = min(j + block_size, C)
            scores = work[j:end].T / factor.diagonal()[j:end]
            before = None if gone is None else gone[:, j:end]
            keep[j:end] = _block_mask(scores.square(), heights, [sparsity * n * end for n in heights], zeros, before).T
        pruned[j] = torch.where(keep[j], work[j], 0.0)
        torch.div(torch.sub(work[j], pruned[j], out=error), pivots[j], out=error)

    walk(work, factor, project, block_size, unit)
    result = torch.empty_like(weight)
    result[:, order] = pruned.T
    return result


def _group_order(diagonal: Tensor, unit: int) -> Tensor:
    """Columns in groups of `unit`, those with the largest input first; within a group as they are stored."""
    groups = torch.argsort(diagonal.reshape(-1, unit).sum(1), descending=True, stable=True)
    return (groups[:, None] * unit + torch.arange(unit, device=diagonal.device)).reshape(-1)


def _group_mask(work: Tensor, factor: Tensor, structure: Structure, gone: Tensor | None, start: int) -> Tensor:
    """The mask (M, R) of one group of columns `work` (M, R), with U's block of the group."""
    N, M = structure.pruned, structure.size
    before = None if gone is None else gone[:, start : start + M]
    if before is not None or math.comb(M, N) > MOST_CHOICES:
        scores = (work.T / factor.diagonal()).square()
        if before is None:
            return keep_in_groups(scores, structure).T
        return (keep_in_groups(scores.masked_fill(before, -1), structure) & ~before).T
    inverse = factor.T @ factor  # of H over all columns from here on, within the group
    sets = list(itertools.combinations(range(M), N))
    costs = []
    for chosen in sets:
        w = work[list(chosen)]
        costs.append((torch.linalg.inv(inverse[chosen, :][:, chosen]) @ w).mul_(w).sum(0))
    best = torch.stack(costs).argmin(0)
    masks = torch.ones(len(sets), M, dtype=torch.bool, device=work.device)
    masks.scatter_(1, torch.tensor(sets, device=work.device), False)
    return masks[best].T


def _block_mask(
    scores: Tensor, heights: Sequence[int], aims: Sequence[float], zeros: list[int], gone: Tensor | None
) -> Tensor:
    """The mask (R, B) of a block of columns.

    Args:
        scores: (R, B) of all layers.
        heights: rows of each layer.
        aims: zeros that each layer is to have up to the end of the block.
        zeros: that it had before; brought up to date.
        gone: (R, B), weights that are zero and stay so.
    """
    if gone is not None:
        scores = scores.masked_fill(gone, -1)
    masks = []
    for i, part in enumerate(torch.split(scores, list(heights))):
        wanted = min(max(round(aims[i]) - zeros[i], 0), part.numel())
        masks.append(keep_largest(part, part.numel() - wanted))
    keep = torch.cat(masks)
    if gone is not None:
        keep &= ~gone
    for i, part in enumerate(torch.split(keep, list(heights))):
        zeros[i] += part.numel() - int(part.sum())
    return keep
