"""Quantization grids: scales, zero points, rounding, for every strategy and every kind of code alike.

Legend: R out features, C in features, G groups of columns, K candidates. A weight is (code - zero_point) * scale.

| values    | codes                                            | tensor of codes |
|-----------|--------------------------------------------------|-----------------|
| int       | -2^(b-1) .. 2^(b-1) - 1                           | int8            |
| e4m3      | 8-bit floats, to 448 (no infinity)               | float8_e4m3fn   |
| e2m3      | 6-bit floats, to 7.5                             | float8_e4m3fn   |
| e2m1      | 4-bit floats 0, 0.5, 1, 1.5, 2, 3, 4, 6          | float8_e4m3fn   |

The floats of the OCP formats (Rouhani et al. 2023, arXiv 2310.10537) are all values of float8_e4m3fn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

# weights at a time, on a CPU and on a GPU; of the scale search, on a CPU, 2^17 and less were slower
CHUNK, LARGE_CHUNK = 1 << 20, 1 << 26
SHRINK = tuple(1.06 - 0.03 * k for k in range(22))  # candidate scales, as shares of the min-max scale
UPSIDE_DOWN = tuple(-share for share in SHRINK)
# with four bits it pays to let the largest weight be a 4 in place of a 6 (Cook et al. 2025, arXiv 2512.02010)
FOUR_OR_SIX = tuple(1.56 - 0.06 * k for k in range(16))
DOUBLINGS = (2.0, 1.0, 0.5)
E4M3_MAX, E4M3_MIN = 448.0, 2.0**-9

Values = Literal["int", "e4m3", "e2m3", "e2m1"]
Scales = Literal["free", "two-level", "power of two"]
FLOATS = {"e4m3": (3, -6, E4M3_MAX), "e2m3": (3, 0, 7.5), "e2m1": (1, 0, 6.0)}  # mantissa bits, least exponent, largest


@dataclass(frozen=True)
class Grid:
    """What values weights can have.

    Attributes:
        bits: 2 to 8.
        symmetric: no zero point.
        group_size: columns that share a scale; None: the whole row.
        per_tensor: all rows share one scale too.
        scale_dtype: dtype of the model, to which scales are rounded before anything is quantized.
        values: the kind of code; "int", or the float format.
        scales: "free", any number of `scale_dtype`; "two-level", an e4m3 number over one float32 number for the whole
            tensor (NVFP4); "power of two" (MX).
        block_rows: rows that share a scale.
        signed: scales may be negative.
    """

    bits: int
    symmetric: bool
    group_size: int | None
    per_tensor: bool
    scale_dtype: torch.dtype
    values: Values = "int"
    scales: Scales = "free"
    block_rows: int = 1
    signed: bool = True

    @property
    def qmin(self) -> int:
        """The least integer code."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest integer code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """dtype of a tensor of codes."""
        return torch.int8 if self.values == "int" else torch.float8_e4m3fn

    @property
    def full(self) -> float:
        """What the largest weight of a group is mapped to by its min-max scale, symmetric grids."""
        return (self.qmax - self.qmin) / 2 if self.values == "int" else FLOATS[self.values][2]

    @property
    def shares(self) -> tuple[float, ...]:
        """Candidates of the scale search, as shares of the min-max scale.

        Integers have one code more below zero than above; by a negative scale the side with the larger weights has it.
        At 8 bits that is nothing.
        """
        if self.scales == "power of two":
            return DOUBLINGS
        if self.signed and self.symmetric and self.values == "int" and self.bits < 8:
            return SHRINK + UPSIDE_DOWN
        return FOUR_OR_SIX if self.values == "e2m1" else SHRINK

    @property
    def fused(self) -> bool:
        """Whether linears that clients run as one product must share a number: a tensor's float scale, or the one
        on top of the others. The weights of one call of a solver are then such linears."""
        return self.scales == "two-level" or (self.per_tensor and self.values != "int")

    @property
    def rows_alone(self) -> bool:
        """Whether no two rows share a number."""
        return not (self.fused or self.per_tensor) and self.block_rows == 1

    def nearest_(self, x: Tensor) -> Tensor:
        """Round float32 `x` = weight / scale + zero point in place to the nearest value of a code; returns it.

        Ties go to the even code, what is beyond the ends goes to them.
        """
        if self.values == "int":
            return x.round_().clamp_(self.qmin, self.qmax)
        mantissa, least, largest = FLOATS[self.values]
        step = binade(x).clamp_(min=2.0**least).mul_(2.0**-mantissa)
        return x.div_(step).round_().mul_(step).clamp_(-largest, largest)

    def codes(self, values: Tensor) -> Tensor:
        """The tensor of codes that holds what `nearest_` returned; zeros lose their sign."""
        return values.to(torch.int8) if self.values == "int" else (values + 0.0).to(torch.float8_e4m3fn)

    def groups(self, columns: int) -> int:
        return 1 if self.group_size is None else columns // self.group_size

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales as they are stored: each once."""
        return (1,) if self.per_tensor else (rows // self.block_rows, self.groups(columns))

    def once(self, x: Tensor) -> Tensor:
        """Scales or zero points (R, G) as they are stored; copied where that is less."""
        return x[0].clone() if self.per_tensor else x[:: self.block_rows].contiguous()

    def repeated(self, x: Tensor, rows: int) -> Tensor:
        """The inverse of `once`: (R, G)."""
        return x.expand(rows, 1) if self.per_tensor else x.repeat_interleave(self.block_rows, 0)


def binade(x: Tensor) -> Tensor:
    """The power of two at or below |x|, float32; 0 where x is 0 or denormal."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def values_of(codes: Tensor) -> Tensor:
    """Codes as float32; for floats by their bits, some ten times as fast as torch's own conversion on the CPU."""
    if codes.dtype != torch.float8_e4m3fn:
        return codes.to(torch.float32)
    bits = codes.view(torch.uint8).to(torch.int32)
    placed = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)  # exponent and mantissa in float32's places, bias too small
    return placed.view(torch.float32) * 2.0**120


@dataclass(frozen=True)
class QParams:
    """Scale (R, G) in the model's dtype and zero point (R, G) int8, None if symmetric.

    One scale for the whole tensor is (R, 1) with equal rows here, one for a block of rows is repeated, so that no
    solver needs a branch for them.

    Attributes:
        global_scale: (1,) float32, by which all scales are divided; None but for two-level scales.
        g_idx: (C,) int64, the group of each column; None: columns of a group are adjacent.
    """

    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None = None
    g_idx: Tensor | None = None

    def effective(self) -> Tensor:
        """The scale (R, G) float32 that codes are multiplied by."""
        scale = self.scale.to(torch.float32)
        return scale if self.global_scale is None else scale / self.global_scale

    def to(self, device: torch.device | str) -> QParams:
        rest = (None if t is None else t.to(device) for t in (self.zero_point, self.global_scale, self.g_idx))
        return QParams(self.scale.to(device), *rest)

    def by_column(self, x: Tensor) -> Tensor:
        """Scales or zero points (R, G) as they meet the weights: (R, G, 1) for adjacent groups, else (R, C, 1)."""
        return x[..., None] if self.g_idx is None else x[:, self.g_idx, None]

    def rows(self, lo: int, hi: int) -> QParams:
        return self.of(slice(lo, hi))

    def of(self, index: int | slice | Tensor) -> QParams:
        """Those of some rows, or of one problem where scale and zero point of several are stacked: (E, R, G)."""
        zero = None if self.zero_point is None else self.zero_point[index]
        return replace(self, scale=self.scale[index], zero_point=zero)

    def reshaped(self, *rows: int) -> QParams:
        """Scale and zero point with these dimensions in place of R, or of E and R."""
        zero = None if self.zero_point is None else self.zero_point.reshape(*rows, self.zero_point.shape[-1])
        return replace(self, scale=self.scale.reshape(*rows, self.scale.shape[-1]), zero_point=zero)

    @classmethod
    def stack(cls, found: Sequence[QParams]) -> QParams:
        """Scales and zero points (E, R, G) of several problems, which share a global scale if they have any."""
        zeros = [q.zero_point for q in found if q.zero_point is not None]
        scale = torch.stack([q.scale for q in found])
        return cls(scale, torch.stack(zeros) if zeros else None, found[0].global_scale)


@dataclass(frozen=True)
class Solved:
    """A solved linear: codes (R, C) with their parameters, or a dense weight, and the error that was made.

    Attributes:
        codes: (R, C); None if the linear is not quantized.
        qparams: of the codes.
        error: share of the layer's output energy that is lost, tr(dW G dW^T) / tr(W G W^T); without data, of the
            weight's own energy.
        weight: (R, C) as it is stored, where there are no codes.
        beside: tensors that are stored beside the weight, such as `input_scale`, by suffix.
        note: what the report is to say of how it was solved.
    """

    codes: Tensor | None
    qparams: QParams | None
    error: Tensor
    weight: Tensor | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    note: str = ""

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


def quantize(weight: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Round to nearest: codes (R, C) of a weight (R, C) float32."""
    R, C = weight.shape
    scale = qparams.by_column(qparams.effective())
    x = weight.reshape(R, scale.shape[1], -1) / scale
    if qparams.zero_point is not None:
        x += qparams.by_column(qparams.zero_point.float())
    return grid.codes(grid.nearest_(x)).reshape(R, C)


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """Weights (R, C) of codes (R, C), in the scales' dtype: one product, rounded once."""
    R, C = codes.shape
    scale = qparams.by_column(qparams.effective())
    x = values_of(codes).reshape(R, scale.shape[1], -1)
    if qparams.zero_point is not None:
        x = x - qparams.by_column(qparams.zero_point.to(torch.float32))
    return (x * scale).add_(0.0).to(qparams.scale.dtype).reshape(R, C)  # a zero has no sign
