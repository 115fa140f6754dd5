"""compressed-tensors `pack-quantized`: integer codes of 2 to 8 bits in int32 words.

weight_packed (R, words) int32; weight_scale (R, G), (1,) per tensor; weight_shape (2,) int64; asymmetric also
weight_zero_point: packed along the rows, (words, G) int32; per tensor a plain (1,) int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.formats import bits
from bitpress.math.grid import Grid, QParams


def describe(grid: Grid, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of a linear (rows, columns)."""
    G = grid.groups(columns)
    spec: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (rows, bits.words(columns, grid.bits))),
        "weight_scale": (grid.scale_dtype, (1,) if grid.per_tensor else (rows, G)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not grid.symmetric:
        packed = (torch.int32, (bits.words(rows, grid.bits), G))
        spec["weight_zero_point"] = (torch.int8, (1,)) if grid.per_tensor else packed
    return spec


def pack(codes: Tensor, qparams: QParams, grid: Grid) -> dict[str, Tensor]:
    """Codes (R, C) int8 and their parameters as stored tensors."""
    scale, zero = qparams.scale, qparams.zero_point
    tensors = {
        "weight_packed": bits.pack(codes, grid.bits),
        "weight_scale": scale[0].clone() if grid.per_tensor else scale.contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero is not None:
        packed = zero[0].clone() if grid.per_tensor else bits.pack(zero.T.contiguous(), grid.bits).T.contiguous()
        tensors["weight_zero_point"] = packed
    return tensors


def unpack(tensors: dict[str, Tensor], grid: Grid) -> tuple[Tensor, QParams]:
    """The inverse of `pack`."""
    rows, columns = tensors["weight_shape"].tolist()
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    codes = bits.unpack(tensors["weight_packed"], grid.bits, columns)
    if grid.per_tensor:
        scale = scale.expand(rows, 1)
        zero = None if zero is None else zero.expand(rows, 1)
    elif zero is not None:
        zero = bits.unpack(zero.T.contiguous(), grid.bits, rows).T.contiguous()
    return codes, QParams(scale, zero)
