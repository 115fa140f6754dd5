"""Quantization grids: scales, zero points, rounding, for tensor, channel and group alike.

Legend: R out features, C in features, G groups of columns, K candidates. `codes` are signed integers in
[qmin, qmax] = [-2^(b-1), 2^(b-1) - 1]; a weight is (code - zero_point) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitpress.math.stats import bfloat16_products

CHUNK = 1 << 20  # weights per chunk of the scale search; 2^17 and less were slower
SHRINK = tuple(1.06 - 0.03 * k for k in range(22))  # candidate scales, as shares of the min-max scale


@dataclass(frozen=True)
class Grid:
    """An integer grid.

    Attributes:
        bits: 2 to 8.
        symmetric: no zero point.
        group_size: columns that share a scale; None: the whole row.
        per_tensor: all rows share one scale too.
        scale_dtype: dtype in which scales are stored; they are rounded to it before anything is quantized.
    """

    bits: int
    symmetric: bool
    group_size: int | None
    per_tensor: bool
    scale_dtype: torch.dtype

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def nearest_(self, x: Tensor) -> Tensor:
        """Round `x` = weight / scale + zero point in place to the nearest value that a code can have; returns it."""
        return x.round_().clamp_(self.qmin, self.qmax)

    def groups(self, columns: int) -> int:
        return 1 if self.group_size is None else columns // self.group_size


@dataclass(frozen=True)
class QParams:
    """Scale (R, G) in the stored dtype and zero point (R, G) int8, None if symmetric.

    One scale for the whole tensor is (R, 1) with equal rows here, so that no solver needs a branch for it.
    """

    scale: Tensor
    zero_point: Tensor | None

    def to(self, device: torch.device | str) -> QParams:
        zero = None if self.zero_point is None else self.zero_point.to(device)
        return QParams(self.scale.to(device), zero)

    def rows(self, lo: int, hi: int) -> QParams:
        zero = None if self.zero_point is None else self.zero_point[lo:hi]
        return replace(self, scale=self.scale[lo:hi], zero_point=zero)


@dataclass(frozen=True)
class Solved:
    """A solved linear: codes (R, C) with their parameters, or a dense weight, and the error that was made.

    Attributes:
        codes: (R, C) int8; None if the linear is not quantized.
        qparams: of the codes.
        error: share of the layer's output energy that is lost, tr(dW G dW^T) / tr(W G W^T); without data, of the
            weight's own energy.
        weight: (R, C) as it is stored, where there are no codes.
    """

    codes: Tensor | None
    qparams: QParams | None
    error: Tensor
    weight: Tensor | None = None

    def dense(self) -> Tensor:
        """The weight (R, C) that a reader of the checkpoint computes, in the dtype of the scales or as stored."""
        if self.weight is not None:
            return self.weight
        codes, qparams = self.quantized
        return dequantize(codes, qparams)

    @property
    def quantized(self) -> tuple[Tensor, QParams]:
        """Codes and their parameters; only for a quantized linear."""
        assert self.codes is not None and self.qparams is not None
        return self.codes, self.qparams


def find_qparams(
    weight: Tensor, grid: Grid, importance: Tensor | None = None, search: bool = False, share: float = 1.0
) -> QParams:
    """Scales and zero points of a weight.

    Without `search` the range of each group is covered (min-max; symmetric: absmax / (qmax + 0.5), so that the
    largest weight errs by at most half a step). With it, each group takes, among `SHRINK` shares of that range,
    the one with the least sum of importance * error^2. With importance = diag(Gram) this is the group's output
    error if its inputs were uncorrelated; plain weight error (importance None) is known to be worse for GPTQ.

    Args:
        weight: (R, C) float32.
        grid: the target grid.
        importance: (C,) non-negative weights of the columns, or None for all equal.
        search: search the scale instead of covering the range.
        share: without search, the share of the range that is covered.

    Returns:
        scale (R, G) in `grid.scale_dtype`, zero point (R, G) int8 or None.
    """
    R, C = weight.shape
    G = grid.groups(C)
    grouped = weight.reshape(R, G, C // G)
    low, high = grouped.amin(-1), grouped.amax(-1)
    if grid.per_tensor:
        low, high = low.amin().expand(R, G), high.amax().expand(R, G)
    if not search:
        return _from_range(low * share, high * share, grid)
    if importance is None:
        importance = torch.ones(C, device=weight.device)
    importance = importance.reshape(1, G, C // G).float()
    candidates = [_from_range(low * share, high * share, grid) for share in SHRINK]
    losses = [_squared_error(grouped, c, importance, grid) for c in candidates]
    if grid.per_tensor:
        losses = [loss.sum().expand(R, G) for loss in losses]
    best = torch.stack(losses).argmin(0, keepdim=True)
    scale = torch.stack([c.scale for c in candidates]).gather(0, best)[0]
    if grid.symmetric:
        return QParams(scale, None)
    zeros = torch.stack([c.zero_point for c in candidates if c.zero_point is not None])
    return QParams(scale, zeros.gather(0, best)[0])


def _from_range(low: Tensor, high: Tensor, grid: Grid) -> QParams:
    """The grid over [low, high] (R, G), extended to contain zero."""
    levels = grid.qmax - grid.qmin
    if grid.symmetric:
        scale = torch.maximum(low.abs(), high.abs()) * (2 / levels)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / levels
    smallest = torch.finfo(grid.scale_dtype).tiny
    scale = torch.where(scale > 0, scale.clamp(min=smallest), 1.0).to(grid.scale_dtype)
    if grid.symmetric:
        return QParams(scale, None)
    zero = (grid.qmin - low / scale.float()).round().clamp(grid.qmin, grid.qmax)
    return QParams(scale, zero.to(torch.int8))


def _squared_error(grouped: Tensor, qparams: QParams, importance: Tensor, grid: Grid) -> Tensor:
    """sum over a group of importance * (rounded - weight)^2: (R, G)."""
    R, G, size = grouped.shape
    loss = torch.empty(R, G, device=grouped.device)
    step = max(1, CHUNK // (G * size))
    for lo in range(0, R, step):
        part = qparams.rows(lo, lo + step)
        scale = part.scale.float()[..., None]
        w = grouped[lo : lo + step]
        x = w / scale
        if part.zero_point is None:
            x = grid.nearest_(x)
        else:
            zero = part.zero_point.float()[..., None]
            x = grid.nearest_(x.add_(zero)).sub_(zero)
        x = x.mul_(scale).sub_(w).square_()
        loss[lo : lo + step] = x.mul_(importance).sum(-1)
    return loss


def quantize(weight: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Round to nearest: codes (R, C) int8 of a weight (R, C) float32."""
    R, C = weight.shape
    G = qparams.scale.shape[1]
    x = weight.reshape(R, G, C // G) / qparams.scale.float()[..., None]
    if qparams.zero_point is not None:
        x += qparams.zero_point.float()[..., None]
    return grid.nearest_(x).to(torch.int8).reshape(R, C)


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """Weights (R, C) of codes (R, C), in the scales' dtype: one product, rounded once."""
    R, C = codes.shape
    scale = qparams.scale
    G = scale.shape[1]
    x = codes.reshape(R, G, C // G).to(torch.float32)
    if qparams.zero_point is not None:
        x = x - qparams.zero_point.to(torch.float32)[..., None]
    return (x * scale.to(torch.float32)[..., None]).to(scale.dtype).reshape(R, C)


def settle(solved: Solved, grid: Grid) -> Solved:
    """The same weights, by the codes that rounding them gives again.

    Eight bits with zero points are finer than bfloat16: two codes may mean one weight, or, in one of some thousands,
    weights that differ in their last bit. A dense copy could not tell which it was.
    """
    if grid.symmetric or grid.bits < 8 or grid.scale_dtype != torch.bfloat16:
        return solved
    return replace(solved, codes=quantize(solved.dense().float(), solved.quantized[1], grid))


def relative_error(weight: Tensor, dense: Tensor, gram: Tensor | None) -> Tensor:
    """Share of energy lost by storing `dense` for `weight` (R, C): of the output, of the weight without a Gram matrix.

    tr(dW G dW^T) / tr(W G W^T), or |dW|^2 / |W|^2.
    """
    delta = dense.float() - weight
    if gram is None:
        return delta.square().sum() / weight.square().sum().clamp(min=1e-30)
    with bfloat16_products(True):  # a figure for the report: three digits are enough
        lost, kept = ((x @ gram).mul_(x).sum() for x in (delta, weight))
    return lost / kept.clamp(min=1e-30)


def solved(weight: Tensor, codes: Tensor, qparams: QParams, gram: Tensor | None) -> Solved:
    """A `Solved` with its error, measured with the Gram matrix (C, C) if there is one."""
    return Solved(codes, qparams, relative_error(weight, dequantize(codes, qparams), gram))
