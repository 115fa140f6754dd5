"""What does a run again, for its report: a command with all its options, or a call where it has none for them.

The recipe is the one that the run has written: it holds what scheme, effort and a survey have decided.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress import ranks

if TYPE_CHECKING:
    from bitpress.oneshot import Arguments

# arguments and their options; a flag is given where the argument has the value beside it
OPTIONS = {
    "dataset": "--dataset", "dataset_config_name": "--dataset-config", "splits": "--split",
    "text_column": "--text-column", "num_calibration_samples": "--num-samples", "max_seq_length": "--max-seq-length",
    "device": "--device", "max_memory": "--max-memory", "batch_size": "--batch-size", "dtype": "--dtype",
    "seed": "--seed", "format": "--format", "prompts": "--prompt",
}  # fmt: skip
FLAGS = {
    "concatenate_data": (False, "--no-pack"), "verify": (False, "--no-verify"), "save_compressed": (False, "--dense"),
    "propagate": (False, "--no-propagate"), "trust_remote_code_model": (True, "--trust-remote-code"),
    "trust_remote_code_data": (True, "--trust-remote-code"), "trust_pickle": (True, "--trust-pickle"),
}  # fmt: skip
TRAINING = {
    "eval_dataset": "--eval-dataset", "max_train_samples": "--max-train-samples", "precision": "--precision",
    "distill_teacher": "--distill-teacher", "distill_temperature": "--distill-temperature",
    "distill_hardness": "--distill-hardness", "distill_hidden": "--distill-hidden",
}  # fmt: skip
# what the recipe holds, where the run goes, and what changes nothing in what is written
IDLE = (
    "model", "recipe", "scheme", "bits", "group_size", "method", "effort", "sparsity", "ignore", "output_dir", "stage",
    "resume", "fresh", "progress", "verb", "training", "preprocessing_num_workers",
)  # fmt: skip
SPLITS = {"calibration": "--split", "train": "--train-split", "validation": "--eval-split"}
# the command line has other defaults than Python, so these are always said
PLACES = ("model", "dataset", "dataset_path", "tokenizer", "eval_dataset", "distill_teacher")
SAID = ("num_calibration_samples", "max_seq_length", "seed")


def again(args: Arguments, recipe: Path | None) -> str:
    """A command to paste into a shell, or a call where it takes what only Python can give (`...` was in memory).

    Args:
        recipe: where the run's recipe is; None of a model in memory that is not saved.
    """
    if recipe is not None and args.output_dir is not None:
        line = command(args, recipe, f"{args.output_dir.absolute()}-again")
        if line is not None:
            return line
    return _call(args, _given(args), recipe)


def command(args: Arguments, recipe: Path, output: str) -> str | None:
    """A command that runs a recipe with the options of these arguments; None where only Python can give them."""
    given = _given(args)
    trained = _training(args) if args.verb != "oneshot" else []
    plain = all(_is_plain(name, value) for name, value in given.items()) and isinstance(args.model, str | os.PathLike)
    if not plain or trained is None:
        return None
    words = [*_launcher(), "bitpress", args.verb, _text("model", args.model), "--recipe", str(recipe)]
    for name, value in given.items():
        if name not in FLAGS or FLAGS[name][1] not in words:
            words += _words(name, value, args.verb)
    if args.verb == "apply" and args.stage is not None:
        words += ["--stage", args.stage]
    return shlex.join([*words, *trained, "--output", output])


def _launcher() -> list[str]:
    """What starts as many processes as this run has, on as many machines: each is given the command."""
    count = ranks.started()
    if count == 1:
        return []
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or count)
    words = ["torchrun", f"--nproc-per-node={here}"]
    if count > here:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        words += [f"--nnodes={count // here}", "--rdzv-backend=c10d", f"--rdzv-endpoint={place}"]
    return [*words, "-m"]


def _given(args: Arguments) -> dict[str, Any]:
    """Arguments that are not as they would be without, by name."""
    found = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in IDLE}
    found |= {"propagate": None if args.propagates else False}
    if args.splits is not None and isinstance(args.splits, Mapping) and set(args.splits) == {"calibration"}:
        found["splits"] = args.splits["calibration"]
    usual = {f.name: f.default for f in fields(args)}
    return {n: v for n, v in found.items() if n in SAID or not (v is None or v == () or v == usual[n])}


def _is_plain(name: str, value: Any) -> bool:
    """Whether the command line can say it."""
    if name == "splits" and isinstance(value, Mapping):
        return set(value) <= set(SPLITS) and all(isinstance(v, str) for v in value.values())
    if name == "prompts":
        return True
    known = name in OPTIONS or (name in FLAGS and value is FLAGS[name][0])
    return known and isinstance(value, str | int | float | os.PathLike)


def _words(name: str, value: Any, verb: str) -> Iterator[str]:
    """An argument as words of a command."""
    if name in FLAGS:
        yield FLAGS[name][1]
    elif name == "prompts":
        for prompt in value:
            yield from (OPTIONS[name], prompt)
    elif name == "splits" and isinstance(value, Mapping):
        for kind, split in value.items():
            yield from (SPLITS[kind], split)
    elif not (verb == "train" and name == "num_calibration_samples"):  # it has no such option
        yield from (OPTIONS[name], _text(name, value))


def _training(args: Arguments) -> list[str] | None:
    """Options of training; None where the command line cannot say them."""
    training, words = args.training, list[str]()
    if training.callbacks:
        return None
    for name, option in TRAINING.items():
        value = getattr(training, name)
        if value != type(training).__dataclass_fields__[name].default:
            if not isinstance(value, str | int | float | os.PathLike):
                return None
            words += [option, _text(name, value)]
    if not training.mask_prompts:
        words.append("--no-mask-prompts")
    for name, value in training.options.items():
        if not isinstance(value, str | int | float | None):
            return None
        words += ["--set", f"{name}={json.dumps(value)}"]
    return words


def _text(name: str, value: Any) -> str:
    """A value as text; what lies on this machine by its whole path."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    if name in PLACES and (place := Path(text).expanduser()).exists():
        return str(place.resolve())
    return text


def _call(args: Arguments, given: Mapping[str, Any], recipe: Path | None) -> str:
    """The same in Python."""
    shown = {"model": args.model, **given, "recipe": "recipe.yaml" if recipe is None else str(recipe)}
    lines = [f"    {name}={_shown(name, value)}" for name, value in shown.items()]
    launcher = _launcher()[:-1]
    head = [f"# in script.py, started by: {shlex.join([*launcher, 'script.py'])}"] if launcher else []
    if args.verb != "oneshot":
        lines.append("    # and the arguments of training, as they were")
    if args.output_dir is not None:
        lines.append(f"    output_dir={f'{args.output_dir.absolute()}-again'!r},")
    return "\n".join([*head, f"from bitpress import {args.verb}", "", f"{args.verb}(", *lines, ")"])


def _shown(name: str, value: Any) -> str:
    """A value in a call; `...` where it was in memory."""
    if isinstance(value, str | os.PathLike):
        return f"{_text(name, value)!r},"
    held = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    if len(held) < 20 and all(isinstance(v, str | int | float | None) for v in held):
        return f"{value!r},"
    return f"...,  # {type(value).__name__}"
