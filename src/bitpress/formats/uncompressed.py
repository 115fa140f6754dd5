"""The uncompressed form: dense weights beside their scales and zero points, in which stages hand linears on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitpress.formats.base import Spec, beside, describe_inputs, grid_of, unknown_error
from bitpress.math.grid import Grid, QParams, Solved, quantize
from bitpress.schemes import Scheme


def describe_dense(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, regrouped: bool = False) -> Spec:
    """Tensors that a linear is stored as: suffix -> (dtype, shape). `regrouped`: which column is in which group too."""
    grid = grid_of(scheme, dtype)
    shape = grid.scale_shape(rows, columns)
    spec: Spec = {"weight": (dtype, (rows, columns)), "weight_scale": (dtype, shape)}
    spec["weight_zero_point"] = (grid.code_dtype, shape)
    if grid.scales == "two-level":
        spec["weight_global_scale"] = (torch.float32, (1,))
    if regrouped:
        spec["weight_g_idx"] = (torch.int32, (columns,))
    spec |= describe_inputs(scheme, dtype)
    if "input_scale" in spec:
        spec["input_zero_point"] = (_input_codes(scheme), (1,))
    return spec


def dense(solved: Solved, scheme: Scheme) -> dict[str, Tensor]:
    """A solved linear uncompressed. Quantizing the weight with these scales gives the same codes again.

    Symmetric ones have zero points too, all 0: transformers rounds with random ones where they are missing.
    """
    _, qparams = solved.quantized
    grid = grid_of(scheme, qparams.scale.dtype)
    zero = torch.zeros_like(qparams.scale).to(grid.code_dtype) if qparams.zero_point is None else qparams.zero_point
    tensors = {
        "weight": solved.dense(),
        "weight_scale": grid.once(qparams.scale),
        "weight_zero_point": grid.once(zero),
    }
    if qparams.global_scale is not None:
        tensors["weight_global_scale"] = qparams.global_scale.clone()
    if qparams.g_idx is not None:
        tensors["weight_g_idx"] = qparams.g_idx.to(torch.int32)
    tensors |= solved.beside
    if "input_scale" in tensors and "input_zero_point" not in tensors:
        tensors["input_zero_point"] = torch.zeros_like(tensors["input_scale"]).to(_input_codes(scheme))
    return tensors


def undense(tensors: dict[str, Tensor], scheme: Scheme) -> Solved:
    """What `dense` stored, or a dense weight that has changed since: rounded with the scales beside it."""
    weight, dtype = tensors["weight"], tensors["weight_scale"].dtype
    grid = grid_of(scheme, dtype)
    scale = grid.repeated(tensors["weight_scale"], len(weight))
    zero = None if grid.symmetric else grid.repeated(tensors["weight_zero_point"], len(weight))
    g_idx = tensors["weight_g_idx"].long() if "weight_g_idx" in tensors else None
    qparams = QParams(scale, zero, tensors.get("weight_global_scale"), g_idx)
    codes = quantize(weight.float(), qparams, grid)
    return Solved(codes, qparams, unknown_error(), beside=beside(tensors, scheme, dtype))


def settle(solved: Solved, grid: Grid) -> Solved:
    """The same weights, by the codes that rounding them gives again.

    Eight bits with zero points are finer than bfloat16: two codes may mean one weight, or, in one of some thousands,
    weights that differ in their last bit. Floats under two-level scales reach below the smallest float16. A dense
    copy could not tell which it was.
    """
    fine = not grid.symmetric and grid.bits == 8 and grid.scale_dtype == torch.bfloat16
    if solved.codes is not None and (fine or (grid.values != "int" and grid.scale_dtype == torch.float16)):
        return replace(solved, codes=quantize(solved.dense().float(), solved.quantized[1], grid))
    return solved


def _input_codes(scheme: Scheme) -> torch.dtype:
    assert scheme.input_activations is not None
    return torch.int8 if scheme.input_activations.type == "int" else torch.float8_e4m3fn
