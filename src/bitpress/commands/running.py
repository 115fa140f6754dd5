"""What commands that run something share: their options, the recipe that these describe, the table at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, Literal

from bitpress.errors import BitpressError, ConfigError, Faults
from bitpress.options import (
    BatchSize,
    Bits,
    Dataset,
    DatasetConfig,
    Dense,
    Device,
    EffortOption,
    FormatName,
    Fresh,
    GroupSize,
    Ignore,
    MaxMemory,
    MaxSeqLength,
    MethodOption,
    Model,
    ModelDtype,
    NumSamples,
    Pack,
    Propagate,
    RecipeFile,
    Resume,
    Scheme,
    Seed,
    SparsityOption,
    Split,
    StageName,
    TextColumn,
    Trust,
    TrustPickle,
    Verify,
    out,
)
from bitpress.progress import Progress


def run_arguments(
    model: Model,
    scheme: Scheme = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    method: MethodOption = None,
    effort: EffortOption = None,
    sparsity: SparsityOption = None,
    ignore: Ignore = None,
    recipe: RecipeFile = None,
    stage: StageName = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: Split = None,
    text_column: TextColumn = "text",
    num_samples: NumSamples = 512,
    max_seq_length: MaxSeqLength = 2048,
    pack: Pack = True,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    batch_size: BatchSize = None,
    dtype: ModelDtype = None,
    propagate: Propagate = None,
    seed: Seed = 42,
    verify: Verify = True,
    resume: Resume = False,
    fresh: Fresh = False,
    format: FormatName = "compressed-tensors",
    dense: Dense = False,
    trust_remote_code: Trust = False,
    trust_pickle: TrustPickle = False,
) -> dict[str, Any]:
    """The options of a run, for every command that has them, as arguments of `bitpress.oneshot`."""
    if propagate is None and effort is not None:
        propagate = effort != "fast"
    written = written_recipe(scheme, bits, group_size, method, effort, sparsity, ignore, recipe)
    return {
        "model": model, "dataset": dataset, "recipe": written,
        "bits": bits, "splits": split, "dataset_config_name": dataset_config, "text_column": text_column,
        "num_calibration_samples": num_samples, "max_seq_length": max_seq_length, "concatenate_data": pack,
        "stage": stage, "save_compressed": not dense, "format": format, "device": device,
        "max_memory": max_memory, "batch_size": batch_size, "dtype": dtype, "propagate": propagate, "seed": seed,
        "verify": verify, "resume": resume, "fresh": fresh,
        "trust_remote_code_model": trust_remote_code, "trust_remote_code_data": trust_remote_code,
        "trust_pickle": trust_pickle,
    }  # fmt: skip


def with_run_arguments(
    command: Callable[..., None], more: Callable[..., dict[str, Any]] | None = None, without: Collection[str] = ()
) -> Callable[..., None]:
    """The command with the options of `run_arguments` besides its own; it gets what they mean as `arguments`.

    Args:
        more: a function like `run_arguments`, whose options come too; what it returns goes first.
        without: options of `run_arguments` that this command does not have.
    """
    own = {n: p for n, p in signature(command, eval_str=True).parameters.items() if n != "arguments"}
    shared = {n: p for n, p in signature(run_arguments, eval_str=True).parameters.items() if n not in without}
    added = {} if more is None else dict(signature(more, eval_str=True).parameters)

    def whole(**given: Any) -> None:
        mine = {name: given.pop(name) for name in own}
        extra = {} if more is None else more(**{name: given.pop(name) for name in added})
        command(arguments={**run_arguments(**given), **extra}, **mine)

    parameters = {**shared, **added, **own}
    whole.__name__, whole.__doc__ = command.__name__.strip("_"), command.__doc__
    whole.__annotations__ = {name: p.annotation for name, p in parameters.items()}
    ordered = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters.values()]
    whole.__signature__ = Signature(ordered)  # type: ignore[attr-defined]
    return whole


def written_recipe(
    scheme: str | None,
    bits: float | None,
    group_size: int | None,
    method: str | None,
    effort: str | None,
    sparsity: str | None,
    ignore: list[str] | None,
    recipe: str | None,
) -> Any:
    """The recipe that the options describe, or what is wrong with them, to be told with all other faults."""
    from bitpress.effort import asked_for

    try:
        found = asked_for(
            scheme=scheme, bits=bits, group_size=group_size, method=method, effort=effort,
            sparsity=sparsity, ignore=ignore, written=recipe,
            spelled=lambda n: "--" + n.replace("_", "-"),
        )  # fmt: skip
    except ConfigError as error:
        return error
    if recipe is not None and not Path(recipe).is_file():
        return ConfigError(f"--recipe: {recipe}: no such file")
    return found if recipe is None else Path(recipe)


def place(output: Path | None, arguments: Mapping[str, Any], verb: Literal["oneshot", "train", "apply"]) -> Path:
    """Where a run writes; that it was not said is told with all that is wrong besides."""
    if output is not None:
        return output
    from bitpress.apply import RUN
    from bitpress.oneshot import Arguments
    from bitpress.prepare import prepare
    from bitpress.training.arguments import split_options

    first = {name: arguments[name] for name in ("model", "dataset", "recipe", "stage")}
    mine, training = split_options({k: v for k, v in arguments.items() if k not in first}, RUN)
    faults = Faults()
    with faults:
        raise ConfigError("--output: missing; name the folder that the checkpoint goes to")
    with faults:
        nowhere = Path(f"bitpress-plan-{os.getpid()}")
        prepare(Arguments(**first, **mine, training=training, output_dir=nowhere, verb=verb)).subject.close()
    faults.report()
    raise AssertionError


def trains(recipe: Any) -> bool:
    """Whether a recipe that can be read has a stage that trains."""
    from bitpress.recipe import Recipe

    try:
        return any(stage.run_type == "train" for stage in Recipe.load(recipe).stages)
    except BitpressError:  # told when it is planned
        return False


def sample(folder: Path, progress: Progress, arguments: Mapping[str, Any]) -> None:
    """Ask a question before and after, for the report of a run whose user has asked none."""
    from bitpress import ranks, samples

    if not ranks.first():
        return
    trust = {"trust_remote_code": arguments.get("trust_remote_code_model", False)}
    trust["trust_pickle"] = arguments.get("trust_pickle", False)
    if why := samples.add(folder, device=arguments.get("device", "auto"), **trust):
        progress.note(why)


def summary(folder: Path, verbose: bool) -> None:
    """Print what a run has left in its folder."""
    from bitpress import tables
    from bitpress.report import PAGE

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    out.print(tables.report_table(report, None if verbose else 0))
    out.print(f"checkpoint: {folder.resolve()}", highlight=False)
    out.print(f"report: {folder.resolve() / PAGE}", highlight=False)
