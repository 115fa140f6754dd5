"""Dense bit packing: element i of a row occupies bits [i*b, (i+1)*b) of the row's little-endian bit stream.

32 elements of b bits fill exactly b words of int32. Widths 2, 4, 8 never cross a byte; 3, 5, 6, 7 do. This is the
layout of compressed-tensors since 0.19 (0.17 pads widths that do not divide 32, so the two disagree there).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def words(elements: int, bits: int) -> int:
    """int32 words that hold `elements` values of `bits` bits."""
    return -(-elements * bits // 32)


def unit(bits: int) -> int:
    """Elements that fill whole words."""
    return 32 // math.gcd(32, bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (R, C) int8 in [-2^(b-1), 2^(b-1)) -> (R, words) int32; stored with the offset 2^(b-1)."""
    R, C = codes.shape
    values = torch.nn.functional.pad(codes.to(torch.int16) + (1 << (bits - 1)), (0, -C % 32)).to(torch.uint8)
    # eight elements fill b bytes exactly: assemble them in one int64, then keep its low b bytes
    if bits in (2, 4, 8):
        per_byte = 8 // bits
        parts = values.reshape(R, -1, per_byte)
        packed = parts[..., 0].clone()
        for k in range(1, per_byte):
            packed |= parts[..., k] << (k * bits)
    else:
        eights = values.reshape(R, -1, 8)
        stream = torch.zeros(eights.shape[:2], dtype=torch.int64, device=codes.device)
        for k in range(8):
            stream |= eights[..., k].to(torch.int64) << (k * bits)
        packed = stream.view(torch.uint8).reshape(R, -1, 8)[..., :bits].reshape(R, -1)
    return packed.contiguous().view(torch.int32)[:, : words(C, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: (R, words) int32 -> signed codes (R, columns) int8."""
    R = packed.shape[0]
    octets = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).contiguous().view(torch.uint8)
    mask, offset = (1 << bits) - 1, 1 << (bits - 1)
    if bits in (2, 4, 8):
        per_byte = 8 // bits
        values = torch.stack([(octets >> (k * bits)) & mask for k in range(per_byte)], -1)
    else:
        groups = octets.reshape(R, -1, bits)
        stream = torch.zeros(groups.shape[:2], dtype=torch.int64, device=packed.device)
        for k in range(bits):
            stream |= groups[..., k].to(torch.int64) << (8 * k)
        values = torch.stack([((stream >> (k * bits)) & mask).to(torch.uint8) for k in range(8)], -1)
    signed = values.to(torch.int16) - offset
    return signed.to(torch.int8).reshape(R, -1)[:, :columns].contiguous()
