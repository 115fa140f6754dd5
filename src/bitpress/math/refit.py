"""Better scales for fixed codes: joint least squares over a row's groups, under the Gram matrix.

Legend: R out features, C in features, G groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitpress.math.grid import Grid, QParams, dequantize, values_of

CHUNK = 1 << 22  # numbers of the normal equations solved together
RIDGE = 1e-4  # of the mean diagonal: pulls scales that the data says nothing about to where they were
FARTHEST = 2.0  # times its old value that a scale may become


def refit_scales(weight: Tensor, codes: Tensor, hessian: Tensor, qparams: QParams, grid: Grid) -> QParams:
    """The scales that minimize tr(dW H dW^T) for these codes, row by row, kept only where that falls.

    With z_g the codes less the zero point, zero outside group g, the scales s of a row w solve A s = b,
    A_gk = z_g H z_k^T, b_g = w H z_g^T.

    Args:
        weight: (R, C) float32, the target, in stored order.
        codes: (R, C), in stored order.
        hessian: H (C, C) float32.
        qparams: scale and zero point (R, G).
        grid: of the codes. Scales that rows share, powers of two and two-level ones stay as they are.

    Returns:
        The parameters with the new scales, rounded to the stored dtype.
    """
    if grid.scales != "free" or grid.per_tensor or grid.block_rows > 1:
        return qparams
    R, C = weight.shape
    G = qparams.scale.shape[1]
    z = values_of(codes).reshape(R, G, C // G)
    if qparams.zero_point is not None:
        z = z - qparams.zero_point.float()[..., None]
    flat = z.reshape(R, C)
    right = ((weight @ hessian) * flat).reshape(R, G, -1).sum(-1)
    new = torch.empty(R, G, device=weight.device)
    step = max(1, CHUNK // max(G * G, C))
    for lo in range(0, R, step):
        part = slice(lo, min(lo + step, R))
        normal = torch.empty(part.stop - lo, G, G, device=weight.device)
        for g in range(G):
            columns = slice(g * (C // G), C)  # of this group and the later ones: the matrix is symmetric
            rows = slice(g * (C // G), (g + 1) * (C // G))
            product = (z[part, g] @ hessian[rows, columns]).mul_(flat[part, columns])
            normal[:, g, g:] = product.reshape(part.stop - lo, G - g, -1).sum(-1)
            normal[:, g:, g] = normal[:, g, g:]
        new[part] = _solve(normal, right[part], qparams.scale[part].float())
    old = qparams.scale.float()
    new = torch.where((new > old / FARTHEST) & (new < old * FARTHEST), new, old).to(qparams.scale.dtype)
    fitted = replace(qparams, scale=new)
    before, after = (_loss(weight, dequantize(codes, q).float(), hessian) for q in (qparams, fitted))
    return replace(qparams, scale=torch.where((after < before)[:, None], new, qparams.scale))


def _solve(normal: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """Scales (rows, G) of the normal equations, in float64."""
    A, b = normal.double(), right.double()
    diagonal = A.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(-1, keepdim=True)
    empty = (diagonal == 0).double()  # a group of zeros: any scale will do, so its old one
    A = A + torch.diag_embed(ridge + empty)
    solved, info = torch.linalg.solve_ex(A, (b + (ridge + empty) * old.double())[..., None])
    return torch.where((info == 0)[:, None], solved[..., 0], old.double()).float()


def _loss(weight: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
    """dW H dW^T of each row: (R,)."""
    delta = dense - weight
    return (delta @ hessian).mul_(delta).sum(1)
