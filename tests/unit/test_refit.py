"""Scales by least squares and corrected targets, against naive fp64 references."""

import pytest
import torch

from bitpress.errors import NumericsError
from bitpress.math.correct import correction
from bitpress.math.gptq import gptq
from bitpress.math.grid import Grid, QParams, dequantize, quantize
from bitpress.math.refit import RIDGE, refit_scales
from bitpress.math.scales import find_qparams
from bitpress.math.stats import InputStats, StatsAccumulator

C = 24


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(seed=1):
    x = normal(200, C, seed=seed) @ normal(C, C, seed=seed + 1)
    return x.T @ x


def grid_of(group_size=8, symmetric=True, **keys):
    return Grid(3, symmetric, group_size, keys.pop("per_tensor", False), torch.float32, **keys)


def loss(weight, dense, gram):
    delta = dense.double() - weight.double()
    return ((delta @ gram.double()) * delta).sum(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [4, 8, None])
def test_scales_are_those_of_the_normal_equations(group_size, symmetric):
    weight, gram, grid = normal(6, C), gram_of(), grid_of(group_size, symmetric)
    qparams = find_qparams(weight, grid)
    codes = quantize(weight, qparams, grid)
    found = refit_scales(weight @ gram, codes, gram, qparams, grid)
    G, size = grid.groups(C), C // grid.groups(C)
    H = gram.double()
    for r in range(6):
        z = torch.zeros(G, C, dtype=torch.float64)
        for g in range(G):
            zero = 0 if qparams.zero_point is None else qparams.zero_point[r, g].double()
            z[g, g * size : (g + 1) * size] = codes[r, g * size : (g + 1) * size].double() - zero
        A, b = z @ H @ z.T, z @ H @ weight[r].double()
        ridge = RIDGE * A.diagonal().mean()
        expected = torch.linalg.solve(A + ridge * torch.eye(G), b + ridge * qparams.scale[r].double())
        old = qparams.scale[r].double()
        expected = torch.where((expected > old / 2) & (expected < old * 2), expected, old)
        torch.testing.assert_close(found.scale[r].double(), expected, rtol=1e-3, atol=1e-6)
    before, after = (loss(weight, dequantize(codes, q), gram) for q in (qparams, found))
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < before.sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 11, 1 << 20])
def test_several_inputs_together_are_as_each_alone(rows, symmetric, monkeypatch):
    monkeypatch.setattr("bitpress.math.refit.CHUNK", rows * C)
    grid = grid_of(symmetric=symmetric)
    posed = []
    for seed in range(4):
        weight, gram = normal(5, C, seed=seed), gram_of(seed)
        q = find_qparams(weight, grid)
        posed.append((weight @ gram, quantize(weight, q, grid), gram, q))
    stacked = [torch.stack(parts) for parts in list(zip(*posed, strict=True))[:3]]
    together = refit_scales(*stacked, QParams.stack([q for *_, q in posed]), grid)
    for e, one in enumerate(posed):
        assert torch.equal(together.of(e).scale, refit_scales(*one, grid).scale)
        assert not torch.equal(together.of(e).scale, one[3].scale)


@pytest.mark.parametrize("keys", [{"per_tensor": True, "group_size": None}, {"block_rows": 2}])
def test_shared_scales_stay(keys):
    weight, grid = normal(6, C), grid_of(**keys)
    qparams = find_qparams(weight, grid)
    gram = gram_of()
    assert refit_scales(weight @ gram, quantize(weight, qparams, grid), gram, qparams, grid) is qparams


def test_a_group_of_zeros_keeps_its_scale():
    weight, grid = normal(3, C), grid_of()
    weight[1, 8:16] = 0
    qparams = find_qparams(weight, grid)
    gram = gram_of()
    found = refit_scales(weight @ gram, quantize(weight, qparams, grid), gram, qparams, grid)
    assert found.scale[1, 1] == qparams.scale[1, 1]
    assert torch.isfinite(found.scale).all()


def test_each_round_of_refinement_lowers_the_error():
    weight, stats = normal(32, C), InputStats(gram_of(), 200)
    errors = [float(gptq([weight], stats, grid_of(), refine=rounds)[0].error) for rounds in (0, 1, 3)]
    assert errors[0] > errors[1] >= errors[2] * (1 - 1e-4)


def paired(seed=5):
    full = normal(400, C, seed=seed)
    seen = full + 0.2 * normal(400, C, seed=seed + 1) @ normal(C, C, seed=seed + 2) * 0.2
    return full, seen


def test_the_correction_is_damped_least_squares():
    full, seen = paired()
    drift, gram = (full - seen).T @ seen, seen.T @ seen
    found = correction(drift, gram, 0.5, 0.1)
    damped = gram.double() + 0.1 * gram.double().diagonal().mean() * torch.eye(C)
    expected = 0.5 * drift.double() @ torch.linalg.inv(damped)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    weight = normal(8, C)
    wanted = full @ weight.T
    plain = (seen @ weight.T - wanted).square().sum()
    assert (seen @ (weight + weight @ found).T - wanted).square().sum() < plain


def test_no_drift_no_correction_and_no_numbers():
    gram = gram_of()
    assert correction(torch.zeros(C, C), gram, 1.0).abs().max() == 0
    assert correction(torch.zeros(C, C), torch.zeros(C, C), 1.0).abs().max() == 0
    with pytest.raises(NumericsError, match="NaN or infinity"):
        correction(torch.full((C, C), float("nan")), gram, 1.0)


def test_drift_is_summed_without_tokens_of_extreme_energy():
    full, seen = paired()
    seen[7] *= 1000
    sums = StatsAccumulator(C, torch.device("cpu"), frozenset({"gram", "drift"}))
    sums.add(seen[:200], full[:200])
    sums.add(seen[200:])  # not in the other stream
    stats = sums.finish()
    usual = torch.arange(200) != 7
    x, f = seen[:200][usual].double(), full[:200][usual].double()
    torch.testing.assert_close(stats.drift.double(), (f - x).T @ x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stats.paired.double(), x.T @ x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stats.gram.double(), seen.double().T @ seen.double(), rtol=1e-3, atol=1.0)
    assert stats.tokens == 400


def test_a_corrected_layer_gives_what_the_full_one_gave():
    full, seen = paired()
    weight = normal(16, C)
    stats = InputStats(seen.T @ seen, 400, drift=(full - seen).T @ seen, paired=seen.T @ seen)
    grid = Grid(8, True, None, False, torch.float32)
    wanted = full @ weight.T
    errors = [
        (seen @ gptq([weight], stats, grid, correct=share)[0].dense().T - wanted).square().sum() for share in (0.0, 1.0)
    ]
    assert errors[1] < errors[0]
