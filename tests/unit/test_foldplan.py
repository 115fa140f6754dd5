"""Folds that a plan uses, on models of other sizes and structures than the tiny copy on which they are found."""

import pytest
import torch

from bitpress.foldplan import _randomize, find_smoothing, smoothed_sites
from bitpress.folds import channels, scale_consumers, scale_producer
from bitpress.modifiers.awq import AWQModifier
from bitpress.modifiers.quantization import QuantizationModifier
from bitpress.modifiers.smoothquant import SmoothQuantModifier
from bitpress.sites import find_sites
from bitpress.subject import ModuleSubject
from conftest import VOCAB, build

HEADS = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 3}
SIZES = {
    "llama": HEADS,
    "qwen3": {**HEADS, "head_dim": 12, "num_key_value_heads": 1},
    "gemma3": {**HEADS, "head_dim": 10, "num_key_value_heads": 2},
    "phi3": {**HEADS, "num_key_value_heads": 6},
    "opt": {"hidden_size": 48, "word_embed_proj_dim": 24, "ffn_dim": 80, "num_attention_heads": 6},
    "gpt_neox": {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3},
    "falcon": {"hidden_size": 48, "num_attention_heads": 6, "new_decoder_architecture": True, "num_kv_heads": 3},
    "mixtral": {**HEADS, "num_local_experts": 6, "num_experts_per_tok": 3},
    "qwen3_moe": {
        **HEADS, "num_experts": 6, "moe_intermediate_size": 40, "num_hidden_layers": 3, "mlp_only_layers": [1],
    },
}  # fmt: skip
QUANTIZER = QuantizationModifier(scheme="W8A8", ignore=["lm_head"])


def planned(model, *modifiers):
    subject = ModuleSubject(model)
    every = [*modifiers, QUANTIZER]
    sites = find_sites([QUANTIZER], subject)[0]
    return subject, sites, find_smoothing(every, subject, sites)


def logits(model):
    ids = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", SIZES)
def test_what_a_tiny_copy_says_holds_for_other_sizes(family):
    model = build(family, **SIZES[family])
    _randomize(model)
    subject, _, smoothing = planned(model, AWQModifier())
    assert not smoothing.faults
    before = logits(model)
    generator = torch.Generator().manual_seed(5)
    for block, uses in zip(subject.blocks.modules, smoothing.uses, strict=True):
        assert len(uses) >= 3
        for use in uses:
            count = len(channels(use.fold, block).rows)
            exact = scale_producer(block, use.fold, torch.rand(count, generator=generator) * 3 + 0.3)
            scale_consumers(block, use.fold, exact)
    assert float((logits(model) - before).abs().max()) < 1e-4 * float(before.abs().max())


def test_blocks_of_two_structures_have_their_own_folds():
    subject, sites, smoothing = planned(build("qwen3_moe", **SIZES["qwen3_moe"]), AWQModifier())
    experts, dense, _ = smoothing.uses
    assert {u.fold.producer for u in dense} == {
        "input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj",
    }  # fmt: skip
    norm = next(u for u in experts if u.fold.producer == "post_attention_layernorm")
    assert norm.witness == "mlp.gate" and "mlp.gate" not in norm.balance and len(norm.balance) == 2 * 6
    own = next(u for u in experts if u.fold.producer == "mlp.experts.4.up_proj")
    assert own.fold.consumers == own.balance == ("mlp.experts.4.down_proj",) and own.witness == own.balance[0]
    by_module = {s.module: s for s in smoothed_sites(sites, smoothing, subject)}
    assert by_module["model.layers.0.mlp.experts.4.down_proj"].smoothing
    assert by_module["model.layers.0.mlp.experts.4.down_proj"].method == "awq+rtn"
    assert by_module["model.layers.1.mlp.down_proj"].needs == {"gram", "mean"}


def test_both_modifiers_are_asked_in_their_order():
    _, _, smoothing = planned(build("llama"), SmoothQuantModifier(), AWQModifier())
    assert [type(u.modifier).__name__ for u in smoothing.uses[0]] == ["SmoothQuantModifier"] * 4 + ["AWQModifier"] * 4


def test_without_a_tiny_copy_nothing_is_smoothed(monkeypatch):
    def fail(*args, **options):
        raise ValueError("head_dim must be even\nand more")

    monkeypatch.setattr("bitpress.foldplan.tiny_copy", fail)
    _, _, smoothing = planned(build("llama"), AWQModifier())
    assert smoothing.faults == [
        "AWQModifier: folds are found on a tiny copy of the model, which fails: head_dim must be even"
    ]


def test_without_smoothing_nothing_is_tried(monkeypatch):
    monkeypatch.setattr("bitpress.foldplan.tiny_copy", None)
    _, _, smoothing = planned(build("llama"))
    assert smoothing.uses == [(), ()] and not smoothing.faults and not smoothing.notes


def test_what_ignore_leaves_out_is_the_reason():
    _, _, smoothing = planned(build("llama"), SmoothQuantModifier(ignore=["re:.*"]))
    (fault,) = smoothing.faults
    assert "nothing in this model can be smoothed" in fault and "input_layernorm: in ignore" in fault
    _, _, smoothing = planned(build("llama"), SmoothQuantModifier(ignore=["re:.*v_proj"]))
    assert not smoothing.faults and not any("in ignore" in note for note in smoothing.notes)


def test_what_is_left_in_some_blocks_only():
    model = build("llama")
    subject = ModuleSubject(model)
    quantizer = QuantizationModifier(scheme="W4A16", group_size=16, ignore=["lm_head", "re:.*layers.0.*"])
    modifiers = [SmoothQuantModifier(), quantizer]
    sites, _, _ = find_sites([quantizer], subject)
    notes = find_smoothing(modifiers, subject, sites).notes
    why = "left as it is in some blocks: nothing that reads it is quantized"
    assert f"SmoothQuantModifier: input_layernorm is {why}" in notes
