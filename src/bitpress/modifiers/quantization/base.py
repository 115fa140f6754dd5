"""What modifiers that quantize weights share: schemes, groups, size targets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from bitpress.errors import RecipeError, did_you_mean
from bitpress.modifiers.base import CONFIG, Claim, Float, Groups, LinearModifier, names, plain
from bitpress.schemes import UNQUANTIZED, QuantArgs, Scheme, cache_scheme, preset, scheme_from_group
from bitpress.targets import pattern_fault

if TYPE_CHECKING:  # recipes are read without torch
    from torch import Tensor

    from bitpress.math.grid import Grid, Solved
    from bitpress.math.stats import InputStats

ActOrder = Literal["static", "group"] | None
Candidates = Annotated[list[Any], BeforeValidator(plain)]
ACT_ORDERS = ("none", "weight", "static", "group")


@dataclasses.dataclass(frozen=True)
class SchemeGroup(Claim):
    """Linears that share a scheme, with what is set for them alone.

    Args:
        name: the key in `config_groups`; "group_0" for a preset.
        targets: patterns, see `bitpress.targets`.
        actorder: "static" (GPTQ solves the columns with the largest input first), "group" (and groups follow that
            order, which only the GPTQ format stores), or None.
        observer: how scales are chosen.
    """

    scheme: Scheme
    actorder: ActOrder
    observer: str


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SchemeModifier(LinearModifier):
    """The keys that all quantizers share; see `QuantizationModifier`."""

    essential: ClassVar[frozenset[str]] = frozenset({"scheme", "config_groups", "bits", "candidates"})
    observers: ClassVar[tuple[str, ...]] = ("minmax", "mse")
    regroups: ClassVar[bool] = False  # whether it knows actorder: group

    scheme: str | None = None
    config_groups: Groups | None = None
    group_size: int | None = None
    kv_cache_scheme: Groups | None = None
    bits: Float | None = None
    candidates: Candidates | None = None

    def claims(self) -> tuple[Claim, ...]:
        return self._read_groups()[0]

    def groups(self) -> tuple[SchemeGroup, ...]:
        """The scheme of each group of targets, in the recipe's order."""
        return tuple(claim for claim in self.claims() if isinstance(claim, SchemeGroup))

    def choices(self) -> tuple[Claim, ...]:
        """What `bits` chooses from, as the recipe writes it; empty: the usual ones, see `bitpress.size_target`."""
        return self._read_candidates()[0]

    def quick(self) -> Self:
        """The same without what takes long and changes the error of every scheme alike: for surveys."""
        return self

    def group_of(self, name: str, scheme: Scheme) -> SchemeGroup:
        """A group with this scheme and the modifier's own settings."""
        return SchemeGroup(name, names(self.targets), scheme, *self._weights_defaults())

    def written(self, group: SchemeGroup) -> dict[str, Any]:
        """A group as an entry of `config_groups`, without its targets; `group_of` and the entry mean the same."""
        entry = group.scheme.to_dict()
        if group.scheme.stored_as is not None:
            entry["format"] = group.scheme.stored_as
        actorder, observer = self._weights_defaults()
        if group.actorder != actorder:
            entry["weights"]["actorder"] = group.actorder or "none"
        if group.observer != observer:
            entry["weights"]["observer"] = group.observer
        return entry

    @property
    def surveys(self) -> bool:
        return self.bits is not None

    def leaves(self, claim: Claim) -> bool:
        return not isinstance(claim, SchemeGroup)

    def cache(self) -> QuantArgs | None:
        """How the cache of keys and values is quantized, None if it is not."""
        return None if self.kv_cache_scheme is None else cache_scheme(self.kv_cache_scheme, "kv_cache_scheme")

    @property
    def weights_need(self) -> frozenset[str]:
        """What it reads of the calibration data to solve weights."""
        return frozenset()

    @property
    def needs(self) -> frozenset[str]:
        groups, cache = self.groups(), self.cache()
        own = frozenset().union(*(self.needs_of(group) for group in groups))
        return own | {"cache"} if cache is not None and not cache.dynamic else own

    def needs_of(self, claim: Claim) -> frozenset[str]:
        static = isinstance(claim, SchemeGroup) and claim.scheme.static_inputs
        return self.weights_need | {"range"} if static else self.weights_need

    def faults(self) -> list[str]:
        found = super().faults()
        try:
            self.cache()
        except RecipeError as error:
            found += error.problems
        return found + self._read_groups()[1] + self._read_candidates()[1]

    def notes(self) -> list[str]:
        groups = self.config_groups
        if groups and self.targets != "Linear" and all("targets" in names_of(g) for g in groups.values()):
            return ["targets: has no effect: every entry of config_groups has its own"]
        return []

    def solve(
        self, weights: Sequence[Tensor], stats: InputStats | None, group: SchemeGroup, grid: Grid
    ) -> list[Solved]:
        """Quantize linears that read the same input, all of one group.

        Args:
            weights: each (R_i, C) float32.
            stats: of their common input, (C, C); None where `needs` is empty.
            group: scheme and settings.
            grid: the grid of the scheme. If it is `fused`, clients run these linears as one product.
        """
        raise NotImplementedError

    def _weights_defaults(self) -> tuple[ActOrder, str]:
        """Act-order and observer of weights that do not set their own."""
        raise NotImplementedError

    def solve_each(
        self, problems: Sequence[tuple[Sequence[Tensor], InputStats | None]], group: SchemeGroup, grid: Grid
    ) -> list[list[Solved]]:
        """As `solve`, for several inputs whose linears have the same shapes."""
        return [self.solve(weights, stats, group, grid) for weights, stats in problems]

    def _read_groups(self) -> tuple[tuple[Claim, ...], list[str]]:
        if self.bits is not None:
            return self._read_target()
        if self.scheme is not None and self.config_groups is not None:
            return (), ["scheme: give either scheme or config_groups, not both"]
        if self.scheme is not None:
            try:
                scheme = preset(self.scheme, self.group_size)
            except RecipeError as error:
                return (), list(error.problems)
            actorder, observer = self._weights_defaults()
            return (SchemeGroup("group_0", names(self.targets), scheme, actorder, observer),), []
        if not self.config_groups:
            if self.kv_cache_scheme is not None and self.config_groups is None and self.group_size is None:
                return (), []  # the cache alone
            return (), ["scheme: missing; give a preset such as 'W4A16', or config_groups"]
        faults = []
        if self.group_size is not None:
            faults.append("group_size: goes with scheme; with config_groups, set it in the group's weights")
        claims = []
        for name, entry in self.config_groups.items():
            claim, found = self.read_group(name, entry, f"config_groups.{name}")
            faults += found
            if claim is not None:
                claims.append(claim)
        if not faults and all(map(self.leaves, claims)):
            faults.append(f"config_groups: {UNQUANTIZED} leaves its linears alone, so nothing would be quantized")
        return tuple(claims), faults

    def _read_target(self) -> tuple[tuple[Claim, ...], list[str]]:
        """One group for all linears that a size target will give their schemes; until then it stands for the widest."""
        given = [key for key in ("scheme", "config_groups", "group_size") if getattr(self, key) is not None]
        if given:
            return (), [f"bits: chooses the schemes itself: drop {', '.join(given)}, or bits; candidates limits it"]
        if not 0 < self.bits_asked < math.inf:
            return (), [f"bits: must be a positive number of bits per weight, got {self.bits_asked}"]
        return (self.group_of("bits", preset("W8A16", -1)),), []

    @property
    def bits_asked(self) -> float:
        """The size target; only where there is one."""
        assert self.bits is not None
        return self.bits

    def _read_candidates(self) -> tuple[tuple[Claim, ...], list[str]]:
        from bitpress.modifiers.candidates import read_candidate

        if self.candidates is None:
            return (), []
        if self.bits is None:
            return (), ["candidates: are what bits chooses from; give bits, such as 4.25"]
        if not self.candidates:
            return (), ["candidates: empty, so there is nothing to choose from"]
        claims, faults = [], []
        for i, entry in enumerate(self.candidates):
            claim, found = read_candidate(entry, f"candidates[{i}]", self)
            faults += found
            if claim is not None:
                claims.append(claim)
        return tuple(claims), faults

    def read_group(self, name: str, entry: Any, where: str) -> tuple[Claim | None, list[str]]:
        """What an entry of `config_groups` says, and its faults, each starting with `where`."""
        # `W4A16: [Linear]` is compressed-tensors' short form of a preset with targets.
        short = isinstance(entry, list)
        if not short and not isinstance(entry, Mapping):
            return None, [f"{where}: expected weights and targets, got {entry!r}"]
        targets = entry if short else entry.get("targets", self.targets)
        faults = target_faults(targets, f"{where}.targets")
        if short and name.upper() == UNQUANTIZED:
            return None if faults else Claim(name, names(targets)), faults
        actorder, observer = self._weights_defaults()
        scheme = None
        try:
            scheme = preset(name) if short else scheme_from_group(entry, where)
        except RecipeError as error:
            faults += [f"{where}: {p}" for p in error.problems] if short else error.problems
        weights = None if short else entry.get("weights")
        if isinstance(weights, Mapping):
            if "actorder" in weights:
                order = act_order(weights["actorder"])
                faults += act_order_faults(order, f"{where}.weights.actorder")
                actorder = order_of(order)
                if actorder == "group" and not self.regroups:
                    faults.append(f"{where}.weights.actorder: 'group' needs GPTQModifier: rounding has no order")
            if weights.get("observer") is not None:
                observer = weights["observer"]
            if observer not in self.observers:
                hint = did_you_mean(str(observer), self.observers)
                faults.append(f"{where}.weights.observer: {observer!r} is unknown.{hint}")
        if scheme is None or faults:
            return None, faults
        return SchemeGroup(name, names(targets), scheme, actorder, observer), []


def act_order(value: Any) -> Any:
    """An act-order as written, in lower case; "none" and false are None, what `desc_act` means elsewhere is "group"."""
    value = value.lower() if isinstance(value, str) else value
    if value in ("none", False):
        return None
    return "group" if value in ("dynamic", True) else value


def order_of(value: str | None) -> ActOrder:
    """What a known act-order means."""
    return None if value is None else "group" if value == "group" else "static"


def act_order_faults(value: Any, where: str) -> list[str]:
    """What is wrong with an act-order that has been through `act_order`."""
    if value is None or value in ACT_ORDERS:
        return []
    return [f"{where}: {value!r} is unknown.{did_you_mean(str(value), ACT_ORDERS)}"]


def target_faults(targets: Any, where: str) -> list[str]:
    """What is wrong with the patterns of a group."""
    if not targets or not isinstance(targets, str | list):
        return [f"{where}: expected a name or a list of names, got {targets!r}"]
    odd = [f"{where}: expected a name, got {t!r}" for t in names(targets) if not isinstance(t, str)]
    return odd or [f"{where}: {fault}" for fault in map(pattern_fault, names(targets)) if fault]


def names_of(entry: Any) -> tuple[str, ...]:
    """The keys of a group; the short form of a preset is nothing but its targets."""
    return tuple(entry) if isinstance(entry, Mapping) else ("targets",)
