"""Runs the code of a documentation page: its ```bash and ```python blocks, in order, in one folder.

```console blocks are only shown.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from bitpress.cli import app


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(page: Path, files: tuple[str, ...] = ()) -> int:
    """Run a page in the current folder; returns how many commands and blocks of Python there were.

    Args:
        files: of yaml blocks, in order, the names of the files that the page says they go to.
    """
    names, count, scope = iter(files), 0, {"__name__": "docs"}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), scope)
            count += 1
        elif language == "yaml":
            Path(next(names)).write_text(text)
        elif language == "bash":
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                if not words:
                    continue
                assert words[0] == "bitpress", f"{page.name}: {line}: only bitpress runs here; show others as console"
                done = CliRunner().invoke(app, words[1:])
                assert done.exit_code == 0, f"{page.name}: {line}\n{done.output}\n{done.exception!r}"
                count += 1
    return count
