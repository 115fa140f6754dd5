"""SmoothQuant's scales by hand, and what they are for (arXiv 2211.10438)."""

from dataclasses import replace

import pytest
import torch

from bitpress.math.activations import dynamic_scales, static_scale
from bitpress.math.awq import Reader
from bitpress.math.grid import Grid, QParams, dequantize, quantize
from bitpress.math.scales import find_qparams
from bitpress.math.smoothquant import (
    column_max,
    log_equalization_scale,
    rounding_noise,
    searched_scale,
    smoothquant_scale,
)
from bitpress.math.stats import InputStats, StatsAccumulator


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


# the search of the strength

INT8 = Grid(8, True, None, False, torch.float32)
INT4 = replace(INT8, bits=4)
NEEDS = frozenset({"range", "mean", "sample"})


def measured(x, readers, s, low, high):
    """Energy a token of what rounding adds to the outputs, in float64."""
    total = 0.0
    for reader in readers:
        w, y = reader.weight * s, x / s
        kept, seen = w, y
        if reader.grid is not None:
            qparams = find_qparams(w, reader.grid)
            kept = dequantize(quantize(w, qparams, reader.grid), qparams)
        if reader.inputs is not None:
            qparams = dynamic_scales(y, reader.inputs, None)
            if reader.fixed:
                scale, zero = static_scale(
                    (low / s).amin(), (high / s).amax(), "int", 8, reader.inputs.symmetric, y.dtype
                )
                shape = (len(y), 1)
                qparams = QParams(scale.expand(shape), None if zero is None else zero.expand(shape))
            seen = dequantize(quantize(y, qparams, reader.inputs), qparams)
        delta = seen.double() @ kept.double().T - y.double() @ w.double().T
        total += float(delta.square().sum()) / len(x)
    return total


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
def test_the_noise_is_what_rounding_adds(symmetric, fixed, group_size):
    x = normal(2000, 64) * torch.linspace(0.5, 4, 64) + 0.3
    inputs = replace(INT8, symmetric=symmetric)
    weights = replace(INT4, group_size=group_size)
    readers = [
        Reader(normal(48, 64, seed=1), weights, inputs=inputs, fixed=fixed),
        Reader(normal(16, 64, seed=2), None, inputs=inputs, fixed=fixed),
        Reader(normal(32, 64, seed=3), INT8),
        Reader(normal(32, 64, seed=4), None),
    ]
    s = torch.rand(64, generator=torch.Generator().manual_seed(5)) + 0.5
    low, high = x.amin(0), x.amax(0)
    for each in ([readers[0]], [readers[1]], [readers[2]], readers):
        told = rounding_noise(each, x, s, low, high)
        assert told == pytest.approx(measured(x, each, s, low, high), rel=0.1)
    assert rounding_noise(readers[3:], x, s, low, high) == 0


def heavy(tokens, seed):
    """A few channels large in every token, as after norms of language models."""
    x = normal(tokens, 96, seed=seed)
    x[:, ::24] *= 60
    return x


@pytest.mark.parametrize("kind", ["even", "heavy"])
def test_the_search_finds_a_strength_for_each_input(kind):
    make = {"even": lambda tokens, seed: normal(tokens, 96, seed=seed), "heavy": heavy}[kind]
    x, unseen = make(6000, 1), make(3000, 7)
    sums = StatsAccumulator(96, torch.device("cpu"), NEEDS)
    for part in x.split(700):
        sums.add(part)
    weights = [normal(40, 96, seed=2), normal(24, 96, seed=3)]
    readers = [Reader(w, INT8, inputs=INT8) for w in weights]
    columns = torch.arange(96)
    s = searched_scale(readers, sums.finish(), columns, 96)
    low, high = unseen.amin(0), unseen.amax(0)
    found = measured(unseen, readers, s, low, high)
    none = measured(unseen, readers, torch.ones(96), low, high)
    fixed = [smoothquant_scale(x.abs().amax(0), column_max(weights), a / 10) for a in range(11)]
    assert found <= 1.1 * min(none, *(measured(unseen, readers, f, low, high) for f in fixed))
    assert kind == "even" or found < 0.2 * none


def test_channels_that_are_dead_or_shared():
    x = normal(500, 8)
    x[:, 3] = 0
    sums = StatsAccumulator(8, torch.device("cpu"), NEEDS)
    sums.add(x * torch.tensor([9.0, 1, 1, 1, 9, 1, 1, 1]))
    s = searched_scale([Reader(normal(4, 8, seed=1), INT8, inputs=INT8)], sums.finish(), torch.arange(8) % 4, 4)
    assert s.shape == (4,) and (s > 0).all() and s[0] > s[1:].max()
