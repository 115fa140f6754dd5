"""AWQ's search and clipping against the same in float64 on the inputs themselves (arXiv 2306.00978)."""

import pytest
import torch

from bitpress.math.awq import Reader, best_scale, candidates, clipped, relative_weight, rounding_error
from bitpress.math.grid import Grid, dequantize, quantize
from bitpress.math.rtn import round_all
from bitpress.math.scales import find_qparams
from bitpress.math.smoothquant import by_channel

GRIDS = {
    "group": Grid(4, False, 16, False, torch.float32),
    "symmetric": Grid(4, True, 16, False, torch.float32),
    "channel": Grid(3, True, None, False, torch.bfloat16),
    "tensor": Grid(4, True, None, True, torch.float32),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(columns=64, tokens=500, seed=1):
    """Inputs (T, C) of which every ninth channel is twenty times as large."""
    x = normal(tokens, columns, seed=seed)
    x[:, ::9] *= 20
    return x


def measured(weight, x, s, grid):
    """The squared error of the outputs, with the layer really run, in float64."""
    w = weight * s
    q = find_qparams(w, grid)
    delta = dequantize(quantize(w, q, grid), q).double() / s.double() - weight.double()
    return float((x.double() @ delta.T).square().sum())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_score_is_the_error_of_the_outputs(grid):
    x, weights = with_outliers(), [normal(24, 64, seed=2), normal(12, 64, seed=3)]
    readers, gram = [Reader(w, grid) for w in weights], x.T @ x
    for s in (torch.ones(64), torch.rand(64, generator=torch.Generator().manual_seed(4)) + 0.3):
        expected = sum(measured(w, x, s, grid) for w in weights)
        # products in bfloat16: the score ranks candidates, a percent does not matter
        assert rounding_error(readers, gram, s) == pytest.approx(expected, rel=0.02)
    assert rounding_error(readers, gram, None) == pytest.approx(rounding_error(readers, gram, torch.ones(64)))


def test_a_scale_must_save_more_than_the_margin():
    x, grid = with_outliers(), GRIDS["channel"]
    readers, gram, columns = [Reader(normal(24, 64, seed=2), grid)], x.T @ x, torch.arange(64)
    curve = [x.abs().mean(0) ** (i / 4) for i in range(5)]
    best = best_scale(readers, gram, columns, [curve])
    saved = 1 - rounding_error(readers, gram, best) / rounding_error(readers, gram, None)
    assert 0.05 < saved < 0.95
    assert torch.equal(best_scale(readers, gram, columns, [curve], saved - 0.02), best)
    assert torch.equal(best_scale(readers, gram, columns, [curve], saved + 0.02), torch.ones(64))


def test_an_observer_that_searches_is_scored_as_it_searches():
    x, w = with_outliers(), normal(24, 64, seed=2)
    grid, gram = GRIDS["symmetric"], (x.T @ x)
    s = torch.rand(64, generator=torch.Generator().manual_seed(4)) + 0.5
    for observer, importance in (("hessian", gram.diagonal() / s**2), ("mse", None)):
        q = find_qparams(w * s, grid, importance, search=True)
        delta = dequantize(quantize(w * s, q, grid), q).double() / s.double() - w.double()
        expected = float((x.double() @ delta.T).square().sum())
        assert rounding_error([Reader(w, grid, observer)], gram, s) == pytest.approx(expected, rel=0.02)


def test_candidates_by_hand():
    x, w = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([0.2, 0.5, 0.4])

    def unit(s):
        return s / s.log().mean().exp()

    (duo,) = candidates(x, w, duo=True, n_grid=4)
    assert len(duo) == 5
    for i, s in enumerate(duo):
        torch.testing.assert_close(s, unit(x ** (i / 4) / (w ** (1 - i / 4) + 1e-4)))
    (alone,) = candidates(x, w, duo=False, n_grid=4)
    assert len(alone) == 5
    for i, s in enumerate(alone):
        torch.testing.assert_close(s, unit(x ** (i / 4)))
    assert [len(c) for c in candidates(x, w, duo="both", n_grid=4)] == [3, 3]


def test_a_channel_that_is_never_active_keeps_its_scale():
    for s in candidates(torch.tensor([0.0, 2.0, 5.0]), torch.tensor([0.3, 0.3, 0.5]), duo=True, n_grid=5)[0]:
        assert s[0] == 1 and torch.isfinite(s).all() and (s > 0).all()


@pytest.mark.parametrize("grid", [GRIDS["group"], GRIDS["symmetric"], GRIDS["channel"]])
def test_the_best_candidate_is_taken_and_beats_rounding(grid):
    x, weights = with_outliers(), [normal(24, 64, seed=2), normal(12, 64, seed=3)]
    readers, gram, columns = [Reader(w, grid) for w in weights], x.T @ x, torch.arange(64)
    curves = candidates(x.abs().mean(0), relative_weight(readers), duo="both", n_grid=40)
    best = best_scale(readers, gram, columns, curves)
    every = [s for curve in curves for s in curve]
    errors = [sum(measured(w, x, s, grid) for w in weights) for s in (*every, torch.ones(64))]
    mine = sum(measured(w, x, best, grid) for w in weights)
    assert any(torch.equal(best, s) for s in every)
    assert mine <= 1.03 * min(errors)
    assert mine < 0.7 * errors[-1]


def test_a_curve_is_searched_from_coarse_to_fine(monkeypatch):
    asked = []

    def error(readers, gram, s):
        if s is None:
            return torch.tensor(100.0)
        asked.append(int(s[0]))
        return (s[0] - 13.2).abs() + 1

    monkeypatch.setattr("bitpress.math.awq.rounding_error", error)
    curve = [torch.full((2,), float(i)) for i in range(21)]
    assert best_scale([], torch.eye(2), torch.arange(2), [curve])[0] == 13
    assert asked == [0, 4, 8, 12, 16, 20, 10, 14, 13, 15]


def test_a_curve_far_above_what_is_to_be_undercut_is_given_up(monkeypatch):
    asked = []

    def error(readers, gram, s, lowest=0.0):
        if s is not None:
            asked.append(int(s[0]))
        return torch.tensor(100.0) if s is None else lowest[0] + (s[0] - 10).abs()

    curve, lowest = [torch.full((2,), float(i)) for i in range(21)], [97.0]
    monkeypatch.setattr("bitpress.math.awq.rounding_error", lambda r, g, s: error(r, g, s, lowest))
    assert (best_scale([], torch.eye(2), torch.arange(2), [curve], 0.1) == 1).all()
    assert asked == [0, 4, 8, 12, 16, 20]  # 99 at best, and 90 to undercut
    asked.clear()
    lowest[0] = 91.0
    assert (best_scale([], torch.eye(2), torch.arange(2), [curve], 0.1) == 1).all()
    assert len(asked) > 6  # 93 at 8 and 12: between them it may well be below
    lowest[0] = 88.0
    assert best_scale([], torch.eye(2), torch.arange(2), [curve], 0.1)[0] == 10


def test_scale_one_stays_where_nothing_is_better():
    w = torch.randint(-7, 8, (16, 32), generator=torch.Generator().manual_seed(0)).float()
    w[:, ::16] = 7.5  # every group's grid is exact
    x = with_outliers(32)
    grid = GRIDS["symmetric"]
    tried = candidates(x.abs().mean(0), relative_weight([Reader(w, grid)]), duo=True, n_grid=10)
    assert torch.equal(best_scale([Reader(w, grid)], x.T @ x, torch.arange(32), tried), torch.ones(32))


def test_channels_shared_by_columns_have_one_scale():
    columns = torch.tensor([0, 1, 0, 1])
    assert by_channel(torch.tensor([1.0, 2.0, 5.0, 6.0]), columns, 2, "mean").tolist() == [3.0, 4.0]
    assert by_channel(torch.tensor([1.0, 2.0, 5.0, 6.0]), columns, 2, "amax").tolist() == [5.0, 6.0]
    x = with_outliers(4, 100)
    s = best_scale([Reader(normal(8, 4), Grid(3, True, None, False, torch.float32))], x.T @ x, columns, [])
    assert s.shape == (2,)


def test_relative_weight_by_hand():
    w = torch.tensor([[1.0, -2.0, 3.0, 0.0], [4.0, 4.0, 0.0, 0.0]])
    grid = Grid(4, True, 2, False, torch.float32)
    assert relative_weight([Reader(w, grid)]).tolist() == [0.75, 1.0, 0.5, 0.0]
    assert relative_weight([Reader(w[:1], grid), Reader(w[1:], grid)]).tolist() == [0.75, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_clipping_is_the_best_share_of_every_group(grid):
    x = with_outliers()
    w = normal(10, 64, seed=7) ** 3  # long tails, which clipping is for
    gram = x.T @ x
    (mine,) = clipped([w], grid, gram)
    size = grid.group_size or 64
    tried = [find_qparams(w, grid, share=k) for k in grid.shares]
    rounded = [dequantize(quantize(w, q, grid), q).double() for q in tried]
    errors = torch.stack([
        torch.stack([((r - w.double())[:, g : g + size] @ x[:, g : g + size].T.double()).square().sum(-1)
                     for g in range(0, 64, size)], -1)
        for r in rounded
    ])  # fmt: skip
    dense = mine.dense().double()
    own = torch.stack([((dense - w.double())[:, g : g + size] @ x[:, g : g + size].T.double()).square().sum(-1)
                       for g in range(0, 64, size)], -1)  # fmt: skip
    if grid.per_tensor:
        assert float(own.sum()) <= 1.0001 * float(errors.sum((1, 2)).min())
    else:
        assert (own <= 1.0001 * errors.amin(0) + 1e-9).all()
    plain = find_qparams(w, grid)
    delta = dequantize(quantize(w, plain, grid), plain).double() - w.double()
    whole = float((x.double() @ delta.T).square().sum() / (x.double() @ w.T.double()).square().sum())
    assert float(mine.error) < (1 if grid.per_tensor else 0.8) * whole


@pytest.mark.parametrize(
    "grid",
    [
        Grid(4, True, 16, False, torch.bfloat16, values="e2m1", scales="two-level"),
        Grid(8, True, None, False, torch.bfloat16, values="e4m3"),
        Grid(8, True, None, True, torch.bfloat16, values="e4m3"),
        Grid(4, True, 32, False, torch.bfloat16, values="e2m1", scales="power of two"),
        Grid(8, True, 32, False, torch.bfloat16, values="e4m3", block_rows=4),
    ],
)
def test_clipping_on_grids_of_floats(grid):
    """Never worse than covering the range, and what linears share they share."""
    x, weights = with_outliers(), [normal(24, 64, seed=7) ** 3, normal(12, 64, seed=8)]
    gram = x.T @ x
    both = clipped(weights, grid, gram)
    for w, mine, plain in zip(weights, both, round_all(weights, grid), strict=True):
        own, other = ((z.dense().double() - w.double()) @ x.T.double() for z in (mine, plain))
        assert float(own.square().sum()) <= 1.02 * float(other.square().sum())
        assert torch.equal(dequantize(*mine.quantized), mine.dense())
    if grid.fused:
        a, b = (z.quantized[1] for z in both)
        assert a.global_scale is None or torch.equal(a.global_scale, b.global_scale)
        assert not grid.per_tensor or a.scale[0] == b.scale[0]


def test_inputs_are_not_modified_and_runs_repeat():
    x, w = with_outliers(), normal(24, 64, seed=2)
    gram, grid = x.T @ x, GRIDS["group"]
    kept = w.clone(), gram.clone()
    readers = [Reader(w, grid)]
    tried = candidates(x.abs().mean(0), relative_weight(readers), duo=True, n_grid=6)
    first = best_scale(readers, gram, torch.arange(64), tried)
    assert torch.equal(first, best_scale(readers, gram, torch.arange(64), tried))
    assert torch.equal(clipped([w], grid, gram)[0].codes, clipped([w], grid, gram)[0].codes)
    assert torch.equal(w, kept[0]) and torch.equal(gram, kept[1])
