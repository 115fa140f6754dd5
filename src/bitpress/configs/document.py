"""A configuration file as plain data, with the line of every key: TOML, YAML or JSON, and overrides by dotted key."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bitpress.errors import ConfigError

SUFFIXES = (".toml", ".yaml", ".yml", ".json")
Path_ = tuple[str, ...]  # of a key, from the outside in; elements of a list by their number

_TABLE = re.compile(r"^\s*\[(?P<array>\[)?\s*(?P<name>[^\]]+?)\s*\]?\]\s*(#.*)?$")
_KEY = re.compile(
    r"""^\s*(?P<key>(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*="""
)
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")


@dataclass
class Document:
    """What a configuration file says.

    Attributes:
        name: the file, as messages call it.
        data: the whole of it, overrides included.
        lines: number of the line of a key, by its path.
        given: paths that were set by an override.
        back: paths that an override took back, whether they were there or not.
        moved: where a key stands in the file, by the path under which it is known here.
        faults: keys that are there twice, overrides that cannot be followed.
    """

    name: str
    data: dict[str, Any]
    lines: dict[Path_, int] = field(default_factory=dict)
    given: set[Path_] = field(default_factory=set)
    back: set[Path_] = field(default_factory=set)
    moved: dict[Path_, Path_] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def place(self, path: Sequence[str]) -> str:
        """Where a key stands: `run.toml, line 7: dataset_spec.loader`; of one that is not there, what holds it."""
        path = self.origin(path)
        key = ".".join(path)
        for n in range(len(path), 0, -1):
            if path[:n] in self.given:
                return f"--set {key}"
            if path[:n] in self.lines:
                return f"{self.name}, line {self.lines[path[:n]]}: {key}"
            if any(given[:n] == path[:n] for given in self.given):  # a table that an override has made
                return f"--set {key}"
        return f"{self.name}: {key}" if key else self.name

    def has(self, path: Sequence[str]) -> bool:
        """Whether the file or an override has this very key."""
        path = self.origin(path)
        return path not in self.back and (path in self.lines or path in self.given)

    def origin(self, path: Sequence[str]) -> Path_:
        """The path of a key in the file."""
        path = tuple(path)
        for n in range(len(path), 0, -1):
            if path[:n] in self.moved:
                return self.moved[path[:n]] + path[n:]
        return path


def read(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Read a configuration.

    Args:
        overrides: `dotted.key=value` each, which take the place of what the file says; a number in the key is an
            element of a list. The value is written as in TOML; what is no such value is a string; null takes the key
            back. Those that cannot be followed are among the document's faults.

    Raises:
        ConfigError: the file is missing, of another kind or not valid.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: a configuration ends in {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    document = (_toml if path.suffix.lower() == ".toml" else _yaml)(text, path)
    document.faults += [fault for text in overrides for fault in _override(document, text)]
    return document


def _toml(text: str, path: Path) -> Document:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error), re.DOTALL)
        place = f"{path}, line {found[2]}, column {found[3]}" if found else str(path)
        raise ConfigError(f"{place}: not valid TOML: {found[1] if found else error}") from None
    return Document(str(path), data, _toml_lines(text))


def _toml_lines(text: str) -> dict[Path_, int]:
    """Lines of the keys of a valid TOML text; keys within an inline table count as on its line."""
    found: dict[Path_, int] = {}
    table: Path_ = ()
    counts: dict[Path_, int] = {}
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if header := _TABLE.match(line):
            table = _keys(header["name"])
            for n in range(1, len(table)):  # what stands in an array of tables is in its last element
                if table[:n] in counts:
                    table = (*table[:n], str(counts[table[:n]] - 1), *table[n:])
            if header["array"]:
                counts[table] = counts.get(table, 0) + 1
                found.setdefault(table, number)
                table = (*table, str(counts[table] - 1))
            found.setdefault(table, number)
        elif key := _KEY.match(line):
            path = (*table, *_keys(key["key"]))
            for n in range(len(table) + 1, len(path) + 1):
                found.setdefault(path[:n], number)
            value = "v =" + line[key.end() :]
            while not _parses(value):
                value += "\n" + next(lines)[1]
    return found


def _keys(name: str) -> Path_:
    return tuple(part.strip("\"'") for part in _PART.findall(name))


def _parses(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _yaml(text: str, path: Path) -> Document:
    """YAML, and JSON, which is YAML but for its tabs."""
    is_json = path.suffix.lower() == ".json"
    try:
        if is_json:
            json.loads(text)
            text = text.replace("\t", " ")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(data).__name__}")
    document = Document(str(path), json.loads(text) if is_json else data)
    for place_, number, twice in _nodes(node, ()):
        document.lines.setdefault(place_, number)
        if twice:
            document.faults.append(f"{path}, line {number}: the key '{'.'.join(place_)}' is there twice")
    return document


def _nodes(node: Any, at: Path_) -> Iterator[tuple[Path_, int, bool]]:
    """Path and line of every key, and whether it was there before."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            path = (*at, str(key.value))
            yield path, key.start_mark.line + 1, path in seen
            seen.add(path)
            yield from _nodes(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*at, str(i)), value.start_mark.line + 1, False
            yield from _nodes(value, (*at, str(i)))


def _override(document: Document, text: str) -> list[str]:
    """Follow `dotted.key=value`; what is wrong with it."""
    name, equals, written = text.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    if not equals or not all(path):
        return [f"--set {text}: write it as key=value, such as scheme=W4A16 or dataset_spec.take=100"]
    value = value_of(written)
    at: Any = document.data
    for n, part in enumerate(path):
        here = f"--set {text}: {'.'.join(path[:n])}"
        last = n == len(path) - 1
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                return [f"{here}: is a list of {len(at)}; give a number from 0 to {len(at) - 1}, not '{part}'"]
            if last:
                at[int(part)] = value
            else:
                at = at[int(part)]
        elif isinstance(at, dict):
            if value is None and (last or part not in at):  # no table is made only to be without a key
                at.pop(part, None)
                path = path[: n + 1]
                document.back.add(path)
                break
            if last:
                at[part] = value
            else:
                at = at.setdefault(part, {})
        else:
            return [f"{here}: is {at!r}, which has no keys"]
    else:
        document.back -= {path[:n] for n in range(1, len(path) + 1)}
    document.given.add(path)
    return []


def value_of(text: str) -> Any:
    """The value of an override: as TOML, else as YAML writes lists, tables and null, else the text itself."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except (tomllib.TOMLDecodeError, KeyError):
        pass
    if text.strip() in ("null", "~") or text.lstrip()[:1] in ("[", "{"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            pass
    return text
