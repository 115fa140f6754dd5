"""The steps of linears that read the same input, in order. Pure: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitpress import formats
from bitpress.errors import NumericsError
from bitpress.math.activations import static_scale
from bitpress.math.grid import Solved
from bitpress.math.lost import relative_error
from bitpress.math.masks import holds, pruned_each
from bitpress.math.scales import global_scale
from bitpress.math.stats import InputStats
from bitpress.math.sweep import IN_FLOAT64, NotDefiniteError
from bitpress.modifiers.base import PruningModifier
from bitpress.modifiers.quantization import SchemeGroup, SchemeModifier
from bitpress.schemes import Scheme
from bitpress.sites import Step

Problem = tuple[Sequence[Tensor], InputStats | None]  # weights (R_i, C) float32, statistics of their common input


def solve(
    steps: Sequence[Step], weights: Sequence[Tensor], stats: InputStats | None, dtype: torch.dtype
) -> list[Solved]:
    """Prune and quantize as the steps say.

    Args:
        steps: of all the linears alike.
        weights: each (R_i, C) float32; not modified.
        stats: of their common input; None where no step needs any.
        dtype: of stored scales, and of stored weights that are not quantized.

    Returns:
        One `Solved` a weight, its error relative to the weight that was given.

    Raises:
        NumericsError: what the steps ask cannot be computed, or a pruned weight came back.
    """
    return solve_each(steps, [(weights, stats)], dtype)[0]


def solve_each(steps: Sequence[Step], problems: Sequence[Problem], dtype: torch.dtype) -> list[list[Solved]]:
    """`solve` for several inputs whose linears have the same shapes: on a GPU, quantizers take them together."""
    current: list[Problem] = list(problems)
    notes = [""] * len(problems)
    solved: list[list[Solved]] | None = None
    for step in steps:
        modifier = step.modifier
        if not isinstance(modifier, PruningModifier):
            quantizer, group = _quantizer(step)
            solved = quantizer.solve_each(current, group, formats.grid_of(group.scheme, dtype))
            continue
        for i, (given, stats) in enumerate(current):
            pruned, note = _pruned(modifier, given, stats, step.sparsity)
            current[i], notes[i] = (pruned, stats), note or notes[i]
        if modifier.corrects:
            current = [(w, _settled(s)) for w, s in current]
    if solved is None:
        solved = [[] for _ in problems]
    stored = [
        _stored(steps, weights, pruned_weights, stats, mine, dtype)
        for (weights, _), (pruned_weights, stats), mine in zip(problems, current, solved, strict=True)
    ]
    stored = [[replace(z, note=note) if note else z for z in mine] for mine, note in zip(stored, notes, strict=True)]
    check_zeros([w for weights, _ in current for w in weights], [z for zs in stored for z in zs], steps)
    return stored


def _pruned(
    modifier: PruningModifier, weights: Sequence[Tensor], stats: InputStats | None, sparsity: float | None
) -> tuple[list[Tensor], str]:
    """Pruned weights, and a note if that took float64."""
    try:
        return modifier.prune(weights, stats, sparsity), ""
    except NotDefiniteError:
        if stats is None:
            raise
        found = modifier.prune([w.double() for w in weights], stats.double(), sparsity)
        return [w.float() for w in found], IN_FLOAT64


def _settled(stats: InputStats | None) -> InputStats | None:
    """Without the drift, or the lag, that a step has undone."""
    if stats is None:
        return stats
    drift, lag = (None if t is None else torch.zeros_like(t) for t in (stats.drift, stats.lag))
    return replace(stats, drift=drift, lag=lag)


def _stored(
    steps: Sequence[Step],
    weights: Sequence[Tensor],
    current: Sequence[Tensor],
    stats: InputStats | None,
    solved: list[Solved],
    dtype: torch.dtype,
) -> list[Solved]:
    """What is stored of each linear, checked; `current` are the weights after pruning, `solved` what was quantized."""
    group = next((s.claim for s in steps if isinstance(s.claim, SchemeGroup)), None)
    if not solved or group is None:
        solved = [Solved(None, None, torch.empty(()), weight=w.to(dtype)) for w in current]
    else:
        grid = formats.grid_of(group.scheme, dtype)
        beside = input_scales(group.scheme, stats, dtype)
        settled = [formats.settle(z, grid) for z in solved]
        # each linear stores its own copy
        solved = [replace(z, beside={**z.beside, **{n: t.clone() for n, t in beside.items()}}) for z in settled]
    gram = None if stats is None else stats.gram
    if len(steps) == 1 and group is not None and (gram is None or "gram" in _quantizer(steps[0])[0].weights_need):
        return solved
    return [replace(z, error=relative_error(w, z.dense(), gram)) for w, z in zip(weights, solved, strict=True)]


def input_scales(scheme: Scheme, stats: InputStats | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the calibration data tell about the inputs of a scheme, as the tensors `formats.describe_inputs` names.

    Raises:
        NumericsError: NaN or infinity in the inputs.
    """
    inputs = scheme.input_activations
    if inputs is None or not scheme.static_inputs:
        return {}
    assert stats is not None and stats.low is not None and stats.high is not None
    low, high = stats.low.amin().reshape(1).cpu(), stats.high.amax().reshape(1).cpu()
    if not (torch.isfinite(low) & torch.isfinite(high)).all():
        raise NumericsError("NaN or infinity in the input activations")
    if inputs.dynamic == "local":
        return {"input_global_scale": global_scale(low, high)}
    values = "int" if inputs.type == "int" else formats.FLOATS[inputs.num_bits]
    scale, zero = static_scale(low, high, values, inputs.num_bits, inputs.symmetric, dtype)
    return {"input_scale": scale} if zero is None else {"input_scale": scale, "input_zero_point": zero}


def check_zeros(before: Sequence[Tensor], after: Sequence[Solved], steps: Sequence[Step]) -> None:
    """Whether what was pruned, here or in an earlier stage, is still zero, and has its structure.

    Raises:
        NumericsError: it has not; the solver is at fault.
    """
    prunes = (step.modifier for step in steps if isinstance(step.modifier, PruningModifier) and step.sparsity)
    structures = [m.structure for m in prunes if m.structure is not None]
    fine: list[Tensor] = []
    said: list[str] = []
    for keep, z in zip(pruned_each(before), after, strict=True):
        if keep is None and not structures:
            continue
        dense = z.dense()
        if keep is not None:
            fine.append(((dense == 0) | keep).all())
            said.append("a pruned weight is no longer zero")
        fine += [holds(dense, structure) for structure in structures]
        said += [f"the weight is not {structure} after pruning" for structure in structures]
    for held, fault in zip(torch.stack(fine).tolist() if fine else [], said, strict=True):
        if not held:
            raise NumericsError(fault)


def _quantizer(step: Step) -> tuple[SchemeModifier, SchemeGroup]:
    assert isinstance(step.modifier, SchemeModifier) and isinstance(step.claim, SchemeGroup)
    return step.modifier, step.claim
