"""Static scales of inputs, keys and values: those of the ranges seen, refused without data, the same when resumed."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from bitpress import PlanError, oneshot
from bitpress.inspection import inspect_checkpoint
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build, save, token_rows
from helpers import OPTIONS, PLAIN, Killed, assert_same_tensors, digests, stop_after, tensors
from scheme_runs import CACHE, SIZES, STATIC, recipe, run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(build("llama", torch.bfloat16, **SIZES), tmp_path_factory.mktemp("schemes") / "base")


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"scheme": "FP8"}, "static scales of inputs"),
        ({"scheme": "NVFP4"}, "static scales of inputs"),
        ({"kind": "GPTQModifier", "scheme": "NVFP4"}, "static scales of inputs"),
        ({"config_groups": {"a": STATIC}}, "static scales of inputs"),
        ({"scheme": "FP8_DYNAMIC", "kv_cache_scheme": CACHE}, "static scales of keys and values"),
        ({"kv_cache_scheme": CACHE}, "static scales of keys and values"),
    ],
)
def test_static_scales_without_data_are_refused(keys, what, base, tmp_path):
    with pytest.raises(
        PlanError, match=f"{what}.* are set from calibration data, and none is given: pass dataset"
    ) as e:
        run(base, tmp_path / "out", data=False, **keys)
    assert ("drop kv_cache_scheme" if "kv_cache_scheme" in keys else "such as FP8_DYNAMIC") in str(e.value)
    assert not (tmp_path / "out").exists()


def seen_by(model, names):
    """Least and greatest input of linears over the calibration rows, by hooks of our own."""
    found = {n: [] for n in names}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n: found[n].append(a[0].float())) for n in names
    ]
    with torch.no_grad():
        for row in token_rows():
            model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    joined = {n: torch.cat([x.reshape(-1) for x in xs]) for n, xs in found.items()}
    return {n: (x.min(), x.max()) for n, x in joined.items()}


def test_static_scales_are_those_of_the_range_that_was_seen(base, tmp_path):
    stored, config, _ = run(base, tmp_path / "out", config_groups={"a": STATIC})
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is False
    # every block is fed by the blocks before it as they are stored; within a block all inputs are of its own weights
    compressed = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = SparseAutoModelForCausalLM.from_pretrained(base)
    compressed.model.layers[1] = original.model.layers[1]
    for block, model in ((0, original), (1, compressed)):
        names = [f"model.layers.{block}.{p}" for p in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
        for name, (low, high) in seen_by(model, names).items():
            scale, zero = stored[f"{name}.input_scale"], stored[f"{name}.input_zero_point"]
            torch.testing.assert_close(scale.float(), ((high - low) / 255).reshape(1), rtol=2**-7, atol=0)
            assert abs(int(zero) - float((-128 - low / scale.float()).round())) <= 1
    for a, b in (("q", "k"), ("q", "v")):
        for part in ("input_scale", "input_zero_point"):
            assert torch.equal(*(stored[f"model.layers.0.self_attn.{x}_proj.{part}"] for x in (a, b)))


def test_static_scales_are_of_smoothed_inputs(base, tmp_path):
    both = [{"SmoothQuantModifier": {"smoothing_strength": 0.8}}, recipe(config_groups={"a": STATIC})]
    oneshot(base, token_rows(), both, output_dir=tmp_path / "out", **OPTIONS)
    stored = tensors(tmp_path / "out")
    original = SparseAutoModelForCausalLM.from_pretrained(base)
    model = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out")
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(model.get_parameter(norm), original.get_parameter(norm))
    name = "model.layers.0.self_attn.q_proj"
    low, high = seen_by(model, [name])[name]
    torch.testing.assert_close(
        stored[f"{name}.input_scale"].float(), ((high - low) / 255).reshape(1), rtol=0.02, atol=0
    )


def test_the_scale_of_keys_is_that_of_what_goes_into_the_cache(tmp_path):
    base = save(build("qwen3", num_attention_heads=4, num_key_value_heads=2), tmp_path / "base")
    for strategy in ("tensor", "attn_head"):
        out = tmp_path / strategy
        cache = {**CACHE, "strategy": strategy}
        stored, config, _ = run(base, out, scheme="W4A16", group_size=16, kv_cache_scheme=cache)
        assert config["kv_cache_scheme"] == {**cache, "symmetric": True}
        model = SparseAutoModelForCausalLM.from_pretrained(out)  # dense, its cache in full precision
        rows = torch.tensor([row["input_ids"] for row in token_rows()])
        with torch.no_grad():
            seen = model(input_ids=rows, past_key_values=DynamicCache(config=model.config)).past_key_values
        for i, layer in enumerate(seen.layers):
            for which, x in (("k", layer.keys), ("v", layer.values)):
                absmax = x.abs().amax() if strategy == "tensor" else x.abs().amax((0, 2, 3))
                scale = stored[f"model.layers.{i}.self_attn.{which}_scale"]
                assert scale.shape == ((1,) if strategy == "tensor" else (2, 1, 1))
                torch.testing.assert_close(scale.flatten(), (absmax / 448).reshape(-1), rtol=1e-4, atol=0)


def test_a_cache_alone_leaves_weights_as_they_are(base, tmp_path):
    stored, config, _ = run(base, tmp_path / "out", kv_cache_scheme=CACHE)
    found = inspect_checkpoint(tmp_path / "out")
    assert (found.cache, found.messages) == ("float8 tensor sym static", ())
    before = tensors(base)
    assert all(torch.equal(stored[name], before[name]) for name in before)
    scales = {f"model.layers.{i}.self_attn.{x}_scale" for i in (0, 1) for x in "kv"}
    assert set(stored) - set(before) == scales
    assert config["config_groups"] == {}


@pytest.mark.parametrize("family", ["gpt_neox", "falcon"])
def test_caches_that_no_client_quantizes_are_refused(family, tmp_path):
    with pytest.raises(PlanError, match=r"kv_cache_scheme: no attention of .* keeps its keys in a way that clients"):
        run(save(build(family), tmp_path / "base"), tmp_path / "out", kv_cache_scheme=CACHE)


def test_two_cache_schemes_are_refused(base, tmp_path):
    other = {**CACHE, "strategy": "attn_head"}
    both = [
        recipe("GPTQModifier", scheme="W4A16", targets="re:.*mlp.*", kv_cache_scheme=CACHE),
        recipe("QuantizationModifier", scheme="W8A16", targets="re:.*self_attn.*", kv_cache_scheme=other),
    ]
    with pytest.raises(PlanError, match="kv_cache_scheme: two modifiers give different ones; give it once"):
        oneshot(base, token_rows(), both, output_dir=tmp_path / "out", **OPTIONS)


NVFP4 = recipe("GPTQModifier", scheme="NVFP4", kv_cache_scheme=CACHE, **PLAIN)


@pytest.fixture(scope="module")
def straight(base):
    """What runs that are not killed write, from a folder and from memory."""
    folder, memory = base.parent / "straight", base.parent / "straight-memory"
    oneshot(base, token_rows(), NVFP4, output_dir=folder, **OPTIONS)
    model = SparseAutoModelForCausalLM.from_pretrained(base)
    oneshot(model, token_rows(), NVFP4, output_dir=memory, **OPTIONS)
    assert_same_tensors(tensors(folder), tensors(memory))
    return folder


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize("shards", [1, 2])
def test_going_on_with_static_scales_and_caches(shards, where, base, straight, tmp_path, monkeypatch):
    def given():
        return SparseAutoModelForCausalLM.from_pretrained(base) if where == "memory" else base

    def go(**more):
        return oneshot(given(), token_rows(), NVFP4, output_dir=tmp_path / "out", **OPTIONS, **more)

    stop_after(monkeypatch, shards)
    with pytest.raises(Killed):
        go()
    monkeypatch.undo()
    resumed = go(resume=True)
    assert digests(tmp_path / "out") == digests(straight)
    if where == "memory":
        resumed.save_pretrained(tmp_path / "saved")
        assert_same_tensors(tensors(tmp_path / "saved"), tensors(straight))
