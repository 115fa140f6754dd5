"""Sparsity by block from a survey: OWL (Yin et al. 2023, arXiv 2310.05175) prunes blocks with outliers less.

The paper's layer is a decoder block here: one share of zeros for all its pruned linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bitpress.modifiers.pruning import ProfileModifier
from bitpress.modifiers.pruning.base import LEAST

if TYPE_CHECKING:
    from torch import Tensor

    from bitpress.recipe import Recipe
    from bitpress.sites import Site


@dataclass(frozen=True)
class Profile:
    """One modifier whose share of zeros is spread over the blocks.

    Attributes:
        sites: of each block, the linears that it prunes.
    """

    modifier: ProfileModifier
    sites: tuple[tuple[Site, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Weights of each block."""
        return [sum(s.rows * s.columns for s in mine) for mine in self.sites]

    def shares(self, ratios: Sequence[float]) -> list[float]:
        """The share of zeros of each block, by its share of outliers; 0 where nothing is pruned, or so little that it
        could not be told from chance: the nearer of 0 and the least."""
        from bitpress.math.owl import allocate

        at = [i for i, size in enumerate(self.sizes) if size]
        shares = allocate(
            [ratios[i] for i in at], [self.sizes[i] for i in at], self.modifier.mean_sparsity, self.modifier.spread
        )
        found = dict(zip(at, shares, strict=True))
        told = {i: share if share >= LEAST else LEAST * round(share / LEAST) for i, share in found.items()}
        return [round(told.get(i, 0.0), 6) for i in range(len(self.sites))]


def find_profiles(
    modifiers: Sequence[Any], sites: Sequence[Site], blocks: int
) -> tuple[tuple[Profile, ...], list[str]]:
    """The profiles of a stage, and their faults."""
    found, faults = [], []
    for modifier in modifiers:
        if not isinstance(modifier, ProfileModifier) or modifier.sparsity_profile is None:
            continue
        mine = [s for s in sites if any(step.modifier is modifier for step in s.steps)]
        outside = [s.name for s in mine if s.block is None]
        if outside:
            faults.append(f"{outside[0]}: sparsity_profile: owl goes by decoder blocks; add it to ignore")
        found.append(Profile(modifier, tuple(tuple(s for s in mine if s.block == i) for i in range(blocks))))
    return tuple(found), faults


def ratio(profile: Profile, weights: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The share of outliers of a block.

    Args:
        weights: of its linears, each (R, C), with the sums of squares of their inputs (C,).
    """
    from bitpress.math.owl import outlier_ratio

    scores = [weight.float().abs() * squares.sqrt() for weight, squares in weights]
    return outlier_ratio(scores, profile.modifier.threshold)


def profiled(sites: Sequence[Site], profile: Profile, shares: Sequence[float]) -> list[Site]:
    """All sites of a run with the shares of a profile."""

    def with_share(site: Site) -> Site:
        if site.block is None:
            return site
        share = shares[site.block]
        steps = (replace(s, sparsity=share) if s.modifier is profile.modifier else s for s in site.steps)
        return replace(site, steps=tuple(steps))

    return [with_share(s) for s in sites]


def listed(recipe: Recipe, profile: Profile, shares: Sequence[float]) -> Recipe:
    """The recipe with the shares written out, a value for each block: it needs no survey."""
    changed = replace(
        profile.modifier, sparsity=list(shares), sparsity_profile=None, owl_m=None, owl_lmbda=None
    )  # fmt: skip
    stages = tuple(
        replace(stage, modifiers=tuple(changed if m is profile.modifier else m for m in stage.modifiers))
        for stage in recipe.stages
    )
    return replace(recipe, stages=stages)
