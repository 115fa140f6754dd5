"""One choice for each group so that a size is met at the least loss: the multiple-choice knapsack, by dynamic
programming over sizes (Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, chapter 11).

Difference to the book: sums are kept exactly; where there are more of them than `BUCKETS`, those that lie close
together share a bucket, and of these the one with the least loss is kept.

Legend: N groups, K choices of a group, S distinct sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BUCKETS = 1 << 14  # a bucket is 0.006 % of the size


def allocate(
    sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], low: float, high: float
) -> list[int] | None:
    """The choices with the least sum of losses among those whose sum of sizes is in [low, high].

    Args:
        sizes: of each group's choices; positive.
        losses: the same shape.
        low, high: bounds of the sum of sizes.

    Returns:
        The index of each group's choice, None if no sum lies between the bounds.
    """
    unit = math.gcd(*(size for group in sizes for size in group))
    width = max(1, math.ceil(high / unit / BUCKETS))
    least = [min(group) // unit for group in sizes]
    most = [max(group) // unit for group in sizes]
    rest_least, rest_most = sum(least), sum(most)
    sums, loss = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[Tensor, int]] = []  # of each group: where its kept sums come from, and how many there were before
    for group, costs, lo, hi in zip(sizes, losses, least, most, strict=True):
        rest_least, rest_most = rest_least - lo, rest_most - hi
        before = len(sums)
        sums = (torch.tensor([s // unit for s in group])[:, None] + sums).reshape(-1)
        loss = (torch.tensor(costs, dtype=torch.float64)[:, None] + loss).reshape(-1)
        reach = (sums + rest_least <= high / unit) & (sums + rest_most >= low / unit)
        kept = reach.nonzero()[:, 0]
        if not len(kept):
            return None
        kept = kept[_best_of_each(sums[kept] // width, loss[kept])]
        sums, loss = sums[kept], loss[kept]
        steps.append((kept, before))
    at = int(loss.argmin())
    chosen = []
    for kept, before in reversed(steps):
        choice, at = divmod(int(kept[at]), before)
        chosen.append(choice)
    return chosen[::-1]


def _best_of_each(buckets: Tensor, loss: Tensor) -> Tensor:
    """Indices of the entry with the least loss in every bucket (S,), the first where several have it."""
    count = int(buckets.max()) + 1
    least = torch.full((count,), math.inf, dtype=loss.dtype).scatter_reduce_(0, buckets, loss, "amin")
    winners = (loss == least[buckets]).nonzero()[:, 0]
    first = torch.full((count,), len(loss)).scatter_reduce_(0, buckets[winners], winners, "amin")
    return first[first < len(loss)]


def nearest(sizes: Sequence[Sequence[int]], target: float) -> int:
    """The sum of one choice a group that is nearest to `target`; for the message where none is near enough."""
    rising = [[float(s) for s in group] for group in sizes]
    falling = [[-s for s in group] for group in rising]
    most = sum(map(max, sizes))
    found = (allocate(sizes, falling, 0, target), allocate(sizes, rising, target, most))
    sums = [sum(group[k] for group, k in zip(sizes, c, strict=True)) for c in found if c is not None]
    return min(sums, key=lambda size: abs(size - target))
