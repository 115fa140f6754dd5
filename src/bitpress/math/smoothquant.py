"""SmoothQuant: move the range of activations into the weights (Xiao et al. 2022, arXiv 2211.10438).

Legend: P channels of a fold, C input columns of its consumers, R rows of one of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SMALLEST = 1e-5  # of a scale, and of what is divided by


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
