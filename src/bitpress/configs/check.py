"""A table of a configuration held against a dataclass: unknown keys, wrong types, what is missing, all together."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bitpress.configs.document import Document
from bitpress.errors import did_you_mean

T = TypeVar("T")


class Checker:
    """Collects the faults of a document, each with line and key.

    Attributes:
        faults: what is wrong, in the order in which it was found.
        wrong: paths of the keys that are.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.faults: list[str] = list(document.faults)
        self.wrong: set[tuple[str, ...]] = set()

    def fault(self, path: Sequence[str], text: str) -> None:
        """Note what is wrong with a key."""
        self.wrong.add(tuple(path))
        self.faults.append(f"{self.document.place(path)}: {text}")

    def table(self, kind: type[T], value: Any, path: Sequence[str], *, also: Iterable[str] = ()) -> T | None:
        """The table as an object of a dataclass whose fields are its keys; None where it cannot do without one.

        Keys that are wrong are noted and stand at their defaults, so that the rest can be looked at too.

        Args:
            also: keys that are read elsewhere.
        """
        found = self.keys(hints(kind), value, path, also=also)
        if found is None:
            return None
        needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
        for name in needed:
            if name not in value:
                self.fault((*path, name), "missing")
        return kind(**found) if all(name in found for name in needed) else None

    def keys(
        self, known: Mapping[str, Any], value: Any, path: Sequence[str], *, also: Iterable[str] = ()
    ) -> dict[str, Any] | None:
        """The keys of a table that are right; None if it is no table.

        Args:
            known: the types of the keys there are, by name.
        """
        if not isinstance(value, Mapping):
            self.fault(path, f"expected a table of keys, got {value!r}")
            return None
        found = {}
        for key, given in value.items():
            if key in known:
                if fits(given, known[key]):
                    found[key] = given
                else:
                    self.fault((*path, key), f"expected {described(known[key])}, got {given!r}")
            elif key not in also:
                self._unknown(path, str(key), (*known, *also))
        within = self.document.origin(path)
        for *table, key in sorted(self.document.back - set(self.document.lines)):  # what never was there
            if tuple(table) == within and key not in (*known, *also, *value):
                self._unknown(path, key, (*known, *also))
        return found

    def _unknown(self, path: Sequence[str], key: str, known: Iterable[str]) -> None:
        self.fault((*path, key), f"unknown key.{did_you_mean(key, known)}")


def hints(kind: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    types_ = get_type_hints(kind)
    return {f.name: types_[f.name] for f in fields(kind)}


def fits(value: Any, kind: Any) -> bool:
    """Whether plain data is of a type: a whole number is a float too, true and false are no numbers."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, k) for k in inner)
    if origin is Literal:
        return value in inner
    if kind is None or kind is type(None):
        return value is None
    if origin in (list, tuple):
        return isinstance(value, list) and (not inner or all(fits(v, inner[0]) for v in value))
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}


def described(kind: Any) -> str:
    """A type in the words of those who write configurations."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(k) for k in inner if k is not type(None)))
    if origin is Literal:
        return " or ".join(repr(k) for k in inner)
    if origin in (list, tuple):
        return f"a list ({described(inner[0])} each)" if inner else "a list"
    if origin is dict:
        return f"a table ({described(inner[1])} each)" if inner and inner[1] is not Any else "a table"
    return WORDS.get(kind, getattr(kind, "__name__", str(kind)))
