"""compressed-tensors `int-quantized`: one int8 a weight, for runtimes that multiply int8 activations.

weight (R, C) int8; weight_scale (R, 1), (1,) per tensor; asymmetric also weight_zero_point int8 of the same shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.math.grid import Grid, QParams


def describe(grid: Grid, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of a linear (rows, columns)."""
    shape = (1,) if grid.per_tensor else (rows, grid.groups(columns))
    spec: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.int8, (rows, columns)),
        "weight_scale": (grid.scale_dtype, shape),
    }
    if not grid.symmetric:
        spec["weight_zero_point"] = (torch.int8, shape)
    return spec


def pack(codes: Tensor, qparams: QParams, grid: Grid) -> dict[str, Tensor]:
    """Codes (R, C) int8 and their parameters as stored tensors."""

    def stored(x: Tensor) -> Tensor:
        return x[0].clone() if grid.per_tensor else x.contiguous()

    tensors = {"weight": codes.contiguous(), "weight_scale": stored(qparams.scale)}
    if qparams.zero_point is not None:
        tensors["weight_zero_point"] = stored(qparams.zero_point)
    return tensors


def unpack(tensors: dict[str, Tensor], grid: Grid) -> tuple[Tensor, QParams]:
    """The inverse of `pack`."""
    codes, scale, zero = tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero_point")
    if grid.per_tensor:
        scale = scale.expand(len(codes), 1)
        zero = None if zero is None else zero.expand(len(codes), 1)
    return codes, QParams(scale, zero)
