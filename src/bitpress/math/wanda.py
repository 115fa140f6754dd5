"""Pruning by score, without changing what is kept: magnitude, and Wanda (Sun et al. 2023, arXiv 2306.11695).

Legend: R out features, C in features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitpress.errors import NumericsError
from bitpress.math.masks import Structure, keep_best
from bitpress.math.stats import InputStats


def magnitude(weights: Sequence[Tensor], sparsity: float, structure: Structure | None) -> list[Tensor]:
    """Prune the smallest weights of each layer.

    Args:
        weights: each (R_i, C) float32; not modified.
        sparsity: share of zeros of each layer, if there is no structure.
        structure: zeros in each group of columns.
    """
    return [w.masked_fill(~keep_best(w.abs(), sparsity, structure), 0) for w in weights]


def wanda(weights: Sequence[Tensor], stats: InputStats, sparsity: float, structure: Structure | None) -> list[Tensor]:
    """Prune, in every output row, the weights of the smallest |w| * |x|, |x| the 2-norm of the weight's input.

    Args:
        weights: each (R_i, C) float32; not modified.
        stats: of their common input, with its Gram matrix: |x| is the root of its diagonal.
        sparsity: share of zeros of each row, if there is no structure.
        structure: zeros in each group of columns.

    Raises:
        NumericsError: NaN or infinity in the statistics.
    """
    norms = stats.needed_gram.diagonal()
    if not torch.isfinite(norms).all():
        raise NumericsError("NaN or infinity in the input activations")
    norms = norms.sqrt()
    return [w.masked_fill(~keep_best(w.abs() * norms, sparsity, structure, within="row"), 0) for w in weights]
