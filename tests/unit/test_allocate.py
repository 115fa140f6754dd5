"""The knapsack against trying every combination."""

import itertools
import random

import pytest

from bitpress.math import allocate as module
from bitpress.math.allocate import allocate, nearest


def brute_force(sizes, losses, low, high):
    best = None
    for picks in itertools.product(*(range(len(g)) for g in sizes)):
        total = sum(g[k] for g, k in zip(sizes, picks, strict=True))
        loss = sum(g[k] for g, k in zip(losses, picks, strict=True))
        if low <= total <= high and (best is None or loss < best):
            best = loss
    return best


@pytest.mark.parametrize("seed", range(40))
def test_equals_brute_force(seed):
    chance = random.Random(seed)
    groups = chance.randint(1, 6)
    sizes = [[chance.randint(1, 60) * 4 for _ in range(chance.randint(1, 4))] for _ in range(groups)]
    losses = [[chance.random() for _ in g] for g in sizes]
    middle = chance.uniform(sum(map(min, sizes)), sum(map(max, sizes)))
    low, high = 0.9 * middle, 1.05 * middle
    picks = allocate(sizes, losses, low, high)
    best = brute_force(sizes, losses, low, high)
    if best is None:
        assert picks is None
        return
    assert low <= sum(g[k] for g, k in zip(sizes, picks, strict=True)) <= high
    assert sum(g[k] for g, k in zip(losses, picks, strict=True)) == pytest.approx(best, abs=1e-12)


def model(groups, seed=0, choices=8):
    """Groups as a model has them: many weights, loss falling with the bits, some groups far more sensitive."""
    chance = random.Random(seed)
    bits = [2.25 + 0.75 * k for k in range(choices)]
    weights = [
        chance.choice([576 * 576, 576 * 1536, 3 * 576 * 1536]) + chance.randint(0, 99) * 576 for _ in range(groups)
    ]
    scale = [chance.lognormvariate(0, 2) for _ in range(groups)]
    sizes = [[round(w * b) for b in bits] for w in weights]
    losses = [[s * 4**-b for b in bits] for s in scale]
    return sizes, losses, sum(weights)


def total(table, picks):
    return sum(g[k] for g, k in zip(table, picks, strict=True))


def test_many_groups_within_a_hundredth_and_better_with_size():
    sizes, losses, weights = model(200)
    before = float("inf")
    for bits in (2.5, 3.0, 3.1, 4.25, 7.0):
        picks = allocate(sizes, losses, 0.99 * bits * weights, bits * weights)
        assert 0.99 <= total(sizes, picks) / (bits * weights) <= 1
        loss = total(losses, picks)
        assert loss < before
        before = loss


def test_never_worse_than_uniform_and_buckets_cost_little(monkeypatch):
    sizes, losses, _ = model(60, seed=3)
    uniform = [2] * 60
    size = total(sizes, uniform)
    picks = allocate(sizes, losses, 0.99 * size, size)
    assert total(losses, picks) < 0.7 * total(losses, uniform)
    monkeypatch.setattr(module, "BUCKETS", 1 << 17)
    exact = allocate(sizes, losses, 0.99 * size, size)
    assert total(losses, picks) == pytest.approx(total(losses, exact), rel=2e-3)


def test_the_sensitive_group_gets_the_bits():
    sizes = [[400, 800]] * 4
    losses = [[1.0, 0.1], [9.0, 0.9], [1.0, 0.1], [1.0, 0.1]]
    assert allocate(sizes, losses, 1900, 2000) == [0, 1, 0, 0]


def test_nothing_between_the_bounds():
    assert allocate([[4, 8], [4, 8]], [[1, 0], [1, 0]], 9, 11) is None
    assert nearest([[4, 8], [4, 8]], 9.9) == 8
    assert nearest([[4, 8], [4, 8]], 11) == 12
    assert nearest([[4, 8], [4, 8]], 100) == 16
    assert nearest([[400, 800]], 3) == 400
