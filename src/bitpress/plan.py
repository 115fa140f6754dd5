"""A recipe held against a model: which linears are compressed how, what it will cost, and every fault at once.

Nothing is loaded here but the configuration and the headers of the weight files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpress import formats
from bitpress.checkpoint import file_size
from bitpress.errors import ConfigError, PlanError
from bitpress.experts import UnfusedExperts, fused_left
from bitpress.math.stats import GramAccumulator
from bitpress.modifiers.quantization import SchemeGroup, SchemeModifier, names
from bitpress.subject import Subject, output_head
from bitpress.targets import LinearName, resolve

PROCESS_BYTES = 900 << 20  # python, torch and transformers themselves, as measured
BATCH_TOKENS = {"cpu": 8192, "cuda": 32768}
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
    """

    name: str
    module: str
    block: int | None
    rows: int
    columns: int
    modifier: SchemeModifier
    group: SchemeGroup
    expert: int | None

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


def bits_per_weight(site: Site, dtype: torch.dtype = torch.bfloat16) -> float:
    """Stored bits per weight, scales and zero points counted."""
    spec = formats.describe(site.group.scheme, site.rows, site.columns, dtype)
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
    ignored = _ignored(subject, {s.module for s in sites})
    if faults:
        raise PlanError(faults)
    shards = _shards(subject, sites, compressed)
    output_bytes = sum(file_size(s) for s in shards if s)
    memory = _memory(subject, sites, samples, length, device, max_memory, batch_size)
    if output is not None and (fault := _space(output, output_bytes)):
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
    for modifier in modifiers:
        kind = type(modifier).__name__
        if not isinstance(modifier, SchemeModifier):
            faults.append(f"{kind}: cannot run in a one-shot stage")
            continue
        notes += [f"{kind}.{n}" for n in modifier.notes()]
        mine: dict[str, Site] = {}
        for group in modifier.groups():
            chosen = resolve(entries, group.targets, names(modifier.ignore), kind)
            faults += chosen.faults
            notes += [n for n in chosen.notes if n not in notes and "lm_head" not in n]
            for entry in chosen.linears:
                name, module = back[entry]
                if name in mine:
                    continue  # the first group that names a linear has it
                if not name.startswith(inside) and name != head:
                    notes.append(f"{name}: outside the decoder blocks, stays as it is")
                    continue
                rest = name.removeprefix(inside)
                block = int(rest.split(".")[0]) if name.startswith(inside) else None
                mine[name] = Site(
                    _disk_module(subject, name), name, block, module.out_features, module.in_features,
                    modifier, group, _expert_of(subject, name),
                )  # fmt: skip
        twice = {name: type(claimed[name].modifier).__name__ for name in mine if name in claimed}
        faults += _brief(
            [f"{n}: claimed by {other} and by {kind}; add it to the ignore list of one" for n, other in twice.items()]
        )
        claimed |= mine
    order = {name: i for i, (name, _) in enumerate(linears)}
    return sorted(claimed.values(), key=lambda s: order[s.module]), faults, notes


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


def _misfits(sites: Iterable[Site], subject: Subject) -> list[str]:
    found = []
    head = _head_name(subject)
    for site in sites:
        size = site.group.scheme.weights.group_size
        if size and site.columns % size:
            tries = ", ".join(str(n) for n in near_divisors(site.columns, size))
            found.append(
                f"{site.name}: {site.columns} input columns are not divisible by group_size {size} (try {tries})"
            )
        if site.module == head and subject.tied:
            found.append(f"{site.name}: tied to the input embedding, so it cannot be quantized alone; add it to ignore")
        elif site.key not in subject.layout.disk_of:
            found.append(f"{site.name}: has no weight of its own in the checkpoint; add it to ignore")
    return _brief(found)


def _brief(found: list[str]) -> list[str]:
    """Of faults that differ in the block's number alone, the first and a count."""
    import re

    kinds: dict[str, list[str]] = {}
    for fault in found:
        where, _, what = fault.partition(":")
        kinds.setdefault(re.sub(r"\d+", "#", where) + what, []).append(fault)
    return [same[0] if len(same) == 1 else f"{same[0]} [and {len(same) - 1} layers alike]" for same in kinds.values()]


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
    by_name = {s.module: s.group.scheme for s in sites}
    every = {s.module for s in sites}
    split = []
    for site in sites:
        parent, _, leaf = site.module.rpartition(".")
        for partners in FUSED:
            if leaf == partners[0]:
                schemes = {str(by_name.get(f"{parent}.{p}")) for p in partners if f"{parent}.{p}" in every}
                missing = any(f"{parent}.{p}" not in every for p in partners[1:])
                if len(schemes) > 1 or missing:
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


def _memory(
    subject: Subject,
    sites: Sequence[Site],
    samples: int,
    length: int,
    device: torch.device,
    max_memory: int | None,
    batch_size: int | None,
) -> dict[str, Any]:
    """Batch size, budgets and expected peaks, all from shapes."""
    item = subject.dtype.itemsize
    sizes = [_bytes(subject, subject.blocks.prefix(i)) for i in range(len(subject.blocks))]
    outside, block = _bytes(subject, None), max(sizes)
    config = subject.config.get_text_config() if hasattr(subject.config, "get_text_config") else subject.config
    width = int(config.hidden_size)
    runs = any(s.modifier.needs_stats for s in sites)
    hidden = samples * length * width * item if runs else 0
    widest = max((max(s.rows, s.columns) for s in sites), default=width)
    # one sequence's live activations in a block, and the float32 copy of the widest input for its Gram matrix
    sequence = length * (item * (6 * width + 3 * widest) + 4 * widest)
    largest = max((s.rows * s.columns for s in sites), default=0)
    stacked = max((sum(t.rows for t in sites if (t.block, t.columns) == (s.block, s.columns)) for s in sites[:64]),
                  default=0)  # fmt: skip
    solver = 4 * 6 * max(largest, min(stacked * max((s.columns for s in sites), default=0), 4 * largest))
    grams = sorted((GramAccumulator.nbytes(s.columns) for s in sites if s.modifier.needs_stats), reverse=True)
    least_gram = 3 * grams[0] if grams else 0
    on_cpu = device.type == "cpu"
    available = _available(device)
    limit = max_memory or int(0.8 * available)
    base = PROCESS_BYTES if on_cpu else 0
    fixed = base + outside + 2 * block + solver + least_gram
    if fixed + sequence > limit:
        raise PlanError(
            f"one block needs {gib(fixed + sequence)} but the limit is {gib(limit)}: raise --max-memory"
            + ("" if max_memory else " or free memory")
        )
    if batch_size is None:
        by_memory = (limit - fixed) // (4 * sequence)
        batch_size = int(max(1, min(samples, BATCH_TOKENS[device.type] // length, by_memory)))
    room = limit - fixed - batch_size * sequence
    if hidden <= room // 2:
        where = "device"
    elif not on_cpu and hidden <= int(0.6 * _available(torch.device("cpu"))):
        where = "host"
    else:
        where = "disk"
    gram_room = room - (hidden if where == "device" else 0)
    gram_bytes = max(grams[0] if grams else 0, min(sum(grams), gram_room))
    device_bytes = (
        fixed + batch_size * sequence + (hidden if where == "device" else 0) + min(sum(set(grams)), gram_bytes)
    )
    host = device_bytes if on_cpu else PROCESS_BYTES + outside + 3 * block + (hidden if where == "host" else 0)
    return {
        "host_bytes": host, "device_bytes": 0 if on_cpu else device_bytes, "batch_size": batch_size,
        "gram_bytes": gram_bytes, "hidden_on": where,
    }  # fmt: skip


def _bytes(subject: Subject, prefix: str | None) -> int:
    """Bytes of a block, or of all outside the blocks, when loaded."""
    return sum(torch.Size(subject.spec(k)[1]).numel() * subject.dtype.itemsize for k in subject.keys(prefix))


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _space(output: Path, needed: int) -> str | None:
    """What is wrong with the disk, if anything."""
    place = output.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + (64 << 20):
        return f"{output}: the output takes {gib(needed)}, but only {gib(free)} are free there: choose another disk"
    return None


def gib(n: int | float) -> str:
    """Bytes for people: `1.25 GiB`, `93.4 MiB`."""
    return f"{n / (1 << 30):.2f} GiB" if n >= 1 << 30 else f"{n / (1 << 20):.1f} MiB"


def parse_bytes(text: str | int | None) -> int | None:
    """`8GiB`, `500MB`, `2e9` or a number of bytes; ConfigError if it is none of these."""
    import re

    if text is None:
        return None
    units = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
    units |= {f"{k}i": 1024 ** (i + 1) for i, k in enumerate("kmgt")}
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e\d{1,2})?)\s*([kmgt]?i?)b?\s*", str(text).lower())
    size = int(float(found.group(1)) * units[found.group(2)]) if found and found.group(2) in units else 0
    if size < 1:
        raise ConfigError(f"max_memory: '{text}' is not a size; write for example 8GiB, 500MB")
    return size


def experts_in(subject: Subject, block: int) -> list[UnfusedExperts]:
    """The experts modules of a block."""
    prefix = subject.blocks.prefix(block)
    return [e for n, e in subject.experts.items() if n.startswith(prefix)]
