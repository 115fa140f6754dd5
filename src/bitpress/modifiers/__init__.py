"""One dataclass per YAML name. A new method is one file here and one line in this table."""

from __future__ import annotations

from bitpress.modifiers.awq import AWQModifier
from bitpress.modifiers.base import Modifier
from bitpress.modifiers.pruning import (
    ConstantPruningModifier,
    MagnitudePruningModifier,
    SparseGPTModifier,
    WandaPruningModifier,
)
from bitpress.modifiers.quantization import (
    BitsAndBytesModifier,
    GPTQModifier,
    QuantizationModifier,
    SchemeGroup,
)
from bitpress.modifiers.smoothquant import SmoothQuantModifier
from bitpress.modifiers.tune import TuneModifier

MODIFIERS: dict[str, type[Modifier]] = {
    "AWQModifier": AWQModifier,
    "BitsAndBytesModifier": BitsAndBytesModifier,
    "ConstantPruningModifier": ConstantPruningModifier,
    "GPTQModifier": GPTQModifier,
    "MagnitudePruningModifier": MagnitudePruningModifier,
    "QuantizationModifier": QuantizationModifier,
    "SmoothQuantModifier": SmoothQuantModifier,
    "SparseGPTModifier": SparseGPTModifier,
    "TuneModifier": TuneModifier,
    "WandaPruningModifier": WandaPruningModifier,
}

__all__ = [
    "MODIFIERS",
    "AWQModifier",
    "BitsAndBytesModifier",
    "ConstantPruningModifier",
    "GPTQModifier",
    "MagnitudePruningModifier",
    "Modifier",
    "QuantizationModifier",
    "SchemeGroup",
    "SmoothQuantModifier",
    "SparseGPTModifier",
    "TuneModifier",
    "WandaPruningModifier",
]
