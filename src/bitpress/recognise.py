"""How a quantized linear lies on disk: from the tensors of one module to its scheme and size.

| method             | tensors of a module                                                         |
|--------------------|-----------------------------------------------------------------------------|
| compressed-tensors | weight_packed or weight, weight_scale, weight_shape, weight_zero_point      |
| gptq, awq          | qweight, qzeros, scales, g_idx (GPTQ alone)                                 |
| bitsandbytes       | weight with weight.absmax and weight.quant_state..., or with SCB            |
| sparse-24          | values, positions, and of integers scales, zeros                            |
| fp8                | weight, weight_scale_inv                                                    |

Headers are enough, but for the shapes that packing hides: `is_note` names the few bytes to read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bitpress.errors import CheckpointError
from bitpress.scheme_rules import SCALE_DTYPES
from bitpress.schemes import BLOCKWISE, PRESETS, QuantArgs
from bitpress.targets import pattern_fault

METHODS = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "fp8", "sparse-24")
FLOATS = ("F64", "F32", "F16", "BF16")
_QUANT_STATE = "weight.quant_state.bitsandbytes__"
_NOTES = ("weight_shape", "weight_format", _QUANT_STATE)
_STORED = (
    "weight", "qweight", "qzeros", "scales", "g_idx", "SCB", "values", "positions", "zeros", "q4_0", "q4_1", "q8_0",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """One quantized linear.

    Attributes:
        scheme: what it is called in reports too, see `scheme_label`: "W4A16 g64", "int3 tensor"; in GGUF its type.
        group_size: input columns per scale; None where a scale covers a row or the tensor.
        symmetric: None where neither the configuration nor the format tells.
        activations: how inputs are quantized, such as "int8 token sym dynamic"; None if they are not.
        bytes: codes, scales and zero points, without the bias.
        bits_per_weight: the same bytes in bits, per logical weight.
    """

    name: str
    rows: int
    columns: int
    scheme: str
    num_bits: int
    group_size: int | None
    strategy: str
    symmetric: bool | None
    activations: str | None
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / (self.rows * self.columns)


class Stored(NamedTuple):
    """One tensor as a header describes it; bytes as stored."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int


Found = tuple[int, int, "Coding", str | None]  # rows, columns, weights, activations


class Coding(NamedTuple):
    """How codes are stored: everything of a layer but its name and size."""

    type: str
    num_bits: int
    strategy: str
    group_size: int | None = None
    symmetric: bool | None = None
    dynamic: bool | str | None = None  # None for weights
    scale_dtype: str | None = None  # of MX and NVFP4; others have that of the model
    rows: int | None = None  # a scale covers, of a block

    def __str__(self) -> str:
        words = [f"{self.type}{self.num_bits}", self.strategy]
        words += [str(self.group_size)] if self.group_size else []
        words += [] if self.symmetric is None else ["sym" if self.symmetric else "asym"]
        if self.dynamic is not None:
            words.append(self.dynamic if isinstance(self.dynamic, str) else "dynamic" if self.dynamic else "static")
        return " ".join(words)


def read_layer(
    name: str, parts: Mapping[str, Stored], settings: Mapping[str, Any], notes: Mapping[str, Any]
) -> QuantizedLayer | None:
    """The linear that the tensors of one module make up, None if it is not quantized.

    Args:
        parts: the module's tensors by the rest of their names, such as "weight_packed" or "weight.absmax".
        settings: `quantization_config` of config.json, empty if there is none.
        notes: the tensors that `is_note` names, read, by full name.

    Raises:
        CheckpointError: tensors that belong to a quantized linear are missing or do not fit together.
    """
    try:
        if "qweight" in parts:
            found = _gptq_or_awq(name, parts, settings)
        elif state := next((p for p in parts if p.startswith(_QUANT_STATE)), None):
            found = _bitsandbytes_4bit(state, json.loads(bytes(notes[f"{name}.{state}"].tolist())))
        elif "positions" in parts:
            found = _sparse(parts)
        elif "SCB" in parts:
            rows, columns = parts["weight"].shape
            coding = Coding("int", 8, "channel", None, True)
            found = rows, columns, coding, "int8 token dynamic, outliers in 16 bits"
        elif scale_of(parts) or "weight_packed" in parts:
            found = _compressed(name, parts, settings, notes)
        else:
            return None
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        file = next(iter(parts.values())).file
        have = ", ".join(sorted(parts))
        raise CheckpointError(
            f"{file}: '{name}' is not a whole quantized linear, it has {have}; download it again"
        ) from None
    rows, columns, weights, activations = found
    return QuantizedLayer(
        name=name,
        rows=rows,
        columns=columns,
        scheme=_label(weights, activations),
        num_bits=weights.num_bits,
        group_size=weights.group_size,
        strategy=weights.strategy,
        symmetric=weights.symmetric,
        activations=activations,
        bytes=sum(t.bytes for part, t in parts.items() if is_counted(part)),
    )


def _compressed(name: str, parts: Mapping[str, Stored], settings: Mapping[str, Any], notes: Mapping[str, Any]) -> Found:
    """compressed-tensors and fp8: `weight_packed` or `weight`, beside `weight_scale`."""
    codes = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    scale = scale_of(parts)
    if scale is None:
        raise KeyError("weight_scale")
    group = _group_of(name, settings) or {}
    if "weight_shape" in parts:
        rows, columns = (int(n) for n in notes[f"{name}.weight_shape"].tolist())
    elif "weight_packed" in parts:
        rows, columns = codes.shape[0], 8 * codes.bytes // codes.shape[0] // int(group["weights"]["num_bits"])
    else:
        rows, columns = math.prod(codes.shape[:-1]), codes.shape[-1]
    if weights := group.get("weights"):
        coding = _coding(weights, activations=False)
    else:
        kind = "float" if codes.dtype.startswith(("F", "B")) else "int"
        bits = 8 * codes.bytes // (rows * columns)
        coding = Coding(kind, bits, *_layout(scale.shape, rows, columns), "weight_zero_point" not in parts)
    inputs = group.get("input_activations")
    activations = str(_coding(inputs, activations=True)) if inputs else None
    if "activation_scheme" in settings:
        activations = f"float8 {settings['activation_scheme']}"
    return rows, columns, coding, activations


def _gptq_or_awq(name: str, parts: Mapping[str, Stored], settings: Mapping[str, Any]) -> Found:
    """Both hold int32 words: GPTQ packs along the input columns, AWQ along the output rows."""
    groups, rows = parts["scales"].shape
    bits = 32 * parts["qzeros"].shape[1] // rows
    symmetric: bool | None = settings.get("sym")
    named = settings.get("group_size")
    for pattern, own in (settings.get("dynamic") or {}).items():
        if pattern.startswith("+:") and re.match(pattern[2:], name):
            symmetric, named = own.get("sym", symmetric), own.get("group_size", named)
    columns = 32 * parts["qweight"].shape[0] // bits
    if _packs_rows(parts):
        columns, symmetric = parts["qweight"].shape[0], not settings.get("zero_point", True)
    layout = ("group", columns) if named == columns else _layout((rows, groups), rows, columns)
    return rows, columns, Coding("int", bits, *layout, symmetric), None


def _sparse(parts: Mapping[str, Stored]) -> Found:
    """2:4: the two kept weights of every four columns."""
    rows, eighths = parts["positions"].shape
    if "scales" not in parts:
        return rows, 8 * eighths, Coding("dense", 16 if parts["values"].dtype != "F32" else 32, "2:4"), None
    strategy, group_size = _layout(parts["scales"].shape, rows, 8 * eighths)
    return rows, 8 * eighths, Coding("int", 4, f"2:4 {strategy}", group_size, "zeros" not in parts), None


def _bitsandbytes_4bit(part: str, state: Mapping[str, Any]) -> Found:
    rows, columns = state["shape"]
    kind = part.removeprefix(_QUANT_STATE)
    return rows, columns, Coding(kind, 4, "group", int(state["blocksize"])), None


def _layout(scale: tuple[int, ...], rows: int, columns: int) -> tuple[str, int | None]:
    """The strategy and the columns per scale that the shape of the scales tells."""
    if math.prod(scale) == 1 and rows > 1:
        return "tensor", None
    groups = scale[1] if len(scale) > 1 else 1
    if scale[0] < rows:
        return "block", -(-columns // groups)
    return ("channel", None) if groups == 1 else ("group", -(-columns // groups))


def _coding(args: Mapping[str, Any], *, activations: bool) -> Coding:
    """A weights or activations entry of a config group, with the writer's defaults filled in."""
    size = args.get("group_size")
    size = None if size == -1 else size
    default = "group" if size else "tensor" if args.get("group_size") is None else "channel"
    block = args.get("block_structure")
    return Coding(
        type=str(args.get("type") or "int"),
        num_bits=int(args.get("num_bits") or 8),
        strategy=str(args.get("strategy") or default),
        group_size=int(block[1]) if block else size,
        rows=int(block[0]) if block else None,
        symmetric=bool(args.get("symmetric", True)),
        dynamic=(args.get("dynamic") or False) if activations else None,
        scale_dtype=own if (own := str(args.get("scale_dtype")).removeprefix("torch.")) in SCALE_DTYPES else None,
    )


def cache_of(settings: Mapping[str, Any]) -> str | None:
    """How keys and values are quantized in the cache, None if they are not."""
    args = settings.get("kv_cache_scheme")
    return str(_coding(args, activations=True)) if isinstance(args, Mapping) else None


def scheme_label(weights: QuantArgs, inputs: QuantArgs | None) -> str:
    """A scheme in a few words, for plans, reports, `inspect` and `compare`: `W4A16 g64`, `W8A8 channel`, `nf4 g64`."""
    activations = None if inputs is None else str(_coding(inputs.to_dict(), activations=True))
    return _label(_coding(weights.to_dict(), activations=False), activations)


@cache
def _label(weights: Coding, activations: str | None) -> str:
    """The preset that this is, in groups of any size or rows, else type and width; then what shares a scale."""
    if weights.strategy.startswith("2:4"):  # kept weights alone are stored
        whole = weights._replace(strategy=weights.strategy[3:].strip())
        return ("dense" if weights.type == "dense" else _label(whole, activations)) + ", 2:4"
    size = f" {weights.group_size}" if weights.group_size else ""
    layout = f"g{weights.group_size}" if size and "group" in weights.strategy else f"{weights.strategy}{size}"
    layout = f"{weights.rows} x{size}" if weights.rows else layout
    if (name := _preset_of(weights, activations)) is not None:
        return f"{name} {layout}"
    kind = weights.type if weights.type in BLOCKWISE else f"{weights.type}{weights.num_bits}"
    text = f"{kind} {layout}" + (" asym" if weights.symmetric is False else "")
    return text if activations is None else f"{text}, inputs {activations}"


def _preset_of(weights: Coding, activations: str | None) -> str | None:
    bare = weights._replace(group_size=None, rows=None)
    for name, scheme in PRESETS.items():
        inputs = scheme.input_activations
        known = None if inputs is None else str(_coding(inputs.to_dict(), activations=True))
        own = _coding(scheme.weights.to_dict(), activations=False)._replace(group_size=None, rows=None)
        rows = own._replace(strategy="channel") if (own.type, own.strategy) == ("int", "group") else own
        if bare in (own, rows) and known == activations:
            return name
    return None


def config_groups_of(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of `config_groups`, in their order."""
    return [g for g in (settings.get("config_groups") or {}).values() if isinstance(g, Mapping)]


def _group_of(name: str, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The group whose target is the closest: the name itself, an expression, then a class name."""
    if any(_means(target, name) in (0, 1) for target in settings.get("ignore") or ()):
        return None
    found = [
        (rank, place)
        for place, group in enumerate(config_groups_of(settings))
        for target in group.get("targets") or ()
        if (rank := _means(target, name)) is not None
    ]
    return config_groups_of(settings)[min(found)[1]] if found else None


def _means(target: str, name: str) -> int | None:
    """0: the name itself; 1: an expression that matches; 2: a class, on disk any; None: no match."""
    if target.startswith("re:"):
        if fault := pattern_fault(target):
            raise CheckpointError(f"config.json, quantization_config: {fault}")
        return 1 if re.match(target[3:], name) else None
    return 0 if target == name else 2 if target[:1].isupper() else None


def tensor_method(modules: Mapping[str, Mapping[str, Stored]]) -> str | None:
    """The method whose tensor names and shapes the modules have."""
    for parts in modules.values():
        if "qweight" in parts and "scales" in parts:
            return "awq" if _packs_rows(parts) else "gptq"
        if "positions" in parts and "values" in parts:
            return "sparse-24"
        if "weight.absmax" in parts or "SCB" in parts:
            return "bitsandbytes"
        if "weight_scale_inv" in parts:
            return "fp8"
        if "weight_packed" in parts or scale_of(parts):
            return "compressed-tensors"
    return None


def _packs_rows(parts: Mapping[str, Stored]) -> bool:
    return "g_idx" not in parts and parts["qweight"].shape[1] != parts["scales"].shape[1]


def is_counted(part: str) -> bool:
    """Whether a tensor of a linear counts in its bits per weight: codes, scales, zero points, and what decodes them."""
    return part.startswith(_STORED) and not is_note(part)


def is_note(part: str) -> bool:
    """Whether a tensor is a few bytes about the layer, such as its shape, that `read_layer` needs read."""
    return part.startswith(_NOTES)


def scale_of(parts: Mapping[str, Stored]) -> Stored | None:
    """The scales beside a `weight` or `weight_packed`, None where there are none."""
    if "weight" not in parts and "weight_packed" not in parts:
        return None
    return parts.get("weight_scale") or parts.get("weight_scale_inv")
