"""Channel scales that can move from one module of a block into those that read it, the block's output unchanged.

A norm's gain and the linears that read its output; the rows of a linear and the columns of the next. Nothing is taken
from names: norms and their readers are found by the identity of the tensor between them, linears by scaling the rows
of one and seeing whose input scales with them, all on a tiny copy with random weights. A fold is accepted only if the
block's output stays the same.

Legend: R out features, C in features, P channels of a fold, s (P,) its scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.blocks import Blocks
from bitpress.experts import UnfusedExperts

OFFSETS = (0.0, 1.0)  # a norm's gain is offset + weight: Gemma stores the gain less one
SAME = 1e-4  # largest change of the output, as a share of what scaling the producer alone changes it by
FELT = 1e-3  # that share of the output's largest value must change, or the probe says nothing
_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Fold:
    """A scale that may be divided out of a producer and multiplied into its consumers.

    Attributes:
        producer: module name within the block; `experts.*` stands for every expert.
        consumers: names of all modules that read the producer's output, in order of their calls.
        offset: of a norm, whose gain is offset + weight; None: the producer is a linear.
        layout: of a linear, which of its rows carry the channels; see `LAYOUTS`.
    """

    producer: str
    consumers: tuple[str, ...]
    offset: float | None = None
    layout: str | None = None


@dataclass(frozen=True)
class Channels:
    """Which rows of a producer carry the channels, and which channel each input column of a consumer reads.

    Attributes:
        rows: (P,) row indices of the producer.
        columns: (C,) channel of each column.
    """

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Found:
    """What the probe says of one kind of block: folds, and why other candidates are none, by producer."""

    folds: tuple[Fold, ...]
    rejected: dict[str, str]


# which rows of a linear carry the channels that the next one reads


def _all_rows(R: int, C: int, head: int) -> Channels | None:
    """Every row; with fewer key-value heads than query heads, each feeds the columns of several."""
    if R == C:
        return Channels(torch.arange(R), torch.arange(C))
    return _grouped(R, C, head, R // head) if head and C % R == 0 and R % head == 0 else None


def _last_rows(R: int, C: int, head: int) -> Channels | None:
    """Queries, keys and values one after the other: the values' rows come last."""
    P = (R - C) // 2
    if P <= 0 or R != C + 2 * P or not head or P % head or C % P:
        return None
    inner = _all_rows(P, C, head)
    return None if inner is None else Channels(inner.rows + R - P, inner.columns)


def _rows_by_head(R: int, C: int, head: int) -> Channels | None:
    """Queries, keys and values of one key-value head after those of another: the last rows of each are the values'."""
    if not head or R <= C or (R - C) % (2 * head):
        return None
    heads = (R - C) // (2 * head)
    return _grouped(R, C, head, heads) if R % heads == 0 and C % (heads * head) == 0 else None


def _second_half(R: int, C: int, head: int) -> Channels | None:
    """Gate and up in one: up is the second half."""
    return Channels(torch.arange(C, R), torch.arange(C)) if R == 2 * C else None


def _first_half(R: int, C: int, head: int) -> Channels | None:
    return Channels(torch.arange(C), torch.arange(C)) if R == 2 * C else None


def _grouped(R: int, C: int, head: int, heads: int) -> Channels:
    """The last `head` rows of each of `heads` groups of rows, repeated over that group's columns."""
    rows = torch.arange(R).view(heads, -1)[:, -head:].reshape(-1)
    repeats = C // (heads * head)
    columns = torch.arange(heads * head).view(heads, 1, head).expand(heads, repeats, head).reshape(-1)
    return Channels(rows, columns)


LAYOUTS: dict[str, Callable[[int, int, int], Channels | None]] = {
    "all rows": _all_rows,
    "last rows": _last_rows,
    "rows by head": _rows_by_head,
    "second half": _second_half,
    "first half": _first_half,
}


def channels(fold: Fold, block: nn.Module) -> Channels | None:
    """The channels of a fold in a real block; None if its sizes do not fit the layout."""
    columns = _weight(block, fold.consumers[0]).shape[1]
    if fold.layout is None:
        size = _weight(block, fold.producer).numel()
        return Channels(torch.arange(size), torch.arange(columns)) if size == columns else None
    return LAYOUTS[fold.layout](_weight(block, fold.producer).shape[0], columns, head_size(block, fold.producer))


def head_size(block: nn.Module, name: str) -> int:
    """Rows of one attention head in the module that holds `name`; 0: it has no heads."""
    parent = block.get_submodule(name.rpartition(".")[0])
    for attribute in ("v_head_dim", "head_dim", "head_size"):
        if isinstance(size := getattr(parent, attribute, None), int) and size > 0:
            return size
    return 0


def _weight(block: nn.Module, name: str) -> Tensor:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _bias(block: nn.Module, name: str) -> Tensor | None:
    bias = getattr(block.get_submodule(name), "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


# expert templates


def pattern(name: str) -> str:
    """A module name with the expert's number replaced by `*`."""
    return _EXPERT.sub("*", name)


def expand(fold: Fold, block: nn.Module) -> list[Fold]:
    """The folds of a real block that a fold with `experts.*` stands for."""
    names = [n for n, _ in block.named_modules()]

    def matches(name: str) -> list[str]:
        if "*" not in name:
            return [name]
        shape = re.compile(re.escape(name).replace(r"\*", r"\d+"))
        return [n for n in names if shape.fullmatch(n)]

    if "*" not in fold.producer:
        return [replace(fold, consumers=tuple(n for c in fold.consumers for n in matches(c)))]
    out = []
    for producer in matches(fold.producer):
        number = _EXPERT.search(producer)
        assert number is not None
        mine = tuple(c.replace("*", number.group()) for c in fold.consumers)
        out.append(replace(fold, producer=producer, consumers=mine))
    return out


def signature(block: nn.Module) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """What tells the structure of a block: its modules, their classes and parameters; experts count once."""
    kinds = {
        (pattern(n), type(m).__name__, tuple(sorted(p for p, _ in m.named_parameters(recurse=False))))
        for n, m in block.named_modules()
    }
    return tuple(sorted(kinds))


# application


@torch.no_grad()
def scale_producer(block: nn.Module, fold: Fold, scale: Tensor) -> Tensor:
    """Divide the producer's channels by `scale` (P,), in the dtype in which it is stored.

    Returns:
        The scale that this really is, old gain / stored new gain, (P,) float32; of a linear, `scale` itself.
    """
    weight, bias = _weight(block, fold.producer), _bias(block, fold.producer)
    if fold.offset is not None:
        stored, exact = stored_gain(weight, fold.offset, scale)
        weight.copy_(stored)
        if bias is not None:
            bias.copy_((bias.float() / exact).to(bias.dtype))
        return exact
    at = channels(fold, block)
    assert at is not None
    rows = at.rows.to(weight.device)
    weight[rows] = (weight[rows].float() / scale[:, None]).to(weight.dtype)
    if bias is not None:
        bias[rows] = (bias[rows].float() / scale).to(bias.dtype)
    return scale


def stored_gain(weight: Tensor, offset: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's weight after its gain is divided by `scale`, and the scale that the rounded weight amounts to.

    Channels whose gain is zero, or would be when stored, stay as they are.
    """
    gain = weight.float() + offset
    stored = (gain / scale - offset).to(weight.dtype)
    new = stored.float() + offset
    exact = gain / new
    sound = torch.isfinite(exact) & (exact > 0)
    return torch.where(sound, stored, weight), torch.where(sound, exact, 1.0)


@torch.no_grad()
def scale_consumers(block: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Multiply the consumers' columns by the scale (P,) of the channels that they read."""
    at = channels(fold, block)
    assert at is not None
    for name in fold.consumers:
        weight = _weight(block, name)
        weight.copy_((weight.float() * scale[at.columns.to(scale.device)]).to(weight.dtype))


# discovery


@torch.no_grad()
def find_folds(model: nn.Module, blocks: Blocks, index: int, experts: dict[str, UnfusedExperts]) -> Found:
    """The folds of one block of a tiny model in float32.

    Args:
        model: with random weights; they are changed, and put back.
        index: of the block.
        experts: its unfused experts by module name.
    """
    probe = _Probe(model, blocks, index, [e for n, e in experts.items() if n.startswith(blocks.prefix(index))])
    folds, rejected = [], {}
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
                if x is not None and (made := outputs.get(x.untyped_storage().data_ptr())) is not None:
                    if x.shape[-1] == made[1].shape[-1] and x.numel() == made[1].numel():
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
