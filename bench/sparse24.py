"""Products of Llama-3-8B's linears on a GPU: dense bfloat16, dense int4, 2:4 bfloat16 by both of torch's backends.

python bench/sparse24.py [--batches 1 16 256] [--repeats 20] [--results FILE]

int4 is torch's `_weight_int4pack_mm`, groups of 128; 2:4 is `to_sparse_semi_structured`. Products with as many copies
of a weight as no cache holds are captured in one CUDA graph; a time is the median replay over the number of copies, so
neither launches nor the cache count. What cannot be captured is launched one by one and marked `*`: then launches
count. torch pads the rows of a 2:4 product to a multiple of 8; the copies that it makes for that are in the time.
Prints Markdown; each cell goes to --results (default: stderr) as a JSON line when it is measured, and a product that
torch refuses says why.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
KINDS = ("dense bf16", "int4", "2:4 CUTLASS", "2:4 cuSPARSELt")
GROUP = 128
COLD = 256 << 20  # bytes of weights in a graph: five times the L2 cache of an H100

REFUSALS = (RuntimeError, NotImplementedError, ValueError, AttributeError, AssertionError)  # what torch says no with

Product = Callable[[Tensor], Tensor]


def two_of_four(weight: Tensor) -> Tensor:
    """The weight with the two largest of every four columns."""
    fours = weight.reshape(-1, 4)
    keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.abs().topk(2, dim=1).indices, True)
    return (fours * keep).reshape(weight.shape)


def int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (R, C) as torch's packed int4, its scales, and the weight that they mean."""
    R, C = weight.shape
    grouped = weight.float().reshape(R, C // GROUP, GROUP)
    scale = (grouped.abs().amax(-1, keepdim=True) / 7.5).to(torch.bfloat16).float()
    codes = (grouped / scale).round().clamp(-8, 7)
    dense = (codes * scale).reshape(R, C).to(torch.bfloat16)
    stored = (codes + 8).to(torch.int32).reshape(R, C)
    packed = torch._convert_weight_to_int4pack(((stored[:, ::2] << 4) | stored[:, 1::2]).to(torch.uint8), 8)
    scales = torch.stack([scale[..., 0].T, torch.zeros_like(scale[..., 0].T)], -1).to(torch.bfloat16).contiguous()
    return packed, scales, dense


def prepared(kind: str, weight: Tensor) -> tuple[list[Product], Tensor, int]:
    """Products with copies of the weight in that form, the weight that they mean, and the bytes of one copy."""
    if kind == "int4":
        packed, scales, meant = int4(weight)
        size = packed.nbytes + scales.nbytes
        pairs = [(packed.clone(), scales.clone()) for _ in range(copies(size))]
        return [partial(_int4_product, packed=p, scales=s) for p, s in pairs], meant, size
    if kind == "dense bf16":
        return [partial(F.linear, weight=weight.clone()) for _ in range(copies(weight.nbytes))], weight, weight.nbytes
    SparseSemiStructuredTensor._FORCE_CUTLASS = kind.endswith("CUTLASS")
    masked = two_of_four(weight)
    first: Any = to_sparse_semi_structured(masked)
    size = sum(t.nbytes for t in (first.packed, first.meta) if t is not None)
    sparse = [first, *(to_sparse_semi_structured(masked) for _ in range(copies(size) - 1))]
    return [partial(F.linear, weight=s) for s in sparse], masked, size


def _int4_product(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch._weight_int4pack_mm(x, packed, GROUP, scales)


def copies(size: int) -> int:
    """How many weights of that many bytes no cache holds."""
    return max(2, -(-COLD // size))


def microseconds(products: Sequence[Product], x: Tensor, repeats: int) -> tuple[float, str]:
    """Median time of one product, weights not in the cache; and why launches are in it, if they are."""

    def all_of_them() -> None:
        for product in products:
            product(x)

    for _ in range(3):
        all_of_them()
    torch.cuda.synchronize()
    graph, why = torch.cuda.CUDAGraph(), ""
    try:
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            all_of_them()
        again: Callable[[], None] = graph.replay
        again()
        torch.cuda.synchronize()
    except RuntimeError as error:
        again, why = all_of_them, brief(error)
        again()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        again()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(products))
    return statistics.median(times), why


def brief(error: BaseException) -> str:
    """The first line of an error, for a cell of a table."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first.replace("|", "/")[:90]


@torch.no_grad()
def measure(kind: str, name: str, batches: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """The lines of a kind of product with one weight, at every batch."""
    rows, columns = SHAPES[name]
    line: dict[str, Any] = {"kind": kind, "linear": name, "rows": rows, "columns": columns}
    torch.manual_seed(0)
    try:
        products, meant, size = prepared(kind, torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16))
    except REFUSALS as error:
        return [{**line, "batch": batch, "refused": brief(error)} for batch in batches]
    lines = []
    for batch in batches:
        try:
            x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
            exact = x.float() @ meant.float().T
            error = float((products[0](x).float() - exact).abs().max() / exact.abs().max())
            us, launched = microseconds(products, x, repeats)
            found = {"us": round(us, 2), "launched": launched, "error": error, "megabytes": round(size / 1e6, 2)}
        except REFUSALS as refusal:
            found = {"refused": brief(refusal)}
        lines.append({**line, "batch": batch, **found})
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: microseconds, with how many times faster than dense bfloat16; then sizes and errors."""
    by = {(line["linear"], line["batch"], line["kind"]): line for line in lines}
    out = ["| linear | batch | " + " | ".join(f"{kind}, us" for kind in KINDS) + " |", "|---" * (2 + len(KINDS)) + "|"]
    for name, batch in dict.fromkeys((line["linear"], line["batch"]) for line in lines):
        dense = by[name, batch, KINDS[0]].get("us")
        cells = []
        for kind in KINDS:
            one = by[name, batch, kind]
            if "us" not in one:
                cells.append(f"refused: {one['refused']}")
                continue
            faster = f" ({dense / one['us']:.2f}x)" if dense and kind != KINDS[0] else ""
            cells.append(f"{one['us']:.1f}{'*' if one['launched'] else ''}{faster}")
        rows, columns = SHAPES[name]
        out.append(f"| {name} ({rows} x {columns}) | {batch} | " + " | ".join(cells) + " |")
    out += ["", "| form | MB, " + ", ".join(SHAPES) + " | largest error, of the largest output |", "|---|---|---|"]
    for kind in KINDS:
        mine = [line for line in lines if line["kind"] == kind and "us" in line]
        sizes = {line["linear"]: f"{line['megabytes']:.1f}" for line in mine}
        worst = f"{max(line['error'] for line in mine):.1e}" if mine else ""
        out.append(f"| {kind} | {', '.join(sizes.get(name, '-') for name in SHAPES)} | {worst} |")
    launched = dict.fromkeys(line["launched"] for line in lines if line.get("launched"))
    return "\n".join([*out, *(["", "* with launches: " + "; ".join(launched)] if launched else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 256])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    lines = []
    for kind in KINDS:
        for name in SHAPES:
            for line in measure(kind, name, args.batches, args.repeats):
                text = json.dumps(line)
                lines.append(line)
                if args.results is None:
                    print(text, file=sys.stderr, flush=True)
                else:
                    with args.results.open("a") as file:
                        file.write(text + "\n")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, microseconds a product\n\n{table(lines)}")


if __name__ == "__main__":
    main()
