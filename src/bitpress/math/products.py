"""Matrix products of float32 at the speed of the matrix units, where that costs no accuracy that matters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

LARGE = 1 << 18  # numbers of an input, from which on another kernel in float32 gains more than its call costs
_held = False  # whether the process-wide switch of the CPU's products must stay as it is


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of float32, with or without a dimension of problems before the matrices'.

    On a GPU from three products of bfloat16 halves, each factor good to 16 bits (TF32: 11).
    """
    if a.device.type != "cuda" or a.dtype != torch.float32:
        return a @ b
    (a1, a2), (b1, b2) = halves(a), halves(b)
    multiply = torch.bmm if a.dim() == 3 else torch.mm
    return multiply(torch.cat([a1, a2, a1], -1), torch.cat([b1, b1, b2], -2), out_dtype=torch.float32)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors whose sum is `x` to 16 bits."""
    high = x.to(torch.bfloat16)
    return high, (x - high).to(torch.bfloat16)


@contextmanager
def bfloat16_products(enabled: bool) -> Iterator[None]:
    """Within it, float32 matrix products on the CPU multiply in bfloat16 and accumulate in float32.

    The switch is process-wide in torch, so it is set for as short as possible and put back. Within `float32_products`
    it stays as it is: what asks for less there does so for speed, and other threads are at work.
    """
    if not enabled or _held:
        yield
        return
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


@contextmanager
def float32_products() -> Iterator[None]:
    """Within it, float32 matrix products on the CPU are oneDNN's where those are float32 products in its bfloat16 mode.

    They are on processors with AVX-512 bfloat16 but without AMX, and there twice as fast as MKL's on AMD. Threads may
    start within it: the switch does not move until it ends.
    """
    global _held
    exact = mode_is_exact()
    with bfloat16_products(exact):
        before, _held = _held, True
        try:
            yield
        finally:
            _held = before


@cache
def mode_is_exact() -> bool:
    """Whether products in the bfloat16 mode are float32's, on a processor with AVX-512 bfloat16 but without AMX.

    It is tried out, as oneDNN does not promise it. Older torch does not tell the processor's features: then no.
    """
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not found.get("avx512_bf16") or found.get("amx_tile"):
        return False
    generator = torch.Generator().manual_seed(0)
    with bfloat16_products(True):
        for rows, inner, columns in ((64, 64, 64), (16, 128, 512), (512, 512, 512)):
            a, b = (torch.randn(s, generator=generator) for s in ((rows, inner), (inner, columns)))
            exact = a.double() @ b.double()
            if float((a @ b - exact).abs().max() / exact.abs().max()) > 1e-5:
                return False
    return True


def forward_products() -> Any:
    """A context in which a forward's products on the CPU go the fastest way that is as accurate.

    Products of matrices in 16 bits are float32 products, rounded at the end, where the processor has no instructions
    for them: there they take 6 to 13 times as long as in float32. What is rounded is what the instructions would give:
    products of 16 bits are exact in float32, and sums are made there. Linears in float32 are oneDNN's where that is
    faster, see `onednn_is_faster`.
    """
    slow = {t for t in (torch.bfloat16, torch.float16) if without_instructions(t)}
    return _ForwardProducts(slow) if slow or onednn_is_faster() else nullcontext()


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL, which torch takes: on AMD's processors with AVX2, by 8 %."""
    if torch.backends.cpu.get_cpu_capability() != "AVX2" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def kind(dtype: torch.dtype) -> str:
    """How a model of this dtype is multiplied on the CPU, for those who want the same bits again."""
    return ("float32" if without_instructions(dtype) else "the dtype's") + ", oneDNN" * onednn_is_faster()


@cache
def without_instructions(dtype: torch.dtype) -> bool:
    """Whether a processor of the x86 kind multiplies matrices of a 16-bit dtype by taking numbers apart one by one."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    if not hasattr(torch.cpu, "get_capabilities"):
        return capability in ("DEFAULT", "NO AVX", "AVX2")
    found = torch.cpu.get_capabilities()
    if found.get("architecture") != "x86_64":
        return False
    units = ("avx512_bf16", "amx_bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return capability == "AVX2" or not any(found.get(unit) for unit in units)


PRODUCTS = frozenset({
    torch.nn.functional.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
    Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm,
})  # fmt: skip


class _ForwardProducts(TorchFunctionMode):
    """See `forward_products`; `slow`: the dtypes that are widened."""

    def __init__(self, slow: set[torch.dtype]) -> None:
        self.slow = slow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS and kwargs.get("out") is None:
            factors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            dtype = factors[0].dtype
            if dtype in self.slow and all(x.dtype == dtype and x.device.type == "cpu" for x in factors):
                args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
                return _product(func, args, kwargs).to(dtype)
        return _product(func, args, kwargs)


def _product(func: Any, args: Any, kwargs: Any) -> Any:
    if func is torch.nn.functional.linear and onednn_is_faster() and not torch.is_grad_enabled():
        return _linear(*args, **kwargs)
    return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # the names are torch's
    """torch's linear, by oneDNN where that takes the tensors as they are; without gradients."""
    taken = (input, weight) if bias is None else (input, weight, bias)
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in taken)
    if not plain or input.numel() < LARGE or input.dim() < 2:
        return torch.nn.functional.linear(input, weight, bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return found
