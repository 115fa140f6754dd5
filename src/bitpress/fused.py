"""Norms of the block at work in one launch on a GPU, where that computes what the model's own module does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

TRIED = 64  # rows
ALIKE = 0.99  # share of numbers that must be the same; the others may be off by one in the last place

_same: dict[tuple[Any, ...], bool] = {}  # what has been tried: kind of module, width, eps, dtype


@contextmanager
def fused_norms(block: nn.Module) -> Iterator[None]:
    """Within it, RMSNorms of the block that the kernel reproduces are run by it; it has no gradients.

    A kind of module is tried on random numbers when it is first met: a gain of 1 + w, a bias or another order of
    rounding show there, and such a module stays as it is.
    """
    changed = []
    for module in block.modules():
        if type(module).__name__.endswith("RMSNorm") and "forward" not in module.__dict__ and _reproduced(module):
            module.__dict__["forward"] = partial(_run, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _run(module: Any, x: Tensor) -> Tensor:
    from bitpress.math.kernels.norm import rms_norm

    return rms_norm(x, module.weight, _eps(module))


def _eps(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)) or 0.0)


@torch.no_grad()
def _reproduced(module: Any) -> bool:
    gain = getattr(module, "weight", None)
    if not isinstance(gain, Tensor) or gain.dim() != 1 or gain.device.type != "cuda" or not gain.is_floating_point():
        return False
    key = type(module), len(gain), _eps(module), gain.dtype
    if key not in _same:
        generator = torch.Generator(gain.device).manual_seed(0)
        x = torch.randn(TRIED, len(gain), generator=generator, device=gain.device).to(gain.dtype)
        expected, found = module(x), _run(module, x)
        near = torch.allclose(found.float(), expected.float(), rtol=2 * torch.finfo(gain.dtype).eps, atol=0)
        _same[key] = near and float((found == expected).float().mean()) > ALIKE
    return _same[key]
