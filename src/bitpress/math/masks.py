"""Masks of pruned weights: chosen by score, checked, recognised.

Legend: R out features, C in features. A mask is a bool tensor (R, C), true where the weight is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PRUNED_SHARE = 0.01  # of exact zeros, from which on an unstructured layer counts as pruned
COMPARED = 16  # columns of a group, up to which comparing all pairs is faster than sorting; 14 times for 2:4
KNOWN = (2, 4), (4, 8), (8, 16)  # what is looked for; wider groups are half empty by chance


@dataclass(frozen=True)
class Structure:
    """Of every `size` adjacent columns of a row, at least `pruned` are zero."""

    pruned: int
    size: int

    def __str__(self) -> str:
        return f"{self.pruned}:{self.size}"

    @property
    def sparsity(self) -> float:
        return self.pruned / self.size


def keep_best(
    scores: Tensor, sparsity: float, structure: Structure | None, within: Literal["layer", "row"] = "layer"
) -> Tensor:
    """The mask that keeps the weights of the highest scores.

    Ties are broken by position, so a mask is the same every time and its number of zeros is exact.

    Args:
        scores: (R, C), not negative; -1 marks weights that go first.
        sparsity: share of zeros, if there is no structure: round(sparsity * weights) of the layer or of each row, but
            below 1 never all.
        structure: exactly so many zeros in each group of columns.
        within: which weights compete, if there is no structure.
    """
    R, C = scores.shape
    if structure is not None:
        return keep_in_groups(scores, structure)
    if within == "row":
        order = torch.argsort(scores, dim=1, stable=True)
        keep = torch.ones(R, C, dtype=torch.bool, device=scores.device)
        return keep.scatter_(1, order[:, : _zeros(sparsity, C)], False)
    return keep_largest(scores, R * C - _zeros(sparsity, R * C))


def _zeros(sparsity: float, count: int) -> int:
    """Zeros among so many weights: not all by rounding alone, as a layer without any weight cuts a model in two."""
    return min(round(sparsity * count), count - (sparsity < 1))


def keep_in_groups(scores: Tensor, structure: Structure) -> Tensor:
    """The mask that prunes the lowest scores of every group of columns; see `keep_best`."""
    R, C = scores.shape
    grouped = scores.reshape(R, C // structure.size, structure.size)
    if structure.size > COMPARED:
        lowest = torch.argsort(grouped, dim=-1, stable=True)[..., : structure.pruned]
        keep = torch.ones_like(grouped, dtype=torch.bool)
        return keep.scatter_(-1, lowest, False).reshape(R, C)
    columns = grouped.unbind(-1)
    ranks = [torch.zeros(grouped.shape[:2], dtype=torch.int8, device=scores.device) for _ in columns]
    for j in range(structure.size):
        for i in range(j):
            first = columns[i] <= columns[j]
            ranks[j] += first
            ranks[i] += ~first
    return torch.stack([rank >= structure.pruned for rank in ranks], -1).reshape(R, C)


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """The mask of the `count` highest scores of a matrix."""
    flat = scores.reshape(-1)
    pruned = flat.numel() - count
    if pruned <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    border = torch.kthvalue(flat, pruned).values
    lower, equal = flat < border, flat == border
    # of those at the border, the first ones go
    equal &= torch.cumsum(equal, 0) <= pruned - lower.sum()
    return ~(lower | equal).reshape(scores.shape)


def holds(weight: Tensor, structure: Structure) -> Tensor:
    """Whether every group of columns of a weight (R, C) has as many zeros as the structure asks: one bool."""
    R, C = weight.shape
    if C % structure.size:
        return torch.zeros((), dtype=torch.bool, device=weight.device)
    zeros = (weight == 0).reshape(R, C // structure.size, structure.size).sum(-1)
    return (zeros >= structure.pruned).all()


def find_structure(weight: Tensor) -> Structure | None:
    """The tightest pattern that holds of 2:4, 4:8 and 8:16; None if there is none."""
    known = [Structure(*numbers) for numbers in KNOWN]
    found = torch.stack([holds(weight, structure) for structure in known]).tolist() if weight.numel() else []
    return next((structure for structure, held in zip(known, found, strict=False) if held), None)


def pruned(weight: Tensor) -> Tensor | None:
    """The mask of a pruned weight (R, C), None if it is dense.

    A layer counts as pruned if at least `PRUNED_SHARE` of its weights are exactly zero, in a pattern or not; no
    modifier prunes less. Dense layers have one zero in some thousands: those are no mask, they may become what they
    like.
    """
    return pruned_each([weight])[0]


def pruned_each(weights: Sequence[Tensor]) -> list[Tensor | None]:
    """`pruned` of several weights; the device is waited for once."""
    keep = [w != 0 for w in weights]
    shares = torch.stack([k.float().mean() for k in keep]).tolist()
    return [None if share > 1 - PRUNED_SHARE else k for share, k in zip(shares, keep, strict=True)]


def name_of(weight: Tensor) -> str:
    """The structure that a pruned weight has: "2:4" and the like, else "unstructured"."""
    return str(find_structure(weight) or "unstructured")
