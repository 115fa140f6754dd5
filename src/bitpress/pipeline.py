"""The block loop: load, collect statistics, solve, install, propagate, write, next.

One pass over the blocks. A block's statistics come from a forward with the blocks before it compressed; then its
linears are solved, and one more forward with the weights as they are stored gives the next block its input.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitpress import chain, memory, ranks
from bitpress.blocks import Batch, collect, recorded_caches
from bitpress.caches import CacheSite, cache_argument
from bitpress.errors import NumericsError
from bitpress.folding import Folding
from bitpress.math import masks
from bitpress.math.grid import Solved
from bitpress.math.stats import InputStats, float32_products
from bitpress.modifiers.base import PruningModifier
from bitpress.output import Output
from bitpress.plan import Plan, experts_in
from bitpress.progress import Progress
from bitpress.report import LayerReport
from bitpress.sites import Site, bits_per_weight, label
from bitpress.states import FullStream, HiddenStates
from bitpress.subject import Subject
from bitpress.tuning import Tuning, after

STARVED = 256  # tokens; an expert that saw fewer takes its statistics from all tokens of the block


@dataclass
class Run:
    """The inputs of one pass, and what it gathers.

    Attributes:
        batches: token ids (B, L), in order.
        inherited: gives a linear that an earlier stage has quantized, for the shard that it is written to.
        output: where shards go; None for a model in memory that is not saved.
        seed: of what tuning draws at random.
        rows: reports of the layers, as plain data.
        solved: for a model in memory: every solved linear without its codes and weight.
        caches: for a model in memory: scales of caches, by name on disk.
        seconds: time by phase.
    """

    subject: Subject
    plan: Plan
    batches: list[Tensor]
    device: torch.device
    output: Output | None
    progress: Progress
    starved_below: int = STARVED
    inherited: Callable[[Site], Solved] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.full: FullStream | None = None  # of the uncompressed model, where a modifier compares with it
        self.rows: list[dict[str, Any]] = []
        self.solved: list[tuple[Site, Solved]] = []
        self.caches: dict[str, Tensor] = {}
        self.seconds: dict[str, float] = {}

    def timed(self, phase: str, start: float) -> float:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - start
        return now


@memory.kept()
def execute(run: Run) -> None:
    """Compress every block, then the head, then write what is outside the blocks."""
    subject, plan = run.subject, run.plan
    total = len(subject.blocks)
    forward = plan.needs_stats
    work = None if run.output is None else run.output.work
    states = HiddenStates(plan.hidden_on, run.device, work)
    if plan.full_every:
        run.full = FullStream(plan.full_every, plan.hidden_on, run.device, work)
    try:
        if forward:
            subject.load(None, run.device)
        for index in range(total):
            _block(
                run,
                index,
                states,
                collects=forward and index <= plan.last_block,
                feeds=index < plan.last_block,
            )
        _outside(run, states)
    finally:
        states.close()
        if run.full is not None:
            run.full.close()
        if forward:
            subject.unload(None)


def _block(run: Run, index: int, states: HiddenStates, *, collects: bool, feeds: bool) -> None:
    """One block, from its load to its shard. A finished one is only run, from its shard, where something needs it."""
    subject, prefix, progress = run.subject, run.subject.blocks.prefix(index), run.progress
    sites = [s for s in run.plan.sites if s.block == index]
    caches = [c for c in run.plan.caches if c.block == index]
    clock = time.perf_counter()
    if run.output is not None and (entry := run.output.finished(index)) is not None:
        run.rows += entry["rows"]
        if subject.streamed and not feeds:
            return
        progress.at(index, "replaying from its shard")
        if run.full is not None:
            subject.load(prefix, run.device)
            _advance(run, index, run.full, states)
        read = [(s, run.output.read(index, s)) for s in sites]
        kept = run.output.read_others(index, subject, prefix, [*sites, *run.plan.inherited])
        subject.load(prefix, run.device, {**kept, **{s.key: solved.dense() for s, solved in read}})
        run.solved += _kept(run, read)
        if not subject.streamed:
            run.caches |= run.output.read_named(index, [n for c in caches for n in c.spec()])
        clock = run.timed("load", clock)
    else:
        progress.at(index, "loading")
        subject.load(prefix, run.device)
        run.timed("load", clock)
        folding = Folding(subject, index, uses, sites) if (uses := run.plan.smoothing[index]) else None
        tuning = Tuning(subject, index, run.seed) if any(s.tuning for s in sites) else None
        results = _solve_sites(run, index, sites, states, folding, tuning, collects=collects)
        _install(run, results, folding)
        if tuning is not None:
            results = _tune(run, index, tuning, states, results)
            _install(run, results, None)
        clock = time.perf_counter()
        scales = {}
        if caches:  # they are seen with the weights as they are stored, so the block's output comes first
            scales = _watch_caches(run, index, caches, states, feeds=feeds)
            clock = run.timed("propagate", clock)
            feeds = False
        _store(run, index, prefix, results, scales, folding)
        clock = run.timed("write", clock)
    if feeds:
        for i, batch in enumerate(_watched(run, states, index, "propagating", 0.7)):
            states[i] = subject.blocks.run(index, batch)
        run.timed("propagate", clock)
    if run.full is not None:
        run.full.advance()
    subject.unload(prefix)
    memory.give_back()


def _tune(run: Run, index: int, tuning: Tuning, states: HiddenStates, results: list[Result]) -> list[Result]:
    """Move the solved weights so that the block's output comes nearer to the uncompressed one's."""
    assert run.full is not None
    clock = time.perf_counter()
    tuned = tuning.run(run.batches, states, run.full, lambda done: run.progress.at(index, "tuning", 0.4 + 0.3 * done))
    run.timed("tune", clock)
    return after(results, tuned)


def _advance(run: Run, index: int, full: FullStream, states: HiddenStates) -> None:
    """Run a block as it was, on the stream of the uncompressed model."""
    for i, batch in enumerate(_watched(run, states, index, "full precision", 0.0)):
        if full.has(i):
            full.keep(i, run.subject.blocks.run(index, (batch[0], full[i])))


def _outside(run: Run, states: HiddenStates) -> None:
    """The output head, if it is compressed, and the shard of all that is outside the blocks."""
    total = len(run.subject.blocks)
    sites = [s for s in run.plan.sites if s.block is None]
    if run.output is not None and (entry := run.output.finished(total)) is not None:
        run.rows += entry["rows"]
        if not run.subject.streamed:
            read = [(s, run.output.read(total, s)) for s in sites]
            kept = run.output.read_others(total, run.subject, None, [*sites, *run.plan.inherited])
            run.subject.load(None, run.device, {**kept, **{s.key: solved.dense() for s, solved in read}})
            run.solved += _kept(run, read)
        return
    if sites and not run.plan.needs_stats:
        run.subject.load(None, run.device)
    results = _solve_sites(run, None, sites, states, None, None, collects=run.plan.needs_stats)
    clock = time.perf_counter()
    _install(run, results, None)
    _store(run, total, None, results, {}, None)
    run.timed("write", clock)


Result = tuple[LayerReport, Site, Solved]


def _install(run: Run, results: list[Result], folding: Folding | None) -> None:
    """Put the solved weights into the model, as a reader of the checkpoint will see them."""
    if folding is not None:
        folding.install()
    for _, site, z in results:
        _weight(run.subject.model, site).copy_(z.dense())


def _store(
    run: Run,
    shard: int,
    prefix: str | None,
    results: list[Result],
    scales: dict[str, Tensor],
    folding: Folding | None,
) -> None:
    """Write the shard; `scales` are those of caches, by name on disk."""
    solved = [(site, z) for _, site, z in results]
    changed = {} if folding is None else {key: t.cpu() for key, t in folding.changed.items()}
    rows = [report.to_dict() for report, _, _ in results]
    run.rows += rows
    run.solved += _kept(run, solved)
    if not run.subject.streamed:
        run.caches |= scales
    if run.output is not None:
        run.progress.at(shard, "writing", 0.7)
        keys = run.subject.keys(prefix)
        earlier = [s for s in run.plan.inherited if s.key in keys]
        solved += [(s, run.inherited(s)) for s in earlier if run.inherited is not None]
        run.output.write(shard, run.subject, keys, solved, rows, last=prefix is None, beside=scales, changed=changed)


def _kept(run: Run, solved: list[tuple[Site, Solved]]) -> list[tuple[Site, Solved]]:
    """What a model in memory keeps of its solved linears; a streamed one keeps nothing."""
    if run.subject.streamed:
        return []
    return [(s, replace(z, codes=None, qparams=z.qparams.to("cpu"))) for s, z in solved if z.qparams is not None]


def _watch_caches(
    run: Run, index: int, caches: list[CacheSite], states: HiddenStates, *, feeds: bool
) -> dict[str, Tensor]:
    """Run a block whose weights are solved and set the scales of its caches; with `feeds`, also the next block's input.

    Raises:
        NumericsError: an attention put nothing into its cache, or NaN.
    """
    blocks, model = run.subject.blocks, run.subject.model
    attentions = {c.module: model.get_submodule(c.module) for c in caches}
    arguments = {id(m): cache_argument(m) or "" for m in attentions.values()}
    with recorded_caches(attentions, lambda module: arguments[id(module)]) as seen:
        for i, batch in enumerate(_watched(run, states, index, "propagating", 0.7)):
            out = blocks.run(index, batch)
            if feeds:
                states[i] = out
    scales: dict[str, Tensor] = {}
    for cache in caches:
        keys, values = seen[cache.module].keys, seen[cache.module].values
        if keys is None or values is None:
            raise NumericsError(f"{cache.name}: put nothing into its cache; drop kv_cache_scheme for this model")
        scales |= cache.scales(ranks.reduce_range(keys), ranks.reduce_range(values))
    return scales


def _weight(model: nn.Module, site: Site) -> Tensor:
    weight = model.get_submodule(site.module).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _solve_sites(
    run: Run,
    index: int | None,
    sites: list[Site],
    states: HiddenStates,
    folding: Folding | None,
    tuning: Tuning | None,
    *,
    collects: bool,
) -> list[Result]:
    """Statistics, in as many passes as memory asks for, and the algebra on them; weights are not yet changed."""
    at = len(run.subject.blocks) if index is None else index
    results: dict[str, Result] = {}
    needy = [s for s in sites if collects and s.needs]
    by_module = {s.module: s for s in needy}

    def solve(stats: InputStats, readers: Sequence[str], policy: str) -> None:
        run.progress.at(at, "solving", 0.4)
        read = [by_module[m] for m in readers if m in by_module]
        results.update(_solve(run, read, stats, policy, folding, tuning))

    if run.full is not None and index is not None and not needy and folding is None:
        _advance(run, index, run.full, states)
    gather = partial(_gather, run, index, states)
    if folding is None:
        gather(by_module, {}, solve)
    else:
        held: list[tuple[InputStats, Sequence[str], str]] | None = []

        def decide(stats: InputStats, readers: Sequence[str], policy: str) -> None:
            run.progress.at(at, "smoothing", 0.4)
            folding.decide(stats, readers)
            if held is not None:
                held.append((stats, readers, policy))

        others = {m: None for m in folding.witnesses if m not in by_module}
        if not gather(by_module, others, decide, phase="smooth"):
            held = None  # memory does not hold them all: they are collected again
        clock = time.perf_counter()
        folding.settle(_first(run, states))
        run.timed("smooth", clock)
        clock = time.perf_counter()
        while held:
            solve(*held.pop(0))
        run.timed("solve", clock)
        if held is None:
            gather(by_module, {}, solve)
    clock = time.perf_counter()
    free: dict[str, list[Site]] = {}
    for site in sites:
        if site.module not in by_module:
            free.setdefault(site.partners or site.name, []).append(site)
    for together in free.values():
        run.progress.at(at, "rounding")
        results |= _solve(run, together, None, "", folding, tuning)
    run.timed("solve", clock)
    return [results[s.name] for s in sites]


Take = Callable[[InputStats, Sequence[str], str], None]


def _gather(
    run: Run,
    index: int | None,
    states: HiddenStates,
    sites: dict[str, Site],
    others: dict[str, None],
    take: Take,
    phase: str = "solve",
) -> bool:
    """Hand over the statistics of every distinct input, with the module names of those that read it.

    Args:
        sites: by module name.
        others: module names of more that read one, which are not compressed.
        phase: to which the time of `take` is counted.

    Returns:
        Whether one pass of each kind held all of them.
    """
    blocks = run.subject.blocks
    at = len(blocks) if index is None else index
    needs = frozenset().union(*(s.needs for s in sites.values()))
    experts = experts_in(run.subject, index) if index is not None else []
    visit = blocks.visit_tail if index is None else partial(blocks.visit, index)

    def beside(number: int) -> Batch | None:
        if run.full is None or not run.full.has(number):
            return None
        return run.batches[number].to(run.device), run.full[number]

    def passes(waiting: list[str], policy: str) -> tuple[list[str], bool]:
        """Take them; returns the experts' sites that saw too few tokens (with a policy: none are let off)."""
        starved: list[str] = []
        whole = True
        while waiting:
            clock = time.perf_counter()
            modules = {m: run.subject.model.get_submodule(m) for m in waiting}
            batches = _watched(run, states, at, "statistics", 0.0)
            got = collect(
                visit,
                modules,
                batches,
                budget=run.plan.gram_bytes,
                needs=needs,
                leave_early=not experts,
                # with a policy the block's output is not its own: starved experts are run for their statistics only
                beside=None if policy else beside,
                keep=None if policy or run.full is None else run.full.keep,
                unpaired=frozenset(m for m, s in sites.items() if s.expert is not None),
            )
            clock = run.timed("statistics", clock)
            met = set(got.deferred)
            for own, readers in got.groups:
                met.update(readers)
                stats = ranks.reduce(own)
                first = sites.get(readers[0])
                if not policy and first is not None and first.expert is not None and stats.tokens < run.starved_below:
                    starved += readers
                else:
                    take(stats, readers, policy)
            run.timed(phase, clock)
            for module in (m for m in waiting if m not in met):
                if module not in sites or sites[module].expert is None or policy:
                    name = sites[module].name if module in sites else module
                    raise NumericsError(f"{name}: never called, so it has no statistics; add it to ignore")
                starved.append(module)
            waiting = list(got.deferred)
            whole = whole and not waiting
        return starved, whole

    starved, whole = passes([*sites, *others], "")
    if starved:
        for module in experts:
            path = next(n for n, m in run.subject.experts.items() if m is module)
            numbers = (sites[m].expert for m in starved if m.startswith(path + "."))
            module.on_all_tokens = frozenset(n for n in numbers if n is not None)
        try:
            _, again = passes(starved, f"all tokens of the block: the router gave it fewer than {run.starved_below}")
        finally:
            for module in experts:
                module.on_all_tokens = frozenset()
        whole = whole and again
    return whole


def _first(run: Run, states: HiddenStates) -> Batch:
    """The first sequence, and its hidden states."""
    hidden = states[0]
    return run.batches[0][:1].to(run.device), None if hidden is None else hidden[:1]


def _solve(
    run: Run,
    sites: list[Site],
    stats: InputStats | None,
    policy: str,
    folding: Folding | None,
    tuning: Tuning | None,
) -> dict[str, Result]:
    """Linears that read the same input: one call of the solver for those with the same steps."""
    results: dict[str, Result] = {}
    parts: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        steps = tuple((id(s.modifier), s.claim.name, s.sparsity) for s in site.steps)
        # what must share a number is solved in one call, and nothing else with it
        parts.setdefault((steps, site.partners), []).append(site)
    if folding is not None and stats is not None and sites:
        stats = folding.smoothed(stats, sites[0].module)
    for part in parts.values():
        clock = time.perf_counter()
        weights = [_weight(run.subject.model, s).float() if folding is None else folding.weight(s.module) for s in part]
        for site, weight in zip(part, weights, strict=True):
            if not torch.isfinite(weight).all():
                raise NumericsError(f"{site.name}: NaN or infinity in the weight; the checkpoint is damaged")
        try:
            with float32_products():
                solved = ranks.broadcast(chain.solve(part[0].steps, weights, stats, run.subject.dtype))
        except NumericsError as error:
            raise NumericsError(f"{part[0].name}: {error}") from None
        seconds = (time.perf_counter() - clock) / len(part)
        if tuning is not None:
            tuning.hold(part, weights, solved, stats)
        for site, weight, z in zip(part, weights, solved, strict=True):
            dense = z.dense()
            report = LayerReport(
                name=site.name,
                method=site.method,
                scheme=label(site.group),
                rel_error=float(z.error),
                error_of="weight" if stats is None or stats.gram is None else "output",
                bits_per_weight=bits_per_weight(site),
                sparsity=float((dense == 0).float().mean()),
                mask=_mask_name(site, weight, dense),
                tokens=0 if stats is None else stats.tokens,
                policy=policy,
                seconds=seconds,
            )
            results[site.name] = (report, site, z)
    return results


def _mask_name(site: Site, before: Tensor, after: Tensor) -> str:
    """For the report; a structure that the recipe asks for has been checked."""
    asked = [s.modifier for s in site.steps if isinstance(s.modifier, PruningModifier) and s.sparsity]
    if asked and asked[-1].structure is not None:
        return str(asked[-1].structure)
    return masks.name_of(after) if asked or masks.pruned(before) is not None else ""


def _watched(run: Run, states: HiddenStates, at: int, doing: str, start: float) -> Iterator[Batch]:
    """All batches with their hidden states, reporting progress; a stage's half of a block starts at `start`."""
    for i, ids in enumerate(run.batches):
        run.progress.at(at, doing, start + 0.4 * i / len(run.batches))
        yield ids.to(run.device), states[i]
