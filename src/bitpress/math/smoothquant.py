"""SmoothQuant: move the range of activations into the weights (Xiao et al. 2022, arXiv 2211.10438).

How much of it is a number of the recipe, or searched for each fold: then both kinds of rounding noise that the scale
leaves in the output are told from a sample of tokens, where the paper runs the model again for every strength.

Legend: P channels of a fold, C input columns of its consumers, R rows of one of them, T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bitpress.math.activations import dynamic_scales, static_scale
from bitpress.math.awq import Reader
from bitpress.math.scales import find_qparams
from bitpress.math.stats import InputStats

SMALLEST = 1e-5  # of a scale, and of what is divided by
STEPS = 20  # from strength 0 to 1


def smoothquant_scale(x_max: Tensor, w_max: Tensor, strength: float) -> Tensor:
    """The scale s = x_max^strength / w_max^(1 - strength) by which activations are divided.

    Channels that are never active, or that no weight reads, keep scale 1.

    Args:
        x_max: (P,) largest absolute input of each channel.
        w_max: (P,) largest absolute weight that reads it, over all consumers.
        strength: 0 leaves the activations as wide as the weights ask, 1 makes them all as wide.

    Returns:
        (P,) float32, positive.
    """
    live = (x_max > 0) & (w_max > 0)
    s = x_max.float().clamp(min=SMALLEST) ** strength / w_max.float().clamp(min=SMALLEST) ** (1 - strength)
    return torch.where(live, s.clamp(min=SMALLEST), 1.0)


def searched_scale(readers: Sequence[Reader], stats: InputStats, columns: Tensor, channels: int) -> Tensor:
    """The scale of least rounding noise in the outputs, among x^a / w^(1 - a) for strengths a, and no scale.

    x is the geometric mean of a channel's largest and mean absolute input, between which lies what most tokens are as
    wide as; w the root mean square of the weights that read it, as its noise is a sum over them.

    Args:
        readers: the weights that read the fold's channels.
        stats: of their common input, with its range, mean and sample.
        columns: (C,) channel of each column.
        channels: P.

    Returns:
        (P,) float32, positive.
    """
    low, high, sum_abs, sample = stats.low, stats.high, stats.sum_abs, stats.sample
    assert low is not None and high is not None and sum_abs is not None and sample is not None
    tokens = sample.float()
    tokens = tokens[tokens.any(1)]
    x_max = by_channel(high.maximum(-low), columns, channels, "amax")
    x = (x_max * by_channel(sum_abs / max(stats.tokens, 1), columns, channels, "mean")).sqrt()
    squares = torch.stack([r.weight.square().sum(0) for r in readers]).sum(0) / sum(len(r.weight) for r in readers)
    w = by_channel(squares, columns, channels, "mean").sqrt()
    live = (x > 0) & (w > 0)
    x, w = x.clamp(min=SMALLEST), w.clamp(min=SMALLEST)
    tried = [torch.ones_like(x)]
    for i in range(STEPS + 1):
        s = x ** (i / STEPS) / w ** (1 - i / STEPS)
        tried.append(torch.where(live, s.clamp(min=SMALLEST), 1.0))
    noise = torch.stack([rounding_noise(readers, tokens, s[columns], low, high) for s in tried])
    return tried[int(noise.argmin())]


def rounding_noise(readers: Sequence[Reader], tokens: Tensor, s: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Energy a token that rounding of inputs and weights to integers adds to the outputs, were all errors independent
    and even: a step squared / 12 each.

    Args:
        readers: a float grid's noise hardly depends on scales and is left out.
        tokens: (T, C) float32.
        s: (C,) by which inputs are divided and weights multiplied.
        low, high: (C,) range of the inputs over more tokens than these.
    """
    x = tokens / s
    power = x.square().mean(0)
    noise = torch.zeros((), device=x.device)
    for reader in readers:
        w = reader.weight * s
        if reader.inputs is not None:
            if reader.fixed:
                bounds = (low / s).amin().reshape(1, 1), (high / s).amax().reshape(1, 1)
                step, _ = static_scale(*bounds, "int", reader.inputs.bits, reader.inputs.symmetric, torch.float32)
            else:
                step = dynamic_scales(x, reader.inputs, None).scale
            noise += _noise(step, w.square().sum(0))
        if reader.grid is not None and reader.grid.values == "int":
            step = find_qparams(w, reader.grid).scale.float()
            noise += _noise(step, power) * len(w)
    return noise


def _noise(step: Tensor, energy: Tensor) -> Tensor:
    """A row's share, of rows rounded with `step` (N, G), where what multiplies each column has `energy` (C,)."""
    return (step.square().mean(0) * energy.reshape(step.shape[1], -1).sum(1)).sum() / 12


def log_equalization_scale(x_max: Tensor) -> Tensor:
    """The scale s = x_max / log2(2 + x_max), which reads no weights (Li et al. 2023, arXiv 2308.15987)."""
    x = x_max.float()
    return torch.where(x > 0, (x / torch.log2(2 + x)).clamp(min=SMALLEST), 1.0)


def column_max(weights: Iterable[Tensor]) -> Tensor:
    """(C,) largest absolute weight of each input column over several weights (R_i, C)."""
    return torch.stack([w.abs().amax(0) for w in weights]).amax(0)


def by_channel(values: Tensor, columns: Tensor, channels: int, reduce: str) -> Tensor:
    """Values of the columns (C,) gathered into those of their channels (P,).

    Args:
        columns: (C,) channel of each column.
        reduce: "amax" or "mean", over the columns of one channel.
    """
    out = torch.zeros(channels, dtype=values.dtype, device=values.device)
    return out.scatter_reduce(0, columns, values, reduce, include_self=False)
