"""What a training stage is asked for: transformers' TrainingArguments, in their present and in older names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitpress.errors import ConfigError, did_you_mean

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
# old name -> present name
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
# names that say nothing any more
DROPPED = (
    "clear_sparse_session", "do_eval", "do_oneshot", "do_predict", "do_train", "half_precision_backend",
    "jit_mode_eval", "logging_dir", "mp_parameters", "past_index", "run_stages", "tpu_metrics_debug", "tpu_num_cores",
    "use_ipex", "use_legacy_prediction_loop",
)  # fmt: skip
# names that bitpress sets, with what to do instead
OURS = {
    "output_dir": "give it as output_dir",
    "push_to_hub": "train, then upload the folder: huggingface_hub.HfApi().upload_folder",
    "seed": "give it as seed",
    "remove_unused_columns": "drop it: rows are token ids and labels alone",
    "label_names": "drop it: labels are called labels",
}
# what Trainer would do otherwise, where another choice fits
DEFAULTS: dict[str, Any] = {"save_total_limit": 2, "report_to": "none", "disable_tqdm": True}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a training stage trains.

    Attributes:
        options: arguments of TrainingArguments, translated.
        eval_dataset: data to evaluate on, in any form of the data room; None: the split "validation", if one is given.
        max_train_samples: rows to read at most; None: all.
        mask_prompts: prompts give no loss: labels are what is to be answered.
        precision: dtype of the weights while training; "auto": float32 where it fits into memory, else the model's.
        distill_teacher: folder, hub id or module; "self": the model that the run was given.
        distill_temperature, distill_hardness, distill_hidden: see `bitpress.math.distill`.
        callbacks: more callbacks of transformers' Trainer.
        overwrite: replace what another run has left in the output folder.
        notes: what was given without effect.
        problems: what is wrong with the arguments.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    eval_dataset: Any = None
    max_train_samples: int | None = None
    mask_prompts: bool = True
    precision: str = "auto"
    distill_teacher: Any = None
    distill_temperature: float = 1.0
    distill_hardness: float = 1.0
    distill_hidden: float = 0.0
    callbacks: Sequence[Any] = ()
    overwrite: bool = False
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def check(self, *, cpu: bool) -> None:
        """ConfigError with all that is wrong with the values in themselves; `cpu`: a GPU is not used."""
        faults = list(self.problems)
        if self.precision not in PRECISIONS:
            hint = did_you_mean(str(self.precision), PRECISIONS)
            faults.append(f"precision: {self.precision!r} is unknown.{hint}")
        if not _number(self.distill_temperature) or self.distill_temperature <= 0:
            faults.append(f"distill_temperature: must be a positive number, got {self.distill_temperature!r}")
        if not _number(self.distill_hardness) or not 0 <= self.distill_hardness <= 1:
            faults.append(f"distill_hardness: must be a share from 0 to 1, got {self.distill_hardness!r}")
        if not _number(self.distill_hidden) or self.distill_hidden < 0:
            faults.append(f"distill_hidden: must be 0 or a positive weight, got {self.distill_hidden!r}")
        if self.distill_teacher is None and (self.distill_temperature != 1.0 or self.distill_hidden):
            faults.append("distill_teacher: missing; give the model that the others of distill_* go with")
        if self.distill_teacher is not None and self.options.get("label_smoothing_factor"):
            faults.append("label_smoothing_factor: has no effect on what a teacher teaches; drop it")
        rows = self.max_train_samples
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            faults.append(f"max_train_samples: must be at least 1, got {rows!r}")
        if not isinstance(self.mask_prompts, bool):
            faults.append(f"mask_prompts: expected True or False, got {self.mask_prompts!r}")
        faults += self._callback_faults()
        try:
            arguments = self.arguments(Path("unused"), cpu=cpu)
        except ConfigError as error:
            faults += error.problems
        else:
            faults += _reporting_faults(arguments.report_to)
        if faults:
            raise ConfigError(faults)

    def _callback_faults(self) -> list[str]:
        from transformers import TrainerCallback

        kinds = [one if isinstance(one, type) else type(one) for one in self.callbacks]
        return [
            f"callbacks: expected a TrainerCallback of transformers, got {one!r}"
            for one, kind in zip(self.callbacks, kinds, strict=True)
            if not issubclass(kind, TrainerCallback)
        ]

    @property
    def wants_evaluation(self) -> bool:
        """Whether evaluation is asked for by name."""
        return str(self.options.get("eval_strategy", "no")) != "no" or "eval_steps" in self.options

    def arguments(self, folder: Path, *, evaluates: bool = False, seed: int = 42, cpu: bool = False) -> Any:
        """transformers' TrainingArguments.

        Args:
            folder: where checkpoints go.
            evaluates: there is data to evaluate on.
            cpu: do not use a GPU.

        Raises:
            ConfigError: transformers refuses a value.
        """
        from transformers import TrainingArguments

        options = {**DEFAULTS, **self.options, "seed": seed, "output_dir": str(folder)}
        if cpu:
            options["use_cpu"] = True
        if evaluates and "eval_strategy" not in options:
            options["eval_strategy"] = "steps" if "eval_steps" in options else "epoch"
        elif not evaluates:
            options["eval_strategy"] = "no"  # told elsewhere where it was asked for
            options.pop("load_best_model_at_end", None)
        try:
            return TrainingArguments(**options)
        except (ValueError, TypeError, ImportError, RuntimeError, KeyError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"training arguments: {first}") from None

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same, as plain data."""
        teacher = self.distill_teacher
        name = None if teacher is None else str(teacher) if not hasattr(teacher, "forward") else type(teacher).__name__
        named = ("precision", "mask_prompts", "max_train_samples")
        distill = ("distill_temperature", "distill_hardness", "distill_hidden")
        return {
            "options": {key: _plain(value) for key, value in sorted(self.options.items())},
            **{key: getattr(self, key) for key in named},
            "distill_teacher": name,
            **({key: getattr(self, key) for key in distill} if teacher is not None else {}),
        }


def _reporting_faults(services: Any) -> list[str]:
    """Services to report to that cannot be reached: their packages are missing."""
    from transformers.integrations import get_reporting_integration_callbacks

    faults = []
    for service in [services] if isinstance(services, str) else services:
        try:
            for kind in get_reporting_integration_callbacks([service]):
                kind()
        except (ValueError, RuntimeError, ImportError) as error:
            faults.append(f"report_to: {str(error).strip().splitlines()[0]}")
    return faults


OWN = (
    "eval_dataset", "max_train_samples", "mask_prompts", "precision", "distill_teacher", "distill_temperature",
    "distill_hardness", "distill_hidden", "callbacks",
)  # fmt: skip


def split_options(given: Mapping[str, Any], run: Sequence[str]) -> tuple[dict[str, Any], Training]:
    """Arguments of a run and of training, told apart by name; what is wrong is in the training's `problems`.

    Args:
        given: arguments by name.
        run: names of arguments that are of the run itself.
    """
    from dataclasses import fields

    from transformers import TrainingArguments

    known = {f.name: f.type for f in fields(TrainingArguments) if f.init}
    mine: dict[str, Any] = {}
    own: dict[str, Any] = {}
    options: dict[str, Any] = {}
    notes: list[str] = []
    problems: list[str] = []
    for name, value in given.items():
        if value is False and name.endswith("_strategy"):
            value = "no"  # as YAML 1.1 reads it
        if name in run:
            mine[name] = value
        elif name in OWN:
            own[name] = value
        elif name == "overwrite_output_dir":
            own["overwrite"] = bool(value)
        elif name == "warmup_ratio":
            _warmup(value, given, options, problems)
        elif name == "save_safetensors":
            if not value:
                problems.append("save_safetensors: only safetensors are written; drop it")
        elif name == "resume_from_checkpoint":
            if value not in (None, True, False):
                problems.append("resume_from_checkpoint: the last checkpoint is found by itself; give True or drop it")
            elif value:
                mine["resume"] = True
        elif name == "group_by_length":
            if value:
                options["train_sampling_strategy"] = "group_by_length"
        elif name in OURS:
            if value not in (None, False):
                problems.append(f"{name}: is not an argument here; {OURS[name]}")
        elif name in RENAMED:
            options[RENAMED[name]], fault = _checked(name, value, known[RENAMED[name]])
            problems += [fault] if fault else []
        elif name in known:
            if value is not None:
                options[name], fault = _checked(name, value, known[name])
                problems += [fault] if fault else []
        elif name in DROPPED:
            notes.append(f"{name}: has no effect any more")
        else:
            names = (*run, *OWN, *known, *RENAMED, "warmup_ratio", "overwrite_output_dir")
            hint = did_you_mean(name, names)
            problems.append(f"{name}: unknown argument." + (hint if "Did you mean" in hint else ""))
    return mine, Training(**own, options=options, notes=tuple(notes), problems=tuple(problems))


def _warmup(value: Any, given: Mapping[str, Any], options: dict[str, Any], problems: list[str]) -> None:
    """`warmup_ratio` as the share that `warmup_steps` takes since transformers 5."""
    if value is None or value == 0:
        return
    if given.get("warmup_steps"):
        problems.append("warmup_ratio, warmup_steps: give one of the two")
    elif not _number(value) or not 0 <= value <= 1:
        problems.append(f"warmup_ratio: must be a share from 0 to 1, got {value!r}")
    elif value == 1:
        problems.append("warmup_ratio: 1 would only warm up; give less, such as 0.1")
    else:
        options["warmup_steps"] = float(value)


# numbers that must be positive, and the least value
LEAST = {
    "gradient_accumulation_steps": 1, "learning_rate": 0, "num_train_epochs": 0, "per_device_eval_batch_size": 1,
    "per_device_train_batch_size": 1,
}  # fmt: skip


def _checked(name: str, value: Any, kind: Any) -> tuple[Any, str]:
    """A value for an argument of that type, and what is wrong with it; transformers itself checks few of them."""
    if kind not in (int, float, bool):
        return value, ""
    if isinstance(value, str) and kind is not bool:  # YAML 1.1 reads 1e-4 as text
        try:
            value = float(value)
        except ValueError:
            return value, f"{name}: expected a number, got {value!r}"
    if kind is bool:
        return value, "" if isinstance(value, bool) else f"{name}: expected True or False, got {value!r}"
    if not _number(value) or not math.isfinite(value):
        return value, f"{name}: expected a number, got {value!r}"
    if name == "max_steps" and value < 1 and value != -1:
        return value, f"max_steps: must be at least 1 (or -1, for num_train_epochs), got {value!r}"
    if kind is int and value != int(value):
        return value, f"{name}: expected a whole number, got {value!r}"
    value = int(value) if kind is int else value
    least = LEAST.get(name)
    if least is not None and (value < least or (value == 0 and least == 0)):
        return value, f"{name}: must be {'at least 1' if least else 'more than 0'}, got {value!r}"
    return value, ""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
