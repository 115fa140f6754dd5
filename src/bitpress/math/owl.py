"""Sparsity by layer: less where there are outliers (OWL, Yin et al. 2023, arXiv 2310.05175).

Difference to the paper: layers may differ in size; the mean over weights is what is kept, and exactly, also where a
layer would leave the range from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 0.999  # a layer without any weight would cut the model in two


def outlier_ratio(scores: Sequence[Tensor], threshold: float) -> float:
    """Share of a layer's weights whose score is above `threshold` times the layer's mean score.

    Args:
        scores: of the layer's linears, each (R_i, C_i): |w| times the norm of its input.
        threshold: the paper's M, 5 to 10.
    """
    weights = sum(s.numel() for s in scores)
    border = threshold * sum(float(s.sum(dtype=torch.float64)) for s in scores) / weights
    return sum(int((s > border).sum()) for s in scores) / weights


def allocate(ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """The sparsity of each layer: the more outliers, the lower, within `spread` of the mean before it is kept.

    Args:
        ratios: share of outliers of each layer.
        sizes: weights of each layer.
        sparsity: the mean over all weights.
        spread: the paper's lambda: lowest and highest differ by twice as much.

    Returns:
        A share of zeros for each layer, from 0 to `MOST`; sum(sizes * shares) = sparsity * sum(sizes).
    """
    low, high = min(ratios), max(ratios)
    drops = [2 * spread * (r - low) / (high - low) if high > low else 0.0 for r in ratios]
    total = sum(sizes)

    def mean(level: float) -> float:
        return sum(n * _within(level - d) for n, d in zip(sizes, drops, strict=True)) / total

    lower, upper = 0.0, MOST + max(drops)
    for _ in range(100):  # the mean rises with the level; halving finds it to the last bit
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if mean(middle) < min(sparsity, MOST) else (lower, middle)
    return [_within(upper - d) for d in drops]


def _within(share: float) -> float:
    return min(max(share, 0.0), MOST)
