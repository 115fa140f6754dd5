"""Round to nearest: no data, no compensation; the baseline of every other method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bitpress.math.grid import Grid, Solved, quantize
from bitpress.math.lost import solved
from bitpress.math.scales import find_all


def round_to_nearest(weight: Tensor, grid: Grid, *, observer: str = "minmax") -> Solved:
    """Quantize a weight (R, C) float32 by rounding; `observer` "mse" searches the scales by weight error."""
    return round_all([weight], grid, observer=observer)[0]


def round_all(weights: Sequence[Tensor], grid: Grid, *, observer: str = "minmax") -> list[Solved]:
    """The same for weights with the same columns; see `scales.find_all` for what they share."""
    qparams = find_all(weights, grid, search=observer == "mse")
    return [solved(w, quantize(w, q, grid), q, None) for w, q in zip(weights, qparams, strict=True)]
