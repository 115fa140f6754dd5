"""Curves as SVG that follows the page's colours, and as characters for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from bitpress.views.page import Html, safe

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 90, 20, 20, 60
Points = Sequence[tuple[float, float]]


class _Scale:
    """From sizes (linear) and errors (logarithmic) to places."""

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        xs, ys = zip(*points, strict=True)
        self.low, self.high = min(xs), max(xs)
        positive = [y for y in ys if y > 0] or [1.0]
        self.least, self.most = math.log10(min(positive)), math.log10(max(positive))
        self.least, self.most = math.floor(2 * self.least) / 2, math.ceil(2 * self.most) / 2
        if self.most == self.least:
            self.most += 0.5
        if self.high == self.low:
            self.high += 1

    def share(self, x: float, y: float) -> tuple[float, float]:
        """0 to 1 from the left, and from the bottom; an error of 0 lies on the bottom."""
        up = (math.log10(y) - self.least) / (self.most - self.least) if y > 0 else 0.0
        return (x - self.low) / (self.high - self.low), min(1.0, max(0.0, up))


def curve_svg(
    curve: Points, marks: Mapping[str, tuple[float, float]], chosen: tuple[float, float] | None, x: str, y: str
) -> Html:
    """A curve with single marks beside it, and the point that was chosen.

    Args:
        curve: sizes and errors.
        marks: by their labels.
        x, y: what the axes are; the vertical one is logarithmic.
    """
    scale = _Scale([*curve, *marks.values(), *([chosen] if chosen else [])])

    def at(point: tuple[float, float]) -> tuple[float, float]:
        right, up = scale.share(*point)
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(y)} by {safe(x)}">']
    for tick in _sizes(scale.low, scale.high):
        px, _ = at((tick, 10**scale.least))
        parts.append(f'<line class="axis" x1="{px:.1f}" y1="{TOP}" x2="{px:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle">{tick:g}</text>')
    for tick in _errors(scale.least, scale.most):
        _, py = at((scale.low, tick))
        parts.append(f'<line class="axis" x1="{LEFT}" y1="{py:.1f}" x2="{WIDTH - RIGHT}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{tick:g}</text>')
    line = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(at, curve))
    parts.append(f'<polyline points="{line}" style="fill:none;stroke:var(--a);stroke-width:2.5"/>')
    for px, py in map(at, curve):
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" style="fill:var(--a)"/>')
    for label, point in marks.items():
        px, py = at(point)
        end = px > WIDTH - 120
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="6" style="fill:var(--b)"/>')
        parts.append(
            f'<text x="{px + (-10 if end else 10):.1f}" y="{py - 8:.1f}" text-anchor="{"end" if end else "start"}">'
            f"{safe(label)}</text>"
        )
    if chosen is not None:
        px, py = at(chosen)
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="9" style="fill:none;stroke:var(--c);stroke-width:4"/>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{safe(x)}</text>')
    return Html("\n".join([*parts, "</svg>"]))


def _sizes(low: float, high: float) -> list[float]:
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10) if (high - low) / s <= 9 or s == 10)
    return [round(i * step, 6) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _errors(least: float, most: float) -> list[float]:
    """Powers of ten between two exponents; where they are few, with 2 and 5 times them."""
    steps = (1, 2, 5) if most - least < 2 else (1,)
    ticks = [m * 10.0**p for p in range(math.floor(least), math.floor(most) + 1) for m in steps]
    return [t for t in ticks if least - 1e-9 <= math.log10(t) <= most + 1e-9]


def curve_text(
    curve: Points, marks: Mapping[str, tuple[float, float]], chosen: tuple[float, float] | None,
    *, width: int = 60, height: int = 14,
) -> str:  # fmt: skip
    """The same of characters: `.` the curve, the first character of a mark's label, `*` what was chosen."""
    scale = _Scale([*curve, *marks.values(), *([chosen] if chosen else [])])
    grid = [[" "] * width for _ in range(height)]

    def put(point: tuple[float, float], character: str) -> None:
        right, up = scale.share(*point)
        grid[round((1 - up) * (height - 1))][round(right * (width - 1))] = character

    for (x0, y0), (x1, y1) in pairwise(curve):  # the line between two points
        for i in range(11):
            share = i / 10
            mixed = 10 ** (math.log10(y0) * (1 - share) + math.log10(y1) * share) if y0 > 0 and y1 > 0 else y1
            put((x0 + (x1 - x0) * share, mixed), ".")
    for label, point in marks.items():
        put(point, label[0])
    if chosen is not None:
        put(chosen, "*")
    rows = []
    for i, row in enumerate(grid):
        value = 10 ** (scale.most - (scale.most - scale.least) * i / (height - 1))
        named = f"{value:.2g}" if i % 4 == 0 or i == height - 1 else ""
        rows.append(f"{named:>9} |{''.join(row).rstrip()}")
    ends = f"{scale.low:.2f}", f"{scale.high:.2f}"
    return "\n".join([*rows, " " * 10 + "+" + "-" * width, " " * 11 + ends[0] + ends[1].rjust(width - len(ends[0]))])
