"""Says how well a checkpoint keeps 2:4, as one JSON line: of the groups of four weights, those with two zeros or more.

python bench/mask.py CHECKPOINT

`kept_2of4` is the share over all linears in blocks, `worst_2of4` that of the worst of them; 1.0 is exactly 2:4.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def load(path: str) -> Any:
    """The checkpoint as transformers decompresses it."""
    from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

    config = AutoConfig.from_pretrained(path)
    packed = getattr(config, "quantization_config", None) is not None
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", **options)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    import torch

    kept, groups, worst = 0, 0, 1.0
    for name, module in load(sys.argv[1]).named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            fours = (module.weight == 0).reshape(-1, 4).sum(1) >= 2
            kept, groups = kept + int(fours.sum()), groups + fours.numel()
            worst = min(worst, fours.float().mean().item())
    print(json.dumps({"kept_2of4": kept / groups, "worst_2of4": worst}))


if __name__ == "__main__":
    main()
