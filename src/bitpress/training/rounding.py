"""Linears that are trained with the rounding of their scheme: weights, and inputs where the scheme rounds them.

The parameter stays what it was, under its own name; the forward of the linear rounds it. Scales follow the weights from
step to step, or are learned. Ranges of inputs with static scales are those that training has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitpress import formats
from bitpress.chain import check_zeros
from bitpress.errors import NumericsError
from bitpress.math.activations import rounded, static_scale
from bitpress.math.fake import learned_weight, round_weight, shares_of, shifted, straight
from bitpress.math.grid import QParams, Solved, quantize
from bitpress.math.lost import solved as solved_of
from bitpress.math.scales import find_all, find_qparams, global_scale
from bitpress.modifiers.quantization import QuantizationModifier
from bitpress.rounding import grid_of_inputs
from bitpress.schemes import Scheme
from bitpress.sites import Site

SHIFT, LOW, HIGH = "bitpress_scale_shift", "bitpress_input_low", "bitpress_input_high"


@dataclass
class Rounding:
    """How one linear rounds while it is trained.

    Attributes:
        site: with its scheme.
        linear: the module.
        partners: linears that share a number with it, itself among them; `index` is its place.
        shares: of each partner, (R, G) of the range that its scales cover; None: all.
        start, size: of learned scales: those at the beginning, and the mean size of the weights; else None.
    """

    site: Site
    linear: nn.Linear
    partners: Sequence[nn.Linear]
    index: int
    shares: list[Tensor] | None = None
    start: QParams | None = None
    size: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.site.scheme is not None
        self.scheme: Scheme = self.site.scheme
        self.grid = formats.grid_of(self.scheme, self.site.dtype)
        inputs = self.scheme.input_activations
        self.inputs = None if inputs is None else grid_of_inputs(inputs)

    def qparams(self) -> QParams:
        """Scales of the weight as it is now, as they are stored."""
        weight = self.linear.weight.detach().float()
        if self.start is not None and self.size is not None:
            start = self.start.to(weight.device)
            return shifted(start, getattr(self.linear, SHIFT), self.size.to(weight.device), self.grid)
        if self.shares is not None:
            self.shares = [share.to(weight.device) for share in self.shares]
        weights = [m.weight.detach().float() for m in self.partners]
        return find_all(weights, self.grid, shares=self.shares)[self.index]

    def beside(self) -> dict[str, Tensor]:
        """What is stored beside the weight of the ranges of its inputs."""
        inputs = self.scheme.input_activations
        if inputs is None or not self.scheme.static_inputs:
            return {}
        low, high = (getattr(self.linear, name).detach().reshape(1) for name in (LOW, HIGH))
        if inputs.dynamic == "local":
            return {"input_global_scale": global_scale(low, high)}
        values = "int" if inputs.type == "int" else formats.FLOATS[inputs.num_bits]
        scale, zero = static_scale(low, high, values, inputs.num_bits, inputs.symmetric, self.site.dtype)
        return {"input_scale": scale} if zero is None else {"input_scale": scale, "input_zero_point": zero}

    def input(self, x: Tensor) -> Tensor:
        """The input as it is served, with straight-through gradients."""
        if self.inputs is None:
            return x
        with torch.no_grad():
            if self.scheme.static_inputs and self.linear.training:
                low, high = getattr(self.linear, LOW), getattr(self.linear, HIGH)
                low.copy_(torch.minimum(low, x.amin().float()))
                high.copy_(torch.maximum(high, x.amax().float()))
            served = rounded(x.detach(), self.inputs, self.beside())
        return straight(x, served)

    def weight(self) -> Tensor:
        """The weight as it is served, with its gradients."""
        if self.start is None or self.size is None:
            return round_weight(self.linear.weight, self.qparams(), self.grid)
        device = self.linear.weight.device
        self.start, self.size = self.start.to(device), self.size.to(device)
        return learned_weight(self.linear.weight, getattr(self.linear, SHIFT), self.start, self.size, self.grid)

    @torch.no_grad()
    def solve(self) -> Solved:
        """The linear as it is stored."""
        weight, qparams = self.linear.weight.detach().float(), self.qparams()
        z = formats.settle(solved_of(weight, quantize(weight, qparams, self.grid), qparams, None), self.grid)
        check_zeros([weight], [z], ())
        if self.scheme.static_inputs and not all(getattr(self.linear, n).isfinite() for n in (LOW, HIGH)):
            raise NumericsError(f"{self.site.name}: its input was never seen in training, or has NaN or infinity")
        beside = {name: t.cpu() for name, t in self.beside().items()}
        return Solved(z.codes, z.qparams, z.error, beside=beside)


class Roundings:
    """All linears of a model that are trained with their rounding."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        linears = {site.name: model.get_submodule(site.module) for site in sites}
        together: dict[str, list[Site]] = {}
        for site in sites:  # those that share no number are alone
            together.setdefault(site.partners or site.name, []).append(site)
        self.all: dict[str, Rounding] = {}
        for partners in together.values():
            modules: list[Any] = [linears[s.name] for s in partners]
            for i, site in enumerate(partners):
                self.all[site.name] = _installed(site, modules, i)

    def solve(self) -> dict[str, Solved]:
        """Every linear as it is stored, by name."""
        return {name: one.solve() for name, one in self.all.items()}

    def remove(self, solved: Mapping[str, Solved]) -> None:
        """Give the linears their own forward back, and the weights that a client reads."""
        for name, one in self.all.items():
            del one.linear.forward
            for extra in (SHIFT, LOW, HIGH):
                if hasattr(one.linear, extra):
                    delattr(one.linear, extra)
            if name in solved:
                with torch.no_grad():
                    one.linear.weight.copy_(solved[name].dense())


def _installed(site: Site, modules: list[Any], i: int) -> Rounding:
    modifier, group = site.steps[0].modifier, site.group
    assert isinstance(modifier, QuantizationModifier) and group is not None
    one, linear = Rounding(site, modules[i], modules, i), modules[i]
    weight = linear.weight.detach()
    searched = group.observer == "mse"
    if modifier.learn_scales:
        start = find_qparams(weight.float(), one.grid, search=searched)
        one.start, one.size = start, weight.float().abs().mean().clamp(min=1e-12)
        shape = one.grid.scale_shape(site.rows, site.columns)
        linear.register_parameter(SHIFT, nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device)))
    elif searched:
        one.shares = shares_of([m.weight.detach().float() for m in modules], one.grid)
    if one.scheme.static_inputs:
        for name, value in ((LOW, float("inf")), (HIGH, float("-inf"))):
            linear.register_buffer(name, torch.full((), value, device=weight.device))

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(one.input(x), one.weight(), self.bias)

    linear.forward = MethodType(forward, linear)
    return one
