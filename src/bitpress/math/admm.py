"""Masks by alternating directions, and the best weights under a mask: pruning without a column sweep.

The problem: min over W' of tr((W' - W) H (W' - W)^T) with W' zero outside a mask that is free within its structure.
Splitting W' from its pruned copy D gives a ridge solution for W' and a choice of the largest weights for D in turns,
drawn together by a penalty that grows (Boza 2024, arXiv 2401.02938; Meng et al. 2024, arXiv 2406.07831). Only products
with (C, C) matrices are needed. Then the mask stays and conjugate gradients find its exact weights.

Legend: R out features, C in features. H = Gram + damping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitpress.math.masks import Structure
from bitpress.math.products import bfloat16_products, product
from bitpress.math.sweep import NotDefiniteError, triangular_inverse

# On the scale of a Hessian with unit diagonal, a penalty of 1 compares what a kept weight is worth with what a pruned
# one would be. It is reached from below: that lets masks change, and slower growth than this found no better ones.
FIRST_PENALTY, ROUNDS_EACH = 0.1, 3
SHARED = 3  # levels of the penalty that share one factorization, on a GPU: there it takes as long as many products

Choose = Callable[[Tensor], Tensor]


def search(
    weight: Tensor,
    hessian: Tensor,
    choose: Choose,
    rounds: int,
    pattern: Structure | None = None,
    gone: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A mask, and weights near the best ones under it.

    Args:
        weight: (R, C) float32; not modified.
        hessian: H (C, C), positive definite.
        choose: the mask (R, C) of scores (R, C); they are |w| times the root of H's diagonal.
        rounds: turns; the penalty grows after every third. 30 are enough for a mask to settle, half as many lose a
            tenth of the gain over the sweep.
        pattern: what `choose` keeps to, if that is an N:M pattern; then a GPU takes each turn in one launch.
        gone: (R, C) bool, weights that `choose` never keeps.

    Returns:
        The pruned weights (R, C) and their mask.

    Raises:
        NotDefiniteError: H is not positive definite.
    """
    root = hessian.diagonal().sqrt()
    unit = hessian / root / root[:, None]
    pruned = weight * root
    fixed, dual = product(pruned, unit), torch.zeros_like(pruned)
    free, mixed = torch.empty_like(pruned), torch.empty_like(pruned)  # reused: fresh memory costs more than the sums
    keep = torch.ones_like(pruned, dtype=torch.bool)
    levels = -(-rounds // ROUNDS_EACH)
    penalties = [FIRST_PENALTY ** (1 - (i // ROUNDS_EACH) / max(levels - 1, 1)) for i in range(rounds)]
    infos: list[Tensor] = []
    inverses = ridge_inverses(unit, penalties[::ROUNDS_EACH], SHARED if weight.device.type == "cuda" else 1, infos)
    on_gpu = weight.device.type == "cuda" and weight.dtype == torch.float32
    turn = _in_one_launch(pattern, gone) if on_gpu and pattern is not None else None
    for i, penalty in enumerate(penalties):
        if i % ROUNDS_EACH == 0:
            inverse = next(inverses)
        if i == 0 or turn is None:
            torch.sub(fixed, dual, out=mixed).add_(pruned, alpha=penalty)
        with _coarse_products(free.device):  # a score needs no more; the weights are solved for afterwards
            torch.mm(mixed, inverse, out=free)
        if turn is not None:
            turn(free, dual, fixed, pruned, mixed, keep, penalty, penalties[min(i + 1, rounds - 1)])
            continue
        torch.add(free, dual, alpha=1 / penalty, out=pruned)
        keep = choose(torch.abs(pruned, out=mixed))
        pruned.masked_fill_(~keep, 0)
        dual.add_(torch.sub(free, pruned, out=free), alpha=penalty)
    if infos:
        _refuse(torch.stack(infos))  # a GPU is waited for once
    return pruned / root, keep


def _in_one_launch(pattern: Structure, gone: Tensor | None) -> Callable[..., None] | None:
    from bitpress.math.kernels import turns

    return partial(turns.turn, pattern=pattern, gone=gone) if pattern.size in turns.SIZES else None


def ridge_inverses(unit: Tensor, penalties: Sequence[float], shared: int, infos: list[Tensor]) -> Iterator[Tensor]:
    """The inverse of `unit` + penalty for each penalty in turn; exact for the middle one of every `shared`.

    `infos` take of each factor whether it failed: 0 if not.
    """
    for first in range(0, len(penalties), shared):
        group = penalties[first : first + shared]
        middle = group[len(group) // 2]
        inverse, info = _ridge_inverse(unit, middle)
        infos.append(info)
        yield from (inverse if p == middle else shifted_inverse(inverse, middle, p) for p in group)


def shifted_inverse(inverse: Tensor, penalty: float, wanted: float) -> Tensor:
    """The inverse of A + `wanted` from that of A + `penalty`, X, for any A without negative eigenvalues; one product.

    It is X inv(I + d X) with d the difference, and the eigenvalues of I + d X lie between 1 and the ratio of the
    penalties. The Chebyshev polynomial of first degree for 1 / x on that interval leaves 1 / (2 (m / h)^2 - 1) of each
    component wrong at most, m and h the middle and half of the interval: 0.8 % for a ratio of 1.3.
    """
    ratio = wanted / penalty
    middle, half = (1 + ratio) / 2, (ratio - 1) / 2
    scale = 2 * middle**2 - half**2
    with _coarse_products(inverse.device):
        return torch.addmm(
            inverse, inverse, inverse, beta=(4 * middle - 2) / scale, alpha=-2 * (wanted - penalty) / scale
        )


def _ridge_inverse(unit: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    ridge = unit.clone()
    ridge.diagonal().add_(penalty)
    lower, info = torch.linalg.cholesky_ex(ridge)
    if lower.device.type != "cuda":
        _refuse(info)
        return torch.cholesky_inverse(lower), info
    inverse = triangular_inverse(lower)
    with _coarse_products(lower.device):
        return inverse.T @ inverse, info


def _refuse(infos: Tensor) -> None:
    if infos.any():
        raise NotDefiniteError


def refit(weight: Tensor, start: Tensor, hessian: Tensor, keep: Tensor, steps: int) -> Tensor:
    """The weights of least error under a fixed mask, by conjugate gradients with H's diagonal as preconditioner.

    Every row has its own mask, so there is no common factor; every step is one product with H for all rows.

    Args:
        weight: (R, C) float32, the target; not modified.
        start: (R, C), zero outside the mask.
        hessian: H (C, C), positive definite.
        keep: (R, C) bool.
        steps: each lowers the error of every row; ten come within 0.1 % of the least from the end of `search`.

    Returns:
        (R, C), exactly zero outside the mask.
    """
    mask, precondition = keep.to(weight.dtype), 1 / hessian.diagonal()
    x = start.clone()
    residual = product(weight - x, hessian).mul_(mask)
    direction = residual * precondition
    power = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        with _coarse_products(x.device):
            image = (direction @ hessian).mul_(mask)
        length = power / (direction * image).sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        x.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        scaled = residual * precondition
        before, power = power, (residual * scaled).sum(1, keepdim=True)
        direction.mul_(power / before.clamp(min=torch.finfo(x.dtype).tiny)).add_(scaled)
    return x


@contextmanager
def _coarse_products(device: torch.device) -> Iterator[None]:
    """Within it, float32 matrix products use the fast units: bfloat16 on the CPU, TF32 on the GPU.

    The switches are process-wide in torch, so they are set for as short as possible and put back.
    """
    if device.type != "cuda":
        with bfloat16_products(True):
            yield
        return
    backend: Any = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        yield
    finally:
        backend.fp32_precision = before
