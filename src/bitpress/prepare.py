"""Everything before the first weight: recipe, model, output folder and data, held against each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.devices import pick_device
from bitpress.effort import asked_for
from bitpress.errors import ConfigError, Faults, PlanError, RecipeError
from bitpress.modifiers.quantization import SchemeModifier
from bitpress.recipe import DEFAULT_STAGE, Recipe, Stage

if TYPE_CHECKING:
    import torch

    from bitpress.data import CalibrationData
    from bitpress.data.training import TrainingSets
    from bitpress.oneshot import Arguments
    from bitpress.plan import Plan
    from bitpress.sites import Site
    from bitpress.subject import Subject


def is_path(model: Any) -> bool:
    """Whether a model or tokenizer is given by its place."""
    return isinstance(model, str | os.PathLike)


@dataclass(frozen=True)
class Prepared:
    """Everything known before a weight is loaded.

    Attributes:
        plans: one a stage.
        plan: the whole run.
        training: what training stages train on.
        teacher: what tells the teacher from another, None if there is none on disk.
    """

    recipe: Recipe
    subject: Subject
    plans: tuple[Plan, ...]
    plan: Plan
    data: CalibrationData | None
    device: torch.device
    tokenizer: Any
    output: Path | None
    training: TrainingSets | None = None
    teacher: dict[str, Any] | None = None

    @property
    def training_data(self) -> dict[str, Any]:
        """What tells the data of training stages from others."""
        sets = self.training
        assert sets is not None
        evaluation = None if sets.evaluation is None else sets.evaluation.summary["fingerprint"]
        return {"data": sets.train.summary["fingerprint"], "evaluation": evaluation, "teacher": self.teacher}


def prepare(args: Arguments) -> Prepared:
    """Read recipe, model and data, and hold them against each other; raises every user error, all together."""
    import torch

    from bitpress import plan, preparedata
    from bitpress.subject import ModuleSubject
    from bitpress.verified import check_blocks

    faults = Faults()
    recipe: Recipe | None = None
    device: torch.device | None = None
    subject: Subject | None = None
    plans: list[Plan] = []
    data: CalibrationData | None = None
    training: TrainingSets | None = None
    teacher: dict[str, Any] | None = None
    tokenizer: Any = None
    unusable = ""
    output = args.output_dir
    with faults:
        args.check()
    sound = not faults.errors
    if args.verb != "oneshot":
        with faults:
            args.training.check(cpu=args.device == "cpu" or not torch.cuda.is_available())
    with faults:
        recipe = _chosen(args)
        if output is not None and args.stage is not None and args.verb != "apply":
            output = output / recipe.stages[0].name
    with faults:
        device = pick_device(args.device)
    with faults:
        subject = open_subject(args)
    try:
        with faults:
            if output is not None:
                _check_output(args, output, recipe)
        if sound and recipe is not None and subject is not None:
            with faults:
                # a device that is not there is told already; what fits can be checked on any
                plans = make_plans(args, recipe, subject, device or pick_device("cpu"), output)
        stages = () if recipe is None else recipe.stages
        modifiers = [m for s in stages if s.run_type == "oneshot" for m in s.modifiers]
        trains = args.verb == "train" or any(s.run_type == "train" for s in stages)
        static = _static_without_data(args, modifiers)
        with faults:
            if static:
                raise PlanError(static)
        with faults:
            tokenizer, unusable = preparedata.find_tokenizer(args, subject)
            unknown = recipe is None and args.dataset is not None and not trains
            if any(m.needs or m.surveys for m in modifiers) or unknown:
                if sound and subject is not None and not static:
                    data = preparedata.calibration(args, subject, tokenizer, unusable)
                elif args.dataset is not None:
                    preparedata.find(args)
        with faults:
            if args.prompts and tokenizer is None and args.tokenizer is None and subject is not None:
                why = unusable or "give tokenizer"
                raise ConfigError(f"prompts: need a tokenizer, and the model brings none; {why}")
        if trains and str(args.device).startswith("cuda:"):
            with faults:
                raise ConfigError(
                    f"device: a stage that trains cannot be sent to '{args.device}', as transformers' Trainer chooses: "
                    f"set CUDA_VISIBLE_DEVICES={args.device[5:]} and use cuda"
                )
        if trains and sound:
            with faults:
                training = preparedata.training_sets(args, subject, tokenizer)
            with faults:
                teacher = preparedata.teacher_of(args, subject)
        if subject is not None and (modifiers or not trains):
            with faults:
                check_blocks(subject, trust_remote_code=args.trust_remote_code_model)
        faults.report()
        assert recipe is not None and device is not None and subject is not None
        if is_path(args.model) and args.output_dir is None:
            subject = ModuleSubject(whole_model(args, subject))
            plans = make_plans(args, recipe, subject, device, output)
    except BaseException:
        if subject is not None:
            subject.close()
        raise
    made = plan.whole(plans)
    notes = list(made.notes)
    if len(plans) > 1:
        notes.append(f"stages {', '.join(s.name for s in recipe.stages)}: one after the other over the whole model")
    if ran := getattr(getattr(subject, "source", None), "ran", None):
        notes.append(f"{', '.join(ran)}: more than tensors; read by running what the pickle says, as was trusted")
    notes += [f"training data: {n}" for n in (training.train.notes if training else ())]
    notes += args.training.notes if trains else ()
    if args.dataset is not None and data is None and training is None:
        notes.append("dataset: not read, nothing in this recipe needs data")
    made = replace(made, notes=tuple(notes))
    return Prepared(recipe, subject, tuple(plans), made, data, device, tokenizer, output, training, teacher)


def prepare_together(args: Arguments) -> Prepared:
    """As `prepare`; of several processes all or none, with the memory of the one that has least.

    Raises:
        BitpressError: as `prepare`; or the processes have not the same to do.
    """
    from bitpress import ranks

    def checked() -> Prepared:
        ready, world = prepare(args), ranks.world_size()
        if ready.data is not None and (count := len(ready.data.sequences)) < world:
            ready.subject.close()
            raise PlanError(f"{world} processes, but {count} calibration sequences: give more, or start fewer")
        return ready

    ready = ranks.agreed(checked)
    if ranks.world_size() == 1:
        return ready
    plans = []
    for made in ready.plans:
        batch_size, gram_bytes, solver_bytes = ranks.least(made.batch_size, made.gram_bytes, made.solver_bytes)
        plans.append(replace(made, batch_size=batch_size, gram_bytes=gram_bytes, solver_bytes=solver_bytes))
    return replace(ready, plans=tuple(plans))


def make_plans(
    args: Arguments, recipe: Recipe, subject: Subject, device: torch.device, output: Path | None
) -> list[Plan]:
    """The plan of every stage, each knowing what the earlier ones have quantized; PlanError with all faults."""
    from bitpress import plan, trainplan
    from bitpress.budget import space_fault
    from bitpress.formatplan import format_unused

    several = len(recipe.stages) > 1
    plans: list[Plan] = []
    faults: list[str] = []
    inherited: list[Site] = []
    for stage in recipe.stages:
        last = stage is recipe.stages[-1]
        common: dict[str, Any] = {
            "samples": args.num_calibration_samples, "length": args.max_seq_length, "device": device,
            "output": None if several else output, "compressed": args.save_compressed and last,
            "inherited": inherited, "stored": args.format,
        }  # fmt: skip
        try:
            if stage.run_type == "train":
                made = trainplan.make(stage.modifiers, subject, precision=args.training.precision, **common)
            else:
                made = plan.make(
                    stage.modifiers, subject, max_memory=args.limit, batch_size=args.batch_size,
                    trust_remote_code=args.trust_remote_code_model, propagate=args.propagates, **common,
                )  # fmt: skip
        except PlanError as error:
            faults += [f"{stage.name}: {p}" if several else p for p in error.problems]
            continue
        if made.caches and not last:
            faults.append(
                f"{stage.name}: kv_cache_scheme: what goes into caches changes later; give it in the last stage"
            )
        if made.target is not None and not last:
            faults.append(f"{stage.name}: bits: later stages go on from its schemes; give it in the last stage")
        plans.append(made)
        inherited += [s for s in made.sites if s.group is not None]
    if len(plans) == len(recipe.stages):
        faults += format_unused(plans[-1])
    if several and plans and output is not None:
        # a stage's input lies beside its output; of `apply` all stay
        sizes = [p.output_bytes for p in plans]
        needed = max(a + b for a, b in zip([0, *sizes], [*sizes, 0], strict=True))
        needed = sum(sizes) if args.verb == "apply" else needed
        if fault := space_fault(output, needed):
            faults.append(fault)
    if faults:
        raise PlanError(list(dict.fromkeys(faults)))
    return plans


def _chosen(args: Arguments) -> Recipe:
    """The stages that run."""
    if isinstance(args.recipe, ConfigError):  # the command line's options do not go together
        raise args.recipe
    bits = args.bits
    if args.verb == "train" and args.recipe is None:  # plain fine-tuning
        return Recipe((Stage(DEFAULT_STAGE, "train", ()),))
    source = asked_for(
        scheme=args.scheme, bits=bits, group_size=args.group_size, method=args.method, effort=args.effort,
        sparsity=args.sparsity, ignore=args.ignore, written=args.recipe,
    )  # fmt: skip
    if bits is not None and (not isinstance(bits, int | float) or isinstance(bits, bool)):
        bits = 4.0  # what is no number is told elsewhere; a recipe without a scheme is still one
    recipe = Recipe.load(source, bits=bits)
    chosen = recipe if not isinstance(args.stage, str) else Recipe((recipe.stage(args.stage),))
    if args.verb == "apply":
        return recipe
    names = [stage.name for stage in chosen.stages]
    training = [s.name for s in chosen.stages if s.run_type == "train"]
    if args.verb == "oneshot":
        if not training:
            return chosen
        remedy = "choose another stage, or run all with apply (bitpress apply)"
        if args.stage is not None or len(names) == 1:
            remedy = "run it with train (bitpress train), or all stages with apply (bitpress apply)"
        raise RecipeError([f"{name}: a training stage, which oneshot does not run; {remedy}" for name in training])
    if len(names) > 1:
        raise RecipeError(
            f"train runs one stage, and the recipe has {', '.join(names)}: give stage='{(training or names)[0]}', or "
            "run all with apply (bitpress apply)"
        )
    stage = chosen.stages[0]
    if stage.run_type == "oneshot" and not all(m.trains for m in stage.modifiers):
        raise RecipeError(f"{stage.name}: a one-shot stage, which train does not run; run it with oneshot or apply")
    return Recipe((replace(stage, run_type="train"),))


def _static_without_data(args: Arguments, modifiers: Sequence[Any]) -> list[str]:
    """Scales that stay fixed at inference must come from data like what they will see: the built-in text is none."""
    if args.dataset is not None or args.dataset_path is not None:
        return []
    kinds = {
        "range": (
            "static scales of inputs",
            "use a scheme with dynamic activations such as FP8_DYNAMIC, or without any such as W4A16 and NVFP4A16",
        ),
        "cache": ("static scales of keys and values (kv_cache_scheme)", "drop kv_cache_scheme"),
    }
    return [
        f"{type(m).__name__}: {text} are set from calibration data, and none is given: pass dataset (--dataset), "
        f"or {remedy}"
        for m in modifiers
        for need, (text, remedy) in kinds.items()
        if need in m.needs and isinstance(m, SchemeModifier)  # others read ranges to choose scales that move
    ]


def open_subject(args: Arguments) -> Subject:
    """The model to compress; refuses one that is quantized already."""
    from bitpress.inspection import is_quantized
    from bitpress.subject import FolderSubject, ModuleSubject, locate

    remedy = "is quantized already ({}): start from the full-precision model"
    if not is_path(args.model):
        held = getattr(getattr(args.model, "config", None), "quantization_config", None)
        if held is not None:
            raise PlanError("the model " + remedy.format(type(held).__name__))
        report = getattr(args.model, "bitpress_report", None)
        if report is not None and (report.get("run") == "failed" or getattr(args.model, "bitpress_quantized", True)):
            raise PlanError("the model " + remedy.format("by bitpress"))
        return ModuleSubject(args.model)
    folder = locate(args.model, trust_pickle=args.trust_pickle)
    if method := is_quantized(folder):
        raise PlanError(f"{args.model} " + remedy.format(method))
    return FolderSubject(
        folder, trust_remote_code=args.trust_remote_code_model, trust_pickle=args.trust_pickle, dtype=args.dtype,
        attention=args.attn_implementation,
    )  # fmt: skip


def _check_output(args: Arguments, output: Path, recipe: Recipe | None) -> None:
    from bitpress import journal

    folders = [output]
    if args.verb == "apply" and recipe is not None:
        folders += [output / stage.name for stage in recipe.stages]
    if is_path(args.model) and args.output_dir is not None:
        model = Path(args.model).expanduser()
        for folder in (args.output_dir, *folders):
            if model.is_dir() and folder.resolve() == model.resolve():
                raise PlanError(f"{folder}: is the model's own folder; choose another output folder")
    for folder in folders:
        journal.check(folder)


def whole_model(args: Arguments, subject: Subject) -> Any:
    """The model of a folder whose checks are done, loaded whole."""
    from transformers import AutoModelForCausalLM

    from bitpress.pickles import PickleSource
    from bitpress.subject import FolderSubject

    assert isinstance(subject, FolderSubject)
    if isinstance(subject.source, PickleSource):
        state = subject.source.read(subject.source.tensors)
        kind: Any = type(subject.model)
        model = kind.from_pretrained(None, config=subject.config, state_dict=state, dtype=subject.dtype)
        model.name_or_path = str(subject.folder)
        return model
    return AutoModelForCausalLM.from_pretrained(
        subject.folder,
        dtype=subject.dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code_model,
        local_files_only=True,
    )
