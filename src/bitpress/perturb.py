"""What surveys do to a block and put back: float32, other weights in some linears, statistics of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from bitpress import chain
from bitpress.blocks import Batch, collect
from bitpress.errors import NumericsError
from bitpress.formats import grid_of
from bitpress.math.grid import dequantize, quantize
from bitpress.math.lost import relative_error
from bitpress.math.scales import find_all
from bitpress.math.stats import InputStats
from bitpress.math.wanda import wanda
from bitpress.modifiers.quantization import SchemeGroup, SchemeModifier
from bitpress.run import Run
from bitpress.sites import Site
from bitpress.size_target import Choice, with_choice
from bitpress.subject import Subject


def statistics(
    run: Run,
    index: int | None,
    sites: Sequence[Site],
    batches: Callable[[], Iterator[Batch]],
    keep: Callable[[int, Tensor], None],
) -> Iterator[tuple[list[Site], InputStats]]:
    """Linears of a block (None: the head) that read the same input, with its statistics; as memory allows at a time.

    Args:
        batches: ids and hidden states, anew at every call.
        keep: takes the block's output for the batch of a number.
    """
    blocks, model = run.subject.blocks, run.subject.model
    by_module = {s.module: s for s in sites}
    waiting = list(by_module)
    while True:
        numbers = iter(range(1 << 62))

        def visit(batch: Batch, numbers: Iterator[int] = numbers) -> None:
            number = next(numbers)
            if index is None:
                blocks.visit_tail(batch)
            else:
                keep(number, blocks.run(index, batch))

        if waiting or index is not None:
            modules = {m: model.get_submodule(m) for m in waiting}
            got = collect(
                visit, modules, batches(), budget=run.plan.gram_bytes, needs=frozenset({"gram"}), leave_early=False
            )
            for stats, readers in got.groups:
                yield [by_module[m] for m in readers], stats
            met = {m for _, readers in got.groups for m in readers} | set(got.deferred)
            for site in (by_module[m] for m in waiting if m not in met):
                if site.expert is None:
                    raise NumericsError(f"{site.name}: never called, so it has no statistics; add it to ignore")
                # no token of the survey went to this expert: all inputs count alike
                yield [site], InputStats(torch.eye(site.columns, device=run.device), 1)
            waiting = list(got.deferred)
        if not waiting:
            return


def rounding_error(rows: Tensor, choice: Choice, stats: InputStats, site: Site) -> float:
    """Share of output energy lost by rounding some rows (r, C) to nearest with searched scales, or by halving them."""
    gram = stats.needed_gram
    if choice.pruning is not None:
        (kept,) = wanda([rows], stats, 0.5, choice.pruning.structure)
        return float(relative_error(rows, kept, gram))
    assert choice.group is not None
    grid = grid_of(choice.group.scheme, site.dtype)
    (qparams,) = find_all([rows], grid, gram.diagonal(), search=True)
    return float(relative_error(rows, dequantize(quantize(rows, qparams, grid), qparams), gram))


def solved(run: Run, choice: Choice, sites: Sequence[Site], stats: InputStats) -> dict[str, Tensor]:
    """Weights of linears that read the same input as the run's own solver leaves them, without its refinements."""
    if not sites:
        return {}
    if choice.group is None and choice.pruning is None:
        return {s.module: weight_of(run.subject.model, s.module).to(s.dtype) for s in sites}
    steps = [
        replace(step, modifier=step.modifier.quick()) if isinstance(step.modifier, SchemeModifier) else step
        for step in with_choice(sites[0], choice).steps
        if isinstance(step.claim, SchemeGroup) or choice.pruning is not None
    ]
    weights = [weight_of(run.subject.model, s.module).float() for s in sites]
    try:
        found = chain.solve(steps, weights, stats, run.subject.dtype)
    except NumericsError as error:
        raise NumericsError(f"{sites[0].name}: {error}") from None
    return {s.module: z.dense() for s, z in zip(sites, found, strict=True)}


def weight_of(model: nn.Module, module: str) -> Tensor:
    """The weight of a linear as it is now."""
    weight = model.get_submodule(module).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


@contextmanager
def installed(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, linears have other weights, given by the names of their modules."""
    before = {module: weight_of(model, module).clone() for module in weights}
    try:
        for module, weight in weights.items():
            weight_of(model, module).copy_(weight)
        yield
    finally:
        for module, weight in before.items():
            weight_of(model, module).copy_(weight)


@contextmanager
def in_float32(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within it, floating-point tensors are float32; after it, they are the very ones from before."""
    held: dict[int, tuple[Tensor, Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype != torch.float32 and not tensor.is_meta:
            held.setdefault(id(tensor), (tensor, tensor.data))
    try:
        for tensor, data in held.values():
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in held.values():
            tensor.data = data


def tensors_of(subject: Subject, block: int | None) -> list[Tensor]:
    """Parameters and buffers of a block, or (None) of what is outside the blocks."""
    model, inside = subject.model, subject.blocks.path + "."
    named = [*model.named_parameters(), *model.named_buffers()]
    if block is None:
        return [t for n, t in named if not n.startswith(inside)]
    return [t for n, t in named if n.startswith(subject.blocks.prefix(block))]


def divergence(p: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) at every position, for log p and the logits of q (B, L, V): (B, L)."""
    return (p.exp() * (p - logits.log_softmax(-1))).sum(-1)
