"""What block tuning lowers: the error of the block's output, or behind the last block that of the predictions.

Legend: B sequences, L tokens of each, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

MASSIVE = 4.0  # times the median energy: tokens above count as much as one of this energy
POSITIONS, AT_ONCE = 1024, 256  # positions of a batch whose predictions are compared, and of them at a time


class Objective(Protocol):
    """A loss of a block's output."""

    def slope(self, got: Tensor, wanted: Tensor) -> Tensor:
        """The loss's derivative by `got` (B, L, D), scaled to root mean square 1, so that it overflows in no dtype."""

    def lost(self, got: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Two sums over the batch, scalars in float64; the loss is their ratio over all batches."""


class OutputError:
    """The squared error of the block's output, as a share of the output's own energy."""

    def slope(self, got: Tensor, wanted: Tensor) -> Tensor:
        return _of_unit_size((got.float() - wanted.float()) * token_weights(wanted)).to(got.dtype)

    def lost(self, got: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        got, wanted = got.float(), wanted.float()
        w = token_weights(wanted)
        error = ((got - wanted).square().sum(-1, keepdim=True) * w).sum()
        return error.double().cpu(), (wanted.square().sum(-1, keepdim=True) * w).sum().double().cpu()


class Divergence:
    """KL divergence of the next token's distribution from the uncompressed model's, nats a token.

    Every block's error reaches the last one, which by this loss undoes the part of it that changes predictions and
    leaves alone the part that the output head does not see. Of a batch at most `POSITIONS` tokens are compared, evenly
    spaced and others in each step: they cost as much as a block where the vocabulary is large.

    Args:
        logits: of hidden states (N, D) behind the block, (N, V) float32; with gradients if they are enabled.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        self.logits = logits
        self.turn = 0

    def slope(self, got: Tensor, wanted: Tensor) -> Tensor:
        slope = torch.zeros(got.shape[0] * got.shape[1], got.shape[2], device=got.device)
        for at in self._places(got, self.turn):
            with torch.enable_grad():
                hidden = got.detach().flatten(0, 1)[at].requires_grad_()
                (by_hidden,) = torch.autograd.grad(self._divergence(hidden, wanted.flatten(0, 1)[at]).sum(), hidden)
            slope[at] = by_hidden.float()
        self.turn += 1
        return _of_unit_size(slope).reshape(got.shape).to(got.dtype)

    def lost(self, got: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        total, count = torch.zeros((), dtype=torch.float64), 0
        with torch.no_grad():
            for at in self._places(got, 0):
                found = self._divergence(got.flatten(0, 1)[at], wanted.flatten(0, 1)[at])
                total, count = total + found.sum().double().cpu(), count + len(at)
        return total, torch.tensor(float(count), dtype=torch.float64)

    def _places(self, got: Tensor, turn: int) -> Iterator[Tensor]:
        count = got.shape[0] * got.shape[1]
        apart = -(-count // POSITIONS)
        places = torch.arange(turn % apart, count, apart, device=got.device)
        for lo in range(0, len(places), AT_ONCE):
            yield places[lo : lo + AT_ONCE]

    def _divergence(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        with torch.no_grad():
            p = self.logits(wanted).log_softmax(-1)
        return torch.nn.functional.kl_div(
            self.logits(hidden).log_softmax(-1), p, reduction="none", log_target=True
        ).sum(-1)


def token_weights(wanted: Tensor) -> Tensor:
    """(B, L, 1) float32: 1, less for tokens of massive activations, whose error would be all that counts.

    min(1, MASSIVE * median energy / energy), over the tokens of the batch.
    """
    energy = wanted.float().square().sum(-1, keepdim=True)
    return (MASSIVE * energy.median() / energy.clamp(min=1e-30)).clamp(max=1)


def _of_unit_size(slope: Tensor) -> Tensor:
    return slope / slope.square().mean().sqrt().clamp(min=1e-30)
