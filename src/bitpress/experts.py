"""Mixture-of-experts blocks with one Linear per expert.

transformers 5 keeps all experts of a block in two 3-D parameters, which no hook sees and no other tool names. For
the time of a run each such module is replaced by `UnfusedExperts`: an expert's three projections are Linears of
their own. The outputs are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

LEAVES = ("gate_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) * up(x)), for x (T, C)."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, fused: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self._fused = (fused,)  # in a tuple, so that it is not registered as a child

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        fused: Any = self._fused[0]
        custom = getattr(fused, "_apply_gate", None)
        hidden = custom(torch.cat([gate, up], -1)) if custom is not None else fused.act_fn(gate) * up
        out: Tensor = self.down_proj(hidden)
        return out


class UnfusedExperts(nn.ModuleList):
    """The experts of one block, called as the fused module is: (hidden_states (T, C), top_k_index, top_k_weights).

    Attributes:
        on_all_tokens: experts that are also run on every token, their output unused, so that hooks see it. This is
            how an expert that the router hardly chose gets statistics.
    """

    def __init__(self, fused: nn.Module) -> None:
        experts = []
        gate_up, down = fused.gate_up_proj, fused.down_proj
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        middle = down.shape[2]
        for e in range(gate_up.shape[0]):
            parts = (gate_up[e, :middle], gate_up[e, middle:], down[e])
            gate, up, down_proj = (_linear(p) for p in parts)
            experts.append(Expert(gate, up, down_proj, fused))
        super().__init__(experts)
        self.on_all_tokens: frozenset[int] = frozenset()
        self.fused = (fused,)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        k = top_k_index.shape[1]
        chosen, places = top_k_index.reshape(-1).sort(stable=True)
        edges = torch.searchsorted(chosen, torch.arange(len(self) + 1, device=chosen.device)).tolist()  # one wait
        for e, expert in enumerate(self):
            mine = places[edges[e] : edges[e + 1]]
            if e in self.on_all_tokens:
                expert(hidden_states)
                continue
            if len(mine) == 0:
                continue
            token, choice = mine // k, mine % k
            part = expert(hidden_states[token]) * top_k_weights[token, choice, None]
            out.index_add_(0, token, part.to(out.dtype))
        return out


def _linear(weight: Tensor) -> nn.Linear:
    """A Linear whose weight is the given (possibly meta) tensor itself, a view of the fused parameter."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds experts as 3-D parameters, in whatever layout."""
    return any(p.dim() == 3 for n, p in module.named_parameters(recurse=False) if "proj" in n)


def can_unfuse(module: nn.Module) -> bool:
    """Whether its layout is the common one: gate_up_proj (E, 2I, C) and down_proj (E, C, I), no biases."""
    names = {n: p.shape for n, p in module.named_parameters(recurse=False)}
    if set(names) != {"gate_up_proj", "down_proj"} or not (hasattr(module, "act_fn") or hasattr(module, "_apply_gate")):
        return False
    (E, twice, C), (E2, C2, middle) = names["gate_up_proj"], names["down_proj"]
    # a transposed layout has (E, C, 2I): same numbers in the other order unless C == 2I, so ask the flag too
    return E == E2 and C == C2 and twice == 2 * middle and not getattr(module, "is_transposed", False)


def unfuse(model: nn.Module) -> dict[str, UnfusedExperts]:
    """Replace every fused experts module in place; returns the replacements by module name."""
    found = [(n, m) for n, m in model.named_modules() if is_fused(m) and can_unfuse(m)]
    replaced = {}
    for name, fused in found:
        replaced[name] = UnfusedExperts(fused)
        model.set_submodule(name, replaced[name])
    return replaced


def refuse(model: nn.Module, replaced: dict[str, UnfusedExperts]) -> None:
    """Put the fused modules back; the Linears were views of their parameters, so changes made in place stay."""
    for name, experts in replaced.items():
        model.set_submodule(name, experts.fused[0])


def fused_left(model: nn.Module) -> Iterator[str]:
    """Names of experts modules in a layout that `unfuse` does not know."""
    return (n for n, m in model.named_modules() if is_fused(m))
