"""Modifiers that set weights to zero: SparseGPT, Wanda, and by magnitude; and the one that keeps zeros."""

from bitpress.modifiers.pruning.base import ProfileModifier, SparsityClaim, SparsityModifier
from bitpress.modifiers.pruning.constant import ConstantPruningModifier
from bitpress.modifiers.pruning.magnitude import MagnitudePruningModifier
from bitpress.modifiers.pruning.sparsegpt import SparseGPTModifier
from bitpress.modifiers.pruning.wanda import WandaPruningModifier

__all__ = [
    "ConstantPruningModifier",
    "MagnitudePruningModifier",
    "ProfileModifier",
    "SparseGPTModifier",
    "SparsityClaim",
    "SparsityModifier",
    "WandaPruningModifier",
]
