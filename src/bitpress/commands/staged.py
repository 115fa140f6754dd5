"""`bitpress train` and `bitpress apply`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
import yaml

from bitpress.commands.running import place, sample, summary, with_run_arguments
from bitpress.options import Generate, OutputDir, Quiet, Verbose
from bitpress.progress import choose_progress


class Precision(StrEnum):
    """Choices of --precision; see `bitpress.train`."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


TrainSplit = Annotated[str | None, typer.Option(help="Split to train on. Default: --split.")]
EvalSplit = Annotated[str | None, typer.Option(help="Split to evaluate on while training.")]
EvalData = Annotated[str | None, typer.Option(help="Data to evaluate on while training, as --dataset.")]
Rows = Annotated[int | None, typer.Option(help="Rows to train on at most.")]
Prompts = Annotated[bool, typer.Option("--mask-prompts/--no-mask-prompts", help="Do not teach prompts.")]
Epochs = Annotated[float, typer.Option(help="Epochs of training.")]
MaxSteps = Annotated[int | None, typer.Option(help="Steps of training, in place of epochs.")]
Rate = Annotated[float, typer.Option(help="Learning rate.")]
TrainBatch = Annotated[int, typer.Option(help="Sequences per forward of training, on each device.")]
Accumulation = Annotated[int, typer.Option(help="Forwards per step of training.")]
PrecisionOption = Annotated[Precision, typer.Option(help="dtype of weights while training.")]
BFloat16 = Annotated[bool, typer.Option("--bf16", help="Train with bfloat16 products.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")]
Teacher = Annotated[
    str | None, typer.Option(help="Model to learn from; 'self' (apply): MODEL as it is before the first stage.")
]
Temperature = Annotated[float, typer.Option(help="Of the teacher's predictions.")]
Hardness = Annotated[float, typer.Option(help="Share of the teacher in the loss; the rest are the labels.")]
Hidden = Annotated[float, typer.Option(help="Weight of the distance to the teacher's hidden states.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE: any argument of transformers' TrainingArguments; repeatable."),
]


def training_arguments(
    split: Annotated[str | None, typer.Option(help="Split, such as 'train[:5%]'.")] = None,
    train_split: TrainSplit = None,
    eval_split: EvalSplit = None,
    eval_dataset: EvalData = None,
    max_train_samples: Rows = None,
    mask_prompts: Prompts = True,
    epochs: Epochs = 3.0,
    max_steps: MaxSteps = None,
    learning_rate: Rate = 5e-5,
    train_batch_size: TrainBatch = 8,
    gradient_accumulation: Accumulation = 1,
    precision: PrecisionOption = Precision.auto,
    bf16: BFloat16 = False,
    gradient_checkpointing: Checkpointing = False,
    distill_teacher: Teacher = None,
    distill_temperature: Temperature = 1.0,
    distill_hardness: Hardness = 1.0,
    distill_hidden: Hidden = 0.0,
    set_: Set = None,
) -> dict[str, Any]:
    """The options of training, as arguments of `bitpress.train`."""
    named = {"calibration": split, "train": train_split or split, "validation": eval_split}
    several = train_split is not None or eval_split is not None
    return {
        "splits": {k: v for k, v in named.items() if v is not None} if several else split,
        "eval_dataset": eval_dataset, "max_train_samples": max_train_samples, "mask_prompts": mask_prompts,
        "num_train_epochs": epochs, "max_steps": max_steps, "learning_rate": learning_rate,
        "per_device_train_batch_size": train_batch_size, "gradient_accumulation_steps": gradient_accumulation,
        "precision": precision.value, "bf16": bf16, "gradient_checkpointing": gradient_checkpointing,
        "distill_teacher": distill_teacher, "distill_temperature": distill_temperature,
        "distill_hardness": distill_hardness, "distill_hidden": distill_hidden, **_set(set_ or []),
    }  # fmt: skip


def _set(pairs: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` as arguments; values are YAML."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{pair!r}: write it as NAME=VALUE", param_hint="--set")
        try:
            found[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[name.strip().replace("-", "_")] = value
    return found


# options of a run that train does not have
NOT_TRAINING = (
    "scheme", "bits", "group_size", "method", "effort", "sparsity", "ignore", "num_samples", "max_memory", "batch_size",
    "propagate",
)  # fmt: skip
NO_ARGUMENTS = ("bits", "max_memory", "batch_size", "num_calibration_samples", "propagate")


def _train(
    arguments: dict[str, Any],
    output: OutputDir = None,
    generate: Generate = True,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Train with a recipe's training stage: zeros kept, rounded while training, or taught by another model.

    Killed and started again with the same arguments, it goes on from its last checkpoint. Under `accelerate launch -m
    bitpress train` it runs on several devices.
    """
    from bitpress.train import train as run

    given = {name: value for name, value in arguments.items() if name not in NO_ARGUMENTS}
    output = place(output, given, "train")
    progress = choose_progress(not quiet, verbose=verbose)
    result = run(**given, output_dir=output, progress=progress)
    if generate:
        sample(result.folder, progress, arguments)
    if not quiet:
        summary(result.folder, verbose)


def _apply(
    arguments: dict[str, Any],
    output: OutputDir = None,
    generate: Generate = True,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Run all stages of a recipe, one-shot and training, with a checkpoint of each in OUTPUT/STAGE.

    Killed and started again with the same arguments, it goes on where it was.
    """
    from bitpress.apply import apply as run

    output = place(output, arguments, "apply")
    progress = choose_progress(not quiet, verbose=verbose)
    result = run(**arguments, output_dir=output, progress=progress)
    if generate:
        sample(result.folder, progress, arguments)
    if not quiet:
        summary(result.folder, verbose)


train = with_run_arguments(_train, training_arguments, (*NOT_TRAINING, "split"))
apply = with_run_arguments(_apply, training_arguments, ("split",))
