"""The modifier that moves the range of activations into the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from bitpress.modifiers.base import CONFIG, Float
from bitpress.modifiers.smoothing import ScaleModifier

if TYPE_CHECKING:
    from torch import Tensor

    from bitpress.math.awq import Reader
    from bitpress.math.stats import InputStats


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SmoothQuantModifier(ScaleModifier):
    """Divides wide activation channels and multiplies the weights that read them (Xiao et al. 2022,
    arXiv 2211.10438), so that activations can be quantized. The model computes the same; a quantizer follows in the
    stage. Needs calibration data.

    Args:
        smoothing_strength: how much of the width moves into the weights, from 0 to 1; or "search": as much as leaves
            the least rounding noise in the outputs, told for each mapping from a sample of the tokens. Default: 0.5.
        mappings: `[[layers that read], layer that is scaled]` each, names or "re:..."; also in AWQ's form.
            Default: all that the model allows: norms and what reads them, values and output projection, up and
            down projection.
        required: whether a model in which nothing can be smoothed is an error; else it is said and the rest goes on.
            Default: true.
        ignore: layers whose output is not to be scaled. Default: none.
        algorithm: "smoothquant", or "log_equalization", which looks at activations alone. Default: "smoothquant".
        num_calibration_steps: has no effect: all calibration data is used. Default: none.
        calibration_function: has no effect: the model's own forward runs. Default: none.
    """

    smoothing: ClassVar[str] = "smoothquant"

    smoothing_strength: Float | Literal["search"] = 0.5
    algorithm: Literal["smoothquant", "log_equalization"] = "smoothquant"
    num_calibration_steps: int | None = None
    calibration_function: Any = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"range", "mean", "sample"} if self.smoothing_strength == "search" else {"range"})

    def faults(self) -> list[str]:
        found = super().faults()
        if self.smoothing_strength != "search" and not 0 <= self.smoothing_strength <= 1:
            found.append(f"smoothing_strength: must be from 0 to 1, got {self.smoothing_strength}")
        if self.smoothing_strength == "search" and self.algorithm == "log_equalization":
            found.append("smoothing_strength: 'search' goes with algorithm 'smoothquant'; the other has none")
        return found

    def notes(self) -> list[str]:
        idle = {
            "num_calibration_steps": "all calibration data is used; see num_calibration_samples",
            "calibration_function": "the model's own forward runs",
        }
        return [f"{key}: has no effect: {idle[key]}" for key in idle if getattr(self, key) is not None]

    def scale(self, readers: Iterable[Reader], stats: InputStats, columns: Tensor, channels: int) -> Tensor:
        from bitpress.math.smoothquant import (
            by_channel,
            column_max,
            log_equalization_scale,
            searched_scale,
            smoothquant_scale,
        )

        if self.algorithm == "smoothquant" and self.smoothing_strength == "search":
            return searched_scale(list(readers), stats, columns, channels)
        assert stats.low is not None and stats.high is not None
        x_max = by_channel(stats.high.maximum(-stats.low), columns, channels, "amax")
        if self.algorithm == "log_equalization":
            return log_equalization_scale(x_max)
        w_max = by_channel(column_max(r.weight for r in readers), columns, channels, "amax")
        assert self.smoothing_strength != "search"
        return smoothquant_scale(x_max, w_max, self.smoothing_strength)
