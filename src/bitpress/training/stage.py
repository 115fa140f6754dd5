"""One training stage, from its input to its checkpoint.

A stage that is killed goes on from the trainer's last whole checkpoint, and ends with the bits of one that was left
alone. What is written is written as in a one-shot stage: shards, read back, config.json last.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitpress import ranks
from bitpress.experts import refuse, unfuse
from bitpress.journal import WORK, Journal
from bitpress.math.masks import pruned
from bitpress.numerics import adopt, frozen, numerics_of
from bitpress.report import of_run
from bitpress.subject import ModuleSubject, Subject
from bitpress.training import finish
from bitpress.training.finish import STATE
from bitpress.trainplan import training_dtype

if TYPE_CHECKING:
    from bitpress.oneshot import Arguments
    from bitpress.prepare import Prepared
    from bitpress.stages import Done
    from bitpress.training.masks import Masks
    from bitpress.training.trainer import StageTrainer

CHECKPOINT = "checkpoint-"
MOST_STEPS = 500  # between two checkpoints, where nothing is said; a short stage has ten


def train_stage(
    args: Arguments,
    ready: Prepared,
    i: int,
    subject: Subject,
    place: Path | None,
    identity: dict[str, Any],
    done: Done,
    started: float,
) -> None:
    """Train, check that zeros are zeros, write; adds to `done`. Of several processes the first one writes.

    Raises:
        PlanError: there are no zeros to keep, or weights are sharded in a way that does not allow it.
        NumericsError: a zero came back.
    """
    plan = ready.plans[i]
    dtype = str(training_dtype(args.training.precision, subject, ready.device))
    numerics = ranks.share({**numerics_of(ready, plan), "training_dtype": dtype})  # memory may differ
    log = None
    if place is not None:
        work = place / WORK
        log = ranks.from_first(lambda: Journal(work, identity, numerics))
        ranks.agreed(log.visible)
        numerics = adopt(log.numerics, numerics, place)
    with frozen(numerics), tempfile.TemporaryDirectory(prefix="bitpress-") as spare:
        _train_in(args, ready, i, subject, place, Path(spare), log, numerics, identity, done, started)


def _train_in(
    args: Arguments,
    ready: Prepared,
    i: int,
    subject: Subject,
    place: Path | None,
    spare: Path,
    log: Journal | None,
    numerics: dict[str, Any],
    identity: dict[str, Any],
    done: Done,
    started: float,
) -> None:
    from bitpress.training.masks import Masks, parts_of
    from bitpress.training.rounding import Roundings

    plan, stage, clock = ready.plans[i], ready.recipe.stages[i], time.perf_counter()
    model = _loaded(args, subject)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    wide = getattr(torch, numerics["training_dtype"].removeprefix("torch."))
    if wide != subject.dtype:
        finish.convert(model, {name: wide for name, dtype in dtypes.items() if dtype == subject.dtype})
    elif wide != torch.float32:
        args.progress.note(f"training in {wide}: small updates are lost in it; precision='float32' takes more memory")
    masks = Masks(model, parts_of(plan.masked, model)) if plan.masked else None
    if place is not None and finish.packs(args, ready, i):
        finish.check_format(model, plan, masks)
    roundings = Roundings(model, plan.sites)
    for note in _zero_notes(model, masks):
        args.progress.note(note)
    trainer = _trainer(args, ready, model, masks, place or spare, checkpoints=place is not None)
    checkpoint = None if place is None else ranks.from_first(lambda: _last_checkpoint(place))
    if checkpoint is not None:
        args.progress.note(f"going on from step {checkpoint.name.removeprefix(CHECKPOINT)}")
    args.progress.begin(args.stage or stage.name, _steps(trainer), "step")
    complete = False
    try:
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        complete = True
    finally:
        args.progress.end(complete)
    trained = time.perf_counter() - clock
    clock = done.phases.add("train", clock)
    if finish.is_sharded(trainer):
        model, roundings = finish.gathered(trainer, args, subject, plan, dtypes, wide)
    if ranks.first():
        finish.check_finite(model)
        quantized = roundings.solve()
        roundings.remove(quantized)
        finish.convert(model, dtypes)
        parameters = dict(model.named_parameters())
        shares = {} if masks is None else masks.check(lambda name: parameters[name].detach())
        target = finish.written_from(model, subject)
        solved = finish.solved(plan, target, shares, quantized)
        rows = [finish.row(site, z, site.name in shares, trained / max(1, len(solved))) for site, z in solved]
        if isinstance(subject, ModuleSubject):
            done.solved += [(s, replace(z, codes=None)) for s, z in solved if z.qparams is not None]
        several = len(ready.plans) > 1
        done.rows += [{**row, "stage": stage.name} for row in rows] if several else rows
        done.report = of_run(args, ready, plan, done, identity, numerics, time.perf_counter() - started)
        done.report["training"] = finish.training_report(trainer, result, ready)
        if log is not None and place is not None:
            finish.write(args, ready, i, target, place, log, solved, rows, done, trainer)
    elif isinstance(subject, ModuleSubject):
        roundings.remove({})
        finish.convert(model, dtypes)
        subject.experts = unfuse(model)
    ranks.barrier()


def _loaded(args: Arguments, subject: Subject) -> Any:
    """The whole model, experts fused, ready to be trained."""
    from bitpress.prepare import whole_model

    if isinstance(subject, ModuleSubject):
        refuse(subject.model, subject.experts)
        model = subject.model
    else:
        model = whole_model(args, subject)
    model.requires_grad_(True)
    return model


def _zero_notes(model: nn.Module, masks: Masks | None) -> list[str]:
    """What the user should know of zeros that are kept, or that are not."""
    if masks is not None:
        if not masks.dense:
            return []
        more = f" (and {len(masks.dense) - 1} more)" if len(masks.dense) > 1 else ""
        return [f"ConstantPruningModifier: {masks.dense[0]}{more} has no zeros to keep"]
    linears = ((n, m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.dim() == 2)
    sparse = [name for name, weight in linears if not weight.is_meta and pruned(weight.detach()) is not None]
    if not sparse:
        return []
    return [f"{sparse[0]} and {len(sparse) - 1} more are pruned, and nothing keeps zeros: add ConstantPruningModifier"]


def _trainer(
    args: Arguments, ready: Prepared, model: Any, masks: Masks | None, folder: Path, *, checkpoints: bool
) -> StageTrainer:
    from bitpress.data.training import Collate
    from bitpress.training.callback import KeepZeros
    from bitpress.training.trainer import Reporter, StageTrainer

    how, sets = args.training, ready.training
    assert sets is not None
    arguments = how.arguments(
        folder, evaluates=sets.evaluation is not None, seed=args.seed, cpu=ready.device.type == "cpu"
    )
    steps = _planned_steps(arguments, len(sets.train))
    if "logging_steps" not in how.options:
        arguments.logging_steps = max(1, min(50, steps // 20))
    if not checkpoints:
        arguments.save_strategy = "no"
    elif not {"save_steps", "save_strategy"} & how.options.keys():
        arguments.save_steps = max(1, min(MOST_STEPS, math.ceil(steps / 10)))
    teacher = _teacher(args, model)
    pad = getattr(ready.tokenizer, "pad_token_id", None)
    callbacks = [Reporter(args.progress), *([] if masks is None else [KeepZeros(masks)]), *how.callbacks]
    return StageTrainer(
        how, teacher, model=model, args=arguments, train_dataset=sets.train, eval_dataset=sets.evaluation,
        data_collator=Collate(0 if pad is None else pad), callbacks=callbacks,
    )  # fmt: skip


def _planned_steps(arguments: Any, sequences: int) -> int:
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    step: int = arguments.train_batch_size * arguments.gradient_accumulation_steps * max(1, arguments.world_size)
    epochs: float = arguments.num_train_epochs
    return max(1, math.ceil(math.ceil(sequences / step) * epochs))


def _steps(trainer: StageTrainer) -> int:
    return _planned_steps(trainer.args, len(trainer.train_dataset))


def _teacher(args: Arguments, model: nn.Module) -> Any:
    """The teacher, loaded, in its own dtype."""
    how = args.training
    given = args.model if how.distill_teacher == "self" else how.distill_teacher
    if given is None or isinstance(given, nn.Module):
        return given
    from bitpress.subject import locate
    from bitpress.transformers import SparseAutoModelForCausalLM

    return SparseAutoModelForCausalLM.from_pretrained(
        locate(given, trust_pickle=args.trust_pickle), trust_remote_code=args.trust_remote_code_model
    )


def _last_checkpoint(place: Path) -> Path | None:
    """The trainer's last checkpoint that is whole; what a kill cut short is deleted."""
    found = sorted(
        (int(f.name.removeprefix(CHECKPOINT)), f)
        for f in place.glob(f"{CHECKPOINT}*")
        if f.name.removeprefix(CHECKPOINT).isdecimal()
    )
    last = None
    for _, folder in found:
        try:
            json.loads((folder / STATE).read_text(encoding="utf-8"))
            last = folder
        except (OSError, ValueError):
            shutil.rmtree(folder)
    return last
