"""What a run did, a row a layer: for report.json, report.html and the terminal."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitpress.oneshot import Arguments
    from bitpress.plan import Plan
    from bitpress.prepare import Prepared
    from bitpress.stages import Done

PAGE = "report.html"
PACKAGES = ("torch", "transformers", "compressed-tensors", "safetensors")


@dataclass(frozen=True)
class LayerReport:
    """One compressed linear.

    Attributes:
        name: its name on disk.
        method, scheme: such as "gptq", "W4A16 g64".
        rel_error: share of energy lost, of the output tr(dW G dW^T) / tr(W G W^T) if `error_of` is "output", of the
            weight |dW|^2 / |W|^2 if it is "weight" (no data was needed).
        bits_per_weight: scales and zero points counted.
        sparsity: share of zeros in the stored weight.
        mask: "2:4" and the like if every group of columns has its zeros, as counted in the stored weight;
            "unstructured" if it is pruned otherwise, "" if it is dense.
        tokens: calibration tokens that this linear's input had; 0 without data.
        policy: "" or why the statistics are not those of its own input.
        note: "" or what was out of the ordinary when it was solved.
        seconds: solving time of the linears that share its input, divided among them.
        tuned: where its block was tuned: on sequences that gave no gradients, `before` and `after`, the share of the
            energy of the block's output that was wrong (`loss` mse) or the divergence of the model's predictions in
            nats a token (`loss` kl, last block), and the `steps` that were best (0: it stayed as solved).
    """

    name: str
    method: str
    scheme: str
    rel_error: float
    error_of: str
    bits_per_weight: float
    sparsity: float
    mask: str
    tokens: int
    policy: str
    seconds: float
    tuned: dict[str, float | str] | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, rounded to what is meaningful."""
        row = asdict(self)
        row["rel_error"] = float(f"{self.rel_error:.5g}")
        row["sparsity"] = round(self.sparsity, 5)
        row["bits_per_weight"] = round(self.bits_per_weight, 5)
        row["seconds"] = round(self.seconds, 4)
        for key in ("tuned", "note"):
            if not row[key]:
                del row[key]
        return row


def write_report(folder: Path, report: dict[str, Any], recipe: str) -> None:
    """Write report.json and the page of it, each whole or not at all; what is no run's report has no page."""
    from bitpress.checkpoint import write_json, write_text
    from bitpress.views.run import run_page

    if "totals" in report:
        write_text(folder / PAGE, run_page(report, recipe, folder.resolve().name))
    else:
        (folder / PAGE).unlink(missing_ok=True)
    write_json(folder / "report.json", report)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import version

    from bitpress import __version__

    return {
        "bitpress": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def totals(rows: list[dict[str, Any]], sizes: dict[str, int], dense: Mapping[str, float]) -> dict[str, Any]:
    """Sums and means over the linears, as the last stage left them.

    Args:
        sizes: number of weights by name.
        dense: stored bits per weight of linears that a size target has left as they are, by name: they count in
            `bits_per_weight` and, where there are any, as `left_dense`; the other figures are of the layers alone.
    """
    rows = list({r["name"]: r for r in rows}.values())
    weights = sum(sizes[r["name"]] for r in rows)
    left = {name: bits for name, bits in dense.items() if not any(r["name"] == name for r in rows)}
    stored = {**{r["name"]: r["bits_per_weight"] for r in rows}, **left}
    all_weights = sum(sizes[name] for name in stored)
    if not all_weights:
        return {"layers": 0}

    def mean(key: str) -> float:
        return float(sum(r[key] * sizes[r["name"]] for r in rows)) / max(weights, 1)

    return {
        "layers": len(rows),
        "weights": weights,
        **({"left_dense": len(left)} if left else {}),
        "bits_per_weight": round(sum(bits * sizes[name] for name, bits in stored.items()) / all_weights, 4),
        "mean_rel_error": float(f"{mean('rel_error'):.5g}"),
        "sparsity": round(mean("sparsity"), 5),
        "policies": sum(bool(r["policy"]) for r in rows),
    }


def of_run(
    args: Arguments,
    ready: Prepared,
    plan: Plan,
    done: Done,
    identity: dict[str, Any],
    numerics: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """report.json of a stage, and of the stages before it.

    Args:
        seconds: since this attempt of the run began.
    """
    import resource

    import torch

    from bitpress.again import again

    sizes, rows = {s.name: s.rows * s.columns for s in (*ready.plan.sites, *ready.plan.masked)}, done.rows
    targets = [p.target for p in ready.plans if p.target is not None]
    dense = {s.name: 8.0 * s.dtype.itemsize for t in targets for g in t.groups for s in g.sites}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device_peak = torch.cuda.max_memory_allocated(ready.device) if ready.device.type == "cuda" else 0
    return {
        "layers": rows,
        "totals": {
            **totals(rows, sizes, dense),
            "output_bytes": plan.output_bytes,
            "seconds": round(done.phases.earlier + seconds, 2),
            **done.phases.to_dict(),
            **({"resumed_shards": done.resumed} if done.resumed else {}),
            "peak_host_bytes": max(peak, *done.phases.host.values()),
            "peak_device_bytes": max(device_peak, *done.phases.device.values()),
        },
        **done.surveys,
        "ignored": list(plan.ignored),
        "notes": list(done.plan.notes) + (list(ready.data.notes) if ready.data else []),
        "data": dict(ready.data.summary) if ready.data else None,
        "again": again(args, _recipe_of(args, ready)),
        "seed": args.seed,
        "numerics": numerics,
        "versions": versions(),
        "run": identity,
    }


def _recipe_of(args: Arguments, ready: Prepared) -> Path | None:
    """Where the recipe of a whole run is, or of a stage that was asked for alone; None if it is nowhere."""
    if args.verb == "apply" and args.stage is not None:  # its own holds this stage only
        return Path(args.recipe).resolve() if isinstance(args.recipe, str | os.PathLike) else None
    return None if ready.output is None else ready.output.resolve() / "recipe.yaml"
