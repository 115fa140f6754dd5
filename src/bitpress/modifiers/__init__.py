"""One dataclass per YAML name. A new method is one file here and one line in this table."""

from __future__ import annotations

from bitpress.modifiers.awq import AWQModifier
from bitpress.modifiers.base import Modifier
from bitpress.modifiers.pruning import MagnitudePruningModifier, SparseGPTModifier, WandaPruningModifier
from bitpress.modifiers.quantization import GPTQModifier, QuantizationModifier, SchemeGroup
from bitpress.modifiers.smoothquant import SmoothQuantModifier
from bitpress.modifiers.tune import TuneModifier

MODIFIERS: dict[str, type[Modifier]] = {
    "AWQModifier": AWQModifier,
    "GPTQModifier": GPTQModifier,
    "MagnitudePruningModifier": MagnitudePruningModifier,
    "QuantizationModifier": QuantizationModifier,
    "SmoothQuantModifier": SmoothQuantModifier,
    "SparseGPTModifier": SparseGPTModifier,
    "TuneModifier": TuneModifier,
    "WandaPruningModifier": WandaPruningModifier,
}

# Names that recipes use and this table does not have yet: an answer, never "unknown".
MODIFIERS_LATER = ("ConstantPruningModifier",)

__all__ = [
    "MODIFIERS",
    "MODIFIERS_LATER",
    "AWQModifier",
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
