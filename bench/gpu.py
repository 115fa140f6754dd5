"""Seconds a block on a GPU, of bitpress and of llm-compressor, on the same model and tokens, one after the other.

python bench/gpu.py [--shape 8b|70b|moe] [--cases gptq ...] [--blocks 3] [--samples 512] [--length 2048]
    [--max-memory 40GiB] [--peer PYTHON] [--peer-batch 1] [--work DIR]

The model has the shapes of Llama-3-8B, Llama-3-70B or Qwen3-30B-A3B and random weights, made on the GPU: speed
depends on them little, by how soon AWQ gives a curve up and which experts tokens go to. bitpress streams it from disk
and writes the checkpoint; --peer is the interpreter of llm-compressor's environment, which starts with a loaded model
and ends before saving. Each case runs after one with 8 samples, which compiles the kernels, and once more with the
device synchronized around each step, which gives the split (not of `fast`, whose steps run beside each other). The
error is that of the hidden states after the last block on 8 sequences that were not calibrated on, relative to their
energy. The limit is what the products of the forwards and Gram matrices alone would take at this card's rate for a
large one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

VOCAB = 32000
IGNORE = ["lm_head", "re:.*mlp.gate$"]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "8b": ("LlamaConfig", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    }),
    "70b": ("LlamaConfig", {
        "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    }),
    "moe": ("Qwen3MoeConfig", {
        "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }),
}  # fmt: skip
W4 = {"scheme": "W4A16", "ignore": IGNORE}
# name -> (recipe, other arguments of oneshot, the recipe's name in peer_gpu.py)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "gptq": ({"GPTQModifier": W4}, {}, "gptq"),
    "gptq-unrefined": ({"GPTQModifier": {**W4, "refine": 0}}, {}, None),
    "fast": ({"GPTQModifier": {**W4, "refine": 0}}, {"propagate": False}, None),
    "smoothquant-gptq": (
        {"SmoothQuantModifier": {"ignore": IGNORE}, "GPTQModifier": {"scheme": "W8A8", "ignore": IGNORE}}, {},
        "smoothquant-gptq",
    ),
    "awq": ({"AWQModifier": {"scheme": "W4A16_ASYM", "ignore": IGNORE}}, {}, "awq"),
    "sparsegpt": (
        {"SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4", "ignore": IGNORE}}, {}, "sparsegpt",
    ),
    "rtn": ({"QuantizationModifier": W4}, {}, None),
    "fp8": ({"QuantizationModifier": {"scheme": "FP8_DYNAMIC", "ignore": IGNORE}}, {}, None),
    "nvfp4": ({"QuantizationModifier": {"scheme": "NVFP4A16", "ignore": IGNORE}}, {}, None),
}  # fmt: skip
WITHOUT_DATA = {"rtn", "fp8", "nvfp4"}  # bound by the disk
# part of the split -> functions that are timed for it
STEPS = {
    "statistics": ("bitpress.math.stats.StatsAccumulator.add",),
    "factor": ("bitpress.math.gptq.inverse_factors",),
    "sweep": ("bitpress.math.gptq.sweep", "bitpress.math.gptq.descend", "bitpress.math.gptq.refit_scales"),
    "search": ("bitpress.math.sparsegpt.search", "bitpress.math.sparsegpt.refit"),
    "scales": ("bitpress.math.gptq._find", "bitpress.math.rtn.find_all"),
    "pack": ("bitpress.output.Output.write",),
}


def write_model(folder: Path, shape: str, blocks: int) -> None:
    """Save the model, made on the GPU."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    name, numbers = SHAPES[shape]
    config = getattr(transformers, name)(
        **numbers, num_hidden_layers=blocks, vocab_size=VOCAB, max_position_embeddings=8192, dtype="bfloat16"
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.AutoModelForCausalLM.from_config(config)
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1").save_pretrained(folder)


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Within it, the device waits before and after each of `STEPS`, whose seconds are summed."""
    import importlib

    def wrap(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            clock = time.perf_counter()
            out = function(*args, **kwargs)
            torch.cuda.synchronize()
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - clock
            return out

        return timing

    before = []
    try:
        for part, paths in STEPS.items():
            for path in paths:
                owner_path, _, name = path.rpartition(".")
                try:
                    owner = importlib.import_module(owner_path)
                except ModuleNotFoundError:
                    module, _, kind = owner_path.rpartition(".")
                    owner = getattr(importlib.import_module(module), kind)
                before.append((owner, name, getattr(owner, name)))
                setattr(owner, name, wrap(getattr(owner, name), part))
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def run(model: Path, out: Path, rows: list[list[int]], case: str, max_memory: str | None) -> dict[str, Any]:
    """One run of bitpress; the totals of its report."""
    from bitpress import oneshot

    recipe, more, _ = CASES[case]
    shutil.rmtree(out, ignore_errors=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    oneshot(
        model=model,
        dataset=[{"input_ids": row} for row in rows],
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        output_dir=out,
        max_memory=max_memory,
        **more,
    )
    totals: dict[str, Any] = json.loads((out / "report.json").read_text())["totals"]
    return totals


def measure(model: Path, out: Path, rows: list[list[int]], case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a block of bitpress by phase and by step, and what it took."""
    run(model, out, rows[:8], case, args.max_memory)
    totals = run(model, out, rows, case, args.max_memory)
    phases = per_block(totals, args.blocks)
    apart = CASES[case][1].get("propagate", True)  # else one block is solved while the next one runs
    split = {} if args.no_split or not apart else {"split": _split(model, out, rows, case, args)}
    seconds, least = sum(phases.values()), limit(args.shape, case, len(rows), len(rows[0]))
    share = {} if least is None else {"limit_seconds": least, "share_of_limit": least / seconds}
    return {
        "case": case, "tool": "bitpress", "seconds_per_block": seconds, **share, "phases": phases, **split,
        "finish_seconds": totals["seconds_by_phase"]["finish"], "whole_run_seconds": totals["seconds"],
        "device_gb": totals["peak_device_bytes"] / 1e9, "host_gb": totals["peak_host_bytes"] / 1e9,
    }  # fmt: skip


def _split(model: Path, out: Path, rows: list[list[int]], case: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds a block by step, of a run in which the device is waited for around each."""
    steps: dict[str, float] = {}
    with timed(steps):
        phases = per_block(run(model, out, rows, case, args.max_memory), args.blocks)
    split = {name: s / args.blocks for name, s in steps.items()}
    split["forward"] = phases.get("statistics", 0.0) + phases.get("propagate", 0.0) - split.get("statistics", 0.0)
    split["other and waiting"] = sum(phases.values()) - sum(split.values())
    return split


def per_block(totals: dict[str, Any], blocks: int) -> dict[str, float]:
    """Seconds by phase of a block in the middle of a model: a run prepares and finishes once, and its last block feeds
    no other and is written while the run finishes."""
    phases = {name: s / blocks for name, s in totals["seconds_by_phase"].items() if name not in ("prepare", "finish")}
    for name in {"propagate", "write"} & set(phases):
        phases[name] *= blocks / max(1, blocks - 1)
    return phases


def limit(shape: str, case: str, samples: int, length: int) -> float | None:
    """Seconds a block for its forwards' products and one triangle of each Gram matrix; None without data."""
    if case in WITHOUT_DATA:
        return None
    numbers = SHAPES[shape][1]
    D, heads, tokens = numbers["hidden_size"], numbers["num_attention_heads"], samples * length
    head = numbers.get("head_dim", D // heads)
    q, kv = heads * head, numbers["num_key_value_heads"] * head
    chosen = numbers.get("num_experts_per_tok", 1)
    middle = numbers.get("moe_intermediate_size", numbers["intermediate_size"])
    linears = 2 * D * q + 2 * D * kv + 3 * chosen * D * middle
    forward = 2 * tokens * (linears + length * q)  # scores and values of the lower triangle
    grams = tokens * (D**2 + q**2 + chosen * (D**2 + middle**2))
    forwards = 2 if CASES[case][1].get("propagate", True) else 1
    return (forwards * forward + grams) / product_rate()


@cache
def product_rate() -> float:
    """Operations a second of a product of bfloat16 matrices of 8192."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    for runs in (5, 20):  # the first ones warm it up
        torch.cuda.synchronize()
        clock = time.perf_counter()
        for _ in range(runs):
            a @ b
        torch.cuda.synchronize()
    return runs * 2 * 8192**3 / (time.perf_counter() - clock)


def measure_peer(model: Path, out: Path, rows: Path, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """The same of llm-compressor, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    script = Path(__file__).with_name("peer_gpu.py")
    command = [args.peer, str(script), str(model), str(out), str(rows), "--recipe", str(CASES[case][2])]
    command += ["--batch", str(args.peer_batch)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "case": case, "tool": "llm-compressor", "batch": args.peer_batch,
        "seconds_per_block": found["seconds"] / args.blocks,
        "device_gb": found["device_gb"], "host_gb": found["host_gb"],
    }  # fmt: skip


@torch.no_grad()
def hidden(folder: Path, rows: list[list[int]]) -> torch.Tensor:
    """Hidden states after the last block, (B, L, C), of a checkpoint."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    from bitpress.inspection import is_quantized

    how = {"quantization_config": CompressedTensorsConfig(run_compressed=False)} if is_quantized(folder) else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how).cuda()
    found = [model.model(input_ids=torch.tensor([row]).cuda()).last_hidden_state.cpu() for row in rows]
    del model
    torch.cuda.empty_cache()
    return torch.cat(found).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=["gptq"])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--max-memory")
    parser.add_argument("--no-split", action="store_true", help="leave out the run that splits the time")
    parser.add_argument("--peer", help="interpreter of llm-compressor's environment")
    parser.add_argument("--peer-batch", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where the temporary model and its checkpoints go")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCAB, (args.samples + 8, args.length), generator=generator).tolist()
    rows, unseen = rows[:-8], rows[-8:]
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        model, out, tokens = Path(work) / "model", Path(work) / "out", Path(work) / "tokens.json"
        write_model(model, args.shape, args.blocks)
        tokens.write_text(json.dumps(rows))
        base = hidden(model, unseen)
        for case in args.cases:
            for tool in ("bitpress", "llm-compressor"):
                if tool == "bitpress":
                    line = measure(model, out, rows, case, args)
                elif args.peer and CASES[case][2] is not None:
                    line = measure_peer(model, out, tokens, case, args)
                else:
                    continue
                line["error"] = float((hidden(out, unseen) - base).square().sum() / base.square().sum())
                print(json.dumps(_rounded(line)), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
