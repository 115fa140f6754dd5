"""`convert`: store a quantized checkpoint in another format, with the codes and scales that it has."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.errors import CheckpointError, ConfigError, Faults, PlanError, did_you_mean
from bitpress.progress import Progress, choose_progress

if TYPE_CHECKING:
    from bitpress.inspection import Inspection
    from bitpress.packed import PackedSource
    from bitpress.plan import Plan
    from bitpress.result import SavedModel
    from bitpress.sites import Site
    from bitpress.subject import FolderSubject


def convert(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    format: str,
    trust_remote_code: bool = False,
    verify: bool = True,
    fresh: bool = False,
    progress: Progress | bool | None = None,
) -> SavedModel:
    """Store a quantized checkpoint in another format, block by block, without rounding anything again.

    Args:
        source: folder or hub id of a checkpoint in a format that bitpress writes, whoever wrote it.
        output_dir: where the new one goes. Killed and called again, it goes on where it was.
        format: see `bitpress.formats`.
        trust_remote_code: run code that the model brings.
        verify: read back what was written and compare it.
        fresh: delete what an earlier conversion left in `output_dir`.
        progress: as in `oneshot`.

    Returns:
        A handle on the new checkpoint.

    Raises:
        ConfigError: an unknown format.
        CheckpointError: the source is no finished checkpoint, or not one that bitpress reads.
        PlanError: the format cannot hold its linears as they are, or the output folder holds other work.
    """
    from bitpress import journal
    from bitpress.formats import CHECKPOINTS
    from bitpress.loading import open_checkpoint

    said, output, faults = choose_progress(progress), Path(output_dir).expanduser(), Faults()
    found = None
    with faults:
        if format not in CHECKPOINTS:
            raise ConfigError(f"format: {format!r} is unknown.{did_you_mean(str(format), CHECKPOINTS)}")
    with faults:
        found = open_checkpoint(source, trust=False)
    with faults:
        if found is not None and output.resolve() == Path(found.path).resolve():
            raise PlanError(f"{output}: is the checkpoint's own folder; choose another output folder")
        journal.check(output)
    with faults:
        if found is not None and format in CHECKPOINTS and (why := _refusal(found, format)):
            raise PlanError(f"{found.path}: {why}")
    faults.report()
    assert found is not None
    return _run(found, output, format, trust_remote_code, verify, fresh, said)


def _refusal(found: Inspection, format: str) -> str:
    """Why a checkpoint cannot be stored so; empty if it may be."""
    if found.method == "sparse-24" and format != "dense":
        return "2:4 storage is read back as dense only; convert what it was made from"
    if found.method == "dense" and format not in ("gguf", "sparse-24"):
        return "is not quantized, so there is nothing to convert; use oneshot with --scheme and --format"
    if found.method == "bitsandbytes" and format not in ("bitsandbytes", "dense"):
        return "NF4 and FP4 are in no other format; convert it to dense, or convert what it was made from"
    if found.method == "gguf":
        return "GGUF is not read back; convert the checkpoint that it was made from"
    return ""


def _run(
    found: Inspection, output: Path, format: str, trust: bool, verify: bool, fresh: bool, said: Progress
) -> SavedModel:
    import torch

    from bitpress import journal, pipeline
    from bitpress.formats.base import unknown_error
    from bitpress.math.grid import Solved
    from bitpress.output import Output
    from bitpress.result import SavedModel
    from bitpress.run import Run

    started = time.perf_counter()
    subject, source, sites = opened(Path(found.path), trust, masked=format == "sparse-24")
    try:
        plan = plan_of(subject, sites, format, found, output)
        identity = _identity(subject, format)
        for note in plan.notes:
            said.note(note)
        if journal.prepare(output, identity, fresh=fresh, resume=False):
            said.note(f"{output}: complete already, nothing to do")
            return SavedModel(output)
        log = journal.Journal(output / journal.WORK, identity, {})
        writer = Output(output, log, len(plan.shards), compressed=True, verify=verify)
        by_name = {s.name: s for s in sites}

        def inherited(site: Site) -> Solved:
            if source is None:  # pruned, not quantized
                weight = subject.stored([site.key])[site.key]
                return Solved(None, None, unknown_error(), weight=weight)
            solved = source.solved(by_name[site.name])
            if solved.qparams is not None and not solved.qparams.scale.isfinite().all():
                raise CheckpointError(f"{found.path}: {site.name}: NaN or infinity in the scales; it is damaged")
            return solved

        run = Run(subject, plan, [], torch.device("cpu"), writer, said, inherited=inherited)
        said.begin("convert", len(subject.blocks))
        complete = False
        try:
            pipeline.execute(run)
            complete = True
        finally:
            said.end(complete)
        recipe = Path(found.path) / "recipe.yaml"
        report = _report(Path(found.path), output, plan, identity, time.perf_counter() - started)
        writer.finish(subject, plan, recipe.read_text(encoding="utf-8") if recipe.is_file() else None, report, None)
    finally:
        subject.close()
    return SavedModel(output)


def opened(folder: Path, trust: bool, *, masked: bool) -> tuple[FolderSubject, PackedSource | None, list[Site]]:
    """A checkpoint as a model that is streamed, and its compressed linears as they are stored.

    Args:
        masked: they are to be stored by their 2:4 masks, so all must have one; of a dense model, those that do.
    """
    import torch

    from bitpress.formatplan import stored_in
    from bitpress.formats.sparse24 import open_sparse
    from bitpress.inspection import declared_dtype, inspect_checkpoint, is_quantized
    from bitpress.packed import PackedSource
    from bitpress.reading import described
    from bitpress.sites import find_sites
    from bitpress.subject import FolderSubject

    method = is_quantized(folder)
    if method == "sparse-24":
        found = inspect_checkpoint(folder)
        sparse, _ = open_sparse(folder, getattr(torch, declared_dtype(found) or "bfloat16"))
        return FolderSubject(folder, trust_remote_code=trust, source=sparse), None, []
    if method is None:
        subject = FolderSubject(folder, trust_remote_code=trust)
        return subject, None, pruned_linears(folder, subject) if masked else []
    modifier, stored = described(folder)
    source = PackedSource(folder)
    subject = FolderSubject(folder, trust_remote_code=trust, source=source)
    sites, faults, _ = find_sites([modifier], subject)
    if faults:
        raise CheckpointError([f"{folder}: {f}" for f in faults])
    sites = [replace(s, dtype=source.scale_dtype(s.name) or s.dtype) for s in stored_in(stored, sites)]
    source.take(sites)
    if masked:
        from bitpress.formats.sparse24 import TWO_OF_FOUR
        from bitpress.math.masks import holds

        dense = [s.name for s in sites if not holds(source.solved(s).dense(), TWO_OF_FOUR)]
        if dense:
            raise PlanError(f"{folder}: {dense[0]} and {len(dense) - 1} more: not 2:4, so sparse-24 cannot hold them")
    return subject, source, sites


def pruned_linears(folder: Path, subject: FolderSubject) -> list[Site]:
    """The linears of a dense model that are pruned 2:4, read one by one; PlanError if there are none."""
    from bitpress.formats.sparse24 import TWO_OF_FOUR
    from bitpress.math.masks import holds
    from bitpress.modifiers.pruning import MagnitudePruningModifier
    from bitpress.sites import find_sites, linears_of

    keys = [f"{n}.weight" for n, _ in linears_of(subject) if f"{n}.weight" in subject.layout.disk_of]
    masked = [k.removesuffix(".weight") for k in keys if holds(subject.stored([k])[k], TWO_OF_FOUR)]
    if not masked:
        raise PlanError(f"{folder}: no linear is pruned 2:4; prune it first (SparseGPTModifier, mask_structure '2:4')")
    sites, _, _ = find_sites([MagnitudePruningModifier(sparsity=0.5, mask_structure="2:4", targets=masked)], subject)
    return sites


def plan_of(subject: FolderSubject, sites: list[Site], format: str, found: Inspection, output: Path) -> Plan:
    """What will be written; PlanError with all that the format cannot hold."""
    import torch

    from bitpress import plan
    from bitpress.clients import client_notes
    from bitpress.modifiers.quantization import SchemeModifier

    cache = None
    for modifier in {id(s.steps[0].modifier): s.steps[0].modifier for s in sites}.values():
        cache = modifier.cache() if isinstance(modifier, SchemeModifier) else None
    try:
        made = plan.make(
            [], subject, samples=1, length=1, device=torch.device("cpu"), output=output, inherited=sites,
            stored=format, cache=cache,
        )  # fmt: skip
    except PlanError as error:
        raise PlanError([f"{found.path}: {p}" for p in error.problems]) from None
    return replace(made, notes=(*made.notes, *client_notes(subject, sites, [], made.stored)))


def _identity(subject: FolderSubject, format: str) -> dict[str, Any]:
    """What makes two conversions the same."""
    from bitpress.report import versions

    return {"model": subject.fingerprint(), "arguments": {"format": format}, "versions": versions()}


def _report(source: Path, output: Path, plan: Plan, identity: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The report of the run that made the checkpoint, if it is there, and what was done to it."""
    import json
    import shlex

    try:
        before: dict[str, Any] = json.loads((source / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    return {
        **before,
        "again": shlex.join(
            ["bitpress", "convert", str(source.resolve()), f"{output.absolute()}-again", "--format", plan.stored]
        ),
        "converted": {"from": str(source.resolve()), "format": plan.stored, "seconds": round(seconds, 2)},
        "notes": list(plan.notes),
        "run": identity,
    }
