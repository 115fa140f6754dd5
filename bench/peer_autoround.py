"""Quantizes a model with AutoRound and prints one JSON line with what it cost.

ENVS/autoround/bin/python bench/peer_autoround.py MODEL OUT --text FILE [--samples 128] [--length 512]
    [--scheme w4-sym|w4-asym|w3-sym|w2-asym] [--group-size 64] [--iters 200] [--batch-size 8] [--no-compile]
    [--seed 0]

Everything else is AutoRound's default. OUT/packed is what it saves in its own format; OUT holds the same weights,
dequantized by bench/dense.py, as transformers reads that format only with AutoRound installed.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402

from common import SCHEMES, arguments, print_result, timed, windows  # noqa: E402
from dense import write_dense  # noqa: E402


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--no-compile", action="store_true", help="do not let it call torch.compile")


def batches(rows: list[list[int]], size: int) -> list[dict[str, Any]]:
    """The tokens without a mask, as AutoRound's own loaders of unpadded text give them."""
    import torch

    ids = torch.tensor(rows)
    return [{"input_ids": part, "attention_mask": None} for part in ids.split(size)]


def main() -> None:
    args = arguments(__doc__, methods=("signround",), schemes=("w4-sym", "w4-asym", "w3-sym", "w2-asym"), more=options)
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scheme = SCHEMES[args.scheme]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = windows(tokenizer, args.text, args.samples, args.length, args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    stdout, sys.stdout = sys.stdout, sys.stderr  # it logs there
    tuner = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        bits=scheme.bits,
        sym=scheme.symmetric,
        group_size=args.group_size,
        dataset=batches(rows, args.batch_size),
        iters=args.iters,
        seqlen=args.length,
        nsamples=len(rows),
        batch_size=args.batch_size,
        seed=args.seed,
        enable_torch_compile=False if args.no_compile else None,
        device_map=0 if torch.cuda.is_available() else "cpu",
    )
    quantize = timed(tuner.quantize)
    packed = args.out / "packed"
    tuner.save_quantized(str(packed), format="auto_round:auto_gptq")
    sys.stdout = stdout
    write_dense(args.model, packed, args.out, zero_offset=1)
    print_result(
        "auto-round", args, rows, quantize, STARTED, checkpoint=packed, iters=args.iters, batch_size=args.batch_size
    )


if __name__ == "__main__":
    main()
