"""Block tuning: solved linears move a little so that their block's output comes nearer to the full-precision one.

Rounding is learned with straight-through gradients, as AutoRound does (Cheng et al. 2023, arXiv 2309.05516).
Differences to the paper: it starts from a solution (GPTQ's codes) and not from the nearest codes; a code's start lies
where its column would like to be within its cell; scales are rounded to their stored dtype in every step; what is
kept is chosen by sequences that gave no gradients. Averaging gradients before the sign is taken overfits sooner.

Legend: R out features, C in features, G groups of columns, B sequences, L tokens of each, D hidden size.
A position is a weight in units of its scale, plus the zero point: rounded, it is the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitpress.math.grid import FLOATS, Grid, Solved, binade, values_of
from bitpress.math.objective import Objective, OutputError

EDGE = 0.49  # of a cell: a start is at most so far from its code
LR = 0.003  # of positions, at 4 bits

Output = Callable[[Mapping[str, Tensor], Sequence[int]], Tensor]
Target = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Start:
    """A solved linear before it is tuned.

    Attributes:
        solved: its codes, or its dense weight.
        grid: of its codes; None if it has none.
        ideal: (R, C) float32, the weight that each code stands for, see `ideal_weight`; None: the code's own.
        keep: (R, C) bool, false where a weight is pruned and stays zero; None: nothing is.
    """

    solved: Solved
    grid: Grid | None
    ideal: Tensor | None = None
    keep: Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """How to tune.

    Attributes:
        iters: gradient steps.
        batch_size: sequences in each.
        lr: of positions, in cells a step, at the first step; it falls to 0 linearly. None: see `usual_lr`.
        scale_lr: of scales, as a share of them.
        weight_lr: of weights that have no codes, as a share of their row's root mean square.
        holdout: share of the sequences that give no gradients and choose what is kept.
        checks: how often they are looked at.
        seed: of the order of sequences.
    """

    iters: int = 200
    batch_size: int = 4
    lr: float | None = None
    scale_lr: float = 0.001
    weight_lr: float = 0.001
    holdout: float = 0.125
    checks: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """What tuning gave.

    Attributes:
        solved: by name; `error` is that of the start.
        before, after: the loss on the sequences held out, see `bitpress.math.objective`.
        step: after how many steps it was best; 0: the start is kept.
    """

    solved: dict[str, Solved]
    before: float
    after: float
    step: int


def usual_lr(grid: Grid) -> float:
    """The learning rate of positions: the same part of the range of codes for integers of every width.

    Of 0.003 to 0.024 at 2 bits 0.012 was best on unseen text, of 0.0015 and 0.003 at 4 bits the latter.
    """
    return LR * 2.0 ** (4 - grid.bits) if grid.values == "int" else LR


def ideal_weight(weight: Tensor, solved: Solved, gram: Tensor | None) -> Tensor:
    """What each weight would best be if all others of its row stay as they are solved, (R, C) float32.

    The least of tr(dW G dW^T) along one coordinate: w_j - (dW G)_j / G_jj. Without a Gram matrix, or where an input
    is always zero, the weight that was given.

    Args:
        weight: (R, C) float32 before it was solved.
        gram: (C, C) float32.
    """
    dense = solved.dense().float()
    if gram is None:
        return weight
    diagonal = gram.diagonal()
    pull = ((dense - weight) @ gram) / torch.where(diagonal > 0, diagonal, 1.0)
    return torch.where(diagonal > 0, dense - pull, weight)


def tune(
    starts: Mapping[str, Start],
    output: Output,
    target: Target,
    lengths: Sequence[int],
    settings: Settings,
    said: Callable[[float], None] = lambda done: None,
    objective: Objective | None = None,
) -> Tuned:
    """Tune the linears of one block together.

    Args:
        starts: by the name of the weight.
        output: the block's output (B, L, D) for the sequences of some indices, given weights by name in place of
            the block's own.
        target: the output that is wanted, alike.
        lengths: tokens of each sequence; those of one step are of one length.
        settings: see there.
        said: is told after every step how far it is, from 0 to 1.
        objective: what is lowered. Default: the error of the output.

    Returns:
        Never worse than the start on the sequences that are held out.
    """
    objective = objective or OutputError()
    held, given = _split(len(lengths), settings)
    variables = {name: _variable(start) for name, start in starts.items()}

    def loss() -> float:
        with torch.no_grad():
            weights = {name: v.dense() for name, v in variables.items()}
            lost = kept = torch.zeros((), dtype=torch.float64)
            for picked in _batches(held, lengths, settings.batch_size):
                more, over = objective.lost(output(weights, picked), target(picked))
                lost, kept = lost + more, kept + over
        return float(lost / kept.clamp(min=1e-30))

    before = best = loss()
    step_kept, snapshot = 0, None
    orders = _steps(given, lengths, settings)
    marks = {round(settings.iters * (k + 1) / settings.checks) for k in range(settings.checks)}
    for step in range(settings.iters):
        left = 1 - step / settings.iters
        picked = next(orders)
        weights = {name: v.dense().requires_grad_() for name, v in variables.items()}
        got = output(weights, picked)
        slope = objective.slope(got.detach(), target(picked))
        gradients = torch.autograd.grad(got, list(weights.values()), slope, allow_unused=True)
        for variable, gradient in zip(variables.values(), gradients, strict=True):
            if gradient is not None:  # an expert that no token was sent to
                variable.step(gradient.float(), left, settings)
        said((step + 1) / settings.iters)
        if step + 1 in marks and (now := loss()) < best:
            best, step_kept = now, step + 1
            snapshot = {name: v.solved() for name, v in variables.items()}
    return Tuned(snapshot or {name: s.solved for name, s in starts.items()}, before, best, step_kept)


def _split(count: int, settings: Settings) -> tuple[list[int], list[int]]:
    """Sequences that are held out, and those that give gradients."""
    number = min(count - 1, max(1, round(settings.holdout * count)))
    held = [int((k + 0.5) * count / number) for k in range(number)]
    return held, [i for i in range(count) if i not in set(held)]


def _batches(indices: Sequence[int], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """The indices in order, sequences of one length together."""
    by_length: dict[int, list[int]] = {}
    for i in indices:
        by_length.setdefault(lengths[i], []).append(i)
    for alike in by_length.values():
        for lo in range(0, len(alike), size):
            yield alike[lo : lo + size]


def _steps(indices: Sequence[int], lengths: Sequence[int], settings: Settings) -> Iterator[list[int]]:
    """Shuffled batches without end; every sequence is seen once before one is seen again."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(len(indices), generator=generator).tolist()
        batches = list(_batches([indices[k] for k in order], lengths, settings.batch_size))
        for k in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[k]


class _Variable:
    """A linear's weights as gradients move them."""

    def __init__(self, start: Start) -> None:
        self.start = start

    def dense(self) -> Tensor:
        """The weight (R, C) as it would be stored."""
        raise NotImplementedError

    def step(self, gradient: Tensor, left: float, settings: Settings) -> None:
        """One step; `left` is the share of the learning rates."""
        raise NotImplementedError

    def solved(self) -> Solved:
        """As it is now, sharing no memory."""
        raise NotImplementedError


class _Weights(_Variable):
    """Weights without codes: those that are kept move, the others are zero."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        stored = start.solved.dense()
        self.master, self.dtype = stored.float().clone(), stored.dtype
        count = (self.master != 0).sum(1, keepdim=True).clamp(min=1)
        self.unit = (self.master.square().sum(1, keepdim=True) / count).sqrt()

    def dense(self) -> Tensor:
        return self.master.to(self.dtype, copy=True)

    def step(self, gradient: Tensor, left: float, settings: Settings) -> None:
        if self.start.keep is not None:
            gradient = gradient * self.start.keep
        move = gradient.sign().mul_(self.unit)
        self.master.add_(move, alpha=-left * settings.weight_lr)

    def solved(self) -> Solved:
        return replace(self.start.solved, weight=self.dense())


class _Codes(_Variable):
    """Positions, rounded to codes, and scales."""

    def __init__(self, start: Start, grid: Grid) -> None:
        super().__init__(start)
        self.grid = grid
        codes, self.qparams = start.solved.quantized
        R, C = codes.shape
        G = self.qparams.scale.shape[1]
        self.shape = (R, G, C // G)
        values = values_of(codes).reshape(self.shape)
        zero = self.qparams.zero_point
        self.zero = None if zero is None else zero.float()[..., None]
        self.keep = None if start.keep is None else start.keep.reshape(self.shape)
        self.cell, self.low, self.high = _cells(values, grid)
        self.position = self._start(values)
        self.scale = self.qparams.scale.float()
        self.share = torch.ones_like(grid.once(self.scale))
        self.free = grid.scales == "free" and not grid.fused
        self.negative = self.scale < 0

    def _start(self, values: Tensor) -> Tensor:
        if self.start.ideal is None:
            return values.clone()
        position = self.start.ideal.reshape(self.shape) / self.qparams.effective()[..., None]
        if self.zero is not None:
            position += self.zero
        position = torch.minimum(torch.maximum(position, values - EDGE * self.cell), values + EDGE * self.cell)
        position.clamp_(self.low, self.high)
        same = self.grid.nearest_(position.clone()) == values  # a float's cell is not the same on both sides
        if self.keep is not None:
            same &= self.keep
        return torch.where(same, position, values)

    def _now(self) -> tuple[Tensor, Tensor]:
        """Codes as float32 (R, G, C/G) and scales (R, G) as they would be stored."""
        scale = self.qparams.scale
        if self.free:
            tiny = torch.finfo(scale.dtype).tiny
            moved = self.scale * self.grid.repeated(self.share, self.shape[0])
            scale = torch.where(self.negative, moved.clamp(max=-tiny), moved.clamp(min=tiny)).to(scale.dtype)
        return self.grid.nearest_(self.position.clone()), scale

    def dense(self) -> Tensor:
        values, scale = self._now()
        qparams = replace(self.qparams, scale=scale)
        if self.zero is not None:
            values.sub_(self.zero)
        weight = values.mul_(qparams.effective()[..., None]).add_(0.0).to(scale.dtype)
        return weight.reshape(self.shape[0], -1)

    def step(self, gradient: Tensor, left: float, settings: Settings) -> None:
        gradient = gradient.reshape(self.shape)
        if self.keep is not None:
            gradient = gradient * self.keep
        if self.free and settings.scale_lr:
            values = self.grid.nearest_(self.position.clone())
            if self.zero is not None:
                values.sub_(self.zero)
            pull = self._summed(values.mul_(gradient).sum(-1) * self.scale)
            self.share.sub_(pull.sign_(), alpha=left * settings.scale_lr)
        move = gradient.sign().mul_(torch.where(self.negative, -1.0, 1.0)[..., None])
        if isinstance(self.cell, Tensor):
            move.mul_(self.cell)
        lr = usual_lr(self.grid) if settings.lr is None else settings.lr
        self.position.sub_(move, alpha=left * lr).clamp_(self.low, self.high)

    def _summed(self, x: Tensor) -> Tensor:
        """Sums over all that shares a scale, in the shape of stored scales."""
        if self.grid.per_tensor:
            return x.sum().reshape(1)
        rows = self.grid.block_rows
        return x if rows == 1 else x.reshape(x.shape[0] // rows, rows, -1).sum(1)

    def solved(self) -> Solved:
        values, scale = self._now()
        codes = self.grid.codes(values).reshape(self.shape[0], -1)
        qparams = replace(self.qparams, scale=scale)
        return replace(self.start.solved, codes=codes, qparams=qparams)


def _cells(values: Tensor, grid: Grid) -> tuple[Tensor | float, float, float]:
    """Width of each code's cell, and the ends between which positions stay."""
    if grid.values == "int":
        return 1.0, grid.qmin - EDGE, grid.qmax + EDGE
    mantissa, least, largest = FLOATS[grid.values]
    return binade(values.contiguous()).clamp_(min=2.0**least).mul_(2.0**-mantissa), -largest, largest


def _variable(start: Start) -> _Variable:
    return _Weights(start) if start.grid is None else _Codes(start, start.grid)
