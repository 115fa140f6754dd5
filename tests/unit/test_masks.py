"""Masks of pruned weights."""

import pytest
import torch

from bitpress.math.masks import Structure, find_structure, holds, keep_best, keep_largest, pruned

SIZES = [Structure(2, 4), Structure(1, 4), Structure(4, 8), Structure(5, 10), Structure(7, 20)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("structure", SIZES, ids=str)
def test_groups_lose_their_lowest(structure):
    scores = normal(6, 40).abs()
    keep = keep_best(scores, 0.9, structure)
    for row in range(6):
        for lo in range(0, 40, structure.size):
            part, kept = scores[row, lo : lo + structure.size], keep[row, lo : lo + structure.size]
            assert int((~kept).sum()) == structure.pruned
            assert float(part[kept].min()) >= float(part[~kept].max())
    assert holds(scores * keep, structure)
    ties = keep_best(torch.ones(2, 40), 0.9, structure).reshape(2, -1, structure.size)
    assert not ties[..., : structure.pruned].any() and bool(ties[..., structure.pruned :].all())


@pytest.mark.parametrize("within", ["layer", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 0.98])
def test_the_share_of_zeros_is_exact(sparsity, within):
    scores = normal(7, 31).abs()
    keep = keep_best(scores, sparsity, None, within)
    if within == "row":
        assert (~keep).sum(1).tolist() == [round(sparsity * 31)] * 7
    else:
        assert int((~keep).sum()) == round(sparsity * 7 * 31)
    parts = zip(scores, keep, strict=True) if within == "row" else [(scores, keep)]
    for part, kept in parts:
        if not bool(kept.all()):
            assert float(part[kept].min()) >= float(part[~kept].max())


def test_a_share_below_one_leaves_a_weight():
    scores = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    assert (keep_best(scores, 0.99, None, within="row").sum(1) == 1).all()
    assert int(keep_best(scores, 0.999, None).sum()) == 1
    assert not keep_best(scores, 1.0, None, within="row").any()


def test_ties_go_by_position():
    assert keep_largest(torch.ones(2, 3), 2).tolist() == [[False, False, False], [False, True, True]]
    assert keep_best(torch.ones(1, 8), 0.5, Structure(2, 4)).tolist() == [[False, False, True, True] * 2]
    assert keep_best(torch.ones(2, 4), 0.5, None, "row").tolist() == [[False, False, True, True]] * 2
    assert keep_largest(torch.tensor([[0.0, 0, 0, 1]]), 3).tolist() == [[False, True, True, True]]


def test_marked_weights_go_first():
    scores = normal(4, 16).abs() + 1
    scores[:, [1, 2, 9]] = -1
    for structure in (None, Structure(2, 4)):
        assert not keep_best(scores, 0.5, structure)[:, [1, 2, 9]].any()


def test_structures_are_found():
    weight = normal(4, 32)
    assert find_structure(weight) is None and find_structure(torch.ones(2, 8)) is None
    for structure in (Structure(2, 4), Structure(4, 8), Structure(8, 16)):
        assert find_structure(weight * keep_best(weight.abs(), 0, structure)) == structure
    two_of_four = weight * keep_best(weight.abs(), 0, Structure(2, 4))
    two_of_four[2, 5] = 0  # more zeros than needed
    assert find_structure(two_of_four) == Structure(2, 4)
    two_of_four[1, 0:4] = 1  # one group is enough to break it
    assert find_structure(two_of_four) is None
    assert not holds(torch.zeros(2, 6), Structure(2, 4))  # columns that are no whole groups


def test_what_counts_as_pruned():
    weight = normal(10, 100)
    assert pruned(weight) is None
    weight.view(-1)[:9] = 0
    assert pruned(weight) is None  # incidental zeros
    weight.view(-1)[:11] = 0
    assert torch.equal(pruned(weight), weight != 0)
    assert pruned(normal(4, 8) * keep_best(torch.rand(4, 8), 0, Structure(1, 8))) is not None
