"""A dense model that rounds its activations as a compressed-tensors checkpoint says, experts included.

transformers rounds the inputs of Linears alone, and holds experts as parameters that are none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress import formats, plan
from bitpress.checkpoint import Source
from bitpress.math.activations import rounded
from bitpress.math.grid import Grid
from bitpress.reading import modifier_of
from bitpress.schemes import QuantArgs
from bitpress.sites import Site
from bitpress.subject import ModuleSubject


def round_inputs(model: nn.Module, folder: Path) -> int:
    """Make a model, as `reading.reload` gives it, round what its quantized linears read; experts become Linears.

    Returns:
        Number of linears that round.

    Raises:
        CheckpointError: a scheme that bitpress does not write.
    """
    subject, source = ModuleSubject(model), Source(folder)
    made = plan.make([modifier_of(folder)], subject, samples=1, length=1, device=subject.home)
    sites = [s for s in made.sites if s.scheme is not None and s.scheme.input_activations is not None]
    if not sites:
        subject.close()
    for site in sites:
        model.get_submodule(site.module).register_forward_pre_hook(_hook(site, source))
    return len(sites)


def grid_of_inputs(args: QuantArgs) -> Grid:
    """The grid on which activations are rounded."""
    return Grid(
        bits=args.num_bits,
        symmetric=args.symmetric,
        group_size=args.group_size,
        per_tensor=args.strategy == "tensor",
        scale_dtype=torch.float32,
        values="int" if args.type == "int" else formats.FLOATS[args.num_bits],
        scales="two-level" if args.strategy == "tensor_group" else "power of two" if args.scale_dtype else "free",
    )


def _hook(site: Site, source: Source) -> Any:
    assert site.scheme is not None and site.scheme.input_activations is not None
    grid = grid_of_inputs(site.scheme.input_activations)
    names = {suffix: f"{site.name}.{suffix}" for suffix in formats.describe_inputs(site.scheme, site.dtype)}
    stored = source.read(list(names.values()))

    def hook(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = given[0]
        beside = {suffix: stored[name].to(x.device) for suffix, name in names.items()}
        return (rounded(x, grid, beside), *given[1:])

    return hook
