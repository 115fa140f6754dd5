"""The modifier that prunes by the size of weights and of what they multiply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from bitpress.modifiers.base import CONFIG
from bitpress.modifiers.pruning.base import ProfileModifier

if TYPE_CHECKING:  # recipes are read without torch
    from torch import Tensor

    from bitpress.math.stats import InputStats


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class WandaPruningModifier(ProfileModifier):
    """Prunes, in every output row, the weights whose size times the norm of their input is least (Sun et al. 2023,
    arXiv 2306.11695); the others stay as they are. Needs calibration data.

    Args:
        sparsity: share of zeros of each row of each linear; a list with a value for each decoder block; or a
            mapping of patterns to either, whose patterns are then the targets. Default: what mask_structure
            says.
        mask_structure: "N:M" prunes N of every M adjacent input columns, such as "2:4"; "0:0" and "unstructured"
            prune anywhere in a row. Default: "0:0".
        targets: linears to prune, one pattern or a list; see `bitpress.targets`. Default: "Linear".
        ignore: linears to leave as they are, patterns as in targets. Default: none.
        sparsity_profile: "owl" spreads sparsity over the decoder blocks (Yin et al. 2023, arXiv 2310.05175): a
            survey counts their outliers, and blocks with more are pruned less. Default: none.
        owl_m: weights above so many times the mean score count as outliers. Default: 5.
        owl_lmbda: half of how far the lowest and the highest sparsity of a block may lie apart. Default: 0.08.
        sequential_update: has no effect. Default: none.
        sequential_targets: has no effect. Default: none.
        offload_hessians: has no effect. Default: none.
    """

    method: ClassVar[str] = "wanda"

    def prunes(self, rows: int, columns: int, sparsity: float) -> bool:
        return round(sparsity * columns) > 0  # every row on its own

    def prune(self, weights: Sequence[Tensor], stats: InputStats | None, sparsity: float | None) -> list[Tensor]:
        from bitpress.math.wanda import wanda

        assert stats is not None and sparsity is not None
        return list(weights) if sparsity == 0 else wanda(weights, stats, sparsity, self.structure)
