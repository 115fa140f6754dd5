"""A recipe held against a model: which linears are compressed how, what it will cost, and every fault at once.

Nothing is loaded here but the configuration and the headers of the weight files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpress import formats
from bitpress.budget import budget, space_fault
from bitpress.checkpoint import file_size
from bitpress.errors import PlanError
from bitpress.experts import UnfusedExperts, fused_left
from bitpress.modifiers.quantization import SchemeGroup, SchemeModifier, names
from bitpress.subject import Subject, output_head
from bitpress.targets import LinearName, resolve, specificity

# vLLM runs these as one matrix product, so their scheme must be one
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True)
class Site:
    """One linear to compress.

    Attributes:
        name: its name on disk, without `.weight`.
        module: its module name.
        block: index of its block; None for the output head.
        rows, columns: R out features, C in features.
        expert: index of its expert, if it is part of one.
        dtype: in which its scales are stored.
    """

    name: str
    module: str
    block: int | None
    rows: int
    columns: int
    modifier: SchemeModifier
    group: SchemeGroup
    expert: int | None
    dtype: torch.dtype = torch.bfloat16

    @property
    def key(self) -> str:
        """Module tensor name of its weight."""
        return self.module + ".weight"


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
        hidden_on: where hidden states are kept, "device", "host" or "disk".
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
    hidden_on: str

    @property
    def needs_stats(self) -> bool:
        return any(s.modifier.needs_stats for s in self.sites)

    @property
    def last_block(self) -> int:
        """Index of the last block whose input is needed; the number of blocks means the head's; -1: none."""
        needed = [s.block for s in self.sites if s.modifier.needs_stats]
        if any(b is None for b in needed):
            return len(self.shards) - 1
        return max((b for b in needed if b is not None), default=-1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: sites, sizes in bytes, notes."""
        return {
            "sites": [
                {
                    "name": s.name, "block": s.block, "rows": s.rows, "columns": s.columns,
                    "method": s.modifier.method, "scheme": label(s.group), "bits_per_weight": bits_per_weight(s),
                }
                for s in self.sites
            ],
            "ignored": list(self.ignored),
            "output_bytes": self.output_bytes,
            "host_bytes": self.host_bytes,
            "device_bytes": self.device_bytes,
            "batch_size": self.batch_size,
            "hidden_states_on": self.hidden_on,
            "notes": list(self.notes),
        }  # fmt: skip


def label(group: SchemeGroup) -> str:
    """A scheme in a few words, for tables: `W4A16 g64`, `int3 channel`."""
    args = group.scheme.weights
    size = f"g{args.group_size}" if args.group_size else args.strategy
    kind = "" if args.symmetric or (group.scheme.name or "").endswith("ASYM") else " asym"
    return f"{group.scheme.name or f'int{args.num_bits}'} {size}{kind}"


def bits_per_weight(site: Site) -> float:
    """Stored bits per weight, scales and zero points counted."""
    spec = formats.describe(site.group.scheme, site.rows, site.columns, site.dtype)
    stored = sum(t.itemsize * torch.Size(s).numel() for n, (t, s) in spec.items() if n != "weight_shape")
    return 8 * stored / (site.rows * site.columns)


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
) -> Plan:
    """Hold the modifiers against the model.

    Args:
        samples, length: calibration sequences and tokens in each.
        max_memory: bytes of the device (host memory on the CPU) that the run may take.
        batch_size: sequences per forward instead of what memory allows.
        output: the folder that will be written, for the check of free space.
        compressed: pack the weights; else dense weights beside their scales.

    Raises:
        PlanError: all faults of the run.
    """
    linears = _linears(subject)
    sites, faults, notes = _sites(modifiers, subject, linears)
    faults += _unknown_experts(subject, modifiers)
    faults += _misfits(sites, subject)
    notes += _client_notes(subject, sites)
    if unknown := subject.layout.unknown:
        notes.append(
            f"{unknown[0]} (and {len(unknown) - 1} more): the model has no place for it; carried over as it is"
        )
    ignored = _ignored(subject, {s.module for s in sites})
    if faults:
        raise PlanError(faults)
    shards = _shards(subject, sites, compressed)
    output_bytes = sum(file_size(s) for s in shards if s)
    memory = budget(subject, sites, samples, length, device, max_memory, batch_size)
    if output is not None and (fault := space_fault(output, output_bytes)):
        raise PlanError(fault)
    return Plan(tuple(sites), ignored, tuple(notes), shards, output_bytes, **memory)


def _linears(subject: Subject) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in subject.model.named_modules() if isinstance(m, nn.Linear)]


def _disk_module(subject: Subject, module: str) -> str:
    return subject.layout.disk_of.get(module + ".weight", module + ".weight").removesuffix(".weight")


def _sites(
    modifiers: Sequence[Any], subject: Subject, linears: list[tuple[str, nn.Linear]]
) -> tuple[list[Site], list[str], list[str]]:
    inside = subject.blocks.path + "."
    head = _head_name(subject)
    back: dict[LinearName, tuple[str, nn.Linear]] = {}
    for name, module in linears:
        both = tuple(dict.fromkeys((name, _disk_module(subject, name))))
        back[LinearName(both, "Linear")] = (name, module)  # a subclass is a Linear to recipes too
    entries = list(back)
    claimed: dict[str, Site] = {}
    faults: list[str] = []
    notes: list[str] = []
    outside: dict[str, list[str]] = {}
    for modifier in modifiers:
        kind = type(modifier).__name__
        if not isinstance(modifier, SchemeModifier):
            faults.append(f"{kind}: cannot run in a one-shot stage")
            continue
        notes += [f"{kind}.{n}" for n in modifier.notes()]
        mine: dict[str, Site] = {}
        ranks: dict[str, int] = {}
        groups = modifier.groups()
        for group in groups:
            chosen = resolve(entries, group.targets, names(modifier.ignore), kind)
            faults += chosen.faults
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
                rest = name.removeprefix(inside)
                block = int(rest.split(".")[0]) if name.startswith(inside) else None
                ranks[name] = rank
                mine[name] = Site(
                    _disk_module(subject, name), name, block, module.out_features, module.in_features,
                    modifier, group, _expert_of(subject, name), subject.dtype,
                )  # fmt: skip
        used = {site.group.name for site in mine.values()}
        if mine:
            faults += [
                f"{kind}.config_groups.{g.name}: other groups name all of its linears more exactly; drop it"
                for g in groups
                if g.name not in used
            ]
        twice = {name: type(claimed[name].modifier).__name__ for name in mine if name in claimed}
        faults += _brief(
            [f"{n}: claimed by {other} and by {kind}; add it to the ignore list of one" for n, other in twice.items()]
        )
        claimed |= mine
    for why, left in outside.items():
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        notes.append(f"{left[0]}{more}: {why}, left as it is")
    order = {name: i for i, (name, _) in enumerate(linears)}
    return sorted(claimed.values(), key=lambda s: order[s.module]), faults, notes


def _left_out(name: str, module: nn.Linear, inside: str, head: str | None) -> str | None:
    """Why a linear that a recipe means is not compressed all the same, None if it is."""
    if not name.startswith(inside) and name != head:
        return "outside the decoder blocks"
    if module.out_features == 1:
        return "a gate with one output, which clients keep in full precision"
    return None


def _head_name(subject: Subject) -> str | None:
    head = output_head(subject.model)
    return next((n for n, m in subject.model.named_modules() if m is head and head is not None), None)


def _expert_of(subject: Subject, name: str) -> int | None:
    for path in subject.experts:
        if name.startswith(path + "."):
            return int(name.removeprefix(path + ".").split(".")[0])
    return None


def _unknown_experts(subject: Subject, modifiers: Sequence[Any]) -> list[str]:
    left = list(fused_left(subject.model))
    if not left:
        return []
    patterns = [p for m in modifiers if isinstance(m, SchemeModifier) for p in names(m.ignore)]
    if any("expert" in p for p in patterns):
        return []
    return [
        f"{left[0]} and {len(left) - 1} more: experts in a fused layout that bitpress does not know; to leave them "
        "in full precision add 're:.*experts.*' to ignore"
    ]


def _misfits(sites: Sequence[Site], subject: Subject) -> list[str]:
    found = []
    head = _head_name(subject)
    for site in sites:
        size = site.group.scheme.weights.group_size
        if size and site.columns % size:
            # a size that the next linear refuses is no help
            alike = [s.columns for s in sites if s.group is site.group]
            tries = ", ".join(str(n) for n in near_divisors(math.gcd(*alike), size))
            found.append(
                f"{site.name}: {site.columns} input columns are not divisible by group_size {size} (try {tries})"
            )
        if site.module == head and subject.tied:
            found.append(f"{site.name}: tied to the input embedding, so it cannot be quantized alone; add it to ignore")
        elif site.key not in subject.layout.disk_of:
            found.append(f"{site.name}: has no weight of its own in the checkpoint; add it to ignore")
    return _brief(found)


def _brief(found: list[str]) -> list[str]:
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


def _client_notes(subject: Subject, sites: Sequence[Site]) -> list[str]:
    notes = []
    groups = {s.group.name: s.group for s in sites}.values()
    for group in groups:
        args = group.scheme.weights
        if group.scheme.format == "pack-quantized" and args.strategy == "tensor":
            notes.append(f"{label(group)}: vLLM serves strategy group or channel only; this loads in transformers")
        elif group.scheme.format == "pack-quantized" and args.num_bits not in (4, 8):
            older = "" if args.num_bits == 2 else " with compressed-tensors 0.19 or later (older ones misread it)"
            notes.append(f"{label(group)}: vLLM serves 4 and 8 bits only; this loads in transformers{older}")
        if any(s.expert is not None and s.group is group for s in sites) and (
            not args.symmetric or group.scheme.format != "pack-quantized"
        ):
            notes.append(f"{label(group)}: transformers loads experts as symmetric packed integers only; use W4A16")
    odd = {type(m).__name__ for s in sites if type(m := subject.model.get_submodule(s.module)) is not nn.Linear}
    if odd:
        notes.append(
            f"{', '.join(sorted(odd))}: transformers decompresses plain Linears only; use bitpress.transformers"
        )
    by_name = {s.module: str(s.group.scheme) for s in sites}
    split = []
    for parent, _ in subject.model.named_modules():
        for partners in FUSED:
            there = [f"{parent}.{p}" for p in partners if hasattr(subject.model.get_submodule(parent), p)]
            if len({by_name.get(name) for name in there}) > 1:
                split.append(f"{parent}: {', '.join(partners)}")
    if split:
        notes.append(f"{split[0]} differ in scheme (and {len(split) - 1} more): vLLM fuses them and needs one scheme")
    return notes


def _ignored(subject: Subject, chosen: set[str]) -> tuple[str, ...]:
    """Every unquantized module with a matrix that a client could take for a Linear: routers and shared gates too."""
    found: dict[str, None] = {}
    for name, module in subject.model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding) or name in chosen:
            continue
        found[_disk_module(subject, name)] = None
        found[name] = None
    for name in subject.layout.unknown:  # of layers that only other clients know, such as for several-token prediction
        if name.endswith(".weight") and len(subject.extra_specs()[name][1]) == 2:
            found[name.removesuffix(".weight")] = None
    return tuple(found)


def _shards(subject: Subject, sites: Sequence[Site], compressed: bool) -> tuple[formats.Spec, ...]:
    site_of = {s.key: s for s in sites}
    shards: list[formats.Spec] = []
    for prefix in (*(subject.blocks.prefix(i) for i in range(len(subject.blocks))), None):
        spec: formats.Spec = {}
        for key in subject.keys(prefix):
            if (site := site_of.get(key)) is None:
                spec[subject.layout.disk_of[key]] = subject.spec(key)
                continue
            describe = formats.describe if compressed else formats.describe_dense
            parts = describe(site.group.scheme, site.rows, site.columns, subject.dtype)
            spec |= {f"{site.name}.{suffix}": part for suffix, part in parts.items()}
        shards.append(spec)
    shards[-1] |= subject.extra_specs()
    return tuple(shards)


def experts_in(subject: Subject, block: int) -> list[UnfusedExperts]:
    """The experts modules of a block."""
    prefix = subject.blocks.prefix(block)
    return [e for n, e in subject.experts.items() if n.startswith(prefix)]
