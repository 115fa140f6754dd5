"""compressed-tensors `nvfp4-pack-quantized`: 4-bit floats in pairs, under two-level scales.

weight_packed (R, C / 2) uint8, the first of a pair in the low four bits; weight_scale (R, C / 16) float8_e4m3fn;
weight_global_scale (1,) float32, a divisor: a weight is code * weight_scale / weight_global_scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.formats import small_floats
from bitpress.math.grid import Grid, QParams, values_of


def describe(grid: Grid, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of a linear (rows, columns)."""
    return {
        "weight_packed": (torch.uint8, (rows, columns // 2)),
        "weight_scale": (torch.float8_e4m3fn, (rows, grid.groups(columns))),
        "weight_global_scale": (torch.float32, (1,)),
    }


def pack(codes: Tensor, qparams: QParams, grid: Grid) -> dict[str, Tensor]:
    """Codes (R, C) and their parameters as stored tensors."""
    assert qparams.global_scale is not None
    return {
        "weight_packed": small_floats.pack4(codes),
        "weight_scale": qparams.scale.to(torch.float8_e4m3fn).contiguous(),
        "weight_global_scale": qparams.global_scale.clone(),
    }


def unpack(tensors: dict[str, Tensor], grid: Grid) -> tuple[Tensor, QParams]:
    """The inverse of `pack`."""
    scale = values_of(tensors["weight_scale"]).to(grid.scale_dtype)
    return small_floats.unpack4(tensors["weight_packed"]), QParams(scale, None, tensors["weight_global_scale"])
