"""AWQ under a second module name."""

from bitpress.modifiers.awq import AWQMapping, AWQModifier

__all__ = ["AWQMapping", "AWQModifier"]
