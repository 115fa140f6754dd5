"""Recipes that are asked for by a scheme, a size or a sparsity, and by how much work to put in. Plain data, no torch.

| effort   | what it does                                                                                           |
|----------|--------------------------------------------------------------------------------------------------------|
| fast     | GPTQ with searched scales and activation order; one forward of the data instead of two, in the         |
|          | uncompressed model (`oneshot(propagate=False)`)                                                        |
| balanced | scales moved between modules first (AWQ; SmoothQuant where activations are integers), codes and scales |
|          | refined after the sweep, part of the error of the layers before undone; no gradients                   |
| best     | the same, then block tuning with gradients where weights have less than 8 bits or are pruned: with 8   |
|          | there is nothing to gain                                                                               |

A sparsity prunes with SparseGPT before the quantizer; then no scales are moved. Without a quantizer SparseGPT undoes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

from bitpress.errors import ConfigError, RecipeError, did_you_mean
from bitpress.schemes import BLOCKWISE, preset

Effort = Literal["fast", "balanced", "best"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
METHODS = {"gptq": "GPTQModifier", "rtn": "QuantizationModifier"}
CORRECT, DAMPENING = 0.4, 0.05
SEXAGESIMAL = (124, 248, 496)  # 2:4, 4:8 and 8:16 as YAML 1.1 reads them where they are not quoted


def asked_for(
    *,
    scheme: str | None = None,
    bits: float | None = None,
    group_size: int | None = None,
    method: str | None = None,
    effort: str | None = None,
    sparsity: str | float | None = None,
    ignore: str | list[str] | None = None,
    written: Any = None,
    spelled: Callable[[str], str] = str,
) -> Any:
    """The recipe that these arguments of `oneshot` describe; `written` itself where there is one.

    Args:
        bits: only said to be there; `Recipe.load` gives it to the modifier that quantizes.
        spelled: how the user wrote the name of an argument.

    Raises:
        ConfigError: all that does not go together, or is unknown.
    """
    given = {
        "scheme": scheme, "group_size": group_size, "method": method, "effort": effort, "sparsity": sparsity,
        "ignore": ignore,
    }  # fmt: skip
    there = [name for name, value in given.items() if value not in (None, [])]
    if written is not None:
        if there:
            raise ConfigError(
                f"{', '.join(map(spelled, there))}: cannot go with {spelled('recipe')}; write it into the recipe"
            )
        return written
    faults = []
    if bits is not None and (extra := [name for name in there if name in ("scheme", "group_size")]):
        names = ", ".join(map(spelled, extra))
        faults.append(f"{names}: cannot go with {spelled('bits')}, which chooses the schemes; drop one of them")
    dense = scheme is None and bits is None
    if dense and sparsity is not None:
        faults += [
            f"{spelled(n)}: goes with {spelled('scheme')} or {spelled('bits')}"
            for n in ("group_size", "method")
            if n in there
        ]
    elif dense:
        what = f"{', '.join(map(spelled, there))}: nothing says what to make of the model"
        faults.append(
            f"{what if there else spelled('recipe') + ': missing'}; "
            f"give {spelled('scheme')} (such as W4A16), {spelled('bits')} (such as 4.25), {spelled('sparsity')} "
            f"(such as 2:4) or {spelled('recipe')}"
        )
    for name, value, known in (("method", method, tuple(METHODS)), ("effort", effort, EFFORTS)):
        if value is not None and value not in known:
            faults.append(f"{spelled(name)}: {value!r} is unknown.{did_you_mean(str(value), known)}")
    if effort is not None and method == "rtn":
        faults.append(f"{spelled('effort')}: goes with {spelled('method')} gptq; rounding to nearest has none")
    blockwise = isinstance(scheme, str) and scheme.lower() in BLOCKWISE
    if blockwise:
        more = [n for n in ("method", "effort", "sparsity") if given[n] not in (None, "rtn")]
        faults += [f"{spelled(n)}: {str(scheme).upper()} is rounded to nearest by bitsandbytes; drop it" for n in more]
    if sparsity is not None and _nothing(sparsity):
        faults.append(f"{spelled('sparsity')}: {sparsity} prunes nothing; leave it out")
    pruning = None
    if sparsity is not None:
        pruning = {"SparseGPTModifier": {**_zeros(sparsity), "ignore": ignore or ["lm_head"]}}
    if faults:
        named = None if scheme is None or blockwise else {"GPTQModifier": {"scheme": scheme}}
        raise ConfigError(faults + [fault for part in (pruning, named) if part for fault in _faults_of(part)])
    if blockwise:
        size = {} if group_size is None else {"blocksize": group_size}
        return {"BitsAndBytesModifier": {"quant_type": str(scheme).lower(), "ignore": ignore or ["lm_head"], **size}}
    keys: dict[str, Any] = {"ignore": ignore or ["lm_head"]}
    keys |= {key: given[key] for key in ("scheme", "group_size") if given[key] is not None}
    if effort is not None:
        return recipe(cast(Effort, effort), None if dense else keys, pruning)
    return (pruning or {}) | ({} if dense else {METHODS[method or "gptq"]: keys})


def _faults_of(modifiers: dict[str, Any]) -> list[str]:
    """What a recipe of these modifiers would be told."""
    from bitpress.recipe import Recipe

    try:
        Recipe.load(modifiers)
    except RecipeError as error:
        return list(error.problems)
    return []


def _nothing(sparsity: Any) -> bool:
    try:
        return float(sparsity) == 0
    except (TypeError, ValueError):  # such as 2:4
        return False


def _zeros(sparsity: Any) -> dict[str, Any]:
    """The key of a pruning modifier that a sparsity means: a structure such as "2:4", or a share of zeros."""
    structured = ":" in sparsity if isinstance(sparsity, str) else sparsity in SEXAGESIMAL
    return {"mask_structure" if structured else "sparsity": sparsity}


def recipe(effort: Effort, keys: dict[str, Any] | None, pruning: dict[str, Any] | None = None) -> dict[str, Any]:
    """The recipe of an effort.

    Args:
        effort: see above.
        keys: of the quantizer: scheme, bits or config_groups, group_size, ignore; None: nothing is quantized.
        pruning: SparseGPT's keys by its name, which goes before the quantizer. Then no scales are moved: they are
            chosen for rounding alone. Of the two the last one undoes: what SparseGPT undoes, rounding loses again on
            some data (bench/LOG.md).
    """
    undoes = {} if effort == "fast" else {"correct": CORRECT}
    modifiers: dict[str, Any] = {}
    if keys is not None and pruning is None and effort != "fast":
        smoothing = {"ignore": keys.get("ignore", []), "required": False}
        if integer_activations(keys):
            modifiers["SmoothQuantModifier"] = {"smoothing_strength": "search", **smoothing}
        else:
            modifiers["AWQModifier"] = smoothing
    modifiers |= {name: {**(undoes if keys is None else {}), **given} for name, given in (pruning or {}).items()}
    if keys is not None:
        more = {"refine": 0} if effort == "fast" else {**undoes, "dampening_frac": DAMPENING}
        modifiers["GPTQModifier"] = {**keys, **more}
    if effort == "best" and (pruning or not _eight_bits(keys)):
        modifiers["TuneModifier"] = {"batch_size": 8} if pruning else {}
    return modifiers


def _eight_bits(keys: dict[str, Any] | None) -> bool:
    """Whether all weights keep 8 bits or more by what a quantizer's keys say."""
    found = [] if keys is None else [weights for weights, _ in _rounded(keys)]
    return bool(found) and all(bits >= 8 for bits in found)


def integer_activations(keys: dict[str, Any]) -> bool:
    """Whether inputs are rounded to integers by what a quantizer's keys say."""
    return any(inputs == "int" for _, inputs in _rounded(keys))


def _rounded(keys: dict[str, Any]) -> list[tuple[int, str | None]]:
    """Of each group of a quantizer's keys: bits of weights, type of inputs if they are rounded."""
    if "scheme" in keys:
        try:
            scheme = preset(keys["scheme"])
        except (RecipeError, AttributeError):  # the recipe's own reading says what is wrong with it
            return []
        inputs = scheme.input_activations
        return [(scheme.weights.num_bits, None if inputs is None else inputs.type)]
    groups = (keys.get("config_groups") or {}).values()
    read = [((g.get("weights") or {}), (g.get("input_activations") or {})) for g in groups if isinstance(g, dict)]
    return [(weights.get("num_bits", 0), inputs.get("type")) for weights, inputs in read]
