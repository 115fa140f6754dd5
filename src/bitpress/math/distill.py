"""The loss of a student: cross entropy with the labels, KL to a teacher, distance of hidden states.

Knowledge distillation (Hinton, Vinyals, Dean 2015, arXiv 1503.02531): (1 - h) CE + h T^2 KL(teacher || student), both
softened by the temperature T. Hidden states as in SquareHead (Kurtic et al. 2023, arXiv 2310.06927): the squared error
of each block's output, over the teacher's own square, summed over the blocks.

Legend: N positions, V vocabulary, B sequences, L tokens, C features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 25  # logits in float32 at a time: 128 MiB


class Sums(NamedTuple):
    """Sums over positions: the loss, with a gradient; cross entropy and KL, in nats."""

    loss: Tensor
    ce: Tensor
    kl: Tensor


def token_loss(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, *, temperature: float = 1.0, hardness: float = 1.0
) -> Sums:
    """The loss summed over the positions that have a label.

    Args:
        logits: (B, L, V) of the student, any float dtype; position i predicts token i + 1.
        labels: (B, L) int64, -100 where there is none.
        teacher: (B, L, V) of the teacher; None: cross entropy alone.
        temperature: by which both logits are divided for the KL.
        hardness: share of the KL in the loss.
    """
    targets = labels[:, 1:].reshape(-1)
    rows = (targets != -100).nonzero()[:, 0]
    student = logits[:, :-1].reshape(-1, logits.shape[-1])
    other = None if teacher is None else teacher[:, :-1].reshape(-1, teacher.shape[-1])
    parts: tuple[Tensor, Tensor, Tensor] = _TokenLoss.apply(student, other, targets, rows, temperature, hardness)  # type: ignore[no-untyped-call]
    return Sums(*parts)


class _TokenLoss(torch.autograd.Function):
    """Computes the gradient together with the loss, some positions at a time, so that no float32 copy of all logits
    is ever made."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, targets: Tensor, rows: Tensor, T: float, h: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        V = student.shape[-1]
        h = 0.0 if teacher is None else h
        ce = torch.zeros((), device=student.device, dtype=torch.float64 if student.dtype == torch.float64 else None)
        kl = torch.zeros_like(ce)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        for some in rows.split(max(1, CHUNK // V)):  # type: ignore[no-untyped-call]
            x = student[some].to(ce.dtype)
            log_q = x.log_softmax(-1)
            label = targets[some, None]
            ce -= log_q.gather(1, label).sum()
            dx = None
            if gradient is not None and h < 1:
                dx = log_q.exp().scatter_add_(1, label, torch.full_like(label, -1, dtype=x.dtype)).mul_(1 - h)
            if teacher is not None:
                log_p = (teacher[some].to(ce.dtype) / T).log_softmax(-1)
                if T != 1:
                    log_q = (x / T).log_softmax(-1)
                p = log_p.exp()
                kl += (p * (log_p - log_q)).sum()
                if gradient is not None and h > 0:
                    soft = log_q.exp().sub_(p).mul_(h * T)  # T^2 of the loss, 1 / T of the softmax
                    dx = soft if dx is None else dx.add_(soft)
            if gradient is not None and dx is not None:
                gradient[some] = dx.to(student.dtype)
        ctx.gradient = gradient
        loss = (1 - h) * ce + h * T * T * kl
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None  # used once: it is as large as all logits
        return gradient.mul_(d_loss), None, None, None, None, None


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], attended: Tensor | None) -> Tensor:
    """Sum over the blocks of |s - t|^2 / |t|^2, over the tokens that are no padding.

    Args:
        student, teacher: hidden states after each block, each (B, L, C).
        attended: (B, L), 0 where there is padding; None: there is none.
    """
    total = torch.zeros((), device=student[0].device)
    for s, t in zip(student, teacher, strict=True):
        s, t = s.float(), t.float()
        error, square = (s - t).square().sum(-1), t.square().sum(-1)
        if attended is not None:
            error, square = error * attended, square * attended
        total = total + error.sum() / square.sum().clamp(min=1e-30)
    return total
