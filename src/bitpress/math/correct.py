"""Targets that undo the error of the layers before (in the manner of Qronos: Zhang et al. 2025, arXiv 2505.11695).

A linear whose input has drifted from x (full precision) to y should not imitate W y but W x. Least squares gives
W' = W (X + l I) inv(Y + l I) with X = sum x y^T and Y = sum y y^T. Differences to the paper: only a share of that
correction is made, since all of it also fits what the calibration text alone has; and tokens of extreme energy, whose
few channels would decide everything, are left out of the sums (see `bitpress.math.stats`).

Legend: R out features, C in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.errors import NumericsError

DAMPENING = 0.2  # l, as a share of the mean diagonal of Y


def correction(drift: Tensor, paired: Tensor, strength: float, dampening: float = DAMPENING) -> Tensor:
    """K (C, C) float32: W + W K is the target in place of W.

    Args:
        drift: `sum (x - y) y^T`, (C, C).
        paired: `sum y y^T` of the same tokens, (C, C).
        strength: share of the correction, 0 to 1.
        dampening: see above.

    Raises:
        NumericsError: the sums are not finite, or without damping say nothing about some direction.
    """
    damped = paired.double()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(dampening * mean + (mean == 0))  # without any input there is no drift either
    factor, info = torch.linalg.cholesky_ex(damped)
    half = torch.linalg.solve_triangular(factor, drift.double().T, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.T, half, upper=True).T
    if not (torch.isfinite(solved).all() & (info == 0)):
        if torch.isfinite(paired).all() and torch.isfinite(drift).all():
            raise NumericsError("the drift of the inputs cannot be undone: their Gram matrix is singular")
        raise NumericsError("NaN or infinity in the input activations")
    return strength * solved.float()
