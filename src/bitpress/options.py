"""Options that several commands of the command line share, and where commands print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bitpress.errors import DataError

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def print_json(value: Any) -> None:
    """To stdout, for programs."""
    if not out.quiet:
        typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


# names that the shell completes, said here once more: the tables of their rooms take seconds to import
FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "awq", "bitsandbytes", "dense", "gguf", "sparse-24")
DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("gptq", "rtn")
EFFORTS = ("fast", "balanced", "best")


def completing(*names: str) -> Callable[[str], list[str]]:
    """For the shell: those of the names that begin as what is typed."""

    def complete(begun: str) -> list[str]:
        return [name for name in names if name.startswith(begun)]

    return complete


def complete_scheme(begun: str) -> list[str]:
    """For the shell: schemes that begin so."""
    from bitpress.schemes import BLOCKWISE, PRESETS

    return completing(*PRESETS, *map(str.upper, BLOCKWISE))(begun)


Model = Annotated[str, typer.Argument(help="Model folder or hub id.", show_default=False)]
Scheme = Annotated[
    str | None,
    typer.Option(help="Preset such as W4A16, W8A16, W4A16_ASYM, W8A8.", autocompletion=complete_scheme),
]
Bits = Annotated[
    float | None,
    typer.Option(help="Size target: stored bits per weight on average, such as 4.25; chooses each linear's scheme."),
]
GroupSize = Annotated[int | None, typer.Option(help="Input columns per scale; -1: one scale per row.")]
MethodOption = Annotated[
    str | None,
    typer.Option(help="gptq (default) or rtn, with --scheme or --bits.", autocompletion=completing(*METHODS)),
]
EffortOption = Annotated[
    str | None,
    typer.Option(
        help="With --scheme, --bits or --sparsity: fast; balanced, no gradients; best, with block tuning.",
        autocompletion=completing(*EFFORTS),
    ),
]
SparsityOption = Annotated[
    str | None, typer.Option(help="2:4, another N:M or a share of zeros: SparseGPT prunes, before any quantizer.")
]
Ignore = Annotated[
    list[str] | None, typer.Option(help="Linears to leave; repeatable. Default without --recipe: lm_head.")
]
RecipeFile = Annotated[str | None, typer.Option(help="Recipe file (YAML or JSON), instead of --scheme.")]
StageName = Annotated[str | None, typer.Option(help="Run this stage of the recipe alone, into OUTPUT/STAGE.")]
Dataset = Annotated[str | None, typer.Option(help="Registered name, hub id, file or folder. Default: a built-in text.")]
DatasetConfig = Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")]
Split = Annotated[str | None, typer.Option(help="Split, such as 'train[:5%]'.")]
TextColumn = Annotated[str, typer.Option(help="Column that holds the text.")]
NumSamples = Annotated[int, typer.Option(help="Calibration sequences.")]
MaxSeqLength = Annotated[int, typer.Option(help="Tokens per sequence.")]
Pack = Annotated[bool, typer.Option("--pack/--no-pack", help="Join texts into full sequences, or one text each.")]
OutputDir = Annotated[
    Path | None, typer.Option("--output", "-o", help="Where the checkpoint goes; needed.", show_default=False)
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: auto, cpu, cuda or cuda:N.",
        autocompletion=completing("auto", "cpu", "cuda", "cuda:0"),
    ),
]
MaxMemory = Annotated[str | None, typer.Option(help="Memory limit of the device, such as 8GiB.")]
BatchSize = Annotated[int | None, typer.Option(help="Sequences per forward. Default: by memory.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
FormatName = Annotated[
    str,
    typer.Option(
        "--format",
        help="How to store it: compressed-tensors, gptq, awq, dense, ... (see README).",
        autocompletion=completing(*FORMATS),
    ),
]
Dense = Annotated[bool, typer.Option("--dense", help="Store dense weights beside their scales, not packed.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model or dataset brings.")]
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help="Read pickle weights; they can run code.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Read back and compare what is written.")]
ModelDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="bfloat16, float16 or float32: what the model's weights are turned into first.",
        autocompletion=completing(*DTYPES),
    ),
]
RunDtype = Annotated[
    str,
    typer.Option("--dtype", help="float32, bfloat16, float16 or auto.", autocompletion=completing("auto", *DTYPES)),
]
Propagate = Annotated[
    bool | None,
    typer.Option(
        "--propagate/--no-propagate",
        help="Calibrate each block on what the compressed ones before it give; the default but with --effort fast.",
        show_default=False,
    ),
]
TokenizerFolder = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder or hub id of a tokenizer for all. Default: the base's.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Fail if there is nothing to go on from.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run left in OUTPUT.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
QuietAtWork = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing while at work.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="Prompt that each answers; repeatable.")]
Generate = Annotated[bool, typer.Option(help="Answer a prompt before and after, for the report, where memory allows.")]
PromptFile = Annotated[Path | None, typer.Option("--prompts", help="Text file with a prompt a line.")]


def read_prompts(file: Path | None) -> list[str]:
    """A prompt from every line that is not empty; DataError if there is none."""
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"--prompts: {file}: cannot be read ({error}); give a text file with a prompt a line") from None
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise DataError(f"--prompts: {file}: holds no prompt; write one a line")
    return found
