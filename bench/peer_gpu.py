"""Compresses a model with llm-compressor on a GPU and prints one JSON line with what it cost; called by gpu.py.

ENVS/llmcompressor/bin/python bench/peer_gpu.py MODEL OUT TOKENS --recipe gptq [--batch 1]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

IGNORE = ["lm_head", "re:.*mlp.gate$"]


def recipe(name: str) -> Any:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    def gptq(scheme: str) -> Any:
        return GPTQModifier(targets="Linear", scheme=scheme, ignore=IGNORE)

    if name == "gptq":
        return [gptq("W4A16")]
    if name == "smoothquant-gptq":
        return [SmoothQuantModifier(smoothing_strength=0.5), gptq("W8A8")]
    if name == "awq":
        return [AWQModifier(), QuantizationModifier(targets="Linear", scheme="W4A16_ASYM", ignore=IGNORE)]
    return [SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=IGNORE)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--recipe", choices=("gptq", "smoothquant-gptq", "awq", "sparsegpt"), required=True)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from loguru import logger
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.remove()  # it logs to stdout
    logger.add(sys.stderr)
    rows = json.loads(args.tokens.read_text())
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    steps = recipe(args.recipe)
    torch.cuda.synchronize()
    clock = time.perf_counter()
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(args.model),
        dataset=data,
        recipe=steps,
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        batch_size=args.batch,
        shuffle_calibration_samples=False,
    )
    torch.cuda.synchronize()
    seconds = time.perf_counter() - clock
    model.save_pretrained(args.out, save_compressed=True)
    print(json.dumps({
        "seconds": seconds, "device_gb": torch.cuda.max_memory_allocated() / 1e9,
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
