"""A recipe held against a model: which linears are compressed how, what it will cost, and every fault at once.

Nothing is loaded here but the configuration and the headers of the weight files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bitpress import formats, ranks
from bitpress.budget import budget, space_fault
from bitpress.caches import CacheSite, find_caches
from bitpress.checkpoint import file_size
from bitpress.clients import client_notes
from bitpress.errors import PlanError
from bitpress.experts import fused_left
from bitpress.foldplan import Use, find_smoothing, smoothed_sites
from bitpress.formatplan import format_faults, left_dense, model_faults, specs_of_shards, stored_as, stored_in
from bitpress.modifiers.base import LinearModifier, names
from bitpress.modifiers.quantization import SchemeModifier
from bitpress.profiles import Profile, find_profiles, profiled
from bitpress.schemes import QuantArgs
from bitpress.sites import (
    Site,
    bits_per_weight,
    brief,
    find_sites,
    full_every,
    label,
    misfits,
    stored_bytes,
    unpruned,
)
from bitpress.size_target import SizeTarget, decided, find_target
from bitpress.subject import Subject
from bitpress.tuneplan import find_tuning, without_experts, without_propagation

SURVEYED = (
    "bits: a survey of the uncompressed model comes first and chooses each linear's scheme; the size is then within "
    "1 % of the target"
)


SURVEYED_BEFORE = (
    "bits: the survey measures linears as they are before {}; its choice is the one for them so, the size is met anyway"
)


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        sites: linears to compress, in order of blocks.
        ignored: names (on disk, and in memory where they differ) of the linear-like modules that stay as they are.
        notes: what the user should know, but which is no fault.
        shards: dtype and shape of every tensor of the output, per shard: blocks in order, then all else.
        output_bytes: exact size of the output's safetensors files.
        host_bytes, device_bytes: expected peaks.
        batch_size: sequences per forward.
        gram_bytes: budget of the Gram matrices of one pass.
        solver_bytes: budget of what is solved together.
        hidden_on: where hidden states are kept, "device", "host" or "disk".
        caches: caches of keys and values that get scales.
        cache_scheme: how caches are quantized, None if they are not.
        smoothing: of each block, the folds that are scaled before its linears are compressed.
        inherited: linears that earlier stages have quantized.
        target: a size for which the schemes are chosen by a survey, None once they are or if there is none. Until
            then the sites' schemes stand for those to come, and `output_bytes` is about the most that they take.
        profiles: shares of zeros that a survey spreads over the blocks; empty once it has.
        trains: it is a training stage; its sites are those that are trained with their rounding.
        masked: linears whose zeros are kept while training.
        propagates: each block is calibrated on what the compressed ones before it give; else on the uncompressed ones'.
        stored: the checkpoint format.
        spare_hidden: hidden states before and after a block are held, where one forward serves a block with experts.
        solves_beside: linears are solved while the next block runs, where one forward serves both.
        copies_ahead: a GPU holds the next block's weights while one is at work.
    """

    sites: tuple[Site, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    shards: tuple[formats.Spec, ...]
    output_bytes: int
    host_bytes: int
    device_bytes: int
    batch_size: int
    gram_bytes: int
    solver_bytes: int
    hidden_on: str
    caches: tuple[CacheSite, ...] = ()
    cache_scheme: QuantArgs | None = None
    smoothing: tuple[tuple[Use, ...], ...] = ()
    inherited: tuple[Site, ...] = ()
    target: SizeTarget | None = None
    profiles: tuple[Profile, ...] = ()
    trains: bool = False
    masked: tuple[Site, ...] = ()
    propagates: bool = True
    stored: str = formats.DEFAULT
    spare_hidden: bool = False
    solves_beside: bool = False
    copies_ahead: bool = False

    @property
    def surveys(self) -> bool:
        """Whether a survey comes first."""
        return self.target is not None or bool(self.profiles)

    @property
    def quantized(self) -> tuple[Site, ...]:
        """All linears that are quantized in the output."""
        return (*self.inherited, *(s for s in self.sites if s.group is not None))

    @property
    def full_every(self) -> int:
        """See `sites.full_every`."""
        return full_every(self.sites)

    @property
    def needs_stats(self) -> bool:
        """Whether the model is run on calibration data."""
        return not self.trains and (bool(self.caches) or any(s.needs for s in self.sites))

    @property
    def reads(self) -> tuple[str, ...]:
        """What calibration data are needed for, in a few words each; empty if they are not."""
        if self.trains:
            return ()
        needs = frozenset().union(*(s.needs for s in self.sites))
        methods = sorted({s.method for s in self.sites if "gram" in s.needs})
        static = sorted({label(s.group) for s in self.sites if "range" in s.needs})
        words = {
            "gram": f"second moments of inputs ({', '.join(methods)})",
            "mean": "mean sizes of inputs",
            "range": f"ranges of inputs ({', '.join(static)})",
            "sample": "a sample of the tokens (smoothquant)",
            "full": "outputs of the uncompressed model's blocks (tune)",
        }
        found = tuple(text for need, text in words.items() if need in needs)
        return (*found, "ranges of keys and values (kv_cache_scheme)") if self.caches else found

    @property
    def last_block(self) -> int:
        """Index of the last block whose input is needed; the number of blocks means the head's; -1: none."""
        needed = [s.block for s in self.sites if s.needs] + [c.block for c in self.caches]
        if any(b is None for b in needed):
            return len(self.shards) - 1
        return max((b for b in needed if b is not None), default=-1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: sites, sizes in bytes, notes."""
        open_ = set() if self.target is None else {s.name for g in self.target.groups for s in g.sites}
        return {
            "sites": [
                {
                    "name": s.name, "block": s.block, "rows": s.rows, "columns": s.columns,
                    "method": s.method, "scheme": None if s.name in open_ else label(s.group),
                    "bits_per_weight": None if s.name in open_ else bits_per_weight(s),
                }
                for s in self.sites
            ],
            "ignored": list(self.ignored),
            "zeros_kept": [s.name for s in self.masked],
            "needs_data": list(self.reads),
            "format": self.stored,
            "kv_cache_scheme": None if self.cache_scheme is None else self.cache_scheme.to_dict(),
            "output_bytes": self.output_bytes,
            "host_bytes": self.host_bytes,
            "device_bytes": self.device_bytes,
            "batch_size": self.batch_size,
            "hidden_states_on": self.hidden_on,
            "smoothing": [
                {"block": i, "method": u.modifier.smoothing, "producer": u.fold.producer, "consumers": u.fold.consumers}
                for i, uses in enumerate(self.smoothing)
                for u in uses
            ],
            "size_target": None if self.target is None else {
                "bits": self.target.bits, "groups": len(self.target.groups), "candidates": list(self.target.choices),
            },
            "notes": list(self.notes),
        }  # fmt: skip


def make(
    modifiers: Sequence[Any],
    subject: Subject,
    *,
    samples: int,
    length: int,
    device: torch.device,
    max_memory: int | None = None,
    batch_size: int | None = None,
    output: Path | None = None,
    compressed: bool = True,
    trust_remote_code: bool = False,
    inherited: Sequence[Site] = (),
    propagate: bool = True,
    stored: str = formats.DEFAULT,
    cache: QuantArgs | None = None,
) -> Plan:
    """Hold the modifiers of a stage against the model.

    Args:
        samples, length: calibration sequences and tokens in each.
        max_memory: bytes of the device (host memory on the CPU) that the run may take.
        batch_size: sequences per forward instead of what memory allows.
        output: the folder that will be written, for the check of free space.
        compressed: pack the weights; else dense weights beside their scales.
        trust_remote_code: run code that the model brings, for a tiny copy of it.
        inherited: linears that earlier stages have quantized.
        propagate: calibrate each block on what the compressed ones before it give.
        stored: the checkpoint format that is asked for.
        cache: how caches of keys and values are quantized already.

    Raises:
        PlanError: all faults of the stage.
    """
    if transposed := _transposed(subject):
        raise PlanError(transposed)
    faults = [
        f"{type(m).__name__}: works in a training stage only (run_type: train)"
        for m in modifiers
        if m.run_type != "oneshot"
    ]
    compressing = [m for m in modifiers if isinstance(m, LinearModifier)]
    sites, more, notes = find_sites(compressing, subject)
    faults += more
    stored, more = stored_as(stored, compressing, inherited)
    notes += more
    sites, inherited = stored_in(stored, sites), stored_in(stored, inherited)
    faults += _unknown_experts(subject, compressing)
    faults += misfits(sites, subject)
    cache_schemes = [c for m in compressing if isinstance(m, SchemeModifier) and (c := m.cache()) is not None]
    caches, more = find_caches(cache_schemes, subject)
    faults += more + ([] if propagate else without_propagation(modifiers, caches))
    target, more = find_target(compressing, sites)
    faults += more
    profiles, more = find_profiles(compressing, sites, len(subject.blocks))
    faults += more
    notes += client_notes(subject, sites, cache_schemes, stored) if target is None else [*target.notes, SURVEYED]
    smoothing = find_smoothing(modifiers, subject, sites, trust_remote_code=trust_remote_code)
    sites = smoothed_sites(sites, smoothing, subject)
    if target is not None:
        earlier = [u.modifier for uses in smoothing.uses for u in uses]
        steps = [t.modifier for g in target.groups for s in g.sites for t in s.steps]
        changing = dict.fromkeys(type(m).__name__ for m in (*earlier, *steps) if m is not target.modifier)
        changing |= dict.fromkeys(type(m).__name__ for m in earlier)  # AWQ in its old form is both
        notes += [SURVEYED_BEFORE.format(" and ".join(changing))] if changing else []
    rescaled = {m for uses in smoothing.uses for u in uses for m in (u.fold.producer, *u.fold.consumers)}
    faults += quantized_before({s.module for s in sites} | rescaled, inherited)
    sites, more, added = find_tuning(modifiers, subject, sites, samples)
    faults += smoothing.faults + more
    notes += smoothing.notes + added + unpruned(sites)
    if unknown := subject.layout.unknown:
        notes.append(
            f"{unknown[0]} (and {len(unknown) - 1} more): the model has no place for it; carried over as it is"
        )
    ignored = left_dense(subject, {s.module for s in (*inherited, *sites) if s.group is not None})
    faults += model_faults(stored, subject, (*inherited, *sites))
    faults += format_faults(
        stored, (*inherited, *sites), ignored, target=target, cache=bool(cache_schemes or cache), packed=compressed
    )
    memory: dict[str, Any] = {}
    mine = -(-samples // ranks.world_size())
    one_forward = not (propagate or caches)
    cost = partial(budget, subject, samples=mine, length=length, device=device, max_memory=max_memory,
                   batch_size=batch_size, runs=bool(caches), surveys=any(m.surveys for m in modifiers),
                   one_forward=one_forward,
                   beside=one_forward and not any(m.solves_alone for m in compressing))  # fmt: skip
    try:
        memory = cost(sites)
    except PlanError as error:
        if not any(s.tuning and s.expert is not None for s in sites):
            faults += error.problems
        else:
            sites = without_experts(sites)
            notes.append(f"TuneModifier: experts stay as they are solved: {error.problems[0]}")
            try:
                memory = cost(sites)
            except PlanError as still:
                faults += still.problems
    if faults:  # a misspelled pattern of `ignore` may be what they come from
        raise PlanError([*faults, *(n for n in notes if "ignore: " in n and "matches no linear" in n)])
    shards = specs_of_shards(subject, (*inherited, *sites), caches, compressed)
    output_bytes = sum(file_size(s) for s in shards if s)
    if target is not None:
        stand_ins = sum(stored_bytes(s, compressed=compressed) for g in target.groups for s in g.sites)
        output_bytes += target.most(compressed=compressed) - stand_ins
    if output is not None and (fault := space_fault(output, output_bytes)):
        raise PlanError(fault)
    return Plan(
        tuple(sites), ignored, tuple(notes), shards, output_bytes, **memory,
        caches=tuple(caches), cache_scheme=next(iter(cache_schemes), cache), smoothing=tuple(smoothing.uses),
        inherited=tuple(inherited), target=target, profiles=profiles, propagates=propagate, stored=stored,
    )  # fmt: skip


def settle(
    plan: Plan, subject: Subject, picks: Mapping[str, str], shares: Sequence[Sequence[float]], *, compressed: bool
) -> Plan:
    """The plan after its survey.

    Args:
        picks: label of the scheme of each group of its size target.
        shares: of each profile, the share of zeros of each block.
    """
    sites = list(plan.sites) if plan.target is None else decided(plan.target, plan.sites, picks)
    for profile, mine in zip(plan.profiles, shares, strict=True):
        sites = profiled(sites, profile, mine)
    shards = specs_of_shards(subject, (*plan.inherited, *sites), plan.caches, compressed)
    caches = [] if plan.cache_scheme is None else [plan.cache_scheme]
    notes = [n for n in plan.notes if n != SURVEYED]
    notes += client_notes(subject, sites, caches, plan.stored) + unpruned(sites)
    return replace(
        plan,
        sites=tuple(sites),
        ignored=left_dense(subject, {s.module for s in (*plan.inherited, *sites) if s.group is not None}),
        notes=tuple(dict.fromkeys(notes)),
        shards=shards,
        output_bytes=sum(file_size(s) for s in shards if s),
        target=None,
        profiles=(),
    )


def whole(plans: Sequence[Plan]) -> Plan:
    """The plans of a run's stages as one: a linear has the steps of all stages, peaks are those of the largest.

    It describes the run; each stage runs by its own plan.
    """
    if len(plans) == 1:
        return plans[0]
    sites: dict[str, Site] = {}
    for site in (s for p in plans for s in p.sites):
        before = sites.get(site.name)
        sites[site.name] = site if before is None else replace(before, steps=before.steps + site.steps)
    last = len(plans[-1].shards)
    return replace(
        plans[-1],
        trains=False,
        masked=tuple({s.name: s for p in plans for s in p.masked}.values()),
        sites=tuple(sorted(sites.values(), key=lambda s: last if s.block is None else s.block)),
        notes=tuple(dict.fromkeys(n for p in plans for n in p.notes)),
        host_bytes=max(p.host_bytes for p in plans),
        device_bytes=max(p.device_bytes for p in plans),
        inherited=(),
    )


def _transposed(subject: Subject) -> str | None:
    """What is wrong with a model whose projections are Conv1D, as GPT-2's: no client of the formats takes them."""
    found = [n for n, m in subject.model.named_modules() if type(m).__name__ == "Conv1D"]
    if not found:
        return None
    return (
        f"{found[0]} and {len(found) - 1} more: Conv1D, which stores a linear's weight transposed; transformers and "
        "vLLM cannot load these quantized. Choose a model whose projections are Linear"
    )


def quantized_before(changed: set[str], inherited: Sequence[Site]) -> list[str]:
    """Linears that this stage would change though an earlier one has quantized them."""
    done = [s.name for s in inherited if s.module in changed]
    return brief([f"{name}: quantized in an earlier stage; add it to ignore in this one" for name in done])


def _unknown_experts(subject: Subject, modifiers: Sequence[LinearModifier]) -> list[str]:
    left = list(fused_left(subject.model))
    if not left:
        return []
    patterns = [p for m in modifiers for p in names(m.ignore)]
    if any("expert" in p for p in patterns):
        return []
    return [
        f"{left[0]} and {len(left) - 1} more: experts in a fused layout that bitpress does not know; to leave them "
        "in full precision add 're:.*experts.*' to ignore"
    ]
