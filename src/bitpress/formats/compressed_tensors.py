"""compressed-tensors: each scheme has a layout of its own, and config.json says which linears have which."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitpress.formats import float_quantized, int_quantized, mx, nvfp4_pack_quantized, pack_quantized
from bitpress.formats.base import CheckpointFormat, Spec, beside, describe_inputs, grid_of, unknown_error
from bitpress.math.grid import Solved
from bitpress.schemes import BLOCKWISE, QuantArgs, Scheme

if TYPE_CHECKING:
    from bitpress.sites import Site

LAYOUTS: dict[str, ModuleType] = {
    "pack-quantized": pack_quantized,
    "int-quantized": int_quantized,
    "float-quantized": float_quantized,
    "naive-quantized": float_quantized,
    "nvfp4-pack-quantized": nvfp4_pack_quantized,
    "mxfp4-pack-quantized": mx,
    "mxfp6-pack-quantized": mx,
    "mxfp8-quantized": mx,
}


class CompressedTensors(CheckpointFormat):
    """The format that vLLM and transformers read with the compressed-tensors package."""

    name = "compressed-tensors"
    method = "compressed-tensors"
    activations = True

    def refusal(self, scheme: Scheme, actorder: str | None) -> str | None:
        if scheme.weights.type in BLOCKWISE:
            return "is stored by bitsandbytes alone; use --format bitsandbytes"
        if actorder == "group":
            return "actorder: 'group' needs the GPTQ format (--format gptq); or use 'static'"
        return None

    def describe(self, scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Spec:
        spec: Spec = LAYOUTS[scheme.format].describe(grid_of(scheme, dtype), rows, columns)
        return spec | describe_inputs(scheme, dtype)

    def pack(self, solved: Solved, scheme: Scheme) -> dict[str, Tensor]:
        codes, qparams = solved.quantized
        tensors: dict[str, Tensor] = LAYOUTS[scheme.format].pack(codes, qparams, grid_of(scheme, qparams.scale.dtype))
        return tensors | dict(solved.beside)

    def unpack(self, tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Solved:
        codes, qparams = LAYOUTS[scheme.format].unpack(tensors, grid_of(scheme, dtype))
        return Solved(codes, qparams, unknown_error(), beside=beside(tensors, scheme, dtype))

    def settings(self, sites: Sequence[Site], ignored: Sequence[str], cache: QuantArgs | None) -> dict[str, Any] | None:
        return _settings(sites, ignored, cache, compressed=True)


def uncompressed_settings(
    sites: Sequence[Site], ignored: Sequence[str], cache: QuantArgs | None
) -> dict[str, Any] | None:
    """What config.json says of dense weights beside their scales."""
    return _settings(sites, ignored, cache, compressed=False)


def _settings(
    sites: Sequence[Site], ignored: Sequence[str], cache: QuantArgs | None, *, compressed: bool
) -> dict[str, Any] | None:
    """The entry of config.json that transformers and vLLM read: what all releases since 0.17 understand, no nulls."""
    if not sites and cache is None:
        return None
    by_scheme: dict[str, tuple[Scheme, list[Site]]] = {}
    for site in sites:
        assert site.scheme is not None
        key = json.dumps([site.scheme.format, site.scheme.to_dict()], sort_keys=True)
        by_scheme.setdefault(key, (site.scheme, []))[1].append(site)
    groups = {}
    # the largest group is "all Linears", the others are named one by one: names go before classes. Experts go first:
    # transformers takes the first such group for all of them
    ranked = sorted(
        by_scheme.values(), key=lambda p: (sum(s.expert is not None for s in p[1]), len(p[1])), reverse=True
    )
    for i, (scheme, mine) in enumerate(ranked):
        named = [s for s in mine if i > 0 or s.block is None]  # to vLLM an output head is no Linear
        targets = ["Linear"] * (i == 0) + list(dict.fromkeys(n for s in named for n in (s.name, s.module)))
        groups[f"group_{i}"] = {
            "targets": targets,
            **scheme.to_dict(),
            "format": scheme.format if compressed else scheme.stored_as or "dense",
        }
    kinds = {g["format"] for g in groups.values()} if compressed else {"dense"}
    out = {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision" if kinds else "dense",
        "quantization_status": "compressed" if compressed else "frozen",
        "config_groups": groups,
        "ignore": list(ignored),
    }
    return out if cache is None else out | {"kv_cache_scheme": cache.to_dict()}
