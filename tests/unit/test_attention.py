"""Sliced causal attention against float64, and where it takes the place of SDPA."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitpress import attention
from bitpress.attention import causal, implementation, sliced

CPU = torch.device("cpu")


class Attention(torch.nn.Module):
    def __init__(self, heads=4, key_heads=2, is_causal=True):
        super().__init__()
        self.num_key_value_groups, self.is_causal = heads // key_heads, is_causal


def tensors(batch=2, heads=4, key_heads=2, length=9, width=8, wide=None, dtype=torch.bfloat16):
    """Query, key and value as views (batch, heads, length, width) of what projections return."""
    generator = torch.Generator().manual_seed(length)

    def make(count, columns):
        return torch.randn(batch, length, count, columns, generator=generator).mul_(2).to(dtype).transpose(1, 2)

    return make(heads, width), make(key_heads, width), make(key_heads, wide or width)


def exact(query, key, value, scale):
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(groups, 1), value.double().repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * scale
    length = scores.shape[-1]
    scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
    "shape",
    [
        {"length": 2}, {"length": 64}, {"length": 65}, {"length": 200},
        {"length": 130, "heads": 3, "key_heads": 3}, {"length": 130, "heads": 6, "key_heads": 1},
        {"length": 70, "width": 24, "wide": 16}, {"length": 70, "batch": 5},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("scores", [1, 2000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_float64(shape, scale, scores, dtype, monkeypatch):
    monkeypatch.setattr(attention, "SCORES", scores)  # one head at a time, some, all
    query, key, value = tensors(**shape, dtype=dtype)
    before = [t.clone() for t in (query, key, value)]
    out = causal(query, key, value, scale)
    expected = exact(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    assert out.dtype == dtype and out.shape == expected.shape and out.is_contiguous()
    # half a unit in the last place of bfloat16 for every element, and what float32 adds
    last, sums = (2**-8, 2**-18) if dtype == torch.bfloat16 else (2**-20, 2**-16)
    assert bool(((out.double() - expected).abs() <= last * expected.abs() + sums).all())
    assert all(torch.equal(t, b) for t, b in zip((query, key, value), before, strict=True))


@pytest.mark.parametrize(
    "shape", [{"batch": 1, "key_heads": 1}, {"batch": 5}, {"batch": 3, "heads": 3, "key_heads": 3}]
)
def test_the_number_of_threads_does_not_matter(shape, monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 2000)
    inputs = tensors(length=70, **shape)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append(causal(*inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_large_scores():
    query, key, value = tensors(length=70)
    out = causal(query * 100, key * 100, value)
    assert torch.isfinite(out).all()
    expected = exact(query * 100, key * 100, value, 8**-0.5)
    assert float((out - expected).norm() / expected.norm()) < 0.01


@pytest.fixture
def used(monkeypatch):
    """Counts the calls of `causal`, on any processor."""
    calls = []
    monkeypatch.setattr(attention, "_faster", lambda: frozenset({torch.bfloat16}))
    monkeypatch.setattr(attention, "causal", lambda *args: calls.append(1) or causal(*args))
    return calls


@torch.no_grad()
def attend(query, key, value, mask=None, module=None, **kwargs):
    function = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    return function(module or Attention(), query, key, value, mask, **({"dropout": 0.0, "scaling": 0.3} | kwargs))[0]


def test_takes_the_place_of_sdpa_and_is_put_back(used):
    inputs = tensors(length=100)
    expected = attend(*inputs)
    with pytest.raises(KeyError), sliced():
        with sliced():
            out = attend(*inputs, sliding_window=None)
        assert used == [1]
        assert out.shape == expected.shape and out.is_contiguous()
        torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-6)
        attend(*inputs)
        assert used == [1, 1]
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def mask_of(length, window):
    ones = torch.ones(length, length, dtype=torch.bool)
    return (ones.tril() & ones.triu(1 - window))[None, None]


@pytest.mark.parametrize(
    "inputs, kwargs",
    [
        (tensors(), {"mask": mask_of(9, 3)}),
        (tensors(), {"mask": torch.zeros(1, 1, 9, 9, dtype=torch.bfloat16)}),
        (tensors(), {"is_causal": False}),
        (tensors(), {"module": Attention(is_causal=False)}),
        (tensors(), {"position_bias": torch.randn(1, 4, 9, 9).bfloat16()}),
        (tensors(dtype=torch.float32), {}),
        (tensors(length=1), {}),
        ((tensors(length=4)[0], *tensors(length=9)[1:]), {}),
    ],
    ids=["window", "mask", "not causal", "module not causal", "bias", "float32", "one token", "cached keys"],
)
def test_what_is_not_plain_stays_with_sdpa(inputs, kwargs, used):
    expected = attend(*inputs, **kwargs)
    with sliced():
        assert torch.equal(attend(*inputs, **kwargs), expected)
    assert used == []


def test_float32_goes_in_slices_where_it_is_large(used, monkeypatch):
    monkeypatch.setattr(attention, "_faster", lambda: frozenset({torch.float32}))
    inputs = tensors(length=100, dtype=torch.float32)
    expected = attend(*inputs)
    with sliced():
        assert torch.equal(attend(*inputs), expected) and used == []
        monkeypatch.setattr(attention, "LARGE", inputs[0].numel())
        torch.testing.assert_close(attend(*inputs), expected)
    assert used == [1]


def test_gradients_stay_with_sdpa(used):
    query, key, value = tensors()
    with sliced():
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out = function(Attention(), query.requires_grad_(), key, value, None, dropout=0.0)[0]
    assert out.requires_grad and used == []


def test_dropout_stays_with_sdpa(used):
    with sliced():
        attend(*tensors(), dropout=0.5)
    assert used == []


def test_a_function_of_the_user_stays(used):
    ALL_ATTENTION_FUNCTIONS["sdpa"] = mine = lambda *args, **kwargs: (args[1], None)
    try:
        with sliced():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_other_processors_keep_sdpa(monkeypatch):
    monkeypatch.setattr(attention, "_faster", frozenset)
    with sliced():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_what_the_journal_records(monkeypatch):
    class Config:
        _attn_implementation = "sdpa"

    monkeypatch.setattr(attention, "_faster", lambda: frozenset({torch.bfloat16}))
    assert implementation(Config(), CPU, torch.bfloat16) == "sliced"
    assert implementation(Config(), CPU, torch.float32) == "sdpa"
    assert implementation(Config(), torch.device("cuda"), torch.bfloat16) == "sdpa"
    monkeypatch.setattr(attention, "_faster", frozenset)
    assert implementation(Config(), CPU, torch.bfloat16) == "sdpa"
    monkeypatch.setattr(attention, "_faster", lambda: frozenset({torch.float32}))
    assert implementation(Config(), CPU, torch.float32) == "sliced"
    assert implementation(object(), CPU, torch.bfloat16) is None
