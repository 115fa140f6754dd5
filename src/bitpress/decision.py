"""What a survey leads to: the schemes of a size target, compared with the uniform scheme of the same size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitpress import memory, ranks
from bitpress.blocks import Batch
from bitpress.journal import Journal
from bitpress.perturb import divergence, in_float32, installed, solved, statistics, tensors_of
from bitpress.run import Run
from bitpress.size_target import Allocation, SizeTarget
from bitpress.states import HiddenStates
from bitpress.survey import Data, Measured, survey


@dataclass(frozen=True)
class Decision:
    """What a survey leads to.

    Attributes:
        allocation: the schemes of the size target, None if there is none.
        shares: of each profile, the share of zeros of each block.
        outliers: of each profile, the share of outliers of each block.
    """

    allocation: Allocation | None
    shares: list[list[float]]
    outliers: list[list[float]]

    @property
    def picks(self) -> Mapping[str, str]:
        return {} if self.allocation is None else self.allocation.picks

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        made = None if self.allocation is None else self.allocation.to_dict()
        return {"allocation": made, "shares": self.shares, "outliers": self.outliers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Decision:
        """What `to_dict` gave."""
        made = None if data["allocation"] is None else Allocation.from_dict(data["allocation"])
        return cls(made, data["shares"], data["outliers"])


@memory.kept()
def decide(run: Run, journal: Journal | None) -> Decision:
    """Survey, choose, compare; what the journal has is not done again."""
    if journal is not None and journal.decision is not None:
        return Decision.from_dict(journal.decision)
    measured = survey(run, journal)
    outliers = [list(mine) for mine in zip(*measured.outliers, strict=True)]
    shares = [p.shares(mine) for p, mine in zip(run.plan.profiles, outliers, strict=True)]
    target = run.plan.target
    found = Decision(None if target is None else _allocation(run, target, measured), shares, outliers)
    found = ranks.share(found)  # all have surveyed the same, but bits may differ from GPU to GPU
    if journal is not None:
        journal.note({"decision": found.to_dict(), "phases": run.phases.lap()})
    return found


def _allocation(run: Run, target: SizeTarget, measured: Measured) -> Allocation:
    """The schemes with the least predicted loss, or the uniform one if that is better when measured."""
    losses = measured.losses(target)
    picks = target.pick(losses)
    notes = ["the KL of every group of linears was measured with its scheme alone, and scaled from scheme to scheme"]
    compared: dict[str, float] = {}
    uniform = target.uniform()
    if not uniform:
        notes.append("no uniform scheme has this size, so there was none to compare with")
    else:
        best = min(uniform, key=lambda c: (sum(losses[g.name][c] for g in target.groups), c))
        alike = {g.name: best for g in target.groups}
        if alike == picks:
            notes.append(f"{best} everywhere is predicted to be best")
        else:
            clock = time.perf_counter()
            compared = compare(run, target, {"mixed": picks, best: alike})
            run.timed("comparison", clock)
            won = compared["mixed"] <= compared[best]
            tokens = "the same tokens" if sum(map(len, run.everything)) == 1 else "other tokens"
            notes.append(
                f"on {tokens} the mixture has a KL of {compared['mixed']:.4f}, {best} everywhere "
                f"{compared[best]:.4f}: {'the mixture' if won else best} it is"
            )
            picks = picks if won else alike
    return Allocation(picks, {g: losses[g][c] for g, c in picks.items()}, tuple(notes), compared)


def compare(run: Run, target: SizeTarget, rivals: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """The KL of whole allocations, as the run's own solver makes them, on tokens that the survey has not seen.

    Args:
        rivals: by name, the label of each group.
    """
    return _Comparison(run, target, rivals).execute()


class _Comparison:
    """The uncompressed model and whole allocations, side by side through the blocks."""

    def __init__(self, run: Run, target: SizeTarget, rivals: Mapping[str, Mapping[str, str]]) -> None:
        self.run, self.rivals = run, rivals
        self.sites = [s for g in target.groups for s in g.sites]
        self.choice = {
            (name, s.name): target.choices[picks[g.name]]
            for name, picks in rivals.items()
            for g in target.groups
            for s in g.sites
        }
        data = Data.of(run.everything)
        self.whole, self.held = data.whole, data.held
        folder = None if run.output is None else run.output.work
        names = ("whole", "clean", *rivals)
        self.now, self.next = ({n: HiddenStates(run.plan.hidden_on, run.device, folder) for n in names} for _ in "ab")

    def execute(self) -> dict[str, float]:
        subject, total = self.run.subject, len(self.run.subject.blocks)
        try:
            subject.load(None, self.run.device)
            with in_float32(tensors_of(subject, None)):
                for index in range(total):
                    prefix = subject.blocks.prefix(index)
                    subject.load(prefix, self.run.device)
                    with in_float32(tensors_of(subject, index)):
                        self._block(index)
                    subject.unload(prefix)
                    memory.give_back()
                return self._divergences()
        finally:
            for stream in (*self.now.values(), *self.next.values()):
                stream.close()
            subject.unload(None)

    def _block(self, index: int) -> None:
        blocks, model = self.run.subject.blocks, self.run.subject.model
        weights = self._solve(index)
        for name in ("clean", *self.rivals):
            self.run.progress.at(index, "comparing", 0.5)
            with installed(model, weights.get(name, {})):
                for i, ids in enumerate(self.held):
                    self.next[name][i] = blocks.run(index, (ids.to(self.run.device), self.now[name][i]))
        self.now, self.next = self.next, self.now

    def _solve(self, index: int | None) -> dict[str, dict[str, Tensor]]:
        """The weights of a block's linears, by rival and module."""
        at = len(self.run.subject.blocks) if index is None else index

        def batches() -> Iterator[Batch]:
            for i, ids in enumerate(self.whole):
                self.run.progress.at(at, "comparing: statistics", 0.5 * i / len(self.whole))
                yield ids.to(self.run.device), self.now["whole"][i]

        weights: dict[str, dict[str, Tensor]] = {name: {} for name in self.rivals}
        mine = [s for s in self.sites if s.block == index]
        for readers, stats in statistics(self.run, index, mine, batches, self.next["whole"].__setitem__):
            choices = {c.label: c for name in self.rivals for s in readers if (c := self.choice[name, s.name])}
            for choice in choices.values():
                taking = {n: [s for s in readers if self.choice[n, s.name] is choice] for n in self.rivals}
                together = [s for s in readers if any(s in sites for sites in taking.values())]
                made = solved(self.run, choice, together, stats)
                for name, sites in taking.items():
                    weights[name] |= {s.module: made[s.module] for s in sites}
        return weights

    def _divergences(self) -> dict[str, float]:
        blocks, model = self.run.subject.blocks, self.run.subject.model
        weights, tokens = self._solve(None), sum(ids.numel() for ids in self.held)
        sums = dict.fromkeys(self.rivals, 0.0)
        for i, ids in enumerate(self.held):
            ids = ids.to(self.run.device)
            p = blocks.logits((ids, self.now["clean"][i])).log_softmax(-1)
            for name in self.rivals:
                with installed(model, weights[name]):
                    q = blocks.logits((ids, self.now[name][i]))
                sums[name] += float(divergence(p, q).sum(dtype=torch.float64)) / tokens
        return sums
