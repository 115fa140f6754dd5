"""SparseGPT under the module name that older recipes in Python import it by."""

from bitpress.modifiers.pruning import SparseGPTModifier

__all__ = ["SparseGPTModifier"]
