"""Statistics of a linear's input: all that the algorithms need to know about the data.

Legend: R out features, C in features, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from bitpress.math.products import bfloat16_products

# Columns of one block row of the triangular product: narrower saves more of the lower triangle, but is slower a
# flop. On 2 cores with AVX-512 bfloat16, 8192 x 1536 took 81 ms whole, 58 ms in rows of 512, 50 ms in rows of 192;
# 8192 x 576 took 18.7 ms of one core in rows of 192, 16.6 ms in rows of 96.
BLOCK_ROW, MOST_ROWS = 96, 8
LEAST_FLOPS = 1 << 35  # of a block row on a GPU: less is over before the next one is launched
EXTREME = 16  # times the median energy, beyond which a token says nothing about drift
SAMPLE = 2048  # tokens of a sample at least, where there are as many
CHUNK = 2048  # tokens converted to float32 at a time; the buffer is reused, fresh memory costs more than the copy


@dataclass(frozen=True)
class InputStats:
    """What one pass over the data leaves of an input `x` of shape (T, C). What nothing reads is not collected: None.

    Attributes:
        gram: `sum_t x_t x_t^T`, (C, C) float32, symmetric.
        tokens: number of tokens T that were summed.
        sum_abs: `sum_t |x_t|`, (C,) float32.
        low, high: least and greatest value of each channel, (C,) float32.
        drift: `sum_t (f_t - x_t) x_t^T`, (C, C) float32, with f the same input in the uncompressed model, over the
            tokens of `paired`.
        lag: `sum_t e_t x_t^T`, (R, C) float32, with e what the block's output lacks of the uncompressed model's, over
            the tokens of `paired`: in place of `drift` for the input of the linear that `bitpress.residual` finds.
        paired: `sum_t x_t x_t^T`, (C, C) float32, over some of the tokens, those of extreme energy left out.
        sample: evenly spaced tokens, (at most 2 * `SAMPLE`, C), in the dtype of the input.
    """

    gram: Tensor | None
    tokens: int
    sum_abs: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    drift: Tensor | None = None
    lag: Tensor | None = None
    paired: Tensor | None = None
    sample: Tensor | None = None

    def merge(self, other: InputStats) -> InputStats:
        """The statistics of both token sets together (batches and ranks combine this way)."""

        def both(a: Tensor | None, b: Tensor | None, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
            return None if a is None or b is None else join(a, b)

        return InputStats(
            both(self.gram, other.gram, torch.add),
            self.tokens + other.tokens,
            both(self.sum_abs, other.sum_abs, torch.add),
            both(self.low, other.low, torch.minimum),
            both(self.high, other.high, torch.maximum),
            both(self.drift, other.drift, torch.add),
            both(self.lag, other.lag, torch.add),
            both(self.paired, other.paired, torch.add),
            both(self.sample, other.sample, lambda a, b: thinned(torch.cat([a, b]))[0]),
        )

    def double(self) -> InputStats:
        """The same in float64."""
        tensors: Any = {f.name: t.double() for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)

    def permuted(self, order: Tensor) -> InputStats:
        """The statistics of `x[:, order]`, for a permutation (C,)."""

        def one(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[order]

        def two(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[order][:, order]

        return InputStats(
            two(self.gram), self.tokens, one(self.sum_abs), one(self.low), one(self.high), two(self.drift),
            None if self.lag is None else self.lag[:, order], two(self.paired),
            None if self.sample is None else self.sample[:, order],
        )  # fmt: skip

    def smoothed(self, scale: Tensor) -> InputStats:
        """The statistics of `x / scale`, for a positive scale (C,): by algebra, without another forward."""

        def one(x: Tensor | None) -> Tensor | None:
            return None if x is None else x / scale

        def two(x: Tensor | None) -> Tensor | None:
            return None if x is None else x / scale[:, None] / scale

        return InputStats(
            two(self.gram), self.tokens, one(self.sum_abs), one(self.low), one(self.high), two(self.drift),
            one(self.lag), two(self.paired), one(self.sample),
        )  # fmt: skip

    @property
    def needed_gram(self) -> Tensor:
        """The Gram matrix, for those who have asked for it."""
        assert self.gram is not None
        return self.gram


class StatsAccumulator:
    """Sums the statistics of one input over batches.

    Args:
        channels: C, the number of input features.
        device: where the sums live.
        needs: which ones, see `Modifier.needs`: "gram", "mean", "range", "drift",
            "sample".
        outputs: R, where `lag` is summed in place of `drift`.
    """

    def __init__(self, channels: int, device: torch.device, needs: frozenset[str], outputs: int | None = None) -> None:
        self._gram = GramAccumulator(channels, device) if "gram" in needs else None
        self._tokens = 0
        self._sum_abs = torch.zeros(channels, device=device) if "mean" in needs else None
        self._low = torch.full((channels,), math.inf, device=device) if "range" in needs else None
        self._high = torch.full((channels,), -math.inf, device=device) if "range" in needs else None
        self._outputs = outputs
        self._away = torch.zeros(outputs or channels, channels, device=device) if "drift" in needs else None
        self._paired = GramAccumulator(channels, device) if "drift" in needs else None
        self._sample = Sample() if "sample" in needs else None

    @staticmethod
    def nbytes(channels: int, needs: frozenset[str]) -> int:
        """Bytes held for an input of `channels` features."""
        matrices = ("gram" in needs) + 2 * ("drift" in needs)
        sample = 4 * 3 * SAMPLE * channels if "sample" in needs else 0  # as it is thinned, and in float32
        return matrices * GramAccumulator.nbytes(channels) + sample or 16 * channels

    def add(self, x: Tensor, full: Tensor | None = None, lack: Tensor | None = None) -> None:
        """Add the tokens of `x` (..., C).

        Args:
            full: the same input in the uncompressed model, of the same shape.
            lack: (..., R), what the block's output lacks; in place of `full` where `lag` is summed.
        """
        x = x.reshape(-1, x.shape[-1])
        self._tokens += x.shape[0]
        if x.shape[0] == 0:
            return
        rest = x
        other = full if self._outputs is None else lack
        if self._away is not None and self._paired is not None and other is not None:
            rest = self._pair(x, other.reshape(len(x), -1), self._away, self._paired)
        if self._gram is not None and len(rest):
            self._gram.add(rest)
        if self._sum_abs is not None:
            self._sum_abs += x.abs().sum(0, dtype=torch.float32)
        if self._low is not None and self._high is not None:
            low, high = torch.aminmax(x, dim=0)
            self._low = torch.minimum(self._low, low.float())
            self._high = torch.maximum(self._high, high.float())
        if self._sample is not None:
            self._sample.add(x)

    def _pair(self, x: Tensor, other: Tensor, away: Tensor, paired: GramAccumulator) -> Tensor:
        """Add to both what is not extreme; returns the other tokens, as the Gram matrix takes these from `paired`."""
        usual = _usual(x)
        if self._outputs is not None:
            usual &= _usual(other)
        x, other, rest = x[usual], other[usual].float(), x[~usual]
        paired.add(x)
        difference = other if self._outputs is not None else other.sub_(x.float())
        if x.device.type == "cuda" and x.dtype == torch.bfloat16:
            away += torch.mm(difference.to(x.dtype).T, x, out_dtype=torch.float32)
        else:
            with bfloat16_products(x.dtype == torch.bfloat16):
                away.addmm_(difference.T, x.float())
        return rest

    def finish(self) -> InputStats:
        """The statistics; the accumulator's memory is handed over and it must not be used again."""
        gram = None if self._gram is None else self._gram.finish().gram
        paired = None if self._paired is None else self._paired.finish().gram
        if gram is not None and paired is not None:
            gram += paired
        sample = None if self._sample is None else self._sample.finish()
        drift, lag = (self._away, None) if self._outputs is None else (None, self._away)
        return InputStats(gram, self._tokens, self._sum_abs, self._low, self._high, drift, lag, paired, sample)


def _usual(x: Tensor) -> Tensor:
    """Which tokens of x (T, C) are not of extreme energy."""
    energy = x.float().square().sum(-1)
    return energy <= EXTREME * energy.median()


class Sample:
    """Every n-th token in the order in which they come, n a power of two: however they are cut into batches."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._stride, self._seen = 1, 0

    def add(self, x: Tensor) -> None:
        """Add the tokens of `x` (T, C)."""
        self._held.append(x[-self._seen % self._stride :: self._stride].clone())
        self._seen += len(x)
        if sum(map(len, self._held)) > 2 * SAMPLE:
            kept, step = thinned(torch.cat(self._held))
            self._held, self._stride = [kept], self._stride * step

    def finish(self) -> Tensor:
        """The tokens kept."""
        return torch.cat(self._held)


def thinned(rows: Tensor) -> tuple[Tensor, int]:
    """Every n-th row, so that at most 2 * `SAMPLE` are left, and n, a power of two."""
    step = 1
    while len(rows) > 2 * SAMPLE * step:
        step *= 2
    return rows[::step].clone(), step


class GramAccumulator:
    """Sums `x^T x` over batches, one triangle only, in float32.

    Products of 16-bit inputs are exact in float32, so for bfloat16, and on a GPU for float16 too, the fast matrix units
    are used with float32 accumulation; other dtypes are multiplied in float32.

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
        if x.device.type == "cuda" and (exact or x.dtype == torch.float16):
            most = max(1, 2 * x.numel() * x.shape[1] // LEAST_FLOPS)
            for lo, hi in self._block_rows(most, unit=128):  # matrix units want rows that begin at round places
                part = self._sum[lo:hi, lo:]
                if x.shape[1] % 8:  # cuBLAS adds in place to aligned matrices only
                    part += torch.mm(x[:, lo:hi].T, x[:, lo:], out_dtype=torch.float32)
                else:
                    torch.addmm(part, x[:, lo:hi].T, x[:, lo:], out_dtype=torch.float32, out=part)
            return
        with bfloat16_products(exact):
            for part in torch.split(x, CHUNK):
                full = part if part.dtype == torch.float32 else _scratch(part.shape, x.device).copy_(part)
                for lo, hi in self._block_rows():
                    self._sum[lo:hi, lo:].addmm_(full[:, lo:hi].T, full[:, lo:])

    def _block_rows(self, most: int = MOST_ROWS, unit: int = 1) -> Iterator[tuple[int, int]]:
        channels = self._sum.shape[0]
        step = max(BLOCK_ROW, -(-channels // min(most, MOST_ROWS)))
        step += -step % unit
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
