"""One dataclass per YAML name. A new method is one file here and one line in this table."""

from __future__ import annotations

from bitpress.modifiers.base import Modifier
from bitpress.modifiers.quantization import GPTQModifier, QuantizationModifier, SchemeGroup

MODIFIERS: dict[str, type[Modifier]] = {
    "GPTQModifier": GPTQModifier,
    "QuantizationModifier": QuantizationModifier,
}

# Names that recipes use and this table does not have yet: an answer, never "unknown".
MODIFIERS_LATER = (
    "AWQModifier",
    "ConstantPruningModifier",
    "MagnitudePruningModifier",
    "SmoothQuantModifier",
    "SparseGPTModifier",
    "TuneModifier",
    "WandaPruningModifier",
)

__all__ = [
    "MODIFIERS",
    "MODIFIERS_LATER",
    "GPTQModifier",
    "Modifier",
    "QuantizationModifier",
    "SchemeGroup",
]
