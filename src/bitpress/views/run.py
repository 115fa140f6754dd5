"""A run's report as a page: what report.json holds, for people."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bitpress.errors import counted, sized
from bitpress.progress import clock
from bitpress.views.charts import curve_svg
from bitpress.views.page import (
    Cell,
    Html,
    answers,
    bullets,
    code,
    facts,
    folded,
    page,
    paragraph,
    safe,
    section,
    table,
    versions,
)

Row = Mapping[str, Any]
TOP = 12  # of a ranking, without unfolding it
MOST = 5000  # rows of a table; a browser is slow with more, and report.json has them all


@dataclass(frozen=True)
class _Place:
    """Where a linear is: its block ("head" outside the blocks), and its kind, with all experts as one."""

    block: str
    kind: str


def run_page(report: Mapping[str, Any], recipe: str, name: str) -> str:
    """The page.

    Args:
        report: as in report.json.
        recipe: as in recipe.yaml.
        name: of the checkpoint.
    """
    rows: list[Row] = list(report.get("layers", []))
    last = list({row["name"]: row for row in rows}.values())  # as the last stage left them
    lost = {row["name"]: row for row in rows if row["rel_error"] > 0}  # a stage that trains has no error of its own
    lossy = [lost.get(row["name"], row) for row in last]
    parts = [
        facts(_facts(report)),
        section("Kinds of layers", *_kinds(rows)),
        section("Layer by layer", *_maps(last, lossy)),
        section("What is most sensitive", *_ranking(report, lossy)),
        section("Time and memory", *_phases(report["totals"])),
        section("Calibration data", *_data(report)),
        *([section("Training", *_training(report["training"]))] if report.get("training") else []),
        section("Generations", *_generations(report.get("generations"))),
        section("Recipe", code(recipe.strip() or "(none)"), *_again(report.get("again"))),
    ]
    if report.get("notes"):
        parts.append(section("Notes", bullets(report["notes"])))
    parts.append(versions(report["versions"]))
    parts.append(section("All layers", *_all(rows, report)))
    return page(
        f"{name}: how it was compressed", f"bitpress {report['versions']['bitpress']}, seed {report['seed']}", parts
    )


def place_of(name: str) -> _Place:
    """Block and kind of a linear from its name on disk, such as `model.layers.3.mlp.experts.7.up_proj`."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return _Place("head", name)
    rest = ["*" if part.isdigit() else part for part in parts[at + 1 :]]
    return _Place(parts[at], f"{'experts ' if '*' in rest else ''}{rest[-1]}")


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 0.1 else f"{share:.3%}"


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    totals, data = report["totals"], report.get("data")
    found = {"linears": f"{totals['layers']:,}", "weights written": sized(totals["output_bytes"])}
    if "bits_per_weight" in totals:
        found["bits per weight, on average"] = f"{totals['bits_per_weight']:.3f}"
        if totals["mean_rel_error"] > 0:
            found[f"{_lost(report['layers'])}, on average"] = _percent(totals["mean_rel_error"])
        found["zeros"] = _percent(totals["sparsity"])
    found["time"] = clock(totals["seconds"])
    found["peak host memory"] = sized(totals["peak_host_bytes"])
    if totals["peak_device_bytes"]:
        found["peak device memory"] = sized(totals["peak_device_bytes"])
    if data:
        found["calibration tokens"] = f"{data['tokens']:,}"
    return found


def _lost(rows: Sequence[Row]) -> str:
    """What the errors of these rows are shares of."""
    kinds = {row["error_of"] for row in rows}
    return "lost energy of the " + (kinds.pop() if len(kinds) == 1 else "output or weight")


def _groups(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by kind and by some of their values."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((place_of(row["name"]).kind, *(str(row[k]) for k in keys)), []).append(row)
    return found


def _kinds(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return [paragraph("No linear was compressed.")]
    groups = _groups(rows, "method", "scheme", "mask")
    masks = any(row["mask"] for row in rows)
    means = {key: fmean(row["rel_error"] for row in mine) for key, mine in groups.items()}
    most = max(means.values()) or 1.0
    lines: list[list[str | Cell]] = []
    for (kind, method, scheme, mask), mine in groups.items():
        mean = means[kind, method, scheme, mask]
        lines.append([
            kind, Cell(_percent(mean), mean / most), _percent(max(row["rel_error"] for row in mine)),
            f"{mine[0]['bits_per_weight']:.3f}", _percent(fmean(row["sparsity"] for row in mine)), str(len(mine)),
            *([mask or "dense"] if masks else []), scheme, method,
        ])  # fmt: skip
    head = ["kind", "error, mean", "worst", "bits/weight", "zeros", "linears", *(["mask"] if masks else []), "scheme",
            "method"]  # fmt: skip
    about = f"Error: {_lost(rows)}, that is of |dW x|² over |W x|² on the calibration data, or of |dW|² over |W|² "
    about += "where no data was needed. Zeros also count codes that happen to be zero; a mask says what was pruned."
    return [table(head, lines, words=("mask", "scheme", "method")), paragraph(about, dim=True)]


def _maps(rows: Sequence[Row], lossy: Sequence[Row]) -> list[str]:
    """Tables of blocks by kinds for error (of the rows in `lossy`), bits and zeros."""
    if not rows:
        return []
    cells = _cells(rows)
    errors = {p: fmean(r["rel_error"] for r in mine) for p, mine in _cells(lossy).items()}
    bits = {p: fmean(r["bits_per_weight"] for r in mine) for p, mine in cells.items()}
    zeros = {p: fmean(r["sparsity"] for r in mine) for p, mine in cells.items()}
    shades = dict(zip(errors, _log(list(errors.values())), strict=True))
    parts: list[str] = [paragraph(f"Error ({_lost(lossy)}); the darker, the more, on a logarithmic scale.")]
    parts.append(_map({p: Cell(_percent(e), shades[p]) for p, e in errors.items()}))
    if len(set(bits.values())) == 1:
        parts.append(paragraph(f"Bits per weight: {next(iter(bits.values())):.3f} everywhere."))
    else:
        shades = dict(zip(bits, _even(list(bits.values())), strict=True))
        parts.append(paragraph("Bits per weight."))
        parts.append(_map({p: Cell(f"{b:.2f}", shades[p]) for p, b in bits.items()}))
    if any(row["mask"] for row in rows):
        parts.append(paragraph("Zeros, of all weights of the linear."))
        parts.append(_map({p: Cell(_percent(z), z) for p, z in zeros.items()}))
    if any(len(mine) > 1 for mine in cells.values()):
        parts.append(paragraph("Experts of a block share a cell: their mean.", dim=True))
    return parts


def _cells(rows: Sequence[Row]) -> dict[_Place, list[Row]]:
    found: dict[_Place, list[Row]] = {}
    for row in rows:
        found.setdefault(place_of(row["name"]), []).append(row)
    return found


def _map(cells: Mapping[_Place, Cell]) -> Html:
    blocks = sorted({p.block for p in cells}, key=lambda b: (not b.isdigit(), int(b) if b.isdigit() else 0))
    kinds = list(dict.fromkeys(p.kind for p in cells))
    rows: list[list[str | Cell]] = [[b, *(cells.get(_Place(b, kind), "") for kind in kinds)] for b in blocks]
    return table(["block", *(kind.replace("_proj", "") for kind in kinds)], rows, heat=True)


def _log(values: Sequence[float]) -> list[float]:
    """Shares from the least to the greatest, on a logarithmic scale; 0 where all are alike."""
    floor = min((v for v in values if v > 0), default=1.0)
    return _even([math.log(max(v, floor)) for v in values])


def _even(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def _ranking(report: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    if (target := report.get("size_target")) is not None:
        found = sorted(target["groups"], key=lambda g: -g["predicted_kl"])
        most = max(found[0]["predicted_kl"], 1e-12)
        lines: list[list[str | Cell]] = [
            [
                g["name"], Cell(f"{g['predicted_kl']:.2g}", g["predicted_kl"] / most), f"{g['bits_per_weight']:.3f}",
                g["scheme"],
            ]
            for g in found
        ]  # fmt: skip
        about = (
            "By the survey: what the scheme of these linears alone does to the KL of the next token, in nats. "
            f"Asked for {target['bits']:g} bits per weight, {target['bits_per_weight']:.3f} reached; predicted KL "
            f"{target['predicted_kl']:.3g}."
        )
        head = ["linears", "KL alone", "bits/weight", "scheme"]
    else:
        ranked = sorted(rows, key=lambda row: -row["rel_error"])
        most = max((row["rel_error"] for row in ranked), default=0.0) or 1.0
        lines = [
            [
                row["name"], Cell(_percent(row["rel_error"]), row["rel_error"] / most),
                f"{row['bits_per_weight']:.3f}", row["scheme"],
            ]
            for row in ranked
        ]  # fmt: skip
        about = f"By {_lost(rows)} with the scheme that they have. `bitpress scan MODEL` measures other schemes too."
        head = ["linear", "error", "bits/weight", "scheme"]
    parts: list[str] = [paragraph(about), table(head, lines[:TOP], words=("scheme",))]
    if len(lines) > TOP:
        parts.append(folded(f"All {len(lines)}", table(head, lines[:MOST], words=("scheme",))))
    parts += _profiles(report.get("sparsity_profiles", []))
    return parts


def _profiles(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Shares of zeros that a survey spread over the blocks."""
    parts: list[str] = []
    for profile in found:
        parts.append(paragraph(f"{profile['method']}: the share of zeros of each block, by its share of outliers."))
        most = max(profile["outliers"], default=0.0) or 1.0
        lines: list[list[str | Cell]] = [
            [str(i), Cell(_percent(out), out / most), Cell(_percent(share), share)]
            for i, (out, share) in enumerate(zip(profile["outliers"], profile["sparsity"], strict=True))
        ]
        parts.append(table(["block", "outliers", "zeros"], lines))
    return parts


def _phases(totals: Mapping[str, Any]) -> list[str]:
    spent, peaks = totals["seconds_by_phase"], totals.get("peak_bytes_by_phase", {})
    device = bool(totals["peak_device_bytes"])
    whole = max(totals["seconds"], 1e-9)
    other = max(0.0, totals["seconds"] - sum(spent.values()))
    lines: list[list[str | Cell]] = []
    for phase, seconds in [*spent.items(), ("other", other)]:
        peak = peaks.get(phase)
        sizes = [] if peak is None else [sized(peak["host"]), *([sized(peak["device"])] if device else [])]
        lines.append([phase, Cell(f"{seconds:.1f} s", seconds / whole), f"{seconds / whole:.0%}", *sizes])
    totalled = [sized(totals["peak_host_bytes"]), *([sized(totals["peak_device_bytes"])] if device else [])]
    lines.append(["whole run", f"{totals['seconds']:.1f} s", "100%", *totalled])
    head = ["phase", "time", "share", "host memory", *(["device memory"] if device else [])]
    about = "Peaks. A phase in which the process reached no new peak shows its size at the phase's ends."
    if totals.get("resumed_shards"):
        held = counted(totals["resumed_shards"], "shard")
        about += (
            f" The run was interrupted: {held} of earlier attempts, whose times and peaks are counted as far as they "
        )
        about += "were noted."
    return [table(head, lines), paragraph(about, dim=True)]


def _data(report: Mapping[str, Any]) -> list[str]:
    data = report.get("data")
    if not data:
        return [paragraph("None was needed.")]
    length = f"{data['min_length']:,}" if data["min_length"] == data["max_length"] else (
        f"{data['min_length']:,} to {data['max_length']:,}"
    )  # fmt: skip
    lines = {
        "source": f"{data['source']}" + (f", split {data['split']}" if data["split"] else ""),
        "sequences": f"{data['sequences']:,} of {length} tokens, {data['tokens']:,} in all",
        "made by": ", ".join([
            "texts joined and cut" if data["packed"] else "a row each",
            f"shuffled by seed {data['seed']}" if data["shuffled"] else "in order",
        ]),
        "fingerprint": Html(f'sha256 <span class="hash">{safe(data["fingerprint"])}</span>'),
    }  # fmt: skip
    return [table(("", " "), lines.items(), words=(" ",))]


def _training(found: Mapping[str, Any]) -> list[str]:
    """The last training stage: its data, and the loss as it fell."""
    data = found["data"]
    parts: list[str] = [
        paragraph(f"{counted(found['steps'], 'step')} on {counted(data['sequences'], 'sequence')} of {data['source']}.")
    ]
    points = [(entry["step"], entry["loss"]) for entry in found["log"] if "loss" in entry and "step" in entry]
    if len(points) > 1:
        judged = {f"{e['eval_loss']:.3g}": (e["step"], e["eval_loss"]) for e in found["log"] if "eval_loss" in e}
        parts.append(curve_svg(points, judged, None, "step", "loss"))
        parts.append(paragraph("Line: loss in training, on a logarithmic scale. Dots: on held-out data.", dim=True))
    figures = {name: value for name, value in found["metrics"].items() if isinstance(value, int | float)}
    parts.append(table(("", " "), [(name, f"{value:,.4g}") for name, value in figures.items()]))
    return parts


def _generations(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [paragraph("None were asked for: `bitpress report OUT --prompt TEXT` adds some.")]
    parts: list[str] = [paragraph(found["note"], dim=True)] if found.get("note") else []
    return parts + [answers(a["prompt"], {"before": a["before"], "after": a["after"]}) for a in found["answers"]]


def _again(command: str | None) -> list[str]:
    return [paragraph("To do it again:", dim=True), code(command, folds=True)] if command else []


def _all(rows: Sequence[Row], report: Mapping[str, Any]) -> list[str]:
    several = any("stage" in row for row in rows)
    tuned = any(row.get("tuned") for row in rows)
    head = ["linear", "error", "bits/weight", "zeros", "mask", "scheme", "method", *(["stage"] if several else []),
            "tokens", "seconds", *(["tuned, error of the block"] if tuned else [])]  # fmt: skip
    lines = []
    for row in rows[:MOST]:
        moved = [_tuned(row.get("tuned"))] if tuned else []
        lines.append([
            row["name"], _percent(row["rel_error"]), f"{row['bits_per_weight']:.3f}", _percent(row["sparsity"]),
            row["mask"], row["scheme"], row["method"], *([row["stage"]] if several else []),
            f"{row['tokens']:,}", f"{row['seconds']:.2f}", *moved,
        ])  # fmt: skip
    words = ("mask", "scheme", "method", "stage")
    parts: list[str] = [folded(counted(len(rows), "row"), table(head, lines, words=words, whole=True))]
    if len(rows) > MOST:
        parts.append(paragraph(f"The first {MOST:,}; report.json has all.", dim=True))
    policies = [f"{row['name']}: statistics of {row['policy']}" for row in rows if row["policy"]]
    if policies:
        parts.append(folded(f"{counted(len(policies), 'expert')} with too few tokens", bullets(policies[:MOST])))
    if said := [f"{row['name']}: {row['note']}" for row in rows if row.get("note")]:
        parts.append(folded(f"{counted(len(said), 'linear')} solved out of the ordinary", bullets(said[:MOST])))
    if report.get("ignored"):
        names = sorted({re.sub(r"\d+", "*", name) for name in report["ignored"]})
        parts.append(paragraph(f"Left as they are: {', '.join(names)}."))
    return parts


def _tuned(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if found.get("loss") == "kl":
        return f"{found['before']:.4f} to {found['after']:.4f} nats (KL of the model)"
    return f"{_percent(found['before'])} to {_percent(found['after'])}"
