"""A training stage held against a model: whose zeros are kept, what is trained with its rounding, what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bitpress import formats
from bitpress.budget import available, gib, space_fault
from bitpress.checkpoint import file_size
from bitpress.clients import client_notes
from bitpress.errors import PlanError
from bitpress.formatplan import (
    format_faults,
    left_dense,
    model_faults,
    specs_of_shards,
    stored_as,
    stored_in,
)
from bitpress.modifiers.base import names
from bitpress.modifiers.pruning import ConstantPruningModifier
from bitpress.modifiers.quantization import QuantizationModifier
from bitpress.plan import Plan, quantized_before
from bitpress.sites import Site, brief, dense_site, disk_module, find_sites, label, linears_of, misfits, stored_by_mask
from bitpress.subject import Subject
from bitpress.targets import LinearName, resolve
from bitpress.training.arguments import PRECISIONS
from bitpress.training.masks import SMALL

MOMENTS = 3  # gradients and Adam's two moments, beside the weights


def make(
    modifiers: Sequence[Any],
    subject: Subject,
    *,
    samples: int,
    length: int,
    device: torch.device,
    output: Path | None = None,
    compressed: bool = True,
    inherited: Sequence[Site] = (),
    precision: str = "auto",
    stored: str = formats.DEFAULT,
) -> Plan:
    """The plan of a training stage.

    Args:
        samples, length, device, output, compressed, inherited, stored: see `bitpress.plan.make`.
        precision: dtype of the weights while training, see `bitpress.training.arguments`.

    Raises:
        PlanError: all faults of the stage.
    """
    faults = [
        f"{type(m).__name__}: runs in one shot, not in a training stage; give it a stage of its own. In training: "
        "ConstantPruningModifier keeps zeros, QuantizationModifier rounds while training"
        for m in modifiers
        if not m.trains
    ]
    masked, more, notes = find_masked([m for m in modifiers if isinstance(m, ConstantPruningModifier)], subject)
    faults += more
    quantizers = [m for m in modifiers if isinstance(m, QuantizationModifier)]
    sites, more, added = find_sites(quantizers, subject)
    faults += more + misfits(sites, subject)
    stored, more = stored_as(stored, quantizers, inherited)
    sites = stored_in(stored, sites)
    notes += added + more + client_notes(subject, sites, [], stored)
    ignored = left_dense(subject, {s.module for s in sites})
    faults += model_faults(stored, subject, sites)
    faults += format_faults(stored, sites, ignored, target=None, cache=False, packed=compressed)
    faults += [f for m in quantizers if m.learn_scales for f in unlearnable(sites, m)]
    faults += [f"{type(m).__name__}.bits: schemes are chosen in a one-shot stage" for m in quantizers if m.bits]
    faults += [
        f"{type(m).__name__}.kv_cache_scheme: caches get their scales in a one-shot stage"
        for m in quantizers
        if m.kv_cache_scheme
    ]
    faults += brief(
        [
            f"{s.name}: an expert, which is not trained with its rounding yet; add it to ignore"
            for s in sites
            if s.expert is not None
        ]
    )
    if inherited:
        faults.append(
            f"{len(inherited)} linears are quantized in an earlier stage, and training would move them off their grid: "
            "train before that stage, or quantize in this one (QuantizationModifier)"
        )
    else:
        faults += quantized_before({s.module for s in sites}, inherited)
    if faults:
        raise PlanError(faults)
    if compressed and formats.CHECKPOINTS[stored].sparse:
        rounded = {s.name for s in sites}
        masked = [s if s.name in rounded else stored_by_mask(s, stored) for s in masked]
    by_mask = [s for s in masked if s.packed_24]
    shards = specs_of_shards(subject, [*sites, *by_mask], [], compressed)
    output_bytes = sum(file_size(s) for s in shards if s)
    if output is not None and (fault := space_fault(output, output_bytes)):
        raise PlanError(fault)
    item = training_dtype(precision, subject, device).itemsize
    weights = sum(torch.Size(subject.spec(k)[1]).numel() for k in subject.layout.disk_of)
    kept = [s.rows * s.columns for s in masked]
    held = weights * item * (1 + MOMENTS) + sum(kept) + item * sum(n for n in kept if n <= SMALL)
    notes.append(f"training: weights, gradients and Adam's moments take about {gib(held)}; activations come on top")
    on_cpu = device.type == "cpu"
    return Plan(
        sites=tuple(sites), ignored=ignored, notes=tuple(notes), shards=shards,
        output_bytes=output_bytes, host_bytes=held if on_cpu else weights * item, device_bytes=0 if on_cpu else held,
        batch_size=0, gram_bytes=0, solver_bytes=0, hidden_on="device", trains=True, masked=tuple(masked),
        stored=stored,
    )  # fmt: skip


def find_masked(
    modifiers: Sequence[ConstantPruningModifier], subject: Subject
) -> tuple[list[Site], list[str], list[str]]:
    """The linears whose zeros are kept, in the model's order; faults and notes."""
    linears = linears_of(subject)
    entries = [LinearName(tuple(dict.fromkeys((n, disk_module(subject, n)))), "Linear") for n, _ in linears]
    chosen: set[LinearName] = set()
    faults: list[str] = []
    notes: list[str] = []
    for modifier in modifiers:
        kind = type(modifier).__name__
        found = resolve(entries, names(modifier.targets), names(modifier.ignore), kind)
        faults += found.faults
        notes += found.notes + [f"{kind}.{n}" for n in modifier.notes()]
        chosen |= set(found.linears)
    masked = [
        dense_site(subject, name, module)
        for entry, (name, module) in zip(entries, linears, strict=True)
        if entry in chosen
    ]
    return masked, faults, notes


def unlearnable(sites: Sequence[Site], modifier: QuantizationModifier) -> list[str]:
    """Schemes whose scales cannot be learned."""
    found: dict[str, None] = {}
    for site in sites:
        if site.scheme is None or site.steps[0].modifier is not modifier:
            continue
        grid = formats.grid_of(site.scheme, site.dtype)
        if grid.scales == "power of two":
            found[f"{label(site.group)}: its scales are powers of two"] = None
        elif grid.fused:
            found[f"{label(site.group)}: linears that run as one product share its scale"] = None
    return [f"QuantizationModifier.learn_scales: {why}; drop it for this scheme" for why in found]


def training_dtype(precision: str, subject: Subject, device: torch.device) -> torch.dtype:
    """The dtype that weights have while they are trained.

    Updates are small beside the weights, and bfloat16 loses most of them: "auto" is float32 where weights, gradients
    and moments take at most half of the memory that is free, else the model's own.
    """
    if precision in PRECISIONS[1:]:  # what is none of them is told elsewhere
        dtype: torch.dtype = getattr(torch, precision)
        return dtype
    weights = sum(torch.Size(subject.spec(k)[1]).numel() for k in subject.layout.disk_of)
    fits = weights * 4 * (1 + MOMENTS) <= available(device) // 2
    return torch.float32 if fits else subject.dtype
