"""Everything before the first weight: recipe, model, output folder and data, held against each other."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.errors import BitpressError, ConfigError, DataError, PlanError, RecipeError
from bitpress.recipe import Recipe, Stage

if TYPE_CHECKING:
    import torch

    from bitpress.data import CalibrationData
    from bitpress.oneshot import Arguments
    from bitpress.plan import Plan
    from bitpress.subject import Subject


def is_path(model: Any) -> bool:
    """Whether a model or tokenizer is given by its place."""
    return isinstance(model, str | os.PathLike)


@dataclass(frozen=True)
class Prepared:
    """Everything known before a weight is loaded."""

    recipe: Recipe
    modifiers: tuple[Any, ...]
    subject: Subject
    plan: Plan
    data: CalibrationData | None
    device: torch.device
    tokenizer: Any
    output: Path | None


def prepare(args: Arguments) -> Prepared:
    """Read recipe, model and data, and hold them against each other; raises every user error."""
    from bitpress import journal, plan, ranks
    from bitpress.verified import check_blocks

    ranks.check()
    recipe = Recipe.load(args.recipe)
    chosen = recipe if args.stage is None else Recipe((recipe.stage(args.stage),))
    modifiers = tuple(m for s in _oneshot_stages(chosen) for m in s.modifiers)
    device = pick_device(args.device)
    subject = open_subject(args)
    output = args.output_dir
    if output is not None and args.stage is not None:
        output = output / chosen.stages[0].name
    faults: list[BitpressError] = []
    made: Plan | None = None
    data: CalibrationData | None = None
    tokenizer = args.tokenizer
    needs_data = any(m.needs for m in modifiers)
    try:
        try:
            if output is not None:
                journal.check(output)
            made = plan.make(
                modifiers, subject, samples=args.num_calibration_samples, length=args.max_seq_length, device=device,
                max_memory=args.max_memory, batch_size=args.batch_size, output=output, compressed=args.save_compressed,
                trust_remote_code=args.trust_remote_code_model,
            )  # fmt: skip
        except PlanError as error:
            faults.append(error)
        if static := _static_without_data(args, modifiers):
            faults.append(PlanError(static))
        try:
            tokenizer = find_tokenizer(args, subject)
            data = _data(args, subject, tokenizer) if needs_data and not static else None
        except (DataError, ConfigError) as error:
            faults.append(error)
        if len(faults) == 1:
            raise faults[0]
        if faults:
            raise PlanError([p for error in faults for p in error.problems])
        check_blocks(subject, trust_remote_code=args.trust_remote_code_model)
    except BaseException:
        subject.close()
        raise
    assert made is not None
    notes = list(made.notes)
    if len(chosen.stages) > 1:
        notes.append(f"stages {', '.join(s.name for s in chosen.stages)}: run as one pass over the model")
    if args.dataset is not None and data is None:
        notes.append("dataset: not read, nothing in this recipe needs data")
    return Prepared(chosen, modifiers, subject, replace(made, notes=tuple(notes)), data, device, tokenizer, output)


def _static_without_data(args: Arguments, modifiers: tuple[Any, ...]) -> list[str]:
    """Scales that stay fixed at inference must come from data like what they will see: the built-in text is none."""
    if args.dataset is not None or args.dataset_path is not None:
        return []
    kinds = {"range": "static scales of inputs", "cache": "static scales of keys and values (kv_cache_scheme)"}
    return [
        f"{type(m).__name__}: {text} are set from calibration data, and none is given: pass dataset (--dataset), "
        "or use a scheme with dynamic activations such as FP8_DYNAMIC"
        for m in modifiers
        for need, text in kinds.items()
        if need in m.needs
    ]


def _oneshot_stages(recipe: Recipe) -> tuple[Stage, ...]:
    if training := [s.name for s in recipe.stages if s.run_type == "train"]:
        raise RecipeError(
            [f"{name}: a training stage, which oneshot does not run; choose another stage" for name in training]
        )
    return recipe.stages


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one. ConfigError if it is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    folder = locate(args.model)
    if method := is_quantized(folder):
        raise PlanError(f"{args.model} " + remedy.format(method))
    if args.output_dir is not None:
        if args.output_dir.resolve() == folder.resolve():
            raise PlanError(f"{args.output_dir}: is the model's own folder; choose another output folder")
        return FolderSubject(folder, trust_remote_code=args.trust_remote_code_model)
    from transformers import AutoModelForCausalLM

    FolderSubject(folder, trust_remote_code=args.trust_remote_code_model)  # its checks come before any weight
    return ModuleSubject(
        AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=args.trust_remote_code_model, local_files_only=True
        )
    )


def _data(args: Arguments, subject: Subject, tokenizer: Any) -> CalibrationData:
    from bitpress.data import load_calibration

    data = load_calibration(
        args.dataset, tokenizer=tokenizer, splits=args.splits, dataset_config_name=args.dataset_config_name,
        dataset_path=args.dataset_path, text_column=args.text_column, num_samples=args.num_calibration_samples,
        max_seq_length=args.max_seq_length, pack=args.concatenate_data, separator=args.separator,
        shuffle=args.shuffle_calibration_samples, seed=args.seed, preprocessing_func=args.preprocessing_func,
        streaming=args.streaming, preprocessing_num_workers=args.preprocessing_num_workers,
        trust_remote_code=args.trust_remote_code_data,
    )  # fmt: skip
    _check_vocabulary(data, subject)
    _check_positions(data, subject)
    return data


def find_tokenizer(args: Arguments, subject: Subject) -> Any:
    """The tokenizer that was given, or the model's own; None if there is none (data of token ids needs none)."""
    from transformers import AutoTokenizer

    given = args.tokenizer
    if given is not None and not is_path(given):
        if not callable(given):
            raise ConfigError(f"tokenizer: expected a tokenizer or its folder, got {given!r}")
        return given
    place = given or subject.folder or getattr(subject.config, "_name_or_path", "")
    if not place:
        return None
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=args.trust_remote_code_model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if given is not None:
            raise ConfigError(f"tokenizer: {place}: {str(error).strip().splitlines()[0]}") from None
        return None


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
