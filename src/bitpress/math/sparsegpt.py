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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitpress.errors import NumericsError
from bitpress.math.admm import refit, search
from bitpress.math.correct import changes
from bitpress.math.masks import Structure, keep_best, keep_in_groups, keep_largest
from bitpress.math.stats import InputStats
from bitpress.math.sweep import NotDefiniteError, by_columns, inverse_factors, pivots_of, walk

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
        correct: share of the drift of the inputs that the weights are to undo; needs `stats.drift` or `stats.lag`.

    Raises:
        NumericsError: NaN or infinity in the statistics, or a Gram matrix that is not positive definite.
    """
    hessian = damped(stats.needed_gram, dampening_frac)
    heights = [len(w) for w in weights]
    stacked = torch.cat(list(weights))
    gone = stacked == 0 if preserve else None
    if correct:
        stacked = stacked + torch.cat(changes(weights, stats, correct))

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
    factor, again = inverse_factors(hessian[order][:, order])
    if again and weight.dtype == torch.float32:  # `chain` tries again in float64, and says so
        raise NotDefiniteError
    gone = None if gone is None else gone[:, order].T.contiguous()
    work = by_columns(weight[:, order])
    block_size = min(block_size, C)
    zeros = [0] * len(heights)
    costs, sets = None, None
    if structure is not None and gone is None and math.comb(structure.size, structure.pruned) <= MOST_CHOICES:
        costs, sets = removal_costs(factor, structure)

    def of_block(lo: int, hi: int) -> Tensor:
        scores = work[lo:hi].T / factor.diagonal()[lo:hi]
        before = None if gone is None else gone[lo:hi].T
        return _block_mask(scores.square(), heights, [sparsity * n * hi for n in heights], zeros, before).T

    prune = _sweep_of(weight, structure)
    result = torch.empty_like(weight)
    result[:, order] = prune(work, factor, structure, of_block, block_size, gone, costs, sets).T
    return result


def _sweep_of(weight: Tensor, structure: Structure | None) -> Callable[..., Tensor]:
    """The program of a GPU; float64, and groups of another size than it knows, go column by column there too."""
    if weight.device.type == "cuda" and weight.dtype == torch.float32:
        from bitpress.math.kernels.pruning import SIZES, prune

        if structure is None or structure.size in SIZES:
            return prune
    return _sweep


def _sweep(
    work: Tensor,
    factor: Tensor,
    structure: Structure | None,
    choose: Callable[[int, int], Tensor],
    block_size: int,
    gone: Tensor | None,
    costs: Tensor | None,
    sets: Tensor | None,
) -> Tensor:
    """See `bitpress.math.kernels.pruning.prune`."""
    C = len(work)
    unit = structure.size if structure else 1
    pruned, keep = work.clone(), torch.ones_like(work, dtype=torch.bool)
    pivots = pivots_of(factor)

    def project(j: int, error: Tensor) -> None:
        if structure is not None and j % unit == 0:
            group = slice(j, j + unit)
            if costs is not None and sets is not None:
                best = (costs[j // unit] @ work[group]).mul_(work[group]).sum(1).argmin(0)
                keep[group] = sets[best].T
            else:
                scores = (work[group].T / factor.diagonal()[group]).square()
                if gone is None:
                    keep[group] = keep_in_groups(scores, structure).T
                else:
                    keep[group] = keep_in_groups(scores.masked_fill(gone[group].T, -1), structure).T & ~gone[group]
        elif structure is None and j % block_size == 0:
            end = min(j + block_size, C)
            keep[j:end] = choose(j, end)
        pruned[j] = torch.where(keep[j], work[j], 0.0)
        torch.div(torch.sub(work[j], pruned[j], out=error), pivots[j], out=error)

    walk(work, factor, project, block_size, unit)
    return pruned


def _group_order(diagonal: Tensor, unit: int) -> Tensor:
    """Columns in groups of `unit`, those with the largest input first; within a group as they are stored."""
    groups = torch.argsort(diagonal.reshape(-1, unit).sum(1), descending=True, stable=True)
    return (groups[:, None] * unit + torch.arange(unit, device=diagonal.device)).reshape(-1)


def removal_costs(factor: Tensor, structure: Structure) -> tuple[Tensor, Tensor]:
    """What it costs to prune each set of N columns of a group, by U (C, C).

    Returns:
        costs (G, K, M, M), w^T costs[g, k] w for the weights w (M,) of group g when its turn comes, and the masks
        (K, M) of the sets, true where a weight is kept.

    Raises:
        NotDefiniteError: U is not that of a matrix that is positive definite.
    """
    N, M = structure.pruned, structure.size
    blocks = torch.stack([factor[j : j + M, j : j + M] for j in range(0, len(factor), M)])
    inverse = blocks.mT @ blocks  # of H over all columns from a group on, within the group
    chosen = torch.tensor(list(itertools.combinations(range(M), N)), device=factor.device)  # (K, N)
    within = inverse[:, chosen[:, :, None], chosen[:, None, :]]  # (G, K, N, N)
    costs = factor.new_zeros(*within.shape[:2], M, M)
    each = torch.arange(len(chosen), device=factor.device)[:, None, None]
    found, info = torch.linalg.inv_ex(within)
    if info.any():
        raise NotDefiniteError
    costs[:, each, chosen[:, :, None], chosen[:, None, :]] = found
    keep = torch.ones(len(chosen), M, dtype=torch.bool, device=factor.device)
    return costs, keep.scatter_(1, chosen, False)


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
        zeros[i] += wanted
    keep = torch.cat(masks)
    if gone is not None:  # there may be more of them than are wanted
        before, keep = keep, keep & ~gone
        more = torch.stack([part.sum() for part in torch.split(before & gone, list(heights))]).tolist()
        zeros[:] = [n + m for n, m in zip(zeros, more, strict=True)]
    return keep
