"""Quantizes a model with GPTQModel and prints one JSON line with what it cost.

ENVS/gptqmodel/bin/python bench/peer_gptqmodel.py MODEL OUT --text FILE [--samples 128] [--length 512]
    [--scheme w4-sym|w4-asym|w3-sym|w2-asym] [--group-size 64] [--batch-size 1] [--seed 0]

Everything else is GPTQModel's default. OUT/packed is what it saves; OUT holds the same weights, dequantized by
bench/dense.py, as transformers reads that format only with GPTQModel installed. Its pool for the CPU has one thread
by default on two cores; GPTQMODEL_CPU_WORKERS, 2 unless it is set, says how many.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

from common import SCHEMES, arguments, print_result, timed, windows  # noqa: E402
from dense import write_dense  # noqa: E402

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=1)


def main() -> None:
    args = arguments(__doc__, methods=("gptq",), schemes=("w4-sym", "w4-asym", "w3-sym", "w2-asym"), more=options)
    stdout, sys.stdout = sys.stdout, sys.stderr  # it logs there
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import GPTQConfig
    from transformers import AutoTokenizer

    torch.manual_seed(args.seed)
    scheme = SCHEMES[args.scheme]
    rows = windows(AutoTokenizer.from_pretrained(args.model), args.text, args.samples, args.length, args.seed)
    config = GPTQConfig(bits=scheme.bits, group_size=args.group_size, sym=scheme.symmetric)
    model = GPTQModel.load(str(args.model), config)
    samples = [
        {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in rows
    ]
    quantize = timed(lambda: model.quantize(samples, batch_size=args.batch_size))
    packed = args.out / "packed"
    model.save(str(packed))
    sys.stdout = stdout
    write_dense(args.model, packed, args.out, zero_offset=1)
    print_result("gptqmodel", args, rows, quantize, STARTED, checkpoint=packed, batch_size=args.batch_size)


if __name__ == "__main__":
    main()
