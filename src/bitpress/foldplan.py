"""Which folds of which blocks each smoothing modifier of a stage uses, and why it uses no others."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from bitpress.blocks import Blocks
from bitpress.experts import unfuse
from bitpress.foldprobe import Found, find_folds
from bitpress.folds import Fold, channels, expand, pattern, signature
from bitpress.modifiers.base import LinearModifier, Modifier, names
from bitpress.modifiers.smoothing import Pair, ScaleModifier
from bitpress.sites import Site, brief, dense_site, disk_module, linears_of
from bitpress.subject import Subject
from bitpress.targets import match
from bitpress.verified import tiny_copy

LEAST_LAYERS = 4


@dataclass(frozen=True)
class Use:
    """A fold that a modifier scales.

    Attributes:
        fold: names are relative to the block, experts by number.
        balance: consumers that the scale is computed for; the others are rescaled like them.
        witness: the consumer whose input gives the statistics; it sees all tokens that the producer's output has.
    """

    modifier: ScaleModifier
    fold: Fold
    balance: tuple[str, ...]
    witness: str


@dataclass
class Smoothing:
    """What a stage smooths.

    Attributes:
        uses: of each block, in the order of the modifiers.
        faults, notes: for the plan.
    """

    uses: list[tuple[Use, ...]]
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_smoothing(
    modifiers: Sequence[Modifier], subject: Subject, sites: Sequence[Site], *, trust_remote_code: bool = False
) -> Smoothing:
    """The folds that the stage's smoothing modifiers use."""
    scaling = [m for m in modifiers if isinstance(m, ScaleModifier)]
    made = Smoothing([() for _ in subject.blocks.modules])
    if not scaling:
        return made
    made.faults += _order_faults(modifiers)
    probed = _probe(subject, trust_remote_code)
    if isinstance(probed, str):
        made.faults += [f"{type(m).__name__}: {probed}" for m in scaling]
        return made
    in_blocks = [_BlockFolds(subject, i, probed[signature(b)]) for i, b in enumerate(subject.blocks.modules)]
    quantized = {s.module for s in sites if s.group is not None}
    if not any(isinstance(m, LinearModifier) and m.claims() for m in modifiers):
        quantized = {n for n, _ in linears_of(subject)}  # the stage leaves them dense; a later one may quantize
    if any(m.smoothing == "smoothquant" and "sample" in m.needs for m in scaling) and not integer_inputs(sites):
        made.faults.append(
            "SmoothQuantModifier.smoothing_strength: 'search' weighs how inputs are rounded to integers (as at W8A8), "
            "and no linear has such inputs; give a number from 0 to 1, or use AWQModifier"
        )
    for modifier in scaling:
        chosen = _Choice(modifier, subject, quantized)
        for i, block in enumerate(in_blocks):
            made.uses[i] += chosen.of(block)
        made.faults += chosen.faults()
        if not isinstance(modifier, LinearModifier):  # else find_sites has given its notes
            made.notes += [f"{chosen.kind}.{n}" for n in modifier.notes()]
        if not modifier.for_rounding and not any(s.group is not None for s in sites):
            made.notes.append(
                f"{chosen.kind}: nothing in its stage quantizes: scales are moved, and nothing gets smaller"
            )
        made.notes += _idle_ignores(modifier, subject)
        made.notes += chosen.notes()
    return made


def integer_inputs(sites: Sequence[Site]) -> bool:
    """Whether the input of any linear is rounded to integers."""
    inputs = (s.scheme.input_activations for s in sites if s.scheme is not None)
    return any(i is not None and i.type == "int" for i in inputs)


def smoothed_sites(sites: Sequence[Site], smoothing: Smoothing, subject: Subject) -> list[Site]:
    """The sites with the modifiers that scale what they read; in a stage that only smooths, sites without steps."""
    by_module: dict[str, list[ScaleModifier]] = {}
    for index, uses in enumerate(smoothing.uses):
        for use in uses:
            for name in use.fold.consumers:
                mine = by_module.setdefault(subject.blocks.prefix(index) + name, [])
                if not any(m is use.modifier for m in mine):
                    mine.append(use.modifier)
    if not sites:
        sites = [dense_site(subject, n, m) for n, m in linears_of(subject) if n in by_module]
    return [replace(s, smoothing=tuple(by_module.get(s.module, ()))) for s in sites]


def _idle_ignores(modifier: ScaleModifier, subject: Subject) -> list[str]:
    """Notes of ignored names that no module has, but for the output head, which every recipe leaves out."""
    if isinstance(modifier, LinearModifier) and modifier.claims():
        return []  # find_sites says so
    named = [(n, disk_module(subject, n), type(m).__name__) for n, m in subject.model.named_modules() if n]
    return [
        f"{type(modifier).__name__}.ignore: '{p}' matches nothing"
        for p in names(modifier.ignore)
        if p != "lm_head" and not any(match(n, kind, [p]) for *both, kind in named for n in both)
    ]


def _order_faults(modifiers: Sequence[Modifier]) -> list[str]:
    """Smoothing comes first: what is quantized already cannot be scaled."""
    faults = []
    for i, modifier in enumerate(modifiers):
        if not isinstance(modifier, ScaleModifier):
            continue
        earlier = [m for m in modifiers[:i] if isinstance(m, LinearModifier) and m.claims()]
        later = [m for m in modifiers[i:] if isinstance(m, LinearModifier) and m.claims()]
        if earlier:
            first = type(earlier[0]).__name__
            faults.append(
                f"{type(modifier).__name__}: must come before {first}, which compresses what it would scale"
                + (", or in a stage of its own after it" if isinstance(modifier, LinearModifier) else "")
            )
        elif not later and modifier.for_rounding:
            faults.append(f"{type(modifier).__name__}: nothing after it quantizes; add a quantizer to the stage")
    return faults


def _probe(subject: Subject, trust_remote_code: bool) -> dict[Any, Found] | str:
    """What a tiny copy says of every kind of block that the model has, by signature; or why there is none."""
    first: dict[Any, int] = {}
    for i, block in enumerate(subject.blocks.modules):
        first.setdefault(signature(block), i)
    layers = min(len(subject.blocks), max(LEAST_LAYERS, max(first.values()) + 1))
    try:
        model = tiny_copy(_plain_rope(subject.config), layers=layers, trust_remote_code=trust_remote_code)
        experts = unfuse(model)
        _randomize(model)
        blocks = Blocks(model)
        found: dict[Any, Found] = {}
        for i, block in enumerate(blocks.modules):
            kind = signature(block)
            new = find_folds(model, blocks, i, experts)
            found[kind] = _both(found[kind], new) if kind in found else new
    except Exception as error:  # whatever the architecture does not like about a tiny configuration
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"folds are found on a tiny copy of the model, which fails: {why}"
    if missing := [i for kind, i in first.items() if kind not in found]:
        return f"block {missing[0]} is built like none of a tiny copy, so its folds cannot be checked"
    return found


def _both(a: Found, b: Found) -> Found:
    """What two blocks of one structure have in common."""
    kept = tuple(f for f in a.folds if f in b.folds)
    lost = {f.producer: "allowed in some of these blocks only" for f in (*a.folds, *b.folds) if f not in kept}
    return Found(kept, {**a.rejected, **b.rejected, **lost})


def _randomize(model: nn.Module) -> None:
    """Weights that make every part of a block matter: gains and biases are 1 and 0 in a new model."""
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        shape = parameter.shape
        new = torch.rand(shape, generator=random) + 0.5 if len(shape) < 2 else torch.randn(shape, generator=random) / 5
        parameter.data.copy_(new)


def _plain_rope(config: Any) -> Any:
    """The configuration without rotary factors by dimension, whose count a small head would not fit."""
    config = deepcopy(config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and any(isinstance(v, list) for v in rope.values()):
        kept = {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor")}
        text.rope_parameters = {"rope_type": "default", **kept}
    return config


class _BlockFolds:
    """The folds of one real block, experts by number."""

    def __init__(self, subject: Subject, index: int, found: Found) -> None:
        self.block = subject.blocks.modules[index]
        self.prefix = subject.blocks.prefix(index)
        self.rejected = dict(found.rejected)
        self.folds: dict[str, Fold] = {}
        for fold in (one for f in found.folds for one in expand(f, self.block)):
            if channels(fold, self.block) is None:
                self.rejected[pattern(fold.producer)] = "its sizes do not fit those of what reads it"
            else:
                self.folds[fold.producer] = fold

    def why_not(self, producer: str) -> str:
        return self.rejected.get(pattern(producer), "no linear reads it in a way that a scale could make up for")


class _Choice:
    """What one modifier takes of the folds of the blocks."""

    def __init__(self, modifier: ScaleModifier, subject: Subject, quantized: set[str]) -> None:
        self.modifier, self.subject, self.quantized = modifier, subject, quantized
        self.kind = type(modifier).__name__
        self.pairs = modifier.pairs()
        self.taken: dict[tuple[str, tuple[str, ...]], int] = {}
        self.unused: dict[str, str] = {}
        self.ignored: dict[str, str] = {}
        self.untouched: dict[str, int] = {}
        self.known: dict[str, None] = {}
        self.refused: dict[int, dict[str, str]] = {}
        self.matched: dict[int, set[str]] = {}
        self.read_by: dict[int, tuple[str, tuple[str, ...]]] = {}
        self.twice: list[str] = []

    def of(self, block: _BlockFolds) -> tuple[Use, ...]:
        wanted = self.all_of(block) if self.pairs is None else self.named(block, self.pairs)
        uses = []
        for fold, balance in wanted:
            if self.means(block, fold.producer, names(self.modifier.ignore)):
                self.ignored[pattern(fold.producer)] = "in ignore"
                continue
            scored = tuple(c for c in balance if block.prefix + c in self.quantized)
            if not scored:
                self.unused[pattern(fold.producer)] = "nothing that reads it is quantized"
                continue
            within = pattern(fold.producer) != fold.producer  # one expert's own rows, read by that expert alone
            witness = fold.consumers[0] if within else _sees_all(fold)
            if witness is None:
                self.unused[pattern(fold.producer)] = "only experts read it, none of which sees all tokens"
                continue
            uses.append(Use(self.modifier, fold, scored, witness))
            key = (pattern(fold.producer), tuple(dict.fromkeys(map(pattern, fold.consumers))))
            self.taken[key] = self.taken.get(key, 0) + 1
        read = {c for u in uses for c in u.fold.consumers}
        for name, _ in block.block.named_modules():
            if block.prefix + name in self.quantized and name not in read:
                self.untouched[pattern(name)] = self.untouched.get(pattern(name), 0) + 1
        for producer, why in block.rejected.items():
            self.unused.setdefault(producer, why)
        return tuple(uses)

    def all_of(self, block: _BlockFolds) -> list[tuple[Fold, tuple[str, ...]]]:
        return [(f, f.consumers) for f in block.folds.values()]

    def named(self, block: _BlockFolds, pairs: Sequence[Pair]) -> list[tuple[Fold, tuple[str, ...]]]:
        """The folds that mappings mean, with the consumers that they name."""
        wanted: dict[str, tuple[Fold, tuple[str, ...]]] = {}
        for name, module in block.block.named_modules():
            if name and "weight" in module._parameters:
                self.known[pattern(name).rpartition(".")[2]] = None
        for i, pair in enumerate(pairs):
            for name, module in block.block.named_modules():
                if "weight" not in module._parameters or not self.means(block, name, (pair.smooth,)):
                    continue
                if (fold := block.folds.get(name)) is None:
                    self.refused.setdefault(i, {})[pattern(name)] = block.why_not(name)
                    continue
                self.read_by[i] = (pattern(name), tuple(dict.fromkeys(map(pattern, fold.consumers))))
                balance = tuple(c for c in fold.consumers if self.means(block, c, pair.balance))
                met = self.matched.setdefault(i, set())
                met.update(b for b in pair.balance if any(self.means(block, c, (b,)) for c in balance))
                if name in wanted and balance:
                    self.twice.append(f"mappings[{i}]: {pattern(name)} is scaled by another mapping already")
                elif balance:
                    wanted[name] = (fold, balance)
        return list(wanted.values())

    def means(self, block: _BlockFolds, name: str, patterns: Sequence[str]) -> bool:
        module = block.prefix + name
        kind = type(block.block.get_submodule(name)).__name__
        return any(match(n, kind, patterns) for n in dict.fromkeys((module, disk_module(self.subject, module))))

    def faults(self) -> list[str]:
        found = [f"{self.kind}.{t}" for t in dict.fromkeys(self.twice)]
        for i, pair in enumerate(self.pairs or ()):
            where = f"{self.kind}.mappings[{i}]"
            if i in self.read_by:
                producer, readers = self.read_by[i]
                found += [
                    f"{where}: '{b}' does not read the output of {producer}; {', '.join(readers)} do"
                    for b in pair.balance
                    if b not in self.matched[i]
                ]
            elif i in self.refused:
                found += [f"{where}: {name} cannot be scaled: {why}" for name, why in self.refused[i].items()]
            else:
                found.append(
                    f"{where}: '{pair.smooth}' matches nothing in the blocks. Known: {', '.join(sorted(self.known))}"
                )
        if not found and not self.taken and (self.modifier.required or self.pairs is not None):
            why = [f"{name}: {reason}" for name, reason in {**self.unused, **self.ignored}.items()]
            found.append(
                f"{self.kind}: nothing in this model can be smoothed"
                + (f" ({'; '.join(why)})" if why else ": no norm feeds its linears and no linear feeds another")
            )
        return brief(found) if self.pairs is None else found

    def notes(self) -> list[str]:
        short = [f"{p} -> {', '.join(readers)}" for p, readers in self.taken]
        made = [f"{self.kind}: scales {'; '.join(short)}" if short else f"{self.kind}: nothing can be smoothed here"]
        for i, names_ in self.refused.items():
            if i in self.read_by:
                made += [f"{self.kind}.mappings[{i}]: {n} left as it is: {why}" for n, why in names_.items()]
        if self.pairs is None and self.untouched:
            made.append(f"{self.kind}: the input of {', '.join(self.untouched)} is not scaled")
        if self.pairs is None and self.taken:
            some = {producer for producer, _ in self.taken}
            made += [
                f"{self.kind}: {n} is left as it is{' in some blocks' if n in some else ''}: {why}"
                for n, why in self.unused.items()
            ]
        return made


def _sees_all(fold: Fold) -> str | None:
    """The first consumer that is no expert."""
    return next((c for c in fold.consumers if pattern(c) == c), None)
