"""GGUF, the format of llama.cpp: one file, weights in blocks of 32 columns, each with its own scale.

| type | a block                                    | holds, exactly                                      |
|------|--------------------------------------------|-----------------------------------------------------|
| Q4_0 | float16 d, 16 bytes of codes               | integers of up to 4 bits without zero points        |
| Q4_1 | float16 d, float16 m, 16 bytes of codes    | up to 4 bits with zero points; m is rounded         |
| Q8_0 | float16 d, 32 int8                         | 5 to 8 bits without zero points                     |

Shards hold a linear's blocks as bytes (R, C / 32 * bytes of a block); at the end they are put together in one file
(`bitpress.formats.gguf_file`), with the other tensors in float16, vectors in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.errors import NumericsError
from bitpress.formats.base import CheckpointFormat, Spec, grid_of, kind_of, unknown_error
from bitpress.math.grid import QParams, Solved
from bitpress.schemes import Scheme

BLOCK = 32
BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
FILE = "model.gguf"


def type_of(scheme: Scheme) -> str:
    """The tensor type that holds a scheme of integers."""
    if not scheme.weights.symmetric:
        return "q4_1"
    return "q4_0" if scheme.weights.num_bits <= 4 else "q8_0"


class GGUF(CheckpointFormat):
    """A file that llama.cpp loads, with the tokenizer inside."""

    name = "gguf"
    method = "gguf"
    rounds = True
    one_file = True

    def refusal(self, scheme: Scheme, actorder: str | None) -> str | None:
        args = scheme.weights
        if args.type != "int":
            return f"holds integers only, not {kind_of(args)}"
        if not args.symmetric and args.num_bits > 4:
            return f"has no type for {args.num_bits} bits with zero points; use a symmetric scheme, or 4 bits"
        if args.group_size and args.group_size % BLOCK:
            return f"has blocks of {BLOCK} columns, which groups of {args.group_size} do not consist of"
        if actorder == "group":
            return "has blocks of adjacent columns only, not actorder: 'group'; use 'static'"
        return None

    def misfit(self, scheme: Scheme, rows: int, columns: int) -> str | None:
        return f"{columns} input columns are not divisible into blocks of {BLOCK}" if columns % BLOCK else None

    def unfit(self, config: Any, folder: Path | None, dtype: torch.dtype, quantized: bool) -> list[str]:
        from bitpress.formats.gguf_file import model_faults

        found = model_faults(config, folder)
        if quantized and dtype == torch.float32:
            found.append("its scales are float16, and this model's are float32: quantize it with --dtype bfloat16")
        return found

    def describe(self, scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Spec:
        kind = type_of(scheme)
        return {kind: (torch.uint8, (rows, columns // BLOCK * BYTES[kind]))}

    def pack(self, solved: Solved, scheme: Scheme) -> dict[str, Tensor]:
        codes, qparams = solved.quantized
        kind, R = type_of(scheme), len(codes)
        blocks = codes.reshape(R, -1, BLOCK)
        each = blocks.shape[1] // qparams.scale.shape[1]
        d = exact_half(qparams.scale).repeat_interleave(each, 1)
        parts = [_bytes(d)]
        if qparams.zero_point is not None:
            lowest = -(qparams.zero_point.float() + 8) * qparams.scale.float()
            parts.append(_bytes(lowest.to(torch.float16).repeat_interleave(each, 1)))
        if kind == "q8_0":
            parts.append(blocks.contiguous().view(torch.uint8))
        else:
            stored = (blocks + 8).to(torch.uint8)
            parts.append(stored[..., : BLOCK // 2] | (stored[..., BLOCK // 2 :] << 4))
        return {kind: torch.cat(parts, -1).reshape(R, -1)}

    def unpack(self, tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Solved:
        kind = type_of(scheme)
        blocks = tensors[kind].reshape(len(tensors[kind]), -1, BYTES[kind])
        d = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
        head = BYTES[kind] - (BLOCK if kind == "q8_0" else BLOCK // 2)
        if kind == "q8_0":
            codes = blocks[..., head:].contiguous().view(torch.int8)
        else:
            packed = blocks[..., head:]
            codes = (torch.cat([packed & 15, packed >> 4], -1).to(torch.int16) - 8).to(torch.int8)
        R = len(blocks)
        if kind == "q4_1":
            m = blocks[..., 2:4].contiguous().view(torch.float16)[..., 0].float()
            weight = (codes.float() + 8) * d.float()[..., None] + m[..., None]
            return Solved(None, None, unknown_error(), weight=weight.to(dtype).reshape(R, -1))
        grid = grid_of(scheme, dtype)
        each = 1 if grid.group_size is None else grid.group_size // BLOCK
        scale = d[:, ::each] if grid.group_size is not None else d[:, :1]
        return Solved(codes.reshape(R, -1), QParams(scale.to(dtype), None), unknown_error())

    def complete(self, folder: Path, files: Sequence[Path], config: Any) -> None:
        from bitpress.formats.gguf_file import assemble

        assemble(folder / FILE, folder, files, config)


def exact_half(scale: Tensor) -> Tensor:
    """Scales as float16; NumericsError where that rounds."""
    half = scale.to(torch.float16)
    if not torch.equal(half.to(scale.dtype), scale):
        worst = scale[half.to(scale.dtype) != scale].abs().min()
        raise NumericsError(
            f"a scale of {float(worst):.3g} is no float16 number, which GGUF needs; leave this linear dense (ignore)"
        )
    return half


def _bytes(x: Tensor) -> Tensor:
    """(R, G) float16 as (R, G, 2) uint8."""
    return x.contiguous().view(torch.uint8).reshape(*x.shape, 2)
