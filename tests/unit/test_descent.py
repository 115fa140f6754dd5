"""Coordinate descent on the codes, against one column at a time in float64."""

import itertools

import pytest
import torch

from bitpress.math.descent import descend
from bitpress.math.grid import Grid, QParams, dequantize, quantize
from bitpress.math.scales import find_qparams


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positive(columns):
    x = normal(200, 5, seed=1) @ normal(5, columns, seed=2) + 0.5 * normal(200, columns, seed=3)
    return x.T @ x + torch.eye(columns)


def error(weight, codes, qparams, hessian):
    delta = dequantize(codes, qparams).double() - weight.double()
    return float(((delta @ hessian.double()) * delta).sum())


def reference(weight, codes, hessian, qparams, grid, passes, keep):
    W, H, q = weight.double(), hessian.double(), codes.double().clone()
    C = W.shape[1]
    spread = C // qparams.scale.shape[1]
    scale = qparams.scale.double().repeat_interleave(spread, 1)
    zero = 0 * scale if qparams.zero_point is None else qparams.zero_point.double().repeat_interleave(spread, 1)
    for _ in range(passes):
        for j in range(C):
            gradient = (W - (q - zero) * scale) @ H[:, j]
            wish = (q[:, j] - zero[:, j]) * scale[:, j] + gradient / H[j, j]
            rounded = (wish / scale[:, j] + zero[:, j]).round().clamp(grid.qmin, grid.qmax)
            q[:, j] = torch.where(keep[:, j], rounded, zero[:, j])
    return q


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [5, 16, 100])
def test_equals_one_column_at_a_time(block_size, symmetric, group_size):
    weight, hessian = normal(10, 48), positive(48)
    grid = Grid(3, symmetric, group_size, False, torch.float32)
    qparams, groups = find_qparams(weight, grid), torch.arange(48) // (group_size or 48)
    keep = normal(10, 48, seed=5) > -0.3
    start = quantize(weight * keep, qparams, grid)
    before = start.clone()
    found = descend(weight, start, hessian, qparams, groups, grid, block_size, passes=2, keep=keep)
    expected = reference(weight, start, hessian, qparams, grid, 2, keep)
    # a value on a boundary of rounding may fall to the other side, which changes the rest of its row
    assert int((found.double() != expected).any(1).sum()) <= 1
    assert not dequantize(found, qparams)[~keep].any()
    assert torch.equal(start, before)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_never_rises(symmetric):
    weight, hessian = normal(10, 48), positive(48)
    grid = Grid(4, symmetric, 16, False, torch.float32)
    qparams, groups = find_qparams(weight, grid), torch.arange(48) // 16
    errors, codes = [], quantize(weight, qparams, grid)
    for passes in range(5):
        found = descend(weight, codes, hessian, qparams, groups, grid, 32, passes=passes)
        errors.append(error(weight, found, qparams, hessian))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[0] == error(weight, codes, qparams, hessian) and errors[-1] < 0.5 * errors[0]


def test_another_order_of_columns():
    weight, hessian = normal(6, 32), positive(32)
    grid = Grid(3, True, 8, False, torch.float32)
    qparams, perm = find_qparams(weight, grid), torch.randperm(32, generator=torch.Generator().manual_seed(0))
    groups = perm // 8
    codes = quantize(weight, qparams, grid)[:, perm]
    found = descend(weight[:, perm], codes, hessian[perm][:, perm], qparams, groups, grid, 8, passes=2)
    back = torch.empty_like(found)
    back[:, perm] = found
    start = quantize(weight, qparams, grid)
    assert error(weight, back, qparams, hessian) < 0.7 * error(weight, start, qparams, hessian)


def test_uncorrelated_inputs_leave_nothing_to_do():
    weight, grid = normal(4, 16), Grid(4, True, None, False, torch.float32)
    qparams = find_qparams(weight, grid)
    codes = quantize(weight, qparams, grid)
    hessian = torch.diag(normal(16, seed=2).square() + 0.1)
    groups = torch.zeros(16, dtype=torch.int64)
    assert torch.equal(descend(weight, codes, hessian, qparams, groups, grid, 8, passes=1), codes)
    far = QParams(qparams.scale, None)
    assert torch.equal(descend(weight, torch.zeros_like(codes), hessian, far, groups, grid, 8, passes=1), codes)
