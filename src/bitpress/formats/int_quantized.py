"""compressed-tensors `int-quantized`: one int8 a weight, for runtimes that multiply int8 activations.

weight (R, C) int8; weight_scale (R, G), (1,) per tensor; asymmetric also weight_zero_point int8 of the same shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.math.grid import Grid, QParams


def describe(grid: Grid, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of a linear (rows, columns)."""
    shape = grid.scale_shape(rows, columns)
    spec: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.int8, (rows, columns)),
        "weight_scale": (grid.scale_dtype, shape),
    }
    if not grid.symmetric:
        spec["weight_zero_point"] = (torch.int8, shape)
    return spec


def pack(codes: Tensor, qparams: QParams, grid: Grid) -> dict[str, Tensor]:
    """Codes (R, C) int8 and their parameters as stored tensors."""
    tensors = {"weight": codes.contiguous(), "weight_scale": grid.once(qparams.scale)}
    if qparams.zero_point is not None:
        tensors["weight_zero_point"] = grid.once(qparams.zero_point)
    return tensors


def unpack(tensors: dict[str, Tensor], grid: Grid) -> tuple[Tensor, QParams]:
    """The inverse of `pack`."""
    codes, zero = tensors["weight"], tensors.get("weight_zero_point")
    rows = len(codes)
    zero = None if zero is None else grid.repeated(zero, rows)
    return codes, QParams(grid.repeated(tensors["weight_scale"], rows), zero)
