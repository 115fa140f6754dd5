"""Scales and zero points: the range of what shares them, or the best of the candidates, by hand in float64."""

import pytest
import torch

from bitpress.math import scales as scales_module
from bitpress.math.grid import SHRINK, QParams, dequantize, quantize, values_of
from bitpress.math.scales import find_all, find_qparams
from grids import DTYPES, KINDS, LARGEST, SIZE, STRATEGIES, C, R, by_hand, float_grid, grid, random, spread


def group_sums(squares, g):
    """Sums of (R, C) over what shares a scale: (R, G), or one number."""
    return squares.sum() if g.per_tensor else squares.reshape(R, g.groups(C), -1).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_symmetric_minmax_scales(strategy, dtype):
    weight = random(R, C)
    found = find_qparams(weight, grid(4, True, strategy, dtype))
    absmax = {
        "tensor": weight.abs().amax().expand(R, 1),
        "channel": weight.abs().amax(1, keepdim=True),
        "group": weight.abs().reshape(R, 3, SIZE).amax(-1),
    }[strategy]
    assert found.zero_point is None
    assert found.scale.dtype == dtype
    torch.testing.assert_close(found.scale, (absmax * 2 / 15).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("shift", [0.5, 20, -20])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_asymmetric_minmax_covers_the_range_and_zero(strategy, shift):
    weight = random(R, C) + shift
    g = grid(4, False, strategy)
    found = find_qparams(weight, g)
    assert found.scale.shape == found.zero_point.shape == (R, g.groups(C))
    assert found.zero_point.dtype == torch.int8
    scale, zero = spread(found.scale, g), spread(found.zero_point, g)
    low, high = (g.qmin - zero - 0.5) * scale, (g.qmax - zero + 0.5) * scale
    assert bool(((low <= weight + 1e-5) & (weight - 1e-5 <= high)).all())
    torch.testing.assert_close(found.scale.double() * 15, spans(weight, g), rtol=1e-6, atol=0)


def spans(weight, g):
    grouped = weight.double().reshape((1, 1, -1) if g.per_tensor else (R, g.groups(C), -1))
    span = grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)
    return span.expand(R, g.groups(C))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_minmax_errs_by_half_a_step_at_most(bits, symmetric):
    weight, g = random(R, C), grid(bits, symmetric)
    found = find_qparams(weight, g)
    steps = (dequantize(quantize(weight, found, g), found).double() - weight).abs() / spread(found.scale, g)
    assert 0.4 < float(steps.max()) < 0.5 + 1e-4


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("weighted", [False, True], ids=["mse", "hessian"])
def test_search_takes_the_best_candidate(weighted, bits, strategy, symmetric, monkeypatch):
    monkeypatch.setattr(scales_module, "CHUNK", 100)  # several chunks, the last one partly filled
    weight, g = random(R, C), grid(bits, symmetric, strategy)
    importance = random(C, seed=1).abs() if weighted else None
    weights = torch.ones(C, dtype=torch.float64) if importance is None else importance.double()

    def loss(found):
        return group_sums((by_hand(weight, found.scale, found.zero_point, g) - weight).square() * weights, g)

    minmax = find_qparams(weight, g)
    best = loss(find_qparams(weight, g, importance, search=True))
    assert bool((best <= loss(minmax) * (1 + 1e-4)).all())
    if bits < 8:
        assert float(best.sum()) < float(loss(minmax).sum())
    # every candidate, from the extreme weights shrunk by hand
    grouped = weight.reshape((1, 1, -1) if g.per_tensor else (R, g.groups(C), -1))
    low, high = (x.expand(R, g.groups(C)) for x in (grouped.amin(-1), grouped.amax(-1)))
    for share in SHRINK:
        if symmetric:
            candidate = QParams(torch.maximum(low.abs(), high.abs()) * share * 2 / (2**bits - 1), None)
        else:
            bottom = (low * share).clamp(max=0)
            scale = ((high * share).clamp(min=0) - bottom) / (2**bits - 1)
            candidate = QParams(scale, (g.qmin - bottom / scale).round().clamp(g.qmin, g.qmax))
        assert bool((best <= loss(candidate) * (1 + 1e-3)).all()), share


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_negative_scale_gives_the_larger_side_the_extra_code(bits):
    """A group whose every weight is one of the codes, the largest with the sign that has none."""
    g = grid(bits)
    codes = torch.arange(g.qmin, g.qmax + 1).repeat(R, SIZE)[:, :SIZE].float()
    codes[:, 0] = g.qmin
    for sign in (1.0, -1.0):
        found = find_qparams(codes * sign * 0.01, g, search=True)
        assert bool((found.scale * sign > 0).all())
        back = dequantize(quantize(codes * sign * 0.01, found, g), found)
        assert float((back / (codes * sign * 0.01) - 1).nan_to_num().abs().max()) < 0.1
    assert bool((find_qparams(codes * -0.01, g).scale > 0).all())  # min-max is that of everyone
    assert bool((find_qparams(codes * -0.01, grid(8), search=True).scale > 0).all())


def test_importance_matters():
    weight, g = random(R, C), grid(3)
    importance = torch.full((C,), 1e-3)
    importance[3::SIZE] = 1.0
    plain, weighted = find_qparams(weight, g, search=True), find_qparams(weight, g, importance, search=True)
    error = [(by_hand(weight, q.scale, None, g) - weight)[:, 3::SIZE].square().sum() for q in (plain, weighted)]
    assert error[1] < 0.5 * error[0]


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_zeros(dtype, strategy, symmetric, search):
    weight = random(R, C)
    weight[:, SIZE : 2 * SIZE] = 0
    weight[1] = 0
    for w in (weight, torch.zeros(R, C)):
        g = grid(4, symmetric, strategy, dtype)
        found = find_qparams(w, g, torch.ones(C), search=search)
        assert bool(torch.isfinite(found.scale).all()) and bool((found.scale != 0).all())
        dense = dequantize(quantize(w, found, g), found)
        assert bool((dense[w == 0] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_below_the_dtype_give_the_smallest_normal_scale(dtype):
    weight = torch.full((1, SIZE), 1e-30 if dtype == torch.float16 else 1e-38)
    found = find_qparams(weight, grid(4, True, "group", dtype))
    assert found.scale.item() == torch.finfo(dtype).tiny


def test_a_scale_rounded_down_leaves_the_zero_point_in_range():
    weight = -torch.linspace(1, 2, 200)[:, None].expand(200, SIZE).contiguous()
    found = find_qparams(weight, grid(8, False, "group", torch.bfloat16))
    assert bool((found.scale.float() * 255.5 < 1 + torch.arange(200)[:, None] / 199).any()), "128 would be nearest"
    assert int(found.zero_point.int().min()) >= 126


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_is_on_asymmetric_grids(dtype, bits, search):
    g = grid(bits, False, "group", dtype)
    shift = torch.tensor([0.0, 5.0, -5.0, 0.5, -0.5, 100.0])[:, None]
    weight = random(R, C).clamp(-4, 4) + shift
    zero = find_qparams(weight, g, search=search).zero_point.int()
    assert bool(((zero >= g.qmin) & (zero <= g.qmax)).all())
    assert bool((zero[[1, 5]] == g.qmin).all()), "all weights are positive"
    assert bool((zero[2] >= g.qmax - 1).all()), "all weights are negative; the scale may be rounded up"
    found = find_qparams(weight, g, search=search)
    back = dequantize(quantize(torch.zeros(R, C), found, g), found)
    assert bool((back == 0).all())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("values", KINDS)
def test_the_largest_weight_is_the_largest_float(values, strategy):
    weight, g = random(R, C), float_grid(values, strategy=strategy)
    found = find_qparams(weight, g)
    grouped = (weight / spread(found.scale, g).float()).reshape(R, g.groups(C), -1).abs()
    largest = grouped.amax() if g.per_tensor else grouped.amax(-1)
    torch.testing.assert_close(largest, torch.full_like(largest, LARGEST[values]), rtol=1e-6, atol=0)
    assert quantize(weight, found, g).dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("search", [False, True])
def test_a_block_has_one_scale(search):
    weight, g = random(64, C), float_grid("e4m3", block_rows=16)
    found = find_qparams(weight, g, random(C, seed=1).abs(), search=search)
    blocks = found.scale.reshape(4, 16, 3)
    assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
    assert g.scale_shape(64, C) == (4, 3) and torch.equal(g.repeated(g.once(found.scale), 64), found.scale)
    if not search:
        absmax = weight.reshape(4, 16, 3, SIZE).abs().amax((1, 3))
        torch.testing.assert_close(g.once(found.scale), absmax / 448, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", KINDS)
def test_powers_of_two_are_the_smallest_that_do(values, dtype):
    weight, g = random(R, C) * 0.1, float_grid(values, "power of two", dtype=dtype)
    found = find_qparams(weight, g)
    scale = found.scale.double()
    assert torch.equal(scale.log2(), scale.log2().round())
    # half a step beyond the largest float is still rounded to it
    limit = LARGEST[values] + float(KINDS[values][-1] - KINDS[values][-2]) / 2
    ratio = weight.double().abs().reshape(R, 3, SIZE).amax(-1) / scale
    assert bool(((ratio < limit) & (ratio >= limit / 2)).all())


def test_the_rule_of_powers_of_two_is_that_of_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils")
    absmax = torch.cat([random(500).abs() * 3, torch.tensor([7.0, 6.999, 3.5, 1.75, 0.4375])])
    for bits, values in ((4, "e2m1"), (6, "e2m3")):
        if bits == 6 and not hasattr(helpers, "FP6_E2M3_DATA"):
            continue
        weight = absmax[:, None].expand(-1, SIZE).contiguous()
        ours = find_qparams(weight, float_grid(values, "power of two")).scale[:, 0]
        assert torch.equal(ours, 2.0 ** (helpers.generate_mx_scales(absmax, bits) - 127))


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_level_scales(dtype, search):
    weight, g = random(R, C) * 0.05, float_grid("e2m1", "two-level", dtype=dtype)
    found = find_qparams(weight, g, search=search)
    assert found.global_scale.dtype == torch.float32 and found.global_scale.shape == (1,)
    torch.testing.assert_close(found.global_scale, 448 * 6 / weight.abs().amax().reshape(1))
    local = found.scale.float()
    assert found.scale.dtype == dtype
    assert torch.equal(local, local.to(torch.float8_e4m3fn).float()) and float(local.max()) <= 448
    assert torch.equal(found.effective(), local / found.global_scale)
    dense = dequantize(quantize(weight, found, g), found)
    assert dense.dtype == dtype
    grouped = weight.reshape(R, 3, SIZE)
    assert bool(((dense.float() - weight).abs().reshape(R, 3, SIZE) <= grouped.abs().amax(-1, keepdim=True) / 5).all())


@pytest.mark.parametrize(
    ("values", "scales"),
    [
        ("e4m3", "free"),
        ("e2m1", "two-level"),
        ("e2m1", "power of two"),
        ("e2m3", "power of two"),
        ("e4m3", "power of two"),
    ],
)
@pytest.mark.parametrize("weighted", [False, True], ids=["mse", "hessian"])
def test_search_of_float_scales_takes_the_best_candidate(values, scales, weighted):
    weight, g = random(R, C), float_grid(values, scales)
    importance = random(C, seed=1).abs() if weighted else torch.ones(C)

    def loss(q):
        error = values_of(quantize(weight, q, g)).double() * spread(q.effective(), g) - weight.double()
        return group_sums(error.square() * importance, g)

    best = loss(find_qparams(weight, g, importance, search=True))
    minmax = find_qparams(weight, g)
    assert bool((best <= loss(minmax) * (1 + 1e-4)).all())
    for share in g.shares:
        scale = minmax.scale * share
        if scales == "two-level":  # scales of 8-bit floats have few neighbours: the next ones above and below
            step = torch.where(scale < minmax.scale, 0.9375, 1.125)
            scale = (minmax.scale * step).clamp(max=448).to(torch.float8_e4m3fn).float() / minmax.global_scale
            assert float(best.sum()) <= float(loss(QParams(scale, None)).sum()) * (1 + 1e-3)
            continue
        assert bool((best <= loss(QParams(scale, None)) * (1 + 1e-3)).all()), share


def test_linears_of_one_product_share_what_they_must():
    weights = [random(4, C) * 0.1, random(8, C, seed=1), random(2, C, seed=2)]
    for g in (float_grid("e2m1", "two-level"), float_grid("e4m3", strategy="tensor")):
        assert g.fused
        found = find_all(weights, g)
        together = find_qparams(torch.cat(weights), g)
        assert torch.equal(torch.cat([q.scale for q in found]), together.scale)
        tops = [q.global_scale for q in found]
        assert len({None if t is None else t.item() for t in tops}) == 1
    for g in (float_grid("e4m3", strategy="channel"), grid(8, True, "tensor"), float_grid("e2m1", "power of two")):
        assert not g.fused
        alone = [find_qparams(w, g).scale for w in weights]
        assert all(torch.equal(q.scale, s) for q, s in zip(find_all(weights, g), alone, strict=True))


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("values", "scales"), [("e4m3", "free"), ("e2m1", "two-level"), ("e2m3", "power of two"), ("e2m1", "power of two")]
)
def test_float_groups_of_zeros(values, scales, dtype, search):
    weight = random(R, C)
    weight[:, SIZE : 2 * SIZE] = 0
    weight[1] = 0
    for w in (weight, torch.zeros(R, C)):
        g = float_grid(values, scales, dtype=dtype)
        found = find_qparams(w, g, torch.ones(C), search=search)
        assert bool(torch.isfinite(found.effective()).all()) and bool((found.scale > 0).all())
        dense = dequantize(quantize(w, found, g), found)
        assert bool((dense[w == 0] == 0).all())
