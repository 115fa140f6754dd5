"""What a linear is quantized to: preset names and `config_groups` entries as plain data.

The vocabulary (strategy, group_size, dynamic, preset names) is that of compressed-tensors; the table is our
own, because its preset list differs between releases. No tensors here.

| preset                  | weights                          | input activations             |
|-------------------------|----------------------------------|-------------------------------|
| W2A16 .. W8A16          | int, symmetric, groups of 128    | none                          |
| W2A16_ASYM .. W8A16_ASYM| int, zero points, groups of 128  | none                          |
| W8A8 (alias INT8)       | int8, symmetric, per channel     | int8, dynamic, one scale/token|
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

from bitpress.errors import RecipeError, did_you_mean

Strategy = Literal["tensor", "channel", "group", "token", "block", "tensor_group"]
Format = Literal["pack-quantized", "int-quantized"]

STRATEGIES = ("tensor", "channel", "group", "token", "block", "tensor_group")
STRATEGIES_LATER = ("block", "tensor_group", "attn_head")
TYPES = ("int", "float")
MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True, kw_only=True)
class QuantArgs:
    """How one tensor is quantized.

    Values are not checked on construction: `faults` lists everything that is wrong with them.

    Args:
        num_bits: width of a code in bits.
        type: "int" or "float" codes.
        symmetric: codes are centred on zero, so that no zero point is stored.
        strategy: what shares one scale: the tensor, an output channel, a group of input columns, a token.
        group_size: input columns per scale; only with strategy "group".
        dynamic: scales are computed at inference (activations only).
    """

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Strategy
    group_size: int | None = None
    dynamic: bool | Literal["local"] = False

    def faults(self, where: str) -> list[str]:
        """Everything wrong with these values taken alone, each message starting with `where.key`."""
        return [f"{_at(where, key)}: {text}" for key, text in self._faults()]

    def _faults(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        if self.type not in TYPES:
            found.append(("type", f"{self.type!r} is unknown.{did_you_mean(str(self.type), TYPES)}"))
        elif self.type == "float":
            found.append(("type", "'float' is not implemented yet; available: 'int'"))
        if not _is_int(self.num_bits):
            found.append(("num_bits", f"expected a whole number, got {self.num_bits!r}"))
        elif self.type == "int" and not MIN_BITS <= self.num_bits <= MAX_BITS:
            found.append(("num_bits", f"must be {MIN_BITS} to {MAX_BITS} for int, got {self.num_bits}"))
        if not isinstance(self.symmetric, bool):
            found.append(("symmetric", f"expected true or false, got {self.symmetric!r}"))
        if self.strategy in STRATEGIES_LATER:
            found.append(("strategy", f"{self.strategy!r} is not implemented yet; {_AVAILABLE_STRATEGIES}"))
        elif self.strategy not in STRATEGIES:
            found.append(("strategy", f"{self.strategy!r} is unknown.{did_you_mean(str(self.strategy), STRATEGIES)}"))
        else:
            found += _group_size_faults(self.group_size, self.strategy)
        if self.dynamic == "local":
            found.append(("dynamic", "'local' is not implemented yet; available: true, false"))
        elif not isinstance(self.dynamic, bool):
            found.append(("dynamic", f"expected true or false, got {self.dynamic!r}"))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The keys that every compressed-tensors release reads, without nulls."""
        out: dict[str, Any] = {
            "num_bits": self.num_bits,
            "type": self.type,
            "symmetric": self.symmetric,
            "strategy": self.strategy,
        }
        if self.group_size is not None:
            out["group_size"] = self.group_size
        return out | {"dynamic": self.dynamic}


_AVAILABLE_STRATEGIES = "available: tensor, channel, group (weights), token (input_activations)"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Weights and, where given, activations of one linear.

    Args:
        name: the preset that it came from, in capitals; None for a `config_groups` entry.
    """

    name: str | None
    weights: QuantArgs
    input_activations: QuantArgs | None = None
    output_activations: QuantArgs | None = None

    @property
    def format(self) -> Format:
        """The compressed-tensors format that holds it: packed codes, or int8 codes with int8 activations."""
        return "pack-quantized" if self.input_activations is None else "int-quantized"

    def faults(self, where: str = "") -> list[str]:
        """Everything wrong with each part, and with the parts together, each starting with its place."""
        found = self.weights.faults(_at(where, "weights"))
        if not found:
            found = [f"{_at(where, 'weights')}.{fault}" for fault in _weight_faults(self.weights)]
        if self.output_activations is not None:
            found.append(f"{_at(where, 'output_activations')}: not implemented yet; drop it")
        if self.input_activations is not None:
            place = _at(where, "input_activations")
            own = self.input_activations.faults(place)
            if not own and not found:
                own = [f"{place}: {fault}" for fault in _pair_faults(self.weights, self.input_activations)]
            found += own
        return found

    def to_dict(self) -> dict[str, Any]:
        """A `config_groups` entry without its targets; `scheme_from_group` reads it back."""
        out = {"weights": self.weights.to_dict()}
        if self.input_activations is not None:
            out["input_activations"] = self.input_activations.to_dict()
        return out


def _weight_only(name: str, bits: int, symmetric: bool = True) -> Scheme:
    weights = QuantArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=128)
    return Scheme(name=name, weights=weights)


_W8A8 = Scheme(
    name="W8A8",
    weights=QuantArgs(num_bits=8, strategy="channel"),
    input_activations=QuantArgs(num_bits=8, strategy="token", dynamic=True),
)

PRESETS: dict[str, Scheme] = {
    "W2A16": _weight_only("W2A16", 2),
    "W3A16": _weight_only("W3A16", 3),
    "W4A16": _weight_only("W4A16", 4),
    "W5A16": _weight_only("W5A16", 5),
    "W6A16": _weight_only("W6A16", 6),
    "W7A16": _weight_only("W7A16", 7),
    "W8A16": _weight_only("W8A16", 8),
    "W2A16_ASYM": _weight_only("W2A16_ASYM", 2, symmetric=False),
    "W3A16_ASYM": _weight_only("W3A16_ASYM", 3, symmetric=False),
    "W4A16_ASYM": _weight_only("W4A16_ASYM", 4, symmetric=False),
    "W5A16_ASYM": _weight_only("W5A16_ASYM", 5, symmetric=False),
    "W6A16_ASYM": _weight_only("W6A16_ASYM", 6, symmetric=False),
    "W7A16_ASYM": _weight_only("W7A16_ASYM", 7, symmetric=False),
    "W8A16_ASYM": _weight_only("W8A16_ASYM", 8, symmetric=False),
    "W8A8": _W8A8,
    "INT8": _W8A8,
}

# Names that compressed-tensors knows and this table does not have yet: an answer, never "unknown".
# fmt: off
PRESETS_LATER = (
    "UNQUANTIZED", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16",
    "MXFP4", "MXFP4A16", "MXFP4XFP8", "MXFP6A16", "MXFP6A8", "MXFP8", "MXFP8A16",
    "W2A4", "W3A4", "W4A4", "W2A8", "W3A8", "W4A8", "W5A8", "W6A8", "W7A8",
)
# fmt: on


def preset(name: str, group_size: int | None = None) -> Scheme:
    """The scheme of a preset name, in any case.

    Args:
        group_size: input columns per scale in place of the preset's; -1 is one scale per output channel.

    Raises:
        RecipeError: the name is unknown or not implemented yet, or the group size does not fit it.
    """
    if group_size is not None and (not _is_int(group_size) or (group_size < 1 and group_size != -1)):
        size_fault = f"group_size: expected a positive whole number, or -1 for channel, got {group_size!r}"
        raise RecipeError([*_name_faults(name), size_fault])
    if faults := _name_faults(name):
        raise RecipeError(faults)
    scheme = PRESETS[name.upper()]
    if group_size is None:
        return scheme
    if group_size == -1:
        return replace(scheme, weights=replace(scheme.weights, strategy="channel", group_size=None))
    if scheme.weights.strategy != "group":
        raise RecipeError(
            f"group_size: {scheme.name} has one scale per {scheme.weights.strategy}; "
            "drop group_size or use a preset with groups such as W8A16"
        )
    return replace(scheme, weights=replace(scheme.weights, group_size=group_size))


def scheme_from_group(group: Mapping[str, Any], where: str = "") -> Scheme:
    """The scheme of one `config_groups` entry: `{weights: {...}, input_activations: {...}, targets: [...]}`.

    Keys that belong to the modifier (`targets`, and `actorder` and `observer` of the weights) are left to it.

    Raises:
        RecipeError: all faults of the entry, each starting with its place under `where`.
    """
    faults = [
        f"{_at(where, str(key))}: unknown key.{did_you_mean(str(key), _GROUP_KEYS)}"
        for key in group
        if key not in _GROUP_KEYS
    ]
    parts: dict[str, QuantArgs | None] = {}
    for key in ("weights", "input_activations", "output_activations"):
        parts[key] = None
        if group.get(key) is not None:
            parts[key], found = _read_args(group[key], _at(where, key), weights=key == "weights")
            faults += found
    weights = parts["weights"]
    if weights is None:
        if group.get("weights") is None:
            faults.append(f"{_at(where, 'weights')}: missing; give at least num_bits and strategy")
        raise RecipeError(faults)
    scheme = Scheme(
        name=None,
        weights=weights,
        input_activations=parts["input_activations"],
        output_activations=parts["output_activations"],
    )
    faults += scheme.faults(where)
    if not faults and group.get("format") not in (None, scheme.format):
        faults.append(
            f"{_at(where, 'format')}: {group['format']!r} does not hold this scheme; drop it or use '{scheme.format}'"
        )
    if faults:
        raise RecipeError(faults)
    return scheme


_GROUP_KEYS = ("weights", "input_activations", "output_activations", "targets", "format")
_OWN_KEYS = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
# compressed-tensors writes these even where they say nothing.
_IDLE_KEYS: dict[str, tuple[object, ...]] = {
    "block_structure": (None,),
    "observer_kwargs": (None, {}),
    "scale_dtype": (None,),
    "zp_dtype": (None, "torch.int8"),
}


def _read_args(raw: object, where: str, *, weights: bool) -> tuple[QuantArgs | None, list[str]]:
    """QuantArgs of a mapping (None if it is none), and the faults of keys that QuantArgs does not hold."""
    if not isinstance(raw, Mapping):
        return None, [f"{where}: expected keys such as num_bits and strategy, got {raw!r}"]
    known = (*_OWN_KEYS, *_IDLE_KEYS, "actorder", "observer")
    faults = []
    for key, value in raw.items():
        if key not in known:
            faults.append(f"{_at(where, str(key))}: unknown key.{did_you_mean(str(key), known)}")
        elif key in _IDLE_KEYS and value not in _IDLE_KEYS[key]:
            faults.append(f"{_at(where, key)}: not implemented yet; drop it")
        elif key == "actorder" and value not in (None, False) and not weights:
            faults.append(f"{_at(where, key)}: only weights have an act-order; drop it")
    given = {key: raw[key] for key in _OWN_KEYS if raw.get(key) is not None}
    for key in ("type", "strategy", "dynamic"):
        if isinstance(given.get(key), str):
            given[key] = given[key].lower()
    size = given.get("group_size")
    if "strategy" not in given:
        given["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    if size == -1 and given["strategy"] == "channel":
        del given["group_size"]
    return QuantArgs(**given), faults


def _name_faults(name: object) -> list[str]:
    if isinstance(name, str) and name.upper() in PRESETS:
        return []
    if isinstance(name, str) and name.upper() in PRESETS_LATER:
        return [f"scheme: '{name}' is known but not implemented yet; available: {', '.join(PRESETS)}"]
    return [f"scheme: {name!r} is unknown.{did_you_mean(str(name), (*PRESETS, *PRESETS_LATER))}"]


def _group_size_faults(size: object, strategy: str) -> list[tuple[str, str]]:
    if size is None:
        if strategy == "group":
            return [("group_size", "strategy 'group' needs one, such as 128 or 64")]
        return []
    if not _is_int(size):
        return [("group_size", f"expected a positive whole number, got {size!r}")]
    if strategy != "group":
        remedy = "drop group_size or use strategy: group"
        return [("group_size", f"does not go with strategy '{strategy}': {remedy}")]
    if size < 1:
        return [("group_size", f"must be positive, got {size}; for one scale per row use strategy: channel")]
    return []


def _weight_faults(weights: QuantArgs) -> list[str]:
    found = []
    if weights.strategy == "token":
        found.append("strategy: 'token' is for activations; weights have tensor, channel or group")
    if weights.dynamic:
        found.append("dynamic: weights are quantized once; drop it")
    return found


def _pair_faults(weights: QuantArgs, inputs: QuantArgs) -> list[str]:
    available = (
        "available: int8, symmetric, strategy: token, dynamic: true, "
        "with symmetric int8 weights of strategy channel or tensor (W8A8)"
    )
    if (inputs.num_bits, inputs.symmetric, inputs.strategy, inputs.dynamic) != (8, True, "token", True):
        return [f"these activations are not implemented yet; {available}"]
    if weights.num_bits != 8 or not weights.symmetric or weights.strategy == "group":
        return [f"activations with these weights are not implemented yet; {available}"]
    return []


def _at(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _is_int(value: object) -> TypeGuard[int]:
    # bool is an int in Python, and `group_size: true` is a slip.
    return isinstance(value, int) and not isinstance(value, bool)
