"""Channel scales that can move from one module of a block into those that read it, the block's output unchanged.

A norm's gain and the linears that read its output; the rows of a linear and the columns of the next. `foldprobe`
finds them; this is what they are, and how one is applied.

Legend: R out features, C in features, P channels of a fold, s (P,) its scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.|$)")


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


def _rows_by_query_head(R: int, C: int, head: int) -> Channels | None:
    """Keys and values of each query head one after the other, in whatever sizes: the last rows are the values'."""
    if not head or C % head:
        return None
    heads = C // head
    return _grouped(R, C, head, heads) if R % heads == 0 and R // heads > head else None


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
    "rows by query head": _rows_by_query_head,
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
