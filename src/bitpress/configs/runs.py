"""`run`: compress a model as a configuration file says."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bitpress import ranks
from bitpress.configs import dotted, generation, wizard
from bitpress.configs.check import Checker, hints
from bitpress.configs.document import Document, read
from bitpress.configs.keys import RunKeys, TokenizerKeys
from bitpress.configs.sources import Builder
from bitpress.data.local import cause_of
from bitpress.data.pairs import joined
from bitpress.effort import integer_activations
from bitpress.errors import BitpressError, ConfigError, DataError
from bitpress.oneshot import Arguments
from bitpress.progress import Progress
from bitpress.recipe import Recipe

SMOOTHING = 0.8
MAX_LENGTH = 2048
# keys that say which recipe; where one is wrong, another recipe stands in while the other faults are looked for
RECIPE = ("recipe", "scheme", "bits", "group_size", "method", "effort", "sparsity", "ignore", "smoothing_strength",
          "stage")  # fmt: skip
DATA = ("dataset", "dataset_spec", "dataset_config_name", "dataset_path", "splits", "text_column", "tokenizer",
        "preprocessing_func", "separator", "separator_token")  # fmt: skip
# types of arguments that are objects in Python
WRITTEN: dict[str, Any] = {
    "model": str, "output_dir": str, "dataset": str | None, "dataset_path": str | None,
    "recipe": str | dict[str, Any] | list[Any] | None, "splits": str | list[str] | dict[str, str] | None,
}  # fmt: skip
NOT_KEYS = ("progress", "tokenizer", "preprocessing_func", "verb", "training")
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Configured:
    """A configuration that is right as far as it can be told without the model.

    Attributes:
        arguments: of `bitpress.oneshot`.
        training: arguments of training stages; None: there are none, and the run is one-shot.
        generation: for the checkpoint's generation_config.json.
        notes: what the user should know.
    """

    document: Document
    arguments: dict[str, Any]
    training: dict[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the checkpoint goes."""
        place = Path(self.arguments["output_dir"])
        return place / self.arguments["stage"] if self.arguments.get("stage") else place


def run(
    config: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    fresh: bool = False,
    progress: Progress | bool | None = None,
) -> Any:
    """Compress a model as a configuration says; see `docs/configs.md` for its keys.

    The same call goes on where a killed or failed one was.

    Args:
        config: a file ending in .toml, .yaml or .json.
        overrides: `dotted.key=value` each, in place of what the file says.
        resume, fresh, progress: as of `bitpress.oneshot`.

    Returns:
        As `bitpress.oneshot`.

    Raises:
        ConfigError, RecipeError, PlanError, DataError, CheckpointError: all faults together, each with line and key
            where it is of one, before weights are loaded.
        NumericsError: as of `bitpress.oneshot`.
    """
    from bitpress import samples
    from bitpress.apply import apply
    from bitpress.checkpoint import write_json
    from bitpress.oneshot import oneshot
    from bitpress.progress import choose_progress
    from bitpress.report import write_report

    ranks.join(_device(Path(config), overrides))
    found = ranks.agreed(lambda: load(Path(config), overrides, resume=resume, fresh=fresh))
    shown = choose_progress(progress) if ranks.first() else Progress()
    for note in found.notes:
        shown.note(note)
    try:
        if found.training is None:
            made = oneshot(**found.arguments, progress=shown)
        else:
            made = apply(**found.arguments, **found.training, progress=shown)
    except BitpressError as error:
        raise located(found.document, error) from error.__cause__
    if ranks.first() and not (held := samples.read(found.folder)).get("again", "").startswith("cd "):  # a new run
        sets = [*overrides, f"output_dir={found.arguments['output_dir']}-again"]
        words = ["bitpress", "run", str(config), *(word for given in sets for word in ("--set", given))]
        command = f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"  # places in the file are relative to it
        write_report(found.folder, {**held, "again": command}, samples.recipe_of(found.folder))
    if found.generation and ranks.first():
        file = found.folder / "generation_config.json"
        now = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        write_json(file, {**now, **found.generation})
    return made


def _device(path: Path, overrides: Sequence[str]) -> str:
    """The device of a configuration, of which nothing else is known yet."""
    try:
        return str(read(path, overrides).data.get("device", "auto"))
    except ConfigError:  # is told when it is read
        return "auto"


def load(path: Path, overrides: Sequence[str] = (), **more: Any) -> Configured:
    """Read and check a configuration.

    Args:
        more: arguments of `bitpress.oneshot` from elsewhere.

    Raises:
        BitpressError: all faults together, also those that the rest of the run would have.
    """
    document = read(path, overrides)
    checker = Checker(document)
    data, notes = wizard.translate(checker)
    known = {k: WRITTEN.get(k, v) for k, v in hints(Arguments).items() if k not in NOT_KEYS}
    keys = checker.keys({**known, **hints(RunKeys)}, data, (), also=wizard.KEYS) or {}
    for name in ("model", "output_dir"):
        if name not in data:
            checker.fault((name,), "missing")
    own = RunKeys(**{k: v for k, v in keys.items() if k in hints(RunKeys)})
    arguments = {k: v for k, v in keys.items() if k in known} | {k: v for k, v in more.items() if v}
    if own.trust_remote_code:
        arguments |= {"trust_remote_code_model": True, "trust_remote_code_data": True}
    if "dtype" in arguments:
        arguments["dtype"] = SHORT.get(arguments["dtype"], arguments["dtype"])
    folder = path.resolve().parent
    _recipe(checker, own, keys, arguments)
    _tokenizer(checker, own, arguments)
    arguments.setdefault("max_seq_length", MAX_LENGTH)
    _data(checker, own, keys, arguments, folder)
    produced = generation.checked(checker, own.generation)
    training = _training(checker, own, arguments)
    if checker.faults:
        raise ConfigError([*checker.faults, *_others(checker, arguments, training)])
    return Configured(document, arguments, training, produced, tuple(notes))


def _recipe(checker: Checker, own: RunKeys, keys: Mapping[str, Any], arguments: dict[str, Any]) -> None:
    """What scheme and smoothing_strength say, as a recipe."""
    strength, scheme = own.smoothing_strength, keys.get("scheme")
    if strength is not None and not 0 <= strength <= 1:
        checker.fault(("smoothing_strength",), f"must be from 0 to 1, got {strength}")
        return
    beside = [k for k in ("recipe", "bits", "effort", "sparsity") if keys.get(k) is not None]
    if checker.document.has(("smoothing_strength",)) and strength and (beside or scheme is None):
        what = f"cannot go with {', '.join(beside)}" if beside else "goes with scheme, which is missing"
        checker.fault(("smoothing_strength",), f"{what}; write a SmoothQuantModifier into a recipe")
        return
    if scheme is None or beside:
        return
    quantizer = {k: keys[k] for k in ("scheme", "group_size") if keys.get(k) is not None}
    ignore = keys.get("ignore") or ["lm_head"]
    quantizer["ignore"] = [ignore] if isinstance(ignore, str) else ignore
    if strength is None:
        strength = SMOOTHING if integer_activations(quantizer) else 0
    if not strength or keys.get("method") not in (None, "gptq", "rtn"):
        return
    for name in ("scheme", "group_size", "method", "ignore"):
        arguments.pop(name, None)
    smoothing = {"smoothing_strength": float(strength)}
    if not checker.document.has(("smoothing_strength",)):
        smoothing["required"] = False
    name = "QuantizationModifier" if keys.get("method") == "rtn" else "GPTQModifier"
    arguments["recipe"] = {"SmoothQuantModifier": smoothing, name: quantizer}


def _training(checker: Checker, own: RunKeys, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of training stages, if there are such stages."""
    try:
        stages = Recipe.load(arguments["recipe"]).stages if arguments.get("recipe") is not None else ()
    except BitpressError:  # is told with all else
        return own.training
    if any(stage.run_type == "train" for stage in stages):
        return own.training or {}
    if own.training is not None:
        checker.fault(("training",), "the recipe has no training stage: give one `run_type: train`, or drop it")
    return None


def _tokenizer(checker: Checker, own: RunKeys, arguments: dict[str, Any]) -> None:
    """The tokenizer that the table describes; without a table it is left to the run."""
    if own.tokenizer is None or isinstance(own.tokenizer, str):
        arguments["tokenizer"] = own.tokenizer
        return
    keys = checker.table(TokenizerKeys, own.tokenizer, ("tokenizer",))
    if keys is None:
        return
    if keys.truncation in (False, "do_not_truncate"):
        checker.fault(
            ("tokenizer", "truncation"),
            "cannot be false: memory is planned for rows of max_length tokens. Raise max_length, or leave long rows "
            "out with dataset_spec.token_length_filter",
        )
    if keys.max_length is not None:
        said = checker.document.data.get("max_seq_length", keys.max_length)
        if said != keys.max_length:
            checker.fault(("tokenizer", "max_length"), f"max_seq_length says {said!r}; give one")
        arguments["max_seq_length"] = keys.max_length
        checker.document.moved["max_seq_length",] = checker.document.origin(("tokenizer", "max_length"))
    options = dict(keys.init_kwargs)
    if keys.padding_side is not None:
        options["padding_side"] = keys.padding_side
    if not options and keys.chat_template is None and not keys.chat_template_kwargs:
        arguments["tokenizer"] = keys.name
        return
    made = _made_tokenizer(checker, keys.name, options, arguments)
    if made is not None and keys.chat_template is not None:
        made.chat_template = keys.chat_template
    if made is not None and keys.chat_template_kwargs:
        made.apply_chat_template = partial(made.apply_chat_template, **keys.chat_template_kwargs)
    arguments["tokenizer"] = made


def _made_tokenizer(
    checker: Checker, place: str | None, options: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Any:
    """A tokenizer; None: the model's. What is wrong with the model's place is told with the model."""
    from transformers import AutoTokenizer

    model = arguments.get("model")
    if place is None and (model is None or (is_local(model) and not Path(model).expanduser().is_dir())):
        return None
    try:
        trusted = arguments.get("trust_remote_code_model", False)
        at = str(Path(place or model or "").expanduser())
        return AutoTokenizer.from_pretrained(at, trust_remote_code=trusted, **options)
    except Exception as error:  # a missing folder, a file of another kind, an option that the class does not have
        if place is not None or options:
            checker.fault(("tokenizer",), f"{place or model}: cannot be loaded: {cause_of(error)}")
        return None


def is_local(model: str) -> bool:
    """Whether a model's name cannot be a hub id."""
    return model.startswith((".", "/", "~")) or model.count("/") != 1


def _data(checker: Checker, own: RunKeys, keys: Mapping[str, Any], arguments: dict[str, Any], folder: Path) -> None:
    """The rows of dataset_spec, and what is done to a row before it is read."""
    function = None
    if own.preprocessing_func is not None:
        try:
            function = dotted.imported(own.preprocessing_func, folder)
        except DataError as error:
            checker.fault(("preprocessing_func",), str(error))
    if own.dataset_spec is None:
        arguments["preprocessing_func"] = function
        return
    if given := [k for k in ("dataset", "dataset_path", "splits") if keys.get(k) is not None]:
        checker.fault(("dataset_spec",), f"cannot go with {', '.join(given)}; give one of them")
    tokenizer = arguments.get("tokenizer")
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = _made_tokenizer(checker, tokenizer, {}, arguments)
    seed = arguments.get("seed", 42)
    arguments["dataset"] = Builder(checker, folder, tokenizer, seed).rows(own.dataset_spec, ("dataset_spec",))
    arguments.setdefault("concatenate_data", False)  # a pair or a conversation is a sequence of its own
    if own.dataset_spec.get("shuffle") is False:
        arguments.setdefault("shuffle_calibration_samples", False)
    end = getattr(tokenizer, "eos_token", None) if own.add_eos_token else None
    arguments["preprocessing_func"] = joined(own.separator_token, end or "", function)


def _others(checker: Checker, arguments: dict[str, Any], training: dict[str, Any] | None) -> list[str]:
    """The faults that the rest of the run would have, while some keys are wrong and others stand in for them."""
    from bitpress.prepare import prepare
    from bitpress.training.arguments import split_options

    wrong = {path[0] for path in checker.wrong} | {"" for path in checker.wrong if not path}
    given = {k: v for k, v in arguments.items() if k not in wrong}
    if "model" not in given:
        return []
    if wrong & set(RECIPE):
        given = {k: v for k, v in given.items() if k not in RECIPE}
        given["recipe"] = {"QuantizationModifier": {"scheme": "FP8_DYNAMIC", "ignore": ["lm_head"]}}
    if wrong & {*DATA, "max_seq_length", "num_calibration_samples"}:
        given = {k: v for k, v in given.items() if k not in DATA}
        given["dataset"] = [{"input_ids": [0]}]
    if "output_dir" in given:
        given["output_dir"] = Path(given["output_dir"]).expanduser()
    if training is not None and not wrong & set(RECIPE):
        given |= {"verb": "apply", "training": split_options(training, ())[1]}
    try:
        prepare(Arguments(**given)).subject.close()
    except BitpressError as error:
        return list(located(checker.document, error).problems)
    return []


def located(document: Document, error: BitpressError) -> BitpressError:
    """The error with the line and key of each problem that begins with a key or with what a key says."""
    told = type(error)([_located(document, problem) for problem in error.problems])
    told.agreed = error.agreed
    return told


def _located(document: Document, problem: str) -> str:
    name, colon, rest = problem.partition(": ")
    path = name.split(",")[0].split(".")
    if colon and document.has(path):
        return f"{document.place(path)}{name[len('.'.join(path)) :]}: {rest}"
    if colon and document.has(("training", *path)):
        return f"{document.place(('training', *path))}: {rest}"
    if colon and _at(document.data, ("recipe", path[0])) is not None:
        return f"{document.place(('recipe', *path))}: {rest}"
    if colon and document.has(path[-1:]):  # of a recipe that was made of such keys
        return f"{document.place(path[-1:])}: {rest}"
    for key in ("model", "dataset", "dataset_path", "output_dir", "recipe", "tokenizer"):
        value = document.data.get(key)
        at = document.origin((key,))
        if at != (key,):
            value = _at(document.data, at)
        if colon and isinstance(value, str) and problem.startswith(value):
            return f"{document.place((key,))}: {problem}"
    return problem


def _at(data: Any, path: Sequence[str]) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, Mapping) else None
    return data
