"""Round to nearest: no data, no compensation; the baseline of every other method."""

from __future__ import annotations

from torch import Tensor

from bitpress.math.grid import Grid, Solved, find_qparams, quantize, solved


def round_to_nearest(weight: Tensor, grid: Grid, *, observer: str = "minmax") -> Solved:
    """Quantize a weight (R, C) float32 by rounding; `observer` "mse" searches the scales by weight error."""
    qparams = find_qparams(weight, grid, search=observer == "mse")
    return solved(weight, quantize(weight, qparams, grid), qparams, None)
