"""Better scales for fixed codes: joint least squares over a row's groups, under the Gram matrix.

Legend: R out features, C in features, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitpress.math.grid import CHUNK, LARGE_CHUNK, Grid, QParams, values_of
from bitpress.math.products import product

RIDGE = 1e-4  # of the mean diagonal: pulls scales that the data says nothing about to where they were
FARTHEST = 2.0  # times its old value that a scale may become


def refit_scales(weight_gram: Tensor, codes: Tensor, hessian: Tensor, qparams: QParams, grid: Grid) -> QParams:
    """The scales that minimize tr(dW H dW^T) for these codes, row by row, kept only where that falls.

    With z_g the codes less the zero point, zero outside group g, the scales s of a row w solve A s = b,
    A_gk = z_g H z_k^T, b_g = w H z_g^T. The loss of a row is s A s^T - 2 b s^T and a constant.

    Args:
        weight_gram: W H (R, C) float32, with the target W in stored order; the same in every round.
        codes: (R, C), in stored order.
        hessian: H (C, C) float32.
        qparams: scale and zero point (R, G).
        grid: of the codes. Scales that rows share, powers of two and two-level ones stay as they are.

    Returns:
        The parameters with the new scales, rounded to the stored dtype.
    """
    return refit_each([weight_gram], [codes], [hessian], [qparams], grid)[0]


def refit_each(
    weight_grams: Sequence[Tensor],
    codes: Sequence[Tensor],
    hessians: Sequence[Tensor],
    qparams: Sequence[QParams],
    grid: Grid,
) -> list[QParams]:
    """`refit_scales` of several inputs' linears of the same shapes: small systems of rows are solved together."""
    if grid.scales != "free" or grid.per_tensor or grid.block_rows > 1:
        return list(qparams)
    C, G = codes[0].shape[1], qparams[0].scale.shape[1]
    step = max(1, (LARGE_CHUNK if codes[0].device.type == "cuda" else CHUNK) // max(G * G, C))
    new: list[Tensor] = []
    waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # A, b and old scales of some rows

    def solve_waiting() -> None:
        A, b, old = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*waiting, strict=True))
        new.append(_better(A.double(), b.double(), old))
        waiting.clear()

    for weight_gram, mine, hessian, q in zip(weight_grams, codes, hessians, qparams, strict=True):
        z = values_of(mine).reshape(-1, G, C // G)
        if q.zero_point is not None:
            z = z - q.zero_point.float()[..., None]
        flat = z.reshape(-1, C)
        right = (weight_gram * flat).reshape(-1, G, C // G).sum(-1)
        for lo in range(0, len(flat), step):
            if sum(len(old) for *_, old in waiting) + min(step, len(flat) - lo) > step:
                solve_waiting()
            part = slice(lo, lo + step)
            waiting.append((_normal_matrices(flat[part], hessian, G), right[part], q.scale[part]))
    solve_waiting()
    scales = torch.split(torch.cat(new), [len(mine) for mine in codes])
    return [replace(q, scale=scale) for q, scale in zip(qparams, scales, strict=True)]


def _normal_matrices(z: Tensor, hessian: Tensor, groups: int) -> Tensor:
    """A (rows, G, G) float32 of each row of z (rows, C)."""
    R, C = z.shape
    size = C // groups
    if z.device.type == "cuda":
        from bitpress.math.kernels import pairs

        if size in pairs.SIZES:
            return pairs.normal_matrices(z, hessian, groups)
    normal = torch.empty(R, groups, groups, device=z.device)
    for g in range(groups):
        rows, columns = slice(g * size, (g + 1) * size), slice(g * size, C)  # the matrix is symmetric
        pulled = product(z[:, rows], hessian[rows, columns]).mul_(z[:, columns])
        normal[:, g, g:] = pulled.reshape(R, groups - g, size).sum(-1)
        normal[:, g + 1 :, g] = normal[:, g, g + 1 :]
    return normal


def _better(A: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Scales (rows, G) of the normal equations (float64), in the dtype of `scale`; the old ones where better."""
    old = scale.double()
    diagonal = A.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(-1, keepdim=True)
    ridge = ridge + (diagonal == 0).double()  # a group of zeros: any scale will do, so its old one
    factor, info = torch.linalg.cholesky_ex(A + torch.diag_embed(ridge))
    solved = torch.cholesky_solve((b + ridge * old)[..., None], factor)[..., 0]
    times = solved / old
    usable = (info == 0)[:, None] & (times > 1 / FARTHEST) & (times < FARTHEST)
    new = torch.where(usable, solved, old).to(scale.dtype)
    falls = _loss(A, b, new.double()) < _loss(A, b, old)
    return torch.where(falls[:, None], new, scale)


def _loss(A: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """s A s^T - 2 b s^T of each row: (rows,)."""
    pulled = torch.linalg.vecdot(A, scale[:, None, :])
    loss: Tensor = torch.linalg.vecdot(pulled - 2 * b, scale)
    return loss
