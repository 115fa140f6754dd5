"""Targets that undo the error of the layers before (in the manner of Qronos: Zhang et al. 2025, arXiv 2505.11695).

A linear whose input has drifted from x (full precision) to y should not imitate W y but W x. Least squares gives
W' = W (X + l I) inv(Y + l I) with X = sum x y^T and Y = sum y y^T. Differences to the paper: only a share of that
correction is made, since all of it also fits what the calibration text alone has; and tokens of extreme energy, whose
few channels would decide everything, are left out of the sums (see `bitpress.math.stats`).

The linear whose output is added to the block's output (`bitpress.residual`) is to undo a share of all that the block's
output lacks, not only what its own input has drifted: W' = W + E inv(Y + l I) with E = sum e y^T and e the lack. So
errors of the residual stream, which no linear reads but through a norm, are undone too. The idea is that of LoaQ (Lin &
Wan 2025, arXiv 2509.06297); it goes further than this: to the output of attention, and through norms.

Legend: R out features, C in features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitpress.errors import NumericsError
from bitpress.math.stats import InputStats

DAMPENING = 0.2  # l, as a share of the mean diagonal of Y


def changes(weights: Sequence[Tensor], stats: InputStats, strength: float) -> list[Tensor]:
    """What to add to each weight (R_i, C) of an input for its target; see `correction`."""
    assert stats.paired is not None
    if stats.lag is not None:
        assert len(weights) == 1
        return [correction(stats.lag, stats.paired, strength)]
    assert stats.drift is not None
    change = correction(stats.drift, stats.paired, strength)
    return [w @ change for w in weights]


def correction(drift: Tensor, paired: Tensor, strength: float, dampening: float = DAMPENING) -> Tensor:
    """K float32, of the shape of `drift`: W + W K is the target in place of W, or W + K where it is a lag.

    Args:
        drift: `sum (x - y) y^T`, (C, C), or a lag `sum e y^T`, (R, C).
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
