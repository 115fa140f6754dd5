"""Several processes: reduce statistics, own sites, broadcast what was solved. One process: the identity."""

from __future__ import annotations

from bitpress.errors import PlanError
from bitpress.math.activations import OutputRange
from bitpress.math.grid import Solved
from bitpress.math.stats import InputStats


def world_size() -> int:
    """Processes of this run."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check() -> None:
    """PlanError if there are several processes, which would all write the same files."""
    if world_size() > 1:
        raise PlanError("several processes are not supported yet: start one process without torchrun")


def reduce(stats: InputStats) -> InputStats:
    """The statistics of all ranks together."""
    return stats


def reduce_range(seen: OutputRange) -> OutputRange:
    """The range on all ranks together."""
    return seen


def owner(site: str) -> bool:
    """Whether this rank solves the site."""
    return True


def broadcast(solved: list[Solved]) -> list[Solved]:
    """What the owner solved, on every rank."""
    return solved
