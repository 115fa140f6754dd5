"""Everything that bitpress raises on purpose.

BitpressError
 +- ConfigError      an argument or a configuration key is wrong
 +- RecipeError      a recipe cannot be read or names something unknown
 +- PlanError        recipe, model and arguments do not fit together (found before any weight is loaded)
 +- DataError        calibration data is missing, empty or of the wrong shape
 +- CheckpointError  a model folder cannot be read, or what was written does not read back
 +- NumericsError    NaN, infinity or a matrix that is not positive definite
 +- RankError        another process of the same run has ended

Each message says what is wrong, where, and what to do about it. An error may carry several problems: they are
listed one a line, so that one run shows every fault.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class BitpressError(Exception):
    """Base of all errors that a user can cause and mend.

    Args:
        problems: one message, or a sequence of messages that are reported together.

    Attributes:
        agreed: every process of the run raises it, so that one of them is enough to say it.
    """

    agreed = False

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems\n" + "\n".join(f"  {p}" for p in self.problems)


class ConfigError(BitpressError):
    """An argument or a configuration key is wrong."""


class RecipeError(BitpressError):
    """A recipe cannot be read, or names a modifier, key, stage or scheme that does not exist."""


class PlanError(BitpressError):
    """Recipe, model and arguments do not fit together; nothing has been loaded or written."""


class DataError(BitpressError):
    """Calibration data is missing, empty, or lacks what is needed."""


class CheckpointError(BitpressError):
    """A model folder cannot be read, or what was written does not read back as it was solved."""


class NumericsError(BitpressError):
    """NaN or infinity in weights or activations, or a Gram matrix that is not positive definite."""


class Faults:
    """Collects user errors, each `with` block at most one, so that the rest of the checks goes on."""

    def __init__(self) -> None:
        self.errors: list[BitpressError] = []

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, BitpressError):
            self.errors.append(error)
            return True
        return False

    def report(self) -> None:
        """Raise what was collected as one error: of their own type if all are of one, else a PlanError."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            kinds = {type(e) for e in self.errors}
            kind = kinds.pop() if len(kinds) == 1 else PlanError
            raise kind(list(dict.fromkeys(p for e in self.errors for p in e.problems)))


class RankError(BitpressError):
    """Another process of the same run has ended or does not answer; the run can be started again and goes on."""


def counted(number: int, noun: str) -> str:
    """A number with what is counted, in one or in many: `1 window`, `2,000 windows`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def sized(count: float) -> str:
    """Bytes for people: `93.4 MB`, `1.5 kB`."""
    if 0 < count < 999_950:
        return f"{count / 1e3:,.1f} kB"
    return f"{count / 1e6:,.1f} MB" if count < 1e10 else f"{count / 1e9:,.1f} GB"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: `" Did you mean 'W4A16'?"`, else the list of known names."""
    names = sorted(known)
    lowered = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return f" Did you mean '{lowered[close[0]]}'?" if close else f" Known: {', '.join(names)}."
