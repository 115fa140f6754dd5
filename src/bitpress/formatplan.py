"""Sites held against the checkpoint format: what it cannot hold, what is stored, and what is left as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from bitpress import formats
from bitpress.caches import CacheSite
from bitpress.errors import PlanError
from bitpress.modifiers.quantization import SchemeGroup, SchemeModifier
from bitpress.schemes import BLOCKWISE
from bitpress.sites import Site, brief, disk_module, label, stored_spec

if TYPE_CHECKING:
    from bitpress.modifiers.base import LinearModifier
    from bitpress.plan import Plan
    from bitpress.size_target import SizeTarget
    from bitpress.subject import Subject

VERSION_2 = "gptq: stored in version 2 of the format (gptq_v2), as version 1 cannot hold every zero point"


def stored_as(name: str, modifiers: Sequence[LinearModifier], inherited: Sequence[Site]) -> tuple[str, list[str]]:
    """The format that a run writes where `name` is asked for, and what to say of it."""
    groups = [s.group for s in inherited if s.group is not None]
    for modifier in modifiers:
        if isinstance(modifier, SchemeModifier):
            groups += [g for g in (*modifier.groups(), *modifier.choices()) if isinstance(g, SchemeGroup)]
    if name == formats.DEFAULT and any(g.scheme.weights.type in BLOCKWISE for g in groups):
        return "bitsandbytes", ["NF4 and FP4: stored in the format of bitsandbytes, the only one that has them"]
    if name == "gptq" and any(not g.scheme.weights.symmetric for g in groups):
        return "gptq_v2", [VERSION_2]
    return name, []


def stored_in(name: str, sites: Sequence[Site]) -> list[Site]:
    """The sites of a checkpoint in this format."""
    return [replace(s, stored=name) for s in sites]


def model_faults(name: str, subject: Subject, sites: Sequence[Site]) -> list[str]:
    """Why a format cannot hold this model, whatever becomes of its linears."""
    quantized = any(s.group is not None for s in sites)
    return [
        f"{name}: {fault}"
        for fault in formats.CHECKPOINTS[name].unfit(subject.config, subject.folder, subject.dtype, quantized)
    ]


def format_faults(
    name: str, sites: Sequence[Site], ignored: Sequence[str], *, target: SizeTarget | None, cache: bool, packed: bool
) -> list[str]:
    """Why a format cannot hold these linears.

    Args:
        target: chooses the schemes of some of them, and has been told which the format holds.
        cache: the cache of keys and values is quantized.
        packed: else dense beside scales.
    """
    form, faults, odd = formats.CHECKPOINTS[name], [], []
    if target is not None and not form.mixed:
        faults.append(
            f"{name}: has one scheme for all linears, and bits chooses several; use another format, or scheme"
        )
    chosen = set() if target is None else {s.name for g in target.groups for s in g.sites}
    sites = [s for s in sites if s.group is not None and s.name not in chosen]
    regrouped = [s.name for s in sites if s.tuning is not None and s.group and s.group.actorder == "group"]
    faults += brief([f"{n}: TuneModifier needs groups of adjacent columns; use actorder: 'static'" for n in regrouped])
    blockwise = [s for s in sites if s.scheme is not None and s.scheme.weights.type in BLOCKWISE]
    if blockwise and not packed:
        faults.append("NF4 and FP4 are stored packed only: give them in the last stage, without --dense")
    if any(s.tuning is not None for s in blockwise):
        faults.append("TuneModifier: codes of bitsandbytes cannot be tuned; drop it, or use an integer scheme")
    for group in {s.group.name: s.group for s in sites if s.group is not None}.values():
        if refusal := form.refusal(group.scheme, group.actorder):
            faults.append(f"{name}: {label(group)}: {refusal}")
        elif group.scheme.input_activations is not None and not form.activations and name != "dense":
            faults.append(
                f"{name}: {label(group)}: holds weights only, and this scheme rounds inputs too; choose a scheme of "
                "weights alone, such as W4A16 or W8A16, or --format compressed-tensors"
            )
    if not faults:
        for site in sites:
            assert site.scheme is not None
            if misfit := form.misfit(site.scheme, site.rows, site.columns):
                odd.append(f"{site.name}: {name}: {misfit}; add it to ignore, or use another format")
        faults += form.together(sites, ignored)
    if cache and name != formats.DEFAULT:
        faults.append(f"{name}: cannot say how the cache is quantized (kv_cache_scheme); use {formats.DEFAULT}")
    return faults + brief(odd)


def format_unused(plan: Plan) -> list[str]:
    """Whether a run's last stage has nothing that its format, one of quantized weights alone, could hold."""
    form = formats.CHECKPOINTS[plan.stored]
    if plan.quantized or form.sparse or form.one_file or form.method in (None, formats.DEFAULT):
        return []
    return [f"format: {plan.stored} is of quantized weights, and nothing is quantized: add a quantizer, or drop it"]


def in_format(plan: Plan, name: str) -> Plan:
    """The plan of the same linears in another format.

    Raises:
        PlanError: the format cannot hold them.
    """
    if name == plan.stored:
        return plan
    stored, _ = stored_as(name, [], plan.quantized)
    caches = plan.cache_scheme is not None
    if faults := format_faults(stored, plan.quantized, plan.ignored, target=None, cache=caches, packed=True):
        raise PlanError(faults)
    sites, inherited = stored_in(stored, plan.sites), stored_in(stored, plan.inherited)
    return replace(plan, sites=tuple(sites), inherited=tuple(inherited), stored=stored)


def left_dense(subject: Subject, chosen: set[str]) -> tuple[str, ...]:
    """Every unquantized module with a matrix that a client could take for a Linear: routers and shared gates too."""
    found: dict[str, None] = {}
    for name, module in subject.model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding) or name in chosen:
            continue
        found[disk_module(subject, name)] = None
        found[name] = None
    for name in subject.layout.unknown:  # of layers that only other clients know, such as for several-token prediction
        if name.endswith(".weight") and len(subject.extra_specs()[name][1]) == 2:
            found[name.removesuffix(".weight")] = None
    return tuple(found)


def specs_of_shards(
    subject: Subject, sites: Sequence[Site], caches: Sequence[CacheSite], compressed: bool
) -> tuple[formats.Spec, ...]:
    """dtype and shape of every tensor of the output, per shard."""
    site_of = {s.key: s for s in sites}
    shards: list[formats.Spec] = []
    for prefix in (*(subject.blocks.prefix(i) for i in range(len(subject.blocks))), None):
        spec: formats.Spec = {}
        for key in subject.keys(prefix):
            if (site := site_of.get(key)) is None:
                spec[subject.layout.disk_of[key]] = subject.spec(key)
                continue
            parts = stored_spec(site, compressed=compressed)
            spec |= {f"{site.name}.{suffix}": part for suffix, part in parts.items()}
        shards.append(spec)
    for cache in caches:
        shards[cache.block] |= cache.spec()
    shards[-1] |= subject.extra_specs()
    return tuple(shards)
