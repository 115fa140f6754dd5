"""Statistics of a linear's input: all that the algorithms need to know about the data.

Legend: C in features, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GRAM_BLOCK = 512  # columns of one block row of the triangular product


@dataclass(frozen=True)
class InputStats:
    """What one pass over the data leaves of an input `x` of shape (T, C).

    Attributes:
        gram: `sum_t x_t x_t^T`, (C, C) float32, symmetric.
        tokens: number of tokens T that were summed.
    """

    gram: Tensor
    tokens: int

    def merge(self, other: InputStats) -> InputStats:
        """The statistics of both token sets together (batches and ranks combine this way)."""
        return InputStats(self.gram + other.gram, self.tokens + other.tokens)


class GramAccumulator:
    """Sums `x^T x` over batches, one triangle only, in float32.

    Products of bfloat16 inputs are exact in float32, so for them the fast bfloat16 matrix units are used with
    float32 accumulation; other dtypes are multiplied in float32.

    Args:
        channels: C, the number of input features.
        device: where the sums live.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self._sum = torch.zeros(channels, channels, dtype=torch.float32, device=device)
        self._tokens = 0

    @staticmethod
    def nbytes(channels: int) -> int:
        """Bytes held for an input of `channels` features."""
        return 4 * channels * channels

    def add(self, x: Tensor) -> None:
        """Add the tokens of `x` (..., C)."""
        x = x.reshape(-1, x.shape[-1])
        self._tokens += x.shape[0]
        exact = x.dtype == torch.bfloat16
        if x.device.type == "cuda" and exact:
            for lo, hi in self._block_rows():
                self._sum[lo:hi, lo:] += torch.mm(x[:, lo:hi].T, x[:, lo:], out_dtype=torch.float32)
            return
        full = x.float()
        with bfloat16_products(exact):
            for lo, hi in self._block_rows():
                self._sum[lo:hi, lo:].addmm_(full[:, lo:hi].T, full[:, lo:])

    def _block_rows(self) -> Iterator[tuple[int, int]]:
        channels = self._sum.shape[0]
        for lo in range(0, channels, GRAM_BLOCK):
            yield lo, min(lo + GRAM_BLOCK, channels)

    def finish(self) -> InputStats:
        """The statistics; the accumulator's memory is handed over and it must not be used again."""
        upper = self._sum.triu_()
        upper += upper.triu(1).T
        return InputStats(upper, self._tokens)


@contextmanager
def bfloat16_products(enabled: bool) -> Iterator[None]:
    """Within it, float32 matrix products on the CPU multiply in bfloat16 and accumulate in float32.

    The switch is process-wide in torch, so it is set for as short as possible and put back.
    """
    if not enabled:
        yield
        return
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before
