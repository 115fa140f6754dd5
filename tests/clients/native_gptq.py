"""The GPTQConfig snippet of a guide to quantization, for an environment with gptqmodel and optimum.

python tests/clients/native_gptq.py MODEL OUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out", type=Path)
args = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(args.model)
texts = [" ".join(f"w{(7 * i + j) % 90}" for j in range(60)) for i in range(16)]  # where the guide has "c4"

gptq_config = GPTQConfig(
    bits=4,               # Use 4-bit quantization
    dataset=texts,        # Calibration dataset
    tokenizer=tokenizer,
    group_size=128,       # Optional: grouped quantization
    sym=False,            # Optional: asymmetric quantization
)  # fmt: skip

model = AutoModelForCausalLM.from_pretrained(
    args.model,
    quantization_config=gptq_config,
)
model.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)

# it is loaded with no configuration given
again = AutoModelForCausalLM.from_pretrained(args.out)
ids = torch.arange(3, 35)[None]
with torch.no_grad():
    found = again(input_ids=ids).logits.float()
linear = type(again.model.layers[0].mlp.up_proj).__name__
print(json.dumps({"finite": bool(torch.isfinite(found).all()), "linear": linear}))
