"""SmoothQuant's scales by hand, and what they are for (arXiv 2211.10438)."""

import pytest
import torch

from bitpress.math.smoothquant import column_max, log_equalization_scale, smoothquant_scale
from bitpress.math.stats import InputStats


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_the_formula(strength):
    x, w = torch.tensor([10.0, 0.5, 3.0]), torch.tensor([0.2, 0.1, 2.0])
    expected = [a**strength / b ** (1 - strength) for a, b in zip(x.tolist(), w.tolist(), strict=True)]
    torch.testing.assert_close(smoothquant_scale(x, w, strength), torch.tensor(expected))


def test_dead_channels_keep_scale_one():
    s = smoothquant_scale(torch.tensor([0.0, 3.0, 3.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert s[:2].tolist() == [1, 1] and s[2] != 1
    assert log_equalization_scale(torch.tensor([0.0, 6.0])).tolist() == [1, 2]  # 6 / log2(8)


def test_column_max_over_weights():
    assert column_max([torch.tensor([[1.0, -4.0]]), torch.tensor([[-3.0, 2.0]])]).tolist() == [3, 4]


def int8(x, dim):
    scale = x.abs().amax(dim, keepdim=True) / 127
    return (x / scale).round() * scale


def test_it_lowers_the_error_of_int8_where_channels_stick_out():
    x, w = normal(300, 64), normal(32, 64, seed=1)
    x[:, ::16] *= 50
    exact = x.double() @ w.T.double()

    def error(s):
        return float((int8(x / s, -1).double() @ int8(w * s, -1).T.double() - exact).square().sum())

    s = smoothquant_scale(x.abs().amax(0), column_max([w]), 0.5)
    assert error(s) < 0.3 * error(torch.ones(64))


def test_statistics_of_the_smoothed_input_need_no_second_pass():
    x = normal(200, 24, seed=3) * torch.linspace(0.1, 9, 24)
    s = torch.rand(24, generator=torch.Generator().manual_seed(5)) + 0.2
    stats = InputStats(x.T @ x, 200, x.abs().sum(0), x.amin(0), x.amax(0)).smoothed(s)
    y = x / s
    torch.testing.assert_close(stats.gram, (y.T.double() @ y.double()).float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(stats.sum_abs, y.abs().sum(0))
    torch.testing.assert_close(stats.low, y.amin(0))
    torch.testing.assert_close(stats.high, y.amax(0))
    assert stats.tokens == 200
