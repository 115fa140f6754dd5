"""The chunked loss with its own gradient equals the plain formula under autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bitpress.math import distill
from bitpress.math.distill import hidden_loss, token_loss


def plain(logits, labels, teacher, T, h):
    keep = labels[:, 1:] != -100
    x, target = logits[:, :-1][keep], labels[:, 1:][keep]
    ce = F.cross_entropy(x, target, reduction="sum")
    if teacher is None:
        return ce, ce, torch.zeros(())
    p, q = (teacher[:, :-1][keep] / T).log_softmax(-1), (x / T).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum()
    return (1 - h) * ce + h * T * T * kl, ce, kl


@pytest.mark.parametrize(
    ("T", "h", "taught"), [(1.0, 1.0, True), (2.0, 0.3, True), (3.0, 0.0, True), (1.0, 1.0, False)]
)
def test_equals_the_formula(T, h, taught, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK", 3 * 11)
    torch.manual_seed(0)
    logits, teacher = (torch.randn(2, 9, 11, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 11, (2, 9))
    labels[0, 2:5] = -100
    given = teacher if taught else None
    a, b = (logits.clone().requires_grad_(True) for _ in range(2))
    found, expected = token_loss(a, labels, given, temperature=T, hardness=h), plain(b, labels, given, T, h)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype))
    (found.loss / 7).backward()
    (expected[0] / 7).backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert (a.grad[0, 1:4] == 0).all() and (a.grad[:, -1] == 0).all()


def test_low_precision_and_no_gradient():
    logits = torch.randn(1, 5, 7, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 7, (1, 5))
    sums = token_loss(logits, labels, logits.detach())
    assert sums.loss.dtype == torch.float32 and abs(float(sums.kl)) < 1e-6
    sums.loss.backward()
    assert logits.grad.dtype == torch.bfloat16 and float(logits.grad.abs().max()) < 1e-2
    with torch.no_grad():
        assert float(token_loss(logits, labels, None).ce) > 0


def test_hidden_states():
    t = [torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)]
    s = [torch.zeros(1, 2, 3), torch.full((1, 2, 3), 3.0)]
    assert float(hidden_loss(s, t, None)) == pytest.approx(1 + 0.25)
    s[0][0, 0] = 1
    assert float(hidden_loss(s[:1], t[:1], torch.tensor([[1, 0]]))) == 0
