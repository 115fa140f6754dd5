"""AWQ's format, gemm layout: 4-bit codes in int32 words, packed along the output rows.

qweight (C, R / 8) int32; qzeros (G, R / 8) int32; scales (G, R). Codes and zero points have the offset 8; the eight of
a word come in the order of `ORDER`, as its kernels read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitpress.formats import bits
from bitpress.formats.base import CheckpointFormat, Spec, grid_of, kind_of, unknown_error
from bitpress.math.grid import QParams, Solved
from bitpress.schemes import QuantArgs, Scheme

if TYPE_CHECKING:
    from bitpress.sites import Site

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BACK = tuple(ORDER.index(i) for i in range(8))


class AWQ(CheckpointFormat):
    """Weights that vLLM and transformers (with gptqmodel) read as `awq`."""

    name = "awq"
    method = "awq"
    mixed = False

    def refusal(self, scheme: Scheme, actorder: str | None) -> str | None:
        args = scheme.weights
        if args.type != "int" or args.num_bits != 4:
            return f"holds 4-bit integers only, not {kind_of(args)}"
        if args.strategy not in ("group", "channel"):
            return f"has one scale a group of columns or a row, not one a {args.strategy}"
        if actorder == "group":
            return "has groups of adjacent columns only, not actorder: 'group'; use 'static' or --format gptq"
        return None

    def misfit(self, scheme: Scheme, rows: int, columns: int) -> str | None:
        return f"{rows} output rows do not fill words of 32 bits: they must be divisible by 8" if rows % 8 else None

    def together(self, sites: Sequence[Site], ignored: Sequence[str]) -> list[str]:
        sizes = {s.scheme.weights.group_size: s.name for s in sites if s.scheme is not None}
        found = []
        if len(sizes) > 1:
            some = ", ".join(f"{name} has {size or 'one a row'}" for size, name in sizes.items())
            found.append(f"awq: has one group size for all linears, but {some}; use --format gptq")
        for name in ignored:  # clients look for these as parts of names
            if (hit := next((s.name for s in sites if name in s.name), None)) is not None:
                found.append(f"awq: cannot leave {name} and quantize {hit}, whose name contains it; use --format gptq")
        return found

    def describe(self, scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Spec:
        groups = grid_of(scheme, dtype).groups(columns)
        return {
            "qweight": (torch.int32, (columns, rows // 8)),
            "qzeros": (torch.int32, (groups, rows // 8)),
            "scales": (dtype, (groups, rows)),
        }

    def pack(self, solved: Solved, scheme: Scheme) -> dict[str, Tensor]:
        codes, qparams = solved.quantized
        scales = qparams.scale.T.contiguous()
        zero = qparams.zero_point
        zeros = torch.zeros_like(scales, dtype=torch.int8) if zero is None else zero.T.contiguous()
        return {
            "qweight": bits.pack(_reordered(codes.T, ORDER), 4),
            "qzeros": bits.pack(_reordered(zeros, ORDER), 4),
            "scales": scales,
        }

    def unpack(self, tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Solved:
        scale = tensors["scales"].T.contiguous()
        codes, zero = (
            _reordered(bits.unpack(tensors[name], 4, len(scale)), BACK).T.contiguous() for name in ("qweight", "qzeros")
        )
        return Solved(codes, QParams(scale, None if scheme.weights.symmetric else zero), unknown_error())

    def settings(self, sites: Sequence[Site], ignored: Sequence[str], cache: QuantArgs | None) -> dict[str, Any] | None:
        if not sites:
            return None
        assert sites[0].scheme is not None
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": sites[0].scheme.weights.group_size or -1,
            "zero_point": True,  # symmetric weights have them too, all in the middle
            "version": "gemm",
            "modules_to_not_convert": list(ignored),
            **({"lm_head": True} if any(s.block is None for s in sites) else {}),
        }


def _reordered(codes: Tensor, order: Sequence[int]) -> Tensor:
    """Every eight adjacent codes of a row in another order."""
    eights = codes.reshape(codes.shape[0], -1, 8)[..., list(order)]
    return eights.reshape(codes.shape).contiguous()
