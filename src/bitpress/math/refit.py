"""Better scales for fixed codes: joint least squares over a row's groups, under the Gram matrix.

Codes and scales in turn are alternating minimization (Xu et al. 2018, arXiv 1802.00150: of the weight's own error).

Legend: R out features, C in features, G groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitpress.math.grid import CHUNK, Grid, QParams, values_of
from bitpress.math.products import product

RIDGE = 1e-4  # of the mean diagonal: pulls scales that the data says nothing about to where they were
CUDA_CHUNK = 1 << 24  # numbers of the normal equations at a time, each of which takes 36 bytes in all
FARTHEST = 2.0  # times its old value that a scale may become


def refit_scales(weight_gram: Tensor, codes: Tensor, hessian: Tensor, qparams: QParams, grid: Grid) -> QParams:
    """The scales that minimize tr(dW H dW^T) for these codes, row by row, kept only where that falls.

    With z_g the codes less the zero point, zero outside group g, the scales s of a row w solve A s = b,
    A_gk = z_g H z_k^T, b_g = w H z_g^T. The loss of a row is s A s^T - 2 b s^T and a constant.

    Every tensor may have a dimension of problems before those named.

    Args:
        weight_gram: W H (R, C) float32, with the target W in stored order; the same in every round.
        codes: (R, C), in stored order.
        hessian: H (C, C) float32.
        qparams: scale and zero point (R, G).
        grid: of the codes. Scales that rows share, powers of two and two-level ones stay as they are.

    Returns:
        The parameters with the new scales, rounded to the stored dtype.
    """
    if grid.scales != "free" or not grid.rows_alone:
        return qparams
    (R, C), G = codes.shape[-2:], qparams.scale.shape[-1]
    step = max(1, (CUDA_CHUNK if codes.device.type == "cuda" else CHUNK) // max(G * G, C))
    pulls, all_codes, hessians = (x.reshape(-1, *x.shape[-2:]) for x in (weight_gram, codes, hessian))
    old = qparams.scale.reshape(-1, R, G)
    zeros = None if qparams.zero_point is None else qparams.zero_point.reshape(-1, R, G)
    new = torch.empty_like(old)
    many = max(1, step // R)  # problems at a time: their small systems are solved in one call
    for first in range(0, len(old), many):
        for lo in range(0, R, step):
            at = slice(first, first + many), slice(lo, lo + step)
            z = values_of(all_codes[at])
            z = z.reshape(*z.shape[:2], G, C // G)
            if zeros is not None:
                z = z - zeros[at].float()[..., None]
            z = z.flatten(-2)
            b = (pulls[at] * z).reshape(*z.shape[:2], G, C // G).sum(-1)
            A = [_normal_matrices(mine, h, G) for mine, h in zip(z, hessians[at[0]], strict=True)]
            together = A[0] if len(A) == 1 else torch.cat(A)
            new[at] = _better(together.double(), b.reshape(-1, G).double(), old[at].reshape(-1, G)).reshape(b.shape)
    return replace(qparams, scale=new.reshape(qparams.scale.shape))


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
    # torch's own solve of many small systems by a factor waits for the device, and is slower everywhere
    half = torch.linalg.solve_triangular(factor, (b + ridge * old)[..., None], upper=False)
    solved = torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0]
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
