"""SparseGPT against the algorithm of the paper, without blocks, in float64 (Frantar & Alistarh 2023, 2301.00774)."""

import itertools

import pytest
import torch

from bitpress.errors import NumericsError
from bitpress.math.admm import refit, ridge_inverses, search, shifted_inverse
from bitpress.math.masks import Structure, holds, keep_best
from bitpress.math.sparsegpt import damped, sparsegpt
from bitpress.math.stats import InputStats
from bitpress.math.wanda import magnitude, wanda

TWO_FOUR = Structure(2, 4)
STRUCTURES = [None, TWO_FOUR, Structure(4, 8), Structure(1, 4), Structure(8, 16)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns, tokens=400, seed=1):
    """Statistics of inputs with a few strong common directions and channels of unlike size."""
    x = normal(tokens, 6, seed=seed) @ normal(6, columns, seed=seed + 1) + 0.5 * normal(tokens, columns, seed=seed + 2)
    x = x * torch.linspace(0.3, 2, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
    return InputStats(x.T @ x, tokens)


def quadratic(weight, pruned, gram):
    delta = pruned.double() - weight.double()
    return float(((delta @ gram.double()) * delta).sum())


def reference(weight, gram, sparsity, structure, block_size, dampening=0.01):
    """The sweep, column by column: groups by falling Gram diagonal, the set that costs least together."""
    W, H = weight.double().clone(), gram.double().clone()
    R, C = W.shape
    H += torch.eye(C, dtype=torch.float64) * (dampening * gram.double().diagonal().mean())
    unit = structure.size if structure else 1
    groups = H.diagonal().reshape(-1, unit).sum(1).argsort(descending=True, stable=True)
    perm = (groups[:, None] * unit + torch.arange(unit)).reshape(-1)
    W, inverse = W[:, perm], torch.linalg.inv(H[perm][:, perm])
    U = torch.linalg.cholesky(inverse, upper=True)
    keep = torch.ones(R, C, dtype=torch.bool)
    for j in range(C):
        if structure and j % unit == 0:
            rest = torch.linalg.inv(H[perm][:, perm][j:, j:])  # of the columns that are still free
            for row in range(R):
                costs = {}
                for out in itertools.combinations(range(unit), structure.pruned):
                    w = W[row, [j + o for o in out]]
                    costs[out] = float(w @ torch.linalg.inv(rest[list(out)][:, list(out)]) @ w)
                keep[row, [j + o for o in min(costs, key=costs.get)]] = False
        if structure is None and j % block_size == 0:
            end = min(j + block_size, C)
            scores = (W[:, j:end] / U.diagonal()[j:end]).square()
            count = round(sparsity * R * end) - int((~keep).sum())
            lowest = scores.flatten().argsort()[:count]
            part = torch.ones(R * (end - j), dtype=torch.bool)
            part[lowest] = False
            keep[:, j:end] = part.reshape(R, end - j)
        error = W[:, j] * ~keep[:, j] / U[j, j]
        W[:, j:] -= error[:, None] * U[j, j:]
        W[:, j] *= keep[:, j]
    result = torch.empty_like(W)
    result[:, perm] = W
    return result


@pytest.mark.parametrize("columns", [48, 80])
@pytest.mark.parametrize("block_size", [4, 10, 32, 128])
@pytest.mark.parametrize("structure", [None, TWO_FOUR, Structure(1, 4), Structure(2, 8)], ids=str)
def test_the_sweep_equals_the_reference(structure, block_size, columns):
    weight, stats = normal(6, columns), correlated(columns)
    (found,) = sparsegpt([weight], stats, 0.6, structure, block_size=block_size, rounds=0)
    expected = reference(weight, stats.gram, 0.6, structure, block_size)
    # a score that is a tie but for rounding would change a mask; these seeds have none
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("rounds", [0, 30])
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_masks_are_exact_and_better_than_by_score(structure, rounds):
    weights, stats = [normal(12, 96), normal(7, 96, seed=5) * 3], correlated(96)
    found = sparsegpt(weights, stats, 0.55, structure, rounds=rounds, block_size=24)
    plain, scored = magnitude(weights, 0.55, structure), wanda(weights, stats, 0.55, structure)
    for weight, result, a, b in zip(weights, found, plain, scored, strict=True):
        zeros = (result == 0).sum()
        if structure is None:
            assert int(zeros) == round(0.55 * weight.numel())
        else:
            groups = (result == 0).reshape(len(weight), -1, structure.size).sum(-1)
            assert bool((groups == structure.pruned).all()) and holds(result, structure)
        error = quadratic(weight, result, stats.gram)
        assert error < 0.5 * quadratic(weight, a, stats.gram)
        assert error < 0.6 * quadratic(weight, b, stats.gram)


@pytest.mark.parametrize("structure", [None, TWO_FOUR], ids=str)
def test_the_search_beats_the_sweep(structure):
    weight, stats = normal(24, 128), correlated(128)
    by_sweep, by_search = (
        quadratic(weight, sparsegpt([weight], stats, 0.5, structure, rounds=rounds)[0], stats.gram)
        for rounds in (0, 30)
    )
    assert by_search < 0.85 * by_sweep


def alternating(weight, hessian, keep_of, rounds):
    """The search by the formulas of alternating directions (Boza 2024, 2401.02938), in float64 with plain inverses."""
    root = hessian.double().diagonal().sqrt()
    H = hessian.double() / root / root[:, None]
    W = weight.double() * root
    D, V = W.clone(), torch.zeros_like(W)
    levels = -(-rounds // 3)
    for turn in range(rounds):
        rho = 0.1 ** (1 - (turn // 3) / max(levels - 1, 1))
        X = (W @ H + rho * D - V) @ torch.linalg.inv(H + rho * torch.eye(len(H), dtype=torch.float64))
        keep = keep_of((X + V / rho).abs())
        D = (X + V / rho) * keep
        V = V + rho * (X - D)
    return D / root, keep


@pytest.mark.parametrize("rounds", [1, 4, 30])
@pytest.mark.parametrize("structure", [None, TWO_FOUR])
def test_the_search_equals_the_reference(structure, rounds):
    weight, hessian = normal(24, 32), damped(correlated(32).needed_gram, 0.01)

    def keep_of(scores):
        return keep_best(scores, 0.5, structure)

    found, keep = search(weight, hessian, keep_of, rounds)
    expected, mask = alternating(weight, hessian, keep_of, rounds)
    assert (keep != mask).double().mean() < 0.02  # products are coarse, so weights of nearly one score may swap
    both = keep & mask
    assert float((found.double() - expected)[both].norm() / expected[both].norm()) < 0.02
    assert not found[~keep].any()


@pytest.mark.parametrize("structure", [None, TWO_FOUR], ids=str)
def test_uncorrelated_inputs_reduce_it_to_scores(structure):
    weight, stats = normal(8, 64), InputStats(torch.diag(normal(64, seed=3).square() + 0.5), 10)
    expected = weight * keep_best(weight.abs() * stats.gram.diagonal().sqrt(), 0.5, structure)
    (found,) = sparsegpt([weight], stats, 0.5, structure, rounds=0, dampening_frac=0, block_size=64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # the search may swap weights of nearly the same score; what is kept is unchanged all the same
    (found,) = sparsegpt([weight], stats, 0.5, structure, dampening_frac=0)
    kept = found != 0
    torch.testing.assert_close(found[kept], weight[kept], rtol=1e-4, atol=1e-5)
    assert quadratic(weight, found, stats.gram) < 1.02 * quadratic(weight, expected, stats.gram)


def test_equal_inputs_reduce_it_to_magnitude():
    weight, stats = normal(8, 64), InputStats(3 * torch.eye(64), 10)
    (found,) = sparsegpt([weight], stats, 0.5, TWO_FOUR, rounds=0)
    torch.testing.assert_close(found, magnitude([weight], 0.5, TWO_FOUR)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounds", [0, 30])
@pytest.mark.parametrize("structure", [None, TWO_FOUR], ids=str)
def test_zeros_are_preserved(structure, rounds):
    weight, stats = normal(8, 64), correlated(64)
    before = weight * keep_best(normal(8, 64, seed=8).abs(), 0.2, None)
    before[0, 0:3] = 0  # more than the structure asks for
    (found,) = sparsegpt([before], stats, 0.5, structure, preserve=True, rounds=rounds, block_size=16)
    assert not found[before == 0].any()
    if structure is None:
        assert int((found == 0).sum()) == round(0.5 * 8 * 64)
    else:
        assert holds(found, structure)
        (free,) = sparsegpt([before], stats, 0.5, structure, rounds=rounds, block_size=16)
        assert bool(free[before == 0].any()), "without it, zeros may come back"


@pytest.mark.parametrize("rounds", [0, 30])
@pytest.mark.parametrize("structure", [None, TWO_FOUR], ids=str)
def test_inputs_stay_as_they_are_and_runs_repeat(structure, rounds):
    weights, stats = [normal(8, 64), normal(5, 64, seed=4)], correlated(64)
    before = [w.clone() for w in weights], stats.gram.clone()
    first, second = (sparsegpt(weights, stats, 0.5, structure, rounds=rounds) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, before[0], strict=True))
    assert torch.equal(stats.gram, before[1])


def test_a_dead_input_goes_first():
    stats = correlated(64)
    gram = stats.gram.clone()
    gram[[3, 20]], gram[:, [3, 20]] = 0, 0
    for rounds in (0, 30):
        (found,) = sparsegpt([normal(8, 64)], InputStats(gram, 400), 0.5, TWO_FOUR, rounds=rounds)
        assert not found[:, [3, 20]].any()


def test_statistics_that_are_no_numbers():
    gram = correlated(64).gram
    gram[3, 7] = torch.inf
    with pytest.raises(NumericsError, match="NaN or infinity in the input activations"):
        sparsegpt([normal(4, 64)], InputStats(gram, 1), 0.5, TWO_FOUR)
    for rounds in (0, 30):
        with pytest.raises(NumericsError, match="not positive definite"):
            sparsegpt([normal(4, 64)], InputStats(-10 * torch.eye(64), 1), 0.5, TWO_FOUR, rounds=rounds)


def test_refit_is_least_squares():
    weight, hessian = normal(6, 40), damped(correlated(40).gram, 0.01)
    keep = keep_best(weight.abs(), 0.5, TWO_FOUR)
    found = refit(weight, weight * keep, hessian, keep, 60).double()
    H = hessian.double()
    for row in range(6):
        kept = keep[row].nonzero()[:, 0]
        exact = torch.linalg.solve(H[kept][:, kept], (weight[row].double() @ H)[kept])
        torch.testing.assert_close(found[row, kept], exact, rtol=1e-3, atol=1e-3)
        assert not found[row][~keep[row]].any()
    errors = [quadratic(weight, refit(weight, weight * keep, hessian, keep, n), hessian) for n in (0, 1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)


def test_a_dense_mask_gives_the_weight_back():
    weight, hessian = normal(6, 40), damped(correlated(40).gram, 0.01)
    everything = torch.ones_like(weight, dtype=torch.bool)
    found, keep = search(weight, hessian, lambda scores: everything, 3)
    assert bool(keep.all())
    torch.testing.assert_close(refit(weight, found, hessian, keep, 40), weight, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rounds", [0, 30])
def test_drift_is_undone(rounds):
    x = normal(400, 6, seed=1) @ normal(6, 48, seed=2) + 0.5 * normal(400, 48, seed=3)
    y = x @ (torch.eye(48) + 0.05 * normal(48, 48, seed=4))  # what the layers before made of it
    weight, gram = normal(12, 48), y.T @ y
    stats = InputStats(gram, 400, drift=(x - y).T @ y, paired=gram)
    errors = []
    for share in (0.0, 0.5, 1.0):
        (found,) = sparsegpt([weight], stats, 0.5, TWO_FOUR, rounds=rounds, correct=share)
        assert holds(found, TWO_FOUR)
        errors.append(float((x @ weight.T - y @ found.T).norm()))
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize(("penalty", "wanted"), [(0.2, 0.26), (0.26, 0.2), (1.0, 0.774), (0.1, 0.1)])
def test_an_inverse_is_moved_to_another_penalty(penalty, wanted):
    x = normal(40, 96).double()  # of half the rank: eigenvalues of zero are those that move most
    eye = torch.eye(96, dtype=torch.float64)
    given, exact = (torch.linalg.inv(x.T @ x / 40 + p * eye) for p in (penalty, wanted))
    middle, half = (1 + wanted / penalty) / 2, (wanted / penalty - 1) / 2
    bound = 1 / (2 * (middle / half) ** 2 - 1) if half else 0.0
    error = torch.linalg.eigvalsh(torch.linalg.solve(exact, shifted_inverse(given, penalty, wanted)) - eye).abs().max()
    assert error <= bound + 1e-9 < 0.009


def test_levels_of_the_penalty_share_a_factorization(monkeypatch):
    unit = correlated(64).gram
    root = unit.diagonal().sqrt()
    unit = unit / root / root[:, None]
    penalties = [0.1 * 10 ** (i / 9) for i in range(10)]
    exact = list(ridge_inverses(unit, penalties, 1, []))
    factored = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: factored.append(m) or cholesky(m))
    infos = []
    found = list(ridge_inverses(unit, penalties, 3, infos))
    assert len(found) == 10 and len(factored) == 4 and not torch.stack(infos).any()
    for i, (a, b) in enumerate(zip(found, exact, strict=True)):
        share = float((a - b).norm() / b.norm())
        assert share < 0.01 and (share == 0) == (i in (1, 4, 7, 9))
