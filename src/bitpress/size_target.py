"""A size target: which schemes each linear may take, which linears take one together, and what a choice makes of a run.

The average of stored bits per weight, scales and zero points counted, is over the linears of the modifier that has
`bits`. Linears that clients run as one product are one group; so are all experts of a layer, which vLLM serves in one
scheme or not at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bitpress.math.allocate import allocate, nearest
from bitpress.modifiers.base import Claim, PruningModifier
from bitpress.modifiers.quantization import SchemeGroup, SchemeModifier
from bitpress.schemes import UNQUANTIZED, preset

if TYPE_CHECKING:
    from bitpress.recipe import Recipe
    from bitpress.sites import Site

TOLERANCE = 0.01
DENSE = "dense"
SIZES = (32, 64, 128, -1)  # group sizes that vLLM's kernels serve; -1: one scale a row


@dataclass(frozen=True)
class Choice:
    """A scheme that a group can take: None leaves it in full precision, or prunes it, to see what that does."""

    label: str
    group: SchemeGroup | None
    pruning: PruningModifier | None = None


@dataclass(frozen=True)
class FusionGroup:
    """Linears that take one scheme.

    Attributes:
        sizes: stored bits of each choice, by its label, for those that fit.
    """

    name: str
    sites: tuple[Site, ...]
    sizes: Mapping[str, int]

    @property
    def weights(self) -> int:
        return sum(s.rows * s.columns for s in self.sites)


@dataclass(frozen=True)
class SizeTarget:
    """What is to be chosen.

    Attributes:
        bits: stored bits per weight, on average.
        modifier: the quantizer that has the target.
        choices: by label.
        notes: what the user should know of the choices.
    """

    bits: float
    modifier: SchemeModifier
    choices: Mapping[str, Choice]
    groups: tuple[FusionGroup, ...]
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        return sum(g.weights for g in self.groups)

    @property
    def wanted(self) -> float:
        """Bits in all."""
        return self.bits * self.weights

    def most(self, *, compressed: bool) -> int:
        """Bytes that the linears take at most, in one form of the checkpoint or the other."""
        if compressed:
            return math.ceil((1 + TOLERANCE) * self.wanted / 8)
        from bitpress.sites import stored_bytes

        return sum(
            max(sum(stored_bytes(with_choice(s, self.choices[c]), compressed=False) for s in g.sites) for c in g.sizes)
            for g in self.groups
        )

    def size(self, picks: Mapping[str, str]) -> int:
        """Stored bits of a choice for every group, by their names."""
        return sum(g.sizes[picks[g.name]] for g in self.groups)

    def uniform(self) -> list[str]:
        """Labels that all groups can take and whose size is that of the target."""
        common = [c for c in self.choices if all(c in g.sizes for g in self.groups)]
        return [c for c in common if abs(sum(g.sizes[c] for g in self.groups) - self.wanted) <= TOLERANCE * self.wanted]

    def pick(self, losses: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
        """The label for each group with the least sum of losses at this size.

        Below the target if it can be, else above; never worse than one scheme for all.
        """
        found = None
        for low, high in self._bounds():
            labels = [list(g.sizes) for g in self.groups]
            sizes = [[g.sizes[c] for c in mine] for g, mine in zip(self.groups, labels, strict=True)]
            costs = [[losses[g.name][c] for c in mine] for g, mine in zip(self.groups, labels, strict=True)]
            found = allocate(sizes, costs, low, high)
            if found is not None:
                break
        assert found is not None  # find_target has tried it
        picks = {g.name: labels[i][k] for i, (g, k) in enumerate(zip(self.groups, found, strict=True))}
        alike = [{g.name: c for g in self.groups} for c in self.uniform() if self._fits(c, low, high)]
        return min([picks, *alike], key=lambda p: sum(losses[g][c] for g, c in p.items()))

    def _fits(self, label: str, low: float, high: float) -> bool:
        return low <= sum(g.sizes[label] for g in self.groups) <= high

    def _bounds(self) -> tuple[tuple[float, float], ...]:
        return ((1 - TOLERANCE) * self.wanted, self.wanted), (self.wanted, (1 + TOLERANCE) * self.wanted)

    def faults(self) -> list[str]:
        """Why the size cannot be met."""
        sizes = [list(g.sizes.values()) for g in self.groups]
        zeros = [[0.0] * len(g) for g in sizes]
        low, high = (sum(f(g) for g in sizes) / self.weights for f in (min, max))
        where = f"{type(self.modifier).__name__}.bits"
        if not low * (1 - TOLERANCE) <= self.bits <= high * (1 + TOLERANCE):
            return [
                f"{where}: {self.bits:g} bits per weight are out of reach: the candidates give {low:.3f} to "
                f"{high:.3f} on these linears, scales and zero points counted"
            ]
        if found := next((ends for ends in self._bounds() if allocate(sizes, zeros, *ends) is not None), None):
            whole = sum(g.sizes.get(DENSE, 0) for g in self.groups)
            if all(DENSE in g.sizes for g in self.groups) and found[0] <= whole <= found[1]:
                return [
                    f"{where}: {self.bits:g} bits per weight are what these linears have as they are "
                    f"({whole / self.weights:.3f}), so nothing would be quantized; ask for fewer"
                ]
            return []
        near = nearest(sizes, self.wanted) / self.weights
        return [
            f"{where}: no choice of schemes gives {self.bits:g} bits per weight within 1 %: the nearest is {near:.3f}"
        ]


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes:
        picks: label of each group's scheme.
        losses: predicted KL in nats per token of each group with its scheme.
        notes: how it was decided, for the report.
        compared: measured KL of this choice and of the uniform scheme of the same size, where there is one.
    """

    picks: Mapping[str, str]
    losses: Mapping[str, float]
    notes: tuple[str, ...] = ()
    compared: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Allocation:
        """What `to_dict` gave."""
        return cls(data["picks"], data["losses"], tuple(data["notes"]), data["compared"])


def find_target(modifiers: Sequence[Any], sites: Sequence[Site]) -> tuple[SizeTarget | None, list[str]]:
    """The size target of a stage, and its faults; None if there is none."""
    having = [m for m in modifiers if isinstance(m, SchemeModifier) and m.bits is not None]
    if len(having) > 1:
        return None, ["bits: two modifiers have a size target; give it to one"]
    mine = [s for s in sites if any(step.modifier is m for m in having for step in s.steps)]
    if not mine:
        return None, []
    modifier = having[0]
    assert modifier.bits is not None
    written = modifier.choices()
    notes: list[str] = []
    claims = written or usual(modifier, mine, modifier.bits)
    choices: dict[str, Choice] = {}
    for claim in claims:
        choice = _choice(claim)
        choices[choice.label] = choice
    groups, faults = [], []
    for name, together in fusion_groups(mine).items():
        sizes = {c.label: size for c in choices.values() if (size := stored_bits(together, c)) is not None}
        if not sizes:
            faults.append(f"{together[0].name}: no candidate of bits fits its {together[0].columns} input columns")
        groups.append(FusionGroup(name, tuple(together), sizes))
    kind = type(modifier).__name__
    faults += [
        f"{kind}.candidates: {c} fits none of the linears"
        for c in choices
        if written and not any(c in g.sizes for g in groups)
    ]
    if faults:
        return None, faults
    if not written:
        notes += _client_notes(choices)
    target = SizeTarget(modifier.bits, modifier, choices, tuple(groups), tuple(notes))
    return target, target.faults()


def usual(modifier: SchemeModifier, sites: Sequence[Site], bits: float) -> list[Claim]:
    """The schemes to choose from where the recipe names none: those that vLLM serves, if the target can be met so.

    4 bits run on its CPU and GPU builds alike; 8 bits and full precision come in for what 4 cannot spend, 2 and 3
    bits for what 4 cannot save.
    """
    four = _family(modifier, 4, both=True)
    reach = []
    for together in fusion_groups(sites).values():
        fit = [size for claim in four if (size := stored_bits(together, _choice(claim))) is not None]
        reach.append((min(fit, default=0), max(fit, default=0)))
    weights = sum(s.rows * s.columns for s in sites)
    least, most = (sum(end) / weights for end in zip(*reach, strict=True))
    if bits > most:
        return [*four, *_family(modifier, 8, both=False), Claim(UNQUANTIZED, ())]
    if bits >= least:
        return four
    return [
        *_family(modifier, 2, both=True),
        *_family(modifier, 3, both=True),
        *four,
        *_family(modifier, 8, both=False),
    ]


def _family(modifier: SchemeModifier, bits: int, *, both: bool) -> list[Claim]:
    names = (f"W{bits}A16", f"W{bits}A16_ASYM") if both else (f"W{bits}A16",)
    schemes = [preset(name, size) for name in names for size in SIZES if size > 0 or name == names[0]]
    return [modifier.group_of(f"{s.name}", s) for s in schemes]


def _choice(claim: Claim) -> Choice:
    from bitpress.sites import label

    if isinstance(claim, SchemeGroup):
        return Choice(label(claim), claim)
    return Choice(DENSE, None)


def stored_bits(sites: Sequence[Site], choice: Choice) -> int | None:
    """Stored bits of linears with a choice, None if it does not fit one of them, or no client loads it there."""
    from bitpress.clients import loads_as_experts
    from bitpress.sites import bits_per_weight, fits

    total = 0.0
    for site in sites:
        if choice.group is not None:
            if not fits(site, choice.group.scheme):
                return None
            if site.expert is not None and not loads_as_experts(choice.group.scheme):
                return None
        total += bits_per_weight(with_choice(site, choice)) * site.rows * site.columns
    return round(total)


def with_choice(site: Site, choice: Choice) -> Site:
    """The site as the choice makes it; without steps if nothing is left to do."""
    if choice.pruning is not None:
        from bitpress.sites import Step

        (claim,) = choice.pruning.claims()
        return replace(site, steps=(Step(choice.pruning, claim, choice.pruning.sparsity_at(claim, site.block, 0)),))
    steps = (
        step if not isinstance(step.claim, SchemeGroup) else None if choice.group is None
        else replace(step, claim=replace(choice.group, name=choice.label))
        for step in site.steps
    )  # fmt: skip
    return replace(site, steps=tuple(s for s in steps if s is not None))


def fusion_groups(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Linears that must share a scheme, by a name for them."""
    from bitpress.sites import FUSED

    groups: dict[str, list[Site]] = {}
    for site in sites:
        parent, _, leaf = site.name.rpartition(".")
        if site.expert is not None:
            name = _experts_of(site)
        else:
            together = next((names for names in FUSED if leaf in names), None)
            name = site.name if together is None else f"{parent}.{'+'.join(together)}"
        groups.setdefault(name, []).append(site)
    return groups


def _experts_of(site: Site) -> str:
    """The name on disk of the list of experts: what stands before the expert's number."""
    parts = site.name.split(".")
    at = max(i for i, part in enumerate(parts) if part == str(site.expert))
    return ".".join(parts[:at])


def _client_notes(choices: Mapping[str, Choice]) -> list[str]:
    schemes = [c.group.scheme for c in choices.values() if c.group is not None]
    widths = {s.weights.num_bits for s in schemes}
    if widths & {2, 3}:
        return [
            "bits: 4 bits are too many for it, so 2 and 3 come in: vLLM does not serve them, transformers loads them"
        ]
    if 8 in widths:
        return ["bits: 8-bit weights come in: vLLM serves them on GPUs, not on CPUs"]
    return []


def decided(target: SizeTarget, sites: Sequence[Site], picks: Mapping[str, str]) -> list[Site]:
    """All sites of a run once the schemes are chosen; those with nothing left to do are gone."""
    chosen = {s.name: target.choices[picks[g.name]] for g in target.groups for s in g.sites}
    done = [with_choice(s, chosen[s.name]) if s.name in chosen else s for s in sites]
    return [s for s in done if s.steps]


def explicit(recipe: Recipe, target: SizeTarget, picks: Mapping[str, str]) -> Recipe:
    """The recipe with the choice written out: it needs no survey and gives the same checkpoint."""
    groups: dict[str, Any] = {}
    for choice in target.choices.values():
        mine = [g for g in target.groups if picks[g.name] == choice.label]
        targets = [name for g in mine for name in _targets(g)]
        if not targets:
            continue
        if choice.group is None:
            groups[UNQUANTIZED] = targets
        else:
            groups[choice.label.replace(" ", "_")] = {"targets": targets, **target.modifier.written(choice.group)}
    changed = replace(target.modifier, bits=None, candidates=None, targets="Linear", ignore=[], config_groups=groups)
    stages = tuple(
        replace(stage, modifiers=tuple(changed if m is target.modifier else m for m in stage.modifiers))
        for stage in recipe.stages
    )
    return replace(recipe, stages=stages)


def _targets(group: FusionGroup) -> list[str]:
    """Patterns for the linears of a group: their names, or one expression for experts, which may be thousands."""
    if group.sites[0].expert is None:
        return [s.name for s in group.sites]
    leaves = sorted({s.name.rpartition(".")[2] for s in group.sites})
    return [f"re:{group.name.replace('.', '[.]')}[.][0-9]+[.]({'|'.join(leaves)})$"]


def section(target: SizeTarget, allocation: Allocation) -> dict[str, Any]:
    """The report's section: target, size reached, and each group's scheme with its predicted loss."""
    size = target.size(allocation.picks)
    return {
        "bits": target.bits,
        "bits_per_weight": round(size / target.weights, 5),
        "weights": target.weights,
        "predicted_kl": float(f"{sum(allocation.losses.values()):.5g}"),
        "groups": [
            {
                "name": g.name,
                "linears": len(g.sites),
                "scheme": allocation.picks[g.name],
                "bits_per_weight": round(g.sizes[allocation.picks[g.name]] / g.weights, 5),
                "predicted_kl": float(f"{allocation.losses[g.name]:.5g}"),
            }
            for g in target.groups
        ],
        **allocation.to_dict(),
    }
