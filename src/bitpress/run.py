"""One pass over a model: what it works on and what it gathers, for all who have a part in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitpress import ranks
from bitpress.blocks import Batch
from bitpress.math.grid import Solved
from bitpress.output import Output
from bitpress.phases import Phases
from bitpress.plan import Plan
from bitpress.progress import Progress
from bitpress.report import LayerReport
from bitpress.sites import Site
from bitpress.states import FullStream, HiddenStates
from bitpress.subject import Subject
from bitpress.threads import Beside

STARVED = 256  # tokens; an expert that saw fewer takes its statistics from all tokens of the block


@dataclass
class Run:
    """The inputs of one pass, and what it gathers.

    Attributes:
        everything: token ids (B, L), in order.
        inherited: gives a linear that an earlier stage has quantized, for the shard that it is written to.
        output: where shards go; None for a model in memory that is not saved.
        seed: of what tuning draws at random.
        rows: reports of the layers, as plain data.
        solved: for a model in memory: every solved linear without its codes and weight.
        caches: for a model in memory: scales of caches, by name on disk.
        phases: time and memory by phase.
        beside: finishes a block while the next one runs.
    """

    subject: Subject
    plan: Plan
    everything: list[Tensor]
    device: torch.device
    output: Output | None
    progress: Progress
    starved_below: int = STARVED
    inherited: Callable[[Site], Solved] | None = None
    seed: int = 0
    phases: Phases = field(default_factory=Phases)

    def __post_init__(self) -> None:
        self.parts = [range(0)]  # of each process: numbers of its batches
        if self.everything:
            self.parts = ranks.gathered(ranks.portion([ids.numel() for ids in self.everything]))
        self.first = self.parts[ranks.rank()].start
        self.batches = [self.everything[i] for i in self.parts[ranks.rank()]]  # that this process runs
        self.beside = Beside("solver", urgent=True)
        self.full: FullStream | None = None  # of the uncompressed model, where a modifier compares with it
        self.rows: list[dict[str, Any]] = []
        self.solved: list[tuple[Site, Solved]] = []
        self.caches: dict[str, Tensor] = {}

    def timed(self, phase: str, start: float) -> float:
        """A phase that began at `start` is over; returns now."""
        return self.phases.add(phase, start)


Result = tuple[LayerReport, Site, Solved]


def weight_of(model: nn.Module, site: Site) -> Tensor:
    """A site's weight in the model, to read or to write."""
    weight = model.get_submodule(site.module).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def watched(run: Run, states: HiddenStates, at: int, doing: str, start: float) -> Iterator[Batch]:
    """All batches with their hidden states, reporting progress; a stage's half of a block starts at `start`."""
    for i, ids in enumerate(run.batches):
        run.progress.at(at, doing, start + 0.4 * i / len(run.batches))
        hidden = states[i]
        states.prefetch(i + 1)
        yield ids.to(run.device), hidden


def advance_full(run: Run, index: int, full: FullStream, states: HiddenStates) -> None:
    """Run a block as it was, on the stream of the uncompressed model."""
    for i, batch in enumerate(watched(run, states, index, "full precision", 0.0)):
        if full.has(i):
            full.keep(i, run.subject.blocks.run(index, (batch[0], full[i])))
