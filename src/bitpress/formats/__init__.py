"""Storage formats: how a solved linear lies in safetensors. One file a format, one line in `FORMATS`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bitpress.formats import float_quantized, int_quantized, mx, nvfp4_pack_quantized, pack_quantized
from bitpress.math.grid import Grid, QParams, Solved, Values, quantize
from bitpress.schemes import Scheme

FORMATS: dict[str, ModuleType] = {
    "pack-quantized": pack_quantized,
    "int-quantized": int_quantized,
    "float-quantized": float_quantized,
    "naive-quantized": float_quantized,
    "nvfp4-pack-quantized": nvfp4_pack_quantized,
    "mxfp4-pack-quantized": mx,
    "mxfp6-pack-quantized": mx,
    "mxfp8-quantized": mx,
}
FLOATS: dict[int, Values] = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor suffix -> dtype, shape


def grid_of(scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The grid of the weights of a scheme, for a model of `dtype`."""
    args = scheme.weights
    rows, columns = args.block_structure or (1, args.group_size)
    return Grid(
        bits=args.num_bits,
        symmetric=args.symmetric,
        group_size=columns,
        per_tensor=args.strategy == "tensor",
        scale_dtype=dtype,
        values="int" if args.type == "int" else FLOATS[args.num_bits],
        scales="two-level" if args.strategy == "tensor_group" else "power of two" if args.scale_dtype else "free",
        block_rows=rows,
    )


def describe(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Spec:
    """Tensors that a linear of (rows, columns) is stored as: suffix -> (dtype, shape)."""
    spec: Spec = FORMATS[scheme.format].describe(grid_of(scheme, dtype), rows, columns)
    return spec | describe_inputs(scheme, dtype)


def describe_inputs(scheme: Scheme, dtype: torch.dtype) -> Spec:
    """What calibration data tell about the inputs, stored beside the weight."""
    inputs = scheme.input_activations
    if inputs is None or inputs.dynamic is True:
        return {}
    if inputs.dynamic == "local":
        return {"input_global_scale": (torch.float32, (1,))}
    spec: Spec = {"input_scale": (dtype, (1,))}
    return spec if inputs.symmetric else spec | {"input_zero_point": (torch.int8, (1,))}


def pack(solved: Solved, scheme: Scheme) -> dict[str, Tensor]:
    """A solved linear as the tensors of its format, by suffix."""
    codes, qparams = solved.quantized
    tensors: dict[str, Tensor] = FORMATS[scheme.format].pack(codes, qparams, grid_of(scheme, qparams.scale.dtype))
    return tensors | dict(solved.beside)


def unpack(tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Solved:
    """What `pack` stored of a model of `dtype`. Its `error` is NaN: the checkpoint does not hold it."""
    codes, qparams = FORMATS[scheme.format].unpack(tensors, grid_of(scheme, dtype))
    return Solved(codes, qparams, torch.tensor(float("nan")), beside=_beside(tensors, scheme, dtype))


def describe_dense(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Spec:
    """The same for the uncompressed form: the dense weight beside its scales and zero points."""
    grid = grid_of(scheme, dtype)
    shape = grid.scale_shape(rows, columns)
    spec: Spec = {"weight": (dtype, (rows, columns)), "weight_scale": (dtype, shape)}
    spec["weight_zero_point"] = (grid.code_dtype, shape)
    if grid.scales == "two-level":
        spec["weight_global_scale"] = (torch.float32, (1,))
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
    qparams = QParams(scale, zero, tensors.get("weight_global_scale"))
    codes = quantize(weight.float(), qparams, grid)
    return Solved(codes, qparams, torch.tensor(float("nan")), beside=_beside(tensors, scheme, dtype))


def _beside(tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensors[name] for name in describe_inputs(scheme, dtype)}


def _input_codes(scheme: Scheme) -> torch.dtype:
    assert scheme.input_activations is not None
    return torch.int8 if scheme.input_activations.type == "int" else torch.float8_e4m3fn
