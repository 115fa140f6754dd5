"""Storage formats: how a solved linear lies in safetensors. One file a format, one line in `FORMATS`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bitpress.formats import int_quantized, pack_quantized
from bitpress.math.grid import Grid, QParams, Solved, quantize
from bitpress.schemes import Scheme

FORMATS: dict[str, ModuleType] = {
    "pack-quantized": pack_quantized,
    "int-quantized": int_quantized,
}
Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor suffix -> dtype, shape


def grid_of(scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The integer grid of a scheme whose scales are stored in `dtype`."""
    args = scheme.weights
    return Grid(args.num_bits, args.symmetric, args.group_size, args.strategy == "tensor", dtype)


def describe(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Spec:
    """Tensors that a linear of (rows, columns) is stored as: suffix -> (dtype, shape)."""
    spec: Spec = FORMATS[scheme.format].describe(grid_of(scheme, dtype), rows, columns)
    return spec


def pack(solved: Solved, scheme: Scheme) -> dict[str, Tensor]:
    """A solved linear as the tensors of its format, by suffix."""
    codes, qparams = solved.quantized
    tensors: dict[str, Tensor] = FORMATS[scheme.format].pack(codes, qparams, grid_of(scheme, qparams.scale.dtype))
    return tensors


def unpack(tensors: dict[str, Tensor], scheme: Scheme) -> Solved:
    """What `pack` stored. Its `error` is NaN: the checkpoint does not hold it."""
    grid = grid_of(scheme, tensors["weight_scale"].dtype)
    codes, qparams = FORMATS[scheme.format].unpack(tensors, grid)
    return Solved(codes, qparams, torch.tensor(float("nan")))


def describe_dense(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Spec:
    """The same for the uncompressed form: the dense weight beside its scales and zero points."""
    grid = grid_of(scheme, dtype)
    shape = (1,) if grid.per_tensor else (rows, grid.groups(columns))
    spec: Spec = {"weight": (dtype, (rows, columns)), "weight_scale": (dtype, shape)}
    return spec | {"weight_zero_point": (torch.int8, shape)}


def dense(solved: Solved, scheme: Scheme) -> dict[str, Tensor]:
    """A solved linear uncompressed. Quantizing the weight with these scales gives the same codes again.

    Symmetric ones have zero points too, all 0: transformers rounds with random ones where they are missing.
    """
    _, qparams = solved.quantized
    scale, zero = qparams.scale, qparams.zero_point
    zero = torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero
    if scheme.weights.strategy == "tensor":
        scale, zero = scale[0].clone(), zero[0].clone()
    return {"weight": solved.dense(), "weight_scale": scale, "weight_zero_point": zero}


def undense(tensors: dict[str, Tensor], scheme: Scheme) -> Solved:
    """What `dense` stored, or a dense weight that has changed since: rounded with the scales beside it."""
    weight, scale, zero = tensors["weight"], tensors["weight_scale"], tensors["weight_zero_point"]
    grid = grid_of(scheme, scale.dtype)
    if grid.per_tensor:
        scale, zero = scale.expand(len(weight), 1), zero.expand(len(weight), 1)
    qparams = QParams(scale, None if grid.symmetric else zero)
    return Solved(quantize(weight.float(), qparams, grid), qparams, torch.tensor(float("nan")))
