"""The modifier that moves solved weights by gradients."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic.dataclasses import dataclass

from bitpress.modifiers.base import CONFIG, Float, Modifier, Names, names
from bitpress.targets import pattern_fault

if TYPE_CHECKING:  # recipes are read without torch
    from bitpress.math.tune import Settings


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TuneModifier(Modifier):
    """Moves the codes, scales and unpruned weights of each block by gradients, so that its output comes nearer to the
    uncompressed model's (in the manner of AutoRound: Cheng et al. 2023, arXiv 2309.05516). It follows the modifiers
    that quantize or prune, and keeps their masks and grids. Needs calibration data.

    Args:
        targets: which of the linears that are compressed to tune, one pattern or a list; see `bitpress.targets`. Those
            outside the blocks stay as they are solved. Default: "Linear".
        ignore: linears to leave as they are solved, patterns as in targets. Default: none.
        iters: gradient steps a block. Default: 200.
        batch_size: sequences in each step. Pruned weights without codes gain from 8. Default: 4.
        lr: how far a code moves in the first step, in distances between codes; it falls to 0 linearly.
            Default: 0.003 at 4 bits, twice as much for every bit less, half as much for every bit more.
        scale_lr: the same for scales, as a share of them. 0 leaves them as they are solved. Default: 0.001.
        weight_lr: the same for weights that are pruned but not quantized, as a share of the root mean square of their
            row. Default: 0.001.
        holdout: share of the sequences that give no gradients; what is kept, if only the start, is what is best on
            them. At least one sequence is held out. Default: 0.125.
        last_block_loss: "kl": behind the last block, the divergence of the model's predictions is lowered instead of
            the error of the block's output, which undoes part of what all blocks before it lost; "mse": as behind
            every other block. Default: "kl".
    """

    tuning: ClassVar[str] = "tune"

    targets: Names = "Linear"
    ignore: Names = dataclasses.field(default_factory=list)
    iters: int = 200
    batch_size: int = 4
    lr: Float | None = None
    scale_lr: Float = 0.001
    weight_lr: Float = 0.001
    holdout: Float = 0.125
    last_block_loss: Literal["kl", "mse"] = "kl"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "full"})

    def faults(self) -> list[str]:
        found = []
        for key in ("targets", "ignore"):
            found += [f"{key}: {fault}" for fault in map(pattern_fault, names(getattr(self, key))) if fault]
        if not self.targets:
            found.append("targets: empty, so nothing would be tuned")
        for key in ("iters", "batch_size"):
            if getattr(self, key) < 1:
                found.append(f"{key}: must be at least 1, got {getattr(self, key)}")
        for key in ("lr", "scale_lr", "weight_lr"):
            if getattr(self, key) is not None and not 0 <= getattr(self, key) < math.inf:
                found.append(f"{key}: must be 0 or a positive number, got {getattr(self, key)}")
        if not 0 < self.holdout <= 0.5:
            found.append(f"holdout: must be a share above 0, at most 0.5, got {self.holdout}")
        return found

    def settings(self, seed: int) -> Settings:
        """The settings for one block."""
        from bitpress.math.tune import Settings

        return Settings(
            iters=self.iters, batch_size=self.batch_size, lr=self.lr, scale_lr=self.scale_lr,
            weight_lr=self.weight_lr, holdout=self.holdout, seed=seed,
        )  # fmt: skip
