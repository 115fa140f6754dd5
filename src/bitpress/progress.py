"""What a run says while it works: nothing, plain lines, or one live display."""

from __future__ import annotations

import time
from typing import Any

from bitpress.errors import ConfigError


class Progress:
    """Says nothing. The others override `begin`, `at`, `note`, `end`."""

    def begin(self, stage: str, total: int, unit: str = "block") -> None:
        """A stage of `total` blocks, or of steps of training, starts."""

    def at(self, block: int, doing: str, share: float = 0.0) -> None:
        """Block number `block` (from 0) is at work; `share` of it is done."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def end(self, complete: bool) -> None:
        """The stage is over, complete or broken off."""


class Lines(Progress):
    """A line a block, for logs and pipes. `verbose`: a line a phase."""

    def __init__(self, console: Any, verbose: bool = False) -> None:
        self.console, self.verbose = console, verbose
        self._last: tuple[int, str] = (-1, "")

    def begin(self, stage: str, total: int, unit: str = "block") -> None:
        self.stage, self.total, self.unit, self.start = stage, total, unit, time.monotonic()
        self._last = (-1, "")
        self.first = -1  # a resumed run starts in the middle

    def at(self, block: int, doing: str, share: float = 0.0) -> None:
        if self.first < 0:
            self.first = block
        new = block != self._last[0]
        if not self.verbose and (not new or doing == "loading"):
            return
        if not new and doing == self._last[1]:
            return
        self._last = (block, doing)
        spent, done = time.monotonic() - self.start, block - self.first
        eta = f", ETA {clock(spent / done * (self.total - block))}" if done else ""
        self.console.print(
            f"{self.stage}: {place(block, self.total, self.unit)}: {doing}{eta}", highlight=False, markup=False
        )

    def note(self, text: str) -> None:
        self.console.print(f"note: {text}", highlight=False, markup=False)


class Live(Progress):
    """One display that is redrawn: stage, bar, block i of n, what is happening, time left."""

    def __init__(self, console: Any) -> None:
        from rich import progress

        self.bars = progress.Progress(
            progress.TextColumn("{task.description}", style="bold", markup=False),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[at]}", markup=False),
            progress.TextColumn("{task.fields[doing]}", markup=False),
            progress.TimeElapsedColumn(),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(),
            console=console,
        )

    def begin(self, stage: str, total: int, unit: str = "block") -> None:
        self.unit = unit
        self.task = self.bars.add_task(stage, total=total, at="", doing="")
        self.bars.start()

    def at(self, block: int, doing: str, share: float = 0.0) -> None:
        at = place(block, self.bars.tasks[-1].total, self.unit)
        self.bars.update(self.task, completed=block + share, at=at, doing=doing)

    def note(self, text: str) -> None:
        self.bars.console.print(f"note: {text}", highlight=False, markup=False)

    def end(self, complete: bool) -> None:
        if complete:
            self.bars.update(self.task, completed=self.bars.tasks[-1].total, doing="done")
        self.bars.stop()


def choose_progress(wanted: Progress | bool | None, *, verbose: bool = False) -> Progress:
    """The display that is meant: None is live on a terminal and silent elsewhere; True says lines elsewhere.

    Args:
        verbose: lines, one a phase, also on a terminal.
    """
    if isinstance(wanted, Progress):
        return wanted
    if wanted not in (True, False, None):
        raise ConfigError(f"progress: expected True, False, None or a bitpress.progress.Progress, got {wanted!r}")
    if wanted is False:
        return Progress()
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    if console.is_terminal and not verbose:
        return Live(console)
    return Lines(console, verbose) if wanted else Progress()


def place(block: int, total: float | None, unit: str = "block") -> str:
    """Where a run is: `block 3 of 30`; after the last block, what is outside them."""
    return f"{unit} {block + 1} of {total:.0f}" if block < (total or 0) else "embeddings and head"


def clock(seconds: float) -> str:
    """Seconds for people: `42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
