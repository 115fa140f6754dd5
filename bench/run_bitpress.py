"""Quantizes a model with bitpress and prints the JSON line that peer_llmcompressor.py prints.

python bench/run_bitpress.py MODEL OUT --text FILE [--samples 128] [--length 512]
    [--group-size 64] [--method gptq|rtn] [--observer hessian|minmax|mse] [--seed 0]
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

from peer_llmcompressor import arguments, config_groups, print_result, timed, windows  # noqa: E402


def main() -> None:
    args = arguments(__doc__, observers=("hessian", "minmax", "mse"))
    if args.method == "rtn" and args.observer == "hessian":
        args.observer = "minmax"  # rounding has no statistics
    from datasets import Dataset
    from transformers import AutoTokenizer

    from bitpress import oneshot

    rows = windows(AutoTokenizer.from_pretrained(args.model), args.text, args.samples, args.length, args.seed)
    modifier = {"gptq": "GPTQModifier", "rtn": "QuantizationModifier"}[args.method]
    settings = {"config_groups": config_groups(args.group_size, args.observer), "ignore": ["lm_head"]}
    data = {}
    if args.method == "gptq":
        data = {
            "dataset": Dataset.from_dict({"input_ids": rows}),
            "num_calibration_samples": len(rows),
            "max_seq_length": args.length,
            "shuffle_calibration_samples": False,
        }
    quantize = timed(
        lambda: oneshot(model=args.model, recipe={modifier: settings}, output_dir=args.out, seed=args.seed, **data)
    )
    print_result("bitpress", args, rows, quantize, STARTED)


if __name__ == "__main__":
    main()
