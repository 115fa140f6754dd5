"""The modifier that keeps zeros while a model is trained."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from bitpress.modifiers.base import CONFIG, Float, Modifier, Names, names
from bitpress.targets import pattern_fault


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ConstantPruningModifier(Modifier):
    """Keeps every weight at zero that is zero when training starts, with its gradient and its optimizer moments.

    Args:
        targets: linears whose zeros are kept, one pattern or a list, with or without `.weight`; "__ALL__" means all.
            See `bitpress.targets`. Default: "__ALL_PRUNABLE__".
        ignore: linears whose zeros are not kept, patterns as in targets. Default: none.
        start: epoch from which zeros are kept; 0 alone, for later they would be gone. Default: 0.
        end: epoch until which they are kept; only none and -1, which mean the end. Default: none.
        update_frequency: has no effect: zeros are kept at every step. Default: none.
        leave_enabled: has no effect: a later stage keeps zeros by itself. Default: none.
    """

    run_type: ClassVar[Literal["oneshot", "train"]] = "train"
    trains: ClassVar[bool] = True

    targets: Names = "__ALL_PRUNABLE__"
    ignore: Names = dataclasses.field(default_factory=list)
    start: Float = 0.0
    end: Float | None = None
    update_frequency: Float | None = None
    leave_enabled: bool | None = None

    def faults(self) -> list[str]:
        found = []
        for key in ("targets", "ignore"):
            found += [f"{key}: {fault}" for fault in map(pattern_fault, names(getattr(self, key))) if fault]
        if not self.targets:
            found.append("targets: empty, so no zeros would be kept")
        if self.start not in (0, -1):
            found.append(f"start: zeros that training has filled cannot be kept later; give 0, got {self.start:g}")
        if self.end not in (None, -1):
            found.append(f"end: zeros are kept to the end of the stage; drop it, got {self.end:g}")
        return found

    def notes(self) -> list[str]:
        idle = {
            "update_frequency": "zeros are kept at every step",
            "leave_enabled": "a later stage keeps zeros by itself",
        }
        return [f"{key}: has no effect: {idle[key]}" for key in idle if getattr(self, key) is not None]
