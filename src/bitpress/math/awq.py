"""AWQ: scale up the input channels that matter before rounding (Lin et al. 2023, arXiv 2306.00978).

Scales come from a grid x_mean^r (with `duo`: over w_mean^(1-r)), each scored by the output error after rounding,
tr(dW G dW^T) with the Gram matrix G of the inputs: where the paper runs the layers again for every candidate, this
is the same figure as algebra on statistics that are there already.

Legend: R out features, C in features, P channels of a fold, G Gram matrix (C, C), s scale, r ratio.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitpress.math.grid import Grid, dequantize, find_qparams, quantize
from bitpress.math.stats import bfloat16_products

SMALLEST = 1e-4  # of a scale before normalization
MOST_ROWS = 2048  # rows of all weights of a fold that are scored; more do not change which candidate is best


@dataclass(frozen=True)
class Reader:
    """A weight that will be rounded, and what it reads.

    Attributes:
        weight: (R, C) float32.
        gram: (C, C) of its input.
        grid: to which it will be rounded.
        observer: how its scales will be chosen, see `find_qparams`: "minmax", "mse" or "hessian".
    """

    weight: Tensor
    gram: Tensor
    grid: Grid
    observer: str = "minmax"


def best_scale(readers: Sequence[Reader], columns: Tensor, candidates: Iterable[Tensor]) -> tuple[Tensor, float, float]:
    """The candidate with the least output error after rounding; scale 1 is always among them.

    Args:
        readers: the weights that read the fold's channels.
        columns: (C,) channel of each input column.
        candidates: scales (P,).

    Returns:
        The scale (P,), and the errors of it and of scale 1, summed over the rows that were scored.
    """
    sampled = _sample(readers)
    channels = int(columns.max()) + 1
    one = torch.ones(channels, device=columns.device)
    best, least = one, (plain := rounding_error(sampled, None))
    for s in candidates:
        error = rounding_error(sampled, s[columns])
        if error < least:
            best, least = s, error
    return best, least, plain


def rounding_error(readers: Sequence[Reader], s: Tensor | None) -> float:
    """Sum over the weights of tr(dW G dW^T) with dW = round(W s) / s - W, for column scales s (C,)."""
    total = 0.0
    for reader in readers:
        w, gram = reader.weight, reader.gram
        scaled = w if s is None else w * s
        importance = None
        if reader.observer == "hessian":
            importance = gram.diagonal() if s is None else gram.diagonal() / s.square()
        qparams = find_qparams(scaled, reader.grid, importance, search=reader.observer != "minmax")
        delta = dequantize(quantize(scaled, qparams, reader.grid), qparams).float()
        delta = (delta if s is None else delta.div_(s)).sub_(w)
        with bfloat16_products(True):
            total += float((delta @ gram).mul_(delta).sum())
    return total


def _sample(readers: Sequence[Reader]) -> list[Reader]:
    """The same with at most about `MOST_ROWS` rows in all, spread evenly over every weight."""
    total = sum(len(r.weight) for r in readers)
    step = -(-total // MOST_ROWS)
    if step <= 1 or any(r.grid.per_tensor for r in readers):
        return list(readers)
    if step > min(len(r.weight) for r in readers):  # many small experts: whole ones are left out
        readers = [r for i, r in enumerate(readers) if i % step == 0]
        step = 1
    return [Reader(r.weight[::step].contiguous(), r.gram, r.grid, r.observer) for r in readers]


def candidates(x_mean: Tensor, w_mean: Tensor, *, duo: bool | str, n_grid: int) -> list[Tensor]:
    """Scales s = x_mean^r / w_mean^(1-r), or x_mean^r, for ratios r = 0, 1/n, ..., 1; normalized, without repeats.

    Args:
        x_mean: (P,) mean absolute input of each channel.
        w_mean: (P,) mean share of the group's largest weight that its weights take, see `relative_weight`.
        duo: True: both; False: activations alone; "both": half of the grid each.
        n_grid: steps from r = 0 to r = 1.
    """
    kinds = [True, False] if duo == "both" else [bool(duo)]
    points = max(1, n_grid // len(kinds))
    found = []
    for kind in kinds:
        for i in range(points + 1):
            r = i / points
            s = x_mean.float().clamp(min=SMALLEST) ** r
            if kind:
                s = s / (w_mean.float() ** (1 - r) + SMALLEST)
            if kind or i:
                found.append(normalized(s, x_mean > 0))
    return found


def normalized(s: Tensor, live: Tensor) -> Tensor:
    """A scale with geometric mean 1 over the live channels; the others get 1.

    The paper divides by sqrt(max min); any common factor gives the same rounding but for that of the stored scales.
    """
    if not live.any():
        return torch.ones_like(s)
    log = s.clamp(min=SMALLEST).log()
    return torch.where(live, (log - log[live].mean()).exp(), 1.0)


def relative_weight(weights: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
    """(C,) mean over all rows of |w| as a share of the largest weight of its group."""
    rows = 0
    summed: Tensor | None = None
    for w, grid in zip(weights, grids, strict=True):
        R, C = w.shape
        size = grid.group_size or C
        a = w.abs().reshape(R, C // size, size)
        share = (a / a.amax(-1, keepdim=True).clamp(min=1e-30)).reshape(R, C).sum(0)
        summed = share if summed is None else summed + share
        rows += R
    assert summed is not None
    return summed / rows
