"""The data of a run, its tokenizer and its teacher: found, read, held against the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from bitpress.data import CalibrationData
    from bitpress.data.training import TrainingSets
    from bitpress.oneshot import Arguments
    from bitpress.subject import Subject

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # files of which every tokenizer has one


def find(args: Arguments) -> None:
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


def calibration(args: Arguments, subject: Subject, tokenizer: Any, unusable: str) -> CalibrationData:
    """Calibration sequences that the model can read."""
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
    fits(max(int(s.max()) for s in data.sequences), max(len(s) for s in data.sequences), subject)
    return data


def training_sets(args: Arguments, subject: Subject | None, tokenizer: Any) -> TrainingSets:
    """What is trained and evaluated on, held against the model."""
    from bitpress.data.splits import evaluation_split, training_split
    from bitpress.data.training import TrainingSets, load_training

    how = args.training
    if args.dataset is None and args.dataset_path is None:
        raise DataError("dataset: missing; training needs data: a file, folder, hub dataset or object (--dataset)")
    common: dict[str, Any] = {
        "tokenizer": tokenizer, "dataset_config_name": args.dataset_config_name, "text_column": args.text_column,
        "max_seq_length": args.max_seq_length, "pack": args.concatenate_data, "separator": args.separator,
        "mask_prompts": how.mask_prompts, "preprocessing_func": args.preprocessing_func, "streaming": args.streaming,
        "preprocessing_num_workers": args.preprocessing_num_workers, "trust_remote_code": args.trust_remote_code_data,
    }  # fmt: skip
    split = evaluation_split(args.splits)
    if how.wants_evaluation and how.eval_dataset is None and split is None:
        raise DataError(
            "eval_strategy: there is no data to evaluate on; give eval_dataset (--eval-dataset), or "
            "splits={'train': ..., 'validation': ...}"
        )
    train = load_training(
        args.dataset, split=training_split(args.splits), dataset_path=args.dataset_path,
        max_samples=how.max_train_samples, **common,
    )  # fmt: skip
    evaluation = None
    if how.eval_dataset is not None:
        evaluation = load_training(how.eval_dataset, **common)
    elif split is not None:
        evaluation = load_training(args.dataset, split=split, dataset_path=args.dataset_path, **common)
    for data in (train, evaluation):
        if data is not None and subject is not None:
            fits(data.largest_id, data.longest, subject)
    return TrainingSets(train, evaluation)


def teacher_of(args: Arguments, subject: Subject | None) -> dict[str, Any] | None:
    """What tells the teacher of a training stage from another; None where there is none on disk.

    Raises:
        ConfigError: it cannot teach this model.
    """
    from bitpress.checkpoint import Source
    from bitpress.subject import locate, read_config

    given, how = args.training.distill_teacher, args.training
    if given is None:
        return None
    if given == "self" and (args.verb != "apply" or not isinstance(args.model, str | os.PathLike)):
        raise ConfigError(
            "distill_teacher: 'self' is the model that apply was given by its folder; give the teacher's folder here"
        )
    given = args.model if given == "self" else given
    there = isinstance(given, str | os.PathLike)
    if not there and not hasattr(given, "config"):
        raise ConfigError(f"distill_teacher: expected a folder, hub id or model, got {given!r}")
    if given is args.model and not there:
        raise ConfigError(
            "distill_teacher: is the model that is trained, which would teach itself; give another object"
        )
    try:
        folder = locate(given, trust_pickle=args.trust_pickle) if there else None
    except CheckpointError as error:
        raise ConfigError([f"distill_teacher: {problem}" for problem in error.problems]) from None
    config = given.config if folder is None else read_config(folder, trust_remote_code=args.trust_remote_code_model)
    if subject is not None:
        mine, other = subject.config.get_text_config(), config.get_text_config()
        same = ["vocab_size"] + (["num_hidden_layers", "hidden_size"] if how.distill_hidden else [])
        if faults := [
            f"distill_teacher: its {name} is {getattr(other, name)}, the model's {getattr(mine, name)}"
            for name in same
            if getattr(other, name) != getattr(mine, name)
        ]:
            raise ConfigError(faults)
    return None if folder is None else Source(folder).fingerprint()


def find_tokenizer(args: Arguments, subject: Subject | None) -> tuple[Any, str]:
    """The tokenizer that was given, or the model's own; None if there is none (data of token ids needs none).

    Returns:
        The tokenizer, and what is wrong with the model's own where it is there and cannot be loaded.
    """
    from transformers import AutoTokenizer

    given = args.tokenizer
    if given is not None and not isinstance(given, str | os.PathLike):
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


def fits(top: int, longest: int, subject: Subject) -> None:
    """DataError if the model cannot read sequences up to this token id and this length."""
    from torch import nn

    rows = subject.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if top >= rows:
        raise DataError(f"the data has token id {top}, but the model embeds {rows}: is it another model's tokenizer?")
    most = getattr(subject.config, "max_position_embeddings", None)
    # sequences longer than the model's table of learned positions cannot run
    if not isinstance(most, int) or longest <= most:
        return
    words = subject.model.get_input_embeddings()  # type: ignore[operator]
    tables = [m for m in subject.model.modules() if isinstance(m, nn.Embedding) and m is not words]
    if any(most <= table.num_embeddings <= most + 8 for table in tables):
        raise DataError(f"sequences of {longest} tokens, but the model has {most} positions: lower max_seq_length")
