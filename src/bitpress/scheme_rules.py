"""What goes with what in a scheme: every check is one line of text about one thing, and says what would do.

The limits are those of compressed-tensors (what can be stored and read back) unless a line says otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from bitpress.errors import did_you_mean

if TYPE_CHECKING:
    from bitpress.schemes import QuantArgs

STRATEGIES = ("tensor", "channel", "group", "token", "block", "tensor_group", "attn_head")
TYPES = ("int", "float")
MIN_BITS, MAX_BITS = 2, 8
FLOAT_BITS = (4, 6, 8)
SCALE_DTYPES = ("uint8", "float8_e4m3fn")
WITH_GROUPS = ("group", "tensor_group")


def args_faults(args: QuantArgs) -> list[tuple[str, str]]:
    """Key and text of everything that is wrong with values taken alone, whatever they describe."""
    found: list[tuple[str, str]] = []
    is_float = args.type == "float"
    if args.type not in TYPES:
        found.append(("type", f"{args.type!r} is unknown.{did_you_mean(str(args.type), TYPES)}"))
    if not is_int(args.num_bits):
        found.append(("num_bits", f"expected a whole number, got {args.num_bits!r}"))
    elif args.type == "int" and not MIN_BITS <= args.num_bits <= MAX_BITS:
        found.append(("num_bits", f"must be {MIN_BITS} to {MAX_BITS} for int, got {args.num_bits}"))
    elif is_float and args.num_bits not in FLOAT_BITS:
        found.append(("num_bits", f"must be 4, 6 or 8 for float, got {args.num_bits}"))
    if not isinstance(args.symmetric, bool):
        found.append(("symmetric", f"expected true or false, got {args.symmetric!r}"))
    elif is_float and not args.symmetric:
        found.append(("symmetric", "float codes have no zero point; use symmetric: true"))
    if args.strategy not in STRATEGIES:
        found.append(("strategy", f"{args.strategy!r} is unknown.{did_you_mean(str(args.strategy), STRATEGIES)}"))
    else:
        found += _size_faults(args)
    if args.dynamic == "local":
        if args.strategy != "tensor_group":
            found.append(("dynamic", "'local' goes with strategy 'tensor_group' (NVFP4); use true or false"))
    elif not isinstance(args.dynamic, bool):
        found.append(("dynamic", f"expected true or false, got {args.dynamic!r}"))
    if args.scale_dtype is not None:
        found += _scale_dtype_faults(args)
    return found


def _size_faults(args: QuantArgs) -> list[tuple[str, str]]:
    """Group size and block structure, where the strategy is known."""
    found = []
    block, size = args.block_structure, args.group_size
    if args.strategy == "block" and block is None:
        found.append(("block_structure", "strategy 'block' needs one, such as [128, 128]"))
    elif block is not None and args.strategy != "block":
        found.append(("block_structure", f"does not go with strategy '{args.strategy}': drop it or use block"))
    elif block is not None and not (
        isinstance(block, tuple) and len(block) == 2 and all(is_int(n) and n > 0 for n in block)
    ):
        shown = list(block) if isinstance(block, tuple) else block
        found.append(("block_structure", f"expected two positive numbers, rows and columns, got {shown!r}"))
    if size is None:
        if args.strategy in WITH_GROUPS:
            example = "128 or 64" if args.strategy == "group" else "16"
            found.append(("group_size", f"strategy '{args.strategy}' needs one, such as {example}"))
    elif not is_int(size):
        found.append(("group_size", f"expected a positive whole number, got {size!r}"))
    elif args.strategy not in WITH_GROUPS:
        remedy = "drop group_size or use strategy: group"
        found.append(("group_size", f"does not go with strategy '{args.strategy}': {remedy}"))
    elif size < 1:
        found.append(("group_size", f"must be positive, got {size}; for one scale per row use strategy: channel"))
    return found


def _scale_dtype_faults(args: QuantArgs) -> list[tuple[str, str]]:
    value = args.scale_dtype
    if value not in SCALE_DTYPES:
        return [("scale_dtype", f"{value!r} is unknown.{did_you_mean(str(value), SCALE_DTYPES)}")]
    if value == "uint8" and not (args.type == "float" and args.strategy == "group" and args.group_size == 32):
        return [("scale_dtype", "'uint8' (powers of two) goes with float codes in groups of 32 (MX); drop it")]
    if value == "float8_e4m3fn" and args.strategy != "tensor_group":
        return [("scale_dtype", "'float8_e4m3fn' goes with strategy 'tensor_group' (NVFP4); drop it")]
    return []


def weight_faults(weights: QuantArgs) -> list[str]:
    """What is wrong with values as those of weights, each message starting with its key."""
    found = []
    strategy, kind = weights.strategy, f"{weights.type}{weights.num_bits}"
    if strategy in ("token", "attn_head"):
        what = "activations" if strategy == "token" else "the cache of keys and values"
        found.append(f"strategy: '{strategy}' is for {what}; weights have tensor, channel, group or block")
    elif weights.type == "int":
        if strategy in ("block", "tensor_group"):
            found.append(f"strategy: '{strategy}' is for float weights; int weights have tensor, channel or group")
    elif weights.num_bits == 4 and not _is_nvfp4(weights) and not _is_mx(weights):
        found.append(
            f"strategy: {kind} weights are stored as NVFP4 (tensor_group, group_size: 16) or MXFP4 (group, "
            "group_size: 32)"
        )
    elif weights.num_bits == 6 and not _is_mx(weights):
        found.append(f"strategy: {kind} weights are stored as MXFP6 (group, group_size: 32)")
    elif weights.num_bits == 8 and strategy == "tensor_group":
        found.append(f"strategy: 'tensor_group' is for float4; {kind} weights have tensor, channel, group or block")
    if weights.dynamic:
        found.append("dynamic: weights are quantized once; drop it")
    return found


def input_faults(inputs: QuantArgs) -> list[str]:
    """What is wrong with values as those of activations, each message starting with its key."""
    strategy, kind = inputs.strategy, f"{inputs.type}{inputs.num_bits}"
    if strategy in ("channel", "block", "attn_head"):
        what = "the cache of keys and values" if strategy == "attn_head" else "weights"
        return [f"strategy: '{strategy}' is for {what}; activations have token, tensor, group or tensor_group"]
    if strategy == "tensor_group":
        if not _is_nvfp4(inputs):
            return ["strategy: 'tensor_group' is for float4 activations with group_size: 16 (NVFP4)"]
        if inputs.dynamic != "local":
            return ["dynamic: must be 'local' with strategy 'tensor_group': one static scale on top of dynamic ones"]
        return []
    if inputs.type == "float" and inputs.num_bits < 8 and not (_is_mx(inputs) and inputs.scale_dtype == "uint8"):
        return [f"strategy: {kind} activations are MX (group, group_size: 32, scale_dtype: uint8) or NVFP4"]
    if strategy != "tensor" and not inputs.dynamic:
        return [f"dynamic: activations with one scale per {strategy} are dynamic; use true, or strategy: tensor"]
    return []


def pair_faults(weights: QuantArgs, inputs: QuantArgs) -> list[str]:
    """What is wrong with activations beside these weights."""
    if weights.type == "float" and inputs.type == "int":
        return ["int activations do not go with float weights; use type: float"]
    if (inputs.strategy == "tensor_group") and not _is_nvfp4(weights):
        return ["NVFP4 activations go with NVFP4 weights; use those, or another strategy such as token"]
    if _is_nvfp4(weights) and not _is_nvfp4(inputs):
        return ["NVFP4 weights go with NVFP4 activations or none; use those, or drop it"]
    if weights.strategy == "block" and not inputs.dynamic:
        return ["activations of weights in blocks are dynamic (vLLM has no kernel for others); use dynamic: true"]
    return []


def cache_faults(cache: QuantArgs) -> list[str]:
    """What is wrong with values as those of the cache of keys and values, each message starting with its key."""
    if not cache.symmetric:
        return ["symmetric: a cache with zero points is read by no client; use true"]
    if cache.type == "float" and cache.num_bits != 8:
        return [f"num_bits: a float cache has 8 bits, got {cache.num_bits}"]
    if cache.strategy not in ("tensor", "attn_head", "token"):
        return [f"strategy: '{cache.strategy}' is not for caches; use tensor, attn_head or token"]
    if cache.strategy == "attn_head" and cache.dynamic:
        return ["dynamic: scales per attention head are static; use false"]
    if cache.strategy == "token" and not cache.dynamic:
        return ["dynamic: scales per token are dynamic; use true, or strategy: tensor"]
    return []


def _is_nvfp4(args: QuantArgs) -> bool:
    return (args.type, args.num_bits, args.strategy, args.group_size) == ("float", 4, "tensor_group", 16)


def _is_mx(args: QuantArgs) -> bool:
    return (args.type, args.strategy, args.group_size) == ("float", "group", 32)


def at(where: str, key: str) -> str:
    """The place of a key."""
    return f"{where}.{key}" if where else key


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is a whole number: bool is an int in Python, and `group_size: true` is a slip."""
    return isinstance(value, int) and not isinstance(value, bool)
