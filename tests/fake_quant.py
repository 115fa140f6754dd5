"""Activations rounded as a scheme says, in plain arithmetic of our own, to hold clients' forwards against."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def rounded(x: torch.Tensor, args: Any) -> torch.Tensor:
    """To the nearest code of a width and type."""
    if args.type == "int":
        half = 1 << (args.num_bits - 1)
        return x.round().clamp(-half, half - 1)
    if args.num_bits == 8:
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    table = torch.tensor(E2M1)
    # ties go to the even one of two neighbours
    middles = (table[1:] + table[:-1]) / 2
    low = torch.bucketize(x.abs(), middles, right=False)
    high = torch.bucketize(x.abs(), middles, right=True)
    return table[torch.where(low % 2 == 0, low, high)] * x.sign()


def fake_quantized(x: torch.Tensor, args: Any, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """An input (..., C) float32 after quantization by `args`.

    Args:
        stored: the linear's tensors by suffix, for static scales.
    """
    top = {"int": (2**args.num_bits - 1) / 2, "float": {8: 448.0, 4: 6.0}.get(args.num_bits, 0.0)}[args.type]
    if not args.dynamic:
        scale = stored["input_scale"].float()
        zero = stored["input_zero_point"].float() if "input_zero_point" in stored else 0.0
        return (rounded(x / scale + zero, args) - zero) * scale
    if args.strategy in ("group", "tensor_group"):
        shape, x = x.shape, x.unflatten(-1, (-1, args.group_size))
    else:
        shape = x.shape
    axes = tuple(range(x.dim())) if args.strategy == "tensor" else (-1,)
    low, high = x.amin(axes, keepdim=True).clamp(max=0), x.amax(axes, keepdim=True).clamp(min=0)
    if not args.symmetric:
        levels = 2**args.num_bits - 1
        scale = (high - low) / levels
        half = 1 << (args.num_bits - 1)
        zero = (-half - low / scale).clamp(-half, half - 1).round()
        return ((rounded(x / scale + zero, args) - zero) * scale).reshape(shape)
    absmax = torch.maximum(-low, high)
    if args.scale_dtype == "uint8":
        ceiling = 1.75  # of the mantissa, from which the scale is doubled
        exponent = absmax.log2().floor()
        exponent += (absmax / 2**exponent >= ceiling).float()
        scale = 2.0 ** (exponent - {4: 2, 8: 8}[args.num_bits])
    elif args.dynamic == "local":
        above = stored["input_global_scale"].float()
        scale = (absmax / top * above).to(torch.float8_e4m3fn).float() / above
    else:
        scale = absmax / top
    return (rounded(x / scale, args) * scale).reshape(shape)


@contextmanager
def quantized_inputs(model: Any, args: Any, tensors: dict[str, torch.Tensor], linears: list[str]) -> Any:
    """Within it, the inputs of these linears are quantized before they are multiplied."""

    def hook(name: str) -> Any:
        stored = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}
        return lambda module, given: (fake_quantized(given[0], args, stored),)

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
