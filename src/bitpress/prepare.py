"""Everything before the first weight: recipe, model, output folder and data, held against each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.effort import asked_for
from bitpress.errors import ConfigError, DataError, Faults, PlanError, RecipeError
from bitpress.modifiers.quantization import SchemeModifier
from bitpress.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from bitpress.data import CalibrationData
    from bitpress.oneshot import Arguments
    from bitpress.plan import Plan
    from bitpress.sites import Site
    from bitpress.subject import Subject

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # files of which every tokenizer has one


def is_path(model: Any) -> bool:
    """Whether a model or tokenizer is given by its place."""
    return isinstance(model, str | os.PathLike)


@dataclass(frozen=True)
class Prepared:
    """Everything known before a weight is loaded.

    Attributes:
        plans: one a stage.
        plan: the whole run.
    """

    recipe: Recipe
    subject: Subject
    plans: tuple[Plan, ...]
    plan: Plan
    data: CalibrationData | None
    device: torch.device
    tokenizer: Any
    output: Path | None


def prepare(args: Arguments) -> Prepared:
    """Read recipe, model and data, and hold them against each other; raises every user error, all together."""
    from bitpress import plan
    from bitpress.verified import check_blocks

    faults = Faults()
    recipe: Recipe | None = None
    device: torch.device | None = None
    subject: Subject | None = None
    plans: list[Plan] = []
    data: CalibrationData | None = None
    tokenizer: Any = None
    output = args.output_dir
    with faults:
        args.check()
    sound = not faults.errors
    with faults:
        recipe = _chosen(args)
        if output is not None and args.stage is not None:
            output = output / recipe.stages[0].name
    with faults:
        device = pick_device(args.device)
    with faults:
        subject = open_subject(args)
    try:
        with faults:
            if output is not None:
                _check_output(args, output)
        if sound and recipe is not None and subject is not None:
            with faults:
                # a device that is not there is told already; what fits can be checked on any
                plans = make_plans(args, recipe, subject, device or pick_device("cpu"), output)
        modifiers = [] if recipe is None else [m for s in recipe.stages for m in s.modifiers]
        static = _static_without_data(args, modifiers)
        with faults:
            if static:
                raise PlanError(static)
        with faults:
            tokenizer, unusable = find_tokenizer(args, subject)
            if any(m.needs or m.surveys for m in modifiers) or (recipe is None and args.dataset is not None):
                if sound and subject is not None and not static:
                    data = _data(args, subject, tokenizer, unusable)
                elif args.dataset is not None:
                    _find_data(args)
        if subject is not None:
            with faults:
                check_blocks(subject, trust_remote_code=args.trust_remote_code_model)
        faults.report()
        assert recipe is not None and device is not None and subject is not None
        if is_path(args.model) and args.output_dir is None:
            subject = _in_memory(args, subject)
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
    if args.dataset is not None and data is None:
        notes.append("dataset: not read, nothing in this recipe needs data")
    made = replace(made, notes=tuple(notes))
    return Prepared(recipe, subject, tuple(plans), made, data, device, tokenizer, output)


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
        batch_size, gram_bytes = ranks.least(made.batch_size, made.gram_bytes)
        plans.append(replace(made, batch_size=batch_size, gram_bytes=gram_bytes))
    return replace(ready, plans=tuple(plans))


def make_plans(
    args: Arguments, recipe: Recipe, subject: Subject, device: torch.device, output: Path | None
) -> list[Plan]:
    """The plan of every stage, each knowing what the earlier ones have quantized; PlanError with all faults."""
    from bitpress import plan
    from bitpress.budget import space_fault

    several = len(recipe.stages) > 1
    plans: list[Plan] = []
    faults: list[str] = []
    inherited: list[Site] = []
    for stage in recipe.stages:
        last = stage is recipe.stages[-1]
        try:
            made = plan.make(
                stage.modifiers, subject, samples=args.num_calibration_samples, length=args.max_seq_length,
                device=device, max_memory=args.limit, batch_size=args.batch_size, output=None if several else output,
                compressed=args.save_compressed and last, inherited=inherited,
                trust_remote_code=args.trust_remote_code_model,
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
    if several and plans and output is not None:
        # a stage's input lies beside its output
        sizes = [p.output_bytes for p in plans]
        needed = max(a + b for a, b in zip([0, *sizes], [*sizes, 0], strict=True))
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
    source = asked_for(
        scheme=args.scheme, bits=bits, group_size=args.group_size, method=args.method, effort=args.effort,
        ignore=args.ignore, written=args.recipe,
    )  # fmt: skip
    if bits is not None and (not isinstance(bits, int | float) or isinstance(bits, bool)):
        bits = 4.0  # what is no number is told elsewhere; a recipe without a scheme is still one
    recipe = Recipe.load(source, bits=bits)
    chosen = recipe if not isinstance(args.stage, str) else Recipe((recipe.stage(args.stage),))
    if training := [s.name for s in chosen.stages if s.run_type == "train"]:
        raise RecipeError(
            [f"{name}: a training stage, which oneshot does not run; choose another stage" for name in training]
        )
    return chosen


def _static_without_data(args: Arguments, modifiers: Sequence[Any]) -> list[str]:
    """Scales that stay fixed at inference must come from data like what they will see: the built-in text is none."""
    if args.dataset is not None or args.dataset_path is not None:
        return []
    kinds = {
        "range": ("static scales of inputs", "use a scheme with dynamic activations such as FP8_DYNAMIC"),
        "cache": ("static scales of keys and values (kv_cache_scheme)", "drop kv_cache_scheme"),
    }
    return [
        f"{type(m).__name__}: {text} are set from calibration data, and none is given: pass dataset (--dataset), "
        f"or {remedy}"
        for m in modifiers
        for need, (text, remedy) in kinds.items()
        if need in m.needs and isinstance(m, SchemeModifier)  # others read ranges to choose scales that move
    ]


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one. ConfigError if it is not there."""
    import torch

    from bitpress import ranks

    several = ranks.world_size() > 1
    if several and name.startswith("cuda:"):
        raise ConfigError(
            f"device: '{name}' cannot be for {ranks.world_size()} processes; use cuda: each takes its own"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if several and name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{ranks.gpu()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: '{name}' is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: '{name}' is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but torch sees no GPU; use cpu or auto")
    return device


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


def _check_output(args: Arguments, output: Path) -> None:
    from bitpress import journal

    if is_path(args.model) and args.output_dir is not None:
        model = Path(args.model).expanduser()
        if model.is_dir() and args.output_dir.resolve() == model.resolve():
            raise PlanError(f"{args.output_dir}: is the model's own folder; choose another output folder")
    journal.check(output)


def _in_memory(args: Arguments, subject: Subject) -> Subject:
    """The model of a folder whose checks are done, loaded whole."""
    from transformers import AutoModelForCausalLM

    from bitpress.pickles import PickleSource
    from bitpress.subject import FolderSubject, ModuleSubject

    assert isinstance(subject, FolderSubject)
    if isinstance(subject.source, PickleSource):
        state = subject.source.read(subject.source.tensors)
        kind: Any = type(subject.model)
        model = kind.from_pretrained(None, config=subject.config, state_dict=state, dtype=subject.dtype)
        model.name_or_path = str(subject.folder)
        return ModuleSubject(model)
    return ModuleSubject(
        AutoModelForCausalLM.from_pretrained(
            subject.folder,
            dtype=subject.dtype if args.dtype else "auto",
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code_model,
            local_files_only=True,
        )
    )


def _find_data(args: Arguments) -> None:
    """Whether the data is there; it cannot be read yet."""
    from bitpress.data.sources import Wanted, open_source
    from bitpress.data.splits import calibration_split

    open_source(
        args.dataset,
        Wanted(
            split=calibration_split(None, args.splits), config=args.dataset_config_name, path=args.dataset_path,
            streaming=args.streaming, workers=args.preprocessing_num_workers,
            trust_remote_code=args.trust_remote_code_data,
        ),
    )  # fmt: skip


def _data(args: Arguments, subject: Subject, tokenizer: Any, unusable: str) -> CalibrationData:
    from bitpress.data import load_calibration

    try:
        data = load_calibration(
            args.dataset, tokenizer=tokenizer, splits=args.splits, dataset_config_name=args.dataset_config_name,
            dataset_path=args.dataset_path, text_column=args.text_column, num_samples=args.num_calibration_samples,
            max_seq_length=args.max_seq_length, pack=args.concatenate_data, separator=args.separator,
            shuffle=args.shuffle_calibration_samples, seed=args.seed, preprocessing_func=args.preprocessing_func,
            streaming=args.streaming, preprocessing_num_workers=args.preprocessing_num_workers,
            trust_remote_code=args.trust_remote_code_data,
        )  # fmt: skip
    except DataError as error:
        if unusable:
            raise DataError([*error.problems, unusable]) from None
        raise
    _check_vocabulary(data, subject)
    _check_positions(data, subject)
    return data


def find_tokenizer(args: Arguments, subject: Subject | None) -> tuple[Any, str]:
    """The tokenizer that was given, or the model's own; None if there is none (data of token ids needs none).

    Returns:
        The tokenizer, and what is wrong with the model's own where it is there and cannot be loaded.
    """
    from transformers import AutoTokenizer

    given = args.tokenizer
    if given is not None and not is_path(given):
        if not callable(given):
            raise ConfigError(f"tokenizer: expected a tokenizer or its folder, got {given!r}")
        return given, ""
    place = given
    if place is None and subject is not None:
        place = subject.folder or getattr(subject.config, "_name_or_path", "")
    if not place:
        return None, ""
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=args.trust_remote_code_model), ""
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = str(error).strip().splitlines()[0]
        if given is not None:
            raise ConfigError(f"tokenizer: {place}: {why}") from None
        there = any((Path(place) / name).is_file() for name in TOKENIZERS)
        return None, f"{place}: its own tokenizer cannot be loaded: {why}" if there else ""


def _check_vocabulary(data: CalibrationData, subject: Subject) -> None:
    rows = subject.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    top = max(int(s.max()) for s in data.sequences)
    if top >= rows:
        raise DataError(f"the data has token id {top}, but the model embeds {rows}: is it another model's tokenizer?")


def _check_positions(data: CalibrationData, subject: Subject) -> None:
    """Sequences longer than the model's table of learned positions cannot run."""
    from torch import nn

    most = getattr(subject.config, "max_position_embeddings", None)
    longest = max(len(s) for s in data.sequences)
    if not isinstance(most, int) or longest <= most:
        return
    words = subject.model.get_input_embeddings()  # type: ignore[operator]
    tables = [m for m in subject.model.modules() if isinstance(m, nn.Embedding) and m is not words]
    if any(most <= table.num_embeddings <= most + 8 for table in tables):
        raise DataError(f"sequences of {longest} tokens, but the model has {most} positions: lower max_seq_length")
