"""compressed-tensors `float-quantized` (`naive-quantized` where activations are left alone): one fp8 (e4m3) a weight.

weight (R, C) float8_e4m3fn; weight_scale (1,) per tensor, (R, 1) per channel, (R, G) in groups, (R / rows of a block,
C / columns of a block) in blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.math.grid import Grid, QParams


def describe(grid: Grid, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of a linear (rows, columns)."""
    return {
        "weight": (torch.float8_e4m3fn, (rows, columns)),
        "weight_scale": (grid.scale_dtype, grid.scale_shape(rows, columns)),
    }


def pack(codes: Tensor, qparams: QParams, grid: Grid) -> dict[str, Tensor]:
    """Codes (R, C) and their parameters as stored tensors."""
    return {"weight": codes.contiguous(), "weight_scale": grid.once(qparams.scale)}


def unpack(tensors: dict[str, Tensor], grid: Grid) -> tuple[Tensor, QParams]:
    """The inverse of `pack`."""
    codes = tensors["weight"]
    return codes, QParams(grid.repeated(tensors["weight_scale"], len(codes)), None)
