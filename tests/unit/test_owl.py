"""Sparsity by layer (OWL, Yin et al. 2023, arXiv 2310.05175)."""

import pytest
import torch

from bitpress.math.owl import MOST, allocate, outlier_ratio

SIZES = [100, 100, 300, 50]


def mean(shares, sizes=SIZES):
    return sum(s * n for s, n in zip(shares, sizes, strict=True)) / sum(sizes)


def test_outliers_are_counted_over_the_layer():
    scores = [torch.ones(4, 8), torch.ones(2, 8)]
    assert outlier_ratio(scores, 5) == 0
    scores[1][0, 0] = scores[0][1, 1] = 100
    assert outlier_ratio(scores, 5) == 2 / 48
    assert outlier_ratio(scores, 50) == 0  # the mean rises with the outliers: 5.125


def test_outliers_move_sparsity_away():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(64, 32, generator=generator).abs() for _ in range(3)]
    layers[1][:, 3] *= 30
    ratios = [outlier_ratio([layer], 5) for layer in layers]
    assert ratios[1] > max(ratios[0], ratios[2])
    shares = allocate(ratios, [1, 1, 1], 0.6, 0.08)
    assert shares[1] < 0.6 < min(shares[0], shares[2])
    assert max(shares) - min(shares) == pytest.approx(0.16)
    assert mean(shares, [1, 1, 1]) == pytest.approx(0.6, abs=1e-12)


def test_equal_layers_are_of_one_size_as_the_paper_has_them():
    ratios = [0.01, 0.03, 0.02]
    drops = [0.0, 0.16, 0.08]
    expected = [0.7 - d + 0.08 for d in drops]
    assert allocate(ratios, [5, 5, 5], 0.7, 0.08) == pytest.approx(expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.5, 0.95, 0.99])
@pytest.mark.parametrize("spread", [0.01, 0.08, 0.4])
def test_the_mean_over_weights_is_kept_within_bounds(sparsity, spread):
    ratios = [0.0, 0.2, 0.05, 0.01]
    shares = allocate(ratios, SIZES, sparsity, spread)
    assert mean(shares) == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= s <= MOST for s in shares)
    by_ratio = [s for _, s in sorted(zip(ratios, shares, strict=True))]
    assert by_ratio == sorted(by_ratio, reverse=True)


def test_layers_alike_share_alike():
    assert allocate([0.02] * 4, SIZES, 0.5, 0.08) == pytest.approx([0.5] * 4)
