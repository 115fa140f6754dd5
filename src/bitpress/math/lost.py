"""What is lost by storing a weight: the share of its output's energy, or of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

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


def solved_each(
    weights: Sequence[Sequence[Tensor]], codes: Tensor, qparams: QParams, grams: Tensor
) -> list[list[Solved]]:
    """`solved` of the linears of one input, (R, C) their codes one below the other, or of several alike, (E, R, C)."""
    rows = [len(w) for w in weights[0]]
    parts = list(zip(accumulate(rows), rows, strict=True))
    if codes.dim() == 2:
        return [[
            solved(w, codes[end - n : end], qparams.rows(end - n, end), grams)
            for w, (end, n) in zip(weights[0], parts, strict=True)
        ]]  # fmt: skip
    errors: list[Tensor] = []  # of each input's linears
    some = -(-len(codes) // 4)  # inputs at a time: a dozen tensors of their size are held
    for at in (slice(first, first + some) for first in range(0, len(codes), some)):
        whole = torch.stack([torch.cat(list(of_input)) for of_input in weights[at]])
        dense = dequantize(codes[at].flatten(0, 1), qparams.of(at).reshaped(-1)).reshape(whole.shape)
        both = torch.cat([dense.float() - whole, whole], 1)
        energy = product(both, grams[at]).mul_(both).sum(-1).reshape(len(whole), 2, -1)
        lost, kept = torch.stack([energy[..., end - n : end].sum(-1) for end, n in parts], -1).unbind(1)
        errors += (lost / kept.clamp(min=1e-30)).unbind()
    return [
        [
            Solved(mine[end - n : end], qparams.of(e).rows(end - n, end), error)
            for (end, n), error in zip(parts, errors[e].unbind(), strict=True)
        ]
        for e, mine in enumerate(codes)
    ]
