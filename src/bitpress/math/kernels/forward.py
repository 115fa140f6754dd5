"""What lies between the products of a block's forward, on a GPU in one launch each, number for number as transformers
has it: RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), SiLU with its gate (Shazeer 2020, arXiv 2002.05202), rotary
embedding (Su et al. 2021, arXiv 2104.09864).

transformers' own take six, two and ten launches, each of which reads and writes the whole tensor. Every rounding to the
tensor's dtype between two of them is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 8192  # of a tile of rows
TILE = 2048  # numbers of a program that needs no rows


@triton.jit  # type: ignore[untyped-decorator]
def _norm(x, gain, out, rows, C, eps, B: tl.constexpr, T: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    column = tl.arange(0, B)
    at = row[:, None] * C + column[None, :]
    mask = (row < rows)[:, None] & (column < C)[None, :]
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=1) / C + eps)
    kind = out.dtype.element_ty
    v = (v * scale[:, None]).to(kind).to(tl.float32)
    g = tl.load(gain + column, mask=column < C, other=0.0).to(tl.float32)
    tl.store(out + at, (v * g[None, :]).to(kind), mask=mask)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain * (x / sqrt(mean(x^2) + eps)) over the last dimension, (..., C), the quotient rounded to x's dtype first."""
    C = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // C
    width = triton.next_power_of_2(C)
    tile = max(1, ELEMENTS // width)
    _norm[(triton.cdiv(rows, tile),)](x, gain, out, rows, C, eps, B=width, T=tile, num_warps=8)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _gate(gate, up, out, count, T: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    mask = at < count
    kind = out.dtype.element_ty
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    g = (g / (1.0 + tl.exp(-g))).to(kind).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (g * u).to(kind), mask=mask)


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors of one shape and dtype, the SiLU rounded to it first."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _gate[(triton.cdiv(out.numel(), TILE),)](gate, up, out, out.numel(), T=TILE)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(x, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """A float32 number rounded to another dtype. Of 16 bits by its bits: the compiler makes products that are cut and
    added one operation, which rounds once."""
    if kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # the bits of a GPU's NaN would run over
    if kind == tl.float16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
        near = tl.where(tl.abs(x) < 2.0**-14, (x + 0.75) - 0.75, bits.to(tl.float32, bitcast=True))  # steps of 2^-24
        large = tl.where(tl.abs(x) >= 65520.0, tl.where(x > 0, float("inf"), float("-inf")), near)
        return tl.where(x == x, large, x)
    return x.to(kind).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]  # the compiler reads annotations
    x, cos, sin, out, L, H, D, x_batch, x_head, x_token, o_batch, o_head, o_token, turn_batch, turn_token,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    batch, token = (tl.program_id(0) // L).to(tl.int64), (tl.program_id(0) % L).to(tl.int64)
    head, place = tl.arange(0, HEADS), tl.arange(0, HALF)
    half = D // 2
    inside = place < half
    mask = (head < H)[:, None] & inside[None, :]
    kind = out.dtype.element_ty
    turn = batch * turn_batch + token * turn_token + place
    c1 = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + turn + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + turn + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = batch * x_batch + head[:, None].to(tl.int64) * x_head + token * x_token + place[None, :]
    x1 = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + at + half, mask=mask, other=0.0).to(tl.float32)
    first = _rounded(x1 * c1, kind) + _rounded(-x2 * s1, kind)
    second = _rounded(x2 * c2, kind) + _rounded(x1 * s2, kind)
    to = batch * o_batch + head[:, None].to(tl.int64) * o_head + token * o_token + place[None, :]
    tl.store(out + to, _rounded(first, kind).to(kind), mask=mask)
    tl.store(out + to + half, _rounded(second, kind).to(kind), mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (-x2, x1) * sin of queries or keys (B, H, L, D) whose halves are x1 and x2, each product rounded first.

    Args:
        cos, sin: (B or 1, L, D), of x's dtype.
    """
    B, H, L, D = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    _rotate[(B * L,)](
        x, cos, sin, out, L, H, D, *x.stride()[:3], *out.stride()[:3], 0 if len(cos) == 1 else L * D, D,
        HEADS=triton.next_power_of_2(H), HALF=triton.next_power_of_2(D // 2),
    )  # fmt: skip
    return out
