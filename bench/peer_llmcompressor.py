"""Compresses a model with llm-compressor and prints one JSON line with what it cost.

ENVS/llmcompressor/bin/python bench/peer_llmcompressor.py MODEL OUT --text FILE [--samples 128] [--length 512]
    [--scheme w4-sym] [--method gptq|rtn|awq|smoothquant-gptq|sparsegpt|sparsegpt-gptq] [--observer minmax|mse]
    [--group-size 64] [--seed 0]

Everything else is llm-compressor's default. sparsegpt-gptq runs one after the other, as in its own 2:4 example.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import sys  # noqa: E402
from argparse import Namespace  # noqa: E402
from typing import Any  # noqa: E402

from common import SCHEMES, arguments, calibration, config_groups, print_result, timed, windows  # noqa: E402

METHODS = ("gptq", "rtn", "awq", "smoothquant-gptq", "sparsegpt", "sparsegpt-gptq")


def recipes(args: Namespace) -> list[Any]:
    """The recipes to run one after the other, each by one call of `oneshot`."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    scheme = SCHEMES[args.scheme]
    ignore = ["lm_head"]
    settings = {}
    if scheme.bits is not None:
        settings = {"config_groups": config_groups(args.group_size, args.observer, scheme), "ignore": ignore}
    if (scheme.bits is None) != (args.method == "sparsegpt") or scheme.sparse != args.method.startswith("sparsegpt"):
        raise SystemExit(f"{args.scheme} is not what {args.method} makes")

    def prune() -> Any:
        return SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=ignore)

    if args.method == "gptq":
        return [GPTQModifier(**settings)]
    if args.method == "rtn":
        return [QuantizationModifier(**settings)]
    if args.method == "awq":
        return [[AWQModifier(), QuantizationModifier(**settings)]]
    if args.method == "smoothquant-gptq":
        return [[SmoothQuantModifier(), GPTQModifier(**settings)]]
    if args.method == "sparsegpt":
        return [prune()]
    return [prune(), GPTQModifier(**settings)]


def main() -> None:
    args = arguments(__doc__, methods=METHODS, observers=("minmax", "mse"))
    import torch
    from llmcompressor import oneshot
    from loguru import logger
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.remove()  # it logs to stdout
    logger.add(sys.stderr)
    if not torch.cuda.is_available():
        # AWQ pins its cache, which torch refuses without a GPU.
        torch.Tensor.pin_memory = lambda self, *_, **__: self
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = windows(tokenizer, args.text, args.samples, args.length, args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    steps = recipes(args)
    data = {} if args.method == "rtn" else calibration(rows)

    def run() -> None:
        for recipe in steps:
            oneshot(model=model, tokenizer=tokenizer, recipe=recipe, **data)

    quantize = timed(run)
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    print_result("llmcompressor", args, rows, quantize, STARTED)


if __name__ == "__main__":
    main()
