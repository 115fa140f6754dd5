"""Modifiers that set weights to zero: SparseGPT, Wanda, and by magnitude."""

from bitpress.modifiers.pruning.base import ProfileModifier, SparsityClaim, SparsityModifier
from bitpress.modifiers.pruning.magnitude import MagnitudePruningModifier
from bitpress.modifiers.pruning.sparsegpt import SparseGPTModifier
from bitpress.modifiers.pruning.wanda import WandaPruningModifier

__all__ = [
    "MagnitudePruningModifier",
    "ProfileModifier",
    "SparseGPTModifier",
    "SparsityClaim",
    "SparsityModifier",
    "WandaPruningModifier",
]
