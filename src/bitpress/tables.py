"""Results as tables for a terminal. Nothing here prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bitpress.errors import counted, sized

if TYPE_CHECKING:
    from bitpress.compare import Compared, Comparison
    from bitpress.evaluate import Evaluation
    from bitpress.inspection import Inspection
    from bitpress.plan import Plan
    from bitpress.recognise import QuantizedLayer
    from bitpress.scan import Scan
    from bitpress.sites import Site


def evaluation_table(result: Evaluation) -> Table:
    """Base and checkpoint side by side; the caption names the text and what differs from the request."""
    from bitpress.evaluate import windows_of

    about = windows_of(result.windows, result.length, result.text)
    table = Table(caption=Text("\n".join((about, *result.notes))), caption_justify="left")
    for name in ("", "base", "checkpoint", "change"):
        table.add_column(name, justify="left" if name == "" else "right")
    base, own = result.base_perplexity, result.perplexity
    table.add_row("perplexity", f"{base:.4f}", f"{own:.4f}", _change(base, own))
    table.add_row("KL to base, mean (nats)", "", f"{result.kl:.5f}", "")
    table.add_row("KL to base, 99 % (nats)", "", f"{result.kl_p99:.5f}", "")
    table.add_row("same top token", "", f"{result.top1:.2%}", "")
    sizes = result.base_bytes, result.bytes
    table.add_row("size", *map(sized, sizes), _change(*sizes))
    speeds = result.base_tokens_per_second, result.tokens_per_second
    table.add_row("forward (tokens/s)", *(f"{speed:,.0f}" for speed in speeds), _change(*speeds))
    return table


def comparison_table(result: Comparison) -> RenderableType:
    """A column for the base and each checkpoint; then what each answers to each prompt."""
    from bitpress.evaluate import windows_of

    about = f"{windows_of(result.windows, result.length, result.text)}, in {result.dtype}"
    models = (result.base, *result.checkpoints)
    shown = {name: value for name, value in COMPARED.items() if any(map(value, models))}
    parts: list[RenderableType] = []
    for start in range(0, len(result.checkpoints), BESIDE):  # more columns would not be readable
        some = (result.base, *result.checkpoints[start : start + BESIDE])
        last = start + BESIDE >= len(result.checkpoints)
        table = Table(caption=Text(about) if last else None, caption_justify="left")
        table.add_column("", no_wrap=True)
        for model in some:
            table.add_column(Text(model.name, overflow="fold"), justify="right", overflow="fold")
        for name, value in shown.items():
            table.add_row(name, *(Text(value(model)) for model in some))
        parts.append(table)
    for i, prompt in enumerate(result.prompts):
        said = Table.grid(padding=(0, 2))
        for model in models:
            said.add_row(Text(model.name, style="bold"), Text(model.answers[i] if model.answers else "-"))
        parts += [Text(f"\n{prompt}", style="italic"), said]
    parts += [Text(f"note: {m.name}: {note}") for m in models for note in m.notes]
    parts += [Text(f"failed: {m.name}: {m.error}", style="red") for m in result.failed]
    return Group(*parts)


def _or(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


BESIDE = 3  # checkpoints in a table, beside their base
# what a comparison says of each model, for the terminal and the page
COMPARED: dict[str, Callable[[Compared], str]] = {
    "kind": lambda m: m.kind.replace(", ", "\n"),
    "size": lambda m: "" if m.bytes is None else sized(m.bytes),
    "bits/weight": lambda m: _or(m.bits_per_weight, ".3f"),
    "bits/parameter": lambda m: _or(m.bits_per_parameter, ".2f"),
    "load (s)": lambda m: _or(m.load_seconds, ".2f"),
    "forward (tokens/s)": lambda m: _or(m.tokens_per_second, ",.0f"),
    "generation (tokens/s)": lambda m: _or(m.generated_per_second, ",.1f"),
    "perplexity": lambda m: _or(m.perplexity, ".4f"),
    "KL, mean (nats)": lambda m: _or(m.kl, ".5f"),
    "KL, 99 % (nats)": lambda m: _or(m.kl_p99, ".5f"),
    "same top token": lambda m: _or(m.top1, ".2%"),
}


def scan_table(scan: Scan, *, whole: bool) -> RenderableType:
    """Errors by kind of layer (or of each, `whole`) and width, the curve, and what is suggested."""
    from bitpress.scan import COLUMNS
    from bitpress.views.charts import curve_text
    from bitpress.views.scan import UNIT, kinds_of

    heads = [f"{c} bits" if c.isdigit() else c for c in COLUMNS]
    table = Table(caption=Text(f"{UNIT[scan.measure]}{'' if whole else '; mean and worst of each kind'}"))
    table.add_column("linears", overflow="fold")
    for name in heads:
        table.add_column(name, justify="right")
    rows = {x.name: [x] for x in scan.layers} if whole else kinds_of(scan.layers)
    for name, mine in rows.items():
        found = [[x.errors[c] for x in mine if c in x.errors] for c in COLUMNS]
        cells = (f"{sum(e) / len(e):.2g}" + ("" if whole else f" {max(e):.2g}") if e else "" for e in found)
        table.add_row(Text(name), *cells)
    uniform = {c: (p.bits_per_weight, p.error) for c, p in scan.uniform.items() if c.isdigit()}
    chosen = None if scan.suggestion is None else (scan.suggestion.point.bits_per_weight, scan.suggestion.point.error)
    plot = curve_text([(p.bits_per_weight, p.error) for p in scan.curve], uniform, chosen)
    star = "" if chosen is None else "; *: the suggestion"
    under = f"error by stored bits per weight; dots: the best mixture of a size; a digit: that width everywhere{star}"
    parts: list[RenderableType] = [table, Text(f"\n{plot}\n{under}\n")]
    if (made := scan.suggestion) is not None:
        schemes = ", ".join(f"{n / sum(made.schemes.values()):.0%} {s}" for s, n in made.schemes.items())
        point = (
            f"{made.point.bits_per_weight:.3f} bits per weight, {sized(made.point.bytes)}, error {made.point.error:.4g}"
        )
        parts.append(Text(f"suggested for {made.asked}: {point}; {schemes}"))
    return Group(*parts, *(Text(f"note: {note}") for note in scan.notes))


def inspection_table(inspection: Inspection, limit: int | None = None) -> RenderableType:
    """What a checkpoint is, and its quantized linears.

    Args:
        limit: with more linears than this, those of one kind and scheme share a row; None is a row each.
    """
    parts: list[RenderableType] = [_facts(inspection)]
    layers = inspection.layers
    if layers and (limit is None or len(layers) <= limit):
        parts.append(_layer_rows(layers))
    elif layers:
        counts = Counter(layer.scheme for layer in layers)
        parts += [Text(f"{counted(count, 'layer')} {label}") for label, count in counts.most_common()]
        parts.append(_kind_rows(layers))
    parts += [Text(f"note: {message}") for message in inspection.messages]
    return Group(*parts)


def plan_table(plan: Plan, limit: int | None) -> RenderableType:
    """What a run would do: sites by kind (or each, if there are no more than `limit`, or it is None), and its cost."""
    from bitpress.sites import bits_per_weight, label

    table = _name_table("linear", "method", "scheme")
    for name in ("linears", "shape", "bits/weight"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, ...], list[Site]] = {}
    surveyed = set() if plan.target is None else {s.name for g in plan.target.groups for s in g.sites}
    for site in plan.sites:
        whole = limit is None or len(plan.sites) <= limit
        name = site.name if whole else site.name.rpartition(".")[2]
        scheme = "by survey" if site.name in surveyed else label(site.group)
        groups.setdefault((name, site.method, scheme, f"{site.rows} x {site.columns}"), []).append(site)
    for (name, method, scheme, shape), sites in groups.items():
        bits = "" if sites[0].name in surveyed else f"{bits_per_weight(sites[0]):.3f}"
        table.add_row(Text(name), method, scheme, str(len(sites)), shape, bits)
    cost = Table.grid(padding=(0, 2))
    exact = f"{sized(plan.output_bytes)} ({plan.output_bytes:,} bytes of weights, exact)"
    if (target := plan.target) is not None:
        low, high = (sum(f(g.sizes.values()) for g in target.groups) / target.weights for f in (min, max))
        exact = f"about {sized(plan.output_bytes)} at most: exact once the survey has chosen"
        many = f"{target.bits:g} bits per weight, for {len(target.groups)} groups of linears that share a scheme"
        cost.add_row("size target", f"{many}; possible: {low:.3f} to {high:.3f}")
        cost.add_row("chosen from", Text(", ".join(target.choices)))
    cost.add_row("output", exact)
    cost.add_row("host memory", f"about {sized(plan.host_bytes)}")
    if plan.device_bytes:
        cost.add_row("device memory", f"about {sized(plan.device_bytes)}")
    if plan.masked:
        cost.add_row("zeros kept", f"while training, in {counted(len(plan.masked), 'linear')}")
    cost.add_row("calibration data", "; ".join(plan.reads) or "not needed: no forward pass")
    if plan.needs_stats:
        cost.add_row("batch", f"{counted(plan.batch_size, 'sequence')}, hidden states on the {plan.hidden_on}")
    named = {site.name for site in plan.sites}
    left = [name for name in plan.ignored if name not in named]  # what is only pruned is not quantized, but not left
    cost.add_row("left as they are", Text(", ".join(left[:8]) + (" ..." if len(left) > 8 else "")))
    return Group(table, cost)


def report_table(report: Mapping[str, Any], limit: int | None) -> RenderableType:
    """A run's report.json: layers by kind (or each, if there are no more than `limit`, or it is None), and totals."""
    rows = report["layers"]
    table = _name_table("linear", "method", "scheme")
    whole = limit is None or len(rows) <= limit
    for name in (*(() if whole else ("linears",)), "lost energy,\nmean", "worst", "bits/\nweight"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        name = row["name"] if whole else row["name"].rpartition(".")[2]
        groups.setdefault((name, row["method"], row["scheme"]), []).append(row)
    for (name, method, scheme), group in groups.items():
        errors = [row["rel_error"] for row in group]
        bits = f"{group[0]['bits_per_weight']:.3f}"
        mean = f"{sum(errors) / len(errors):.3%}"
        count = () if whole else (str(len(group)),)
        table.add_row(Text(name), method, scheme, *count, mean, f"{max(errors):.3%}", bits)
    totals = report["totals"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("weights written", sized(totals["output_bytes"]))
    if "bits_per_weight" in totals:
        left = f", {totals['left_dense']} left dense counted" if "left_dense" in totals else ""
        facts.add_row("bits per weight", f"{totals['bits_per_weight']:.3f} on average{left}")
    if pruned := [row for row in rows if row.get("mask")]:
        zeros, masks = (
            sum(row["sparsity"] for row in pruned) / len(pruned),
            dict.fromkeys(row["mask"] for row in pruned),
        )
        facts.add_row("pruned", f"{counted(len(pruned), 'linear')}, {zeros:.1%} zeros on average, {', '.join(masks)}")
    facts.add_row("time", f"{totals['seconds']:.1f} s")
    facts.add_row("peak memory", f"{sized(totals['peak_host_bytes'])} host")
    if totals["peak_device_bytes"]:
        facts.add_row("", f"{sized(totals['peak_device_bytes'])} device")
    if totals.get("policies"):
        facts.add_row(
            "policy",
            f"{counted(totals['policies'], 'linear')} of experts took statistics from all tokens; see report.json",
        )
    return Group(table, facts)


def _facts(inspection: Inspection) -> Table:
    method = inspection.method + (f" ({inspection.format})" if inspection.format else "")
    model = [*inspection.architectures[:1], inspection.model_type, inspection.dtype]
    stored = f"{sized(inspection.bytes)} in {counted(inspection.shards, 'file')}"
    if inspection.bits_per_parameter is not None:
        stored += f", {inspection.parameters:,} parameters, {inspection.bits_per_parameter:.2f} bits per parameter"
    rows = {
        "checkpoint": inspection.path,
        "method": method,
        "model": ", ".join(str(word) for word in model if word),
        "size": stored,
        "ignored": ", ".join(inspection.ignored),
        "cache": inspection.cache or "",
        "pruned": f"{inspection.pruned} (report.json)" if inspection.pruned else "",
        "tied": "output head and input embedding are one" if inspection.tied_embeddings else "",
    }
    if inspection.bits_per_weight is not None:
        rows["quantized"] = (
            f"{counted(len(inspection.layers), 'linear')}, {sized(inspection.quantized_bytes)}, "
            f"{inspection.bits_per_weight:.3f} bits per weight"
        )
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # a path is not cut
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def _layer_rows(layers: Sequence[QuantizedLayer]) -> Table:
    table = _name_table("layer", "shape", "scheme")
    table.add_column("bits/weight", justify="right")
    for layer in layers:
        shape = f"{layer.rows} x {layer.columns}"
        table.add_row(Text(layer.name), shape, layer.scheme, f"{layer.bits_per_weight:.3f}")
    return table


def _kind_rows(layers: Sequence[QuantizedLayer]) -> Table:
    """One row for each scheme of each kind: the last part of the name, such as q_proj."""
    groups: dict[tuple[str, str], list[QuantizedLayer]] = {}
    for layer in layers:
        groups.setdefault((layer.name.rpartition(".")[2], layer.scheme), []).append(layer)
    table = Table("kind", "scheme")
    for name in ("layers", "weights", "bits/weight"):
        table.add_column(name, justify="right")
    for (kind, label), group in groups.items():
        weights = sum(layer.rows * layer.columns for layer in group)
        bits = 8 * sum(layer.bytes for layer in group) / weights
        table.add_row(kind, label, str(len(group)), f"{weights:,}", f"{bits:.3f}")
    return table


def _name_table(first: str, *others: str) -> Table:
    """A table whose first column holds names, which are folded where there is no room for them, never cut."""
    table = Table()
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name)
    return table


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""
