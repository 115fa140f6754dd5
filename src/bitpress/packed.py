"""A quantized checkpoint seen as a dense one: its linears are unpacked when they are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitpress import formats
from bitpress.checkpoint import Source
from bitpress.inspection import declared_dtype, inspect_checkpoint
from bitpress.math.grid import Solved
from bitpress.output import read_site
from bitpress.sites import Site


class PackedSource(Source):
    """The tensors of a folder with quantized linears, a `weight` in place of the tensors of each.

    Attributes:
        sites: the linears by name on disk; to be set before their weights are read.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        found = inspect_checkpoint(folder)
        dtype = getattr(torch, declared_dtype(found) or "bfloat16")
        self.stored = dict(self.tensors)
        self.sites: dict[str, Site] = {}
        for layer in found.layers:
            mine = [n for n in self.tensors if n.startswith(f"{layer.name}.") and n != f"{layer.name}.bias"]
            file = self.tensors[mine[0]][0]
            for name in mine:
                del self.tensors[name]
            self.tensors[f"{layer.name}.weight"] = (file, dtype, (layer.rows, layer.columns))

    def scale_dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a linear's scales; None where they are encoded."""
        found = (self.stored.get(f"{name}.{suffix}") for suffix in ("weight_scale", "scales"))
        dtypes = [entry[1] for entry in found if entry is not None]
        return next((d for d in dtypes if d.is_floating_point and d.itemsize > 1), None)

    def take(self, sites: Sequence[Site]) -> None:
        """Say how the linears are stored."""
        self.sites = {f"{s.name}.weight": s for s in sites}

    def solved(self, site: Site) -> Solved:
        """A linear with its codes."""
        weight = f"{site.name}.weight"
        packed = site.stored != formats.DEFAULT or f"{weight}_packed" in self.stored
        packed = packed or self.stored[weight][1].itemsize == 1
        return read_site(lambda name: self.stored[name][0], site, compressed=packed)

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        wanted = list(names)
        out = super().read([n for n in wanted if n in self.stored and n not in self.sites], device)
        return out | {n: self.solved(self.sites[n]).dense().to(device) for n in wanted if n in self.sites}
