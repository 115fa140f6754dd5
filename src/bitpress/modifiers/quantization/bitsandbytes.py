"""The modifier that leaves rounding to bitsandbytes: NF4 and FP4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic.dataclasses import dataclass

from bitpress.modifiers.base import CONFIG, Claim, names
from bitpress.modifiers.quantization.base import ActOrder, SchemeGroup, SchemeModifier
from bitpress.schemes import QuantArgs, Scheme

if TYPE_CHECKING:  # recipes are read without torch
    from torch import Tensor

    from bitpress.math.grid import Grid, Solved
    from bitpress.math.stats import InputStats

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class BitsAndBytesModifier(SchemeModifier):
    """Rounds weights to the nearest of 16 levels, a scale a block (NF4: Dettmers et al. 2023, arXiv 2305.14314).

    Needs no data, and the package bitsandbytes; stored in its format alone (`--format bitsandbytes`).

    Args:
        quant_type: "nf4", levels for weights that are normally distributed, or "fp4". Default: "nf4".
        double_quant: quantize the scales too, to 8 bits in blocks of 256. Default: true.
        blocksize: weights that share a scale. Default: 64.
        compute_dtype: in which clients multiply, for config.json. Default: "bfloat16".
        quant_storage: dtype in which packed codes are stored: "uint8", or that of the other weights, so that FSDP can
            shard them. Default: "uint8".
        targets: linears to quantize, one pattern or a list; see `bitpress.targets`. Default: "Linear".
        ignore: linears to leave as they are, patterns as in targets. Default: none.
        scheme: not for it, see quant_type. Default: none.
        group_size: not for it, see blocksize. Default: none.
        config_groups: not for it. Default: none.
        kv_cache_scheme: not for it. Default: none.
        bits: not for it. Default: none.
        candidates: not for it. Default: none.
    """

    method: ClassVar[str] = "bitsandbytes"

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    blocksize: int = 64
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] = "uint8"

    def faults(self) -> list[str]:
        found = super().faults()
        if self.blocksize not in BLOCKSIZES:
            found.append(f"blocksize: must be one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize}")
        alone = ("scheme", "config_groups", "group_size", "kv_cache_scheme", "bits", "candidates")
        remedies = {"scheme": "quant_type", "group_size": "blocksize"}
        for key in alone:
            if getattr(self, key) is not None:
                remedy = f"; use {remedies[key]}" if key in remedies else ""
                found.append(f"{key}: is not for bitsandbytes{remedy}; drop it")
        return found

    def solve(
        self, weights: Sequence[Tensor], stats: InputStats | None, group: SchemeGroup, grid: Grid
    ) -> list[Solved]:
        from bitpress.formats.bitsandbytes import rounded

        return [rounded(w, group.scheme, grid.scale_dtype) for w in weights]

    def _weights_defaults(self) -> tuple[ActOrder, str]:
        return None, "minmax"

    def _read_groups(self) -> tuple[tuple[Claim, ...], list[str]]:
        weights = QuantArgs(num_bits=4, type=self.quant_type, strategy="group", group_size=self.blocksize)
        scheme = Scheme(
            name=self.quant_type.upper(), weights=weights, nested=self.double_quant, storage=self.quant_storage,
            compute=self.compute_dtype,
        )  # fmt: skip
        return (SchemeGroup("group_0", names(self.targets), scheme, *self._weights_defaults()),), []
