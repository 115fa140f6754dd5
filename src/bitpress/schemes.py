"""What a linear is quantized to: preset names and `config_groups` entries as plain data.

The vocabulary (strategy, group_size, dynamic, preset names) is that of compressed-tensors; the table is our
own, because its preset list differs between releases. No tensors here. What goes with what is in `scheme_rules`.

| preset                    | weights                              | input activations                        | data |
|---------------------------|--------------------------------------|------------------------------------------|------|
| W2A16 .. W8A16            | int, symmetric, groups of 128        | none                                     |      |
| W2A16_ASYM .. W8A16_ASYM  | int, zero points, groups of 128      | none                                     |      |
| W8A8 (alias INT8)         | int8, symmetric, per channel         | int8, dynamic, one scale a token         |      |
| W2A8 .. W7A8, W2A4 .. W4A4| int, symmetric, groups of 128        | int8 or int4, dynamic, one scale a token |      |
| W4AFP8                    | int4, symmetric, groups of 128       | fp8, dynamic, one scale a token          |      |
| FP8                       | fp8 (e4m3), one scale                | fp8, static, one scale                   | yes  |
| FP8_DYNAMIC               | fp8, per channel                     | fp8, dynamic, one scale a token          |      |
| FP8_BLOCK                 | fp8, blocks of 128 x 128             | fp8, dynamic, groups of 128              |      |
| NVFP4A16                  | fp4 (e2m1), groups of 16, two-level  | none                                     |      |
| NVFP4                     | as NVFP4A16                          | the same, local scales dynamic           | yes  |
| MXFP4A16, MXFP6A16, MXFP8A16 | fp4, fp6 (e2m3), fp8, groups of 32, scales are powers of two | none          |      |
| MXFP4, MXFP8              | as MXFP4A16, MXFP8A16                | the same, dynamic                        |      |
| MXFP4XFP8                 | as MXFP4A16                          | fp8, dynamic, groups of 128              |      |
| MXFP6A8                   | as MXFP6A16                          | as MXFP8                                 |      |
| UNQUANTIZED               | none: in config_groups, linears that stay as they are | none                    |      |

"data": static scales are set from calibration data, so that these presets need some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from bitpress import scheme_rules as rules
from bitpress.errors import RecipeError, did_you_mean
from bitpress.scheme_rules import at, is_int

Strategy = Literal["tensor", "channel", "group", "token", "block", "tensor_group", "attn_head"]
Format = Literal[
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized",
]  # fmt: skip
ScaleType = Literal["uint8", "float8_e4m3fn"]

UNQUANTIZED = "UNQUANTIZED"
BLOCKWISE = ("nf4", "fp4")  # types that bitsandbytes rounds to; not in `config_groups`


@dataclass(frozen=True, kw_only=True)
class QuantArgs:
    """How one tensor is quantized.

    Values are not checked on construction: `faults` lists everything that is wrong with them.

    Args:
        num_bits: width of a code in bits.
        type: "int" or "float" codes; "nf4" and "fp4" are those of `BitsAndBytesModifier` alone.
        symmetric: codes are centred on zero, so that no zero point is stored.
        strategy: what shares one scale: the tensor, an output channel, a group of input columns, a block of rows and
            columns, a token, an attention head; "tensor_group" is a group under a scale of the whole tensor.
        group_size: input columns per scale; only with strategy "group" and "tensor_group".
        block_structure: rows and columns per scale; only with strategy "block".
        dynamic: scales are computed at inference (activations only); "local": those of the groups are.
        scale_dtype: encoding of scales: "uint8", exponents of two (MX); "float8_e4m3fn" (NVFP4); None, the model's.
    """

    num_bits: int = 8
    type: Literal["int", "float", "nf4", "fp4"] = "int"
    symmetric: bool = True
    strategy: Strategy
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    scale_dtype: ScaleType | None = None

    def faults(self, where: str) -> list[str]:
        """Everything wrong with these values taken alone, each message starting with `where.key`."""
        return [f"{at(where, key)}: {text}" for key, text in rules.args_faults(self)]

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
        if self.block_structure is not None:
            out["block_structure"] = list(self.block_structure)
        if self.scale_dtype is not None:
            out["scale_dtype"] = f"torch.{self.scale_dtype}"
        return out | {"dynamic": self.dynamic}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Weights and, where given, activations of one linear.

    Args:
        name: the preset that it came from, in capitals; None for a `config_groups` entry.
        stored_as: the format, where it is not the usual one of the scheme.
        nested, storage, compute: of bitsandbytes: whether scales are quantized too, and the dtypes that hold packed
            codes and that clients multiply in.
    """

    name: str | None
    weights: QuantArgs
    input_activations: QuantArgs | None = None
    output_activations: QuantArgs | None = None
    stored_as: Format | None = None
    nested: bool = False
    storage: str = "uint8"
    compute: str = "bfloat16"

    @property
    def format(self) -> Format:
        """The compressed-tensors format that holds it."""
        return self.stored_as or self.formats[0]

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats that can hold it, the one that compressed-tensors chooses first.

        One exception: int weights with float activations are packed, because the kernel of vLLM reads them so.
        """
        weights, inputs = self.weights, self.input_activations
        if weights.type == "int":
            if inputs is None or inputs.type == "float":
                return ("pack-quantized",)
            return ("int-quantized", "pack-quantized")
        if weights.num_bits == 4:
            return ("nvfp4-pack-quantized" if weights.strategy == "tensor_group" else "mxfp4-pack-quantized",)
        if weights.num_bits == 6:
            return ("mxfp6-pack-quantized",)
        if weights.scale_dtype == "uint8":
            return ("mxfp8-quantized",)
        return ("naive-quantized" if inputs is None else "float-quantized",)

    @property
    def static_inputs(self) -> bool:
        """Whether calibration data set a scale of the inputs: the whole scale, or the one on top of dynamic ones."""
        return self.input_activations is not None and self.input_activations.dynamic is not True

    def faults(self, where: str = "") -> list[str]:
        """Everything wrong with each part, and with the parts together, each starting with its place."""
        found = self.weights.faults(at(where, "weights"))
        if not found:
            found = [f"{at(where, 'weights')}.{fault}" for fault in rules.weight_faults(self.weights)]
        if self.output_activations is not None:
            found.append(
                f"{at(where, 'output_activations')}: no client quantizes the outputs of a linear; drop it, or for keys "
                "and values in the cache give the modifier kv_cache_scheme"
            )
        if self.input_activations is not None:
            place = at(where, "input_activations")
            own = self.input_activations.faults(place)
            if not own:
                own = [f"{place}.{fault}" for fault in rules.input_faults(self.input_activations)]
            if not own and not found:
                own = [f"{place}: {fault}" for fault in rules.pair_faults(self.weights, self.input_activations)]
            found += own
        return found

    def to_dict(self) -> dict[str, Any]:
        """A `config_groups` entry without its targets; `scheme_from_group` reads it back."""
        out = {"weights": self.weights.to_dict()}
        if self.input_activations is not None:
            out["input_activations"] = self.input_activations.to_dict()
        return out


def _int(bits: int, symmetric: bool = True) -> QuantArgs:
    return QuantArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=128)


def _token(bits: int, kind: Literal["int", "float"] = "int") -> QuantArgs:
    return QuantArgs(num_bits=bits, type=kind, strategy="token", dynamic=True)


def _float(strategy: Strategy, dynamic: bool = False, size: int | None = None) -> QuantArgs:
    return QuantArgs(num_bits=8, type="float", strategy=strategy, dynamic=dynamic, group_size=size)


def _mx(bits: int, dynamic: bool = False) -> QuantArgs:
    return QuantArgs(
        num_bits=bits, type="float", strategy="group", group_size=32, scale_dtype="uint8", dynamic=dynamic
    )  # fmt: skip


def _nvfp4(dynamic: Literal[False, "local"] = False) -> QuantArgs:
    return QuantArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype="float8_e4m3fn", dynamic=dynamic
    )  # fmt: skip


_BLOCK = QuantArgs(num_bits=8, type="float", strategy="block", block_structure=(128, 128))
_W8A8 = (QuantArgs(num_bits=8, strategy="channel"), _token(8))
_PARTS: dict[str, tuple[QuantArgs, QuantArgs | None]] = {
    **{f"W{bits}A16": (_int(bits), None) for bits in range(2, 9)},
    **{f"W{bits}A16_ASYM": (_int(bits, symmetric=False), None) for bits in range(2, 9)},
    "W8A8": _W8A8,
    "INT8": _W8A8,
    **{f"W{bits}A8": (_int(bits), _token(8)) for bits in range(2, 8)},
    **{f"W{bits}A4": (_int(bits), _token(4)) for bits in range(2, 5)},
    "W4AFP8": (_int(4), _token(8, "float")),
    "FP8": (_float("tensor"), _float("tensor")),
    "FP8_DYNAMIC": (_float("channel"), _token(8, "float")),
    "FP8_BLOCK": (_BLOCK, _float("group", dynamic=True, size=128)),
    "NVFP4A16": (_nvfp4(), None),
    "NVFP4": (_nvfp4(), _nvfp4("local")),
    "MXFP4A16": (_mx(4), None),
    "MXFP4": (_mx(4), _mx(4, dynamic=True)),
    "MXFP4XFP8": (_mx(4), _float("group", dynamic=True, size=128)),
    "MXFP6A16": (_mx(6), None),
    "MXFP6A8": (_mx(6), _mx(8, dynamic=True)),
    "MXFP8A16": (_mx(8), None),
    "MXFP8": (_mx(8), _mx(8, dynamic=True)),
}
ALIASES = {"INT8": "W8A8"}
PRESETS: dict[str, Scheme] = {
    name: Scheme(name=ALIASES.get(name, name), weights=weights, input_activations=inputs)
    for name, (weights, inputs) in _PARTS.items()
}


def preset(name: str, group_size: int | None = None) -> Scheme:
    """The scheme of a preset name, in any case.

    Args:
        group_size: input columns per scale in place of the preset's; -1 is one scale per output channel.

    Raises:
        RecipeError: the name is unknown, or the group size does not fit it.
    """
    if group_size is not None and (not is_int(group_size) or (group_size < 1 and group_size != -1)):
        size_fault = f"group_size: expected a positive whole number, or -1 for channel, got {group_size!r}"
        raise RecipeError([*_name_faults(name), size_fault])
    if faults := _name_faults(name):
        raise RecipeError(faults)
    scheme = PRESETS[name.upper()]
    if group_size is None:
        return scheme
    args = scheme.weights
    if args.type == "int" and args.strategy == "group":
        if group_size == -1:
            return replace(scheme, weights=replace(args, strategy="channel", group_size=None))
        return replace(scheme, weights=replace(args, group_size=group_size))
    if group_size in (args.group_size, -1 if args.strategy == "channel" else None):
        return scheme
    if args.group_size is not None:
        raise RecipeError(f"group_size: {scheme.name} has groups of {args.group_size} by definition; drop group_size")
    per = "a block of 128 x 128" if args.strategy == "block" else args.strategy
    raise RecipeError(
        f"group_size: {scheme.name} has one scale per {per}; drop group_size or use a preset with groups such as W8A16"
    )


def scheme_from_group(group: Mapping[str, Any], where: str = "") -> Scheme:
    """The scheme of one `config_groups` entry: `{weights: {...}, input_activations: {...}, targets: [...]}`.

    Keys that belong to the modifier (`targets`, and `actorder` and `observer` of the weights) are left to it.

    Raises:
        RecipeError: all faults of the entry, each starting with its place under `where`.
    """
    faults = [
        f"{at(where, str(key))}: unknown key.{did_you_mean(str(key), _GROUP_KEYS)}"
        for key in group
        if key not in _GROUP_KEYS
    ]
    parts: dict[str, QuantArgs | None] = {}
    for key in ("weights", "input_activations", "output_activations"):
        parts[key] = None
        if group.get(key) is not None:
            parts[key], found = read_args(group[key], at(where, key), weights=key == "weights")
            faults += found
    weights = parts["weights"]
    if weights is None:
        if group.get("weights") is None:
            faults.append(f"{at(where, 'weights')}: missing; give at least num_bits and strategy")
        raise RecipeError(faults)
    scheme = Scheme(
        name=None,
        weights=weights,
        input_activations=parts["input_activations"],
        output_activations=parts["output_activations"],
    )
    faults += scheme.faults(where)
    stored = group.get("format")
    if not faults and stored not in (None, *scheme.formats):
        remedy = " or ".join(f"'{name}'" for name in scheme.formats)
        faults.append(f"{at(where, 'format')}: {stored!r} does not hold this scheme; drop it or use {remedy}")
    if faults:
        raise RecipeError(faults)
    return scheme if stored in (None, scheme.format) else replace(scheme, stored_as=stored)


def cache_scheme(raw: object, where: str) -> QuantArgs:
    """How keys and values are quantized: `kv_cache_scheme` of a recipe or of config.json.

    Raises:
        RecipeError: all faults, each starting with its place under `where`.
    """
    args, faults = read_args(raw, where, weights=False)
    if args is not None:
        faults += args.faults(where) or [f"{where}.{fault}" for fault in rules.cache_faults(args)]
    if faults or args is None:
        raise RecipeError(faults)
    return args


_GROUP_KEYS = ("weights", "input_activations", "output_activations", "targets", "format")
_OWN_KEYS = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "scale_dtype",
)  # fmt: skip
# compressed-tensors writes these even where they say nothing.
_IDLE_KEYS: dict[str, tuple[object, ...]] = {
    "observer_kwargs": (None, {}),
    "zp_dtype": (None, "torch.int8", "torch.uint8", "torch.float8_e4m3fn"),
}
# names under which other tools know the range of what was seen, which static scales are set from
_RANGES = (None, "minmax", "static_minmax", "memoryless", "memoryless_minmax")


def read_args(raw: object, where: str, *, weights: bool) -> tuple[QuantArgs | None, list[str]]:
    """QuantArgs of a mapping (None if it is none), and the faults of keys that QuantArgs does not hold."""
    if not isinstance(raw, Mapping):
        return None, [f"{where}: expected keys such as num_bits and strategy, got {raw!r}"]
    known = (*_OWN_KEYS, *_IDLE_KEYS, "actorder", "observer")
    faults = []
    for key, value in raw.items():
        if key not in known:
            faults.append(f"{at(where, str(key))}: unknown key.{did_you_mean(str(key), known)}")
        elif key in _IDLE_KEYS and value not in _IDLE_KEYS[key]:
            faults.append(f"{at(where, key)}: not implemented yet; drop it")
        elif key == "actorder" and value not in (None, False) and not weights:
            faults.append(f"{at(where, key)}: only weights have an act-order; drop it")
        elif key == "observer" and value not in _RANGES and not weights:
            faults.append(f"{at(where, key)}: activations take the range that was seen; use 'minmax' or drop it")
    given = {key: raw[key] for key in _OWN_KEYS if raw.get(key) is not None}
    for key in ("type", "strategy", "dynamic"):
        if isinstance(given.get(key), str):
            given[key] = given[key].lower()
    if isinstance(given.get("scale_dtype"), str):
        given["scale_dtype"] = given["scale_dtype"].removeprefix("torch.")
        if given["scale_dtype"] in ("float16", "bfloat16", "float32"):
            del given["scale_dtype"]  # what the model has, or what its reader turns them into
    if "block_structure" in given:
        given["block_structure"] = _block(given["block_structure"])
    size = given.get("group_size")
    if "strategy" not in given:
        given["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    if size == -1 and given["strategy"] == "channel":
        del given["group_size"]
    if given.get("type") == "float" and "scale_dtype" not in given:
        # the only encoding there is
        if given["strategy"] == "tensor_group":
            given["scale_dtype"] = "float8_e4m3fn"
        elif weights and given.get("num_bits") in (4, 6) and (given["strategy"], size) == ("group", 32):
            given["scale_dtype"] = "uint8"
    return QuantArgs(**given), faults


def _block(value: object) -> object:
    """[128, 128] or "128x128" as a pair; anything else as it is, for the checks."""
    if isinstance(value, str):
        words = value.lower().split("x")
        return tuple(int(word) for word in words) if all(word.isdecimal() for word in words) else value
    return tuple(value) if isinstance(value, list) else value


def _name_faults(name: object) -> list[str]:
    if isinstance(name, str) and name.upper() in PRESETS:
        return []
    if isinstance(name, str) and name.upper() == UNQUANTIZED:
        remedy = "it names linears to leave alone in config_groups; give another preset, or drop the modifier"
        return [f"scheme: {UNQUANTIZED} would quantize nothing: {remedy}"]
    return [f"scheme: {name!r} is unknown.{did_you_mean(str(name), (*PRESETS, UNQUANTIZED))}"]
