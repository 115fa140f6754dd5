"""Folds on tiny models of every family: what is found, and that it changes nothing."""

import pytest
import torch

from bitpress.blocks import Blocks
from bitpress.experts import unfuse
from bitpress.foldplan import _randomize
from bitpress.foldprobe import find_folds
from bitpress.folds import (
    LAYOUTS,
    Fold,
    channels,
    expand,
    pattern,
    scale_consumers,
    scale_producer,
    signature,
    stored_gain,
)
from conftest import FAMILIES, VOCAB, build

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
V_O = Fold("self_attn.v_proj", ("self_attn.o_proj",), layout="all rows")
UP_DOWN = Fold("mlp.up_proj", ("mlp.down_proj",), layout="all rows")
LLAMA = [Fold("input_layernorm", QKV, 0.0), Fold("post_attention_layernorm", GATED, 0.0), V_O, UP_DOWN]
GEMMA = [Fold("input_layernorm", QKV, 1.0), Fold("pre_feedforward_layernorm", GATED, 1.0), V_O, UP_DOWN]
EXPERTS = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
MOE = [
    Fold("input_layernorm", QKV, 0.0),
    Fold("post_attention_layernorm", ("mlp.gate", *EXPERTS), 0.0),
    V_O,
    Fold("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",), layout="all rows"),
]
OPT_LINEAR = [
    Fold("self_attn.v_proj", ("self_attn.out_proj",), layout="all rows"),
    Fold("fc1", ("fc2",), layout="all rows"),  # a ReLU between them lets positive scales through
]
FALCON_QKV = "self_attention.query_key_value"
EXPECTED = {
    **dict.fromkeys(("llama", "llama_tied", "mistral", "qwen2", "qwen3"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), GEMMA),
    **dict.fromkeys(("mixtral", "qwen3_moe"), MOE),
    "phi3": [
        Fold("input_layernorm", ("self_attn.qkv_proj",), 0.0),
        Fold("post_attention_layernorm", ("mlp.gate_up_proj",), 0.0),
        Fold("self_attn.qkv_proj", ("self_attn.o_proj",), layout="last rows"),
        Fold("mlp.gate_up_proj", ("mlp.down_proj",), layout="second half"),
    ],
    "opt": [Fold("self_attn_layer_norm", QKV, 0.0), Fold("final_layer_norm", ("fc1",), 0.0), *OPT_LINEAR],
    "gpt_neox": [
        Fold("input_layernorm", ("attention.query_key_value",), 0.0),
        Fold("post_attention_layernorm", ("mlp.dense_h_to_4h",), 0.0),
        Fold("attention.query_key_value", ("attention.dense",), layout="rows by head"),
    ],
    "falcon": [
        Fold("input_layernorm", (FALCON_QKV, "mlp.dense_h_to_4h"), 0.0),
        Fold(FALCON_QKV, ("self_attention.dense",), layout="last rows"),
    ],
}
VARIANTS = {
    "post-norm opt": ("opt", {"do_layer_norm_before": False}, OPT_LINEAR),
    "olmo2": ("olmo2", {}, [V_O, UP_DOWN]),  # its norms come after: folding would reach the residual stream
    "new falcon": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        [
            Fold("ln_attn", (FALCON_QKV,), 0.0),
            Fold("ln_mlp", ("mlp.dense_h_to_4h",), 0.0),
            Fold(FALCON_QKV, ("self_attention.dense",), layout="rows by head"),
        ],
    ),
    "serial neox": ("gpt_neox", {"use_parallel_residual": False}, EXPECTED["gpt_neox"]),
}
CASES = {**{name: (name, {}, folds) for name, folds in EXPECTED.items()}, **VARIANTS}


@pytest.fixture(scope="module", autouse=True)
def olmo2():
    FAMILIES["olmo2"] = ("Olmo2Config", FAMILIES["llama"][1])
    yield
    del FAMILIES["olmo2"]


def made(family, **changes):
    model = build(family, **changes)
    experts = unfuse(model)
    _randomize(model)
    return model, Blocks(model), experts


def logits(model):
    ids = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("case", CASES)
def test_folds_of_every_family_leave_the_model_as_it_is(case):
    family, changes, expected = CASES[case]
    model, blocks, experts = made(family, **changes)
    before = logits(model)
    generator = torch.Generator().manual_seed(5)
    for index, block in enumerate(blocks.modules):
        kept = {n: p.clone() for n, p in block.named_parameters()}
        found = find_folds(model, blocks, index, experts)
        assert all(torch.equal(p, kept[n]) for n, p in block.named_parameters())
        assert list(found.folds) == expected
        for fold in (one for f in found.folds for one in expand(f, block)):
            count = len(channels(fold, block).rows)
            exact = scale_producer(block, fold, torch.rand(count, generator=generator) * 3 + 0.3)
            scale_consumers(block, fold, exact)
        assert any(not torch.equal(p, kept[n]) for n, p in block.named_parameters())
    after = logits(model)
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


def test_half_a_fold_changes_the_model():
    model, blocks, _ = made("llama")
    before = logits(model)
    scale_producer(blocks.modules[0], LLAMA[0], torch.full((32,), 2.0))
    assert float((logits(model) - before).abs().max()) > 1e-2 * float(before.abs().max())


def test_post_norm_is_refused_with_a_reason():
    model, blocks, experts = made("opt", do_layer_norm_before=False)
    rejected = find_folds(model, blocks, 0, experts).rejected
    assert rejected == {"self_attn_layer_norm": "fc1 cannot be rescaled for it: something else reads its output too"}


def test_a_norm_that_also_feeds_something_else_is_refused():
    model, blocks, experts = made("llama")
    block = blocks.modules[0]
    mlp = block.mlp.forward
    block.mlp.forward = lambda x: mlp(x) + x  # as if the block had a shortcut
    found = find_folds(model, blocks, 0, experts)
    assert "post_attention_layernorm" not in {f.producer for f in found.folds}
    assert "something else reads its output" in found.rejected["post_attention_layernorm"]
    assert LLAMA[0] in found.folds and UP_DOWN in found.folds


def test_grouped_heads_by_hand():
    """4 query heads of 3 share 2 key-value heads: column h * 3 + i reads row (h // 2) * 3 + i."""
    at = LAYOUTS["all rows"](6, 12, 3)
    assert at.rows.tolist() == list(range(6))
    assert at.columns.tolist() == [(h // 2) * 3 + i for h in range(4) for i in range(3)]


def test_fused_rows_by_hand():
    """Rows that carry the values: Phi-3 (q, k, v), GPT-NeoX (q, k, v of each head), Falcon (queries of a group)."""
    tail = LAYOUTS["last rows"](12 + 6 + 6, 12, 3)
    assert tail.rows.tolist() == list(range(18, 24))
    assert tail.columns.tolist() == [(h // 2) * 3 + i for h in range(4) for i in range(3)]
    neox = LAYOUTS["rows by head"](36, 12, 3)
    assert neox.rows.tolist() == [h * 9 + 6 + i for h in range(4) for i in range(3)]
    assert neox.columns.tolist() == list(range(12))
    falcon = LAYOUTS["rows by head"](12 + 6 + 6, 12, 3)  # two groups of two queries, a key and a value
    assert falcon.rows.tolist() == [9, 10, 11, 21, 22, 23]
    assert falcon.columns.tolist() == [(h // 2) * 3 + i for h in range(4) for i in range(3)]
    latent = LAYOUTS["rows by query head"](4 * (5 + 3), 12, 3)  # each head: 5 rows of keys, 3 of values
    assert latent.rows.tolist() == [h * 8 + 5 + i for h in range(4) for i in range(3)]
    assert LAYOUTS["second half"](24, 12, 0).rows.tolist() == list(range(12, 24))
    assert LAYOUTS["first half"](24, 12, 0).rows.tolist() == list(range(12))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_that_do_not_fit(layout):
    assert LAYOUTS[layout](7, 12, 5) is None


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_stored_gain_says_what_the_scale_is(offset):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.rand(400, generator=generator) * 2 - offset * 0.5).bfloat16()
    scale = torch.rand(400, generator=generator) * 4 + 0.1
    stored, exact = stored_gain(weight, offset, scale)
    assert stored.dtype == torch.bfloat16
    gain, new = weight.double() + offset, stored.double() + offset
    torch.testing.assert_close(new * exact.double(), gain, rtol=1e-6, atol=0)
    assert float((exact / scale - 1).abs().median()) < 0.005


def test_channels_without_a_gain_stay():
    weight = torch.tensor([0.0, -1.0, 2.0, 1e-38])
    stored, exact = stored_gain(weight, 0.0, torch.tensor([3.0, 2.0, 4.0, 1e9]))
    assert exact.tolist() == [1.0, 2.0, 4.0, 1.0]
    assert stored.tolist() == [0.0, -0.5, 0.5, weight[3].item()]
    stored, exact = stored_gain(torch.tensor([-1.0]).bfloat16(), 1.0, torch.tensor([2.0]))
    assert exact.item() == 1 and stored.item() == -1


def test_experts_are_one_pattern_and_many_folds():
    assert pattern("mlp.experts.12.up_proj") == "mlp.experts.*.up_proj"
    assert pattern("mlp.shared_experts.up_proj") == "mlp.shared_experts.up_proj"
    _, blocks, _ = made("mixtral")
    norm, own = MOE[1], MOE[3]
    assert [f.producer for f in expand(own, blocks.modules[0])] == [f"mlp.experts.{e}.up_proj" for e in range(4)]
    assert [f.consumers for f in expand(own, blocks.modules[0])][2] == ("mlp.experts.2.down_proj",)
    (one,) = expand(norm, blocks.modules[0])
    assert one.consumers[0] == "mlp.gate" and len(one.consumers) == 1 + 2 * 4


def test_structures_are_told_apart():
    _, blocks, _ = made("qwen3_moe", mlp_only_layers=[0])
    assert signature(blocks.modules[0]) != signature(blocks.modules[1])
    _, same, _ = made("qwen3_moe", num_experts=8)
    assert signature(same.modules[1]) == signature(blocks.modules[1])
