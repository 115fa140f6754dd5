"""What modifiers share that move scales between neighbouring modules: their mappings, and what they are asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from bitpress.modifiers.base import CONFIG, Names, SmoothingModifier, names, plain
from bitpress.targets import pattern_fault

if TYPE_CHECKING:  # recipes are read without torch
    from torch import Tensor

    from bitpress.math.awq import Reader
    from bitpress.math.stats import InputStats


@dataclasses.dataclass(frozen=True)
class Pair:
    """A mapping as a recipe gives it: whose output is scaled, and which layers make up for it.

    Args:
        smooth: pattern of the producer, see `bitpress.targets`.
        balance: patterns of its readers that the scale is computed for.
    """

    smooth: str
    balance: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AWQMapping:
    """A mapping as an object, as scripts for other tools write it.

    Args:
        smooth_layer: pattern of the module whose output is scaled.
        balance_layers: patterns of the modules that read it.
        activation_hook_target: has no effect: what reads the same tensor shares one set of statistics.
    """

    smooth_layer: str
    balance_layers: list[str]
    activation_hook_target: str | None = None


def _mappings(value: Any) -> Any:
    if isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, list):
        return value
    return [plain(dataclasses.asdict(v)) if isinstance(v, AWQMapping) else plain(v) for v in value]


Mappings = Annotated[list[Any], BeforeValidator(_mappings)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ScaleModifier(SmoothingModifier):
    """A smoothing modifier that chooses one scale per channel of every fold; see `bitpress.folds`."""

    smoothing: ClassVar[str] = ""
    # its scales depend on the grid to which the weights are rounded next
    for_rounding: ClassVar[bool] = False

    mappings: Mappings | None = None
    required: bool = True
    ignore: Names = dataclasses.field(default_factory=list)

    def pairs(self) -> tuple[Pair, ...] | None:
        """The mappings, None if they are to be found in the model."""
        if self.mappings is None:
            return None
        return tuple(pair for entry in self.mappings if isinstance(pair := _pair(entry), Pair))

    def faults(self) -> list[str]:
        found = [f"ignore: {fault}" for fault in map(pattern_fault, names(self.ignore)) if fault]
        if self.mappings is not None and not self.mappings:
            found.append("mappings: empty, so nothing would be smoothed; leave it out to have them found in the model")
        for i, entry in enumerate(self.mappings or []):
            pair = _pair(entry)
            if isinstance(pair, str):
                found.append(f"mappings[{i}]: {pair}")
            else:
                bad = [fault for p in (pair.smooth, *pair.balance) if (fault := pattern_fault(p))]
                found += [f"mappings[{i}]: {fault}" for fault in bad]
        return found

    def scale(self, readers: Iterable[Reader], stats: InputStats, columns: Tensor, channels: int) -> Tensor:
        """The scale of a fold's channels, by which its producer is divided.

        Args:
            readers: the weights that read the channels and will be compressed; made as they are asked for.
            stats: of their input.
            columns: (C,) channel of each of their input columns.
            channels: P.

        Returns:
            (P,) float32, positive.
        """
        raise NotImplementedError

    # rows of all weights of a fold together that are enough to choose by; None: all are needed
    most_rows: ClassVar[int | None] = None


def _pair(entry: Any) -> Pair | str:
    """A mapping in either form: `[[balance, ...], smooth]` or `{smooth_layer, balance_layers}`; else what is wrong."""
    if isinstance(entry, Mapping):
        known = {"smooth_layer", "balance_layers", "activation_hook_target"}
        if unknown := [str(k) for k in entry if k not in known]:
            return f"unknown key {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        if missing := {"smooth_layer", "balance_layers"} - set(entry):
            return f"{', '.join(sorted(missing))} missing"
        smooth, balance = entry["smooth_layer"], entry["balance_layers"]
    elif isinstance(entry, list) and len(entry) == 2:
        balance, smooth = entry
    else:
        return f"expected [[layers that read], layer that is scaled] or smooth_layer and balance_layers, got {entry!r}"
    balance = [balance] if isinstance(balance, str) else balance
    if not isinstance(smooth, str) or not smooth:
        return f"the layer to scale must be one name, got {smooth!r}"
    if not isinstance(balance, list) or not balance or not all(isinstance(b, str) and b for b in balance):
        return f"the layers that read it must be names, got {balance!r}"
    return Pair(smooth, tuple(balance))
