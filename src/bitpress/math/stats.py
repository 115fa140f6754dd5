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

# Columns of one block row of the triangular product: narrower saves more of the lower triangle, but is slower a
# flop. On 2 cores with AVX-512 bfloat16, 8192 x 1536 took 81 ms whole, 58 ms in rows of 512, 50 ms in rows of 192.
BLOCK_ROW, MOST_ROWS = 192, 8
CHUNK = 2048  # tokens converted to float32 at a time; the buffer is reused, fresh memory costs more than the copy


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
        with bfloat16_products(exact):
            for part in torch.split(x, CHUNK):
                full = part if part.dtype == torch.float32 else _scratch(part.shape, x.device).copy_(part)
                for lo, hi in self._block_rows():
                    self._sum[lo:hi, lo:].addmm_(full[:, lo:hi].T, full[:, lo:])

    def _block_rows(self) -> Iterator[tuple[int, int]]:
        channels = self._sum.shape[0]
        step = max(BLOCK_ROW, -(-channels // MOST_ROWS))
        for lo in range(0, channels, step):
            yield lo, min(lo + step, channels)

    def finish(self) -> InputStats:
        """The statistics; the accumulator's memory is handed over and it must not be used again."""
        upper = self._sum.triu_()
        upper += upper.triu(1).T
        return InputStats(upper, self._tokens)


_buffers: dict[torch.device, Tensor] = {}


def _scratch(shape: torch.Size, device: torch.device) -> Tensor:
    """A float32 buffer of this shape, the same memory every time."""
    held = _buffers.get(device)
    if held is None or held.numel() < shape.numel():
        held = _buffers[device] = torch.empty(shape.numel(), device=device)
    return held[: shape.numel()].view(shape)


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
