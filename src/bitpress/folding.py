"""The folds of the block at work: their scales, what they do to weights and statistics, and the check on real data.

Scales are chosen from statistics of the block as it is. Nothing in it is changed meanwhile: weights to be compressed
are scaled in float32 when they are asked for, statistics by algebra; what is stored but not compressed (gains, biases,
routers) is scaled once all scales are known, in the dtype in which it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitpress import formats
from bitpress.blocks import Batch
from bitpress.errors import NumericsError
from bitpress.foldplan import Use
from bitpress.folds import Fold, channels, scale_consumers, scale_producer
from bitpress.math.awq import Reader
from bitpress.math.grid import Grid
from bitpress.math.stats import InputStats
from bitpress.rounding import grid_of_inputs
from bitpress.sites import Site
from bitpress.subject import Subject

LEAST_TOLERANCE = 1e-3  # of what a block adds to its input; half precision is allowed eight times its resolution


class Folding:
    """What is known of one block's folds while it is at work.

    Args:
        uses: the folds, in the order of the modifiers.
        sites: the linears of the block that are compressed.

    Attributes:
        changed: stored tensors that are not compressed and were scaled, by module tensor name; filled by `settle`.
    """

    def __init__(self, subject: Subject, index: int, uses: Sequence[Use], sites: Sequence[Site]) -> None:
        self.subject, self.index, self.uses = subject, index, uses
        self.block = subject.blocks.modules[index]
        self.prefix = subject.blocks.prefix(index)
        self.sites = {s.module.removeprefix(self.prefix): s for s in sites}
        self.folds: dict[str, Fold] = {u.fold.producer: u.fold for u in uses}
        self.scales: dict[str, Tensor] = {}  # producer -> (P,)
        self.columns: dict[str, Tensor] = {}  # consumer -> (C,), multiplied into its weight
        self.rows: dict[str, Tensor] = {}  # producer -> (R,), divided out of its weight
        self.changed: dict[str, Tensor] = {}

    @property
    def witnesses(self) -> dict[str, None]:
        """Module names of all whose input's statistics are needed."""
        return {self.prefix + u.witness: None for u in self.uses}

    def decide(self, stats: InputStats, readers: Sequence[str]) -> None:
        """Choose the scales of the folds whose statistics these are, by the module names of those that read them."""
        for use in self.uses:
            if self.prefix + use.witness not in readers:
                continue
            at = channels(use.fold, self.block)
            assert at is not None
            if not all(torch.isfinite(t).all() for t in (stats.gram, stats.sum_abs, stats.low) if t is not None):
                raise NumericsError(f"{self.prefix}{use.witness}: NaN or infinity in the input activations")
            mine = self.smoothed(stats, use.witness)
            device = next(self.block.parameters()).device
            columns = at.columns.to(device)
            s = use.modifier.scale(self._readers(use), mine, columns, len(at.rows))
            if not self._site_or_norm(use.fold):
                s = torch.exp2(s.log2().round())  # exact in whatever dtype the rows are stored
            self._add(use.fold, s)

    def _site_or_norm(self, fold: Fold) -> bool:
        return fold.offset is not None or fold.producer in self.sites

    def _add(self, fold: Fold, s: Tensor) -> None:
        before = self.scales.get(fold.producer)
        self._set(fold, s if before is None else before * s)

    def _set(self, fold: Fold, s: Tensor) -> None:
        at = channels(fold, self.block)
        assert at is not None
        self.scales[fold.producer] = s
        for name in fold.consumers:
            self.columns[name] = s[at.columns.to(s.device)]
        if fold.offset is None:
            full = torch.ones(self._weight(fold.producer).shape[0], device=s.device)
            full[at.rows.to(s.device)] = s
            self.rows[fold.producer] = full

    def take(self, scales: dict[str, Tensor]) -> None:
        """Other scales in place of those chosen, by producer."""
        for producer, s in scales.items():
            self._set(self.folds[producer], s)

    def _weight(self, name: str) -> Tensor:
        weight = self.block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def _readers(self, use: Use) -> Iterator[Reader]:
        """The weights to be balanced, or evenly spread rows of them where the modifier needs no more."""
        names = use.balance
        step = 1
        grids = [self._grid(n) for n in names]
        if use.modifier.most_rows is not None and not any(g and (g.per_tensor or g.block_rows > 1) for g in grids):
            step = -(-sum(len(self._weight(n)) for n in names) // use.modifier.most_rows)
        if step > min(len(self._weight(n)) for n in names):  # many small experts: whole ones are left out
            names, step = names[::step], 1
        for name in names:
            site = self.sites[name]
            observer = "minmax" if site.group is None else site.group.observer
            inputs = None if site.scheme is None else site.scheme.input_activations
            rounded = None if inputs is None or inputs.type != "int" else grid_of_inputs(inputs)
            fixed = rounded is not None and inputs is not None and inputs.dynamic is not True
            yield Reader(self._scaled(name, step), self._grid(name), observer, rounded, fixed)

    def _grid(self, name: str) -> Grid | None:
        site = self.sites[name]
        return None if site.scheme is None else formats.grid_of(site.scheme, site.dtype)

    def _scaled(self, name: str, step: int = 1) -> Tensor:
        """Rows of a weight with the scales so far, float32."""
        weight = self._weight(name)[::step].float()
        if name in self.columns:
            weight = weight * self.columns[name]
        if name in self.rows:
            weight = weight / self.rows[name][::step, None]
        return weight

    def weight(self, module: str) -> Tensor:
        """The weight (R, C) float32 of a linear of the block, scaled."""
        return self._scaled(module.removeprefix(self.prefix))

    def smoothed(self, stats: InputStats, module: str) -> InputStats:
        """The statistics of a linear's input, scaled."""
        s = self.columns.get(module.removeprefix(self.prefix))
        return stats if s is None else stats.smoothed(s)

    @torch.no_grad()
    def settle(self, batch: Batch) -> None:
        """Round every scale to what the stored gains make of it, and check that the block computes the same.

        Raises:
            NumericsError: it does not.
        """
        if missing := [f for f in self.folds if f not in self.scales]:
            raise NumericsError(f"{self.prefix}{missing[0]}: nothing that reads it was called, so it has no scale")
        run = self.subject.blocks.run
        before = run(self.index, batch)
        touched = self._touched()
        kept = {name: self._tensor(name).clone() for name in touched}
        try:
            for producer, fold in self.folds.items():
                exact = scale_producer(self.block, fold, self.scales[producer])
                self._set(fold, exact)
                scale_consumers(self.block, fold, exact)
            self._compare(before, run(self.index, batch), batch[1])
            for name in touched:
                if name.removesuffix(".weight") not in self.sites:
                    self.changed[self.prefix + name] = self._tensor(name).clone()
        finally:
            for name, tensor in kept.items():
                self._tensor(name).copy_(tensor)

    def install(self) -> None:
        """Put what was scaled and is not compressed into the model."""
        for name, tensor in self.changed.items():
            self._tensor(name.removeprefix(self.prefix)).copy_(tensor)

    def _touched(self) -> list[str]:
        modules = [n for f in self.folds.values() for n in (f.producer, *f.consumers)]
        producers = set(self.folds)
        found = []
        for name in dict.fromkeys(modules):
            found.append(f"{name}.weight")
            if name in producers and getattr(self.block.get_submodule(name), "bias", None) is not None:
                found.append(f"{name}.bias")
        return found

    def _tensor(self, name: str) -> Tensor:
        return self.block.get_parameter(name).detach()

    def _compare(self, before: Tensor, after: Tensor, hidden: Tensor | None) -> None:
        """The block's outputs without and with the folds, token by token; half of the tokens must be close.

        A router may send a token elsewhere for a last bit, so single tokens may differ.
        """
        eps = torch.finfo(before.dtype).eps
        added = before.float() if hidden is None else before.float() - hidden.float()
        bound = max(8 * eps, LEAST_TOLERANCE) * added.norm(dim=-1) + eps * before.float().norm(dim=-1)
        off = ((after.float() - before.float()).norm(dim=-1) / bound.clamp(min=1e-30)).median()
        if not float(off) <= 1:
            raise NumericsError(
                f"{self.prefix.rstrip('.')}: with its scales folded the block's output changes by {float(off):.1f} "
                f"times what {before.dtype} allows: give mappings that leave out some of {', '.join(self.folds)}"
            )
