"""Plain weights: what a reader of the quantized checkpoint would compute, in the model's dtype.

weight (R, C). No client needs to know of it, and no memory is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.formats.base import CheckpointFormat, Spec, unknown_error
from bitpress.math.grid import Solved
from bitpress.schemes import Scheme


class Dense(CheckpointFormat):
    """Weights of a model that is not quantized, as far as a client can tell."""

    name = "dense"

    def describe(self, scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Spec:
        return {"weight": (dtype, (rows, columns))}

    def pack(self, solved: Solved, scheme: Scheme) -> dict[str, Tensor]:
        return {"weight": solved.dense()}

    def unpack(self, tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Solved:
        return Solved(None, None, unknown_error(), weight=tensors["weight"].to(dtype))
