"""Which folds a block has: tried on a tiny copy with random weights, accepted if the block's output stays the same.

Nothing is taken from names. Norms and their readers are found by the identity of the tensor between them, linears by
scaling the rows of one and seeing whose input scales with them. Identity alone would be unsafe: what reads a norm's
output may also be the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.blocks import Blocks
from bitpress.experts import UnfusedExperts
from bitpress.folds import LAYOUTS, Channels, Fold, channels, expand, pattern, scale_consumers, scale_producer

OFFSETS = (0.0, 1.0)  # a norm's gain is offset + weight: Gemma stores the gain less one
SAME = 1e-4  # largest change of the output, as a share of what scaling the producer alone changes it by
FELT = 1e-3  # that share of the output's largest value must change, or the probe says nothing


@dataclass(frozen=True)
class Found:
    """What the probe says of one kind of block: folds, and why other candidates are none, by producer."""

    folds: tuple[Fold, ...]
    rejected: dict[str, str]


@torch.no_grad()
def find_folds(model: nn.Module, blocks: Blocks, index: int, experts: dict[str, UnfusedExperts]) -> Found:
    """The folds of one block of a tiny model in float32.

    Args:
        model: with random weights; they are changed, and put back.
        index: of the block.
        experts: its unfused experts by module name.
    """
    probe = _Probe(model, blocks, index, [e for n, e in experts.items() if n.startswith(blocks.prefix(index))])
    folds: list[Fold] = []
    rejected: dict[str, str] = {}
    for candidate in (*probe.norm_candidates(), *probe.linear_candidates()):
        tried = [replace(candidate, offset=o) for o in OFFSETS] if candidate.layout is None else [candidate]
        accepted = next((f for f in tried if probe.unchanged(f)), None)
        if accepted is not None:
            folds.append(accepted)
            rejected.pop(accepted.producer, None)
        elif not any(f.producer == candidate.producer for f in folds):
            rejected[candidate.producer] = (
                f"{', '.join(candidate.consumers)} cannot be rescaled for it: something else reads its output too"
            )
    return Found(tuple(folds), rejected)


class _Probe:
    """One block with random weights and a random input, on which folds are tried."""

    def __init__(self, model: nn.Module, blocks: Blocks, index: int, experts: list[UnfusedExperts]) -> None:
        self.blocks, self.index, self.experts = blocks, index, experts
        self.block = blocks.modules[index]
        config: Any = model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.random = torch.Generator().manual_seed(index)
        self.ids = torch.randint(3, text.vocab_size, (2, 12), generator=self.random)
        self.hidden = torch.randn(2, 12, text.hidden_size, generator=self.random)
        self.before = self.run()
        self.order: list[str] = []
        self.inputs = self.record_inputs()

    def run(self) -> Tensor:
        return self.blocks.run(self.index, (self.ids, self.hidden))

    @contextmanager
    def every_token(self) -> Iterator[None]:
        """All experts see all tokens, so that what they read can be compared."""
        for module in self.experts:
            module.on_all_tokens = frozenset(range(len(module)))
        try:
            yield
        finally:
            for module in self.experts:
                module.on_all_tokens = frozenset()

    def norm_candidates(self) -> list[Fold]:
        """Modules with one gain a channel, and those that read the very tensor that they return."""
        outputs: dict[int, tuple[str, Tensor]] = {}
        readers: dict[str, list[str]] = {}

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                if isinstance(out, Tensor) and out.shape[-1] == module.weight.numel():  # type: ignore[operator]
                    outputs[out.untyped_storage().data_ptr()] = (name, out)

            return hook

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                x = _first_tensor(args, kwargs)
                made = None if x is None else outputs.get(x.untyped_storage().data_ptr())
                if x is None or made is None or x.shape[-1] != made[1].shape[-1] or x.numel() != made[1].numel():
                    return
                known = readers.setdefault(made[0], [])
                if pattern(name) not in known:
                    known.append(pattern(name))

            return hook

        handles: list[Any] = []
        for name, module in self.block.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if "weight" in own and all(p.dim() == 1 for p in own.values()):
                handles.append(module.register_forward_hook(after(name)))
            elif "weight" in own and own["weight"].dim() == 2:
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        try:
            with self.every_token():
                self.run()
        finally:
            for handle in handles:
                handle.remove()
        return [Fold(norm, tuple(found)) for norm, found in readers.items()]

    def linear_candidates(self) -> list[Fold]:
        """Linears whose rows, scaled, scale the input columns of others and nothing else in it."""
        found = []
        linears = list(dict.fromkeys(map(pattern, self.order)))
        for producer in linears:
            for layout in LAYOUTS:
                if (fold := self.readers_of(producer, layout, linears)) is not None:
                    found.append(fold)
                    break
        return found

    def readers_of(self, producer: str, layout: str, linears: list[str]) -> Fold | None:
        fits: dict[str, Channels] = {}
        for name in linears:
            fold = Fold(producer, (name,), layout=layout)
            at = channels(self.one(fold), self.block)
            if name != producer and at is not None:
                fits[name] = at
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, at in fits.items():
            groups.setdefault((*at.rows.tolist(), -1, *at.columns.tolist()), []).append(name)
        for names in groups.values():
            at = fits[names[0]]
            fold = Fold(producer, tuple(names), layout=layout)
            scale = self.scales(len(at.rows))
            with self.weights_kept():
                for one in expand(fold, self.block):
                    scale_producer(self.block, one, scale)
                seen = self.record_inputs()
            reads = tuple(n for n in names if self.scaled(n, seen, scale[at.columns]))
            if reads:
                return replace(fold, consumers=reads)
        return None

    def scaled(self, name: str, seen: dict[str, Tensor], by: Tensor) -> bool:
        """Whether the input of a linear (of every expert) is its former one over `by`."""
        ours = [n for n in seen if pattern(n) == name]
        for n in ours:
            was, now = self.inputs[n], seen[n]
            size = float(was.abs().max())
            if size == 0 or now.shape != was.shape or float((now * by - was).abs().max()) > SAME * size:
                return False
        return bool(ours)

    def record_inputs(self) -> dict[str, Tensor]:
        """The input of every linear, all experts on all tokens."""
        seen: dict[str, Tensor] = {}
        self.order = []

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                self.order.append(name)
                seen[name] = args[0].reshape(-1, args[0].shape[-1]).clone()

            return hook

        linears = [(n, m) for n, m in self.block.named_modules() if isinstance(m, nn.Linear)]
        handles = [m.register_forward_pre_hook(before(n)) for n, m in linears]
        try:
            with self.every_token():
                self.run()
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def unchanged(self, fold: Fold) -> bool:
        """Whether the fold leaves the block's output as it is, where half of it does not."""
        at = channels(self.one(fold), self.block)
        if at is None:
            return False
        scale = self.scales(len(at.rows))
        with self.weights_kept():
            folds = expand(fold, self.block)
            scales = [scale_producer(self.block, one, scale) for one in folds]
            half = float((self.run() - self.before).abs().max())
            for one, exact in zip(folds, scales, strict=True):
                scale_consumers(self.block, one, exact)
            whole = float((self.run() - self.before).abs().max())
        return half > FELT * float(self.before.abs().max()) and whole < SAME * half

    def one(self, fold: Fold) -> Fold:
        """A fold with real names, the first where it stands for several."""
        return expand(fold, self.block)[0]

    def scales(self, count: int) -> Tensor:
        return torch.exp2(torch.rand(count, generator=self.random) * 4 - 2)

    @contextmanager
    def weights_kept(self) -> Iterator[None]:
        kept = {n: p.detach().clone() for n, p in self.block.named_parameters()}
        try:
            yield
        finally:
            for name, parameter in self.block.named_parameters():
                parameter.data.copy_(kept[name])


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
