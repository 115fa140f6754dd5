"""Several processes of one run, a GPU each: who they are, and what they tell each other. One process: the identity.

A launcher (torchrun, accelerate launch, Slurm, Ray) starts them; `join` makes them a group of torch.distributed.
Every process goes through the same steps on its own part of the calibration data. Sums of statistics are added up
over all, each linear is solved by one and given to the others, process 0 alone writes. What a process decides that the
others depend on goes through here, so that all of them take the same way.
"""

from __future__ import annotations

import atexit
import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from bitpress.errors import BitpressError, ConfigError, PlanError, RankError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bitpress.math.activations import OutputRange
    from bitpress.math.stats import InputStats

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # that one waits for the others: survey and solving take different times
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_cpu_group: Any = None  # for plain data and tensors in host memory
_broken = False  # another process is gone


def started() -> int:
    """Processes that the launcher says it has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def world_size() -> int:
    """Processes of this run."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    import torch.distributed as dist

    return dist.get_rank() if world_size() > 1 else 0


def first() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0


def local(device: torch.device) -> int:
    """Processes that share a device's memory: those on this machine share the host's."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size()) if device.type == "cpu" and world_size() > 1 else 1


def gpu() -> int:
    """Number of this process's GPU.

    Raises:
        ConfigError: there are fewer GPUs than processes on this machine.
    """
    import torch

    number, count = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(f"{number + 1} processes or more on this machine, but {count} GPUs: start one for each GPU")
    return number


def join(device: str) -> None:
    """Make the processes that a launcher has started one group, until they end. A group that is there is taken.

    Raises:
        ConfigError: the launcher has not said who is who, or they do not find each other.
    """
    import torch
    import torch.distributed as dist

    global _cpu_group
    if (world_size() == 1 and started() == 1) or (_cpu_group is not None and dist.is_initialized()):
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(gpu())
    if not dist.is_initialized():
        if missing := [name for name in NEEDED if name not in os.environ]:
            raise ConfigError(
                f"WORLD_SIZE says {started()} processes, but {', '.join(missing)} is not set: start with torchrun or "
                "accelerate launch, or unset WORLD_SIZE"
            )
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ConfigError(f"{started()} processes, which do not find each other: {first_line}") from error
        atexit.register(_leave)
    _cpu_group = dist.new_group(backend="gloo", timeout=TIMEOUT)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized() and not _broken:  # where another process is gone, taking leave would wait for it
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """Errors of the connection, as what they mean."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        global _broken
        _broken = True
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RankError(
            f"process {rank()} of {world_size()}: another process of this run has ended or does not answer ({cause}); "
            "start the same command again, it goes on where it was"
        ) from error


def gathered(value: T) -> list[T]:
    """The plain data of every process, in order."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with _together():
        dist.all_gather_object(found, value, group=_cpu_group)
    return found


def agreed(make: Callable[[], T]) -> T:
    """What `make` gives; if it fails on any process, all of them raise that user error.

    Raises:
        BitpressError: its own, or that of the first process that has one.
    """
    if world_size() == 1:
        return make()
    made: T | None = None
    error: BitpressError | None = None
    try:
        made = make()
    except RankError:
        raise
    except BitpressError as fault:
        error = fault
    faults = gathered(None if error is None else (type(error), error.problems))
    if error is None:
        for number, fault_of in enumerate(faults):
            if fault_of is not None:
                kind, problems = fault_of
                error = kind([f"process {number}: {problem}" for problem in problems])
                break
    if error is not None:
        error.agreed = True
        raise error
    return cast(T, made)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on process 0, which alone runs it; its user error is raised on all."""
    return share(agreed(lambda: make() if first() else cast(T, None)))


def barrier() -> None:
    """Wait for all."""
    gathered(None)


def least(*values: int) -> list[int]:
    """Of each number the least that a process has."""
    return [min(of_one) for of_one in zip(*gathered(values), strict=True)]


def same(value: Any, what: str) -> None:
    """Raises PlanError, on all processes, if they do not have the same plain data."""
    found = gathered(value)
    if different := [i for i, other in enumerate(found) if other != found[0]]:
        error = PlanError(
            f"processes 0 and {different[0]} have another {what}: give all of them the same files, data and versions"
        )
        error.agreed = True
        raise error


class _Pickler(pickle.Pickler):
    """Pickles all but tensors, which go to a list."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_id(self, thing: Any) -> int | None:
        import torch

        if not isinstance(thing, torch.Tensor):
            return None
        self.tensors.append(thing.detach())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def share(value: T, owner: int = 0) -> T:
    """A process's data on every process; tensors go from device to device, all else is pickled.

    Args:
        value: what the owner has; the others' is not looked at.
    """
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return value
    mine = rank() == owner
    tensors: list[Tensor] = []
    header: list[Any] = [None]
    if mine:
        file = io.BytesIO()
        _Pickler(file, tensors).dump(value)
        header = [(file.getvalue(), [(tuple(t.shape), t.dtype, t.device.type) for t in tensors])]
    with _together():
        dist.broadcast_object_list(header, src=owner, group=_cpu_group)
        data, specs = header[0]
        if not mine:
            tensors = [torch.empty(shape, dtype=dtype, device=kind) for shape, dtype, kind in specs]
        for tensor in tensors:
            broadcast(tensor, owner)
    return value if mine else cast(T, _Unpickler(io.BytesIO(data), tensors).load())


def broadcast(tensor: Tensor, owner: int) -> Tensor:
    """The owner's numbers in a tensor that all have; contiguous, but on the owner."""
    import torch
    import torch.distributed as dist

    if world_size() > 1 and tensor.numel():
        with _together():
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            dist.broadcast(raw, src=owner, group=_cpu_group if raw.device.type == "cpu" else None)
    return tensor


def portion(weights: Sequence[int]) -> range:
    """The part of this process of things in order, each process with at least one and about as much weight."""
    world, me = world_size(), rank()
    if world == 1:
        return range(len(weights))
    assert len(weights) >= world, "checked before"
    total, ends, reached, at = sum(weights), [0], 0, 0
    for number in range(1, world):
        least_end, most = ends[-1] + 1, len(weights) - (world - number)
        while at < most and (at < least_end or reached + weights[at] / 2 <= total * number / world):
            reached += weights[at]
            at += 1
        ends.append(at)
    ends.append(len(weights))
    return range(ends[me], ends[me + 1])


def holder(parts: Sequence[range], index: int) -> int:
    """The process that has the thing of a number."""
    return next(i for i, part in enumerate(parts) if index in part)


def owners(costs: Sequence[float]) -> list[int]:
    """Which process does each of some jobs, so that all are done at about the same time: the dearest go first."""
    busy = [0.0] * world_size()
    found = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[job] = min(range(len(busy)), key=lambda i: (busy[i], i))
        busy[found[job]] += costs[job]
    return found


Groups = list[tuple["InputStats", tuple[str, ...]]]


def reduce(groups: Groups, device: torch.device) -> Groups:
    """The statistics of distinct inputs over the tokens of all processes.

    An expert that no token of a process was sent to is in the groups of the others only.

    Args:
        groups: each with the names of those that read the input, by which it is known.
    """
    import torch

    if world_size() == 1:
        return groups
    held = {readers: _interleaved(stats) for stats, readers in groups}
    said = {readers: (s.tokens, {n: tuple(t.shape) for n, t in _sums(s).items()}) for readers, s in held.items()}
    everyone = gathered(said)
    shapes = {readers: of for one in everyone for readers, (_, of) in one.items()}
    whole: Groups = []
    for readers, of in shapes.items():
        tokens = sum(one[readers][0] for one in everyone if readers in one)
        stats = held.get(readers)
        sums = {n: _added(None if stats is None else getattr(stats, n), n, of[n], device) for n in of}
        base = stats if stats is not None else _blank()
        whole.append((replace(base, tokens=tokens, **sums), readers))
    assert all(torch.is_tensor(t) for s, _ in whole for t in _sums(s).values())
    return whole


def _interleaved(stats: InputStats) -> InputStats:
    """With rows of zeros in the sample for those of the other processes, so that samples can be summed."""
    import torch

    from bitpress.math.stats import SAMPLE

    if stats.sample is None:
        return stats
    whole = stats.sample.new_zeros(2 * SAMPLE, stats.sample.shape[1], dtype=torch.float32)
    mine = whole[rank() :: world_size()]
    step = -(-len(stats.sample) // len(mine))
    rows = stats.sample[::step]
    mine[: len(rows)] = rows
    return replace(stats, sample=whole)


def _blank() -> InputStats:
    from bitpress.math.stats import InputStats

    return InputStats(None, 0)


def _sums(stats: InputStats) -> dict[str, Tensor]:
    """The tensors among the statistics, by name."""
    found = {f.name: getattr(stats, f.name) for f in fields(stats)}
    return {name: value for name, value in found.items() if value is not None and name != "tokens"}


NEUTRAL = {"low": float("inf"), "high": float("-inf")}  # all else is a sum


def _added(mine: Tensor | None, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    import torch

    if mine is None:
        mine = torch.full(shape, NEUTRAL.get(name, 0.0), device=device)
    return _reduced(mine, {"low": "MIN", "high": "MAX"}.get(name, "SUM"))


def _reduced(tensor: Tensor, how: str) -> Tensor:
    import torch.distributed as dist

    tensor = tensor.contiguous()
    with _together():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=_cpu_group if tensor.device.type == "cpu" else None)
    return tensor


def reduce_range(seen: OutputRange) -> OutputRange:
    """The range over the tokens of all processes."""
    if world_size() == 1:
        return seen
    return replace(seen, low=_reduced(seen.low, "MIN"), high=_reduced(seen.high, "MAX"))
