"""Schemes of caches and static inputs, recipes of one scheme, and what a run of it writes."""

from __future__ import annotations

from bitpress import oneshot
from conftest import token_rows
from helpers import OPTIONS, config_of, report_of, tensors

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
STATIC = {"weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": {"num_bits": 8, "strategy": "tensor"}}
STATIC["input_activations"] = {**STATIC["input_activations"], "symmetric": False}


def recipe(kind="QuantizationModifier", **keys):
    return {kind: {**keys, "ignore": ["lm_head"]}}


def run(base, out, *, data=True, **keys):
    oneshot(base, token_rows() if data else None, recipe(**keys), output_dir=out, **OPTIONS)
    return tensors(out), config_of(out)["quantization_config"], report_of(out)
