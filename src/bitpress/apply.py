"""`apply`: all stages of a recipe, one-shot and training, a checkpoint after each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.oneshot import Arguments, run
from bitpress.progress import Progress, choose_progress
from bitpress.train import IDLE
from bitpress.train import RUN as OF_TRAINING
from bitpress.training.arguments import split_options

if TYPE_CHECKING:
    from torch import nn

# what `oneshot` takes beside the arguments of both
RUN = (*OF_TRAINING, "scheme", "bits", "group_size", "method", "effort", "sparsity", "ignore", "max_memory",
       "batch_size", "min_expert_tokens", "propagate")  # fmt: skip


def apply(
    model: str | os.PathLike[str] | nn.Module,
    dataset: Any = None,
    recipe: Any = None,
    *,
    output_dir: str | os.PathLike[str],
    stage: str | None = None,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Any:
    """Run a recipe: every stage in order, each from the checkpoint of the one before.

    A stage trains if its `run_type` says so, or if it has a ConstantPruningModifier; others run in one shot. Each
    leaves a complete checkpoint in `<output_dir>/<stage>`; at the end `<output_dir>` itself is that of the last one.
    Killed at any time, the same call goes on in the first unfinished stage, at its first unfinished block or from its
    last training checkpoint.

    Args:
        model: folder, hub id, or a causal language model of transformers in memory, which is changed in place.
        dataset: data for calibration and training alike; `splits` may name one each.
        recipe: see `bitpress.recipe`.
        output_dir: where the checkpoints go.
        stage: run this stage alone; those before it must have run into the same folder. With `fresh` it and those after
            it are made anew, also where only their own arguments have changed: another learning rate, on the same
            pruned model.
        progress: see `bitpress.oneshot`.
        options: arguments of `bitpress.oneshot` and of `bitpress.train`; `distill_teacher="self"` is the model given
            here. `batch_size` is of calibration, `per_device_train_batch_size` of training.

    Returns:
        The module that was passed, or a handle that loads the checkpoint when it is used; with `stage`, the handle.

    Raises:
        RecipeError, ConfigError, PlanError, DataError, CheckpointError: user errors of all stages, before weights are
            loaded.
        NumericsError: as of `bitpress.oneshot` and `bitpress.train`.
    """
    options = {name: value for name, value in options.items() if name not in IDLE}
    if (processor := options.pop("processor", None)) is not None:
        options.setdefault("tokenizer", processor)
    mine, training = split_options(options, RUN)
    return run(
        Arguments(
            model=model, dataset=dataset, recipe=recipe, stage=stage, output_dir=Path(output_dir).expanduser(), **mine,
            verb="apply", training=training, progress=choose_progress(progress),
        )
    )  # fmt: skip


compress = apply
