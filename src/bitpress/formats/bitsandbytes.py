"""bitsandbytes: NF4 and FP4, rounded, packed and read by that package itself (Dettmers et al. 2023, arXiv 2305.14314).

weight (n, 1), two codes a byte in the storage dtype; weight.absmax, one number a block of weights: float32, or with
double quantization uint8 under weight.nested_absmax; weight.quant_map and weight.nested_quant_map, the levels;
weight.quant_state.bitsandbytes__nf4, JSON, filled up with spaces so that its length is known before.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitpress.formats.base import CheckpointFormat, Spec, kind_of, unknown_error
from bitpress.math.grid import Solved
from bitpress.math.lost import relative_error
from bitpress.schemes import BLOCKWISE, QuantArgs, Scheme

if TYPE_CHECKING:
    from bitpress.sites import Site

STATE = 192  # bytes of the JSON
NESTED = 256  # blocks that share a scale of their scales


class BitsAndBytes(CheckpointFormat):
    """Weights that transformers loads with bitsandbytes installed, with no configuration given."""

    name = "bitsandbytes"
    method = "bitsandbytes"
    mixed = False

    def refusal(self, scheme: Scheme, actorder: str | None) -> str | None:
        if scheme.weights.type not in BLOCKWISE:
            kind = kind_of(scheme.weights)
            return f"holds NF4 and FP4 only, not {kind}: use --scheme NF4 (BitsAndBytesModifier), or another format"
        return None

    def unfit(self, config: Any, folder: Path | None, dtype: torch.dtype, quantized: bool) -> list[str]:
        found = []
        if importlib.util.find_spec("bitsandbytes") is None:
            found.append("needs the bitsandbytes package: pip install 'bitpress[bitsandbytes]'")
        if folder is None:
            found.append("is written from a model folder; save the model and give its folder, or use load_in_4bit")
        return found

    def describe(self, scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Spec:
        count = rows * columns
        blocks = math.ceil(count / (scheme.weights.group_size or count))
        storage = getattr(torch, scheme.storage)
        spec: Spec = {
            "weight": (storage, (math.ceil(count / 2) // storage.itemsize, 1)),
            "weight.absmax": (torch.uint8 if scheme.nested else torch.float32, (blocks,)),
            "weight.quant_map": (torch.float32, (16,)),
            f"weight.quant_state.bitsandbytes__{scheme.weights.type}": (torch.uint8, (STATE,)),
        }
        if scheme.nested:
            spec["weight.nested_absmax"] = (torch.float32, (math.ceil(blocks / NESTED),))
            spec["weight.nested_quant_map"] = (torch.float32, (256,))
        return spec

    def pack(self, solved: Solved, scheme: Scheme) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in solved.beside.items() if name.startswith("weight")}

    def unpack(self, tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Solved:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        weight = tensors["weight"]
        rest = {name.removeprefix("weight."): t for name, t in tensors.items() if name != "weight"}
        state = QuantState.from_dict(rest, device=weight.device)
        return Solved(None, None, unknown_error(), weight=dequantize_4bit(weight, state).to(dtype), beside=tensors)

    def settings(self, sites: Sequence[Site], ignored: Sequence[str], cache: QuantArgs | None) -> dict[str, Any] | None:
        if not sites:
            return None
        scheme = sites[0].scheme
        assert scheme is not None
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": scheme.weights.type,
            "bnb_4bit_use_double_quant": scheme.nested,
            "bnb_4bit_compute_dtype": scheme.compute,
            "bnb_4bit_quant_storage": scheme.storage,
            "llm_int8_skip_modules": list(ignored),
        }


def rounded(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Solved:
    """A weight (R, C) of a model of `dtype`, rounded by bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.to(dtype).contiguous(), blocksize=scheme.weights.group_size, compress_statistics=scheme.nested,
        quant_type=scheme.weights.type, quant_storage=getattr(torch, scheme.storage),
    )  # fmt: skip
    beside = {"weight": packed, **{f"weight.{n}": t for n, t in state.as_dict(packed=True).items()}}
    key = next(n for n in beside if ".quant_state." in n)
    spaces = torch.full((STATE - len(beside[key]),), ord(" "), dtype=torch.uint8, device=beside[key].device)
    beside[key] = torch.cat([beside[key], spaces])
    dense = dequantize_4bit(packed, state).to(dtype)
    return Solved(None, None, relative_error(weight, dense, None), weight=dense, beside=beside)
