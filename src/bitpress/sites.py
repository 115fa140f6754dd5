"""Which linears of a model a stage compresses, and how: each is a site with its chain of steps.

A stage's modifiers run in order on every linear that they target: one that prunes, then one that quantizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bitpress import formats
from bitpress.errors import PlanError
from bitpress.modifiers.base import Claim, LinearModifier, PruningModifier, names
from bitpress.modifiers.quantization import SchemeGroup, SchemeModifier
from bitpress.modifiers.smoothing import ScaleModifier
from bitpress.modifiers.tune import TuneModifier
from bitpress.recognise import is_counted, scheme_label
from bitpress.schemes import BLOCKWISE, Scheme
from bitpress.subject import Subject, output_head
from bitpress.targets import LinearName, resolve, specificity

# vLLM runs these as one matrix product, so their scheme must be one
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
FUSED_NAMES = {FUSED[0]: "qkv_proj", FUSED[1]: "gate_up_proj"}  # what it calls the product

PAIRED_EVERY = 4  # the drift of inputs, much damped, is known well enough from a quarter of the data


@dataclass(frozen=True)
class Step:
    """What one modifier does to one linear.

    Attributes:
        claim: the group of the modifier's targets that it belongs to; a `SchemeGroup` where it is quantized.
        sparsity: share of its weights to prune, where the modifier prunes.
    """

    modifier: LinearModifier
    claim: Claim
    sparsity: float | None = None


@dataclass(frozen=True)
class Site:
    """One linear to compress.

    Attributes:
        name: its name on disk, without `.weight`.
        module: its module name.
        block: index of its block; None for the output head.
        rows, columns: R out features, C in features.
        steps: what is done to it, in order.
        expert: index of its expert, if it is part of one.
        dtype: in which its scales are stored.
        smoothing: modifiers that scale its input, before the steps.
        tuning: what tunes it together with the other linears of its block, after the steps.
        stored: the checkpoint format.
    """

    name: str
    module: str
    block: int | None
    rows: int
    columns: int
    steps: tuple[Step, ...]
    expert: int | None
    dtype: torch.dtype = torch.bfloat16
    smoothing: tuple[ScaleModifier, ...] = ()
    tuning: TuneModifier | None = None
    stored: str = formats.DEFAULT

    @property
    def key(self) -> str:
        """Module tensor name of its weight."""
        return self.module + ".weight"

    @property
    def group(self) -> SchemeGroup | None:
        """Scheme and settings, None if it is not quantized."""
        return next((s.claim for s in self.steps if isinstance(s.claim, SchemeGroup)), None)

    @property
    def scheme(self) -> Scheme | None:
        return None if self.group is None else self.group.scheme

    @property
    def packed_24(self) -> bool:
        """Whether it is stored by its 2:4 mask though it is not quantized."""
        prunes = (s.modifier for s in self.steps if isinstance(s.modifier, PruningModifier) and s.sparsity != 0)
        return formats.CHECKPOINTS[self.stored].sparse and any(str(m.structure) == "2:4" for m in prunes)

    @property
    def method(self) -> str:
        last = [] if self.tuning is None else [self.tuning.tuning]
        return "+".join([*(m.smoothing for m in self.smoothing), *(s.modifier.method for s in self.steps), *last])

    @property
    def needs(self) -> frozenset[str]:
        """What smoothing, steps and tuning read of the calibration data, see `Modifier.needs`."""
        own = (s.modifier.needs_of(s.claim) for s in self.steps)
        tuning = frozenset() if self.tuning is None else self.tuning.needs
        return frozenset().union(*(m.needs for m in self.smoothing), *own, tuning)

    @property
    def partners(self) -> str:
        """Name of the product that clients run it in, or its own; empty where its scheme shares no numbers there."""
        if self.scheme is None or not formats.grid_of(self.scheme, self.dtype).fused:
            return ""
        parent, _, leaf = self.name.rpartition(".")
        together = next((names for names in FUSED if leaf in names), None)
        return self.name if together is None else f"{parent}.{'+'.join(together)}"


def full_every(sites: Sequence[Site]) -> int:
    """Every n-th batch also runs in the uncompressed model, for those who compare with it; 0: none does."""
    if any("full" in s.needs for s in sites):
        return 1
    return PAIRED_EVERY if any("drift" in s.needs for s in sites) else 0


def label(group: SchemeGroup | None) -> str:
    """A scheme in a few words, for tables; `dense` if there is none."""
    return "dense" if group is None else scheme_label(group.scheme.weights, group.scheme.input_activations)


def bits_per_weight(site: Site) -> float:
    """Stored bits per weight, scales and zero points counted."""
    spec = stored_spec(site, compressed=True)
    mine = [part for name, part in spec.items() if is_counted(name)]
    stored = sum(t.itemsize * torch.Size(s).numel() for t, s in mine)
    return 8 * stored / (site.rows * site.columns)


def stored_bytes(site: Site, *, compressed: bool) -> int:
    """Bytes of a site's tensors."""
    return sum(t.itemsize * torch.Size(s).numel() for t, s in stored_spec(site, compressed=compressed).values())


def stored_spec(site: Site, *, compressed: bool) -> formats.Spec:
    """Tensors that a site is stored as: suffix -> (dtype, shape)."""
    if site.scheme is None:
        if compressed and site.packed_24:
            return formats.CHECKPOINTS[site.stored].describe_plain(site.rows, site.columns, site.dtype)
        return {"weight": (site.dtype, (site.rows, site.columns))}
    if compressed:
        return formats.describe(site.scheme, site.rows, site.columns, site.dtype, site.stored)
    regrouped = site.group is not None and site.group.actorder == "group" and bool(site.scheme.weights.group_size)
    return formats.describe_dense(site.scheme, site.rows, site.columns, site.dtype, regrouped)


def linears_of(subject: Subject) -> list[tuple[str, nn.Linear]]:
    """All Linears of the model, by module name."""
    return [(n, m) for n, m in subject.model.named_modules() if isinstance(m, nn.Linear)]


def disk_module(subject: Subject, module: str) -> str:
    """A module's name on disk."""
    return subject.layout.disk_of.get(module + ".weight", module + ".weight").removesuffix(".weight")


def find_sites(modifiers: Sequence[Any], subject: Subject) -> tuple[list[Site], list[str], list[str]]:
    """The sites of modifiers that compress linears, in the model's order; faults and notes."""
    linears = linears_of(subject)
    inside = subject.blocks.path + "."
    head = head_name(subject)
    back: dict[LinearName, tuple[str, nn.Linear]] = {}
    for name, module in linears:
        both = tuple(dict.fromkeys((name, disk_module(subject, name))))
        back[LinearName(both, "Linear")] = (name, module)  # a subclass is a Linear to recipes too
    entries = list(back)
    claimed: dict[str, Site] = {}
    faults: list[str] = []
    notes: list[str] = []
    clashes: list[str] = []
    outside: dict[str, list[str]] = {}
    for modifier in modifiers:
        kind = type(modifier).__name__
        notes += [f"{kind}.{n}" for n in modifier.notes()]
        mine: dict[str, Site] = {}
        ranks: dict[str, int] = {}
        # what is to be left alone goes first, so that it wins where others name the same linears as exactly
        groups = sorted(modifier.claims(), key=modifier.leaves, reverse=True)
        unmet: set[str] = set()  # groups whose patterns are at fault
        for group in groups:
            chosen = resolve(entries, group.targets, names(modifier.ignore), kind)
            faults += chosen.faults
            unmet |= {group.name} if chosen.faults else set()
            # leaving out an output head that is not there is what every recipe does
            notes += [n for n in chosen.notes if n not in notes and "'lm_head' matches" not in n]
            for entry in chosen.linears:
                name, module = back[entry]
                rank = specificity(entry, group.targets)
                if rank <= ranks.get(name, -1):
                    continue  # a name goes before a regular expression, that before a class; else the first group
                if why := _left_out(name, module, inside, head):
                    outside.setdefault(why, []).append(name)
                    continue
                site = dense_site(subject, name, module)
                ranks[name] = rank
                try:
                    step = Step(modifier, group, _sparsity(modifier, group, site.block, len(subject.blocks)))
                except PlanError as error:
                    faults += [f for p in error.problems if (f := f"{kind}.{p}") not in faults]
                    step = Step(modifier, group)
                mine[name] = replace(site, steps=(step,))
        used = {site.steps[0].claim.name for site in mine.values()}
        mine = {name: site for name, site in mine.items() if not modifier.leaves(site.steps[0].claim)}
        if mine:
            faults += [
                f"{kind}.{modifier.claims_key}.{g.name}: others name all of its linears first, or more exactly; drop it"
                for g in groups
                if g.name not in used | unmet
            ]
        for name, site in mine.items():
            if (before := claimed.get(name)) is None:
                claimed[name] = site
            elif why := _clash(before, modifier):
                clashes.append(f"{name}: {why}")
            else:
                claimed[name] = replace(before, steps=before.steps + site.steps)
    faults += brief(clashes)
    for why, left in outside.items():
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        notes.append(f"{left[0]}{more}: {why}, left as it is")
    order = {name: i for i, (name, _) in enumerate(linears)}
    return sorted(claimed.values(), key=lambda s: order[s.module]), faults, notes


def unpruned(sites: Sequence[Site]) -> list[str]:
    """Notes of linears that a pruning modifier is given and leaves as they are, for lack of a share of zeros."""
    left: dict[tuple[str, float], list[str]] = {}
    for site in sites:
        for step in site.steps:
            modifier, share = step.modifier, step.sparsity
            if not isinstance(modifier, PruningModifier) or share is None:
                continue
            if not modifier.prunes(site.rows, site.columns, share):
                left.setdefault((type(modifier).__name__, share), []).append(site.name)
    return [
        f"{kind}: a share of zeros of {share:g} prunes nothing of {mine[0]}"
        + (f" (and {len(mine) - 1} more)" if len(mine) > 1 else "")
        for (kind, share), mine in left.items()
    ]


def dense_site(subject: Subject, name: str, module: nn.Linear) -> Site:
    """A linear with nothing done to it yet."""
    inside = subject.blocks.path + "."
    block = int(name.removeprefix(inside).split(".")[0]) if name.startswith(inside) else None
    return Site(
        disk_module(subject, name), name, block, module.out_features, module.in_features, (),
        _expert_of(subject, name), subject.dtype,
    )  # fmt: skip


def stored_by_mask(site: Site, stored: str) -> Site:
    """A linear that is 2:4 already, to be stored by its mask."""
    from bitpress.modifiers.pruning import MagnitudePruningModifier

    modifier = MagnitudePruningModifier(mask_structure="2:4")
    return replace(site, stored=stored, steps=(Step(modifier, modifier.claims()[0], 0.5),))


def _sparsity(modifier: LinearModifier, claim: Claim, block: int | None, blocks: int) -> float | None:
    return modifier.sparsity_at(claim, block, blocks) if isinstance(modifier, PruningModifier) else None


def _left_out(name: str, module: nn.Linear, inside: str, head: str | None) -> str | None:
    """Why a linear that a recipe means is not compressed all the same, None if it is."""
    if not name.startswith(inside) and name != head:
        return "outside the decoder blocks"
    if module.out_features == 1:
        return "a gate with one output, which clients keep in full precision"
    return None


def head_name(subject: Subject) -> str | None:
    """Module name of the output head."""
    head = output_head(subject.model)
    return next((n for n, m in subject.model.named_modules() if m is head and head is not None), None)


def _expert_of(subject: Subject, name: str) -> int | None:
    for path in subject.experts:
        if name.startswith(path + "."):
            return int(name.removeprefix(path + ".").split(".")[0])
    return None


def _clash(site: Site, modifier: LinearModifier) -> str | None:
    """Why a modifier cannot follow what is done to a site already, None if it can."""
    kind, others = type(modifier).__name__, [type(s.modifier).__name__ for s in site.steps]
    if isinstance(modifier, SchemeModifier) != (site.group is not None):
        if site.group is None:
            return None
        return f"{others[-1]} quantizes it before {kind} prunes it; put {kind} first"
    return f"claimed by {others[-1]} and by {kind}; add it to the ignore list of one"


def misfits(sites: Sequence[Site], subject: Subject) -> list[str]:
    """Sites whose shape does not fit their scheme, or whose weight cannot be compressed alone."""
    found = []
    head = head_name(subject)
    alike: dict[int, int] = {}  # divides all columns of a group: a size that the next linear refuses is no help
    for site in sites:
        alike[id(site.group)] = math.gcd(alike.get(id(site.group), 0), site.columns)
    for site in sites:
        if site.scheme is not None:
            found += [f"{site.name}: {fault}" for fault in shape_faults(site, site.scheme, alike[id(site.group)])]
        for modifier in (s.modifier for s in site.steps):
            unit = modifier.group_columns() if isinstance(modifier, PruningModifier) else 1
            if site.columns % unit:
                fits = " or ".join(s for s in ("2:4", "4:8") if site.columns % int(s[-1]) == 0)
                found.append(
                    f"{site.name}: {site.columns} input columns are not divisible into groups of {unit} for "
                    f"{type(modifier).__name__}; {f'take {fits}, or ' if fits else ''}add it to ignore"
                )
        if site.module == head and subject.tied:
            found.append(
                f"{site.name}: tied to the input embedding, so it cannot be compressed alone; add it to ignore "
                "(lm_head is there by itself only where nothing else is given)"
            )
        elif site.key not in subject.layout.disk_of:
            found.append(f"{site.name}: has no weight of its own in the checkpoint; add it to ignore")
    return brief(found)


def fits(site: Site, scheme: Scheme) -> bool:
    """Whether a scheme's groups and blocks divide the weight, and the checkpoint format holds it."""
    form = formats.CHECKPOINTS[site.stored]
    held = form.refusal(scheme, None) is None and form.misfit(scheme, site.rows, site.columns) is None
    return held and not shape_faults(site, scheme, site.columns)


def shape_faults(site: Site, scheme: Scheme, alike: int) -> list[str]:
    """Groups and blocks that do not divide the weight; `alike`: what divides the columns of all with this scheme."""
    args, inputs = scheme.weights, scheme.input_activations
    size = None if args.type in BLOCKWISE else args.group_size  # their blocks run over the ends of rows
    if size and site.columns % size:
        why = f"{site.columns} input columns are not divisible by group_size {size}"
        if args.type == "int":
            tries = ", ".join(str(n) for n in near_divisors(alike, size))
            return [f"{why} (try {tries}, -1)"]
        return [f"{why}, which its format fixes; add it to ignore or choose another scheme"]
    if args.block_structure is not None:
        rows, columns = args.block_structure
        if site.rows % rows or site.columns % columns:
            return [
                f"{site.rows} x {site.columns} is not divisible into blocks of {rows} x {columns}, as vLLM needs; "
                "add it to ignore or use FP8_DYNAMIC"
            ]
    size = None if inputs is None else inputs.group_size
    if size and site.columns % size:
        return [f"{site.columns} input columns are not divisible by the activations' group_size {size}"]
    return []


def brief(found: list[str]) -> list[str]:
    """Of linears with the same fault, the first and a count."""
    kinds: dict[str, list[str]] = {}
    for fault in found:
        kinds.setdefault(fault.partition(":")[2], []).append(fault)
    return [same[0] if len(same) == 1 else f"{same[0]} [and {len(same) - 1} more linears]" for same in kinds.values()]


def near_divisors(columns: int, size: int) -> list[int]:
    """Up to three group sizes near `size` that divide `columns`, preferring powers of two."""
    fits = [n for n in range(8, min(columns, 1024) + 1) if columns % n == 0]
    powers = [n for n in fits if n & (n - 1) == 0]
    best = sorted(powers or fits, key=lambda n: abs(n - size))[:2]
    best += [n for n in sorted(fits, key=lambda n: abs(n - size)) if n not in best][: 3 - len(best)]
    return sorted(best) or [columns]
