"""Scales and zero points: the range of a weight's groups, or the share of it that loses the least.

Legend: R out features, C in features, G groups of columns, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from bitpress.math.grid import CHUNK, E4M3_MAX, E4M3_MIN, FLOATS, Grid, QParams, values_of


def find_qparams(
    weight: Tensor, grid: Grid, importance: Tensor | None = None, search: bool = False, share: float | Tensor = 1.0
) -> QParams:
    """Scales and zero points of a weight.

    Without `search` the range of each group is covered (min-max; symmetric integers: absmax / (qmax + 0.5), so that
    the largest weight errs by at most half a step; floats: the largest weight is the largest code; powers of two: the
    smallest at which the largest weight errs by at most half a step). With it, each group takes, among `grid.shares`
    of that range, the one with the least sum of importance * error^2; a negative share is a negative scale. With
    importance = diag(Gram) this is the group's output error if its inputs were uncorrelated; plain weight error
    (importance None) is known to be worse for GPTQ.

    Args:
        weight: (R, C) float32.
        grid: the target grid.
        importance: (C,) non-negative weights of the columns, or (P, C) of each P-th of the rows; None: all equal.
        search: search the scale instead of covering the range.
        share: without search, the share of the range that is covered, one for all or (R, G).

    Returns:
        scale (R, G) in `grid.scale_dtype`, zero point (R, G) int8 or None, global scale (1,) float32 or None.
    """
    R, C = weight.shape
    G = grid.groups(C)
    grouped = weight.reshape(R, G, C // G)
    low, high = _shared(grouped.amin(-1), grid, torch.amin), _shared(grouped.amax(-1), grid, torch.amax)
    top = global_scale(low, high) if grid.scales == "two-level" else None
    if not search:
        return _from_range(low * share, high * share, grid, top)
    if importance is None:
        importance = torch.ones(C, device=weight.device)
    shares = _on(weight.device, tuple(grid.shares))[:, None, None]
    tried = _from_range(low * shares, high * shares, grid, top)
    if weight.device.type == "cuda":  # a launch for each candidate would take longer than the work
        from bitpress.math.kernels.search import losses_of

        return least_of(tried, losses_of(weight, tried, importance, grid), grid)
    importance = importance.float().reshape(-1, G, C // G)
    importance = importance if len(importance) == 1 else importance.repeat_interleave(R // len(importance), 0)
    losses = [_squared_error(grouped, tried.of(k), importance, grid) for k in range(len(shares))]
    return least_of(tried, torch.stack(losses), grid)


@cache
def _on(device: torch.device, numbers: tuple[float, ...]) -> Tensor:
    """Numbers on a device: to send them each time, it would be waited for."""
    return torch.tensor(numbers, device=device)


def least(candidates: Sequence[QParams], losses: Sequence[Tensor], grid: Grid) -> QParams:
    """Of parameters that differ in their scales, for each scale the one with the least loss (R, G)."""
    return least_of(QParams.stack(candidates), torch.stack(list(losses)), grid)


def least_of(tried: QParams, losses: Tensor, grid: Grid) -> QParams:
    """`least` of candidates stacked to (K, R, G)."""
    best = torch.stack([_shared(loss, grid, torch.sum) for loss in losses]).argmin(0, keepdim=True)
    zero = None if tried.zero_point is None else tried.zero_point.gather(0, best)[0]
    return QParams(tried.scale.gather(0, best)[0], zero, tried.global_scale)


def find_all(
    weights: Sequence[Tensor], grid: Grid, importance: Tensor | None = None, search: bool = False,
    shares: Sequence[Tensor] | None = None,
) -> list[QParams]:  # fmt: skip
    """`find_qparams` of weights with the same columns; on a fused grid they share what must be shared."""
    if not grid.fused:
        given: Sequence[float | Tensor] = [1.0] * len(weights) if shares is None else shares
        return [find_qparams(w, grid, importance, search, share) for w, share in zip(weights, given, strict=True)]
    share = 1.0 if shares is None else torch.cat(list(shares))
    both = find_qparams(torch.cat(list(weights)), grid, importance, search, share)
    ends = list(accumulate(len(w) for w in weights))
    return [both.rows(end - len(w), end) for w, end in zip(weights, ends, strict=True)]


def _shared(x: Tensor, grid: Grid, reduce: Callable[..., Tensor]) -> Tensor:
    """Extremes or sums (R, G) over all that shares a scale, repeated to (R, G)."""
    R, G = x.shape
    if grid.per_tensor:
        return reduce(x).expand(R, G)
    if grid.block_rows == 1:
        return x
    blocks = reduce(x.reshape(R // grid.block_rows, grid.block_rows, G), 1)
    return blocks.repeat_interleave(grid.block_rows, 0)


def global_scale(low: Tensor, high: Tensor) -> Tensor:
    """By what e4m3 scales are divided for the largest group's to be the largest e4m3 number, (1,) float32."""
    absmax = torch.maximum(low.float().abs().amax(), high.float().abs().amax())
    top = E4M3_MAX * FLOATS["e2m1"][2] / absmax
    return torch.where(absmax > 0, top.clamp(max=torch.finfo(torch.float32).max), 1.0).reshape(1)


def _from_range(low: Tensor, high: Tensor, grid: Grid, top: Tensor | None) -> QParams:
    """The grid over [low, high] (R, G), extended to contain zero; upside down if low > high."""
    if grid.symmetric:
        scale = _stored(torch.maximum(low.abs(), high.abs()), grid, top)
        return QParams(torch.where(low > high, -scale, scale), None, top)
    levels = grid.qmax - grid.qmin
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _normal((high - low) / levels, grid)
    zero = (grid.qmin - low / scale.float()).round().clamp(grid.qmin, grid.qmax)
    return QParams(scale, zero.to(torch.int8))


def _stored(absmax: Tensor, grid: Grid, top: Tensor | None) -> Tensor:
    """Symmetric scales (R, G) as they are stored, in `grid.scale_dtype`, where all of these numbers are exact."""
    if grid.scales == "power of two":
        _, exponent = torch.frexp(absmax / _limit(grid))
        least, most = (-24, 15) if grid.scale_dtype == torch.float16 else (-126, 127)
        exponent = torch.where(absmax > 0, exponent.clamp(least, most), 0)
        return torch.ldexp(torch.ones_like(absmax), exponent).to(grid.scale_dtype)
    if top is None:
        return _normal(absmax * (1.0 / grid.full), grid)
    local = (absmax * (top / grid.full)).clamp(E4M3_MIN, E4M3_MAX)
    local = torch.where(absmax > 0, local, 1.0)
    return values_of(local.to(torch.float8_e4m3fn)).to(grid.scale_dtype)


def _limit(grid: Grid) -> float:
    """The largest value that errs by at most half the last step when it is cut down to the largest code."""
    mantissa, _, largest = FLOATS[grid.values]
    return largest + 2.0 ** (math.floor(math.log2(largest)) - mantissa - 1)


def _normal(scale: Tensor, grid: Grid) -> Tensor:
    smallest = torch.finfo(grid.scale_dtype).tiny
    return torch.where(scale > 0, scale.clamp(min=smallest), 1.0).to(grid.scale_dtype)


def _squared_error(grouped: Tensor, qparams: QParams, importance: Tensor, grid: Grid) -> Tensor:
    """sum over a group of importance * (rounded - weight)^2: (R, G)."""
    R, G, size = grouped.shape
    loss = torch.empty(R, G, device=grouped.device)
    step = max(1, CHUNK // (G * size))
    for lo in range(0, R, step):
        part = qparams.rows(lo, lo + step)
        scale = part.effective()[..., None]
        w = grouped[lo : lo + step]
        x = w / scale
        if part.zero_point is None:
            x = grid.nearest_(x)
        else:
            zero = part.zero_point.float()[..., None]
            x = grid.nearest_(x.add_(zero)).sub_(zero)
        x = x.mul_(scale).sub_(w).square_()
        loss[lo : lo + step] = x.mul_(importance if len(importance) == 1 else importance[lo : lo + step]).sum(-1)
    return loss
