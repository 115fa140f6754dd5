"""`bitpress report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitpress.errors import ConfigError
from bitpress.options import Device, PromptFile, Prompts, Quiet, Trust, TrustPickle, out, read_prompts


def report(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Output of a finished run.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The model that it was made from. Default: as reported.")] = None,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    trust_pickle: TrustPickle = False,
    quiet: Quiet = False,
) -> None:
    """Write report.html of a run anew; with --prompt also what the model answers before and after."""
    from bitpress import samples
    from bitpress.report import PAGE, write_report

    asked = [*(prompt or ()), *read_prompts(prompts)]
    if base is not None and not asked:
        raise ConfigError("--base: goes with --prompt; say what to ask")
    held = samples.read(folder)
    if not asked:
        write_report(folder, held, samples.recipe_of(folder))
    else:
        why = samples.add(
            folder, base, asked, device=device, trust_remote_code=trust_remote_code, trust_pickle=trust_pickle
        )
        if why:
            raise ConfigError(why)
    if not quiet:
        out.print(f"page: {(folder / PAGE).resolve()}", highlight=False)
