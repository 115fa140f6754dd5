"""`bitpress compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitpress.options import (
    Device,
    Json,
    PromptFile,
    Prompts,
    QuietAtWork,
    RunDtype,
    TokenizerFolder,
    Trust,
    TrustPickle,
    err,
    out,
    print_json,
    read_prompts,
)

MaxNewTokens = Annotated[int, typer.Option(help="Tokens of an answer, at most.")]


def compare(
    base: Annotated[str, typer.Argument(help="The full-precision model.", show_default=False)],
    checkpoints: Annotated[list[str], typer.Argument(help="What was made of it, in any format.", show_default=False)],
    prompt: Prompts = None,
    prompts: PromptFile = None,
    max_new_tokens: MaxNewTokens = 64,
    text: Annotated[Path | None, typer.Option(help="Text file to judge on. Default: a built-in text.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of text.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    dtype: RunDtype = "float32",
    tokenizer: TokenizerFolder = None,
    device: Device = "auto",
    html: Annotated[Path | None, typer.Option(help="Also write a page to this file.")] = None,
    trust_remote_code: Trust = False,
    trust_pickle: TrustPickle = False,
    quiet: QuietAtWork = False,
    as_json: Json = False,
) -> None:
    """Hold several checkpoints against their base: size, load time, tokens/s, perplexity, KL, top-1, generations."""
    from bitpress import tables
    from bitpress.compare import compare as run

    result = run(
        base, *checkpoints, prompts=[*(prompt or ()), *read_prompts(prompts)], max_new_tokens=max_new_tokens,
        text=text, windows=windows, length=length, dtype=dtype, device=device, tokenizer=tokenizer,
        trust_remote_code=trust_remote_code, trust_pickle=trust_pickle, html=html,
        on_step=None if quiet else lambda step: err.print(step, highlight=False, markup=False),
    )  # fmt: skip
    if as_json:
        print_json(result.to_dict())
    else:
        out.print(tables.comparison_table(result))
        if html is not None:
            out.print(f"page: {html.resolve()}", highlight=False)
    if result.failed:
        raise typer.Exit(1)
