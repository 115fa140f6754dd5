"""The commands. Only this, `options`, `commands` and `entry`, which calls it, print, and only they exit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from bitpress import __version__
from bitpress.commands.compare import compare
from bitpress.commands.convert import convert
from bitpress.commands.env import env
from bitpress.commands.lm_eval import SETTINGS, lm_eval
from bitpress.commands.report import report
from bitpress.commands.running import place, sample, summary, trains, with_run_arguments, written_recipe
from bitpress.commands.scan import scan
from bitpress.commands.staged import apply, train
from bitpress.entry import main as main
from bitpress.options import (
    Device,
    Fresh,
    Generate,
    Json,
    MaxSeqLength,
    OutputDir,
    Prompts,
    Quiet,
    QuietAtWork,
    Resume,
    RunDtype,
    TokenizerFolder,
    Trust,
    TrustPickle,
    Verbose,
    err,
    out,
    print_json,
)
from bitpress.progress import choose_progress

app = typer.Typer(
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


@app.command()
@with_run_arguments
def oneshot(
    arguments: dict[str, Any],
    output: OutputDir = None,
    prompt: Prompts = None,
    generate: Generate = True,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Compress a model in one shot. Killed and started again with the same arguments, it goes on where it was."""
    from bitpress.oneshot import oneshot as run

    progress = choose_progress(not quiet, verbose=verbose)
    output = place(output, arguments, "oneshot")
    result = run(**arguments, output_dir=output, prompts=prompt or (), progress=progress)
    if generate and not prompt:
        sample(result.folder, progress, arguments)
    if not quiet:
        summary(result.folder, verbose)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="Configuration: .toml, .yaml or .json.", show_default=False)],
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key=value in place of what the file says; repeatable.")
    ] = None,
    resume: Resume = False,
    fresh: Fresh = False,
    generate: Generate = True,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Compress a model as a configuration file says. The same command goes on where a failed or killed one was."""
    from bitpress.configs import run as configured

    shown = choose_progress(not quiet, verbose=verbose)
    result = configured(config, sets or (), resume=resume, fresh=fresh, progress=shown)
    if generate:
        sample(result.folder, shown, {})
    if not quiet:
        summary(result.folder, verbose)


@app.command()
@with_run_arguments
def plan(
    arguments: dict[str, Any],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where it would go (checks the disk).")] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Say what `oneshot`, or `apply` if a stage trains, would do, and every fault, without loading weights."""
    from bitpress import tables
    from bitpress.oneshot import Arguments
    from bitpress.prepare import prepare

    place = output or Path(f"bitpress-plan-{os.getpid()}")
    ready = prepare(
        Arguments(**arguments, output_dir=place, verb="apply" if trains(arguments["recipe"]) else "oneshot")
    )
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
    dtype: RunDtype = "float32",
    tokenizer: TokenizerFolder = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    trust_pickle: TrustPickle = False,
    quiet: QuietAtWork = False,
    as_json: Json = False,
) -> None:
    """Compare a checkpoint with its base: perplexity, token KL, top-1 agreement, size, tokens per second."""
    from bitpress import tables
    from bitpress.evaluate import evaluate as run

    result = run(
        base, checkpoint, text=text, windows=windows, length=length, dtype=dtype, device=device,
        tokenizer=tokenizer, trust_remote_code=trust_remote_code, trust_pickle=trust_pickle,
        on_window=None if quiet else _window,
    )  # fmt: skip
    if as_json:
        print_json(result.to_dict())
    else:
        out.print(tables.evaluation_table(result))


app.command()(compare)
app.command()(env)
app.command()(report)
app.command()(scan)
app.command()(train)
app.command()(apply)
app.command()(convert)
app.command(name="lm-eval", context_settings=SETTINGS)(lm_eval)


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
    num_samples: Annotated[
        int | None, typer.Option(help="Calibration sequences. Default: 64; 16 without a GPU and AVX-512.")
    ] = None,
    max_seq_length: MaxSeqLength = 256,
    fresh: Fresh = False,
    quiet: Quiet = False,
) -> None:
    """Compress the embedded SmolLM2-135M-Instruct to int4 and compare it with the original. Needs no network."""
    from bitpress import tables
    from bitpress.demo_model import obtain
    from bitpress.devices import is_slow
    from bitpress.evaluate import evaluate as run
    from bitpress.oneshot import oneshot as compress
    from bitpress.report import PAGE
    from bitpress.samples import PROMPT

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if num_samples is None:
        num_samples = 16 if is_slow() else 64
    base, target = obtain(output / "SmolLM2-135M-Instruct"), output / "SmolLM2-135M-Instruct-W4A16-G64"
    recipe = written_recipe("W4A16", None, 64, "gptq", None, None, None, None)
    compress(
        base, None, recipe, output_dir=target, num_calibration_samples=num_samples, max_seq_length=max_seq_length,
        prompts=[PROMPT], progress=not quiet, fresh=fresh or (target / "config.json").is_file(),
    )  # fmt: skip
    if quiet:
        return
    out.print("comparing, on a text that was not used for calibration ...")
    out.print(tables.evaluation_table(run(base, target, windows=4, length=1024)))
    for said in json.loads((target / "report.json").read_text(encoding="utf-8"))["generations"]["answers"]:
        out.print(f"\n[bold]{said['prompt']}[/]")
        for name in ("before", "after"):
            out.print(f"[bold]{name}:[/] ", end="")
            out.print(said[name], markup=False, highlight=False)
    out.print(f"\ncheckpoint: {target.resolve()}", highlight=False)
    out.print(f"report: {target.resolve() / PAGE}", highlight=False)


def _window(number: int, total: int) -> None:
    err.print(f"window {number + 1} of {total}", highlight=False)
