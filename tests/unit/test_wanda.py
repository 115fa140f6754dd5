"""Magnitude and Wanda: pruning by score (Sun et al. 2023, arXiv 2306.11695)."""

import pytest
import torch

from bitpress.errors import NumericsError
from bitpress.math.masks import Structure
from bitpress.math.stats import InputStats
from bitpress.math.wanda import magnitude, wanda


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens=60, columns=24):
    return normal(tokens, columns, seed=3) * torch.linspace(0.1, 3, columns)


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_wanda_is_the_papers(sparsity):
    weights, x = [normal(5, 24), normal(3, 24, seed=1)], inputs()
    found = wanda(weights, InputStats(x.T @ x, 60), sparsity, None)
    for weight, result in zip(weights, found, strict=True):
        expected = weight.double().clone()
        for row in range(len(weight)):
            scores = weight[row].double().abs() * x.double().norm(dim=0)
            expected[row, scores.argsort()[: round(24 * sparsity)]] = 0
        assert torch.equal(result.double(), expected)


@pytest.mark.parametrize("structure", [Structure(2, 4), Structure(4, 8)], ids=str)
def test_wanda_in_groups(structure):
    weight, x = normal(5, 24), inputs()
    (found,) = wanda([weight], InputStats(x.T @ x, 60), 0.5, structure)
    scores = (weight.abs() * x.norm(dim=0)).reshape(5, -1, structure.size)
    lowest = scores.argsort(-1)[..., : structure.pruned]
    expected = weight.reshape(5, -1, structure.size).scatter(-1, lowest, 0.0).reshape(5, 24)
    assert torch.equal(found, expected)


def test_magnitude():
    weights = [normal(5, 24), normal(3, 24, seed=1)]
    before = [w.clone() for w in weights]
    for weight, result in zip(weights, magnitude(weights, 0.4, None), strict=True):
        border = weight.abs().flatten().sort().values[round(0.4 * weight.numel())]
        assert torch.equal(result, weight * (weight.abs() >= border))
    (found,) = magnitude([torch.tensor([[3.0, -1.0, 2.0, -4.0, 0.1, 0.2, 0.3, 0.4]])], 0.9, Structure(2, 4))
    torch.testing.assert_close(found, torch.tensor([[3.0, 0, 0, -4.0, 0, 0, 0.3, 0.4]]))
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_equal_inputs_make_wanda_the_magnitude():
    weight, stats = normal(5, 24), InputStats(7 * torch.eye(24), 60)
    (a,), (b,) = wanda([weight], stats, 0.5, Structure(2, 4)), magnitude([weight], 0.5, Structure(2, 4))
    assert torch.equal(a, b)
    (a,) = wanda([weight], stats, 0.5, None)
    assert torch.equal(a, torch.cat([magnitude([row[None]], 0.5, None)[0] for row in weight]))


def test_wanda_beats_magnitude_on_unlike_inputs():
    weight, x = normal(16, 24), inputs()
    gram = x.T @ x
    found = wanda([weight], InputStats(gram, 60), 0.5, None)[0] - weight
    plain = magnitude([weight], 0.5, None)[0] - weight
    assert float(((found @ gram) * found).sum()) < 0.7 * float(((plain @ gram) * plain).sum())


def test_statistics_that_are_no_numbers():
    gram = torch.eye(24)
    gram[3, 3] = torch.nan
    with pytest.raises(NumericsError, match="NaN or infinity in the input activations"):
        wanda([normal(5, 24)], InputStats(gram, 60), 0.5, None)
