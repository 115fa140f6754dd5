"""Modifiers that quantize weights: round to nearest, and GPTQ."""

from bitpress.modifiers.quantization.base import SchemeGroup, SchemeModifier
from bitpress.modifiers.quantization.gptq import GPTQModifier
from bitpress.modifiers.quantization.quantization import QuantizationModifier

__all__ = ["GPTQModifier", "QuantizationModifier", "SchemeGroup", "SchemeModifier"]
