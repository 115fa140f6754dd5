"""Pruning and quantizing the same linears in one stage."""

import pytest
import torch

from bitpress.chain import check_zeros, solve
from bitpress.errors import NumericsError
from bitpress.math import sparsegpt
from bitpress.math.grid import Grid, Solved
from bitpress.math.masks import Structure, find_structure, holds
from bitpress.math.scales import find_qparams
from bitpress.math.stats import InputStats
from bitpress.modifiers import GPTQModifier, MagnitudePruningModifier, QuantizationModifier, SparseGPTModifier
from bitpress.sites import Step

CHANNEL = {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}, "targets": ["Linear"]}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns, tokens=400):
    x = normal(tokens, 6, seed=1) @ normal(6, columns, seed=2) + 0.5 * normal(tokens, columns, seed=3)
    return InputStats(x.T @ x, tokens)


def steps(*modifiers, sparsity=0.5):
    def step(m):
        return Step(m, m.claims()[0], None if isinstance(m, GPTQModifier | QuantizationModifier) else sparsity)

    return tuple(step(m) for m in modifiers)


def share(weight, dense, gram):
    delta, weight, gram = dense.double() - weight.double(), weight.double(), gram.double()
    return float(((delta @ gram) * delta).sum() / ((weight @ gram) * weight).sum())


def one_sweep(weight, gram):
    """The paper's joint sweep in float64: of four columns keep the two of largest w^2 / U_jj^2, then round."""
    W, H = weight.double().clone(), gram.double().clone()
    R, C = W.shape
    H += 0.01 * H.diagonal().mean() * torch.eye(C, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    grid = Grid(4, True, None, False, torch.float32)
    scale = find_qparams(weight, grid, gram.diagonal(), search=True).scale.double()[:, 0]
    keep = torch.zeros(R, C, dtype=torch.bool)
    for j in range(C):
        if j % 4 == 0:
            scores = (W[:, j : j + 4] / U.diagonal()[j : j + 4]).square()
            keep[:, j : j + 4] = torch.zeros(R, 4, dtype=torch.bool).scatter(1, scores.topk(2).indices, True)
        q = (W[:, j] / scale).round().clamp(-8, 7) * keep[:, j] * scale
        W[:, j + 1 :] -= ((W[:, j] - q) / U[j, j])[:, None] * U[j, j + 1 :]
        W[:, j] = q
    return W


def test_prune_and_round_beats_the_joint_sweep():
    weights, stats = [normal(24, 96), normal(8, 96, seed=7)], correlated(96)
    chain = steps(
        SparseGPTModifier(mask_structure="2:4"), GPTQModifier(config_groups={"group_0": CHANNEL}, ignore=["lm_head"])
    )
    before = [w.clone() for w in weights]
    found = solve(chain, weights, stats, torch.bfloat16)
    for weight, copy, z in zip(weights, before, found, strict=True):
        assert torch.equal(weight, copy)
        dense = z.dense()
        assert find_structure(dense) == Structure(2, 4)
        assert share(weight, dense, stats.gram) < 0.8 * share(weight, one_sweep(weight, stats.gram), stats.gram)
        # the error is that of both steps together
        assert float(z.error) == pytest.approx(share(weight, dense, stats.gram), rel=0.05)
    again = solve(chain, weights, stats, torch.bfloat16)
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(found, again, strict=True))


def test_drift_is_undone_once():
    weight, stats = normal(12, 48), correlated(48)
    drift = 0.1 * normal(48, 48, seed=9) @ stats.gram
    drifted = InputStats(stats.gram, 400, drift=drift, paired=stats.gram)
    rounding = {"config_groups": {"group_0": CHANNEL}, "ignore": ["lm_head"]}
    pruner = SparseGPTModifier(mask_structure="2:4", correct=0.5)
    (once,) = solve(steps(pruner, GPTQModifier(**rounding)), [weight], drifted, torch.bfloat16)
    (twice,) = solve(steps(pruner, GPTQModifier(**rounding, correct=0.5)), [weight], drifted, torch.bfloat16)
    assert torch.equal(once.codes, twice.codes)
    (never,) = solve(
        steps(SparseGPTModifier(mask_structure="2:4"), GPTQModifier(**rounding)), [weight], drifted, torch.bfloat16
    )
    assert not torch.equal(once.codes, never.codes)


def test_rounding_to_nearest_keeps_zeros_too():
    weight = normal(8, 32)
    for symmetric in (True, False):
        args = {**CHANNEL["weights"], "symmetric": symmetric}
        rounding = QuantizationModifier(config_groups={"group_0": {"weights": args, "targets": ["Linear"]}})
        (z,) = solve(steps(MagnitudePruningModifier(mask_structure="2:4"), rounding), [weight], None, torch.bfloat16)
        assert find_structure(z.dense()) == Structure(2, 4) and z.codes is not None


def test_pruning_alone_is_stored_as_it_is():
    weight, stats = normal(8, 32), correlated(32)
    (z,) = solve(steps(SparseGPTModifier(sparsity=0.5)), [weight], stats, torch.bfloat16)
    assert z.codes is None and z.weight.dtype == torch.bfloat16
    assert int((z.weight == 0).sum()) == 128
    assert float(z.error) == pytest.approx(share(weight, z.weight, stats.gram), rel=0.05)
    (z,) = solve(steps(SparseGPTModifier(sparsity=0), sparsity=0.0), [weight], stats, torch.bfloat16)
    assert torch.equal(z.weight, weight.to(torch.bfloat16))


def test_a_solver_that_loses_zeros_is_caught():
    pruned = normal(8, 32)
    pruned[:, ::2] = 0
    chain = steps(SparseGPTModifier(mask_structure="2:4"))

    def check(before, after, chain):
        check_zeros([before], [Solved(None, None, torch.tensor(0.0), weight=after)], chain)

    check(pruned, pruned, chain)
    lost = pruned.clone()
    lost[3, 4] = 1
    with pytest.raises(NumericsError, match="a pruned weight is no longer zero"):
        check(pruned, lost, ())
    check(lost, lost, ())
    assert not holds(lost, Structure(2, 4))
    with pytest.raises(NumericsError, match="the weight is not 2:4 after pruning"):
        check(lost, lost, chain)


@pytest.mark.parametrize("structure", ["0:0", "2:4"])
def test_a_matrix_that_is_definite_in_float64_only_is_told(structure, monkeypatch):
    """Which matrix float32 cannot factor depends on the library, so it is said to fail."""
    real = sparsegpt.inverse_factors
    fails = lambda h: (real(h)[0], [0] if h.dtype == torch.float32 else [])  # noqa: E731
    modifier = SparseGPTModifier(sparsity=0.5, mask_structure=structure, mask_rounds=0)
    weight, stats = normal(6, 32), correlated(32)
    (usual,) = solve(steps(modifier), [weight], stats, torch.float32)
    monkeypatch.setattr(sparsegpt, "inverse_factors", fails)
    (found,) = solve(steps(modifier), [weight], stats, torch.float32)
    assert usual.note == "" and "float64" in found.note and found.dense().dtype == torch.float32
    exact = modifier.prune([weight.double()], stats.double(), 0.5)[0]
    assert torch.equal(found.dense(), exact.float()) and (exact == 0).double().mean() == 0.5
    torch.testing.assert_close(found.dense(), usual.dense(), rtol=1e-3, atol=1e-3)
    rounding = GPTQModifier(config_groups={"group_0": CHANNEL}, ignore=["lm_head"])
    (both,) = solve(steps(modifier, rounding), [weight], stats, torch.float32)
    assert "float64" in both.note
    monkeypatch.undo()
    with pytest.raises(NumericsError, match="not positive definite"):
        solve(steps(modifier), [weight], InputStats(-stats.gram, 100), torch.float32)
