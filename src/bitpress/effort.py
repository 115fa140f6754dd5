"""How much work to put into a scheme: the recipes behind `--effort`. Plain data, no torch.

| effort   | what it does                                                                                           |
|----------|--------------------------------------------------------------------------------------------------------|
| fast     | GPTQ with searched scales and activation order: two forwards of the data                               |
| balanced | scales moved between modules first (AWQ; SmoothQuant where activations are integers), codes and scales |
|          | refined after the sweep, part of the drift of inputs undone; no gradients                              |
| best     | the same, then block tuning with gradients                                                             |
"""

from __future__ import annotations

from typing import Any, Literal

from bitpress.errors import RecipeError
from bitpress.schemes import preset

Effort = Literal["fast", "balanced", "best"]
EFFORTS: tuple[Effort, ...] = ("fast", "balanced", "best")
CORRECT, DAMPENING = 0.4, 0.05


def recipe(effort: Effort, keys: dict[str, Any] | None, pruning: dict[str, Any] | None = None) -> dict[str, Any]:
    """The recipe of an effort.

    Args:
        effort: see above.
        keys: of the quantizer: scheme, bits or config_groups, group_size, ignore; None: nothing is quantized.
        pruning: a pruning modifier by name, which goes before the quantizer. Then no scales are moved: they are
            chosen for rounding alone.
    """
    modifiers: list[dict[str, Any]] = []
    if keys is not None and pruning is None and effort != "fast":
        smoothing = {"ignore": keys.get("ignore", []), "required": False}
        modifiers.append({"SmoothQuantModifier" if _integer_activations(keys) else "AWQModifier": smoothing})
    if pruning is not None:
        modifiers.append(pruning)
    if keys is not None:
        more = {"refine": 0} if effort == "fast" else {"correct": CORRECT, "dampening_frac": DAMPENING}
        modifiers.append({"GPTQModifier": {**keys, **more}})
    if effort == "best":
        modifiers.append({"TuneModifier": {}})
    return {"modifiers": modifiers}


def _integer_activations(keys: dict[str, Any]) -> bool:
    if "scheme" in keys:
        try:
            inputs = preset(keys["scheme"]).input_activations
        except RecipeError:  # the recipe's own reading says what is wrong with it
            return False
        return inputs is not None and inputs.type == "int"
    groups = keys.get("config_groups") or {}
    return any((g.get("input_activations") or {}).get("type", "float") == "int" for g in groups.values())
