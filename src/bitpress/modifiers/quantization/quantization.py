"""The modifier that rounds weights to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic.dataclasses import dataclass

from bitpress.modifiers.base import CONFIG
from bitpress.modifiers.quantization.base import ActOrder, SchemeGroup, SchemeModifier

if TYPE_CHECKING:  # recipes are read without torch
    from torch import Tensor

    from bitpress.math.grid import Grid, Solved
    from bitpress.math.stats import InputStats


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class RoundingModifier(SchemeModifier):
    """What rounds weights to the nearest code; see `QuantizationModifier`."""

    method: ClassVar[str] = "rtn"

    observer: Literal["minmax", "mse"] = "minmax"

    def solve(
        self, weights: Sequence[Tensor], stats: InputStats | None, group: SchemeGroup, grid: Grid
    ) -> list[Solved]:
        from bitpress.math.rtn import round_all

        return round_all(weights, grid, observer=group.observer)

    def _weights_defaults(self) -> tuple[ActOrder, str]:
        return None, self.observer

    def notes(self) -> list[str]:
        return super().notes() + [
            f"config_groups.{group.name}.weights.actorder: has no effect: rounding has no order"
            for group in self.groups()
            if group.actorder is not None
        ]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class QuantizationModifier(RoundingModifier):
    """Rounds weights to the nearest code. Needs no data unless activations have static scales.

    In a training stage (`run_type: train`) it rounds weights, and inputs where the scheme does, in every forward, and
    gradients pass through (`bitpress.math.fake`).

    Args:
        scheme: preset name such as "W4A16"; see `bitpress.schemes`. Exactly one of scheme and config_groups.
            Default: none.
        config_groups: compressed-tensors groups by name, each `{weights: {...}, input_activations: {...},
            targets: [...]}`, or presets with their targets, `FP8_DYNAMIC: ["re:.*mlp.*"]`. The weights may set
            `observer`; targets default to the modifier's.
            Default: none.
        targets: linears to quantize, one pattern or a list; see `bitpress.targets`. Default: "Linear".
        ignore: linears to leave as they are, patterns as in targets. Default: none.
        group_size: input columns per scale in place of the preset's; -1 is one scale per output channel.
            Default: the preset's.
        kv_cache_scheme: how keys and values are quantized in the cache, such as `{num_bits: 8, type: float,
            strategy: tensor, dynamic: false}`; needs calibration data unless dynamic. Alone, without scheme and
            config_groups, it leaves all weights as they are. Default: none.
        bits: stored bits per weight on average over these linears, scales and zero points counted, in place of scheme
            and config_groups: each linear's scheme is chosen by a survey of how much it matters. Default: none.
        candidates: what bits chooses from: presets, `{scheme: W4A16, group_size: 64}`, `{weights: {...}}`,
            UNQUANTIZED. Default: 4 bits in groups of 32 to 128 or a row, with and without zero points; 8 bits and
            full precision for higher targets, 2 and 3 bits for lower ones.
        observer: how scales are chosen: "minmax" covers every weight, "mse" searches the least squared error,
            among negative scales too, see GPTQModifier.
            Default: "minmax".
        learn_scales: in a training stage: scales are trained with the weights (LSQ, Esser et al. 2020, arXiv
            1902.08153) instead of following their range. Default: false.
    """

    trains: ClassVar[bool] = True

    learn_scales: bool = False
