"""The modifier that scales up the input channels that matter before weights are rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from bitpress.modifiers.base import CONFIG, Claim, Names
from bitpress.modifiers.quantization import RoundingModifier, SchemeGroup
from bitpress.modifiers.smoothing import AWQMapping, ScaleModifier

if TYPE_CHECKING:
    from torch import Tensor

    from bitpress.math.awq import Reader
    from bitpress.math.grid import Grid, Solved
    from bitpress.math.stats import InputStats

__all__ = ["AWQMapping", "AWQModifier"]

# Share of the rounding error that a scale must save where GPTQ searches its scales: smaller gains do not carry over to
# other text (bench/LOG.md).
MARGIN = 0.1


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class AWQModifier(ScaleModifier, RoundingModifier):
    """Scales the input channels of weights by what the activations say, so that rounding hurts the output least (Lin
    et al. 2023, arXiv 2306.00978). With `scheme` or `config_groups` the weights are then rounded to nearest; without,
    a quantizer follows in the stage, and the scales are chosen for its grid. Needs calibration data.

    Args:
        scheme: preset name such as "W4A16_ASYM", to round by; see `bitpress.schemes`. Default: none, another
            modifier of the stage quantizes.
        config_groups: compressed-tensors groups by name, in place of scheme; see `QuantizationModifier`.
            Default: none.
        targets: linears to quantize, one pattern or a list; see `bitpress.targets`. Only with scheme or
            config_groups. Default: "Linear".
        ignore: linears that are not quantized, and layers whose output is not to be scaled. Default: none.
        group_size: input columns per scale in place of the preset's; -1 is one scale per output channel.
            Default: the preset's.
        kv_cache_scheme: how keys and values are cached, see `QuantizationModifier`. Default: none.
        bits: stored bits per weight on average in place of scheme and config_groups; see `GPTQModifier`. Default: none.
        candidates: what bits chooses from; see `GPTQModifier`. Default: the usual ones.
        observer: how ranges are chosen where `clip` is off: "minmax" or "mse". Default: "minmax".
        clip: shrink each group's range where that lowers the error of the output. Only with scheme or config_groups:
            GPTQ searches its scales by itself. Default: true.
        mappings: `{smooth_layer: ..., balance_layers: [...]}` each, names or "re:..."; also in SmoothQuant's form.
            Default: all that the model allows: norms and what reads them, values and output projection, up and
            down projection.
        required: whether a model in which nothing can be smoothed is an error; else it is said and the rest goes on.
            Default: true.
        duo_scaling: scales by activations and weights (true), by activations alone (false), or half of the grid
            each ("both"). Default: null, activations alone where the quantizer searches its scales under the Gram
            matrix, as GPTQ does and weights in the scale do not help, and "both" elsewhere.
        n_grid: steps of the search from one end to the other. Default: 20.
        sequential_targets: has no effect. Default: none.
        offload_device: has no effect. Default: none.
    """

    smoothing: ClassVar[str] = "awq"
    for_rounding: ClassVar[bool] = True
    most_rows: ClassVar[int | None] = 512  # more rows choose the same scales

    clip: bool = True
    duo_scaling: bool | Literal["both"] | None = None
    n_grid: int = 20
    sequential_targets: Names | None = None
    offload_device: Any = None

    @property
    def rounds(self) -> bool:
        """Whether it quantizes by itself."""
        return not (self.scheme is None and self.config_groups is None and self.bits is None)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"gram", "mean"}

    @property
    def weights_need(self) -> frozenset[str]:
        return frozenset({"gram"} if self.clip else ())

    def claims(self) -> tuple[Claim, ...]:
        return super().claims() if self.rounds else ()

    def groups(self) -> tuple[SchemeGroup, ...]:
        return super().groups() if self.rounds else ()

    def faults(self) -> list[str]:
        found = ScaleModifier.faults(self)
        if self.rounds:
            found += [f for f in RoundingModifier.faults(self) if f not in found]
        else:
            alone = ("targets", "group_size", "kv_cache_scheme", "observer", "candidates")
            defaults = {f.name: f.default for f in dataclasses.fields(self)}
            found += [
                f"{key}: goes with scheme or config_groups; without them another modifier quantizes"
                for key in alone
                if getattr(self, key) != defaults[key]
            ]
        if self.n_grid < 1:
            found.append(f"n_grid: must be at least 1, got {self.n_grid}")
        return found

    def notes(self) -> list[str]:
        idle = {
            "sequential_targets": "bitpress always goes block by block",
            "offload_device": "statistics of one block at a time are held",
        }
        found = [f"{key}: has no effect: {idle[key]}" for key in idle if getattr(self, key) is not None]
        return found + (RoundingModifier.notes(self) if self.rounds else [])

    def scale(self, readers: Iterable[Reader], stats: InputStats, columns: Tensor, channels: int) -> Tensor:
        from bitpress.math.awq import best_scale, candidates, relative_weight
        from bitpress.math.smoothquant import by_channel

        held = list(readers)
        searched = all(r.observer == "hessian" for r in held)
        duo = self.duo_scaling
        if duo is None:
            duo = False if searched else "both"
        if self.rounds and self.clip:  # a search weighted by the diagonal is close to clipping, and cheaper
            held = [dataclasses.replace(r, observer="hessian") for r in held]
        assert stats.sum_abs is not None
        x_mean = by_channel(stats.sum_abs / max(stats.tokens, 1), columns, channels, "mean")
        w_mean = by_channel(relative_weight(held), columns, channels, "mean")
        tried = candidates(x_mean, w_mean, duo=duo, n_grid=self.n_grid)
        return best_scale(held, stats.needed_gram, columns, tried, MARGIN if searched else 0.0)

    def solve(
        self, weights: Sequence[Tensor], stats: InputStats | None, group: SchemeGroup, grid: Grid
    ) -> list[Solved]:
        from bitpress.math.awq import clipped

        if not self.clip:
            return super().solve(weights, stats, group, grid)
        assert stats is not None
        return clipped(weights, grid, stats.needed_gram)
