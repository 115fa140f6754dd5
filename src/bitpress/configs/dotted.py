"""Classes and functions of the user's that a configuration names by dotted path."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitpress.configs.check import Checker
from bitpress.data.local import cause_of
from bitpress.errors import DataError, did_you_mean


def made(checker: Checker, name: str, given: Mapping[str, Any], path: tuple[str, ...], folder: Path) -> Any:
    """The rows that a class or function gives when it is called with the keys of its table.

    Args:
        checker: notes every fault.
        path: of the table in the configuration.
        folder: of the configuration, where modules are looked for too.

    Returns:
        What it returned, or that thing's `dataset`; None if anything is wrong.
    """
    at = (*path, "spec_class")
    try:
        maker = imported(name, folder)
    except DataError as error:
        checker.fault(at, str(error))
        return None
    before = len(checker.faults)
    _fit(checker, maker, given, path)
    if len(checker.faults) > before:
        return None
    try:
        source = maker(**given)
        rows = source.dataset if hasattr(source, "dataset") else source
        rows = rows() if callable(rows) and not isinstance(rows, Sequence) else rows
    except Exception as error:  # the user's code may raise anything; pydantic tells the keys
        errors = getattr(error, "errors", None)
        found = errors() if callable(errors) else []
        for problem in found:
            checker.fault((*path, *map(str, problem["loc"])), f"{problem['msg']}, got {problem.get('input')!r}")
        if not found:
            checker.fault(at, f"{name} failed: {cause_of(error)}")
        return None
    if isinstance(rows, str | bytes | Mapping) or not hasattr(rows, "__iter__"):
        checker.fault(at, f"{name} gives {type(rows).__name__}, not rows, nor has it an attribute 'dataset'")
        return None
    return rows


def _fit(checker: Checker, maker: Callable[..., Any], given: Mapping[str, Any], path: tuple[str, ...]) -> None:
    """Hold the keys against the parameters of what they are for."""
    try:
        parameters = inspect.signature(maker).parameters.values()
    except (TypeError, ValueError):  # one that does not tell them
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [p.name for p in named]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in given:
            if key not in known:
                checker.fault((*path, key), f"unknown key.{did_you_mean(key, known) if known else ''}")
    for p in named:
        if p.default is p.empty and p.name not in given:
            checker.fault((*path, p.name), "missing")


@contextmanager
def findable(folder: Path) -> Iterator[None]:
    """Within it, modules in this folder and in the current one can be imported."""
    before = list(sys.path)
    sys.path[:0] = [str(Path.cwd()), str(folder)]
    try:
        yield
    finally:
        sys.path[:] = before


def imported(name: str, folder: Path) -> Any:
    """What a dotted path names.

    Raises:
        DataError: there is no such module, or it has no such thing, or it cannot be called.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        raise DataError(f"'{name}' is no dotted path; write module.Class")
    with findable(folder):
        try:
            there = importlib.import_module(module)
        except Exception as error:  # the user's module may raise anything
            raise DataError(f"'{name}': {module} cannot be imported: {cause_of(error)}") from None
    if not hasattr(there, attribute):
        public = [n for n in vars(there) if not n.startswith("_")]
        raise DataError(f"'{name}': {module} has no '{attribute}'.{did_you_mean(attribute, public)}")
    found = getattr(there, attribute)
    if not callable(found):
        raise DataError(f"'{name}': is a {type(found).__name__}, not a class or function")
    return found
