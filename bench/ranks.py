"""How much faster several GPUs are: GPTQ W4A16 on a model of Llama-3-8B's shapes, by phase.

python bench/ranks.py [--gpus 1 2] [--blocks 4] [--samples 512] [--length 2048] [--work DIR]

Each number of GPUs is one start of torchrun, in which a run with few samples that is not counted goes first. The
figure that scales with the data is statistics and propagation (both forwards and the Gram matrices, with the sums over
the GPUs); solving is divided by linears, so it scales as far as they can be divided.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu import VOCAB, write_model


def worker(args: argparse.Namespace) -> None:
    """One of the processes that torchrun has started."""
    from bitpress import oneshot, ranks
    from bitpress.modifiers.quantization import GPTQModifier
    from bitpress.run import Run

    real = Run.timed

    def timed(self: Run, phase: str, start: float) -> float:
        torch.cuda.synchronize()  # a phase ends when the GPU has done it
        return real(self, phase, start)

    Run.timed = timed  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCAB, (args.samples, args.length), generator=generator).tolist()
    recipe = GPTQModifier(scheme="W4A16", group_size=128, ignore=["lm_head"])
    for count in (8 * ranks.started(), len(rows)):
        data: list[dict[str, Any]] = [{"input_ids": row} for row in rows[:count]]
        oneshot(
            args.work / "model", data, recipe, num_calibration_samples=count, max_seq_length=args.length,
            output_dir=args.out, fresh=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--work", type=Path, help="where the temporary model and its checkpoints go")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is not None:
        worker(args)
        return
    work = Path(tempfile.mkdtemp(dir=args.work))
    try:
        write_model(work / "model", "8b", args.blocks)
        torch.cuda.empty_cache()
        measured: dict[int, dict[str, float]] = {}
        for number in args.gpus:
            out = work / f"out-{number}"
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
            options = [f"--samples={args.samples}", f"--length={args.length}", f"--work={work}", f"--out={out}"]
            subprocess.run([*launcher, __file__, *options], check=True)
            totals = json.loads((out / "report.json").read_text())["totals"]
            phases = {name: s / args.blocks for name, s in totals["seconds_by_phase"].items()}
            phases["forward"] = phases.get("statistics", 0.0) + phases.get("propagate", 0.0)
            measured[number] = phases
            first = measured[args.gpus[0]]
            forward, solve = (first[name] / phases[name] for name in ("forward", "solve"))
            spoken = ", ".join(f"{name} {s:.3f}" for name, s in phases.items())
            print(
                f"{number} GPU: seconds a block: {spoken}; whole run {totals['seconds']:.1f} s, mean error "
                f"{totals['mean_rel_error']:.6f}; {forward:.2f} times as fast in statistics and propagation, "
                f"{solve:.2f} in solving",
                flush=True,
            )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
