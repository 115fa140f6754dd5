"""The modifier that rounds column by column and corrects the columns still to come."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from bitpress.modifiers.base import CONFIG, Float, Names, sweep_faults
from bitpress.modifiers.quantization.base import (
    ActOrder,
    SchemeGroup,
    SchemeModifier,
    act_order,
    act_order_faults,
    order_of,
)

if TYPE_CHECKING:  # recipes are read without torch
    from torch import Tensor

    from bitpress.math.grid import Grid, Solved
    from bitpress.math.stats import InputStats

OrderName = Annotated[str | None, BeforeValidator(act_order)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class GPTQModifier(SchemeModifier):
    """Quantizes weights column by column and corrects the columns still to come (Frantar et al. 2022,
    arXiv 2210.17323). Needs calibration data.

    Args:
        scheme: preset name such as "W4A16"; see `bitpress.schemes`. Exactly one of scheme and config_groups.
            Default: none.
        config_groups: compressed-tensors groups by name, each `{weights: {...}, input_activations: {...},
            targets: [...]}`, or presets with their targets, `FP8_DYNAMIC: ["re:.*mlp.*"]`. The weights may set
            `actorder` and `observer`; targets default to the
            modifier's. Default: none.
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
        block_size: columns solved between two updates of the rest of the weight. Default: 128.
        dampening_frac: what is added to the diagonal of the Gram matrix, as a fraction of its mean.
            Default: 0.01.
        actorder: "static" (also "weight") solves the columns with the largest input first and stores them in
            their own order; "group" also makes groups of columns that follow each other in that order, which only the
            GPTQ format can store; "none" or null solves from left to right. Default: "static".
        observer: how scales are chosen: "minmax" covers every weight, "mse" searches the least squared error,
            "hessian" the least error weighted by the diagonal of the Gram matrix. Of integers of less than 8 bits
            without zero point these two also try negative scales, by which the side with the larger weights has the
            code that the other side lacks (AutoRound's and GGUF's do the same), unless inputs are integers too: vLLM
            misreads such scales there, as it does W4A16's if `VLLM_MARLIN_INPUT_DTYPE=int8` is set. Default: "hessian".
        refine: rounds of coordinate descent on the codes (Behdin et al. 2023, arXiv 2309.01885) and joint least
            squares on the scales, after the sweep. Default: 2.
        correct: share, 0 to 1, of the error of the layers before that the weights are to undo: of the drift of their
            input from the uncompressed model's (in the manner of Qronos: Zhang et al. 2025, arXiv 2505.11695), and in
            the linear whose output is added to the block's of all that the block's output lacks (as LoaQ: Lin & Wan
            2025, arXiv 2509.06297). Costs a forward of a quarter of the data in the uncompressed model. Default: 0.
        sequential_update: has no effect. Default: none.
        sequential_targets: has no effect. Default: none.
        offload_hessians: has no effect. Default: none.
    """

    observers: ClassVar[tuple[str, ...]] = ("minmax", "mse", "hessian")

    method: ClassVar[str] = "gptq"
    regroups: ClassVar[bool] = True

    block_size: int = 128
    dampening_frac: Float = 0.01
    actorder: OrderName | None = "static"
    observer: Literal["minmax", "mse", "hessian"] = "hessian"
    refine: int = 2
    correct: Float = 0.0
    sequential_update: bool | None = None
    sequential_targets: Names | None = None
    offload_hessians: bool | None = None

    @property
    def weights_need(self) -> frozenset[str]:
        return frozenset({"gram", "drift"} if self.correct else {"gram"})

    def quick(self) -> Self:
        return dataclasses.replace(self, refine=0, correct=0.0)

    def solve(
        self, weights: Sequence[Tensor], stats: InputStats | None, group: SchemeGroup, grid: Grid
    ) -> list[Solved]:
        return self.solve_each([(weights, stats)], group, grid)[0]

    def solve_each(
        self, problems: Sequence[tuple[Sequence[Tensor], InputStats | None]], group: SchemeGroup, grid: Grid
    ) -> list[list[Solved]]:
        from bitpress.math.gptq import gptq_each

        if grid.fused and len(problems) > 1:  # each has a number of its own that its linears share
            return [self.solve(weights, stats, group, grid) for weights, stats in problems]
        return gptq_each(
            [(weights, stats) for weights, stats in problems if stats is not None],
            grid,
            observer=group.observer,
            order=group.actorder is not None,
            regroup=group.actorder == "group",
            block_size=self.block_size,
            dampening_frac=self.dampening_frac,
            refine=self.refine,
            correct=self.correct,
        )

    def faults(self) -> list[str]:
        found = super().faults() + sweep_faults(self.block_size, self.dampening_frac, self.correct)
        if self.refine < 0:
            found.append(f"refine: must be 0 or more rounds, got {self.refine}")
        return found + act_order_faults(self.actorder, "actorder")

    def notes(self) -> list[str]:
        idle = {
            "sequential_update": "bitpress always goes block by block",
            "sequential_targets": "bitpress always goes block by block",
            "offload_hessians": "statistics of one block at a time are held",
        }
        return super().notes() + [
            f"{key}: has no effect: {idle[key]}" for key in idle if getattr(self, key) is not None
        ]

    def _weights_defaults(self) -> tuple[ActOrder, str]:
        return order_of(self.actorder), self.observer
