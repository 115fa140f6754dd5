"""What the documentation takes from the code when it is built: `<!-- generated: NAME -->` in a page names a table here.

Links out of the documentation, to source files, are made plain text: the site has no place for them.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from bitpress.clients import loads_as_experts, release_limit, vllm_limit
from bitpress.modifiers import MODIFIERS
from bitpress.schemes import PRESETS, QuantArgs, Scheme


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """mkdocs calls this with each page."""
    if page is not None and "<!-- generated: schemes -->" in markdown:
        page.meta.setdefault("hide", ["toc"])  # the table is wide
    found = re.sub(r"<!-- generated: (\w+) -->", lambda match: TABLES[match[1]](), markdown)
    outside = r"\[`?([^\]`]+)`?\]\((?:\.\./)+(?:src|examples|bench|tests)[^)]*\)"
    return re.sub(outside, r"`\1`", found)


def modifiers() -> str:
    """Every modifier with its keys, defaults and what they mean, from the dataclasses and their docstrings."""
    return "\n".join(part for name, kind in MODIFIERS.items() for part in _modifier(name, kind))


def _modifier(name: str, kind: type[Any]) -> Iterator[str]:
    about, keys = described(kind)
    yield f"## {name}\n\n{about}\n\n| key | type | default | |\n|---|---|---|---|"
    for field in dataclasses.fields(kind):
        text = keys[field.name]
        yield f"| `{field.name}` | {_escaped(_type(field))} | {_default(field)} | {_escaped(text)} |"
    yield ""


def described(kind: type[Any]) -> tuple[str, dict[str, str]]:
    """The text of a docstring, and what it says of each key."""
    whole = inspect.getdoc(kind) or ""
    about, _, listed = whole.partition("\nArgs:\n")
    listed = re.split(r"\n(?:Raises|Returns):\n", listed)[0]
    found: dict[str, str] = {}
    name = ""
    for line in listed.splitlines():
        if (entry := re.match(r"    (\w[\w, ]*): (.*)", line)) is not None:
            for name in entry[1].split(", "):
                found[name] = entry[2]
        elif name:
            found[name] += " " + line.strip()
    return about.strip(), found


def _type(field: dataclasses.Field[Any]) -> str:
    from bitpress.modifiers.base import _readable

    return _readable(str(field.type))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING else "none"
    text = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return "none" if field.default in (None, []) else f"`{text}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").strip()


def commands() -> str:
    """Every command with its arguments and options, from the command line itself."""
    import typer

    from bitpress.cli import app

    found = sorted(typer.main.get_command(app).commands.items())
    return "\n".join(part for name, command in found for part in _command(name, command))


def _command(name: str, command: Any) -> Iterator[str]:
    places = " ".join(p.name.upper() for p in command.params if p.param_type_name == "argument")
    text = re.sub(r"\s+", " ", command.help or "")
    yield f"### bitpress {name}\n\n`bitpress {name} {places}`. {text}\n\n| option | default | |\n|---|---|---|"
    for p in command.params:
        if p.param_type_name == "argument":
            yield f"| {p.name.upper()} | | {_escaped(p.help or '')} |"
            continue
        names = ", ".join(f"`{word}`" for word in (*p.opts, *p.secondary_opts))
        usual = "" if p.default in (None, False, (), "") else f"`{getattr(p.default, 'value', p.default)}`"
        yield f"| {names} | {str(usual).replace('True', 'yes')} | {_escaped(p.help or '')} |"
    yield ""


def schemes() -> str:
    """Every preset: what it stores, the format, what it needs, and what clients make of it."""
    lines = ["| preset | weights | inputs | format | data | vLLM | transformers |", "|---|---|---|---|---|---|---|"]
    for name, scheme in PRESETS.items():
        data = "a dataset" if scheme.static_inputs else ""
        lines.append(
            f"| `{name}` | {_args(scheme.weights)} | {_args(scheme.input_activations)} | {scheme.format} | {data} "
            f"| {vllm_limit(scheme) or 'yes'} | {_transformers(scheme)} |"
        )
    return "\n".join(lines)


def _args(args: QuantArgs | None) -> str:
    if args is None:
        return ""
    kind = f"{args.type}{args.num_bits}{'' if args.symmetric else ', zero points'}"
    each = f"groups of {args.group_size}" if args.group_size else f"one scale a {args.strategy}"
    if args.block_structure is not None:
        each = "blocks of {} x {}".format(*args.block_structure)
    when = {True: ", dynamic", False: "", "local": ", scales of groups dynamic"}[args.dynamic]
    return f"{kind}, {each}{when}"


def _transformers(scheme: Scheme) -> str:
    found = ["yes"]
    if limit := release_limit(scheme, []):
        found.append(limit)
    if not loads_as_experts(scheme):
        found.append("experts in `bitpress.transformers` only")
    return "; ".join(found)


def errors() -> str:
    """The tree of errors, from the docstring that defines it."""
    from bitpress import errors as module

    tree = (module.__doc__ or "").split("\n\n")[1]
    return f"```console\n{tree}\n```"


TABLES: dict[str, Callable[[], str]] = {
    "modifiers": modifiers,
    "schemes": schemes,
    "errors": errors,
    "commands": commands,
}
