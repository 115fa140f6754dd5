"""Seconds a block of GPTQ W4A16 on a GPU: a model of Llama-3-8B's shapes with random weights, streamed from disk.

python bench/gpu.py [--blocks 4] [--samples 512] [--length 2048] [--group-size 128] [--refine 2 0] [--work DIR]

Speed does not depend on the values of the weights. The first run compiles the kernels; each value of --refine is run
once, after a run with 8 samples that is not counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

VOCAB = 32000


def write_model(folder: Path, blocks: int) -> None:
    """Save the model, made on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=VOCAB, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def measure(model: Path, out: Path, rows: list[list[int]], group_size: int, refine: int) -> dict[str, Any]:
    """One run; the totals of its report."""
    from bitpress import oneshot
    from bitpress.modifiers.quantization import GPTQModifier

    shutil.rmtree(out, ignore_errors=True)
    torch.cuda.reset_peak_memory_stats()
    oneshot(
        model=model,
        dataset=[{"input_ids": row} for row in rows],
        recipe=GPTQModifier(scheme="W4A16", group_size=group_size, ignore=["lm_head"], refine=refine),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        output_dir=out,
    )
    totals: dict[str, Any] = json.loads((out / "report.json").read_text())["totals"]
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--refine", type=int, nargs="+", default=(2, 0))
    parser.add_argument("--work", type=Path, help="where the temporary model and its checkpoints go")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCAB, (args.samples, args.length), generator=generator).tolist()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        model, out = Path(work) / "model", Path(work) / "out"
        write_model(model, args.blocks)
        measure(model, out, rows[:8], args.group_size, args.refine[0])
        for refine in args.refine:
            totals = measure(model, out, rows, args.group_size, refine)
            phases = {name: round(s / args.blocks, 3) for name, s in totals["seconds_by_phase"].items()}
            print(
                f"refine {refine}: {sum(phases.values()):.2f} s a block {phases}, whole run {totals['seconds']:.1f} s, "
                f"mean error {totals['mean_rel_error']:.5f}, device {totals['peak_device_bytes'] / 1e9:.1f} GB, "
                f"host {totals['peak_host_bytes'] / 1e9:.1f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
