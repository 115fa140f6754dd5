"""Shows whether peak host memory depends on the number of blocks: streamed runs over 8 and 32 blocks.

python bench/memory.py [--blocks 8 32] [--hidden 1024] [--intermediate 2816] [--vocab 4096]
    [--samples 4] [--length 256] [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import config_groups, peak_rss_mb

HEAD = 64


def write_llama(
    folder: Path,
    *,
    blocks: int,
    hidden: int,
    intermediate: int,
    vocab: int,
    seed: int = 0,
    per_shard: int = 4,
) -> int:
    """Write a random bfloat16 Llama, one shard every few blocks; returns its size in bytes."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    heads = hidden // HEAD
    kv = HEAD * max(1, heads // 2)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    def block(index: int) -> dict[str, torch.Tensor]:
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }
        tensors = {f"model.layers.{index}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        return tensors

    folder.mkdir(parents=True)
    groups = [range(start, min(start + per_shard, blocks)) for start in range(0, blocks, per_shard)]
    weight_map, size = {}, 0
    for number in range(len(groups) + 1):
        if number == 0:
            tensors = {
                "model.embed_tokens.weight": weight(vocab, hidden),
                "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
                "lm_head.weight": weight(vocab, hidden),
            }
        else:
            tensors = {name: t for index in groups[number - 1] for name, t in block(index).items()}
        file = f"model-{number + 1:05d}-of-{len(groups) + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv // HEAD,
        "head_dim": HEAD,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return size


def random_rows(samples: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Calibration sequences of random tokens."""
    generator = random.Random(seed)
    return [[generator.randrange(vocab) for _ in range(length)] for _ in range(samples)]


def watch(peaks: dict[str, float]) -> None:
    """Keep the peaks, in MB, of what this process has allocated and of the files it has mapped."""
    while True:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024 / 1e6)
        time.sleep(0.005)


def measure(model: Path, out: Path, args: argparse.Namespace) -> None:
    """In a fresh process: one run; prints the memory before it and its peak."""
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from datasets import Dataset

    from bitpress import oneshot

    before, peaks = peak_rss_mb(), {"RssAnon": 0.0, "RssFile": 0.0}
    threading.Thread(target=watch, args=(peaks,), daemon=True).start()
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": random_rows(args.samples, args.length, args.vocab)}),
        recipe={"GPTQModifier": {"config_groups": config_groups(64, "minmax"), "ignore": ["lm_head"]}},
        num_calibration_samples=args.samples,
        max_seq_length=args.length,
        output_dir=out,
        seed=0,
    )
    print(json.dumps({"before_mb": before, "peak_mb": peak_rss_mb(), **peaks}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs=2, default=(8, 32))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--work", type=Path, help="where the temporary models go")
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure, args)
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        for blocks in args.blocks:
            model = Path(work) / f"model-{blocks}"
            shape = {"hidden": args.hidden, "intermediate": args.intermediate, "vocab": args.vocab}
            size = write_llama(model, blocks=blocks, **shape) / 1e6
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", str(model), str(model) + "-out"]
            environment = os.environ | {"HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"the run over {blocks} blocks failed with {done.returncode}")
            results.append({"size_mb": size, **json.loads(done.stdout.splitlines()[-1])})
            print(
                f"{blocks:4d} blocks: model {size:8.1f} MB, peak RSS {results[-1]['peak_mb']:8.1f} MB "
                f"(allocated {results[-1]['RssAnon']:.1f}, mapped files {results[-1]['RssFile']:.1f}; "
                f"{results[-1]['before_mb']:.1f} before the run)",
                flush=True,
            )
    few, many = results
    print(
        f"difference:  model {many['size_mb'] - few['size_mb']:8.1f} MB, "
        f"peak RSS {many['peak_mb'] - few['peak_mb']:8.1f} MB "
        f"(allocated {many['RssAnon'] - few['RssAnon']:.1f}, mapped files {many['RssFile'] - few['RssFile']:.1f})"
    )


if __name__ == "__main__":
    main()
