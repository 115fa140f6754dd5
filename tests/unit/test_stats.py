"""Gram matrices against float64, and the process-wide switch that is put back."""

import threading

import pytest
import torch

from bitpress.math import products
from bitpress.math import stats as stats_module
from bitpress.math.products import bfloat16_products, float32_products, forward_products
from bitpress.math.stats import BLOCK_ROW, SAMPLE, GramAccumulator, InputStats, StatsAccumulator

BACKEND = torch.backends.mkldnn.matmul


@pytest.fixture(params=["none", "ieee"])
def precision(request):
    """A setting that the user may have made."""
    before = BACKEND.fp32_precision
    BACKEND.fp32_precision = request.param
    yield BACKEND.fp32_precision
    BACKEND.fp32_precision = before


def batches(width, dtype):
    generator = torch.Generator().manual_seed(width)
    shapes = [(2, 5, width), (1, 1, width), (23, width)]
    return [torch.randn(s, generator=generator).mul_(3).add_(0.5).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 7, BLOCK_ROW, BLOCK_ROW + 1, 511, 512, 1100])
def test_gram_equals_float64(width, dtype, monkeypatch):
    monkeypatch.setattr(stats_module, "CHUNK", 8)  # several chunks a batch, the last one partly filled
    sums = GramAccumulator(width, torch.device("cpu"))
    inputs = batches(width, dtype)
    before = [x.clone() for x in inputs]
    for x in inputs:
        sums.add(x)
    stats = sums.finish()
    tokens = torch.cat([x.reshape(-1, width) for x in inputs]).double()
    expected = tokens.T @ tokens
    assert stats.tokens == len(tokens) == 34
    assert stats.gram.dtype == torch.float32 and stats.gram.shape == (width, width)
    assert torch.equal(stats.gram, stats.gram.T)
    size = expected.diagonal().sqrt()
    assert float(((stats.gram.double() - expected) / (size[:, None] * size)).abs().max()) < 2e-6
    assert all(torch.equal(x, b) for x, b in zip(inputs, before, strict=True))


def test_bytes():
    assert GramAccumulator.nbytes(1100) == 4 * 1100 * 1100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_setting_of_matrix_products_is_put_back(dtype, precision):
    sums = GramAccumulator(8, torch.device("cpu"))
    sums.add(torch.ones(3, 8, dtype=dtype))
    assert BACKEND.fp32_precision == precision
    with pytest.raises(RuntimeError):
        sums.add(torch.ones(3, 9, dtype=dtype))
    assert BACKEND.fp32_precision == precision


@pytest.mark.parametrize("count", [1, 100, 2 * SAMPLE, 2 * SAMPLE + 1, 9 * SAMPLE + 5])
def test_a_sample_of_tokens_does_not_depend_on_batches(count):
    x = torch.arange(count)[:, None] * torch.ones(3)
    samples = []
    for size in (count, 97, SAMPLE + 3):
        sums = StatsAccumulator(3, torch.device("cpu"), frozenset({"sample"}))
        for part in x.split(size):
            sums.add(part[None])
        samples.append(sums.finish().sample)
    step = int(samples[0][1, 0]) if count > 1 else 1
    assert torch.equal(samples[0], x[::step]) and len(samples[0]) <= 2 * SAMPLE
    assert step == 1 or len(samples[0]) > SAMPLE
    assert all(torch.equal(s, samples[0]) for s in samples[1:])
    stats = InputStats(None, count, sample=samples[0])
    assert len(stats.merge(stats).sample) <= 2 * SAMPLE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_only_bfloat16_inputs_are_multiplied_in_bfloat16(dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(stats_module, "bfloat16_products", lambda on: asked.append(on) or bfloat16_products(on))
    GramAccumulator(8, torch.device("cpu")).add(torch.ones(3, 8, dtype=dtype))
    assert set(asked) == {dtype == torch.bfloat16}


def test_the_setting_is_made_within(precision):
    with pytest.raises(KeyError), bfloat16_products(True):
        assert BACKEND.fp32_precision == "bf16"
        raise KeyError
    assert BACKEND.fp32_precision == precision
    with bfloat16_products(False):
        assert BACKEND.fp32_precision == precision


def test_merge_adds():
    parts = []
    for x in batches(40, torch.float32):
        sums = GramAccumulator(40, torch.device("cpu"))
        sums.add(x)
        parts.append(sums.finish())
    whole = GramAccumulator(40, torch.device("cpu"))
    for x in batches(40, torch.float32):
        whole.add(x)
    expected = whole.finish()
    first = parts[0].gram.clone()
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert isinstance(merged, InputStats) and merged.tokens == expected.tokens == 34
    torch.testing.assert_close(merged.gram, expected.gram)
    assert torch.equal(parts[0].gram, first)


def test_float32_products_are_accurate_and_the_setting_is_put_back(precision):
    a, b = (torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(((70, 300), (300, 90))))
    exact = a.double() @ b.double()
    with float32_products():
        product = a @ b
    assert float((product - exact).abs().max() / exact.abs().max()) < 2e-6
    assert BACKEND.fp32_precision == precision


@pytest.mark.parametrize(
    "features", [{"avx512_bf16": True, "amx_tile": True}, {"avx512_bf16": False, "amx_tile": False}, {}]
)
def test_other_processors_keep_the_setting(features, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert products.mode_is_exact.__wrapped__() is False


def test_a_mode_that_rounds_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    product = torch.Tensor.__matmul__

    def rounded(a, b):
        return product(a.bfloat16().float(), b.bfloat16().float()) if a.dtype == torch.float32 else product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert products.mode_is_exact.__wrapped__() is False


@pytest.mark.parametrize("exact", [True, False])
def test_the_setting_does_not_move_under_other_threads(exact, precision, monkeypatch):
    """One that coarsens its products would coarsen those of the others, now and then."""
    monkeypatch.setattr(products, "mode_is_exact", lambda: exact)
    inside, seen = threading.Barrier(2, timeout=30), []

    def coarse():
        with bfloat16_products(True):
            inside.wait()
            inside.wait()

    def fine():
        inside.wait()
        seen.append(BACKEND.fp32_precision)
        inside.wait()

    with float32_products():
        held = BACKEND.fp32_precision
        tasks = [threading.Thread(target=t) for t in (coarse, fine)]
        for task in tasks:
            task.start()
        for task in tasks:
            task.join()
    assert seen == [held] == ["bf16" if exact else precision]
    assert BACKEND.fp32_precision == precision
    with bfloat16_products(True):  # it moves again
        assert BACKEND.fp32_precision == "bf16"


X86 = {"architecture": "x86_64"}


@pytest.mark.parametrize(
    ("capability", "features", "slow"),
    [
        ("AVX2", X86, {torch.bfloat16, torch.float16}),
        ("AVX512", X86, {torch.bfloat16, torch.float16}),
        ("AVX512", {**X86, "avx512_bf16": True}, {torch.float16}),
        ("AVX512", {**X86, "amx_bf16": True, "avx512_fp16": True}, set()),
        ("AVX2", {**X86, "avx512_bf16": True}, {torch.bfloat16, torch.float16}),  # torch is told not to use it
        ("DEFAULT", {"architecture": "aarch64"}, set()),
    ],
)
def test_which_processors_multiply_16_bits_in_float32(capability, features, slow, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert {t for t in dtypes if products.without_instructions.__wrapped__(t)} == slow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widened_products_are_those_of_the_dtype_rounded_once(dtype, monkeypatch):
    monkeypatch.setattr(products, "without_instructions", lambda t: t != torch.float32)
    made = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=made).to(dtype).requires_grad_() for s in ((2, 5, 64), (32, 64), (32,)))
    functional = torch.nn.functional
    cases = [
        lambda x, w, b: functional.linear(x, w, b),
        lambda x, w, b: x @ w.T + b,
        lambda x, w, b: torch.addmm(b, x[0], w.T),
        lambda x, w, b: torch.bmm(x, w.T.expand(2, 64, 32)),
        lambda x, w, b: torch.einsum("blc,rc->blr", x, w),
    ]
    for case in cases:
        with forward_products():
            found = case(x, w, b)
        exact = case(x.double(), w.double(), b.double())
        assert found.dtype == dtype
        assert float(((found - exact).abs() / (exact.abs() + 1)).detach().max()) <= max(
            2 * torch.finfo(dtype).eps, 1e-5
        )
    slopes = torch.autograd.grad(cases[0](x.double(), w.double(), b.double()).square().sum(), (x, w, b))
    with forward_products():
        got = torch.autograd.grad(functional.linear(x, w, b).square().sum(), (x, w, b))
    for g, s in zip(got, slopes, strict=True):
        assert g.dtype == dtype
        assert float((g - s).abs().max() / s.abs().max()) <= max(4 * torch.finfo(dtype).eps, 1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_linears_by_onednn_are_float32s(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "LARGE", 64)
    made = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=made) for s in ((2, 5, 64), (32, 64), (32,)))
    linear = torch.nn.functional.linear
    called = []
    op = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: called.append(1) or op(*args))
    cases = [  # arguments, and whether oneDNN takes them
        ((x, w), True), ((x, w, b), True), ((x, w.double(), b), None), ((x[..., ::2], w[:, ::2], b), False),
        ((x[0, 0], w, b), False), ((x[:0], w, b), False), ((x.transpose(0, 1), w, b), False),
    ]  # fmt: skip
    for args, taken in cases:
        called.clear()
        if taken is None:  # two dtypes are an error as without it
            with pytest.raises(RuntimeError), forward_products(), torch.no_grad():
                linear(*args)
            continue
        exact = linear(*(t.double() for t in args))
        with forward_products(), torch.no_grad():
            found = linear(*args)
            named = linear(weight=args[1], input=args[0], bias=args[2] if len(args) > 2 else None)
        assert found.dtype == torch.float32 and torch.equal(found, named)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
        assert len(called) == 2 * taken
    called.clear()
    monkeypatch.setattr(products, "LARGE", 641)
    with forward_products(), torch.no_grad():  # too small to gain by it: the bits of torch's own
        assert torch.equal(linear(x, w), torch.mm(x.reshape(10, 64), w.T).reshape(2, 5, 32)) and not called
    called.clear()
    with forward_products():
        (slope,) = torch.autograd.grad(linear(x, w.requires_grad_()).sum(), w)
    torch.testing.assert_close(slope, x.sum((0, 1)).expand(32, 64))
    assert not called


def test_widened_leaves_other_products_alone(monkeypatch):
    monkeypatch.setattr(products, "without_instructions", lambda t: t != torch.float32)
    with forward_products():
        a = torch.ones(2, 2)
        assert (a @ a).dtype == torch.float32
        assert torch.equal(torch.ones(2, 2, dtype=torch.int64) @ torch.ones(2, 2, dtype=torch.int64), 2 * a.long())
        half = torch.full((2, 2), 2.0, dtype=torch.bfloat16)
        out = torch.zeros(2, 2, dtype=torch.bfloat16)
        assert torch.mm(half, half, out=out) is out and float(out[0, 0]) == 8
        with pytest.raises(RuntimeError):  # two dtypes are an error as without it
            torch.nn.functional.linear(a, a.bfloat16())
