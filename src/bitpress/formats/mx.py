"""compressed-tensors `mxfp4-pack-quantized`, `mxfp6-pack-quantized`, `mxfp8-quantized`: scales are powers of two.

weight_packed (R, C / 2) uint8, or (R, 3 C / 4) uint8 with four 6-bit floats in three bytes; for 8 bits weight (R, C)
float8_e4m3fn; weight_scale (R, C / 32) uint8, the exponent plus 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.formats import small_floats
from bitpress.math.grid import Grid, QParams

BIAS = 127


def describe(grid: Grid, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of a linear (rows, columns)."""
    spec: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight_scale": (torch.uint8, (rows, grid.groups(columns)))}
    if grid.bits == 8:
        return spec | {"weight": (torch.float8_e4m3fn, (rows, columns))}
    return spec | {"weight_packed": (torch.uint8, (rows, columns * grid.bits // 8))}


def pack(codes: Tensor, qparams: QParams, grid: Grid) -> dict[str, Tensor]:
    """Codes (R, C) and their parameters as stored tensors."""
    _, exponent = torch.frexp(qparams.scale.float())  # 2^e is 0.5 * 2^(e + 1)
    tensors = {"weight_scale": (exponent - 1 + BIAS).to(torch.uint8).contiguous()}
    if grid.bits == 8:
        return tensors | {"weight": codes.contiguous()}
    return tensors | {"weight_packed": small_floats.pack4(codes) if grid.bits == 4 else small_floats.pack6(codes)}


def unpack(tensors: dict[str, Tensor], grid: Grid) -> tuple[Tensor, QParams]:
    """The inverse of `pack`."""
    exponent = tensors["weight_scale"].to(torch.int32) - BIAS
    scale = torch.ldexp(torch.ones(exponent.shape, device=exponent.device), exponent).to(grid.scale_dtype)
    if grid.bits == 8:
        return tensors["weight"], QParams(scale, None)
    packed = tensors["weight_packed"]
    return small_floats.unpack4(packed) if grid.bits == 4 else small_floats.unpack6(packed), QParams(scale, None)
