"""Activations: scales that are fixed before inference, from the range that was seen on calibration data; rounding.

Legend: H heads, T tokens, C in features, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitpress.math.grid import E4M3_MAX, E4M3_MIN, FLOATS, Grid, QParams, Values, dequantize, quantize


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


def rounded(x: Tensor, grid: Grid, beside: Mapping[str, Tensor]) -> Tensor:
    """Inputs of a linear as its client rounds them.

    Args:
        x: (..., C).
        grid: of the inputs: each token is a row of it, with scales in float32.
        beside: what is stored beside the weight: `input_scale` and `input_zero_point` where scales are static,
            `input_global_scale` where they are two-level; else they come from `x` itself.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    if "input_scale" in beside:
        shape, zero = (len(rows), 1), beside.get("input_zero_point")
        zero = None if grid.symmetric or zero is None else zero.expand(shape)
        qparams = QParams(beside["input_scale"].float().expand(shape), zero)
    else:
        qparams = dynamic_scales(rows, grid, beside.get("input_global_scale"))
    return dequantize(quantize(rows, qparams, grid), qparams).reshape(x.shape).to(x.dtype)


def dynamic_scales(rows: Tensor, grid: Grid, top: Tensor | None) -> QParams:
    """Scales (T, G) and zero points of inputs (T, C), by the very divisions that clients do: the largest value of a
    symmetric integer lies between two codes."""
    T, C = rows.shape
    grouped = rows.reshape(T, grid.groups(C), -1)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if grid.per_tensor:
        low, high = low.amin().expand(T, 1), high.amax().expand(T, 1)
    absmax = torch.maximum(-low, high)
    if not grid.symmetric:
        scale = (high - low) / (grid.qmax - grid.qmin)
        scale = torch.where(scale > 0, scale, 1.0)
        return QParams(scale, (grid.qmin - low / scale).clamp(grid.qmin, grid.qmax).round().to(torch.int8))
    if grid.scales == "power of two":  # twice as large from 7/8 of the binade that the codes reach
        binade = 2.0 ** math.floor(math.log2(FLOATS[grid.values][2]))
        _, exponent = torch.frexp(absmax / (1.75 * binade))
        scale = torch.ldexp(torch.ones_like(absmax), exponent.clamp(-126, 127))
    elif top is not None:
        local = (absmax / grid.full * top).clamp(E4M3_MIN, E4M3_MAX)
        scale = local.to(torch.float8_e4m3fn).float()
    else:
        scale = absmax / grid.full
    return QParams(torch.where(absmax > 0, scale, 1.0), None, top)


@dataclass(frozen=True)
class OutputRange:
    """Least and greatest value of each head of keys or values, (H,) float32."""

    low: Tensor
    high: Tensor

    def merge(self, other: OutputRange) -> OutputRange:
        """The range of both token sets together (batches and ranks combine this way)."""
        return OutputRange(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))
