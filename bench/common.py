"""What the scripts that quantize share: the schemes, the command line, the calibration tokens, and the JSON line.

Imports the standard library alone, so that it runs in the environment of every tool.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class Scheme:
    """What every linear but lm_head becomes.

    Args:
        title: the name of its row in a table.
        bits: width of a weight's code; None: weights stay as they are, pruned.
        grouped: one scale a group of input columns; else one a row.
        activations: int8 activations, one scale a token, computed at inference.
        sparse: two of every four weights are zero.
    """

    title: str
    bits: int | None
    symmetric: bool = True
    grouped: bool = True
    activations: bool = False
    sparse: bool = False


SCHEMES = {
    "w4-sym": Scheme("W4 sym", 4),
    "w4-asym": Scheme("W4 asym", 4, symmetric=False),
    "w3-sym": Scheme("W3 sym", 3),
    "w2-asym": Scheme("W2 asym", 2, symmetric=False),
    "w8a8": Scheme("W8A8 int8 dynamic", 8, grouped=False, activations=True),
    "2of4": Scheme("2:4", None, grouped=False, sparse=True),
    "2of4-w4": Scheme("2:4 + int4 channel", 4, grouped=False, sparse=True),
}


def arguments(
    doc: str | None,
    methods: tuple[str, ...],
    observers: tuple[str, ...] = ("minmax",),
    schemes: tuple[str, ...] = tuple(SCHEMES),
    more: Callable[[argparse.ArgumentParser], Any] | None = None,
) -> argparse.Namespace:
    """The command line that all tools share; the first method and the first observer are the defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--scheme", choices=schemes, default=schemes[0])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--method", choices=methods, default=methods[0])
    parser.add_argument("--observer", choices=observers, default=observers[0])
    parser.add_argument("--seed", type=int, default=0)
    if more is not None:
        more(parser)
    return parser.parse_args()


def windows(tokenizer: Any, text: Path, samples: int, length: int, seed: int) -> list[list[int]]:
    """Random windows, in the order of the text, which is tokenized whole and cut without overlap."""
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = len(ids) // length
    if samples > count:
        raise SystemExit(f"{text}: {count} windows of {length} tokens, fewer than the {samples} asked for")
    chosen = sorted(random.Random(seed).sample(range(count), samples))
    return [ids[i * length : (i + 1) * length] for i in chosen]


def tokens_hash(rows: list[list[int]]) -> str:
    """What tells whether two tools saw the same tokens."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def config_groups(group_size: int, observer: str, scheme: Scheme = SCHEMES["w4-sym"]) -> dict[str, Any]:
    """The scheme in the vocabulary that bitpress and llm-compressor have in common."""
    if scheme.bits is None:
        raise SystemExit(f"{scheme.title}: quantizes nothing")
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric}
    if scheme.grouped:
        weights |= {"strategy": "group", "group_size": group_size}
    else:
        weights |= {"strategy": "channel"}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights | {"observer": observer}}
    if scheme.activations:
        group["input_activations"] = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return {"group_0": group}


def calibration(rows: list[list[int]]) -> dict[str, Any]:
    """The tokens as `oneshot` takes them, in bitpress and in llm-compressor."""
    from datasets import Dataset

    return {
        "dataset": Dataset.from_dict({"input_ids": rows}),
        "num_calibration_samples": len(rows),
        "max_seq_length": len(rows[0]),
        "shuffle_calibration_samples": False,
    }


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


def size_mb(checkpoint: Path) -> float:
    """Weights on disk."""
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 1e6


def print_result(
    package: str,
    args: argparse.Namespace,
    rows: list[list[int]],
    quantize: tuple[float, float],
    started: float,
    checkpoint: Path | None = None,
    **more: Any,
) -> None:
    """The JSON line; call it last, as it also takes the figures of the whole process.

    Args:
        checkpoint: what the tool itself saved, for the size; None: `args.out`.
        more: what else distinguishes the run.
    """
    import torch

    result = {
        "tool": package,
        "version": version(package),
        "scheme": args.scheme,
        "method": args.method,
        "observer": args.observer,
        **more,
        "group_size": args.group_size if SCHEMES[args.scheme].grouped else None,
        "samples": len(rows),
        "length": len(rows[0]),
        "seed": args.seed,
        "tokens_sha256": tokens_hash(rows),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "quantize_wall_s": round(quantize[0], 2),
        "quantize_cpu_s": round(quantize[1], 2),
        "process_wall_s": round(time.perf_counter() - started, 2),
        "process_cpu_s": round(cpu_seconds(), 2),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "size_mb": round(size_mb(checkpoint or args.out), 2),
    }
    print(json.dumps(result), flush=True)
