"""Better codes for fixed scales: coordinate descent on the output error (Behdin et al. 2023, arXiv 2309.01885).

A sweep leaves each column as it was when its turn came; here every column is rounded again, given all the others.
It matters most where weights are pruned: the sweep's compensation counts on weights that are to become zero.

Legend: R out features, C in features, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.math.grid import Grid, QParams, values_of
from bitpress.math.products import product
from bitpress.math.sweep import Rounding, batched, by_columns, transposed, walk


def descend(
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    qparams: QParams,
    groups: Tensor,
    grid: Grid,
    block_size: int,
    *,
    passes: int,
    keep: Tensor | None = None,
) -> Tensor:
    """Round each column to what is best given the others, several times over; tr(dW H dW^T) never rises.

    Every tensor may have a dimension of problems before those named; on a GPU they are solved together.

    Args:
        weight: (R, C) float32, the target; not modified.
        codes: (R, C) to start from.
        hessian: H (C, C), positive definite.
        qparams: scale and zero point (R, G).
        groups: (C,) int64, the group of each column.
        grid: the target grid.
        block_size: columns between two updates of all the later columns.
        passes: how often all columns are visited.
        keep: (R, C) bool, the weights that are not zero and stay so.

    Returns:
        codes (R, C).
    """
    if weight.device.type == "cuda":
        return descend_by_kernel(weight, codes, hessian, qparams, groups, grid, passes=passes, keep=keep)
    if weight.dim() == 3:
        return torch.stack([
            descend(w, codes[e], hessian[e], qparams.of(e), groups[e], grid, block_size, passes=passes,
                    keep=None if keep is None else keep[e])
            for e, w in enumerate(weight)
        ])  # fmt: skip
    rounding = Rounding.of(qparams, groups, grid, keep)
    target, result = weight.T.contiguous(), by_columns(codes)
    dense = torch.empty_like(target)
    for j in range(len(result)):
        rounding.read(j, result[j], dense[j])
    steps = (1 / hessian.diagonal()).tolist() if hessian.device.type == "cpu" else list(1 / hessian.diagonal())
    q = torch.empty_like(target[0])

    for _ in range(passes):
        gradient = hessian @ (target - dense)

        def project(j: int, error: Tensor, gradient: Tensor = gradient) -> None:
            torch.add(dense[j], gradient[j], alpha=steps[j], out=error)
            rounding.project(j, error, result[j], q)
            torch.sub(q, dense[j], out=error)
            dense[j] = q

        walk(gradient, hessian, project, block_size)
    return result.T.contiguous()


def descend_by_kernel(
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    qparams: QParams,
    groups: Tensor,
    grid: Grid,
    *,
    passes: int,
    keep: Tensor | None = None,
) -> Tensor:
    """`descend` by `bitpress.math.kernels.columns`, whose blocks have a width of their own."""
    from bitpress.math.kernels import columns

    C = weight.shape[-1]
    scale, zero, kept = (batched(t) for t in transposed(qparams, keep))
    assert scale is not None
    hessian, groups, values = hessian.reshape(-1, C, C), groups.reshape(-1, C), batched(values_of(by_columns(codes)))
    of_columns = groups[..., None].expand_as(values)
    dense = (values if zero is None else values - zero.gather(1, of_columns)) * scale.gather(1, of_columns)
    target, steps = batched(weight.mT), 1 / hessian.diagonal(dim1=1, dim2=2)
    for _ in range(passes):
        values = columns.walk(product(hessian, target - dense), hessian, scale, zero, groups, grid, steps, kept, dense)
    return grid.codes(values).reshape(weight.mT.shape).mT.contiguous()
