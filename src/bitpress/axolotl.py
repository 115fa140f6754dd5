"""A plugin for Axolotl that keeps the zeros of a pruned model while Axolotl trains it.

    base_model: out/sparsity_stage
    plugins:
      - bitpress.axolotl.BitpressPlugin
    bitpress:
      recipe:
        finetuning_stage:
          finetuning_modifiers:
            ConstantPruningModifier: {targets: ["re:.*_proj.weight"], start: 0}

The recipe is inline, YAML text, or the name of a file. Every weight that is zero in `base_model` stays zero, which is
checked at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from bitpress.errors import ConfigError
from bitpress.modifiers.base import plain
from bitpress.training.callback import constant_pruning, keep_zeros

if TYPE_CHECKING:
    _Base = object
else:
    try:
        from axolotl.integrations.base import BasePlugin as _Base
    except ImportError:  # Axolotl asks for these methods by name alone
        _Base = object


class Settings(BaseModel):
    """What stands under `bitpress` in Axolotl's YAML; another key is an error."""

    model_config = ConfigDict(extra="forbid")

    recipe: Any
    save_compressed: bool = False


class BitpressArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's configuration."""

    bitpress: Settings | None = None


class BitpressPlugin(_Base):
    """Named in `plugins:` of Axolotl's YAML."""

    def get_input_args(self) -> str:
        """Where the keys of the configuration are described."""
        return "bitpress.axolotl.BitpressArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Read the recipe before anything is loaded.

        Raises:
            ConfigError: there is none, or the configuration goes against it.
            RecipeError: it cannot be read.
        """
        constant_pruning(recipe_of(cfg))
        if _get(_get(cfg, "bitpress"), "save_compressed"):
            raise ConfigError(
                "bitpress.save_compressed: Axolotl writes plain weights; drop it, and pack what it has written: "
                "bitpress convert OUT PACKED --format sparse-24, or quantize it with bitpress oneshot"
            )
        if adapter := _get(cfg, "adapter"):
            raise ConfigError(
                f"adapter: {adapter}: adapters would fill the zeros when they are merged; leave adapter out"
            )

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The callback that keeps zeros, made while the model is as it was loaded."""
        return [keep_zeros(trainer.model, recipe_of(cfg))]


def recipe_of(cfg: Any) -> Any:
    """The recipe in Axolotl's configuration.

    Raises:
        ConfigError: there is none.
    """
    recipe = _get(_get(cfg, "bitpress"), "recipe")
    if recipe is None:
        raise ConfigError("bitpress.recipe: missing in the configuration; give a recipe with a ConstantPruningModifier")
    return plain(recipe)


def _get(holder: Any, key: str) -> Any:
    return holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)
