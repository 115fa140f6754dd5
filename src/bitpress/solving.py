"""The linears of a block: their statistics, in as many passes as memory asks for, and the algebra on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bitpress import chain, memory, ranks, residual
from bitpress.blocks import Batch, collect
from bitpress.budget import SMALL
from bitpress.errors import NumericsError
from bitpress.experts import UnfusedExperts
from bitpress.folding import Folding
from bitpress.jobs import Input, Job, bundles_of, cost, of_inputs, without_data
from bitpress.math import masks
from bitpress.math.grid import Solved
from bitpress.math.products import float32_products
from bitpress.math.stats import InputStats, StatsAccumulator
from bitpress.modifiers.base import PruningModifier
from bitpress.report import LayerReport
from bitpress.run import Result, Run, advance_full, watched, weight_of
from bitpress.sites import Site, bits_per_weight, label
from bitpress.states import HiddenStates
from bitpress.subject import Subject
from bitpress.threads import together
from bitpress.tuning import Tuning


def solve_sites(
    run: Run,
    index: int | None,
    sites: list[Site],
    states: HiddenStates,
    folding: Folding | None,
    tuning: Tuning | None,
    *,
    collects: bool,
    out: Callable[[int, Tensor], None] | None = None,
) -> list[Result]:
    """Statistics, in as many passes as memory asks for, and the algebra on them; weights are not yet changed.

    Args:
        out: takes the block's output for each batch, as it is before; only where `in_one_pass`.
    """
    at = len(run.subject.blocks) if index is None else index
    _check(run, sites)
    results: dict[str, Result] = {}
    needy = [s for s in sites if collects and s.needs]
    by_module = {s.module: s for s in needy}

    def solve(inputs: Sequence[Input]) -> None:
        run.progress.at(at, "solving", 0.4)
        results.update(_solve(run, of_inputs(by_module, inputs), folding, tuning))

    if collects and run.full is not None and index is not None and not needy and folding is None:
        advance_full(run, index, run.full, states)
    gather = partial(_gather, run, index, states, out=out)
    if folding is None:
        gather(by_module, {}, solve)
    else:
        held: list[Input] | None = []

        def decide(inputs: Sequence[Input]) -> None:
            run.progress.at(at, "smoothing", 0.4)
            for stats, readers, _ in inputs:
                folding.decide(stats, readers)
            if held is not None:
                held.extend(inputs)

        others = {m: None for m in folding.witnesses if m not in by_module}
        if not gather(by_module, others, decide, phase="smooth"):
            held = None  # memory does not hold them all: they are collected again
        clock = time.perf_counter()
        folding.take(ranks.share(folding.scales))  # all have chosen the same, but bits may differ from GPU to GPU
        ranks.agreed(lambda: folding.settle(_first(run, states)))
        clock = run.timed("smooth", clock)
        if held is None:
            gather(by_module, {}, solve)
        else:
            solve(held)
            run.timed("solve", clock)
    clock = time.perf_counter()
    if free := [s for s in sites if s.module not in by_module]:
        run.progress.at(at, "rounding")
        results |= _solve(run, without_data(free), folding, tuning)
    run.timed("solve", clock)
    return [results[s.name] for s in sites]


def statistics(
    run: Run, index: int, sites: Sequence[Site], states: HiddenStates, out: Callable[[int, Tensor], None]
) -> list[Input]:
    """The statistics of a block where one pass serves all its linears; `out` takes its outputs."""
    _check(run, sites)
    held: list[Input] = []
    _gather(run, index, states, {s.module: s for s in sites if s.needs}, {}, held.extend, out=out)
    return held


def solve_from(run: Run, sites: Sequence[Site], inputs: Sequence[Input]) -> list[Result]:
    """The algebra of a block's linears on its statistics; weights are not yet changed."""
    by_module = {s.module: s for s in sites if s.needs}
    jobs = of_inputs(by_module, inputs) + without_data([s for s in sites if s.module not in by_module])
    results = _solve(run, jobs, None, None)
    return [results[s.name] for s in sites]


def _check(run: Run, sites: Sequence[Site]) -> None:
    """Before any forward: it would blame the linears that read what comes of a damaged weight."""
    finite = [torch.isfinite(weight_of(run.subject.model, site)).all() for site in sites]
    for site, fine in zip(sites, torch.stack(finite).tolist() if finite else [], strict=True):
        if not fine:
            raise NumericsError(f"{site.name}: NaN or infinity in the weight; the checkpoint is damaged")


Take = Callable[[Sequence[Input]], None]


def _gather(
    run: Run,
    index: int | None,
    states: HiddenStates,
    sites: dict[str, Site],
    others: dict[str, None],
    take: Take,
    phase: str = "solve",
    out: Callable[[int, Tensor], None] | None = None,
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

    adds = ranks.from_first(lambda: _writer(run, index, states, sites)) if "drift" in needs else None

    def passes(waiting: list[str], policy: str) -> tuple[list[str], bool]:
        """Take them; returns the experts' sites that saw too few tokens (with a policy: none are let off)."""
        starved: list[str] = []
        whole = True
        while waiting:
            clock = time.perf_counter()
            now, later = _at_once(run, waiting, sites, needs)
            modules = {m: run.subject.model.get_submodule(m) for m in now}
            batches = watched(run, states, at, "statistics", 0.0)
            pass_ = partial(
                collect,
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
                adds=adds,
                out=None if policy else out,
            )
            got = ranks.agreed(pass_)
            groups = ranks.reduce(got.groups, run.device)
            clock = run.timed("statistics", clock)
            met = set(got.deferred)
            inputs: list[Input] = []
            for stats, readers in groups:
                met.update(readers)
                first = sites.get(readers[0])
                if not policy and first is not None and first.expert is not None and stats.tokens < run.starved_below:
                    starved += readers
                else:
                    inputs.append((stats, readers, policy))
            take(inputs)
            run.timed(phase, clock)
            for module in (m for m in now if m not in met):
                if module not in sites or sites[module].expert is None or policy:
                    name = sites[module].name if module in sites else module
                    raise NumericsError(f"{name}: never called, so it has no statistics; add it to ignore")
                starved.append(module)
            waiting = [*got.deferred, *later]
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


def _writer(run: Run, index: int | None, states: HiddenStates, sites: dict[str, Site]) -> str | None:
    """The module of the block whose linear takes up what the block's output lacks, if there is one."""
    if index is None:
        return None
    linears = {m: run.subject.model.get_submodule(m) for m, s in sites.items() if s.expert is None}
    hidden = states.sequence(0, 0)
    ids = run.batches[0][:1, : residual.TOKENS].to(run.device)
    first = ids, None if hidden is None else hidden[:, : residual.TOKENS]
    return residual.writer(partial(run.subject.blocks.run, index), linears, first)


def _at_once(
    run: Run, waiting: list[str], sites: dict[str, Site], needs: frozenset[str]
) -> tuple[list[str], list[str]]:
    """Linears whose statistics one pass gathers, and the rest. Of several processes each must gather the same, though
    their tokens go to different experts: so many experts as fit whichever are met."""
    if ranks.world_size() == 1:
        return waiting, []
    now: list[str] = []
    later: list[str] = []
    free = run.plan.gram_bytes
    for module in waiting:
        site = sites.get(module)
        if site is None or site.expert is None:
            now.append(module)
            continue
        free -= StatsAccumulator.nbytes(site.columns, needs)
        (now if free >= 0 or not now else later).append(module)
    return now, later


def in_one_pass(run: Run, index: int, sites: Sequence[Site]) -> bool:
    """Whether one forward of the block surely serves the statistics of all its sites."""
    needy = [s for s in sites if s.needs]
    if not needy or run.plan.smoothing[index] or (experts_in(run.subject, index) and not run.plan.spare_hidden):
        return False
    needs = frozenset().union(*(s.needs for s in needy))
    return sum(StatsAccumulator.nbytes(s.columns, needs) for s in needy) <= run.plan.gram_bytes


def experts_in(subject: Subject, block: int) -> list[UnfusedExperts]:
    """The experts modules of a block."""
    prefix = subject.blocks.prefix(block)
    return [e for n, e in subject.experts.items() if n.startswith(prefix)]


def _first(run: Run, states: HiddenStates) -> Batch:
    """The first sequence, and its hidden states."""
    hidden = states[0]
    return run.batches[0][:1].to(run.device), None if hidden is None else hidden[:1]


def _solve(run: Run, jobs: Sequence[Job], folding: Folding | None, tuning: Tuning | None) -> dict[str, Result]:
    """The algebra of all jobs, each by one process; on a CPU small ones at the same time, as many as it has cores.

    Raises:
        NumericsError: the first of those that fail, in the order of the jobs: what comes later may fail by it.
    """
    owners = ranks.owners([cost(job) for job in jobs])
    mine = [i for i in range(len(jobs)) if owners[i] == ranks.rank()]
    on_cpu = run.device.type == "cpu"
    bundles = [[i] for i in mine] if on_cpu else bundles_of(jobs, mine, run.plan.solver_bytes)
    sizes = {i: sum(site.rows * site.columns for site in jobs[i].sites) for i in mine}
    bundles.sort(key=lambda bundle: sizes[bundle[0]], reverse=True)
    tasks = [partial(_try, run, [jobs[i] for i in bundle], folding) for bundle in bundles]
    alone = sum(size > SMALL for size in sizes.values()) if on_cpu else len(tasks)
    found = []
    with float32_products():
        for task in tasks[:alone]:
            found.append(task())
            if on_cpu:
                memory.give_back()
        found += together(tasks[alone:])
    own = {
        i: outcome for bundle, got in zip(bundles, found, strict=True) for i, outcome in zip(bundle, got, strict=True)
    }
    done: dict[int, list[Part] | NumericsError] = {}
    for number in range(ranks.world_size()):
        done |= ranks.share(own, number)
    results: dict[str, Result] = {}
    for i, job in enumerate(jobs):
        outcome = done[i]
        if isinstance(outcome, NumericsError):
            outcome.agreed = ranks.world_size() > 1
            raise outcome
        results |= {site.name: (report, site, z) for site, (report, z) in zip(job.sites, outcome, strict=True)}
        if tuning is not None and any(site.tuning is not None for site in job.sites):
            weights, stats = _of_job(run, job, folding)
            tuning.held += tuning.held_of(job.sites, weights, [z for _, z in outcome], stats)
    return results


Part = tuple[LayerReport, Solved]  # of a result, without its site


def _try(run: Run, jobs: list[Job], folding: Folding | None) -> list[list[Part] | NumericsError]:
    """What each job comes to; where one of several fails, they are solved one by one, so that it is named."""
    try:
        return list(_solve_together(run, jobs, folding))
    except NumericsError as error:
        if len(jobs) == 1:
            return [NumericsError(f"{jobs[0].sites[0].name}: {error}")]
    return [outcome for job in jobs for outcome in _try(run, [job], folding)]


def _of_job(run: Run, job: Job, folding: Folding | None) -> tuple[list[Tensor], InputStats | None]:
    """The weights of a job, float32, and the statistics of their input, both as folds leave them."""
    if folding is None:
        return [weight_of(run.subject.model, s).float() for s in job.sites], job.stats
    stats = None if job.stats is None else folding.smoothed(job.stats, job.sites[0].module)
    return [folding.weight(s.module) for s in job.sites], stats


def _solve_together(run: Run, jobs: list[Job], folding: Folding | None) -> list[list[Part]]:
    """The results of jobs alike."""
    clock = time.perf_counter()
    problems = [_of_job(run, job, folding) for job in jobs]
    solved = chain.solve_each(jobs[0].sites[0].steps, problems, run.subject.dtype)
    seconds = (time.perf_counter() - clock) / sum(len(job.sites) for job in jobs)
    figures = []
    for (weights, _), found in zip(problems, solved, strict=True):
        for weight, z in zip(weights, found, strict=True):
            before, zeros = ((w == 0).float().mean() for w in (weight, z.dense()))
            figures.append(torch.stack([z.error.to(zeros).reshape(()), zeros, before]))
    told = iter(torch.stack(figures).tolist())  # the device is waited for once
    results: list[list[Part]] = []
    for job, (_, stats), found in zip(jobs, problems, solved, strict=True):
        parts = []
        for site, z in zip(job.sites, found, strict=True):
            error, sparsity, before = next(told)
            mask = _mask_name(site, before, z)
            kept = mask == "unstructured" and not _prunes(site)
            note = f"{before:.1%} of its weights were exactly zero: they count as pruned and stay so" * kept
            report = LayerReport(
                name=site.name,
                method=site.method,
                scheme=label(site.group),
                rel_error=error,
                error_of="weight" if stats is None or stats.gram is None else "output",
                bits_per_weight=bits_per_weight(site),
                sparsity=sparsity,
                mask=mask,
                tokens=0 if stats is None else stats.tokens,
                policy=job.policy,
                seconds=seconds,
                note="; ".join(filter(None, (z.note, note))),
            )
            parts.append((report, z))
        results.append(parts)
    return results


def _prunes(site: Site) -> list[PruningModifier]:
    """The modifiers that prune a site."""
    return [s.modifier for s in site.steps if isinstance(s.modifier, PruningModifier) and s.sparsity]


def _mask_name(site: Site, zeros: float, z: Solved) -> str:
    """For the report, of a weight with this share of zeros before; a structure that the recipe asks for has been
    checked."""
    asked = _prunes(site)
    if asked and asked[-1].structure is not None:
        return str(asked[-1].structure)
    return masks.name_of(z.dense()) if asked or zeros >= masks.PRUNED_SHARE else ""
