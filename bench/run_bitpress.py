"""Compresses a model with bitpress and prints the JSON line that peer_llmcompressor.py prints.

python bench/run_bitpress.py MODEL OUT --text FILE [--samples 128] [--length 512] [--scheme w4-sym]
    [--method gptq|rtn|smoothquant-gptq|sparsegpt|sparsegpt-gptq] [--observer hessian|minmax|mse] [--group-size 64]
    [--effort fast|balanced|best] [--seed 0]
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
from typing import Any  # noqa: E402

from common import SCHEMES, arguments, calibration, config_groups, print_result, timed, windows  # noqa: E402

METHODS = ("gptq", "rtn", "smoothquant-gptq", "sparsegpt", "sparsegpt-gptq")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--effort", choices=("fast", "balanced", "best"))


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The modifiers by name, in one stage, or those of an effort."""
    scheme, ignore = SCHEMES[args.scheme], ["lm_head"]
    if args.effort is not None:
        from bitpress import effort

        groups = None if scheme.bits is None else config_groups(args.group_size, args.observer, scheme)
        prunes = args.method.startswith("sparsegpt")
        return effort.recipe(
            args.effort,
            None if groups is None else {"config_groups": groups, "ignore": ignore},
            {"SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4", "ignore": ignore}} if prunes else None,
        )
    modifiers: dict[str, Any] = {}
    if args.method.startswith("smoothquant"):
        modifiers["SmoothQuantModifier"] = {}
    if args.method.startswith("sparsegpt"):
        modifiers["SparseGPTModifier"] = {"sparsity": 0.5, "mask_structure": "2:4", "ignore": ignore}
    if scheme.bits is not None:
        quantizer = "QuantizationModifier" if args.method == "rtn" else "GPTQModifier"
        modifiers[quantizer] = {
            "config_groups": config_groups(args.group_size, args.observer, scheme),
            "ignore": ignore,
        }
    return modifiers


def main() -> None:
    args = arguments(__doc__, methods=METHODS, observers=("hessian", "minmax", "mse"), more=options)
    if args.method == "rtn" and args.observer == "hessian":
        args.observer = "minmax"  # rounding has no statistics
    from transformers import AutoTokenizer

    from bitpress import oneshot

    rows = windows(AutoTokenizer.from_pretrained(args.model), args.text, args.samples, args.length, args.seed)
    data = {} if args.method == "rtn" else calibration(rows)
    data |= {"propagate": False} if args.effort == "fast" else {}  # part of that effort
    quantize = timed(
        lambda: oneshot(model=args.model, recipe=recipe(args), output_dir=args.out, seed=args.seed, **data)
    )
    print_result("bitpress", args, rows, quantize, STARTED, effort=args.effort)


if __name__ == "__main__":
    main()
