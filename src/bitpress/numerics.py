"""What changes the bits of a result though it is the same run: recorded in its journal, taken up again on resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress import ranks
from bitpress.errors import PlanError

if TYPE_CHECKING:
    from bitpress.plan import Plan
    from bitpress.prepare import Prepared


def numerics_of(ready: Prepared, plan: Plan) -> dict[str, Any]:
    """Of this process: batch size, threads, device and the like."""
    import torch

    from bitpress.attention import implementation
    from bitpress.math.products import kind

    config = ready.subject.config
    cuda = ready.device.type == "cuda"
    name = torch.cuda.get_device_name(ready.device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    each = len(ready.data.sequences) // ranks.world_size() if ready.data else plan.batch_size
    return {
        "processes": ranks.world_size(),
        "batch_size": max(1, min(plan.batch_size, each)) if ranks.world_size() > 1 else plan.batch_size,
        "threads": torch.get_num_threads(),
        "device": name,
        "dtype": str(ready.subject.dtype),
        "attention": implementation(config, ready.device, ready.subject.dtype),
        "products": "the dtype's" if cuda else kind(ready.subject.dtype),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "solver_bytes": plan.solver_bytes if cuda else 0,  # what a GPU solves together
        "tuned_linears": sum(s.tuning is not None for s in plan.sites),  # memory may have ruled out experts
    }


def adopt(recorded: dict[str, Any], now: dict[str, Any], output: Path) -> dict[str, Any]:
    """The recorded numerics, where this process can reproduce them."""
    fixed = ("processes", "device", "dtype", "attention", "products", "float32_matmul_precision", "tuned_linears")
    recorded = {"processes": 1, "products": "the dtype's", "solver_bytes": now["solver_bytes"], **recorded}
    if different := [f"{k} was {recorded[k]}, is {now[k]}" for k in fixed if recorded[k] != now[k]]:
        raise PlanError(f"{output}: cannot go on with the same bits: {'; '.join(different)}. Start anew with --fresh")
    return recorded


class frozen:  # noqa: N801  a context manager
    """Runs with the recorded number of threads."""

    def __init__(self, numerics: dict[str, Any]) -> None:
        self.threads = numerics["threads"]

    def __enter__(self) -> None:
        import torch

        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *exc: object) -> None:
        import torch

        torch.set_num_threads(self.before)
