"""What modifiers that set weights to zero share: shares of zeros, structures, profiles."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from bitpress.errors import PlanError, did_you_mean
from bitpress.modifiers.base import CONFIG, Claim, Float, Names, PruningModifier, names
from bitpress.targets import pattern_fault

if TYPE_CHECKING:  # recipes are read without torch
    from bitpress.math.masks import Structure

UNSTRUCTURED = ("0:0", "unstructured")
# a smaller share of zeros, rounded in each row, could not be told from those that dense weights have by chance
LEAST = 0.02
STRUCTURES = ("2:4", "4:8", "0:0", "unstructured")


def _structure_text(value: Any) -> Any:
    # YAML 1.1 reads an unquoted 2:4 as minutes and seconds.
    if isinstance(value, int) and not isinstance(value, bool) and value >= 60:
        return f"{value // 60}:{value % 60}"
    return value.strip().lower() if isinstance(value, str) else value


def _shares(value: Any) -> Any:
    """Numbers that YAML 1.1 took for text, also inside a list or a mapping."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, Mapping):
        return {key: _shares(item) for key, item in value.items()}
    return [_shares(item) for item in value] if isinstance(value, list | tuple) else value


MaskStructure = Annotated[str, BeforeValidator(_structure_text)]
Sparsity = Annotated[float | list[float] | dict[str, Any], BeforeValidator(_shares)]


@dataclasses.dataclass(frozen=True)
class SparsityClaim(Claim):
    """Linears with their share of zeros: one for all, or one for each decoder block."""

    sparsity: float | tuple[float, ...]

    def at(self, block: int | None, blocks: int) -> float:
        """The share of a linear in decoder block `block` of `blocks`; None: outside them.

        Raises:
            PlanError: there is not one value for each block, or the linear is in none.
        """
        if isinstance(self.sparsity, float):
            return self.sparsity
        if len(self.sparsity) != blocks:
            raise PlanError(f"sparsity: a list of {len(self.sparsity)} values for {blocks} decoder blocks")
        if block is None:
            raise PlanError("sparsity: a list has values for decoder blocks only; add the output head to ignore")
        return self.sparsity[block]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SparsityModifier(PruningModifier):
    """The keys that all pruning modifiers share; see `SparseGPTModifier`."""

    essential: ClassVar[frozenset[str]] = frozenset({"sparsity", "mask_structure"})
    claims_key: ClassVar[str] = "sparsity"

    sparsity: Sparsity | None = None
    mask_structure: MaskStructure = "0:0"

    @property
    def structure(self) -> Structure | None:
        """The N:M structure, None if there is none."""
        from bitpress.math.masks import Structure

        found = _read_structure(self.mask_structure)
        return None if found is None else Structure(*found)

    def group_columns(self) -> int:
        """Adjacent columns that are pruned together; 1: any number will do."""
        found = _read_structure(self.mask_structure)
        return 1 if found is None else found[1]

    def claims(self) -> tuple[Claim, ...]:
        share = self._share()
        if isinstance(share, Mapping):
            return tuple(SparsityClaim(str(key), (str(key),), _claimed(value)) for key, value in share.items())
        if share is None:  # the structure says it
            pruned, size = _read_structure(self.mask_structure) or (0, 1)
            share = pruned / size
        return (SparsityClaim(self.method, names(self.targets), _claimed(share)),)

    def sparsity_at(self, claim: Claim, block: int | None, blocks: int) -> float:
        assert isinstance(claim, SparsityClaim)
        return claim.at(block, blocks)

    def faults(self) -> list[str]:
        found = super().faults()
        key, share = self.claims_key, self._share()
        structure = _read_structure(self.mask_structure)
        if fault := structure_fault(self.mask_structure):
            return [*found, f"mask_structure: {fault}"]
        if share is None:
            return found if structure else [*found, f"{key}: missing; give the share of zeros, such as 0.5"]
        if isinstance(share, Mapping):
            if self.targets != "Linear":
                found.append(f"targets: the patterns of {key} are the targets; drop one of the two")
            if not share:
                found.append(f"{key}: empty, so nothing would be pruned")
            found += [f"{key}: {fault}" for fault in map(pattern_fault, share) if fault]
            items = [(f"{key}.{pattern}", value) for pattern, value in share.items()]
        else:
            items = [(key, share)]
        for where, value in items:
            found += [f"{where}: {fault}" for fault in _share_faults(value, self.mask_structure, structure)]
        return found

    def _share(self) -> float | list[float] | dict[str, Any] | None:
        return self.sparsity


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ProfileModifier(SparsityModifier):
    """The keys that the pruning modifiers with statistics share; see `SparseGPTModifier`."""

    sparsity_profile: str | None = None
    owl_m: Float | None = None
    owl_lmbda: Float | None = None
    sequential_update: bool | None = None
    sequential_targets: Names | None = None
    offload_hessians: bool | None = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"})

    def faults(self) -> list[str]:
        found = super().faults()
        for key in ("owl_m", "owl_lmbda"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                found.append(f"{key}: must be positive, got {value}")
        profile = self.sparsity_profile
        if profile is not None and profile.lower() != "owl":
            found.append(f"sparsity_profile: {profile!r} is unknown.{did_you_mean(profile, ('owl',))}")
        elif profile is not None and not isinstance(self.sparsity, float):
            found.append("sparsity_profile: owl spreads one share over the blocks; give sparsity as a number")
        elif profile is not None and self.mask_structure not in UNSTRUCTURED:
            found.append(f"sparsity_profile: owl varies the share, which {self.mask_structure} fixes; drop one of them")
        return found

    @property
    def surveys(self) -> bool:
        return self.sparsity_profile is not None

    @property
    def mean_sparsity(self) -> float:
        """The share of zeros that a profile keeps on average."""
        assert isinstance(self.sparsity, float)
        return self.sparsity

    @property
    def threshold(self) -> float:
        """OWL's M."""
        return 5.0 if self.owl_m is None else self.owl_m

    @property
    def spread(self) -> float:
        """OWL's lambda."""
        return 0.08 if self.owl_lmbda is None else self.owl_lmbda

    def notes(self) -> list[str]:
        idle = {
            "sequential_update": "bitpress always goes block by block",
            "sequential_targets": "bitpress always goes block by block",
            "offload_hessians": "statistics of one block at a time are held",
        }
        found = [f"{key}: has no effect: {idle[key]}" for key in idle if getattr(self, key) is not None]
        found += [
            f"{key}: has no effect without sparsity_profile: owl"
            for key in ("owl_m", "owl_lmbda")
            if getattr(self, key) is not None and self.sparsity_profile is None
        ]
        return super().notes() + found


def _read_structure(text: str) -> tuple[int, int] | None:
    """N and M of a structure without faults; None if it is unstructured."""
    if text in UNSTRUCTURED or structure_fault(text):
        return None
    pruned, _, size = text.partition(":")
    return int(pruned), int(size)


def structure_fault(text: str) -> str | None:
    """What is wrong with a mask structure."""
    if text in UNSTRUCTURED:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        return f"expected 'N:M' or 'unstructured', got {text!r}.{did_you_mean(text, STRUCTURES)}"
    pruned, size = map(int, match.groups())
    if not 0 < pruned < size:
        return f"{text} prunes {pruned} of {size}; N must be between 0 and M"
    if pruned < LEAST * size:
        return f"{text} prunes {pruned / size:.2g} of the weights; the least is {LEAST}"
    return None


def _claimed(share: Any) -> float | tuple[float, ...]:
    return tuple(map(float, share)) if isinstance(share, list) else float(share)


def _share_faults(value: Any, text: str, structure: tuple[int, int] | None) -> list[str]:
    """What is wrong with a share of zeros, or with a list of them."""
    found = []
    for one in dict.fromkeys(value if isinstance(value, list) else [value]):
        if isinstance(one, bool) or not isinstance(one, int | float):
            found.append(f"expected a number, got {one!r}")
        elif one != 0 and not LEAST <= one < 1:
            found.append(f"must be 0, or from {LEAST} to below 1, got {one}")
        elif structure and one != 0 and not math.isclose(one, structure[0] / structure[1]):
            other = f"{round(one * structure[1])}:{structure[1]}"
            fits = math.isclose(round(one * structure[1]), one * structure[1])
            hint = f"; {other} prunes {one}" if fits else ""
            found.append(f"{text} prunes {structure[0] / structure[1]:g} of the weights, not {one}{hint}")
    if isinstance(value, list) and not value:
        found.append("an empty list; give a value for each decoder block")
    return found
