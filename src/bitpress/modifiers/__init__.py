"""One dataclass per YAML name. A new method is one file here and one line in this table."""

from __future__ import annotations

from bitpress.modifiers.awq import AWQModifier
from bitpress.modifiers.base import Modifier
from bitpress.modifiers.quantization import GPTQModifier, QuantizationModifier, SchemeGroup
from bitpress.modifiers.smoothquant import SmoothQuantModifier
from bitpress.modifiers.tune import TuneModifier

MODIFIERS: dict[str, type[Modifier]] = {
    "AWQModifier": AWQModifier,
    "GPTQModifier": GPTQModifier,
    "QuantizationModifier": QuantizationModifier,
    "SmoothQuantModifier": SmoothQuantModifier,
    "TuneModifier": TuneModifier,
}

# Names that recipes use and this table does not have yet: an answer, never "unknown".
MODIFIERS_LATER = (
    "ConstantPruningModifier",
    "MagnitudePruningModifier",
    "SparseGPTModifier",
    "WandaPruningModifier",
)

__all__ = [
    "MODIFIERS",
    "MODIFIERS_LATER",
    "AWQModifier",
    "GPTQModifier",
    "Modifier",
    "QuantizationModifier",
    "SchemeGroup",
    "SmoothQuantModifier",
    "TuneModifier",
]
