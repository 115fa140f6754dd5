"""Modifiers that set weights to zero: SparseGPT, Wanda, and by magnitude."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from bitpress.errors import PlanError, did_you_mean
from bitpress.modifiers.base import CONFIG, Claim, Float, Names, PruningModifier, names
from bitpress.targets import pattern_fault

if TYPE_CHECKING:  # recipes are read without torch
    from torch import Tensor

    from bitpress.math.masks import Structure
    from bitpress.math.stats import InputStats

UNSTRUCTURED = ("0:0", "unstructured")
LEAST = 0.01  # a smaller share of zeros could not be told from those that dense weights have by chance
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


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SparseGPTModifier(ProfileModifier):
    """Prunes with second-order information and corrects the weights that are kept (Frantar & Alistarh 2023,
    arXiv 2301.00774). Needs calibration data. If GPTQ follows in the same stage, it rounds under the mask.

    Args:
        sparsity: share of zeros of each linear; a list with a value for each decoder block; or a mapping of
            patterns to either, whose patterns are then the targets. Default: what mask_structure says.
        mask_structure: "N:M" prunes N of every M adjacent input columns, such as "2:4"; "0:0" and "unstructured"
            prune anywhere in a linear. Default: "0:0".
        targets: linears to prune, one pattern or a list; see `bitpress.targets`. Default: "Linear".
        ignore: linears to leave as they are, patterns as in targets. Default: none.
        block_size: columns of the sweep between two updates of the rest of the weight. Default: 128.
        dampening_frac: what is added to the diagonal of the Gram matrix, as a fraction of its mean.
            Default: 0.01.
        preserve_sparsity_mask: weights that are zero stay zero and count. Default: false.
        mask_rounds: rounds in which the mask is searched for by alternating directions (Boza 2024,
            arXiv 2401.02938; Meng et al. 2024, arXiv 2406.07831); 0 takes the mask and the weights of the
            sweep. Default: 30.
        correct: share, 0 to 1, of the drift of the layer's input from the uncompressed model's that its weights
            are to undo; takes a second stream of hidden states. Default: 0.
        sparsity_profile: "owl" spreads sparsity over the decoder blocks (Yin et al. 2023, arXiv 2310.05175): a
            survey counts their outliers, and blocks with more are pruned less. Default: none.
        owl_m: weights above so many times the mean score count as outliers. Default: 5.
        owl_lmbda: how far a block's sparsity may be from the mean. Default: 0.08.
        sequential_update: has no effect. Default: none.
        sequential_targets: has no effect. Default: none.
        offload_hessians: has no effect. Default: none.
    """

    method: ClassVar[str] = "sparsegpt"

    block_size: int = 128
    dampening_frac: Float = 0.01
    preserve_sparsity_mask: bool = False
    mask_rounds: int = 30
    correct: Float = 0.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "drift"} if self.correct else {"gram"})

    @property
    def corrects(self) -> bool:
        return self.correct > 0

    def prune(self, weights: Sequence[Tensor], stats: InputStats | None, sparsity: float | None) -> list[Tensor]:
        from bitpress.math.sparsegpt import sparsegpt

        assert stats is not None and sparsity is not None
        if sparsity == 0:
            return list(weights)
        return sparsegpt(
            weights,
            stats,
            sparsity,
            self.structure,
            block_size=self.block_size,
            dampening_frac=self.dampening_frac,
            preserve=self.preserve_sparsity_mask,
            rounds=self.mask_rounds,
            correct=self.correct,
        )

    def faults(self) -> list[str]:
        found = super().faults()
        if self.block_size < 1:
            found.append(f"block_size: must be at least 1 column, got {self.block_size}")
        if not 0 <= self.dampening_frac < math.inf:
            found.append(f"dampening_frac: must be 0 or a positive fraction, got {self.dampening_frac}")
        if self.mask_rounds < 0:
            found.append(f"mask_rounds: must be 0 or more, got {self.mask_rounds}")
        if not 0 <= self.correct <= 1:
            found.append(f"correct: must be a share from 0 to 1, got {self.correct}")
        return found


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class WandaPruningModifier(ProfileModifier):
    """Prunes, in every output row, the weights whose size times the norm of their input is least (Sun et al. 2023,
    arXiv 2306.11695); the others stay as they are. Needs calibration data.

    Args:
        sparsity: share of zeros of each row of each linear; a list with a value for each decoder block; or a
            mapping of patterns to either, whose patterns are then the targets. Default: what mask_structure
            says.
        mask_structure: "N:M" prunes N of every M adjacent input columns, such as "2:4"; "0:0" and "unstructured"
            prune anywhere in a row. Default: "0:0".
        targets: linears to prune, one pattern or a list; see `bitpress.targets`. Default: "Linear".
        ignore: linears to leave as they are, patterns as in targets. Default: none.
        sparsity_profile: "owl" spreads sparsity over the decoder blocks (Yin et al. 2023, arXiv 2310.05175): a
            survey counts their outliers, and blocks with more are pruned less. Default: none.
        owl_m: weights above so many times the mean score count as outliers. Default: 5.
        owl_lmbda: how far a block's sparsity may be from the mean. Default: 0.08.
        sequential_update: has no effect. Default: none.
        sequential_targets: has no effect. Default: none.
        offload_hessians: has no effect. Default: none.
    """

    method: ClassVar[str] = "wanda"

    def prunes(self, rows: int, columns: int, sparsity: float) -> bool:
        return round(sparsity * columns) > 0  # every row on its own

    def prune(self, weights: Sequence[Tensor], stats: InputStats | None, sparsity: float | None) -> list[Tensor]:
        from bitpress.math.wanda import wanda

        assert stats is not None and sparsity is not None
        return list(weights) if sparsity == 0 else wanda(weights, stats, sparsity, self.structure)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class MagnitudePruningModifier(SparsityModifier):
    """Prunes the smallest weights of each linear, at once. Needs no data.

    Args:
        final_sparsity: share of zeros of each linear; a list with a value for each decoder block; or a mapping
            of patterns to either, whose patterns are then the targets. Default: what mask_structure says.
        sparsity: the same under the name that the other pruning modifiers have. Default: none.
        mask_structure: "N:M" prunes N of every M adjacent input columns, such as "2:4"; "unstructured" and "0:0"
            prune anywhere in a linear. Default: "unstructured".
        targets: linears to prune, one pattern or a list; see `bitpress.targets`. Default: "Linear".
        ignore: linears to leave as they are, patterns as in targets. Default: none.
        apply_globally: refused where true: shares are per linear. Default: false.
        init_sparsity: has no effect in one shot. Default: none.
        start: has no effect in one shot. Default: none.
        end: has no effect in one shot. Default: none.
        update: has no effect in one shot. Default: none.
        update_frequency: has no effect in one shot. Default: none.
        update_scheduler: has no effect in one shot. Default: none.
        scheduler_args: has no effect in one shot. Default: none.
        leave_enabled: has no effect in one shot: a later stage keeps zeros by itself. Default: none.
    """

    method: ClassVar[str] = "magnitude"
    essential: ClassVar[frozenset[str]] = frozenset({"sparsity", "final_sparsity", "mask_structure"})
    claims_key: ClassVar[str] = "final_sparsity"

    final_sparsity: Sparsity | None = None
    mask_structure: MaskStructure = "unstructured"
    apply_globally: bool = False
    init_sparsity: Float | None = None
    start: Float | None = None
    end: Float | None = None
    update: Float | None = None
    update_frequency: Float | None = None
    update_scheduler: str | None = None
    scheduler_args: dict[str, Any] | None = None
    leave_enabled: bool | None = None

    def prune(self, weights: Sequence[Tensor], stats: InputStats | None, sparsity: float | None) -> list[Tensor]:
        from bitpress.math.wanda import magnitude

        assert sparsity is not None
        return list(weights) if sparsity == 0 else magnitude(weights, sparsity, self.structure)

    def faults(self) -> list[str]:
        found = super().faults()
        if self.sparsity is not None and self.final_sparsity is not None and self.sparsity != self.final_sparsity:
            found.append("sparsity: give either sparsity or final_sparsity, not both")
        if self.apply_globally:
            found.append("apply_globally: not implemented yet; give final_sparsity as a list or by pattern")
        return found

    def notes(self) -> list[str]:
        once = ("init_sparsity", "start", "end", "update", "update_frequency", "update_scheduler", "scheduler_args")
        found = [
            f"{key}: has no effect in one shot: the final sparsity is reached at once"
            for key in once
            if getattr(self, key) is not None
        ]
        if self.leave_enabled is not None:
            found.append("leave_enabled: has no effect in one shot: a later stage keeps zeros by itself")
        return super().notes() + found

    def _share(self) -> float | list[float] | dict[str, Any] | None:
        return self.sparsity if self.final_sparsity is None else self.final_sparsity


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
