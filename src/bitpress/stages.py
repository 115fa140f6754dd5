"""The stages of a run, one after the other: each reads a checkpoint and writes one.

Those between the first and the last lie in the output's work folder, uncompressed (dense weights beside their
scales), and go when the run is complete. Each stage has a journal; a run that was killed goes on in the first stage
that is not finished. A model in memory is changed in place and passes from stage to stage.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bitpress import decision, formats, journal, pipeline, profiles, ranks, size_target, tuning
from bitpress.checkpoint import Source
from bitpress.errors import PlanError
from bitpress.math.grid import Solved, quantize
from bitpress.output import Output, read_site
from bitpress.plan import Plan, settle, whole
from bitpress.recipe import Recipe
from bitpress.run import Run
from bitpress.sites import Site, stored_spec
from bitpress.subject import FolderSubject, ModuleSubject, Subject

if TYPE_CHECKING:
    from bitpress.oneshot import Arguments
    from bitpress.prepare import Prepared

STAGES = "stages"  # folder in the work folder


@dataclass
class Done:
    """What the stages up to now have made.

    Attributes:
        plan, recipe: of the run, with what surveys have decided.
        rows: reports of the layers.
        solved: for a model in memory: its quantized linears, without codes.
        caches: for a model in memory: scales of caches, by name on disk.
        surveys: sections of the report.
        report: of the last stage.
    """

    plan: Plan
    recipe: Recipe
    rows: list[dict[str, Any]] = field(default_factory=list)
    solved: list[tuple[Site, Solved]] = field(default_factory=list)
    caches: dict[str, Tensor] = field(default_factory=dict)
    surveys: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


def run_stages(args: Arguments, ready: Prepared, identity: dict[str, Any], started: float) -> Done:
    """Run what is not finished.

    Args:
        identity: what makes two runs the same run.
        started: when the run began, for the report.
    """
    places = _places(ready)
    done, first = Done(ready.plan, ready.recipe), 0
    if len(places) > 1 and ready.output is not None:
        work = ready.output / journal.WORK
        ranks.from_first(lambda: journal.Journal(work, identity, None))  # claims the folder for this run
        first = ranks.from_first(lambda: _finished(places, ready, identity))
        if first:
            done = _taken_up(places[first - 1], ready, first)
            args.progress.note(f"stage {ready.recipe.stages[first - 1].name} is finished; going on from there")
    for i in range(first, len(places)):
        subject = ready.subject
        before = places[i - 1] if i else None
        if subject.streamed and before is not None:
            hidden = [f"{s.name}.{n}" for s in ready.plans[i].inherited for n in _beside(s)]
            subject = FolderSubject(
                before,
                trust_remote_code=args.trust_remote_code_model,
                hidden=hidden,
                attention=args.attn_implementation,
            )
        _run_stage(args, ready, i, subject, places[i], _identity_of(identity, ready, i), done, started)
        if before is not None and i < len(places) - 1:
            ranks.barrier()
            if ranks.first():
                shutil.rmtree(before)  # what comes next starts from this stage
    return done


def _places(ready: Prepared) -> list[Path | None]:
    """Where each stage writes."""
    names = [stage.name for stage in ready.recipe.stages]
    if ready.output is None:
        return [None for _ in names]
    folder = ready.output / journal.WORK / STAGES
    between = [folder / f"{i + 1}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}" for i, name in enumerate(names[:-1])]
    return [*between, ready.output]


def _identity_of(identity: dict[str, Any], ready: Prepared, i: int) -> dict[str, Any]:
    """Of a stage: the last one completes the run."""
    return identity if i == len(ready.plans) - 1 else {**identity, "stage": ready.recipe.stages[i].name}


def _finished(places: list[Path | None], ready: Prepared, identity: dict[str, Any]) -> int:
    """How many stages are finished."""
    for i in reversed(range(len(places) - 1)):
        place = places[i]
        if place is not None and journal.finished(place, _identity_of(identity, ready, i)):
            return i + 1
    return 0


def _taken_up(place: Path | None, ready: Prepared, i: int) -> Done:
    """What the stages before stage `i` have made; puts their weights into a model in memory."""
    assert place is not None
    report = json.loads((place / "report.json").read_text(encoding="utf-8"))
    done = Done(ready.plan, ready.recipe, report["layers"])
    if isinstance(ready.subject, ModuleSubject):
        source = Source(place)
        for key, disk in ready.subject.layout.disk_of.items():
            ready.subject.assign({key: source.read([disk])[disk]})
        done.solved = [(s, replace(_stored(source, s), codes=None)) for s in ready.plans[i].inherited]
    return done


def _beside(site: Site) -> list[str]:
    """Suffixes of the tensors beside an uncompressed weight."""
    return [n for n in stored_spec(site, compressed=False) if n != "weight"]


def _stored(source: Source, site: Site) -> Solved:
    """A linear from an uncompressed checkpoint."""
    return read_site(lambda name: source.tensors[name][0], site, compressed=False)


def _kept(subject: Subject, kept: Solved, site: Site) -> Solved:
    """A linear of a model in memory."""
    assert site.scheme is not None and kept.qparams is not None
    weight = subject.stored([site.key])[site.key].float()
    return replace(kept, codes=quantize(weight, kept.qparams, formats.grid_of(site.scheme, subject.dtype)))


def _run_stage(
    args: Arguments,
    ready: Prepared,
    i: int,
    subject: Subject,
    place: Path | None,
    identity: dict[str, Any],
    done: Done,
    started: float,
) -> None:
    """One pass over the blocks, from its input to its checkpoint; adds to `done`."""
    plan, stage, several = ready.plans[i], ready.recipe.stages[i], len(ready.plans) > 1
    last = i == len(ready.plans) - 1
    output = None
    numerics = _numerics(ready, plan)
    if place is not None:
        work, new = place / journal.WORK, numerics
        log = ranks.from_first(lambda: journal.Journal(work, identity, new))
        ranks.agreed(log.visible)
        if log.done:
            args.progress.note(f"{len(log.done)} of {len(plan.shards)} shards are finished; going on from there")
        numerics = _adopt(log.numerics, numerics, place)
        packed = args.save_compressed and last
        output = Output(
            place, log, len(plan.shards), compressed=packed, verify=args.verify, beside=ready.device.type == "cuda"
        )
    earlier = {site.name: z for site, z in done.solved}

    def inherited(site: Site) -> Solved:
        if isinstance(subject, FolderSubject):
            return _stored(subject.source, site)
        return _kept(subject, earlier[site.name], site)

    batches = []
    if ready.data and (plan.needs_stats or plan.surveys):
        batches = list(ready.data.batches(numerics["batch_size"]))
    run = Run(
        subject, plan, batches, ready.device, output, args.progress, starved_below=args.min_expert_tokens,
        inherited=inherited, seed=args.seed,
    )  # fmt: skip
    if plan.surveys:
        with _frozen(numerics):
            plan = run.plan = _survey(args, ready, i, run, done)
    args.progress.begin(args.stage or stage.name, len(subject.blocks))
    complete = False
    try:
        with _frozen(numerics):
            pipeline.execute(run)
        complete = True
    finally:
        args.progress.end(complete)
        if not complete and not subject.streamed and (run.rows or done.rows):
            subject.model.bitpress_report = {"run": "failed"}  # type: ignore[assignment]  # some blocks are changed
    if idle := tuning.idle(run.rows):
        args.progress.note(idle)
        done.plan = replace(done.plan, notes=(*done.plan.notes, idle))
    done.rows += [{**row, "stage": stage.name} for row in run.rows] if several else run.rows
    done.solved += run.solved
    done.caches |= run.caches
    done.report = _report(args, ready, plan, run, done, identity, numerics, time.perf_counter() - started)
    text = done.recipe if last else replace(ready.recipe, stages=(done.recipe.stages[i],))
    if output is not None:
        tokenizer = None if args.tokenizer is None and subject.folder else ready.tokenizer
        whole, report = output, done.report
        ranks.barrier()  # none has anything open in the work folder
        ranks.from_first(lambda: whole.finish(subject, plan, text.to_yaml(), report, tokenizer))


def _survey(args: Arguments, ready: Prepared, i: int, run: Run, done: Done) -> Plan:
    """The plan of a stage after its survey, with which `done` goes on."""
    plan = run.plan
    log = None if run.output is None else run.output.journal
    args.progress.begin("survey", len(run.subject.blocks))
    complete = False
    try:
        found = decision.decide(run, log)
        complete = True
    finally:
        args.progress.end(complete)
    last = i == len(ready.plans) - 1
    settled = settle(plan, run.subject, found.picks, found.shares, compressed=args.save_compressed and last)
    if plan.target is not None and found.allocation is not None:
        section = size_target.section(plan.target, found.allocation)
        done.surveys["size_target"] = section
        done.recipe = size_target.explicit(done.recipe, plan.target, found.picks)
        args.progress.note(f"size target: {section['bits_per_weight']:.4f} bits per weight")
        for note in found.allocation.notes:
            args.progress.note(f"size target: {note}")
    for profile, shares, outliers in zip(plan.profiles, found.shares, found.outliers, strict=True):
        done.recipe = profiles.listed(done.recipe, profile, shares)
        section = {"method": profile.modifier.method, "sparsity": shares, "outliers": outliers}
        done.surveys.setdefault("sparsity_profiles", []).append(section)
    plans = [settled if p is plan else p for p in ready.plans]
    notes = dict.fromkeys([*ready.plan.notes, *settled.notes])
    for note in notes:
        if note not in ready.plan.notes:  # of the schemes that were chosen
            args.progress.note(note)
    done.plan = replace(whole(plans), notes=tuple(notes))
    return settled


def _numerics(ready: Prepared, plan: Plan) -> dict[str, Any]:
    """What changes the bits of a result though it is the same run."""
    import torch

    from bitpress.attention import implementation

    config = ready.subject.config
    cuda = ready.device.type == "cuda"
    name = torch.cuda.get_device_name(ready.device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    each = len(ready.data.sequences) // ranks.world_size() if ready.data else plan.batch_size
    return {
        "processes": ranks.world_size(),
        "batch_size": max(1, min(plan.batch_size, each)) if ranks.world_size() > 1 else plan.batch_size,
        "threads": torch.get_num_threads(),
        "device": name,
        "dtype": str(ready.subject.dtype),
        "attention": implementation(config, ready.device, ready.subject.dtype),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tuned_linears": sum(s.tuning is not None for s in plan.sites),  # memory may have ruled out experts
    }


def _adopt(recorded: dict[str, Any], now: dict[str, Any], output: Path) -> dict[str, Any]:
    """The recorded numerics, where this process can reproduce them."""
    fixed = ("processes", "device", "dtype", "attention", "float32_matmul_precision", "tuned_linears")
    recorded = {"processes": 1, **recorded}
    if different := [f"{k} was {recorded[k]}, is {now[k]}" for k in fixed if recorded[k] != now[k]]:
        raise PlanError(f"{output}: cannot go on with the same bits: {'; '.join(different)}. Start anew with --fresh")
    return recorded


class _frozen:  # noqa: N801  a context manager
    """Runs with the recorded number of threads."""

    def __init__(self, numerics: dict[str, Any]) -> None:
        self.threads = numerics["threads"]

    def __enter__(self) -> None:
        import torch

        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *exc: object) -> None:
        import torch

        torch.set_num_threads(self.before)


def _report(
    args: Arguments,
    ready: Prepared,
    plan: Plan,
    run: Run,
    done: Done,
    identity: dict[str, Any],
    numerics: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    import resource

    import torch

    from bitpress import report

    sizes, rows = {s.name: s.rows * s.columns for s in ready.plan.sites}, done.rows
    targets = [p.target for p in ready.plans if p.target is not None]
    dense = {s.name: 8.0 * s.dtype.itemsize for t in targets for g in t.groups for s in g.sites}
    cuda = ready.device.type == "cuda"
    return {
        "layers": rows,
        "totals": {
            **report.totals(rows, sizes, dense),
            "output_bytes": plan.output_bytes,
            "seconds": round(seconds, 2),
            "seconds_by_phase": {k: round(v, 2) for k, v in run.seconds.items()},
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_device_bytes": torch.cuda.max_memory_allocated(ready.device) if cuda else 0,
        },
        **done.surveys,
        "ignored": list(plan.ignored),
        "notes": list(done.plan.notes) + (list(ready.data.notes) if ready.data else []),
        "data": dict(ready.data.summary) if ready.data else None,
        "seed": args.seed,
        "numerics": numerics,
        "versions": report.versions(),
        "run": identity,
    }
