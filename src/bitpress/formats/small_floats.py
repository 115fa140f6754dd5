"""Packing of 4-bit (e2m1) and 6-bit (e2m3) floats, which come as the float8_e4m3fn numbers of the same value.

A float's code is its sign bit over its magnitude's rank, which is what its exponent and mantissa bits count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.math.grid import values_of

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M3 = tuple(m / 8 for m in range(8)) + tuple((1 + m / 8) * 2**e for e in range(3) for m in range(8))


def pack4(codes: Tensor) -> Tensor:
    """(R, C) -> (R, C / 2) uint8, the first of a pair in the low bits."""
    bits = _bits(codes, E2M1, 3).reshape(codes.shape[0], -1, 2)
    return bits[..., 0] | (bits[..., 1] << 4)


def unpack4(packed: Tensor) -> Tensor:
    """The inverse of `pack4`."""
    pairs = torch.stack([packed & 15, packed >> 4], -1)
    return _codes(pairs, E2M1, 3).reshape(packed.shape[0], -1)


def pack6(codes: Tensor) -> Tensor:
    """(R, C) -> (R, 3 C / 4) uint8: four codes in three bytes, little-endian."""
    fours = _bits(codes, E2M3, 5).reshape(codes.shape[0], -1, 4).to(torch.int32)
    word = fours[..., 0] | (fours[..., 1] << 6) | (fours[..., 2] << 12) | (fours[..., 3] << 18)
    octets = torch.stack([word & 255, (word >> 8) & 255, word >> 16], -1)
    return octets.to(torch.uint8).reshape(codes.shape[0], -1)


def unpack6(packed: Tensor) -> Tensor:
    """The inverse of `pack6`."""
    threes = packed.reshape(packed.shape[0], -1, 3).to(torch.int32)
    word = threes[..., 0] | (threes[..., 1] << 8) | (threes[..., 2] << 16)
    fours = torch.stack([(word >> shift) & 63 for shift in (0, 6, 12, 18)], -1).to(torch.uint8)
    return _codes(fours, E2M3, 5).reshape(packed.shape[0], -1)


def _bits(codes: Tensor, magnitudes: tuple[float, ...], sign: int) -> Tensor:
    """uint8 with the sign at bit `sign`; zeros have none."""
    values = values_of(codes)
    rank = torch.searchsorted(torch.tensor(magnitudes, device=codes.device), values.abs()).to(torch.uint8)
    return rank | ((values < 0).to(torch.uint8) << sign)


def _codes(bits: Tensor, magnitudes: tuple[float, ...], sign: int) -> Tensor:
    table = torch.tensor(magnitudes, device=bits.device)
    both = torch.cat([table, -table]).to(torch.float8_e4m3fn).view(torch.uint8)
    found: Tensor = both[bits.long() & ((2 << sign) - 1)]
    return found.view(torch.float8_e4m3fn)
