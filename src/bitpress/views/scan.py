"""A scan as a page: the curve, what is suggested, and the error of every layer at every width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePath
from statistics import fmean

from bitpress.errors import sized
from bitpress.scan import COLUMNS, Layer, Scan
from bitpress.views.charts import curve_svg
from bitpress.views.page import Cell, Html, bullets, code, folded, page, paragraph, section, table, versions
from bitpress.views.run import place_of

UNIT = {
    "kl": "KL of the next token to the full-precision model, in nats",
    "gram": "lost energy of the outputs of the layers, a share",
}
ABOUT = {
    "kl": "Each group of linears was compressed alone and the rest of the model left as it is; 8 bits are scaled from "
    "4. Errors of a whole model are the sums of these single ones: a prediction, not a measurement.",
    "gram": "The share of the energy of a layer's output that rounding to nearest with searched scales loses (2:4: "
    "pruning by Wanda), on a sample of its rows. Errors of a whole model are means over the weights.",
}
TOP = 20


def scan_page(scan: Scan) -> str:
    """The page."""
    data = scan.data
    about = f"measured by {scan.measure} on {data['tokens']:,} tokens of {data['source']}"
    # 2:4 is stored as large as the model, so it has no place in the picture
    marks = {f"{c} bits": (p.bits_per_weight, p.error) for c, p in scan.uniform.items() if c.isdigit()}
    chosen = None if scan.suggestion is None else scan.suggestion.point
    picture = curve_svg(
        [(p.bits_per_weight, p.error) for p in scan.curve], marks,
        None if chosen is None else (chosen.bits_per_weight, chosen.error), "stored bits per weight",
        UNIT[scan.measure],
    )  # fmt: skip
    parts = [
        section("Size against error", paragraph(f"Upwards: {UNIT[scan.measure]}, on a logarithmic scale."), picture,
                paragraph("Line: the best mixture of each size. Dots: one width everywhere."
                          + (" Ring: what is suggested." if chosen else ""), dim=True), _points(scan)),
        section("Suggestion", *_suggestion(scan)),
        section("Most sensitive", *_ranking(scan)),
        section("Kinds of layers", _kinds(scan)),
        section("All layers", paragraph(ABOUT[scan.measure]), _layers(scan.layers)),
    ]  # fmt: skip
    if scan.notes:
        parts.append(section("Notes", bullets(scan.notes)))
    return page(f"{PurePath(scan.model).name}: what each layer can bear", about, [*parts, versions(scan.versions)])


def _points(scan: Scan) -> Html:
    rows = [[f"{c} bits everywhere" if c.isdigit() else f"{c} everywhere", f"{p.bits_per_weight:.3f}", sized(p.bytes),
             f"{p.error:.4g}"] for c, p in scan.uniform.items()]  # fmt: skip
    mixed = [[f"mixture {i + 1}", f"{p.bits_per_weight:.3f}", sized(p.bytes), f"{p.error:.4g}"]
             for i, p in enumerate(scan.curve)]  # fmt: skip
    head = ("", "bits/weight", "checkpoint", "error")
    return Html(table(head, rows) + folded("Points of the curve", table(head, mixed)))


def _suggestion(scan: Scan) -> list[str]:
    found = scan.suggestion
    if found is None:
        return [paragraph("No target was given: `--bits 4.25`, `--size 90MB` or `--error 0.05` gives a recipe for it.")]
    whole = sum(found.schemes.values())
    schemes = sorted(found.schemes.items(), key=lambda item: -item[1])
    return [
        paragraph(
            f"For {found.asked}: {found.point.bits_per_weight:.3f} bits per weight, {sized(found.point.bytes)}, "
            f"predicted error {found.point.error:.4g}."
        ),
        table(("scheme", "of the weights"), ((s, Cell(f"{n / whole:.1%}", n / whole)) for s, n in schemes)),
        folded("recipe.yaml", code(found.recipe)),
        paragraph(
            "`bitpress oneshot MODEL --recipe recipe.yaml --output OUT` runs it as it is; give it the data of this "
            "scan too: `--dataset`, `--num-samples`, `--max-seq-length`.",
            dim=True,
        ),
    ]


def _ranking(scan: Scan) -> list[str]:
    """By the error at 4 bits, or at the width nearest to it that most layers have."""
    column = next((c for c in ("4", "3", "8", "2") if any(c in layer.errors for layer in scan.layers)), "4")
    ranked = sorted((x for x in scan.layers if column in x.errors), key=lambda x: -x.errors[column])
    most = max((x.errors[column] for x in ranked), default=0.0) or 1.0
    rows: list[list[str | Cell]] = [
        [x.name, Cell(f"{x.errors[column]:.3g}", x.errors[column] / most), f"{x.weights:,}"] for x in ranked
    ]
    head = ("linears", f"error at {column} bits", "weights")
    return [table(head, rows[:TOP]), *([folded(f"All {len(rows)}", table(head, rows))] if len(rows) > TOP else [])]


def kinds_of(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers by the last part of their names."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(place_of(layer.name).kind, []).append(layer)
    return found


def _kinds(scan: Scan) -> Html:
    rows: list[list[str | Cell]] = []
    for kind, mine in kinds_of(scan.layers).items():
        means = [[x.errors[c] for x in mine if c in x.errors] for c in COLUMNS]
        rows.append([kind, str(len(mine)), *(f"{fmean(m):.3g}" if m else "" for m in means)])
    return table(("kind, mean error", "groups", *_heads()), rows)


def _layers(layers: Sequence[Layer]) -> Html:
    errors = [e for layer in layers for e in layer.errors.values() if e > 0]
    low, high = (math.log(min(errors)), math.log(max(errors))) if errors else (0.0, 1.0)

    def cell(layer: Layer, column: str) -> str | Cell:
        error = layer.errors.get(column)
        if error is None:
            return ""
        share = (math.log(error) - low) / (high - low) if error > 0 and high > low else 0.0
        return Cell(f"{error:.2g}", share)

    rows: list[list[str | Cell]] = [[layer.name, *(cell(layer, c) for c in COLUMNS)] for layer in layers]
    return table(("linears", *_heads()), rows, heat=True)


def _heads() -> list[str]:
    return [f"{c} bits" if c.isdigit() else c for c in COLUMNS]
