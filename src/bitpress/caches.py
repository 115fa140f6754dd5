"""Attention modules whose cache of keys and values is quantized: which they are, and the scales that they get.

No weight is touched. What is stored is a scale of the keys, as they go into the cache after the position embedding,
and one of the values, beside each attention module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitpress import formats
from bitpress.errors import NumericsError
from bitpress.math.activations import OutputRange, static_scale
from bitpress.schemes import QuantArgs
from bitpress.subject import Subject

# by these, compressed-tensors tells an attention module that has a cache; the names are of what feeds the cache
PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")
ARGUMENTS = ("past_key_values", "past_key_value")


@dataclass(frozen=True)
class CacheSite:
    """The cache of one attention module.

    Attributes:
        name: of the attention module on disk.
        module: its module name.
        heads: heads of keys and values.
        dtype: in which scales are stored.
    """

    name: str
    module: str
    block: int
    heads: int
    args: QuantArgs
    dtype: torch.dtype

    def spec(self) -> formats.Spec:
        """Tensors by name on disk: dtype, shape."""
        shape = (self.heads, 1, 1) if self.args.strategy == "attn_head" else (1,)
        return {f"{self.name}.{which}_scale": (self.dtype, shape) for which in ("k", "v")}

    def scales(self, keys: OutputRange, values: OutputRange) -> dict[str, Tensor]:
        """The tensors of `spec` from what was seen, ranges by head (H,).

        Raises:
            NumericsError: NaN or infinity in keys or values.
        """
        out = {}
        for (name, (_, shape)), seen in zip(self.spec().items(), (keys, values), strict=True):
            if not (torch.isfinite(seen.low).all() and torch.isfinite(seen.high).all()):
                raise NumericsError(f"{self.name}: NaN or infinity in the keys or values")
            low, high = (seen.low, seen.high) if len(shape) == 3 else (seen.low.amin(), seen.high.amax())
            kind = "int" if self.args.type == "int" else formats.FLOATS[self.args.num_bits]
            scale, _ = static_scale(low, high, kind, self.args.num_bits, True, self.dtype)
            out[name] = scale.reshape(shape).cpu()
        return out


def find_caches(schemes: Iterable[QuantArgs], subject: Subject) -> tuple[list[CacheSite], list[str]]:
    """The caches that need scales, in the model's order, and the faults of the recipe's cache schemes."""
    asked = list(dict.fromkeys(schemes))
    if len(asked) > 1:
        return [], ["kv_cache_scheme: two modifiers give different ones; give it once"]
    if not asked:
        return [], []
    inside = subject.blocks.path + "."
    found = [(n, m) for n, m in subject.model.named_modules() if n.startswith(inside) and has_cache(m)]
    if not found:
        kind = type(subject.model).__name__
        return [], [f"kv_cache_scheme: no attention of {kind} keeps its keys in a way that clients quantize; drop it"]
    if asked[0].dynamic:
        return [], []
    sites = []
    for name, module in found:
        feeds = next(p for p in PROJECTIONS if hasattr(module, p))
        weight = f"{name}.{feeds}.weight"
        disk = subject.layout.disk_of.get(weight, weight).removesuffix(f".{feeds}.weight")
        block = int(name.removeprefix(inside).split(".")[0])
        sites.append(CacheSite(disk, name, block, _heads(subject.config), asked[0], subject.dtype))
    return sites, []


def has_cache(module: nn.Module) -> bool:
    """Whether a module is an attention whose cache clients quantize."""
    if "attention" not in type(module).__name__.lower() or not any(hasattr(module, p) for p in PROJECTIONS):
        return False
    return cache_argument(module) is not None


def cache_argument(module: nn.Module) -> str | None:
    """Name of the argument by which an attention takes its cache, None if it takes none."""
    taken = inspect.signature(type(module).forward).parameters
    return next((name for name in ARGUMENTS if name in taken), None)


def _heads(config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(heads)
