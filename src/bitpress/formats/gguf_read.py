"""The weights of a GGUF file that bitpress wrote, by the names that transformers has for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.errors import CheckpointError
from bitpress.formats.gguf_file import ARCHITECTURES, heads_of


def read_weights(file: Path, config: Any, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of `names` (on disk in the model that the file was made from), float32, one at a time.

    Raises:
        CheckpointError: another architecture, a tensor that is not there, or no gguf package.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{file}: needs the gguf package: pip install 'bitpress[gguf]'") from None
    if config.model_type not in ARCHITECTURES:
        raise CheckpointError(f"{file}: '{config.model_type}' is not read from GGUF, only {', '.join(ARCHITECTURES)}")
    arch, turned = ARCHITECTURES[config.model_type]
    short = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    for name in names:
        found = stored.get(short.get_name(name, try_suffixes=(".weight", ".bias")))
        if found is None:
            raise CheckpointError(f"{file}: has no tensor for {name}; write it again")
        tensor = torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type))
        tensor = tensor.reshape([int(n) for n in reversed(found.shape)]).float()
        heads = heads_of(name, config) if turned else None
        yield name, tensor if heads is None else halved(tensor, heads)


def halved(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `gguf_file.interleaved`."""
    rows = tensor.reshape(heads, len(tensor) // heads // 2, 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape).contiguous()
