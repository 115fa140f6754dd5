"""Matrix products of Llama-3-8B's linears on a GPU: dense bfloat16, 2:4 bfloat16 and dense int4.

python bench/sparse24.py [--batches 1 16 256] [--repeats 50]

2:4 is torch's `to_sparse_semi_structured` (cuSPARSELt where torch has it, else CUTLASS); int4 is torch's
`_weight_int4pack_mm`, groups of 128. Prints microseconds, medians of CUDA event times with a cold L2 cache, the ratio
to dense bfloat16, the largest error of each relative to the largest output, and the bytes of the weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
GROUP = 128


def microseconds(product: Callable[[], Tensor], repeats: int, flush: Tensor) -> float:
    """Median time of a product whose weights are not in the cache."""
    for _ in range(3):
        product()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        product()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


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


def size(weight: Tensor) -> int:
    """Bytes of a weight, those of its mask too."""
    if isinstance(weight, SparseSemiStructuredTensor):
        return sum(t.nbytes for t in (weight.packed, weight.meta) if t is not None)
    return weight.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 256])
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| linear | batch | dense bf16, us | 2:4 bf16, us | ratio | int4, us | ratio | errors | MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    torch.manual_seed(0)
    for name, (rows, columns) in SHAPES.items():
        weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        masked = two_of_four(weight)
        sparse = to_sparse_semi_structured(masked)
        packed, scales, rounded = int4(weight)
        for batch in args.batches:
            x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
            products: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
                "dense": (partial(torch.nn.functional.linear, x, weight), weight),
                "2:4": (partial(torch.nn.functional.linear, x, sparse), masked),
                "int4": (partial(torch._weight_int4pack_mm, x, packed, GROUP, scales), rounded),
            }
            times, errors = {}, []
            for kind, (product, meant) in products.items():
                exact = x.float() @ meant.float().T
                errors.append(float((product().float() - exact).abs().max() / exact.abs().max()))
                times[kind] = microseconds(product, args.repeats, flush)
            dense = times["dense"]
            ratios = " | ".join(f"{times[k]:.1f} | {dense / times[k]:.2f}" for k in ("2:4", "int4"))
            megabytes = " / ".join(f"{b / 1e6:.1f}" for b in (size(weight), size(sparse), size(packed) + size(scales)))
            worst = ", ".join(f"{e:.1e}" for e in errors)
            print(f"| {name} ({rows} x {columns}) | {batch} | {dense:.1f} | {ratios} | {worst} | {megabytes} |")


if __name__ == "__main__":
    main()
