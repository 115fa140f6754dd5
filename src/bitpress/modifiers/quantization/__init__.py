"""Modifiers that quantize weights: round to nearest, and GPTQ."""

from bitpress.modifiers.quantization.base import SchemeGroup, SchemeModifier
from bitpress.modifiers.quantization.bitsandbytes import BitsAndBytesModifier
from bitpress.modifiers.quantization.gptq import GPTQModifier
from bitpress.modifiers.quantization.quantization import QuantizationModifier, RoundingModifier

__all__ = [
    "BitsAndBytesModifier",
    "GPTQModifier",
    "QuantizationModifier",
    "RoundingModifier",
    "SchemeGroup",
    "SchemeModifier",
]
