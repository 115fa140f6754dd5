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


def recipe(effort: Effort, keys: dict[str, Any]) -> dict[str, Any]:
    """The recipe of an effort.

    Args:
        effort: see above.
        keys: of the quantizer: scheme or bits, group_size, ignore.
    """
    if effort == "fast":
        return {"GPTQModifier": {**keys, "refine": 0}}
    smoothing = {"ignore": keys.get("ignore", []), "required": False}
    modifiers: list[dict[str, Any]] = [
        {"SmoothQuantModifier": smoothing} if _integer_activations(keys) else {"AWQModifier": smoothing},
        {"GPTQModifier": {**keys, "correct": CORRECT, "dampening_frac": DAMPENING}},
    ]
    if effort == "best":
        modifiers.append({"TuneModifier": {}})
    return {"modifiers": modifiers}


def _integer_activations(keys: dict[str, Any]) -> bool:
    if "scheme" not in keys:
        return False
    try:
        inputs = preset(keys["scheme"]).input_activations
    except RecipeError:  # the recipe's own reading says what is wrong with it
        return False
    return inputs is not None and inputs.type == "int"
