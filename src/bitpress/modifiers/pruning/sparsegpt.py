"""The modifier that prunes with second-order information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from bitpress.modifiers.base import CONFIG, Float, sweep_faults
from bitpress.modifiers.pruning.base import ProfileModifier

if TYPE_CHECKING:  # recipes are read without torch
    from torch import Tensor

    from bitpress.math.stats import InputStats


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SparseGPTModifier(ProfileModifier):
    """Prunes with second-order information and corrects the weights that are kept (Frantar & Alistarh 2023,
    arXiv 2301.00774). Needs calibration data. If GPTQ follows in the same stage, it rounds under the mask.

    Args:
        sparsity: share of zeros of each linear; a list with a value for each decoder block; or a mapping of
            patterns to either, whose patterns are then the targets. Default: what mask_structure says.
        mask_structure: "N:M" prunes N of every M adjacent input columns, such as "2:4"; "0:0" and "unstructured"
            prune anywhere in a linear. Default: "0:0".
        targets: linears to prune, one pattern or a list; see `bitpress.targets`. Default: "Linear".
        ignore: linears to leave as they are, patterns as in targets. Default: none.
        block_size: columns of the sweep between two updates of the rest of the weight, where `mask_rounds` is 0.
            Default: 128.
        dampening_frac: what is added to the diagonal of the Gram matrix, as a fraction of its mean.
            Default: 0.01.
        preserve_sparsity_mask: weights that are zero stay zero and count. Default: false.
        mask_rounds: rounds in which the mask is searched for by alternating directions (Boza 2024,
            arXiv 2401.02938; Meng et al. 2024, arXiv 2406.07831); 0 takes the mask and the weights of the
            sweep. Default: 30.
        correct: share, 0 to 1, of the error of the layers before that the weights are to undo, see
            `GPTQModifier`; a quantizer after it undoes no more. Default: 0.
        sparsity_profile: "owl" spreads sparsity over the decoder blocks (Yin et al. 2023, arXiv 2310.05175): a
            survey counts their outliers, and blocks with more are pruned less. Default: none.
        owl_m: weights above so many times the mean score count as outliers. Default: 5.
        owl_lmbda: half of how far the lowest and the highest sparsity of a block may lie apart. Default: 0.08.
        sequential_update: has no effect. Default: none.
        sequential_targets: has no effect. Default: none.
        offload_hessians: has no effect. Default: none.
    """

    method: ClassVar[str] = "sparsegpt"
    solves_alone: ClassVar[bool] = True  # products of the mask search are TF32 on a GPU

    block_size: int = 128
    dampening_frac: Float = 0.01
    preserve_sparsity_mask: bool = False
    mask_rounds: int = 30
    correct: Float = 0.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "drift"} if self.correct else {"gram"})

    @property
    def corrects(self) -> bool:
        return self.correct > 0

    def prune(self, weights: Sequence[Tensor], stats: InputStats | None, sparsity: float | None) -> list[Tensor]:
        from bitpress.math.sparsegpt import sparsegpt

        assert stats is not None and sparsity is not None
        if sparsity == 0:
            return list(weights)
        return sparsegpt(
            weights,
            stats,
            sparsity,
            self.structure,
            block_size=self.block_size,
            dampening_frac=self.dampening_frac,
            preserve=self.preserve_sparsity_mask,
            rounds=self.mask_rounds,
            correct=self.correct,
        )

    def faults(self) -> list[str]:
        found = super().faults() + sweep_faults(self.block_size, self.dampening_frac, self.correct)
        if self.mask_rounds < 0:
            found.append(f"mask_rounds: must be 0 or more, got {self.mask_rounds}")
        return found

    def notes(self) -> list[str]:
        idle = self.mask_rounds > 0 and self.block_size != 128
        why = "the mask is searched for over the whole linear; mask_rounds: 0 sweeps in blocks"
        return super().notes() + [f"block_size: has no effect: {why}"] * idle
