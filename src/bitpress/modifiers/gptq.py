"""GPTQ under the module name that newer recipes in Python import it by."""

from bitpress.modifiers.quantization import GPTQModifier

__all__ = ["GPTQModifier"]
