"""What lies between the products of the block at work, in one launch each on a GPU: norms, SiLU with its gate, rotary
embeddings; where that computes what the model's own code does. They have no gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

TRIED = 64  # rows
ALIKE = 0.99  # share of numbers that must be the same; the others may be off by one in the last place
ROTARY = "apply_rotary_pos_emb"  # transformers' name for it in the file of each family

_same: dict[tuple[Any, ...], bool] = {}  # what has been tried, and whether the kernel reproduces it


@contextmanager
def fused(block: nn.Module) -> Iterator[None]:
    """Within it, the parts of the block that the kernels reproduce are run by them.

    A kind of module or function is tried on random numbers when it is first met: a gain of 1 + w, a bias, interleaved
    halves or another order of rounding show there, and it stays as it is.
    """
    changed: list[tuple[dict[str, Any], str, Any]] = []
    if any(p.device.type == "cuda" for p in block.parameters()):
        for module in block.modules():
            own = module.__dict__
            if "forward" in own:
                continue
            if type(module).__name__.endswith("RMSNorm") and _norm_reproduced(module):
                changed.append((own, "forward", partial(_norm, module)))
            elif isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation":
                changed.append((own, "forward", _Silu.of))
        for name in {type(module).__module__ for module in block.modules()}:
            file = sys.modules[name].__dict__
            if ROTARY in file:
                changed.append((file, ROTARY, partial(_rotary, file[ROTARY])))
    before = [(where, name, where.get(name)) for where, name, _ in changed]
    for where, name, new in changed:
        where[name] = new
    try:
        yield
    finally:
        for where, name, old in before:
            if old is None:
                del where[name]
            else:
                where[name] = old


def _norm(module: Any, x: Tensor) -> Tensor:
    from bitpress.math.kernels.forward import rms_norm

    return rms_norm(x, module.weight, _eps(module))


def _eps(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)) or 0.0)


def _norm_reproduced(module: Any) -> bool:
    gain = getattr(module, "weight", None)
    if not isinstance(gain, Tensor) or gain.dim() != 1 or gain.device.type != "cuda" or not gain.is_floating_point():
        return False

    def compare() -> list[tuple[Tensor, Tensor]]:
        x = _random(gain, TRIED, len(gain))
        return [(module(x), _norm(module, x))]

    return _reproduced((type(module), len(gain), _eps(module), gain.dtype), compare)


class _Silu(Tensor):
    """The input of a SiLU that waits for the gate it is multiplied with. All else makes it the SiLU's output first."""

    @staticmethod
    def of(x: Tensor) -> Tensor:
        """What takes the place of a SiLU."""
        plain = x.device.type == "cuda" and x.is_floating_point() and not torch.is_grad_enabled()
        return x.as_subclass(_Silu) if plain else nn.functional.silu(x)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul) and len(args) == 2 and not kwargs:
            gate, up = args if isinstance(args[0], cls) else args[::-1]
            with torch._C.DisableTorchFunctionSubclass():
                gate = gate.as_subclass(Tensor)
                if _gates(gate, up) and _silu_reproduced(gate):
                    from bitpress.math.kernels.forward import silu_gate

                    return silu_gate(gate, up)
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and isinstance(args[0], cls):
            raise NotImplementedError(f"{name} on the output of a SiLU in place, while its gate is fused")
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = torch.utils._pytree.tree_map_only(
                cls, lambda x: nn.functional.silu(x.as_subclass(Tensor)), (args, kwargs or {})
            )
        return func(*args, **kwargs)


def _gates(gate: Tensor, up: Any) -> bool:
    return type(up) is Tensor and (up.shape, up.dtype, up.device) == (gate.shape, gate.dtype, gate.device)


def _silu_reproduced(gate: Tensor) -> bool:
    from bitpress.math.kernels.forward import silu_gate

    def compare() -> list[tuple[Tensor, Tensor]]:
        x, up = 4 * _random(gate, TRIED, 256), _random(gate, TRIED, 256)
        return [(nn.functional.silu(x) * up, silu_gate(x, up))]

    return _reproduced(("silu", gate.dtype), compare)


def _rotary(own: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
    """The family's own function, or the kernel where it is the same: halves of all of each head, one angle a token."""
    plain = not more and not named and not torch.is_grad_enabled() and q.device.type == "cuda"
    plain = plain and cos.dim() == 3 and cos.shape == sin.shape and cos.dtype == sin.dtype
    for x in (q, k) if plain else ():
        plain = plain and x.dim() == 4 and x.dtype == cos.dtype and x.stride(-1) == 1
        plain = plain and cos.shape[1:] == x.shape[2:] and len(cos) in (1, len(x))
    if plain and _rotary_reproduced(own, q):
        from bitpress.math.kernels.forward import rotate

        return rotate(q, cos, sin), rotate(k, cos, sin)
    return own(q, k, cos, sin, *more, **named)


def _rotary_reproduced(own: Callable[..., Any], q: Tensor) -> bool:
    from bitpress.math.kernels.forward import rotate

    def compare() -> list[tuple[Tensor, Tensor]]:
        D = q.shape[-1]
        x, y = _random(q, 2, 3, TRIED, D), _random(q, 2, 1, TRIED, D)
        cos, sin = _random(q, 1, TRIED, D), 2 * _random(q, 1, TRIED, D)
        expected = own(x, y, cos, sin)
        return [(e, rotate(z, cos, sin)) for e, z in zip(expected, (x, y), strict=True)]

    return _reproduced((own, q.shape[-1], q.dtype), compare)


def _random(like: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(shape[-1])
    return torch.randn(*shape, generator=generator, device=like.device).to(like.dtype)


@torch.no_grad()
def _reproduced(key: tuple[Any, ...], compare: Callable[[], list[tuple[Tensor, Tensor]]]) -> bool:
    if key not in _same:
        _same[key] = all(
            torch.allclose(found.float(), expected.float(), rtol=2 * torch.finfo(expected.dtype).eps, atol=0)
            and float((found == expected).float().mean()) > ALIKE
            for expected, found in compare()
        )
    return _same[key]
