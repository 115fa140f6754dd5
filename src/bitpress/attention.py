"""Causal attention for CPUs with AVX2 alone, or with AVX-512 bfloat16 but without AMX, in place of SDPA for a forward.

There, SDPA's fused kernel multiplies many small matrices at a fraction of the processor's speed and, of up to 512 keys,
computes the upper triangle of the scores too. Here the queries go in slices against the keys they may see, in large
products.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bitpress.math.products import LARGE, bfloat16_products, mode_is_exact
from bitpress.threads import together, workers

SLICE = 64  # queries a slice: shorter ones save more of the upper triangle, but are slower a flop
SCORES = 1 << 20  # at work at a time in a thread, so that they stay in the cache


@cache
def _faster() -> frozenset[torch.dtype]:
    """The dtypes for which `causal` was measured to be faster than SDPA on such a processor."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return frozenset({torch.float32, torch.bfloat16})
    return frozenset({torch.bfloat16} if mode_is_exact() else ())


def implementation(config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """The attention of a run's forwards: the model's own, or "sliced" where `causal` takes the place of SDPA."""
    name: str | None = getattr(config, "_attn_implementation", None)
    ours = name == "sdpa" and device.type == "cpu" and dtype in _faster()
    return "sliced" if ours else name


@contextmanager
def sliced() -> Iterator[None]:
    """Within it, transformers' "sdpa" is `causal` wherever that is the same function; where it is not, it stays SDPA.

    The table of attention functions is process-wide in transformers, so it is changed for as short as possible.
    """
    if "transformers.modeling_utils" not in sys.modules or not _faster():  # without it, no model is of transformers
        yield
        return
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:  # the user's own, or already ours
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _instead_of(sdpa_attention_forward)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _instead_of(sdpa: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """An attention function of transformers that hands to `sdpa` what is not plain causal attention."""

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        plain = (
            is_causal
            and attention_mask is None
            and not kwargs.get("dropout")
            and kwargs.get("position_bias") is None
            and kwargs.get("cache") is None
            and query.shape[2] == key.shape[2] > 1
            and query.shape[1] % key.shape[1] == 0
            and query.dtype in _faster()
            and (query.dtype != torch.float32 or query.numel() >= LARGE)
            and {(t.dtype, t.device.type) for t in (query, key, value)} == {(query.dtype, "cpu")}
            and not torch.is_grad_enabled()
        )
        if not plain:
            return sdpa(module, query, key, value, attention_mask, **kwargs)
        return causal(query, key, value, kwargs.get("scaling")), None

    return forward


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attention of each token to itself and those before it (Vaswani et al. 2017, arXiv 1706.03762).

    Products of bfloat16 are summed in float32; scores and weights stay in float32, so it is closer to the exact
    result than SDPA, which rounds the weights to bfloat16.

    Args:
        query: (B, H, L, D) bfloat16 or float32.
        key: (B, K, L, D); each of the K heads serves H / K heads of the query, in order.
        value: (B, K, L, E).
        scale: of the scores; 1 / sqrt(D) if None.

    Returns:
        (B, L, H, E), contiguous.
    """
    B, H, L, D = query.shape
    K, E = value.shape[1], value.shape[-1]
    scale = (D**-0.5 if scale is None else scale) * math.log2(math.e)  # exp2 is faster than exp
    q, k, v = query.reshape(B * K, H // K, L, D), key.reshape(B * K, L, D), value.reshape(B * K, L, E)
    out = query.new_empty(B * K, H // K, L, E)
    heads = max(1, SCORES // (H // K * min(SLICE, L) * L))
    count = -(-B * K // heads)  # of parts; every thread gets as many
    heads = -(-B * K // (-(-count // workers()) * workers()))
    parts = [slice(first, first + heads) for first in range(0, B * K, heads)]
    with bfloat16_products(query.dtype == torch.bfloat16 and mode_is_exact()):
        together([partial(_some_heads, q[p], k[p], v[p], scale, out[p]) for p in parts])
    return out.view(B, H, L, E).transpose(1, 2).contiguous()


def _some_heads(query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor) -> None:
    """As `causal`, for n heads of the key: query (n, H/K, L, D), key (n, L, D), value (n, L, E); `scale` of exp2."""
    n, times, L, _ = query.shape
    keys, values = key.float().transpose(1, 2), value.float()
    later = torch.full((SLICE, SLICE), -math.inf, device=query.device).triu_(1)
    buffer = query.new_empty(n * times * min(SLICE, L) * L, dtype=torch.float32)
    for lo in range(0, L, SLICE):
        hi = min(lo + SLICE, L)
        rows = times * (hi - lo)
        asked = query[:, :, lo:hi].float().flatten(1, 2)  # (n, rows, D)
        scores = buffer[: n * rows * hi].view(n, rows, hi)
        torch.baddbmm(scores, asked, keys[:, :, :hi], beta=0, alpha=scale, out=scores)
        scores.view(n, times, hi - lo, hi)[..., lo:].add_(later[: hi - lo, : hi - lo])
        scores.sub_(scores.amax(-1, keepdim=True)).exp2_()
        mixed = torch.bmm(scores, values[:, :hi]).div_(scores.sum(-1, keepdim=True))
        out[:, :, lo:hi] = mixed.view(n, times, hi - lo, -1)
