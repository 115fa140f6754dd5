"""Quantizes a model with llm-compressor and prints one JSON line with what it cost.

ENVS/llmcompressor/bin/python bench/peer_llmcompressor.py MODEL OUT --text FILE [--samples 128] [--length 512]
    [--group-size 64] [--method gptq|rtn] [--observer minmax|mse] [--seed 0]
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def arguments(doc: str | None, observers: tuple[str, ...], argv: list[str] | None = None) -> argparse.Namespace:
    """The command line that both tools share; the first observer is the default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    parser.add_argument("--observer", choices=observers, default=observers[0])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def windows(tokenizer: Any, text: Path, samples: int, length: int, seed: int) -> list[list[int]]:
    """Random windows, in the order of the text, which is tokenized whole and cut without overlap."""
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = len(ids) // length
    if samples > count:
        raise SystemExit(f"{text}: {count} windows of {length} tokens, fewer than the {samples} asked for")
    chosen = sorted(random.Random(seed).sample(range(count), samples))
    return [ids[i * length : (i + 1) * length] for i in chosen]


def config_groups(group_size: int, observer: str) -> dict[str, Any]:
    """Int4, symmetric, one scale per group; the vocabulary is common to both tools."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return {"group_0": {"targets": ["Linear"], "weights": weights | {"observer": observer}}}


def cpu_seconds() -> float:
    """User and system time of this process and of the children it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_rss_mb() -> float:
    """Peak resident memory. Not ru_maxrss, which remembers the size of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kib) * 1024 / 1e6


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    step()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def print_result(
    package: str,
    args: argparse.Namespace,
    rows: list[list[int]],
    quantize: tuple[float, float],
    started: float,
) -> None:
    """The JSON line; call it last, as it also takes the figures of the whole process."""
    import torch

    result = {
        "tool": package,
        "version": version(package),
        "method": args.method,
        "observer": args.observer,
        "group_size": args.group_size,
        "samples": len(rows),
        "length": args.length,
        "seed": args.seed,
        "tokens_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
        "threads": torch.get_num_threads(),
        "quantize_wall_s": round(quantize[0], 2),
        "quantize_cpu_s": round(quantize[1], 2),
        "process_wall_s": round(time.perf_counter() - started, 2),
        "process_cpu_s": round(cpu_seconds(), 2),
        "peak_rss_mb": round(peak_rss_mb(), 1),
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    args = arguments(__doc__, observers=("minmax", "mse"))
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from loguru import logger
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.remove()  # it logs to stdout
    logger.add(sys.stderr)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = windows(tokenizer, args.text, args.samples, args.length, args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    groups = config_groups(args.group_size, args.observer)
    if args.method == "gptq":
        modifier = GPTQModifier(config_groups=groups, ignore=["lm_head"])
        data = {
            "dataset": Dataset.from_dict({"input_ids": rows}),
            "num_calibration_samples": len(rows),
            "max_seq_length": args.length,
            "shuffle_calibration_samples": False,
        }
    else:
        modifier = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
        data = {}
    quantize = timed(lambda: oneshot(model=model, tokenizer=tokenizer, recipe=modifier, **data))
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    print_result("llmcompressor", args, rows, quantize, STARTED)


if __name__ == "__main__":
    main()
