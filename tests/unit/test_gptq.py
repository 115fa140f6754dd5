"""GPTQ against the algorithm of the paper, without blocks, in float64 (Frantar et al. 2022, arXiv 2210.17323)."""

import pytest
import torch

from bitpress.errors import NumericsError
from bitpress.math.gptq import gptq, gptq_each
from bitpress.math.grid import Grid, quantize, values_of
from bitpress.math.masks import Structure, holds, keep_best
from bitpress.math.rtn import round_to_nearest
from bitpress.math.scales import find_all, find_qparams
from bitpress.math.sparsegpt import sparsegpt
from bitpress.math.stats import InputStats

STRATEGIES = ["tensor", "channel", "group"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns, tokens=400, seed=1):
    """Statistics of inputs with a few strong common directions and channels of unlike size."""
    x = normal(tokens, 6, seed=seed) @ normal(6, columns, seed=seed + 1) + 0.5 * normal(tokens, columns, seed=seed + 2)
    x = x * torch.linspace(0.3, 2, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
    return InputStats(x.T @ x, tokens)


def grid_for(strategy, bits=4, symmetric=True, group_size=20, dtype=torch.float32):
    return Grid(bits, symmetric, group_size if strategy == "group" else None, strategy == "tensor", dtype)


def reference(weight, gram, qparams, grid, order, dampening):
    """The paper's algorithm, one column at a time.

    Returns:
        codes (R, C) in float64, the quotients (R, C) before rounding, and the order of the columns.
    """
    W, H = weight.double().clone(), gram.double().clone()
    C = W.shape[1]
    diagonal = H.diagonal().clone()
    H += torch.eye(C, dtype=torch.float64) * (dampening * diagonal.mean())
    H += torch.diag((diagonal == 0).double())
    perm = torch.sort(diagonal, descending=True, stable=True).indices if order else torch.arange(C)
    factor = torch.linalg.cholesky(torch.linalg.inv(H[perm][:, perm]), upper=True)
    codes, quotients = torch.empty_like(W), torch.empty_like(W)
    for k in range(C):
        j = int(perm[k])
        g = 0 if grid.group_size is None else j // grid.group_size
        scale = qparams.scale[:, g].double()
        zero = 0.0 if qparams.zero_point is None else qparams.zero_point[:, g].double()
        quotients[:, j] = W[:, j] / scale + zero
        codes[:, j] = quotients[:, j].round().clamp(grid.qmin, grid.qmax)
        error = (W[:, j] - (codes[:, j] - zero) * scale) / factor[k, k]
        W[:, perm[k:]] -= error[:, None] * factor[k, k:]
    return codes, quotients, perm


def quadratic(weight, dense, gram):
    delta = dense.double() - weight.double()
    return float(((delta @ gram.double()) * delta).sum())


def assert_agree(result, weight, gram, expected, quotients, perm):
    """Codes are those of the reference; a row may leave it at a value that lies on a boundary of rounding."""
    different = (result.codes.double() != expected)[:, perm]
    rows = different.any(1).nonzero()[:, 0]
    for row in rows.tolist():
        first = int(different[row].int().argmax())
        share = float(quotients[row, perm[first]] % 1)
        assert abs(share - 0.5) < 1e-3, f"row {row}, column {int(perm[first])}: {share}"
    assert len(rows) <= max(1, 0.1 * len(weight))
    zero = 0 if result.qparams.zero_point is None else result.qparams.zero_point.double()
    columns = weight.shape[1] // result.qparams.scale.shape[1]
    dense = (expected - spread(zero, columns)) * spread(result.qparams.scale.double(), columns)
    assert quadratic(weight, result.dense(), gram) == pytest.approx(quadratic(weight, dense, gram), rel=0.01)


def spread(x, columns):
    return x.repeat_interleave(columns, 1) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("columns", [100, 96])
@pytest.mark.parametrize("block_size", [8, "group", 128])
@pytest.mark.parametrize("order", [True, False], ids=["static", "in_order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_the_paper(strategy, symmetric, order, block_size, columns):
    group_size = 20 if columns == 100 else 32
    weight, stats = normal(24, columns), correlated(columns)
    grid = grid_for(strategy, 4, symmetric, group_size)
    block = group_size if block_size == "group" else block_size
    (result,) = gptq([weight], stats, grid, order=order, block_size=block)
    expected = reference(weight, stats.gram, result.qparams, grid, order, 0.01)
    assert_agree(result, weight, stats.gram, *expected)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("dampening", [0.001, 0.1])
@pytest.mark.parametrize("columns", [1, 7, 37])
def test_equals_the_paper_for_other_widths_and_dampening(bits, dampening, columns):
    weight, stats = normal(24, columns), correlated(columns)
    grid = grid_for("channel", bits, symmetric=False, dtype=torch.bfloat16)
    (result,) = gptq([weight], stats, grid, block_size=16, dampening_frac=dampening)
    expected, quotients, perm = reference(weight, stats.gram, result.qparams, grid, True, dampening)
    # the reference's dense weight is not rounded to bfloat16, so only the codes are compared
    different = (result.codes.double() != expected)[:, perm]
    for row in different.any(1).nonzero()[:, 0].tolist():
        share = float(quotients[row, perm[int(different[row].int().argmax())]] % 1)
        assert abs(share - 0.5) < 1e-3
    assert int(different.any(1).sum()) <= 2


@pytest.mark.parametrize("observer", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_found_before_the_sweep(observer, dtype):
    weight, stats = normal(8, 40), correlated(40)
    grid = grid_for("group", 3, False, dtype=dtype)
    (result,) = gptq([weight], stats, grid, observer=observer)
    importance = stats.gram.diagonal() if observer == "hessian" else None
    expected = find_qparams(weight, grid, importance, search=observer != "minmax")
    assert result.qparams.scale.dtype == dtype
    assert torch.equal(result.qparams.scale, expected.scale)
    assert torch.equal(result.qparams.zero_point, expected.zero_point)
    codes, _, _ = reference(weight, stats.gram, expected, grid, True, 0.01)
    assert float((result.codes == codes).double().mean()) > 0.99


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_diagonal_gram_gives_round_to_nearest(strategy, symmetric, order):
    weight = normal(8, 60)
    grid = grid_for(strategy, 4, symmetric)
    stats = InputStats(torch.diag(normal(60, seed=3).square() + 0.1), 10)
    (result,) = gptq([weight], stats, grid, observer="minmax", order=order, block_size=16)
    expected = round_to_nearest(weight, grid)
    assert torch.equal(result.codes, expected.codes)
    assert torch.equal(result.qparams.scale, expected.qparams.scale)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_beats_round_to_nearest_on_correlated_inputs(bits, strategy, order):
    weight, stats = normal(16, 100), correlated(100)
    grid = grid_for(strategy, bits)
    (result,) = gptq([weight], stats, grid, observer="minmax", order=order)
    rounded = round_to_nearest(weight, grid)
    error, baseline = (quadratic(weight, r.dense(), stats.gram) for r in (result, rounded))
    assert error < 0.7 * baseline
    energy = quadratic(weight, torch.zeros_like(weight), stats.gram)
    assert float(result.error) == pytest.approx(error / energy, rel=0.05)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_of_one_input_are_solved_as_if_alone(strategy, symmetric):
    weights = [normal(8, 60), normal(4, 60, seed=5) * 3, normal(17, 60, seed=6)]
    stats, grid = correlated(60), grid_for(strategy, 4, symmetric)
    together = gptq(weights, stats, grid)
    assert len(together) == 3
    for weight, joint in zip(weights, together, strict=True):
        (alone,) = gptq([weight], stats, grid)
        assert torch.equal(joint.qparams.scale, alone.qparams.scale)
        assert symmetric or torch.equal(joint.qparams.zero_point, alone.qparams.zero_point)
        # products of another height may round otherwise, which can tip one row over
        assert joint.codes.shape == weight.shape and joint.codes.is_contiguous()
        assert int((joint.codes != alone.codes).any(1).sum()) <= 1
        assert float(joint.error) == pytest.approx(float(alone.error), rel=0.02)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("observer", ["hessian", "mse"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("strategy", "order"), [("tensor", False), ("channel", True), ("group", True), ("group", False)]
)
def test_several_inputs_together_are_as_each_alone(strategy, order, symmetric, observer, masked):
    problems = [([normal(8, 60, seed=s), normal(4, 60, seed=s + 9) * 3], correlated(60, seed=s)) for s in (1, 2, 3)]
    if masked:  # one linear of one input
        problems[1][0][1] *= keep_best(problems[1][0][1].abs(), 0.5, Structure(2, 4))
    grid = grid_for(strategy, 3, symmetric)
    ways = {"observer": observer, "order": order, "regroup": False, "block_size": 16}
    ways |= {"dampening_frac": 0.01, "refine": 1, "correct": 0.0}
    for found, problem in zip(gptq_each(problems, grid, **ways), problems, strict=True):
        (alone,) = gptq_each([problem], grid, **ways)
        for a, b, weight in zip(found, alone, problem[0], strict=True):
            assert a.codes.shape == weight.shape and torch.equal(a.codes, b.codes)
            assert torch.equal(a.qparams.scale, b.qparams.scale) and a.qparams.scale.shape == b.qparams.scale.shape
            assert symmetric or torch.equal(a.qparams.zero_point, b.qparams.zero_point)
            assert float(a.error) == pytest.approx(float(b.error), rel=1e-2)
            assert not bool(a.dense()[weight == 0].any())


def test_inputs_stay_as_they_are_and_runs_repeat():
    weights, stats = [normal(8, 60), normal(4, 60, seed=5)], correlated(60)
    before = [w.clone() for w in weights], stats.gram.clone()
    for order in (True, False):
        for symmetric in (True, False):
            grid = grid_for("group", 4, symmetric)
            first, second = (gptq(weights, stats, grid, order=order, block_size=16) for _ in range(2))
            for a, b in zip(first, second, strict=True):
                assert torch.equal(a.codes, b.codes) and torch.equal(a.error, b.error)
    assert all(torch.equal(w, b) for w, b in zip(weights, before[0], strict=True))
    assert torch.equal(stats.gram, before[1])


@pytest.mark.parametrize("order", [True, False])
def test_a_dead_input_column_is_rounded_to_nearest(order):
    stats = correlated(60)
    dead = [0, 13, 59]
    gram = stats.gram.clone()
    gram[dead], gram[:, dead] = 0, 0
    weight, grid = normal(8, 60) + 2, grid_for("group")
    (result,) = gptq([weight], InputStats(gram, stats.tokens), grid, order=order)
    nearest = quantize(weight, result.qparams, grid)
    assert torch.equal(result.codes[:, dead], nearest[:, dead])
    assert bool((result.codes[:, dead] != 0).any(0).all())
    assert not torch.equal(result.codes, nearest)
    codes, _, _ = reference(weight, gram, result.qparams, grid, order, 0.01)
    assert float((result.codes == codes).double().mean()) > 0.99


def test_all_inputs_dead():
    weight, grid = normal(4, 40), grid_for("group")
    (result,) = gptq([weight], InputStats(torch.zeros(40, 40), 3), grid)
    assert torch.equal(result.codes, quantize(weight, result.qparams, grid))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_statistics_that_are_no_numbers(value):
    stats = correlated(40)
    stats.gram[3, 7] = value
    with pytest.raises(NumericsError, match="NaN or infinity in the input activations"):
        gptq([normal(4, 40)], stats, grid_for("group"))


def test_a_gram_matrix_that_is_none():
    gram = torch.eye(40)
    gram[0, 1] = gram[1, 0] = 2
    with pytest.raises(NumericsError, match="not positive definite"):
        gptq([normal(4, 40)], InputStats(gram, 1), grid_for("group"))


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("structure", [Structure(2, 4), None], ids=str)
def test_pruned_weights_stay_pruned(structure, strategy, symmetric, order):
    weights, stats = [normal(12, 100), normal(8, 100, seed=5)], correlated(100)
    pruned = sparsegpt(weights, stats, 0.5, structure)
    grid = grid_for(strategy, 4, symmetric)
    for weight, kept, result in zip(weights, pruned, gptq(pruned, stats, grid, order=order), strict=True):
        dense = result.dense()
        assert not dense[kept == 0].any()
        assert structure is None or holds(dense, structure)
        nearest = round_to_nearest(kept, grid)
        assert quadratic(kept, dense, stats.gram) < 0.6 * quadratic(kept, nearest.dense(), stats.gram)
        assert quadratic(weight, dense, stats.gram) < quadratic(weight, nearest.dense(), stats.gram)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_dense_neighbour_and_incidental_zeros_change_nothing(symmetric):
    dense, stats = normal(16, 100), correlated(100)
    dense.view(-1)[torch.randperm(1600, generator=torch.Generator().manual_seed(0))[:12]] = 0
    pruned = normal(8, 100, seed=5)
    pruned *= keep_best(pruned.abs(), 0.5, None)
    grid = grid_for("group", 4, symmetric)
    (alone,) = gptq([dense], stats, grid)
    beside, other = gptq([dense, pruned], stats, grid)
    assert int((alone.codes != beside.codes).any(1).sum()) <= 1
    assert bool(alone.dense()[dense == 0].any()), "a dense layer's zeros are free"
    assert not other.dense()[pruned == 0].any()


FLOAT_GRIDS = {
    "fp8 channel": Grid(8, True, None, False, torch.float32, "e4m3"),
    "fp8 block": Grid(8, True, 16, False, torch.float32, "e4m3", block_rows=8),
    "nvfp4": Grid(4, True, 16, False, torch.bfloat16, "e2m1", "two-level"),
    "mxfp4": Grid(4, True, 16, False, torch.float32, "e2m1", "power of two"),
    "mxfp6": Grid(6, True, 16, False, torch.float32, "e2m3", "power of two"),
}
TABLES = {"e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6]}
TABLES["e2m3"] = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
TABLES["e4m3"] = [m / 512 for m in range(8)] + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)][:-1]


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("name", FLOAT_GRIDS)
def test_floats_equal_the_paper(name, order):
    grid, stats, weight = FLOAT_GRIDS[name], correlated(64), normal(24, 64) * 0.1
    (result,) = gptq([weight], stats, grid, order=order, block_size=16)
    table = torch.tensor(TABLES[grid.values], dtype=torch.float64)
    table = torch.cat([-table.flip(0)[:-1], table])
    # column by column in float64, each quotient to the value that is nearest by distance
    W, H = weight.double().clone(), stats.gram.double().clone()
    diagonal = H.diagonal().clone()
    H += torch.eye(64, dtype=torch.float64) * (0.01 * diagonal.mean())
    perm = torch.sort(diagonal, descending=True, stable=True).indices if order else torch.arange(64)
    factor = torch.linalg.cholesky(torch.linalg.inv(H[perm][:, perm]), upper=True)
    scale, codes = result.qparams.effective().double(), torch.empty_like(W)
    for k, j in enumerate(perm.tolist()):
        s = scale[:, j // (64 // scale.shape[1])]
        codes[:, j] = table[((W[:, j] / s)[:, None] - table).abs().argmin(1)]
        W[:, perm[k:]] -= ((W[:, j] - codes[:, j] * s) / factor[k, k])[:, None] * factor[k, k:]
    ours = values_of(result.codes).double()
    assert float((ours == codes).all(1).double().mean()) >= 0.9
    nearest = find_qparams(weight, grid, diagonal.float(), search=True)
    assert torch.equal(nearest.scale, result.qparams.scale)
    rounded = values_of(quantize(weight, nearest, grid)).double() * spread(scale, 64 // scale.shape[1])
    assert quadratic(weight, result.dense(), stats.gram) < 0.8 * quadratic(weight, rounded, stats.gram)


def test_linears_of_one_product_share_their_scale_on_top():
    grid, stats = FLOAT_GRIDS["nvfp4"], correlated(64)
    weights = [normal(8, 64, seed=s) * (s + 1) for s in range(3)]
    results = gptq(weights, stats, grid)
    expected = find_all(weights, grid, stats.gram.diagonal(), search=True)
    for result, q in zip(results, expected, strict=True):
        assert torch.equal(result.qparams.global_scale, expected[0].global_scale)
        assert torch.equal(result.qparams.scale, q.scale)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("name", [n for n, g in FLOAT_GRIDS.items() if not g.fused])
def test_floats_of_several_inputs_together_are_as_each_alone(name, order):
    problems = [([normal(8, 64, seed=s), normal(16, 64, seed=s + 9) * 3], correlated(64, seed=s)) for s in (1, 2)]
    ways = {"observer": "hessian", "order": order, "regroup": False, "block_size": 16}
    ways |= {"dampening_frac": 0.01, "refine": 1, "correct": 0.0}
    for found, problem in zip(gptq_each(problems, FLOAT_GRIDS[name], **ways), problems, strict=True):
        for a, b in zip(found, gptq_each([problem], FLOAT_GRIDS[name], **ways)[0], strict=True):
            assert torch.equal(values_of(a.codes), values_of(b.codes))
            assert torch.equal(a.qparams.scale, b.qparams.scale)


def test_a_factor_in_float64_is_told_of_its_input_alone():
    C = 13
    binomials = torch.ones(C, C, dtype=torch.float64)
    for i in range(1, C):
        for j in range(1, C):
            binomials[i, j] = binomials[i - 1, j] + binomials[i, j - 1]
    hard, easy = (InputStats(g, 100) for g in (binomials.float(), torch.eye(C)))
    grid = Grid(4, True, None, False, torch.float32)
    ways = {"observer": "minmax", "order": False, "regroup": False, "block_size": 16}
    ways |= {"dampening_frac": 0.0, "refine": 0, "correct": 0.0}
    problems = [([normal(4, C, seed=s)], stats) for s, stats in enumerate((easy, hard, easy))]
    notes = [z.note for (z,) in gptq_each(problems, grid, **ways)]
    assert notes[0] == notes[2] == "" and "float64" in notes[1]
    assert "float64" in gptq_each([problems[1]], grid, **ways)[0][0].note
