"""Tuning the block at work: from where its linears start, and how it is run with other weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitpress import formats, ranks
from bitpress.chain import check_zeros
from bitpress.errors import NumericsError
from bitpress.math.grid import Solved
from bitpress.math.lost import relative_error
from bitpress.math.masks import pruned
from bitpress.math.objective import Divergence
from bitpress.math.stats import InputStats
from bitpress.math.tune import Start, ideal_weight, tune
from bitpress.modifiers.base import PruningModifier
from bitpress.report import LayerReport
from bitpress.sites import Site
from bitpress.states import FullStream, HiddenStates
from bitpress.subject import Subject


@dataclass(frozen=True)
class Held:
    """What tuning needs of a solved linear.

    Attributes:
        weight: (R, C) in the model's dtype, what was to be compressed.
        gram: (C, C) float32 of its input, shared with the others that read it.
        keep: (R, C) bool, false where it is pruned; None: nowhere.
    """

    site: Site
    weight: Tensor
    solved: Solved
    gram: Tensor | None
    keep: Tensor | None


class Tuning:
    """The linears of one block that are tuned, from when they are solved.

    Args:
        seed: of the run; the block's own follows from it and the block's number.
    """

    def __init__(self, subject: Subject, index: int, seed: int) -> None:
        self.subject, self.index = subject, index
        self.seed = (seed * 1_000_003 + index) % (1 << 63)
        self.held: list[Held] = []

    def held_of(
        self, sites: Sequence[Site], weights: Sequence[Tensor], solved: Sequence[Solved], stats: InputStats | None
    ) -> list[Held]:
        """What to remember of linears that were solved, those of them that are to be tuned; for `held`."""
        held = []
        gram = None if stats is None else stats.gram
        for site, weight, z in zip(sites, weights, solved, strict=True):
            if site.tuning is None:
                continue
            prunes = any(isinstance(s.modifier, PruningModifier) for s in site.steps)
            keep = z.dense() != 0 if prunes else pruned(weight)
            held.append(Held(site, weight.to(self.subject.dtype), z, gram, keep))
        return held

    def run(
        self,
        batches: Sequence[Tensor],
        parts: Sequence[range],
        states: HiddenStates,
        full: FullStream,
        said: Callable[[float], None],
    ) -> dict[str, tuple[Solved, dict[str, float | str]]]:
        """Tune them together.

        Args:
            batches: token ids (B, L), of all processes.
            parts: of each process, the numbers of its batches. Every process takes every step, and is given the
                hidden states that it does not have.
            states: what goes into the block, of this process's batches.
            full: what should come out of it.
            said: is told how far it is, from 0 to 1.

        Returns:
            By the linear's name: how it is solved, its error as it is now, and what the report says of the block.

        Raises:
            NumericsError: NaN or infinity in the block's output, or a mask that is not kept.
        """
        if not self.held:  # experts that none of this block's linears is left without
            return {}
        places = [(i, row) for i, ids in enumerate(batches) for row in range(len(ids))]
        lengths = [batches[i].shape[1] for i, _ in places]

        def output(weights: Mapping[str, Tensor], picked: Sequence[int]) -> Tensor:
            chosen = [places[p] for p in picked]
            ids = torch.cat([batches[i][row : row + 1] for i, row in chosen]).to(states.device)
            found = [given(p, states.sequence) for p in picked]
            hidden = [part for part in found if part is not None]  # none of them before the first block
            return self.subject.blocks.run_with(self.index, (ids, torch.cat(hidden) if hidden else None), weights)

        def given(p: int, of: Callable[[int, int], Tensor | None]) -> Tensor | None:
            """A sequence's states, from the process that has them."""
            i, row = places[p]
            owner = ranks.holder(parts, i)
            mine = owner == ranks.rank()
            return ranks.share(of(i - parts[owner].start, row) if mine else None, owner)

        def target(picked: Sequence[int]) -> Tensor:
            found = [given(p, full.sequence_after) for p in picked]
            return torch.cat([part for part in found if part is not None])

        def logits(hidden: Tensor) -> Tensor:
            """Of any positions: what follows the last block looks at each by itself."""
            ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
            return blocks.logits((ids, hidden[:, None]), gradients=hidden.requires_grad)[:, 0]

        modifier = self.held[0].site.tuning
        assert modifier is not None
        blocks = self.subject.blocks
        last = self.index == len(blocks) - 1 and modifier.last_block_loss == "kl"
        starts = {h.site.key: self._start(h) for h in self.held}
        objective = Divergence(logits) if last else None
        found = tune(starts, output, target, lengths, modifier.settings(self.seed), said, objective)
        if not found.before < float("inf"):
            raise NumericsError(f"{self.held[0].site.name}: NaN or infinity in the block's output while tuning")
        says: dict[str, float | str] = {
            "loss": "kl" if last else "mse",
            "before": _digits(found.before),
            "after": _digits(found.after),
            "steps": found.step,
        }
        found = ranks.share(found)  # all have taken the same steps, but bits may differ from GPU to GPU
        results = {}
        for h in self.held:
            z, grid = found.solved[h.site.key], starts[h.site.key].grid
            z = z if grid is None else formats.settle(z, grid)
            # what the solver left at zero stays zero; a weight that was zero by chance and is kept need not
            check_zeros([h.weight if h.keep is None else h.keep], [z], h.site.steps)
            error = relative_error(h.weight.float(), z.dense(), h.gram)
            results[h.site.name] = (replace(z, error=error), says)
        return results

    def _start(self, h: Held) -> Start:
        if h.site.scheme is None:
            return Start(h.solved, None, None, h.keep)
        grid = formats.grid_of(h.site.scheme, self.subject.dtype)
        return Start(h.solved, grid, ideal_weight(h.weight.float(), h.solved, h.gram), h.keep)


def idle(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say if blocks stayed as they were solved, from the report's rows."""
    steps = [row["tuned"]["steps"] for row in rows if row.get("tuned")]
    if not (kept := steps.count(0)):
        return None
    return (
        f"TuneModifier: {kept} of {len(steps)} linears stayed as they were solved, as no step lowered the loss "
        "on the sequences held out; more calibration data helps where there is little"
    )


def after(
    results: Sequence[tuple[LayerReport, Site, Solved]], tuned: Mapping[str, tuple[Solved, dict[str, float | str]]]
) -> list[tuple[LayerReport, Site, Solved]]:
    """The results of a block, those of tuned linears as they are after it."""
    new = []
    for report, site, z in results:
        if site.name in tuned:
            z, says = tuned[site.name]
            sparsity = float((z.dense() == 0).float().mean())
            report = replace(report, rel_error=float(z.error), sparsity=sparsity, tuned=says)
        new.append((report, site, z))
    return new


def _digits(x: float) -> float:
    return float(f"{x:.5g}")
