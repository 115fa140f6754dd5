"""`bitpress lm-eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from bitpress.errors import ConfigError
from bitpress.options import Quiet, completing, err

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
Backend = Annotated[str, typer.Option(help="hf (transformers) or vllm.", autocompletion=completing("hf", "vllm"))]
Bos = Annotated[
    bool | None,
    typer.Option("--add-bos-token/--no-add-bos-token", help="Begin-of-text token first. Default: the tokenizer's way."),
]


def lm_eval(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="A model folder or hub id, in any format.", show_default=False)],
    tasks: Annotated[str, typer.Option(help="Tasks of the harness, with commas between.", show_default=False)],
    backend: Backend = "hf",
    model_args: Annotated[str, typer.Option(help="More arguments of the backend, key=value,key=value.")] = "",
    add_bos_token: Bos = None,
    quiet: Quiet = False,
) -> None:
    """Run lm-evaluation-harness on a checkpoint. Other options, such as --include_path DIR, go to it as they are."""
    from bitpress.harness import arguments, run

    pairs = [pair.partition("=") for pair in model_args.split(",") if pair]
    if odd := [key for key, equals, _ in pairs if not equals]:
        raise ConfigError(f"--model-args: expected key=value, got {odd[0]!r}")
    argv = arguments(
        checkpoint, [t for t in tasks.split(",") if t], backend=backend, add_bos_token=add_bos_token,
        model_args={key: value for key, _, value in pairs}, more=context.args,
    )  # fmt: skip
    if not quiet:
        err.print(f"lm-eval {' '.join(argv)}", highlight=False, markup=False)
    run(argv)
