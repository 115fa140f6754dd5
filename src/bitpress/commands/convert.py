"""`bitpress convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitpress.options import FORMATS, Fresh, Quiet, Trust, Verbose, Verify, completing, out
from bitpress.progress import choose_progress


def convert(
    source: Annotated[str, typer.Argument(help="A quantized checkpoint: folder or hub id.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Where the converted one goes.", show_default=False)],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="The new format, as in oneshot.",
            show_default=False,
            autocompletion=completing(*FORMATS),
        ),
    ],
    verify: Verify = True,
    fresh: Fresh = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Store a quantized checkpoint in another format, with the codes and scales that it has."""
    from bitpress import tables
    from bitpress.convert import convert as run
    from bitpress.inspection import inspect_checkpoint

    said = choose_progress(not quiet, verbose=verbose)
    run(source, output, format=format, trust_remote_code=trust_remote_code, verify=verify, fresh=fresh, progress=said)
    if not quiet:
        out.print(tables.inspection_table(inspect_checkpoint(output), None if verbose else 0))
