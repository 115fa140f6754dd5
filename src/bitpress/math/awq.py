"""AWQ: scale up the input channels that matter before rounding (Lin et al. 2023, arXiv 2306.00978).

Scales come from a grid x_mean^r (with `duo`: over w_mean^(1-r)), each scored by the output error after rounding,
tr(dW G dW^T) with the Gram matrix G of the inputs: where the paper runs the layers again for every candidate, this
is the same figure as algebra on statistics that are there already.

Legend: R out features, C in features, P channels of a fold, G Gram matrix (C, C), s scale, r ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from bitpress.math.grid import CHUNK, LARGE_CHUNK, Grid, QParams, Solved, dequantize, quantize
from bitpress.math.lost import solved
from bitpress.math.products import bfloat16_products
from bitpress.math.scales import find_qparams, least
from bitpress.threads import together

SMALLEST = 1e-4  # of a scale before normalization
HOPELESS, ENOUGH = 1.05, 5  # times the error to undercut: between so many points none is so much better


@dataclass(frozen=True)
class Reader:
    """A weight, or a sample of its rows, that reads the channels of a fold and will be rounded.

    Attributes:
        weight: (R, C) float32.
        grid: to which it will be rounded; None: it will not.
        observer: how its scales will be chosen: "minmax", "hessian" (weighted search), or else a plain search.
        inputs: integers to which its input will be rounded; None: it will not.
        fixed: whether those have one scale for all tokens.
    """

    weight: Tensor
    grid: Grid | None
    observer: str = "minmax"
    inputs: Grid | None = None
    fixed: bool = False


@bfloat16_products(True)
def best_scale(
    readers: Sequence[Reader],
    gram: Tensor,
    columns: Tensor,
    curves: Sequence[Sequence[Tensor]],
    margin: float = 0.0,
) -> Tensor:
    """The scale with the least output error after rounding; scale 1 is always among those that are tried.

    Along a curve the error falls and rises again but for small waves, so every fourth point is tried, then those
    two and one steps beside the best: as good a scale as the whole grid gives, for less than half of the work. A curve
    whose first points are all far above what is to be undercut is given up.

    Args:
        readers: the weights that read the fold's channels.
        gram: (C, C) of their common input.
        columns: (C,) channel of each input column.
        curves: scales (P,) in the order of their ratio, see `candidates`.
        margin: share of the error at scale 1 by which another must lower it.
    """
    small = gram.device.type == "cpu" and sum(r.weight.numel() for r in readers) <= CHUNK
    best = torch.ones(int(columns.max()) + 1, device=columns.device)
    smallest = (1 - margin) * float(rounding_error(readers, gram, None))
    for curve in curves:
        errors: dict[int, float] = {}
        for step in (4, 2, 1):
            if len(errors) >= ENOUGH and min(errors.values()) > HOPELESS * smallest:
                break
            lowest = min(errors, key=errors.__getitem__) if errors else None
            near = range(0, len(curve), 4) if lowest is None else (lowest - step, lowest + step)
            tried = [i for i in near if 0 <= i < len(curve) and i not in errors]
            tasks = [partial(rounding_error, readers, gram, curve[i][columns]) for i in tried]
            found = together(tasks) if small else [task() for task in tasks]
            errors |= zip(tried, torch.stack(found).tolist() if found else [], strict=True)
        lowest = min(errors, key=errors.__getitem__)
        if errors[lowest] < smallest:
            best, smallest = curve[lowest], errors[lowest]
    return best


def rounding_error(readers: Sequence[Reader], gram: Tensor, s: Tensor | None) -> Tensor:
    """Sum over the weights of tr(dW G dW^T) with dW = round(W s) / s - W, for column scales s (C,); None: all 1."""
    total = torch.zeros((), device=gram.device)
    diagonal = gram.diagonal() if s is None else gram.diagonal() / s.square()
    for reader in readers:
        if reader.grid is None:
            continue
        w = reader.weight if s is None else reader.weight * s
        weighted = reader.observer == "hessian"
        qparams = find_qparams(w, reader.grid, diagonal if weighted else None, search=reader.observer != "minmax")
        delta = dequantize(quantize(w, qparams, reader.grid), qparams).float().sub_(w)
        if s is not None:
            delta /= s
        total += (delta @ gram).mul_(delta).sum()
    return total


def candidates(x_mean: Tensor, w_mean: Tensor, *, duo: bool | str, n_grid: int) -> list[list[Tensor]]:
    """Curves of scales s = x_mean^r / w_mean^(1-r), or x_mean^r, for ratios r = 0, 1/n, ..., 1; normalized.

    Args:
        x_mean: (P,) mean absolute input of each channel.
        w_mean: (P,) mean share of their groups' largest weight that its weights take, see `relative_weight`.
        duo: True: both in one curve; False: activations alone; "both": a curve of each, with half of the steps.
        n_grid: steps from r = 0 to r = 1.
    """
    kinds = [True, False] if duo == "both" else [bool(duo)]
    points = max(1, n_grid // len(kinds))
    curves = []
    for kind in kinds:
        curve = []
        for i in range(points + 1):
            r = i / points
            s = x_mean.float().clamp(min=SMALLEST) ** r
            if kind:
                s = s / (w_mean.float() ** (1 - r) + SMALLEST)
            curve.append(normalized(s, x_mean > 0))
        curves.append(curve)
    return curves


def normalized(s: Tensor, live: Tensor) -> Tensor:
    """A scale with geometric mean 1 over the live channels; the others get 1.

    The paper divides by sqrt(max min); any common factor gives the same rounding but for that of the stored scales.
    """
    if not live.any():
        return torch.ones_like(s)
    log = s.clamp(min=SMALLEST).log()
    return torch.where(live, (log - log[live].mean()).exp(), 1.0)


def relative_weight(readers: Sequence[Reader]) -> Tensor:
    """(C,) mean over all rows of |w| as a share of the largest weight of its group."""
    shares, rows = [], 0
    for reader in readers:
        R, C = reader.weight.shape
        G = 1 if reader.grid is None else reader.grid.groups(C)
        a = reader.weight.abs().reshape(R, G, C // G)
        shares.append((a / a.amax(-1, keepdim=True).clamp(min=1e-30)).reshape(R, C).sum(0))
        rows += R
    return torch.stack(shares).sum(0) / rows


def clipped(weights: Sequence[Tensor], grid: Grid, gram: Tensor) -> list[Solved]:
    """Round to nearest with each group's range shrunk to the share, of `grid.shares`, that errs least in the output.

    A group's error is dw G_gg dw^T with its own block of the Gram matrix: what the paper measures on samples.

    Args:
        weights: each (R_i, C) float32; on a fused grid they share what must be shared, see `scales.find_all`.
        gram: (C, C) of their input.
    """
    if grid.fused and len(weights) > 1:
        (both,) = clipped([torch.cat(list(weights))], grid, gram)
        ends = list(accumulate(len(w) for w in weights))
        parts = [both.quantized[1].rows(end - len(w), end) for w, end in zip(weights, ends, strict=True)]
        return [solved(w, quantize(w, q, grid), q, gram) for w, q in zip(weights, parts, strict=True)]
    G = grid.groups(len(gram))
    blocks = torch.stack(
        [part[:, at] for part, at in zip(gram.chunk(G), torch.arange(len(gram)).chunk(G), strict=True)]
    )
    out = []
    for w in weights:
        tried = [find_qparams(w, grid, share=share) for share in grid.shares]
        qparams = least(tried, [_group_errors(w, q, grid, blocks) for q in tried], grid)
        out.append(solved(w, quantize(w, qparams, grid), qparams, gram))
    return out


def _group_errors(weight: Tensor, qparams: QParams, grid: Grid, blocks: Tensor) -> Tensor:
    """dw G_gg dw^T of each row and group (R, G), with the Gram matrix's diagonal blocks (G, C/G, C/G)."""
    R, C = weight.shape
    G, size, _ = blocks.shape
    out = torch.empty(R, G, device=weight.device)
    step = max(1, (LARGE_CHUNK if weight.device.type == "cuda" else CHUNK) // C)
    for lo in range(0, R, step):
        w, q = weight[lo : lo + step], qparams.rows(lo, lo + step)
        delta = dequantize(quantize(w, q, grid), q).float().sub_(w).reshape(-1, G, size).transpose(0, 1)
        out[lo : lo + step] = (delta @ blocks).mul_(delta).sum(-1).T
    return out
