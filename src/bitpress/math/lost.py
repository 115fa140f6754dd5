"""What is lost by storing a weight: the share of its output's energy, or of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.math.grid import QParams, Solved, dequantize
from bitpress.math.products import bfloat16_products, product


def relative_error(weight: Tensor, dense: Tensor, gram: Tensor | None) -> Tensor:
    """Share of energy lost by storing `dense` for `weight` (R, C): of the output, of the weight without a Gram matrix.

    tr(dW G dW^T) / tr(W G W^T), or |dW|^2 / |W|^2.
    """
    delta = dense.float() - weight
    if gram is None:
        lost, kept = delta.square().sum(), weight.square().sum()
    elif gram.device.type == "cuda":  # one product reads the Gram matrix once
        both = torch.cat([delta, weight])
        lost, kept = product(both, gram).mul_(both).reshape(2, -1).sum(1)
    else:
        with bfloat16_products(True):  # a figure for the report: three digits are enough
            lost, kept = (product(x, gram).mul_(x).sum() for x in (delta, weight))
    error: Tensor = lost / kept.clamp(min=1e-30)
    return error


def solved(weight: Tensor, codes: Tensor, qparams: QParams, gram: Tensor | None) -> Solved:
    """A `Solved` with its error, measured with the Gram matrix (C, C) if there is one."""
    return Solved(codes, qparams, relative_error(weight, dequantize(codes, qparams), gram))
