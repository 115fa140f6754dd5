"""Scales of activations that are fixed before inference, from the range that was seen on calibration data.

Legend: H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitpress.math.grid import FLOATS, Values


def static_scale(
    low: Tensor, high: Tensor, values: Values, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The scale over [low, high], extended to contain zero, of one range or of one each.

    Symmetric integers: absmax / (qmax + 0.5), so that the largest value errs by at most half a step; asymmetric ones
    cover the range; floats: the largest value is the largest code.

    Args:
        low, high: least and greatest value, of any shape.
        values, bits: the codes.
        dtype: in which the scale is stored.

    Returns:
        Scale in `dtype` and zero point int8 (None if symmetric), shaped as low and high.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    levels = (1 << bits) - 1
    if symmetric:
        absmax = torch.maximum(-low, high)
        scale = absmax * (2 / levels) if values == "int" else absmax / FLOATS[values][2]
    else:
        scale = (high - low) / levels
    tiny = torch.finfo(dtype).tiny
    scale = torch.where(scale > 0, scale.clamp(min=tiny), 1.0).to(dtype)
    if symmetric:
        return scale, None
    least = -(1 << (bits - 1))
    zero = (least - low / scale.float()).round().clamp(least, least + levels)
    return scale, zero.to(torch.int8)


@dataclass(frozen=True)
class OutputRange:
    """Least and greatest value of each head of keys or values, (H,) float32."""

    low: Tensor
    high: Tensor

    def merge(self, other: OutputRange) -> OutputRange:
        """The range of both token sets together (batches and ranks combine this way)."""
        return OutputRange(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))
