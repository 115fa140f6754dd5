"""Configurations that name their recipe and specs by class, as training wizards do, read as bitpress's own keys.

The tables are moved to where bitpress has their keys; the lines of the file stay theirs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from bitpress.configs.check import Checker
from bitpress.errors import did_you_mean

# the recipe that is meant, by the last part of the dotted path, or by its module
RECIPES = ("LLMQuantizationSpec", "quantize_llm")
TRAINING = ("ModularTrainingSpec", "TrainingSpec", "modular")
# what the module's rows are; None: it is no decoder language model
MODULES: dict[str, str | None] = {
    "CausalSeq2SeqModule": "pairs", "InstructionTuningModule": "messages", "WizardModule": "",
    "Seq2SeqModule": "encoder-decoder", "T5PreTrainModule": "encoder-decoder", "T5PretrainModule": "encoder-decoder",
}  # fmt: skip
IDLE = (
    "mask_source_tokens", "eval_sample_size", "peek_rate", "peek_sample_size", "label_smoothing", "assistant_only",
    "spec_class",
)  # fmt: skip
MODEL_IDLE = ("device_map", "use_cache", "low_cpu_mem_usage")
MODEL_REFUSED = {
    "quantization_spec": "bitpress starts from the full-precision model; drop it",
    "bnb_spec": "bitpress starts from the full-precision model; drop it",
    "lora_spec": "merge the adapter into the model and name the merged one",
    "tokenizer_special_tokens": "new tokens need trained embeddings: add them, train, and name the saved model",
}
MODEL_KEYS = {
    "attn_implementation": "attn_implementation", "torch_dtype": "dtype", "dtype": "dtype",
    "trust_remote_code": "trust_remote_code",
}  # fmt: skip
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
CALL = ("max_length", "truncation", "padding")
KEYS = ("recipe_class", "spec_class", "wizard_module", "generation_args")  # that `translate` takes

Moved = dict[tuple[str, ...], tuple[str, ...]]  # see `Document`


def translate(checker: Checker) -> tuple[dict[str, Any], list[str]]:
    """The document's data with bitpress's own keys, and what the user should know; the document learns what moved."""
    data = dict(checker.document.data)
    notes: list[str] = []
    moved = checker.document.moved
    for key in ("recipe_class", "spec_class"):
        if key in data:
            _recipe(checker, key, data.pop(key))
            data.setdefault("smoothing_strength", 0.8)
    if "wizard_module" in data:
        _module(checker, data, data.pop("wizard_module"), moved, notes)
    if "generation_args" in data:
        _move(checker, data, moved, ("generation_args",), data.pop("generation_args"), ("generation",))
    return data, notes


def _recipe(checker: Checker, key: str, name: Any) -> None:
    parts = str(name).split(".")
    if not isinstance(name, str) or not set(parts[-2:]) & {*RECIPES, *TRAINING}:
        hint = did_you_mean(parts[-1], RECIPES[:1])
        checker.fault(
            (key,), f"'{name}' is no recipe that bitpress has.{hint} Or leave it out and give scheme or recipe"
        )
    elif set(parts[-2:]) & set(TRAINING):
        checker.fault(
            (key,),
            f"'{name}' trains; leave it out and give a recipe with a training stage, and its arguments in [training]",
        )


def _module(checker: Checker, data: dict[str, Any], table: Any, moved: Moved, notes: list[str]) -> None:
    at = ("wizard_module",)
    if not isinstance(table, Mapping):
        checker.fault(at, f"expected a table of keys, got {table!r}")
        return
    kind = str(table.get("spec_class", "WizardModule")).rsplit(".", 1)[-1]
    if kind not in MODULES:
        checker.fault((*at, "spec_class"), f"'{table['spec_class']}': no language model.{did_you_mean(kind, MODULES)}")
    elif MODULES[kind] == "encoder-decoder":
        checker.fault((*at, "spec_class"), f"{kind}: an encoder-decoder; bitpress compresses decoder language models")
    own = {"separator_token": ("separator_token",), "add_eos_token": ("add_eos_token",),
           "generation_args": ("generation",)}  # fmt: skip
    for key, value in table.items():
        if key == "transformer_spec":
            _model(checker, data, value, moved, notes)
        elif key in own:
            if isinstance(value, Mapping):
                value = {k: v for k, v in value.items() if k != "spec_class"}
            _move(checker, data, moved, (*at, key), value, own[key])
        elif key not in IDLE:
            checker.fault((*at, key), f"unknown key.{did_you_mean(key, ('transformer_spec', *own, *IDLE))}")
    if idle := [k for k in table if k in IDLE and k != "spec_class"]:
        notes.append(f"{', '.join(idle)}: of training; without effect here")


def _model(checker: Checker, data: dict[str, Any], table: Any, moved: Moved, notes: list[str]) -> None:
    at = ("wizard_module", "transformer_spec")
    if not isinstance(table, Mapping):
        checker.fault(at, f"expected a table of keys, got {table!r}")
        return
    known = (
        "pretrained_name", "from_pretrained_kwargs", "tokenizer_init_kwargs", "tokenizer_call_kwargs",
        "apply_chat_template_kwargs", "disable_tokenizer_parallelism", "device_map",
    )  # fmt: skip
    idle: list[str] = []
    for key, value in table.items():
        here = (*at, key)
        if key in MODEL_REFUSED and value:
            checker.fault(here, MODEL_REFUSED[key])
        elif key == "pretrained_name":
            _move(checker, data, moved, here, value, ("model",))
        elif key == "disable_tokenizer_parallelism":
            if value:
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
        elif key == "apply_chat_template_kwargs":
            _move(checker, data, moved, here, value, ("tokenizer", "chat_template_kwargs"))
        elif key in ("from_pretrained_kwargs", "tokenizer_init_kwargs", "tokenizer_call_kwargs"):
            if not isinstance(value, Mapping):
                checker.fault(here, f"expected a table of keys, got {value!r}")
                continue
            idle += _kwargs(checker, data, moved, here, value)
        elif key == "device_map":
            idle.append(key)
        elif key not in (*known, *MODEL_REFUSED, "spec_class"):
            checker.fault(here, f"unknown key.{did_you_mean(key, (*known, *MODEL_REFUSED))}")
    if idle:
        notes.append(f"{', '.join(idle)}: without effect; the model is streamed block by block and nothing is padded")


def _kwargs(
    checker: Checker, data: dict[str, Any], moved: Moved, at: tuple[str, ...], table: Mapping[str, Any]
) -> list[str]:
    """Arguments of the model's and the tokenizer's classes; returns those without effect."""
    idle = []
    for key, value in table.items():
        here = (*at, key)
        if at[-1] == "tokenizer_init_kwargs":
            own = ("tokenizer", key) if key == "padding_side" else ("tokenizer", "init_kwargs", key)
            _move(checker, data, moved, here, value, own)
        elif at[-1] == "tokenizer_call_kwargs":
            if key not in CALL:
                checker.fault(here, f"unknown key.{did_you_mean(key, CALL)}")
                continue
            _move(checker, data, moved, here, value, ("tokenizer", key))
        elif key in MODEL_KEYS:
            value = SHORT.get(value, value) if key in ("dtype", "torch_dtype") and isinstance(value, str) else value
            _move(checker, data, moved, here, value, (MODEL_KEYS[key],))
        elif key in MODEL_IDLE:
            idle.append(key)
        else:
            checker.fault(here, f"unknown key.{did_you_mean(key, (*MODEL_KEYS, *MODEL_IDLE))}")
    return idle


def _move(
    checker: Checker, data: dict[str, Any], moved: Moved, here: tuple[str, ...], value: Any, to: tuple[str, ...]
) -> None:
    """Put a value where bitpress has its key; a fault if something else is there already."""
    table = data
    for part in to[:-1]:
        inner = table.get(part)
        table[part] = inner = dict(inner) if isinstance(inner, Mapping) else {}
        table = inner
    if to[-1] in table:
        checker.fault(here, f"given twice, also as {'.'.join(to)}")
        return
    table[to[-1]] = value
    moved[to] = here
