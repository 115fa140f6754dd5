"""The callback of transformers' Trainer that keeps zeros; it works in any trainer made of it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from bitpress.errors import PlanError, RecipeError
from bitpress.modifiers.pruning import ConstantPruningModifier
from bitpress.recipe import Recipe
from bitpress.training.masks import Masks, parts_of


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """Keeps the zeros of `masks`.

    Args:
        checks: look at the end whether all are there; a stage of bitpress does it itself, on what it writes.
    """

    def __init__(self, masks: Masks, *, checks: bool = False) -> None:
        self.masks, self.checks = masks, checks

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.masks.attach(given["model"], given["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.masks.cut()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.checks:
            self.masks.check(self.masks.whole)
        self.masks.detach()


def keep_zeros(model: nn.Module, recipe: Any) -> KeepZeros:
    """The callback for a model of transformers that is about to be trained by somebody else's trainer.

    Args:
        model: as it was loaded: not wrapped, no adapters.
        recipe: with one training stage, see `bitpress.recipe`.

    Raises:
        RecipeError: it has no ConstantPruningModifier, or something that this trainer would not do.
        PlanError: targets that match nothing, nothing that is pruned, or adapters.
    """
    from bitpress.subject import ModuleSubject
    from bitpress.trainplan import find_masked

    modifiers = constant_pruning(recipe)
    if hasattr(model, "peft_config"):
        raise PlanError("the model has adapters (LoRA), which would fill the zeros when merged: train all weights")
    subject = ModuleSubject(model)
    try:
        masked, faults, _ = find_masked(modifiers, subject)
    finally:
        subject.close()
    if faults:
        raise PlanError(faults)
    return KeepZeros(Masks(model, parts_of(masked, model)), checks=True)


def constant_pruning(recipe: Any) -> list[ConstantPruningModifier]:
    """What a recipe for somebody else's trainer says; RecipeError if it asks for more than zeros."""
    stages = [s for s in Recipe.load(recipe).stages if s.run_type == "train"]
    modifiers = [m for s in stages for m in s.modifiers]
    kept = [m for m in modifiers if isinstance(m, ConstantPruningModifier)]
    others = [f"{type(m).__name__}: run it with bitpress apply" for m in modifiers if m not in kept]
    if others:
        raise RecipeError(others)
    if len(stages) != 1:
        raise RecipeError(f"the recipe has {len(stages)} training stages; give one, with a ConstantPruningModifier")
    return kept
