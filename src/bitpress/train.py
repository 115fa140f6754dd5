"""`train`: one training stage: fine-tune with zeros kept, with the rounding of a scheme, with a teacher, or plainly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bitpress.oneshot import Arguments, run
from bitpress.progress import Progress, choose_progress
from bitpress.training.arguments import split_options

if TYPE_CHECKING:
    from torch import nn

# arguments of a run that training has no use for are not among these
RUN = (
    "tokenizer", "splits", "dataset_config_name", "dataset_path", "text_column", "num_calibration_samples",
    "max_seq_length", "shuffle_calibration_samples", "concatenate_data", "separator", "preprocessing_func",
    "preprocessing_num_workers", "streaming", "save_compressed", "format", "device", "seed", "verify", "resume",
    "fresh", "dtype", "attn_implementation", "trust_remote_code_model", "trust_remote_code_data", "trust_pickle",
)  # fmt: skip
IDLE = ("pad_to_max_length",)  # accepted as `oneshot` accepts it


def train(
    model: str | os.PathLike[str] | nn.Module,
    dataset: Any = None,
    recipe: Any = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    stage: str | None = None,
    splits: str | Sequence[str] | Mapping[str, str] | None = None,
    eval_dataset: Any = None,
    max_train_samples: int | None = None,
    mask_prompts: bool = True,
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    distill_teacher: str | os.PathLike[str] | nn.Module | None = None,
    distill_temperature: float = 1.0,
    distill_hardness: float = 1.0,
    distill_hidden: float = 0.0,
    callbacks: Sequence[Any] = (),
    progress: Progress | bool | None = None,
    **options: Any,
) -> Any:
    """Train a model with a recipe's training stage, on transformers' Trainer.

    Killed at any time, the same call goes on from the last checkpoint in the output folder and ends with the same
    bits. Memory: weights, gradients and Adam's moments (16 bytes a weight in float32), activations, a byte for each
    weight whose zeros are kept (five in matrices of up to two million); the data stay on disk.

    Args:
        model: folder, hub id, or a causal language model of transformers in memory, which is changed in place.
        dataset: training data, in any form that `bitpress.oneshot` takes for calibration. Prompts are not taught: of
            a conversation the assistant's turns are, of `prompt` and `response` the response.
        recipe: see `bitpress.recipe`; its training stage may have a ConstantPruningModifier, which keeps zeros, and a
            QuantizationModifier, which rounds weights and inputs while training. None: plain fine-tuning.
        output_dir: where the checkpoint goes; with `stage`, to `<output_dir>/<stage>`. The trainer's checkpoints are
            beside it. None: the model in memory is all there is.
        stage: the stage of the recipe; needed where it has several.
        splits: {"train": ..., "validation": ...}, or what is trained on: "train[:5%]".
        eval_dataset: data to evaluate on while training, in any form; also the split "validation", "eval" or "test".
            Loss and perplexity are logged. How often: eval_strategy, eval_steps; default: after every epoch.
        max_train_samples: rows to read at most.
        mask_prompts: False teaches prompts too.
        precision: dtype of the weights while training. "auto": float32 where that takes at most half of the free
            memory, else the model's own. The checkpoint has the model's own.
        distill_teacher: model whose predictions are learnt, most often the one before pruning: folder, hub id, module.
        distill_temperature, distill_hardness, distill_hidden: (1 - hardness) cross entropy + hardness T^2 KL(teacher
            || student) (Hinton et al. 2015, arXiv 1503.02531) + hidden times the distance of the blocks' outputs
            (Kurtic et al. 2023, arXiv 2310.06927).
        callbacks: more callbacks of transformers' Trainer.
        progress: see `bitpress.oneshot`.
        options: all arguments of `transformers.TrainingArguments` (num_train_epochs, learning_rate, bf16,
            gradient_checkpointing, save_steps, fsdp, deepspeed, ...), and older names of them (warmup_ratio,
            overwrite_output_dir, save_safetensors, ...); and those of `bitpress.oneshot` about data and running:
            tokenizer, dataset_config_name, dataset_path, text_column, max_seq_length, concatenate_data (pack),
            separator, preprocessing_func, preprocessing_num_workers, streaming, save_compressed, format,
            dtype, attn_implementation, device, seed, verify, resume, fresh, trust_remote_code_model,
            trust_remote_code_data, trust_pickle.

    Returns:
        As `bitpress.oneshot`: the module that was passed, or a handle that loads the checkpoint when it is used.

    Raises:
        RecipeError, ConfigError, PlanError, DataError, CheckpointError: user errors, before weights are loaded; that a
            weight has no zeros to keep, after.
        NumericsError: a zero came back.
    """
    own = {
        "eval_dataset": eval_dataset, "max_train_samples": max_train_samples, "mask_prompts": mask_prompts,
        "precision": precision, "distill_teacher": distill_teacher, "distill_temperature": distill_temperature,
        "distill_hardness": distill_hardness, "distill_hidden": distill_hidden, "callbacks": tuple(callbacks),
    }  # fmt: skip
    options = {name: value for name, value in options.items() if name not in IDLE}
    if (processor := options.pop("processor", None)) is not None:
        options.setdefault("tokenizer", processor)
    mine, training = split_options({**options, **own, "splits": splits}, RUN)
    return run(
        Arguments(
            model=model, dataset=dataset, recipe=recipe, stage=stage,
            output_dir=None if output_dir is None else Path(output_dir).expanduser(), **mine, verb="train",
            training=training, progress=choose_progress(progress),
        )
    )  # fmt: skip
