"""The modifier that prunes the smallest weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from bitpress.modifiers.base import CONFIG, Float
from bitpress.modifiers.pruning.base import MaskStructure, Sparsity, SparsityModifier

if TYPE_CHECKING:  # recipes are read without torch
    from torch import Tensor

    from bitpress.math.stats import InputStats


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class MagnitudePruningModifier(SparsityModifier):
    """Prunes the smallest weights of each linear, at once. Needs no data.

    Args:
        final_sparsity: share of zeros of each linear; a list with a value for each decoder block; or a mapping
            of patterns to either, whose patterns are then the targets. Default: what mask_structure says.
        sparsity: the same under the name that the other pruning modifiers have. Default: none.
        mask_structure: "N:M" prunes N of every M adjacent input columns, such as "2:4"; "unstructured" and "0:0"
            prune anywhere in a linear. Default: "unstructured".
        targets: linears to prune, one pattern or a list; see `bitpress.targets`. Default: "Linear".
        ignore: linears to leave as they are, patterns as in targets. Default: none.
        apply_globally: refused where true: shares are per linear. Default: false.
        init_sparsity: has no effect in one shot. Default: none.
        start: has no effect in one shot. Default: none.
        end: has no effect in one shot. Default: none.
        update: has no effect in one shot. Default: none.
        update_frequency: has no effect in one shot. Default: none.
        update_scheduler: has no effect in one shot. Default: none.
        scheduler_args: has no effect in one shot. Default: none.
        leave_enabled: has no effect in one shot: a later stage keeps zeros by itself. Default: none.
    """

    method: ClassVar[str] = "magnitude"
    essential: ClassVar[frozenset[str]] = frozenset({"sparsity", "final_sparsity", "mask_structure"})
    claims_key: ClassVar[str] = "final_sparsity"

    final_sparsity: Sparsity | None = None
    mask_structure: MaskStructure = "unstructured"
    apply_globally: bool = False
    init_sparsity: Float | None = None
    start: Float | None = None
    end: Float | None = None
    update: Float | None = None
    update_frequency: Float | None = None
    update_scheduler: str | None = None
    scheduler_args: dict[str, Any] | None = None
    leave_enabled: bool | None = None

    def prune(self, weights: Sequence[Tensor], stats: InputStats | None, sparsity: float | None) -> list[Tensor]:
        from bitpress.math.wanda import magnitude

        assert sparsity is not None
        return list(weights) if sparsity == 0 else magnitude(weights, sparsity, self.structure)

    def faults(self) -> list[str]:
        found = super().faults()
        if self.sparsity is not None and self.final_sparsity is not None and self.sparsity != self.final_sparsity:
            found.append("sparsity: give either sparsity or final_sparsity, not both")
        if self.apply_globally:
            found.append("apply_globally: not implemented yet; give final_sparsity as a list or by pattern")
        return found

    def notes(self) -> list[str]:
        once = ("init_sparsity", "start", "end", "update", "update_frequency", "update_scheduler", "scheduler_args")
        found = [
            f"{key}: has no effect in one shot: the final sparsity is reached at once"
            for key in once
            if getattr(self, key) is not None
        ]
        if self.leave_enabled is not None:
            found.append("leave_enabled: has no effect in one shot: a later stage keeps zeros by itself")
        return super().notes() + found

    def _share(self) -> float | list[float] | dict[str, Any] | None:
        return self.sparsity if self.final_sparsity is None else self.final_sparsity
