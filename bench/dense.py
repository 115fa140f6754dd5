"""Turns a checkpoint in GPTQ's layout into a dense one, which any judge loads without the tool that made it.

python bench/dense.py BASE PACKED OUT [--zero-offset 0|1]

Codes lie as a stream of bits along the input columns (`qweight`) and along the rows (`qzeros`), low bits first;
w = scale * (code - zero). The first layout of GPTQ stores zero points less one, which is what AutoRound writes and
what GPTQModel writes with format "gptq"; its "gptq_v2" stores them as they are. Everything else is the base's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any


def unpack(words: Any, bits: int) -> Any:
    """Codes (rows * 32 / bits, columns) of int32 words (rows, columns), each column one stream of bits."""
    import torch

    at = torch.arange(32, dtype=torch.int32)
    stream = (words[:, None, :] >> at[None, :, None]) & 1
    stream = stream.reshape(-1, bits, words.shape[1])
    place = torch.arange(bits, dtype=torch.int32)
    return (stream << place[None, :, None]).sum(1, dtype=torch.int32)


def dequantize(part: dict[str, Any], bits: int, zero_offset: int) -> Any:
    """The weight (R,C) in float32 of one linear's `qweight`, `qzeros`, `scales` (G,R) and, if there, `g_idx` (C,)."""
    import torch

    codes = unpack(part["qweight"], bits)
    scales = part["scales"].float()
    zeros = unpack(part["qzeros"].T.contiguous(), bits).T[:, : scales.shape[1]]
    zeros = (zeros + zero_offset) & (2**bits - 1) if zero_offset else zeros
    columns = codes.shape[0]
    group = part.get("g_idx")
    if group is None:
        group = torch.arange(columns) // (columns // scales.shape[0])
    group = group.long()
    return (scales[group] * (codes - zeros[group]).float()).T.contiguous()


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def write_dense(base: Path, packed: Path, out: Path, zero_offset: int) -> None:
    """Writes the base with every quantized linear replaced by what its codes mean, in the base's dtype.

    Raises:
        SystemExit: a packed linear that the base lacks, or of another shape.
    """
    from safetensors.torch import save_file

    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    bits = int(config["bits"])
    dense, found = tensors(base), tensors(packed)
    names = [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]
    if not names:
        raise SystemExit(f"{packed}: no linear in GPTQ's layout")
    for name in names:
        part = {
            key: found[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx") if f"{name}.{key}" in found
        }
        weight = dequantize(part, bits, zero_offset)
        old = dense.get(f"{name}.weight")
        if old is None or old.shape != weight.shape:
            raise SystemExit(f"{packed}: {name} of shape {tuple(weight.shape)} is not a linear of {base}")
        dense[f"{name}.weight"] = weight.to(old.dtype)
    out.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    save_file(dense, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--zero-offset", type=int, choices=(0, 1), default=1)
    args = parser.parse_args()
    write_dense(args.base, args.packed, args.out, args.zero_offset)


if __name__ == "__main__":
    main()
