"""The factor of the inverse and the column sweep."""

import math

import pytest
import torch

from bitpress.errors import NumericsError
from bitpress.math.grid import Grid, QParams, dequantize, quantize
from bitpress.math.scales import find_qparams
from bitpress.math.sweep import LEAF, by_columns, inverse_by_halves, inverse_factors, sweep, walk


def positive(size, seed=0):
    """A well-conditioned correlated Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size + 8, size, generator=generator) @ torch.randn(size, size, generator=generator)
    gram = x.T @ x
    gram.diagonal().add_(0.05 * gram.diagonal().mean())
    return gram


def pascal(size):
    """Integers, positive definite with determinant 1, and ill-conditioned."""
    return torch.tensor([[math.comb(i + j, i) for j in range(size)] for i in range(size)], dtype=torch.float32)


@pytest.mark.parametrize("shape", [(8, 8), (9, 9), (65, 65), (3, 40, 40), (2, 33, 33)])
def test_inverse_of_a_triangle_by_halves(shape):
    """With sizes that halve evenly and sizes that do not, one matrix and several."""
    grams = [positive(shape[-1], seed) for seed in range(math.prod(shape[:-2]))]
    lower = torch.linalg.cholesky(torch.stack(grams).double()).reshape(shape).float()
    found = inverse_by_halves(lower, 8)
    expected = torch.linalg.inv(lower.double())
    assert found.shape == lower.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert not found.triu(1).any()


@pytest.mark.parametrize("size", [1, 2, 7, 16, 65, 130])
def test_factor_of_the_inverse(size):
    hessian = positive(size)
    before = hessian.clone()
    factor = inverse_factors(hessian)[0]
    assert factor.dtype == torch.float32
    assert torch.equal(factor, factor.triu())
    assert torch.equal(hessian, before)
    inverse = torch.linalg.inv(hessian.double())
    assert float((factor.T.double() @ factor.double() - inverse).norm() / inverse.norm()) < 1e-4
    # the factor with a positive diagonal is unique: the Cholesky factor of the paper
    expected = torch.linalg.cholesky(inverse, upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_double_precision_where_single_fails():
    hessian = pascal(13)
    assert torch.linalg.cholesky_ex(hessian.flip(0, 1))[1].item() != 0, "the test needs a harder matrix"
    factor = inverse_factors(hessian)[0].double()
    inverse = torch.linalg.inv(hessian.double())
    assert float((factor.T @ factor - inverse).norm() / inverse.norm()) < 1e-4


@pytest.mark.parametrize(
    "hessian",
    [torch.zeros(3, 3), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), -torch.eye(4), torch.full((3, 3), torch.nan)],
    ids=["zero", "indefinite", "negative", "nan"],
)
def test_not_positive_definite(hessian):
    with pytest.raises(NumericsError, match="not positive definite: raise dampening_frac"):
        inverse_factors(hessian)[0]


def test_two_columns_by_hand():
    grid = Grid(4, True, None, False, torch.float32)
    unit = QParams(torch.ones(1, 1), None)
    weight = torch.tensor([[0.4, 0.6]])
    factor = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    groups = torch.zeros(2, dtype=torch.int64)
    # 0.4 rounds to 0; its error 0.4 takes 0.5 * 0.4 from the second column: 0.4, which rounds to 0 too
    assert sweep(weight, factor, unit, groups, grid, 128).tolist() == [[0, 0]]
    # the error is divided by the pivot, the row of the factor is not
    factor = torch.tensor([[2.0, 0.5], [0.0, 1.0]])
    assert sweep(weight, factor, unit, groups, grid, 128).tolist() == [[0, 0]]
    factor = torch.tensor([[4.0, 0.5], [0.0, 1.0]])
    assert sweep(weight, factor, unit, groups, grid, 128).tolist() == [[0, 1]]
    shifted = QParams(torch.ones(1, 1), torch.full((1, 1), 3, dtype=torch.int8))
    assert sweep(weight, factor, shifted, groups, grid, 128).tolist() == [[3, 4]]
    # an error by clamping is compensated like any other: 9 becomes 7, and 2 * 0.5 goes to the second column
    weight, factor = torch.tensor([[9.0, 0.6]]), torch.tensor([[1.0, -0.5], [0.0, 1.0]])
    assert sweep(weight, factor, unit, groups, grid, 128).tolist() == [[7, 2]]
    assert weight.tolist() == [[9.0, torch.tensor(0.6).item()]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_correlation_it_rounds_to_nearest(symmetric):
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    grid = Grid(3, symmetric, 16, False, torch.float32)
    found = find_qparams(weight, grid)
    codes = sweep(weight, torch.eye(48) * 0.3, found, torch.arange(48) // 16, grid, 128)
    assert torch.equal(codes, quantize(weight, found, grid))


@pytest.mark.parametrize("columns", [1, LEAF, LEAF + 1, 37, 96])
@pytest.mark.parametrize("block_size", [1, 5, LEAF, LEAF + 1, 32, 64, 200])
def test_block_size_does_not_matter(columns, block_size):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, columns, generator=generator)
    before = weight.clone()
    grid = Grid(4, True, None, False, torch.float32)
    found, factor = find_qparams(weight, grid), inverse_factors(positive(columns))[0]
    groups = torch.zeros(columns, dtype=torch.int64)
    one = sweep(weight, factor, found, groups, grid, columns)
    other = sweep(weight, factor, found, groups, grid, block_size)
    assert other.shape == weight.shape and other.dtype == torch.int8
    # a code that rounding noise tips over changes the rest of its row
    assert int((one != other).any(1).sum()) <= 1
    assert torch.equal(weight, before)


@pytest.mark.parametrize("unit", [1, 4, 6, 32])
@pytest.mark.parametrize("block_size", [1, 5, 24, 64, 200])
def test_columns_of_a_unit_are_up_to_date_together(unit, block_size):
    columns = 96
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(2)).double()
    factor = torch.randn(columns, columns, generator=torch.Generator().manual_seed(3)).double().triu() * 0.1
    expected = weight.T.clone()
    errors = torch.zeros(columns, 3, dtype=torch.float64)
    work = by_columns(weight.float())
    visited = []

    def project(j, error):
        if j % unit == 0:
            seen = torch.stack([weight.T[k] - factor[:j, k] @ errors[:j] for k in range(j, j + unit)])
            torch.testing.assert_close(work[j : j + unit].double(), seen, rtol=1e-4, atol=1e-4)
        errors[j] = (weight.T[j] - factor[:j, j] @ errors[:j]).round()
        error.copy_(errors[j])
        visited.append(j)

    walk(work, factor.float(), project, block_size, unit)
    assert visited == list(range(columns))
    expected -= factor.triu(1).T @ errors
    torch.testing.assert_close(work.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_masked_weights_are_zero_and_compensated(symmetric):
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(0)) + 0.3
    keep = torch.rand(6, 48, generator=torch.Generator().manual_seed(1)) < 0.5
    grid = Grid(4, symmetric, 16, False, torch.float32)
    found, groups = find_qparams(weight, grid), torch.arange(48) // 16
    factor = inverse_factors(positive(48))[0]
    codes = sweep(weight, factor, found, groups, grid, 8, keep)
    dense = dequantize(codes, found)
    assert not dense[~keep].any() and bool(dense[keep].any())
    # column by column in float64
    work, U = weight.double().clone(), factor.double()
    for j in range(48):
        scale = found.scale[:, j // 16].double()
        zero = 0.0 if symmetric else found.zero_point[:, j // 16].double()
        code = ((work[:, j] / scale + zero).round().clamp(grid.qmin, grid.qmax) - zero) * keep[:, j]
        work[:, j:] -= ((work[:, j] - code * scale) / U[j, j])[:, None] * U[j, j:]
        assert int((dense[:, j].double() - code * scale).abs().gt(1e-5).sum()) <= 1, j
    every = torch.ones(6, 48, dtype=torch.bool)
    plain = sweep(weight, factor, found, groups, grid, 8)
    assert torch.equal(sweep(weight, factor, found, groups, grid, 8, every), plain)
