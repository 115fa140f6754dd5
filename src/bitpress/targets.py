"""Which linears a recipe means: class names, module names and regular expressions.

| pattern            | matches                                                              |
|--------------------|----------------------------------------------------------------------|
| `Linear`           | every module of that class                                           |
| `lm_head`, `q_proj`| the module of that name, or whose name ends in it after a dot        |
| `re:.*q_proj`      | names that the expression matches from their start                   |
| `__ALL__`, `__ALL_PRUNABLE__` | every linear                                              |

A trailing `.weight` means the module that holds the weight. A module may have two names, its own and the one on disk: a
pattern matches by either. A target that no linear's name matches, but that of a module around some, such as
`re:model.layers.\\d+$` in older recipes, means all linears in there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ALL = ("__ALL__", "__ALL_PRUNABLE__")
REGEX = "re:"
WEIGHT = ".weight"


class LinearName(NamedTuple):
    """A linear as recipes see it: its names (in the model, on disk) and its class."""

    names: tuple[str, ...]
    class_name: str


class Resolved(NamedTuple):
    """What patterns select, in the model's order; faults stop the run, notes do not."""

    linears: list[LinearName]
    faults: list[str]
    notes: list[str]


def match(name: str, class_name: str, patterns: Sequence[str]) -> bool:
    """Whether any pattern means the module. Patterns are valid: see `pattern_fault`."""
    return any(_match(name, class_name, pattern) for pattern in patterns)


def resolve(linears: Sequence[LinearName], targets: Sequence[str], ignore: Sequence[str], where: str) -> Resolved:
    """The linears that `targets` mean and `ignore` does not.

    Args:
        where: the place of the patterns in the recipe; every fault and note starts with it.

    Returns:
        The linears; a fault per target that is invalid or matches nothing, and one if nothing is left;
        a note per ignore that matches nothing.
    """
    at_targets, at_ignore = (f"{where}.{key}" if where else key for key in ("targets", "ignore"))
    faults = [
        f"{place}: {fault}"
        for place, patterns in ((at_targets, targets), (at_ignore, ignore))
        for fault in map(pattern_fault, patterns)
        if fault
    ]
    wanted = [p for p in targets if pattern_fault(p) is None]
    unwanted = [p for p in ignore if pattern_fault(p) is None]
    missed = [p for p in wanted if not any(_means(linear, [p]) for linear in linears)]
    around = [p for p in missed if any(_inside(linear, p) for linear in linears)]
    faults += [f"{at_targets}: '{p}' matches no linear.{_nearest(p, linears)}" for p in missed if p not in around]
    notes = [f"{at_targets}: '{p}' matches modules that hold linears; these are meant" for p in around]
    notes += [
        f"{at_ignore}: '{p}' matches no linear.{_nearest(p, linears)}"
        for p in unwanted
        if not any(_means(linear, [p]) for linear in linears)
    ]
    matched = [x for x in linears if _means(x, wanted) or any(_inside(x, p) for p in around)]
    chosen = [linear for linear in matched if not _means(linear, unwanted)]
    if matched and not chosen:
        faults.append(f"{at_ignore}: ignores all {len(matched)} linears that the targets match")
    return Resolved(chosen, faults, notes)


def specificity(linear: LinearName, patterns: Sequence[str]) -> int:
    """How exactly patterns name a linear: 2 by its name, 1 by a regular expression, 0 by its class or as one of all."""
    best = 0
    for pattern in patterns:
        if pattern_fault(pattern) is None and _means(linear, [pattern]):
            plain = pattern.removesuffix(WEIGHT)
            vague = plain in ALL or plain == linear.class_name
            best = max(best, 1 if pattern.startswith(REGEX) else 0 if vague else 2)
    return best


def pattern_fault(pattern: str) -> str | None:
    """What is wrong with a pattern in itself: it is empty, or not a regular expression."""
    if not pattern.removeprefix(REGEX):
        return f"{pattern!r} is an empty pattern"
    if pattern.startswith(REGEX):
        try:
            re.compile(pattern.removeprefix(REGEX))
        except re.error as error:
            return f"'{pattern}' is not a regular expression: {error}"
    return None


def _means(linear: LinearName, patterns: Sequence[str]) -> bool:
    return any(match(name, linear.class_name, patterns) for name in linear.names)


def _inside(linear: LinearName, pattern: str) -> bool:
    """Whether an expression matches the name of a module that the linear is in."""
    if not pattern.startswith(REGEX):
        return False
    parents = {".".join(parts[:i]) for parts in (n.split(".") for n in linear.names) for i in range(1, len(parts))}
    return any(re.match(pattern.removeprefix(REGEX), parent) for parent in parents)


def _match(name: str, class_name: str, pattern: str) -> bool:
    if pattern.startswith(REGEX):
        regex = pattern.removeprefix(REGEX)
        if re.match(regex, name):
            return True
        # Only an expression that speaks of the weight sees its name: `(?!.*gate$)` must not.
        return "weight" in regex and re.match(regex, name + WEIGHT) is not None
    plain = pattern.removesuffix(WEIGHT)
    return plain in ALL or plain == class_name or f".{name}".endswith(f".{plain}")


def _nearest(pattern: str, linears: Sequence[LinearName]) -> str:
    """The names most like a pattern that matched nothing, one for all layers and experts."""
    if not linears:
        return " The model has no linears."
    plain = re.sub(r"[^\w.]", "", pattern.removeprefix(REGEX)).strip(".").removesuffix(WEIGHT)
    names = [name for linear in linears for name in linear.names]
    known = _unique([linear.class_name for linear in linears] + [name.rpartition(".")[2] for name in names])
    if "." in plain:
        known += _unique(names)
    close = difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
    listed = ", ".join(f"'{name}'" for name in close or known[:12])
    return f" Did you mean {listed}?" if close else f" Known: {listed}."


def _unique(names: Iterable[str]) -> list[str]:
    # Names that differ in the numbers of layers or experts count once: a model of experts has tens of thousands.
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "0", name), name)
    return list(first.values())
