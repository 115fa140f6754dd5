"""The stages of a run, one after the other: each reads a checkpoint and writes one.

Those between the first and the last lie in the output's work folder, uncompressed (dense weights beside their
scales), and go when the run is complete; those of `apply` are the checkpoints <output>/<stage>, and stay. Each stage
has a journal; a run that was killed goes on in the first stage that is not finished. A model in memory is changed in
place and passes from stage to stage.
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

from bitpress import decision, formats, journal, pipeline, profiles, ranks, report, size_target, tuning
from bitpress.checkpoint import Source, link_checkpoint
from bitpress.errors import PlanError, counted
from bitpress.math.grid import Solved, quantize
from bitpress.numerics import adopt, frozen, numerics_of
from bitpress.output import Output, read_site
from bitpress.phases import Phases
from bitpress.plan import Plan, settle, whole
from bitpress.recipe import Recipe, fingerprint
from bitpress.run import Run
from bitpress.sites import Site, stored_spec
from bitpress.subject import FolderSubject, ModuleSubject, Subject
from bitpress.training.stage import train_stage

if TYPE_CHECKING:
    from bitpress.oneshot import Arguments
    from bitpress.prepare import Prepared

STAGES = "stages"  # folder in the work folder
ONE_ANEW = "; of several stages one is run anew, on those before it, by --stage NAME --fresh (stage=, fresh=True)"


@dataclass
class Done:
    """What the stages up to now have made.

    Attributes:
        plan, recipe: of the run, with what surveys have decided.
        rows: reports of the layers.
        solved: for a model in memory: its quantized linears, without codes.
        caches: for a model in memory: scales of caches, by name on disk.
        surveys: sections of the report.
        phases: time and memory of all stages.
        resumed: shards of the last stage that an earlier attempt has finished.
        report: of the last stage.
    """

    plan: Plan
    recipe: Recipe
    rows: list[dict[str, Any]] = field(default_factory=list)
    solved: list[tuple[Site, Solved]] = field(default_factory=list)
    caches: dict[str, Tensor] = field(default_factory=dict)
    surveys: dict[str, Any] = field(default_factory=dict)
    phases: Phases = field(default_factory=Phases)
    resumed: int = 0
    report: dict[str, Any] = field(default_factory=dict)


def run_stages(args: Arguments, ready: Prepared, identity: dict[str, Any], started: float) -> Done:
    """Run what is not finished.

    Args:
        identity: what makes two runs the same run.
        started: when the run began, for the report.
    """
    places = _places(args, ready)
    chosen = _chosen(args, ready)
    done, first = Done(ready.plan, ready.recipe, phases=Phases(ready.device)), 0
    done.phases.add("prepare", started)
    if ready.output is not None and (len(places) > 1 or args.verb == "apply"):
        work = ready.output / journal.WORK
        remedy = ONE_ANEW if args.verb == "apply" else ""
        ranks.from_first(lambda: journal.Journal(work, identity, None, remedy=remedy))  # claims the folder for this run
        if args.verb == "apply" and args.fresh:
            for place in places[chosen.start :]:
                if place is not None and place.is_dir():
                    _claim(args, place, identity)
        first = ranks.from_first(lambda: _finished(args, places, ready, identity))
        if first:
            _take_up(done, places[first - 1], ready, first)
            args.progress.note(f"stage {ready.recipe.stages[first - 1].name} is finished; going on from there")
    for i in range(first, chosen.stop):
        subject, place = ready.subject, places[i]
        before = places[i - 1] if i else None
        if subject.streamed and before is not None:
            hidden = [f"{s.name}.{n}" for s in ready.plans[i].inherited for n in _beside(s)]
            subject = FolderSubject(
                before,
                trust_remote_code=args.trust_remote_code_model,
                hidden=hidden,
                attention=args.attn_implementation,
            )
        own = _identity_of(args, identity, ready, i)
        if args.verb == "apply" and place is not None and not args.fresh:
            _claim(args, place, own)
        run = train_stage if ready.plans[i].trains else _run_stage
        run(args, ready, i, subject, place, own, done, started)
        _say(args, ready, i, done, place)
        if before is not None and args.verb != "apply" and i < len(places) - 1:
            ranks.barrier()
            if ranks.first():
                shutil.rmtree(before)  # what comes next starts from this stage
    if args.verb == "apply" and chosen.stop == len(places):
        ranks.from_first(lambda: _complete(ready, places[-1], identity))
    return done


def check_earlier(args: Arguments, ready: Prepared, identity: dict[str, Any]) -> None:
    """PlanError, before anything is deleted, if a stage of `apply` is to run and one before it has not."""
    start = _chosen(args, ready).start
    done = ranks.from_first(lambda: _finished(args, _places(args, ready)[:start], ready, identity))
    if done < start:
        raise PlanError(
            f"{ready.recipe.stages[done].name}: has not run in {ready.output}, or not with this recipe and these data, "
            f"and {ready.recipe.stages[start].name} goes on from it: run it first, or all, without stage"
        )


def _claim(args: Arguments, place: Path, identity: dict[str, Any]) -> None:
    """Make a stage's folder ready, or say that it holds other work."""
    ranks.from_first(lambda: journal.prepare(place, identity, fresh=args.fresh, resume=False, remedy=ONE_ANEW))


def _complete(ready: Prepared, last: Path | None, identity: dict[str, Any]) -> None:
    """The last stage's checkpoint becomes that of the whole run."""
    assert ready.output is not None and last is not None
    whole_report = {**json.loads((last / "report.json").read_text(encoding="utf-8")), "run": identity}
    link_checkpoint(last, ready.output, whole_report)
    report.write_report(ready.output, whole_report, (last / "recipe.yaml").read_text(encoding="utf-8"))
    shutil.rmtree(ready.output / journal.WORK)


def _chosen(args: Arguments, ready: Prepared) -> range:
    """Indices of the stages that run; for `oneshot` and `train` the recipe holds no others."""
    names = [stage.name for stage in ready.recipe.stages]
    if args.verb != "apply" or args.stage is None:
        return range(len(names))
    i = names.index(ready.recipe.stage(args.stage).name)
    return range(i, i + 1)


def _places(args: Arguments, ready: Prepared) -> list[Path | None]:
    """Where each stage writes."""
    names = [re.sub(r"[^A-Za-z0-9_.-]", "_", stage.name) for stage in ready.recipe.stages]
    if ready.output is None:
        return [None for _ in names]
    if args.verb == "apply":
        return [ready.output / name for name in names]
    folder = ready.output / journal.WORK / STAGES
    return [*(folder / f"{i + 1}-{name}" for i, name in enumerate(names[:-1])), ready.output]


def _identity_of(args: Arguments, identity: dict[str, Any], ready: Prepared, i: int) -> dict[str, Any]:
    """Of a stage: the last one completes the run, but that of `apply` is complete with a copy of it.

    Of `apply` each is known by what it and those before it depend on: another learning rate needs no new pruning.
    """
    last = i == len(ready.plans) - 1
    if args.verb != "apply":
        return identity if last else {**identity, "stage": ready.recipe.stages[i].name}
    upto = replace(ready.recipe, stages=ready.recipe.stages[: i + 1])
    own = {**identity, "recipe": fingerprint(upto), "stage": ready.recipe.stages[i].name}
    if not any(p.trains for p in ready.plans[: i + 1]):
        own.pop("training", None)
    if not last:  # nothing is packed before the last one
        own["arguments"] = {k: v for k, v in own["arguments"].items() if k not in ("save_compressed", "format")}
    return own


def _finished(args: Arguments, places: list[Path | None], ready: Prepared, identity: dict[str, Any]) -> int:
    """How many stages are finished."""
    for i in reversed(range(len(places) - (args.verb != "apply"))):
        place = places[i]
        if place is not None and journal.finished(place, _identity_of(args, identity, ready, i)):
            return i + 1
    return 0


def _take_up(done: Done, place: Path | None, ready: Prepared, i: int) -> None:
    """Add what the stages before stage `i` have made; puts their weights into a model in memory."""
    assert place is not None
    held = json.loads((place / "report.json").read_text(encoding="utf-8"))
    done.rows = held["layers"]
    peaks = held["totals"].get("peak_bytes_by_phase", {})
    done.phases.went_before({
        phase: {"seconds": seconds, **peaks.get(phase, {"host": 0, "device": 0})}
        for phase, seconds in held["totals"]["seconds_by_phase"].items()
    })  # fmt: skip
    if isinstance(ready.subject, ModuleSubject) and i < len(ready.plans):
        source = Source(place)
        for key, disk in ready.subject.layout.disk_of.items():
            ready.subject.assign({key: source.read([disk])[disk]})
        done.solved = [(s, replace(_stored(source, s), codes=None)) for s in ready.plans[i].inherited]


def _say(args: Arguments, ready: Prepared, i: int, done: Done, place: Path | None) -> None:
    """What a stage has made, where there are several or one was asked for."""
    if len(ready.plans) == 1 and args.stage is None:
        return
    zeros = [
        r for r in done.rows if r["mask"] and r.get("stage", ready.recipe.stages[i].name) == ready.recipe.stages[i].name
    ]
    sizes = {s.name: s.rows * s.columns for s in (*ready.plan.sites, *ready.plan.masked)}
    share = sum(r["sparsity"] * sizes[r["name"]] for r in zeros) / max(1, sum(sizes[r["name"]] for r in zeros))
    said = f", {share:.2%} of the weights of {counted(len(zeros), 'linear')} are zero" if zeros else ""
    args.progress.note(f"stage {ready.recipe.stages[i].name}: done{said}" + (f"; saved to {place}" if place else ""))


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
    numerics = numerics_of(ready, plan)
    if place is not None:
        work, new = place / journal.WORK, numerics
        log = ranks.from_first(lambda: journal.Journal(work, identity, new))
        ranks.agreed(log.visible)
        if log.done:
            args.progress.note(f"{len(log.done)} of {len(plan.shards)} shards are finished; going on from there")
        for lap in log.laps:
            done.phases.went_before(lap)
        done.resumed = len(log.done)
        numerics = adopt(log.numerics, numerics, place)
        packed = args.save_compressed and last
        output = Output(
            place, log, len(plan.shards), compressed=packed, verify=args.verify, beside=ready.device.type == "cuda"
        )
    plan = replace(plan, solver_bytes=numerics["solver_bytes"] or plan.solver_bytes)
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
        inherited=inherited, seed=args.seed, phases=done.phases,
    )  # fmt: skip
    if plan.surveys:
        with frozen(numerics):
            plan = run.plan = _survey(args, ready, i, run, done)
    args.progress.begin(args.stage or stage.name, len(subject.blocks))
    complete = False
    try:
        with frozen(numerics):
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
    done.report = report.of_run(args, ready, plan, done, identity, numerics, time.perf_counter() - started)
    text = done.recipe if last else replace(ready.recipe, stages=(done.recipe.stages[i],))
    if output is not None:
        tokenizer = None if args.tokenizer is None and subject.folder else ready.tokenizer
        whole_output, made = output, done.report
        ranks.barrier()  # none has anything open in the work folder
        ranks.from_first(lambda: whole_output.finish(subject, plan, text.to_yaml(), made, tokenizer))


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
