"""GPTQ's format: integer codes of 2, 3, 4 or 8 bits in int32 words, packed along the input columns.

qweight (C b / 32, R) int32; qzeros (G, R b / 32) int32; scales (G, R); g_idx (C,) int32, the group of each column.
Codes are stored with the offset 2^(b-1). Zero points too, in version 2 ("gptq_v2") as they are, in version 1 ("gptq")
less one, so that 0 cannot be stored there: asymmetric weights are written in version 2. Three bits straddle words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitpress import __version__
from bitpress.formats import bits
from bitpress.formats.base import CheckpointFormat, Spec, grid_of, kind_of, unknown_error
from bitpress.math.grid import QParams, Solved
from bitpress.schemes import QuantArgs, Scheme

if TYPE_CHECKING:
    from bitpress.sites import Site

WIDTHS = (2, 3, 4, 8)


class GPTQ(CheckpointFormat):
    """Weights that gptqmodel, transformers with it, vLLM and SGLang read.

    Args:
        version: 1, or 2.
    """

    method = "gptq"

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = "gptq" if version == 1 else "gptq_v2"

    def refusal(self, scheme: Scheme, actorder: str | None) -> str | None:
        args = scheme.weights
        if args.type != "int":
            return f"holds integers only, not {kind_of(args)}"
        if args.num_bits not in WIDTHS:
            return f"holds 2, 3, 4 and 8 bits, not {args.num_bits}"
        if args.strategy not in ("group", "channel"):
            return f"has one scale a group of columns or a row, not one a {args.strategy}"
        if self.version == 1 and not args.symmetric:
            return "version 1 cannot store a zero point of 0; use gptq_v2"
        return None

    def misfit(self, scheme: Scheme, rows: int, columns: int) -> str | None:
        unit = bits.unit(scheme.weights.num_bits)
        if rows % unit or columns % unit:
            return f"{rows} x {columns} does not fill words of 32 bits: both must be divisible by {unit}"
        return None

    def describe(self, scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Spec:
        grid, width = grid_of(scheme, dtype), scheme.weights.num_bits
        groups = grid.groups(columns)
        return {
            "qweight": (torch.int32, (bits.words(columns, width), rows)),
            "qzeros": (torch.int32, (groups, bits.words(rows, width))),
            "scales": (dtype, (groups, rows)),
            "g_idx": (torch.int32, (columns,)),
        }

    def pack(self, solved: Solved, scheme: Scheme) -> dict[str, Tensor]:
        codes, qparams = solved.quantized
        width, columns = scheme.weights.num_bits, codes.shape[1]
        scales = qparams.scale.T.contiguous()
        zero = torch.zeros(scales.shape, dtype=torch.int8, device=codes.device)
        if qparams.zero_point is not None:
            zero = qparams.zero_point.T.contiguous()
        return {
            "qweight": bits.pack(codes, width).T.contiguous(),
            "qzeros": bits.pack(zero - (1 if self.version == 1 else 0), width),
            "scales": scales,
            "g_idx": _groups(qparams, columns).to(torch.int32),
        }

    def unpack(self, tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Solved:
        width, half = scheme.weights.num_bits, 1 << (scheme.weights.num_bits - 1)
        scale = tensors["scales"].T.contiguous()
        rows, columns = len(scale), len(tensors["g_idx"])
        codes = bits.unpack(tensors["qweight"].T.contiguous(), width, columns)
        zero = None
        if not scheme.weights.symmetric:
            stored = bits.unpack(tensors["qzeros"], width, rows).T.to(torch.int16)
            # one more than 2^b - 1 is 0 again, as the kernels of version 1 have it
            stored = (stored + (1 if self.version == 1 else 0) + half) % (1 << width) - half
            zero = stored.to(torch.int8).contiguous()
        g_idx = tensors["g_idx"].long()
        if torch.equal(g_idx, _groups(QParams(scale, None), columns).to(g_idx.device)):
            return Solved(codes, QParams(scale, zero), unknown_error())
        return Solved(codes, QParams(scale, zero, g_idx=g_idx), unknown_error())

    def settings(self, sites: Sequence[Site], ignored: Sequence[str], cache: QuantArgs | None) -> dict[str, Any] | None:
        if not sites:
            return None
        kinds = [_kind(s) for s in sites]
        base = Counter(kinds).most_common(1)[0][0]
        names = {s.name for s in sites} | {s.module for s in sites}
        head = any(s.block is None for s in sites)
        others = {s.name: dict(kind) for s, kind in zip(sites, kinds, strict=True) if kind != base}
        dynamic = {f"+:{pattern}": kind for pattern, kind in _patterns(others)}
        left: dict[str, Any] = {
            n: {} for n in ignored if n not in names and "." in n
        }  # the head has no dot in it: lm_head says it
        dynamic |= {f"-:{pattern}": {} for pattern, _ in _patterns(left)}
        return {
            "quant_method": "gptq",
            **dict(base),
            "desc_act": any(s.group is not None and s.group.actorder == "group" for s in sites),
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "lm_head": head,
            "true_sequential": True,
            **({"dynamic": dynamic} if dynamic else {}),
            # what transformers reads in place of it, where it can: the same linears in every block
            **({"modules_in_block_to_quantize": inside} if left and (inside := alike_in_blocks(sites)) else {}),
            "meta": {"quantizer": [f"bitpress:{__version__}"]},
        }

    def files(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"quantize_config.json": dict(settings)}


def alike_in_blocks(sites: Sequence[Site]) -> list[list[str]] | None:
    """Names inside a block of the linears that are quantized in each, None where blocks differ."""
    inside: dict[int, list[str]] = {}
    for site in sites:
        if site.block is not None:
            inside.setdefault(site.block, []).append(site.name.partition(f".{site.block}.")[2])
    first = next(iter(inside.values()), [])
    blocks = range(max(inside, default=-1) + 1)
    return [first] if all(inside.get(i) == first for i in blocks) else None


def _groups(qparams: QParams, columns: int) -> Tensor:
    """(C,), the group of each column."""
    if qparams.g_idx is not None:
        return qparams.g_idx
    groups = qparams.scale.shape[1]
    return torch.arange(columns, device=qparams.scale.device) // (columns // groups)


def _kind(site: Site) -> tuple[tuple[str, Any], ...]:
    assert site.scheme is not None
    args = site.scheme.weights
    return ("bits", args.num_bits), ("group_size", args.group_size or -1), ("sym", args.symmetric)


def _patterns(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """A regular expression a linear, and one more where clients fuse some that are alike (`qkv_proj`)."""
    from bitpress.sites import FUSED_NAMES

    found = [(f"^{re.escape(name)}$", value) for name, value in settings.items()]
    for name, value in settings.items():
        parent, _, leaf = name.rpartition(".")
        for partners, fused in FUSED_NAMES.items():
            if leaf == partners[0] and all(settings.get(f"{parent}.{p}") == value for p in partners):
                found.append((f"^{re.escape(f'{parent}.{fused}')}$", value))
    return found
