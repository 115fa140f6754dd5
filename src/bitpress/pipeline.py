"""The block loop: load, collect statistics, solve, install, propagate, write, next.

One pass over the blocks. A block's statistics come from a forward with the blocks before it compressed; then its
linears are solved, and one more forward with the weights as they are stored gives the next block its input. Without
propagation there is one stream, the uncompressed model's, and the first forward also gives the next block its input.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from bitpress import formats, memory, ranks
from bitpress.blocks import recorded_caches
from bitpress.caches import CacheSite, cache_argument
from bitpress.errors import NumericsError
from bitpress.folding import Folding
from bitpress.math.grid import Solved
from bitpress.run import Result, Run, advance_full, watched, weight_of
from bitpress.sites import Site
from bitpress.solving import experts_in, in_one_pass, solve_from, solve_sites, statistics
from bitpress.states import FullStream, HiddenStates
from bitpress.tuning import Tuning, after


@memory.kept()
def execute(run: Run) -> None:
    """Compress every block, then the head, then write what is outside the blocks."""
    subject, plan = run.subject, run.plan
    total = len(subject.blocks)
    forward = plan.needs_stats
    work = None if run.output is None else run.output.work
    states = HiddenStates(plan.hidden_on, run.device, work)
    if plan.full_every:
        run.full = FullStream(plan.full_every, plan.hidden_on, run.device, work, first=run.first)
    try:
        if forward:
            subject.load(None, run.device)
        for index in range(total):
            _block(run, index, states)
        _settle(run)
        _outside(run, states)
        if run.output is not None:
            clock = time.perf_counter()
            run.output.settle()
            run.timed("finish", clock)
    finally:
        run.beside.close()
        subject.forget()
        if run.output is not None:
            run.output.close()
        states.close()
        if run.full is not None:
            run.full.close()
        if forward:
            subject.unload(None)


def _works(run: Run, index: int) -> bool:
    """Whether a block has to be in memory: for what is handed on it has not."""
    return index <= run.plan.last_block or any(s.block == index for s in run.plan.sites)


def _block(run: Run, index: int, states: HiddenStates) -> None:
    """One block, from its load to its shard. A finished one is only run, from its shard, where something needs it."""
    subject, prefix, progress = run.subject, run.subject.blocks.prefix(index), run.progress
    sites = [s for s in run.plan.sites if s.block == index]
    collects, feeds = run.plan.needs_stats and index <= run.plan.last_block, index < run.plan.last_block
    caches = [c for c in run.plan.caches if c.block == index]
    clock = time.perf_counter()
    if run.output is not None and (entry := run.output.finished(index)) is not None:
        run.rows += entry["rows"]
        if subject.streamed and not feeds:
            return
        progress.at(index, "replaying from its shard")
        if run.full is not None:
            subject.load(prefix, run.device)
            advance_full(run, index, run.full, states)
        if feeds and not run.plan.propagates:
            subject.load(prefix, run.device)
            _feed(run, index, states, clock)
            feeds = False
            if subject.streamed:
                subject.unload(prefix)
                return
        read = list(zip(sites, run.output.read_all(index, sites), strict=True))
        kept = run.output.read_others(index, subject, prefix, [*sites, *run.plan.inherited])
        subject.load(prefix, run.device, {**kept, **{s.key: solved.dense() for s, solved in read}})
        run.solved += _kept(run, read)
        if not subject.streamed:
            run.caches |= run.output.read_named(index, [n for c in caches for n in c.spec()])
        clock = run.timed("load", clock)
    else:
        progress.at(index, "loading")
        if _works(run, index):
            subject.load(prefix, run.device)
        if run.device.type == "cuda" and index + 1 < len(subject.blocks) and _works(run, index + 1):
            # while this one is at work
            subject.fetch(subject.blocks.prefix(index + 1), run.device if run.plan.copies_ahead else None)
        run.timed("load", clock)
        folding = Folding(subject, index, uses, sites) if (uses := run.plan.smoothing[index]) else None
        tuning = Tuning(subject, index, run.seed) if any(s.tuning for s in sites) else None
        once = feeds and not run.plan.propagates and collects and in_one_pass(run, index, sites)
        if once and run.plan.solves_beside and tuning is None:
            _solve_beside(run, index, sites, states)
            return
        _settle(run)
        outputs = _Outputs(run, index, states)
        out = outputs.take if once else None
        results = solve_sites(run, index, sites, states, folding, tuning, collects=collects, out=out)
        outputs.hand_on()
        results = _as_read(run, results)
        if not run.plan.propagates:
            if feeds and not once:
                _feed(run, index, states, time.perf_counter())
            feeds = False
        _install(run, results, folding)
        if tuning is not None:
            results = _as_read(run, _tune(run, index, tuning, states, results))
            _install(run, results, None)
        clock = time.perf_counter()
        scales = {}
        if caches:  # they are seen with the weights as they are stored, so the block's output comes first
            scales = _watch_caches(run, index, caches, states, feeds=feeds)
            clock = run.timed("propagate", clock)
            feeds = False
        run.progress.at(index, "writing", 0.7)
        _store(run, index, prefix, results, scales, folding)
        clock = run.timed("write", clock)
    if feeds:
        _feed(run, index, states, clock)
    if run.full is not None:
        run.full.advance()
    subject.unload(prefix)
    memory.give_back()


class _Outputs:
    """What a forward for statistics gives, in place of what it was given.

    Experts that met too few tokens take another forward of the same input: there outputs wait until that is over.
    """

    def __init__(self, run: Run, index: int, states: HiddenStates) -> None:
        self._states = states
        self._waiting: dict[int, Tensor] | None = {} if experts_in(run.subject, index) else None

    def take(self, batch: int, output: Tensor) -> None:
        if self._waiting is None:
            self._states[batch] = output
        else:
            self._waiting[batch] = output

    def hand_on(self) -> None:
        for batch, output in (self._waiting or {}).items():
            self._states[batch] = output
        self._waiting = None


def _solve_beside(run: Run, index: int, sites: list[Site], states: HiddenStates) -> None:
    """Statistics and the next block's input by one forward; all that is left is done while the next block runs."""
    prefix = run.subject.blocks.prefix(index)
    outputs = _Outputs(run, index, states)
    inputs = statistics(run, index, sites, states, outputs.take)
    outputs.hand_on()

    def finish() -> None:
        results = _as_read(run, solve_from(run, sites, inputs))
        if not run.subject.streamed:
            _install(run, results, None)
        _store(run, index, prefix, results, {}, None)
        if run.device.type == "cuda":  # memory that is freed goes to the other stream at once
            torch.cuda.current_stream(run.device).synchronize()
        run.subject.unload(prefix)
        memory.give_back()

    _settle(run)
    run.beside.start(run.device, finish)


def _settle(run: Run) -> None:
    """Wait for the block that is solved beside the one at work."""
    clock = time.perf_counter()
    run.beside.settle()
    run.timed("solve", clock)


def _feed(run: Run, index: int, states: HiddenStates, clock: float) -> None:
    """The next block's input, with the weights as they are."""
    for i, batch in enumerate(watched(run, states, index, "propagating", 0.7)):
        states[i] = run.subject.blocks.run(index, batch)
    run.timed("propagate", clock)


def _as_read(run: Run, results: list[Result]) -> list[Result]:
    """The results with the weights that readers of the checkpoint will compute."""
    if run.output is None or not run.output.compressed:
        return results
    return [
        (row, s, z if s.scheme is None else formats.as_read(z, s.scheme, s.dtype, s.stored)) for row, s, z in results
    ]


def _tune(run: Run, index: int, tuning: Tuning, states: HiddenStates, results: list[Result]) -> list[Result]:
    """Move the solved weights so that the block's output comes nearer to the uncompressed one's."""
    assert run.full is not None
    clock = time.perf_counter()
    tuned = tuning.run(
        run.everything, run.parts, states, run.full, lambda done: run.progress.at(index, "tuning", 0.4 + 0.3 * done)
    )
    run.timed("tune", clock)
    return after(results, tuned)


def _outside(run: Run, states: HiddenStates) -> None:
    """The output head, if it is compressed, and the shard of all that is outside the blocks."""
    total = len(run.subject.blocks)
    sites = [s for s in run.plan.sites if s.block is None]
    if run.output is not None and (entry := run.output.finished(total)) is not None:
        run.rows += entry["rows"]
        if not run.subject.streamed:
            read = list(zip(sites, run.output.read_all(total, sites), strict=True))
            kept = run.output.read_others(total, run.subject, None, [*sites, *run.plan.inherited])
            run.subject.load(None, run.device, {**kept, **{s.key: solved.dense() for s, solved in read}})
            run.solved += _kept(run, read)
        return
    if sites and not run.plan.needs_stats:
        run.subject.load(None, run.device)
    results = solve_sites(run, None, sites, states, None, None, collects=run.plan.needs_stats)
    clock = time.perf_counter()
    _install(run, results, None)
    run.progress.at(total, "writing", 0.7)
    _store(run, total, None, results, {}, None)
    run.timed("finish", clock)


def _install(run: Run, results: list[Result], folding: Folding | None) -> None:
    """Put the solved weights into the model, as a reader of the checkpoint will see them."""
    if folding is not None:
        folding.install()
    for _, site, z in results:
        weight_of(run.subject.model, site).copy_(z.dense())


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
        keys = run.subject.keys(prefix)
        earlier = [s for s in run.plan.inherited if s.key in keys]
        solved += [(s, run.inherited(s)) for s in earlier if run.inherited is not None]
        run.output.write(
            shard, run.subject, keys, solved, rows, last=prefix is None, beside=scales, changed=changed,
            phases=run.phases.lap(),
        )  # fmt: skip


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
        for i, batch in enumerate(watched(run, states, index, "propagating", 0.7)):
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
