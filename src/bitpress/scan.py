"""How sensitive each layer is: its error at several widths from one pass, the curve of size against error, a recipe.

The pass is the survey of a size target (`bitpress.survey`), with every group of linears that clients run as one at 2,
3, 4 and 8 bits and at 2:4. Two errors are measured. By "kl", the group alone is compressed, GPTQ's way, and the KL of
the model's next-token distribution is taken; 8 bits are scaled from 4. By "gram", which runs the model once and no
more, it is the share of the energy of the layer's output that rounding to nearest with searched scales loses (for 2:4:
pruning by Wanda), on a sample of its rows. Errors of a whole model are sums over the groups, weighted by their weights
for "gram": what single changes predict, not what is left after all of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bitpress import journal as journals
from bitpress import memory
from bitpress.curve import PRUNED, Errors, Point, Suggestion, check_reach, curve, suggest, uniform, width_of
from bitpress.devices import working_on
from bitpress.errors import ConfigError, Faults, PlanError
from bitpress.modifiers.quantization import GPTQModifier, SchemeModifier
from bitpress.progress import Progress, choose_progress
from bitpress.report import versions
from bitpress.schemes import preset
from bitpress.size_target import DENSE, Choice, FusionGroup, SizeTarget, fusion_groups, stored_bits

if TYPE_CHECKING:
    from torch import nn

    from bitpress.oneshot import Arguments
    from bitpress.prepare import Prepared
    from bitpress.sites import Site

Measure = Literal["kl", "gram"]
MEASURES = ("kl", "gram")
WIDTHS = (2, 3, 4, 8)
COLUMNS = (*map(str, WIDTHS), PRUNED)
SIZES = (128, 64, 32, -1)  # group sizes, the first that fits a group of linears is taken; -1: one scale a row
FILE, PAGE = "scan.json", "scan.html"


@dataclass(frozen=True)
class Layer:
    """Linears that clients run as one, or all experts of a layer.

    Attributes:
        name: of them together, such as `model.layers.0.self_attn.q_proj+k_proj+v_proj`.
        linears, weights: how many.
        schemes: by column ("2", "3", "4", "8"), such as "W4A16 g64"; a column that does not fit is missing.
        bits: stored bits per weight by column; zeros of 2:4 are stored.
        errors: by column ("2:4" too), in nats for "kl", a share for "gram".
    """

    name: str
    linears: int
    weights: int
    schemes: dict[str, str]
    bits: dict[str, float]
    errors: dict[str, float]


@dataclass(frozen=True)
class Scan:
    """What was measured, and what follows.

    Attributes:
        uniform: each width for all linears, by column.
        curve: from the least size to the largest, mixtures of the widths and full precision.
    """

    model: str
    measure: Measure
    layers: tuple[Layer, ...]
    uniform: dict[str, Point]
    curve: tuple[Point, ...]
    suggestion: Suggestion | None
    notes: tuple[str, ...]
    data: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def scan(
    model: str | os.PathLike[str] | nn.Module,
    dataset: Any = None,
    *,
    measure: Measure = "kl",
    bits: float | None = None,
    size: int | str | None = None,
    error: float | None = None,
    group_size: int | None = None,
    ignore: str | Sequence[str] = "lm_head",
    output_dir: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    num_calibration_samples: int = 32,
    max_seq_length: int = 512,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Scan:
    """Measure the error of every layer at 2, 3, 4 and 8 bits and at 2:4; the model stays as it is.

    Args:
        model, dataset: see `oneshot`.
        measure: "kl", of the next token's distribution, or "gram", of the layer's output, which is much quicker.
        bits, size, error: a target, at most one: stored bits per weight on average, bytes of the checkpoint ("90MB"),
            or the predicted error, in the measure's unit. The recipe for it has at most that.
        group_size: input columns per scale where it fits, in place of 128, 64, 32, a row.
        ignore: linears to leave out.
        output_dir: for scan.json, scan.html and, with a target, recipe.yaml. A killed scan goes on there, and
            another target for the same scan measures nothing again.
        fresh: measure anew what is in output_dir.
        num_calibration_samples, max_seq_length, progress, options: see `oneshot`: splits, tokenizer, seed, device, ...

    Raises:
        ConfigError, PlanError, DataError, CheckpointError, RecipeError: user errors, before weights are loaded; and a
            target that cannot be met.
    """
    from bitpress.oneshot import Arguments
    from bitpress.prepare import prepare

    output = None if output_dir is None else Path(output_dir).expanduser()
    faults = Faults()
    with faults:
        _check(measure, bits, size, error, group_size)
    with faults:
        if output is not None:
            _check_folder(output)
    keys = {"scheme": "W8A16", "group_size": -1, "ignore": [ignore] if isinstance(ignore, str) else list(ignore)}
    args = Arguments(
        model=model, dataset=dataset, recipe={"GPTQModifier": keys},
        output_dir=Path(f"bitpress-scan-{os.getpid()}"),  # nothing is written there
        num_calibration_samples=num_calibration_samples, max_seq_length=max_seq_length,
        progress=choose_progress(progress), **options,
    )  # fmt: skip
    ready = None
    with faults:
        ready = prepare(args)
    try:
        faults.report()
        assert ready is not None
        return _scan(args, ready, measure, (bits, size, error), group_size, output, fresh)
    finally:
        if ready is not None:
            ready.subject.close()


def _scan(
    args: Arguments,
    ready: Prepared,
    measure: Measure,
    asked: tuple[float | None, int | str | None, float | None],
    group_size: int | None,
    output: Path | None,
    fresh: bool,
) -> Scan:
    target, notes = target_of(ready, group_size)
    model = str(args.model) if ready.subject.streamed else type(ready.subject.model).__name__
    assert ready.data is not None
    identity = json.loads(json.dumps({
        "model": ready.subject.fingerprint(), "data": ready.data.summary["fingerprint"], "measure": measure,
        "groups": _digest(target), "seed": args.seed, "versions": versions(),
    }))  # fmt: skip
    rest = _rest(ready)
    check_reach(target, rest, asked[0], asked[1])
    errors = None if output is None or fresh else _held(output, identity)
    if errors is None:
        with working_on(ready.device):
            errors = _measured(args, ready, replace(target, bits=4.0), measure, identity, output, fresh)
    else:
        args.progress.note(f"{output}: measured already")
    suggestion = suggest(target, errors, rest, *asked)
    layers = tuple(_layer(target, g, errors, measure) for g in target.groups)
    alike, best = uniform(target, errors, rest, COLUMNS), curve(target, errors, rest)
    notes += ready.data.notes
    summary = dict(ready.data.summary)
    found = Scan(model, measure, layers, alike, best, suggestion, tuple(notes), summary, versions())
    if output is not None:
        _write(output, found, identity, errors)
    return found


def _check(measure: Any, bits: Any, size: Any, error: Any, group_size: Any) -> None:
    from bitpress.budget import parse_bytes
    from bitpress.errors import did_you_mean

    faults = [] if measure in MEASURES else [f"measure: {measure!r} is unknown.{did_you_mean(str(measure), MEASURES)}"]
    given = {"bits": bits, "size": size, "error": error}
    if len(both := [name for name, value in given.items() if value is not None]) > 1:
        faults.append(f"{', '.join(both)}: give one target")
    for name in ("bits", "error"):
        value = given[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9):
            faults.append(f"{name}: expected a positive number, got {value!r}")
    try:
        parse_bytes(size)
    except ConfigError as wrong:
        faults += [p.replace("max_memory", "size", 1) for p in wrong.problems]
    if group_size is not None and (not isinstance(group_size, int) or (group_size < 1 and group_size != -1)):
        faults.append(f"group_size: expected a positive whole number, or -1 for a row, got {group_size!r}")
    if faults:
        raise ConfigError(faults)


def _check_folder(output: Path) -> None:
    journals.check_place(output)
    ours = (output / FILE).is_file() or (output / journals.WORK).is_dir()
    if output.is_dir() and not ours and any(output.iterdir()):
        raise PlanError(f"{output}: holds other files, which bitpress does not overwrite: choose another output folder")


def target_of(ready: Prepared, group_size: int | None) -> tuple[SizeTarget, list[str]]:
    """The groups of linears with a scheme of each width, full precision and 2:4, and what does not fit.

    Raises:
        PlanError: a group that no width fits, or a group size that fits no linear.
    """
    from bitpress.modifiers.pruning import SparseGPTModifier

    (stage,) = ready.recipe.stages
    (modifier,) = stage.modifiers
    assert isinstance(modifier, GPTQModifier)
    ours = replace(modifier, scheme=None, group_size=None, bits=4.0)  # the recipe's modifier, its schemes to come
    pruning = SparseGPTModifier(mask_structure=PRUNED)
    choices = {DENSE: Choice(DENSE, None), PRUNED: Choice(PRUNED, None, pruning)}
    together = fusion_groups(ready.plan.sites)
    groups, notes = [], _elsewhere(together, group_size)
    for name, sites in together.items():
        sizes: dict[str, int] = {}
        for width in WIDTHS:
            found = _fitting(ours, sites, width, group_size)
            if found is None:
                notes.append(f"{name}: {width} bits do not fit it, or no client loads them there")
                continue
            choice, stored = found
            choices[choice.label] = choice
            sizes[choice.label] = stored
        if not sizes:
            raise PlanError(f"{name}: none of {WIDTHS} bits fits it; add it to ignore")
        sizes[DENSE] = sum(8 * s.dtype.itemsize * s.rows * s.columns for s in sites)
        if all(s.columns % 4 == 0 for s in sites):
            sizes[PRUNED] = sizes[DENSE]  # zeros are stored
        groups.append(FusionGroup(name, tuple(sites), sizes))
    return SizeTarget(4.0, ours, choices, tuple(groups)), notes


def _elsewhere(together: Mapping[str, Sequence[Site]], size: int | None) -> list[str]:
    """Notes on linears that a group size does not fit; PlanError if no group could take it."""
    from bitpress.sites import brief, shape_faults

    if size is None:
        return []
    sites = [s for mine in together.values() for s in mine]
    alike, scheme = math.gcd(*(s.columns for s in sites)), preset("W4A16", size)
    faults = brief([f"{s.name}: {fault}" for s in sites for fault in shape_faults(s, scheme, alike)])
    if all(any(s.columns % size for s in mine) for mine in together.values()):
        raise PlanError(faults)
    return [f"{fault}; what fits of 128, 64, 32 and a row is taken there" for fault in faults]


def _fitting(
    modifier: SchemeModifier, sites: Sequence[Site], width: int, group_size: int | None
) -> tuple[Choice, int] | None:
    """The scheme of a width with the first group size that fits, and its stored bits."""
    from bitpress.sites import label

    for columns in SIZES if group_size is None else (group_size, *SIZES):
        group = modifier.group_of("scan", preset(f"W{width}A16", columns))
        choice = Choice(label(group), group)
        if (stored := stored_bits(sites, choice)) is not None:
            return choice, stored
    return None


def _rest(ready: Prepared) -> int:
    """Bytes of the files without the codes and scales of the linears: what no choice changes."""
    from bitpress.sites import bits_per_weight

    bits = sum(bits_per_weight(s) * s.rows * s.columns for s in ready.plan.sites)
    return ready.plan.output_bytes - round(bits / 8)


@memory.kept()
def _measured(
    args: Arguments,
    ready: Prepared,
    target: SizeTarget,
    measure: Measure,
    identity: dict[str, Any],
    output: Path | None,
    fresh: bool,
) -> dict[str, dict[str, float]]:
    """The error of each group by label."""
    from bitpress.budget import budget
    from bitpress.run import Run
    from bitpress.survey import survey

    assert ready.data is not None
    cost = budget(
        ready.subject, ready.plan.sites, args.num_calibration_samples, args.max_seq_length, ready.device, args.limit,
        args.batch_size, surveys=True,
    )  # fmt: skip
    plan = replace(ready.plan, target=target, **cost)
    log = None
    if output is not None:
        if fresh:
            shutil.rmtree(output / journals.WORK, ignore_errors=True)
        log = journals.Journal(output / journals.WORK, identity, {"batch_size": plan.batch_size})
    batches = list(ready.data.batches(plan.batch_size if log is None else log.numerics["batch_size"]))
    run = Run(ready.subject, plan, batches, ready.device, None, args.progress, seed=args.seed)
    args.progress.begin("scan", len(ready.subject.blocks))
    complete = False
    try:
        found = survey(run, log, _probes if measure == "kl" else lambda _target, _group: [])
        complete = True
    finally:
        args.progress.end(complete)
    if measure == "kl":
        return found.losses(target)
    return {
        group.name: {
            label: 0.0 if label == DENSE else sum(
                found.errors[s.name][label] * s.rows * s.columns for s in group.sites
            ) / target.weights
            for label in group.sizes
        }
        for group in target.groups
    }  # fmt: skip


def _probes(target: SizeTarget, group: FusionGroup) -> list[str]:
    """All that is measured by running the model: 8 bits change so little that they are scaled from 4."""
    there = [label for label in group.sizes if label != DENSE]
    few = [label for label in there if width_of(target, label) != "8"]
    return few or there


def _digest(target: SizeTarget) -> str:
    """Of what is measured: groups and their schemes."""
    sizes = {g.name: dict(g.sizes) for g in target.groups}
    return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()


def _layer(target: SizeTarget, group: FusionGroup, errors: Errors, measure: Measure) -> Layer:
    mine = {width_of(target, c): c for c in group.sizes if c != DENSE}
    # a part of the model's error; of the layer's own energy it is more
    share = target.weights / group.weights if measure == "gram" else 1.0
    return Layer(
        group.name, len(group.sites), group.weights,
        {w: c for w, c in mine.items() if w != PRUNED},
        {w: round(group.sizes[c] / group.weights, 5) for w, c in mine.items()},
        {w: float(f"{errors[group.name][c] * share:.5g}") for w, c in mine.items()},
    )  # fmt: skip


def _held(output: Path, identity: dict[str, Any]) -> dict[str, dict[str, float]] | None:
    """What a finished scan has measured, None if there is none.

    Raises:
        PlanError: the folder holds another scan.
    """
    file = output / FILE
    if not file.is_file():
        return None
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        run, measured = held["run"], held["measured"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PlanError(f"{file}: cannot be read; give --fresh (fresh=True), or another output folder") from None
    if run != identity:
        raise PlanError(
            f"{output}: holds another scan (of another model, data, measure or version): choose another output folder, "
            "or --fresh (fresh=True) to replace it"
        )
    found: dict[str, dict[str, float]] = measured
    return found


def _write(output: Path, found: Scan, identity: dict[str, Any], errors: Errors) -> None:
    from bitpress.checkpoint import write_json, write_text
    from bitpress.views.scan import scan_page

    if found.suggestion is not None:
        write_text(output / "recipe.yaml", found.suggestion.recipe)
    else:
        (output / "recipe.yaml").unlink(missing_ok=True)  # of another target
    write_text(output / PAGE, scan_page(found))
    write_json(output / FILE, {**found.to_dict(), "measured": errors, "run": identity})
    shutil.rmtree(output / journals.WORK, ignore_errors=True)
