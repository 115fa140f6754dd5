"""The commands. Only this, `options`, `commands` and `entry`, which calls it, print, and only they exit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from bitpress import __version__
from bitpress.commands.compare import compare
from bitpress.commands.env import env
from bitpress.entry import main as main
from bitpress.errors import ConfigError
from bitpress.options import (
    BatchSize,
    Bits,
    Dataset,
    DatasetConfig,
    Dense,
    Device,
    DeviceOption,
    EffortChoice,
    EffortOption,
    Fresh,
    GroupSize,
    Ignore,
    Json,
    MaxMemory,
    MaxSeqLength,
    Method,
    MethodOption,
    Model,
    NumSamples,
    OutputDir,
    Pack,
    Quiet,
    RecipeFile,
    Resume,
    Scheme,
    Seed,
    Split,
    StageName,
    TextColumn,
    Trust,
    TrustPickle,
    Verbose,
    Verify,
    err,
    out,
    print_json,
)
from bitpress.progress import choose_progress

app = typer.Typer(
    help="Compress language models for vLLM and transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"bitpress {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compress language models for vLLM and transformers.

    Exit codes: 0 done; 1 a fault of input, data or the machine; 2 wrong usage; 3 a fault that was not foreseen; 130
    interrupted; 143 terminated. The same command goes on where an unfinished run was. NO_COLOR=1 turns colours off.
    """


def run_arguments(
    model: Model,
    scheme: Scheme = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    method: MethodOption = None,
    effort: EffortChoice = None,
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
    device: DeviceOption = Device.auto,
    max_memory: MaxMemory = None,
    batch_size: BatchSize = None,
    seed: Seed = 42,
    verify: Verify = True,
    resume: Resume = False,
    fresh: Fresh = False,
    dense: Dense = False,
    trust_remote_code: Trust = False,
    trust_pickle: TrustPickle = False,
) -> dict[str, Any]:
    """The options of a run, for every command that has them, as arguments of `bitpress.oneshot`."""
    return {
        "model": model, "dataset": dataset, "recipe": _recipe(scheme, bits, group_size, method, effort, ignore, recipe),
        "bits": bits, "splits": split, "dataset_config_name": dataset_config, "text_column": text_column,
        "num_calibration_samples": num_samples, "max_seq_length": max_seq_length, "concatenate_data": pack,
        "stage": stage, "save_compressed": not dense, "device": device.value, "max_memory": max_memory,
        "batch_size": batch_size, "seed": seed, "verify": verify, "resume": resume, "fresh": fresh,
        "trust_remote_code_model": trust_remote_code, "trust_remote_code_data": trust_remote_code,
        "trust_pickle": trust_pickle,
    }  # fmt: skip


def _with_run_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `run_arguments` besides its own; it gets what they mean as `arguments`."""
    own = {n: p for n, p in signature(command, eval_str=True).parameters.items() if n != "arguments"}
    shared = signature(run_arguments, eval_str=True).parameters

    def whole(**given: Any) -> None:
        mine = {name: given.pop(name) for name in own}
        command(arguments=run_arguments(**given), **mine)

    parameters = {**shared, **own}
    whole.__name__, whole.__doc__ = command.__name__, command.__doc__
    whole.__annotations__ = {name: p.annotation for name, p in parameters.items()}
    ordered = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters.values()]
    whole.__signature__ = Signature(ordered)  # type: ignore[attr-defined]
    return whole


@app.command()
@_with_run_arguments
def oneshot(
    arguments: dict[str, Any],
    output: OutputDir,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Compress a model in one shot. Killed and started again with the same arguments, it goes on where it was."""
    from bitpress.oneshot import oneshot as run

    result = run(**arguments, output_dir=output, progress=choose_progress(not quiet, verbose=verbose))
    if not quiet:
        _summary(result.folder, verbose)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="Configuration: .toml, .yaml or .json.", show_default=False)],
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key=value in place of what the file says; repeatable.")
    ] = None,
    resume: Resume = False,
    fresh: Fresh = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Compress a model as a configuration file says. The same command goes on where a failed or killed one was."""
    from bitpress.configs import run as configured

    shown = choose_progress(not quiet, verbose=verbose)
    result = configured(config, sets or (), resume=resume, fresh=fresh, progress=shown)
    if not quiet:
        _summary(result.folder, verbose)


@app.command()
@_with_run_arguments
def plan(
    arguments: dict[str, Any],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where it would go (checks the disk).")] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Say what `oneshot` with these arguments would do, and every fault, without loading weights."""
    from bitpress import tables
    from bitpress.oneshot import Arguments
    from bitpress.prepare import prepare

    ready = prepare(Arguments(**arguments, output_dir=output or Path(f"bitpress-plan-{os.getpid()}")))
    if as_json:
        print_json({**ready.plan.to_dict(), "data": ready.data.summary if ready.data else None})
    elif not quiet:
        notes = (*ready.plan.notes, *(ready.data.notes if ready.data else ()))
        out.print(tables.plan_table(ready.plan, None if verbose else 12))
        for note in notes:
            out.print(f"note: {note}", highlight=False, markup=False)


@app.command(name="eval")
def evaluate(
    base: Annotated[str, typer.Argument(help="The full-precision model.")],
    checkpoint: Annotated[str, typer.Argument(help="The compressed one.")],
    text: Annotated[Path | None, typer.Option(help="Text file to judge on. Default: a built-in text.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of text.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: DeviceOption = Device.auto,
    trust_remote_code: Trust = False,
    trust_pickle: TrustPickle = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing while at work.")] = False,
    as_json: Json = False,
) -> None:
    """Compare a checkpoint with its base: perplexity, token KL, top-1 agreement, size, tokens per second."""
    from bitpress import tables
    from bitpress.evaluate import evaluate as run

    result = run(
        base, checkpoint, text=text, windows=windows, length=length, dtype=dtype, device=device.value,
        trust_remote_code=trust_remote_code, trust_pickle=trust_pickle, on_window=None if quiet else _window,
    )  # fmt: skip
    if as_json:
        print_json(result.to_dict())
    else:
        out.print(tables.evaluation_table(result))


app.command()(compare)
app.command()(env)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A model folder, or a GGUF file.")],
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Say what a checkpoint is: method, scheme per layer, sizes, bits per weight."""
    from bitpress import tables
    from bitpress.inspection import inspect_checkpoint

    found = inspect_checkpoint(path)
    if as_json:
        print_json(found.to_dict())
    else:
        out.print(tables.inspection_table(found, None if verbose else 0))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the demo's files go.")] = Path("runs/demo"),
    num_samples: NumSamples = 64,
    max_seq_length: MaxSeqLength = 256,
) -> None:
    """Compress the embedded SmolLM2-135M-Instruct to int4 and compare it with the original. Needs no network."""
    from bitpress import tables
    from bitpress.demo_model import obtain
    from bitpress.evaluate import evaluate as run
    from bitpress.evaluate import generate
    from bitpress.oneshot import oneshot as compress

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    base, target = obtain(output / "SmolLM2-135M-Instruct"), output / "SmolLM2-135M-Instruct-W4A16-G64"
    recipe = _recipe("W4A16", None, 64, Method.gptq, None, None, None)
    compress(
        base, None, recipe, output_dir=target, num_calibration_samples=num_samples, max_seq_length=max_seq_length,
        progress=True, fresh=True,
    )  # fmt: skip
    out.print("comparing, on a text that was not used for calibration ...")
    out.print(tables.evaluation_table(run(base, target, windows=4, length=1024)))
    prompt = "What is the capital of France, and what is it known for?"
    out.print(f"\n[bold]{prompt}[/]")
    for name, folder in (("before", base), ("after", target)):
        out.print(f"[bold]{name}:[/] ", end="")
        out.print(generate(folder, prompt, 60), markup=False, highlight=False)
    out.print(f"\ncheckpoint: {target.resolve()}", highlight=False)


def _recipe(
    scheme: str | None,
    bits: float | None,
    group_size: int | None,
    method: Method | None,
    effort: EffortOption | None,
    ignore: list[str] | None,
    recipe: str | None,
) -> Any:
    """The recipe that the options describe, or what is wrong with them, to be told with all other faults."""
    from bitpress.effort import asked_for

    try:
        found = asked_for(
            scheme=scheme, bits=bits, group_size=group_size, method=method and method.value,
            effort=effort and effort.value, ignore=ignore, written=recipe,
            spelled=lambda n: "--" + n.replace("_", "-"),
        )  # fmt: skip
    except ConfigError as error:
        return error
    if recipe is not None and not Path(recipe).is_file():
        return ConfigError(f"--recipe: {recipe}: no such file")
    return found if recipe is None else Path(recipe)


def _window(number: int, total: int) -> None:
    err.print(f"window {number + 1} of {total}", highlight=False)


def _summary(folder: Path, verbose: bool) -> None:
    from bitpress import tables

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    out.print(tables.report_table(report, None if verbose else 0))
    out.print(f"checkpoint: {folder.resolve()}", highlight=False)
