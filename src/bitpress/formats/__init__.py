"""Checkpoint formats: how solved linears lie on disk. One file a format, one line in `CHECKPOINTS`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitpress.formats.awq import AWQ
from bitpress.formats.base import FLOATS, CheckpointFormat, Spec, describe_inputs, grid_of
from bitpress.formats.bitsandbytes import BitsAndBytes
from bitpress.formats.compressed_tensors import CompressedTensors, uncompressed_settings
from bitpress.formats.dense import Dense
from bitpress.formats.gguf import GGUF
from bitpress.formats.gptq import GPTQ
from bitpress.formats.sparse24 import Sparse24, spread
from bitpress.formats.uncompressed import dense, describe_dense, settle, undense
from bitpress.math.grid import Solved
from bitpress.schemes import Scheme

__all__ = [
    "CHECKPOINTS", "DEFAULT", "FLOATS", "CheckpointFormat", "Spec", "as_read", "dense", "describe", "describe_dense",
    "describe_inputs", "grid_of", "pack", "settle", "spread", "uncompressed_settings", "undense", "unpack",
]  # fmt: skip

DEFAULT = "compressed-tensors"
CHECKPOINTS: dict[str, CheckpointFormat] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": GPTQ(1),
    "gptq_v2": GPTQ(2),
    "awq": AWQ(),
    "bitsandbytes": BitsAndBytes(),
    "dense": Dense(),
    "gguf": GGUF(),
    "sparse-24": Sparse24(),
}


def describe(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, stored: str = DEFAULT) -> Spec:
    """Tensors that a linear of (rows, columns) is stored as in a checkpoint format: suffix -> (dtype, shape)."""
    return CHECKPOINTS[stored].describe(scheme, rows, columns, dtype)


def pack(solved: Solved, scheme: Scheme, stored: str = DEFAULT) -> dict[str, Tensor]:
    """A solved linear as the tensors of its format, by suffix."""
    return CHECKPOINTS[stored].pack(solved, scheme)


def as_read(solved: Solved, scheme: Scheme, dtype: torch.dtype, stored: str) -> Solved:
    """A solved linear whose dense weight is what a reader of the checkpoint computes, where the format rounds."""
    if not CHECKPOINTS[stored].rounds:
        return solved
    return replace(solved, weight=unpack(pack(solved, scheme, stored), scheme, dtype, stored).dense())


def unpack(tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype, stored: str = DEFAULT) -> Solved:
    """What `pack` stored of a model of `dtype`. Its `error` is NaN: the checkpoint does not hold it."""
    return CHECKPOINTS[stored].unpack(tensors, scheme, dtype)
