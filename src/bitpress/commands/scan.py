"""`bitpress scan`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bitpress.options import (
    BatchSize,
    Dataset,
    DatasetConfig,
    Device,
    Fresh,
    GroupSize,
    Json,
    MaxMemory,
    MaxSeqLength,
    Model,
    NumSamples,
    Pack,
    QuietAtWork,
    Seed,
    Split,
    TextColumn,
    Trust,
    TrustPickle,
    Verbose,
    out,
    print_json,
)
from bitpress.progress import choose_progress


class MeasureOption(StrEnum):
    """Choices of --measure; see `bitpress.scan`."""

    kl = "kl"
    gram = "gram"


def scan(
    model: Model,
    measure: Annotated[
        MeasureOption, typer.Option(help="kl: of the next token; gram: of each layer's output, much quicker.")
    ] = MeasureOption.kl,
    bits: Annotated[float | None, typer.Option(help="Suggest a recipe: stored bits per weight, at most.")] = None,
    size: Annotated[str | None, typer.Option(help="Suggest a recipe: the checkpoint's size, such as 90MB.")] = None,
    error: Annotated[float | None, typer.Option(help="Suggest a recipe: predicted error, at most.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="For scan.html, scan.json, recipe.yaml.")
    ] = None,
    group_size: GroupSize = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Linears to leave; repeatable. Default: lm_head.")] = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: Split = None,
    text_column: TextColumn = "text",
    num_samples: NumSamples = 32,
    max_seq_length: MaxSeqLength = 512,
    pack: Pack = True,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    batch_size: BatchSize = None,
    seed: Seed = 42,
    fresh: Fresh = False,
    trust_remote_code: Trust = False,
    trust_pickle: TrustPickle = False,
    verbose: Verbose = False,
    quiet: QuietAtWork = False,
    as_json: Json = False,
) -> None:
    """Measure how sensitive each layer is, draw size against error, and suggest a recipe for a size or an error."""
    from bitpress import tables
    from bitpress.again import command
    from bitpress.oneshot import Arguments
    from bitpress.scan import PAGE
    from bitpress.scan import scan as run

    given: dict[str, Any] = {
        "model": model, "dataset": dataset, "splits": split, "dataset_config_name": dataset_config,
        "text_column": text_column, "num_calibration_samples": num_samples, "max_seq_length": max_seq_length,
        "concatenate_data": pack, "device": device, "max_memory": max_memory, "batch_size": batch_size, "seed": seed,
        "trust_remote_code_model": trust_remote_code, "trust_remote_code_data": trust_remote_code,
        "trust_pickle": trust_pickle,
    }  # fmt: skip
    found = run(
        **given, measure=measure.value, bits=bits, size=size, error=error, group_size=group_size,
        ignore=ignore or "lm_head", output_dir=output, fresh=fresh,
        progress=choose_progress(not quiet, verbose=verbose),
    )  # fmt: skip
    if as_json:
        print_json(found.to_dict())
        return
    out.print(tables.scan_table(found, whole=verbose))
    if output is not None:
        out.print(f"page: {(output / PAGE).resolve()}", highlight=False)
    if found.suggestion is not None:
        if output is None:
            out.print(found.suggestion.recipe, markup=False, highlight=False)
        else:
            line = command(Arguments(**given, recipe=None), (output / "recipe.yaml").resolve(), "OUT")
            out.print(line, highlight=False, markup=False)
