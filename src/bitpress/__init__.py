"""Compress language models: quantization and sparsity as algebra on a weight and one pass of statistics."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitpress.apply import apply, compress
    from bitpress.compare import compare
    from bitpress.convert import convert
    from bitpress.errors import (
        BitpressError,
        CheckpointError,
        ConfigError,
        DataError,
        NumericsError,
        PlanError,
        RankError,
        RecipeError,
    )
    from bitpress.evaluate import evaluate
    from bitpress.inspection import inspect_checkpoint
    from bitpress.oneshot import oneshot
    from bitpress.recipe import Recipe
    from bitpress.scan import scan
    from bitpress.train import train

__version__ = "0.1.0"

# name -> module; imported when first used, so that `import bitpress` is quick
_PUBLIC = {
    "BitpressError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "NumericsError": "errors",
    "PlanError": "errors",
    "RankError": "errors",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "apply": "apply",
    "compare": "compare",
    "compress": "apply",
    "convert": "convert",
    "evaluate": "evaluate",
    "inspect_checkpoint": "inspection",
    "oneshot": "oneshot",
    "scan": "scan",
    "train": "train",
}

__all__ = [
    "BitpressError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NumericsError",
    "PlanError",
    "RankError",
    "Recipe",
    "RecipeError",
    "apply",
    "compare",
    "compress",
    "convert",
    "evaluate",
    "inspect_checkpoint",
    "oneshot",
    "scan",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bitpress' has no attribute '{name}'")
    value = getattr(import_module(f"bitpress.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps a function in its place when the submodule of the same name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PUBLIC and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
