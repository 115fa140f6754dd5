"""The curve of size against error over a model's layers, and the recipe at a point of it.

Errors of groups of linears add up; a group has one scheme. Each point is the best mixture of its size, by
`bitpress.math.allocate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitpress.errors import PlanError, sized
from bitpress.size_target import DENSE, FusionGroup, SizeTarget, explicit

Errors = Mapping[str, Mapping[str, float]]  # of each group, by the label of its schemes
PRUNED = "2:4"
POINTS = 40  # of the curve


@dataclass(frozen=True)
class Point:
    """A size and the least error that it can have; bytes are those of all weight files."""

    bits_per_weight: float
    bytes: int
    error: float


@dataclass(frozen=True)
class Suggestion:
    """What to do for a target.

    Attributes:
        asked: the target in words.
        point: what is predicted.
        schemes: number of weights by scheme.
        recipe: YAML that `oneshot` runs as it is.
    """

    asked: str
    point: Point
    schemes: dict[str, int]
    recipe: str


def width_of(target: SizeTarget, label: str) -> str:
    """The column of a scheme's label."""
    group = target.choices[label].group
    return label if group is None else str(group.scheme.weights.num_bits)


def curve(target: SizeTarget, errors: Errors, rest: int) -> tuple[Point, ...]:
    """The least error at sizes from the smallest to about 8 bits, and beyond to full precision where that is more."""
    stored = [[g.sizes[c] for c in storable(g)] for g in target.groups]
    least, most = sum(map(min, stored)), sum(max(s for s in mine[:-1]) if len(mine) > 1 else mine[0] for mine in stored)
    found: dict[int, Point] = {}
    for i in range(POINTS + 1):
        picks = best(target, errors, least + round((most - least) * i / POINTS))
        if picks is not None:
            point = point_of(target, errors, picks, rest)
            found.setdefault(point.bytes, point)
    points: list[Point] = []
    for point in sorted(found.values(), key=lambda p: p.bytes):
        if not points or point.error < points[-1].error:
            points.append(point)
    return tuple(points)


def storable(group: FusionGroup) -> list[str]:
    """Labels that a recipe can have, full precision last; 2:4 saves no bytes."""
    return [label for label in group.sizes if label not in (DENSE, PRUNED)] + [DENSE]


def best(target: SizeTarget, errors: Errors, bits: float) -> dict[str, str] | None:
    """The labels with the least error whose size is at most this, in bits."""
    from bitpress.math.allocate import allocate

    labels = [storable(g) for g in target.groups]
    sizes = [[g.sizes[c] for c in mine] for g, mine in zip(target.groups, labels, strict=True)]
    costs = [[errors[g.name][c] for c in mine] for g, mine in zip(target.groups, labels, strict=True)]
    found = allocate(sizes, costs, 0, bits)
    if found is None:
        return None
    return {g.name: labels[i][k] for i, (g, k) in enumerate(zip(target.groups, found, strict=True))}


def point_of(target: SizeTarget, errors: Errors, picks: Mapping[str, str], rest: int) -> Point:
    bits = target.size(picks)
    error = sum(errors[g][c] for g, c in picks.items())
    return Point(round(bits / target.weights, 4), rest + bits // 8, float(f"{error:.5g}"))


def uniform(target: SizeTarget, errors: Errors, rest: int, columns: Sequence[str]) -> dict[str, Point]:
    """One width for all, where all have it."""
    found = {}
    for column in columns:
        picks = {g.name: c for g in target.groups for c in g.sizes if width_of(target, c) == column}
        if len(picks) == len(target.groups):
            found[column] = point_of(target, errors, picks, rest)
    return found


def suggest(
    target: SizeTarget,
    errors: Errors,
    rest: int,
    bits: float | None,
    size: int | str | None,
    error: float | None,
) -> Suggestion | None:
    """The recipe for a target; PlanError if it is out of reach."""
    picks: dict[str, str] | None
    from bitpress.budget import parse_bytes
    from bitpress.recipe import Recipe, Stage

    if error is not None:
        asked, picks = f"an error of at most {error:g}", _smallest(target, errors, error)
    elif bits is not None:
        asked, picks = f"at most {bits:g} bits per weight", best(target, errors, bits * target.weights)
    elif size is not None:
        bound = parse_bytes(size) or 0
        asked, picks = f"at most {sized(bound)}", best(target, errors, 8 * (bound - rest))
    else:
        return None
    if picks is None:
        raise PlanError(f"{asked}: {_out_of_reach(target, rest)}")
    if all(c == DENSE for c in picks.values()):
        raise PlanError(f"{asked}: full precision is what meets it, so there is nothing to do; ask for less")
    counts: dict[str, int] = {}
    for group in target.groups:
        counts[picks[group.name]] = counts.get(picks[group.name], 0) + group.weights
    recipe = explicit(Recipe((Stage("quantization_stage", "oneshot", (target.modifier,)),)), target, picks)
    return Suggestion(asked, point_of(target, errors, picks, rest), counts, recipe.to_yaml())


def check_reach(target: SizeTarget, rest: int, bits: float | None, size: int | str | None) -> None:
    """PlanError if no recipe can be so small: that follows from shapes, before anything is measured."""
    from bitpress.budget import parse_bytes

    least = _least(target)
    if bits is not None and bits * target.weights < least:
        raise PlanError(f"at most {bits:g} bits per weight: {_out_of_reach(target, rest)}")
    if size is not None and 8 * ((bound := parse_bytes(size) or 0) - rest) < least:
        raise PlanError(f"at most {sized(bound)}: {_out_of_reach(target, rest)}")


def _least(target: SizeTarget) -> int:
    return sum(min(g.sizes[c] for c in storable(g)) for g in target.groups)


def _out_of_reach(target: SizeTarget, rest: int) -> str:
    least = _least(target)
    return (
        f"out of reach: the least is {least / target.weights:.3f} bits per weight, "
        f"{sized(rest + least / 8)} with all that is not compressed"
    )


def _smallest(target: SizeTarget, errors: Errors, error: float) -> dict[str, str]:
    """The labels of the least size whose error is at most this; full precision has none."""
    low = _least(target)
    high = sum(g.sizes[DENSE] for g in target.groups)
    picks = {g.name: DENSE for g in target.groups}
    while high - low > target.weights / 1000:
        middle = (low + high) // 2
        found = best(target, errors, middle)
        if found is not None and sum(errors[g][c] for g, c in found.items()) <= error:
            picks, high = found, middle
        else:
            low = middle
    return picks
