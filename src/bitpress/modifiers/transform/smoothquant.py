"""SmoothQuant under a second module name."""

from bitpress.modifiers.smoothquant import SmoothQuantModifier

__all__ = ["SmoothQuantModifier"]
