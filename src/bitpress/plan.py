"""A recipe held against a model: which linears are compressed how, what it will cost, and every fault at once.

Nothing is loaded here but the configuration and the headers of the weight files.
"""

from __future__ import annotations

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
from bitpress.foldplan import Use, find_smoothing, smoothed_sites
from bitpress.modifiers.base import LinearModifier, names
from bitpress.sites import Site, bits_per_weight, disk_module, find_sites, label, misfits, stored_spec
from bitpress.subject import Subject

# vLLM runs these as one matrix product, so their scheme must be one
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


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
        smoothing: of each block, the folds that are scaled before its linears are compressed.
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
    smoothing: tuple[tuple[Use, ...], ...] = ()

    @property
    def quantized(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.group is not None)

    @property
    def needs_stats(self) -> bool:
        return any(s.needs for s in self.sites)

    @property
    def last_block(self) -> int:
        """Index of the last block whose input is needed; the number of blocks means the head's; -1: none."""
        needed = [s.block for s in self.sites if s.needs]
        if any(b is None for b in needed):
            return len(self.shards) - 1
        return max((b for b in needed if b is not None), default=-1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: sites, sizes in bytes, notes."""
        return {
            "sites": [
                {
                    "name": s.name, "block": s.block, "rows": s.rows, "columns": s.columns,
                    "method": s.method, "scheme": label(s.group), "bits_per_weight": bits_per_weight(s),
                }
                for s in self.sites
            ],
            "ignored": list(self.ignored),
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
) -> Plan:
    """Hold the modifiers against the model.

    Args:
        samples, length: calibration sequences and tokens in each.
        max_memory: bytes of the device (host memory on the CPU) that the run may take.
        batch_size: sequences per forward instead of what memory allows.
        output: the folder that will be written, for the check of free space.
        compressed: pack the weights; else dense weights beside their scales.
        trust_remote_code: run code that the model brings, for a tiny copy of it.

    Raises:
        PlanError: all faults of the run.
    """
    faults = [f"{type(m).__name__}: cannot run in a one-shot stage" for m in modifiers if m.run_type != "oneshot"]
    compressing = [m for m in modifiers if isinstance(m, LinearModifier)]
    sites, more, notes = find_sites(compressing, subject)
    faults += more
    faults += _unknown_experts(subject, compressing)
    faults += misfits(sites, subject)
    smoothing = find_smoothing(modifiers, subject, sites, trust_remote_code=trust_remote_code)
    sites = smoothed_sites(sites, smoothing, subject)
    faults += smoothing.faults
    notes += smoothing.notes
    notes += _client_notes(subject, sites)
    if unknown := subject.layout.unknown:
        notes.append(
            f"{unknown[0]} (and {len(unknown) - 1} more): the model has no place for it; carried over as it is"
        )
    ignored = _ignored(subject, {s.module for s in sites if s.group is not None})
    if faults:
        raise PlanError(faults)
    shards = _shards(subject, sites, compressed)
    output_bytes = sum(file_size(s) for s in shards if s)
    memory = budget(subject, sites, samples, length, device, max_memory, batch_size)
    if output is not None and (fault := space_fault(output, output_bytes)):
        raise PlanError(fault)
    return Plan(tuple(sites), ignored, tuple(notes), shards, output_bytes, **memory, smoothing=tuple(smoothing.uses))


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


def _client_notes(subject: Subject, sites: Sequence[Site]) -> list[str]:
    notes = []
    groups = {s.group.name: s.group for s in sites if s.group is not None}.values()
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
    odd = {
        type(m).__name__
        for s in sites
        if s.group is not None and type(m := subject.model.get_submodule(s.module)) is not nn.Linear
    }
    if odd:
        notes.append(
            f"{', '.join(sorted(odd))}: transformers decompresses plain Linears only; use bitpress.transformers"
        )
    by_name = {s.module: str(s.scheme) for s in sites if s.group is not None}
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
        found[disk_module(subject, name)] = None
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
            parts = stored_spec(site, compressed=compressed)
            spec |= {f"{site.name}.{suffix}": part for suffix, part in parts.items()}
        shards.append(spec)
    shards[-1] |= subject.extra_specs()
    return tuple(shards)


def experts_in(subject: Subject, block: int) -> list[UnfusedExperts]:
    """The experts modules of a block."""
    prefix = subject.blocks.prefix(block)
    return [e for n, e in subject.experts.items() if n.startswith(prefix)]
