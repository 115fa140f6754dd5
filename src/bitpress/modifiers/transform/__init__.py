"""Modifiers that move scales, under the module names that newer recipes in Python import them by."""

from bitpress.modifiers.awq import AWQModifier
from bitpress.modifiers.smoothquant import SmoothQuantModifier

__all__ = ["AWQModifier", "SmoothQuantModifier"]
