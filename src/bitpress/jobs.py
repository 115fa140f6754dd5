"""What is solved in one call: linears of the same steps and input, and of the same shapes on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitpress.budget import problem_bytes
from bitpress.math.stats import InputStats
from bitpress.sites import Site

# Statistics of a distinct input, module names of the linears that read it, why it saw other tokens than usual.
Input = tuple[InputStats, Sequence[str], str]


@dataclass(frozen=True)
class Job:
    """Linears with the same steps that one call of the solver takes, and what it is to know of their input."""

    sites: list[Site]
    stats: InputStats | None
    policy: str


def of_inputs(by_module: Mapping[str, Site], inputs: Sequence[Input]) -> list[Job]:
    """The jobs of linears, given by module name, whose inputs have statistics."""
    return [
        Job(part, stats, policy)
        for stats, readers, policy in inputs
        for part in _alike([by_module[m] for m in readers if m in by_module], share_input=True)
    ]


def without_data(sites: Sequence[Site]) -> list[Job]:
    """The jobs of linears that need no statistics."""
    return [Job(part, None, "") for part in _alike(sites, share_input=False)]


def _alike(sites: Sequence[Site], *, share_input: bool) -> list[list[Site]]:
    """Those that one call of the solver takes: of the same steps, and of the same input or the same scale."""
    parts: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        steps = tuple((id(s.modifier), s.claim.name, s.sparsity) for s in site.steps)
        # what must share a number is solved in one call, and nothing else with it
        parts.setdefault((steps, site.partners or ("" if share_input else site.name)), []).append(site)
    return list(parts.values())


def cost(job: Job) -> float:
    """What solving takes, about: a factor of the Gram matrix, and the sweep of each linear."""
    columns = job.sites[0].columns
    return float(columns**3 + sum(site.rows for site in job.sites) * columns**2)


def bundles_of(jobs: Sequence[Job], mine: Sequence[int], limit: int) -> list[list[int]]:
    """Of these jobs, those of the same steps and shapes together, such as experts', as many as `limit` bytes hold."""
    of_kind: dict[tuple[Any, ...], list[list[int]]] = {}
    for i in mine:
        job = jobs[i]
        steps = tuple((id(s.modifier), s.claim.name, s.sparsity) for s in job.sites[0].steps)
        shapes = tuple((s.rows, s.columns) for s in job.sites)
        rows, columns = sum(s.rows for s in job.sites), job.sites[0].columns
        bundles = of_kind.setdefault((steps, shapes, job.stats is None), [[]])
        if (len(bundles[-1]) + 1) * problem_bytes(rows * columns, columns) > limit and bundles[-1]:
            bundles.append([])
        bundles[-1].append(i)
    return [bundle for bundles in of_kind.values() for bundle in bundles]
