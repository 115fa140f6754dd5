"""What a run costs in memory and disk, from shapes alone, and what follows: batch size, where hidden states go."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitpress import ranks
from bitpress.errors import ConfigError, PlanError
from bitpress.math.objective import AT_ONCE
from bitpress.math.products import without_instructions
from bitpress.math.stats import StatsAccumulator
from bitpress.subject import Subject
from bitpress.threads import workers

if TYPE_CHECKING:
    from bitpress.sites import Site

PROCESS_BYTES = 900 << 20  # python, torch and transformers themselves, as measured
DEVICE_BYTES = 1 << 30  # of a GPU: workspaces of the libraries, a chunk of the scale refit, a shard's pieces
EXPERT_BATCHES = 4  # times as many on a GPU where experts share them
TOGETHER = 4 << 30  # bytes, beyond what one needs, for problems that a GPU solves together
SMALL = 1 << 21  # weights; larger linears are solved one at a time: each keeps all cores busy, and takes memory
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}  # on the CPU 8192 are not faster, and take 130 MB more


def budget(
    subject: Subject,
    sites: Sequence[Site],
    samples: int,
    length: int,
    device: torch.device,
    max_memory: int | None,
    batch_size: int | None,
    *,
    runs: bool = False,
    surveys: bool = False,
    one_forward: bool = False,
    beside: bool = False,
) -> dict[str, Any]:
    """Batch size, budgets and expected peaks, all from shapes.

    Args:
        runs: the model is run even if no site needs it.
        surveys: a survey comes first, in float32.
        one_forward: of each block; of one with experts it needs room for their output beside their input.
        beside: linears may be solved while the next block runs, if a GPU has the memory.
    """
    from bitpress.sites import full_every

    item = subject.dtype.itemsize
    sizes = [_bytes(subject, subject.blocks.prefix(i)) for i in range(len(subject.blocks))]
    copies = 1 + 4 // item if surveys and item < 4 else 1  # in float32, beside what it was
    outside, block = copies * _bytes(subject, None), copies * max(sizes)
    config = subject.config.get_text_config() if hasattr(subject.config, "get_text_config") else subject.config
    width = int(config.hidden_size)
    runs = runs or any(s.needs for s in sites)
    sequence_states = length * width * item if runs else 0
    every = full_every(sites)  # of that many batches the uncompressed model's too, before and after a block
    hidden = samples * sequence_states
    hidden += 2 * hidden // every if every else 0
    widest = max((max(s.rows, s.columns) for s in sites), default=width)
    # one sequence's live activations in a block, and the float32 copy of the widest input for its Gram matrix
    sequence = length * ((4 if surveys else item) * (6 * width + 3 * widest) + 4 * widest)
    if device.type == "cpu" and without_instructions(subject.dtype):  # a product's factors and result in float32
        sequence += length * 4 * (width + widest)
    solver = _solver_bytes(sites, device)
    least_gram, all_grams = _statistics_bytes(sites, surveys=surveys)
    more_grams = all_grams - least_gram
    on_cpu = device.type == "cpu"
    free = available(device)
    limit = max_memory or int(0.8 * free)
    base = PROCESS_BYTES if on_cpu else DEVICE_BYTES
    copies = 3 if any(s.smoothing for s in sites) else 2  # folds are tried on the block, and taken back
    tuning = tuning_bytes(sites, length, width, item, int(config.vocab_size))
    of_block = copies * block
    if not on_cpu:  # what is solved, of the block before too while it is written, and as it is read back
        solved: Counter[int | None] = Counter()
        for s in sites:
            solved[s.block] += s.rows * s.columns * (item if s.scheme is None else 1)
        of_block = max(of_block, block + 3 * max(solved.values(), default=0))
    fixed = base + outside + of_block + max(solver, tuning) + least_gram
    if fixed + sequence > limit:
        raise PlanError(
            f"one block needs {gib(fixed + sequence)} but the limit is {gib(limit)}: raise --max-memory"
            + ("" if max_memory else " or free memory")
            + (" or lower TuneModifier's batch_size" if any(s.tuning for s in sites) else "")
        )
    chosen = batch_size is None
    if batch_size is None:
        by_memory = (limit - fixed) // (4 * sequence)
        shared = not on_cpu and any(s.expert is not None for s in sites)
        tokens = BATCH_TOKENS[device.type] * (EXPERT_BATCHES if shared else 1)
        batch_size = int(max(1, min(samples, tokens // length, by_memory)))
    room = limit - fixed - batch_size * sequence
    where, pinned = "device", 0
    if hidden > max(room // 2, room - more_grams):
        where = "disk"
        if not on_cpu:
            even = 1 << (batch_size.bit_length() - 1)  # pinned memory is had in powers of two
            pinned = _pinned(sequence_states, samples, batch_size, every)
            if chosen and (less := _pinned(sequence_states, samples, even, every)) < pinned:
                batch_size, pinned = even, less
            where = "host" if pinned <= int(0.6 * available(torch.device("cpu"))) else "disk"
    on_device = hidden if where == "device" else 0
    room = limit - fixed - batch_size * sequence
    gram_bytes = least_gram + max(0, min(more_grams, room - on_device))
    device_bytes = fixed - least_gram + batch_size * sequence + on_device + gram_bytes
    spare = one_forward and where == "device" and any(s.expert is not None for s in sites)
    spare = spare and device_bytes + hidden <= limit
    device_bytes += hidden * spare
    twice = block + gram_bytes  # of a block that is solved, beside the next one's
    beside = beside and not on_cpu and ranks.world_size() == 1 and device_bytes + twice <= limit
    device_bytes += twice * beside
    ahead = not on_cpu and subject.streamed and device_bytes + block <= limit
    device_bytes += block * ahead
    host = device_bytes if on_cpu else PROCESS_BYTES + outside + 4 * block + (pinned if where == "host" else 0)
    # what is left besides may hold more linears at once than the largest that must fit
    together = solver + max(0, min(TOGETHER, limit - device_bytes))
    return {
        "host_bytes": host, "device_bytes": 0 if on_cpu else device_bytes, "batch_size": batch_size,
        "gram_bytes": gram_bytes, "solver_bytes": together, "hidden_on": where, "spare_hidden": spare,
        "solves_beside": beside, "copies_ahead": ahead,
    }  # fmt: skip


def _statistics_bytes(sites: Sequence[Site], *, surveys: bool) -> tuple[int, int]:
    """What statistics take: of the input that takes most, and of all inputs of the block that takes most, as if no two
    linears read the same. A pass gathers of each what any linear of the block needs."""
    needs: dict[int | None, frozenset[str]] = {}
    for s in sites:
        needs[s.block] = needs.get(s.block, frozenset()) | s.needs | ({"gram"} if surveys else set())
    sizes = [(s.block, StatsAccumulator.nbytes(s.columns, needs[s.block])) for s in sites if s.needs or surveys]
    of_block: Counter[int | None] = Counter()
    for block, size in sizes:
        of_block[block] += size
    return max((size for _, size in sizes), default=0), max(of_block.values(), default=0)


def _pinned(sequence: int, samples: int, batch_size: int, every: int) -> int:
    """What hidden states take in pinned memory, of `sequence` bytes each: torch rounds a batch up to a power of two."""
    batch_size = max(1, min(batch_size, samples))
    batches = -(-samples // batch_size)
    return (batches + (2 * -(-batches // every) if every else 0)) * (1 << (sequence * batch_size - 1).bit_length())


def _solver_bytes(sites: Sequence[Site], device: torch.device) -> int:
    """What GPTQ with refinement, the solver that takes most, holds at once for the linears of an input."""
    first = [s for s in sites if s.block == sites[0].block] if sites else []
    of_width: Counter[int] = Counter()
    for site in first:
        of_width[site.columns] += site.rows * site.columns
    most = 0
    for site in sites:
        largest = site.rows * site.columns
        # at most: not all linears of a width read the same input
        weights = max(largest, min(of_width[site.columns], 4 * largest))
        most = max(most, problem_bytes(weights, site.columns if site.needs else 0))
    beside = 0 if device.type == "cuda" else min(sum(s.rows * s.columns for s in first), workers() * SMALL)
    return max(most, 4 * 10 * beside)


def problem_bytes(weights: int, columns: int) -> int:
    """What a solver holds for so many weights of one input of so many columns: while H is factored, and later."""
    return 4 * max(3 * weights + 8 * columns**2, 10 * weights + 6 * columns**2)


def tuning_bytes(sites: Sequence[Site], length: int, width: int, item: int, vocabulary: int) -> int:
    """What tuning a block takes: copies of its weights, Gram matrices that wait for it, activations for gradients, and
    behind the last block predictions: of both models in the model's dtype and float32, their logarithms, slopes."""
    tuned: dict[int | None, list[Site]] = {}
    for site in sites:
        if site.tuning is not None:
            tuned.setdefault(site.block, []).append(site)
    if not tuned:
        return 0
    # positions, what they start from and what a step makes of them, in float32; weights and gradients in the model's
    each = 5 * 4 + 3 * item
    kept = max(sum(each * s.rows * s.columns + 4 * s.columns**2 for s in of_block) for of_block in tuned.values())
    modifier = next(s.tuning for s in sites if s.tuning is not None)
    widest = max(max(s.rows, s.columns) for of_block in tuned.values() for s in of_block)
    if modifier.last_block_loss == "kl":
        kept += AT_ONCE * vocabulary * 8 * 4
    return kept + modifier.batch_size * length * (item * 8 * widest + (12 * item + 16) * width)


def _bytes(subject: Subject, prefix: str | None) -> int:
    """Bytes of a block, or of all outside the blocks, when loaded."""
    return sum(torch.Size(subject.spec(k)[1]).numel() * subject.dtype.itemsize for k in subject.keys(prefix))


def available(device: torch.device) -> int:
    """Free bytes of a device, or of the host."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return (int(line.split()[1]) << 10) // ranks.local(device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def space_fault(output: Path, needed: int) -> str | None:
    """What is wrong with the disk, if anything."""
    place = output.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + (64 << 20):
        return f"{output}: the output takes {gib(needed)}, but only {gib(free)} are free there: choose another disk"
    return None


def gib(n: int | float) -> str:
    """Bytes of memory or disk for people: `1.25 GiB`, `93.4 MiB`, `1.5 KiB`."""
    if 0 < n < 1 << 20:
        return f"{n / (1 << 10):.1f} KiB"
    return f"{n / (1 << 30):.2f} GiB" if n >= 1 << 30 else f"{n / (1 << 20):.1f} MiB"


def parse_bytes(text: str | int | None) -> int | None:
    """`8GiB`, `500MB`, `2e9` or a number of bytes; ConfigError if it is none of these."""
    if text is None:
        return None
    units = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
    units |= {f"{k}i": 1024 ** (i + 1) for i, k in enumerate("kmgt")}
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e\d{1,2})?)\s*([kmgt]?i?)b?\s*", str(text).lower())
    size = int(float(found.group(1)) * units[found.group(2)]) if found and found.group(2) in units else 0
    if size < 1:
        raise ConfigError(f"max_memory: '{text}' is not a size; write for example 8GiB, 500MB")
    return size
