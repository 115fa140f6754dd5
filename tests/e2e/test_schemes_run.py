"""Schemes from a recipe to a folder: what needs data and what does not, what partners share, what comes back."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from transformers import DynamicCache

from bitpress import PlanError, evaluate, oneshot, output, plan
from bitpress.blocks import Blocks
from bitpress.inspection import inspect_checkpoint
from bitpress.subject import ModuleSubject
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build, save, token_rows
from helpers import PLAIN, assert_told_alike, client, logits, make_tokenizer, tensors

OPTIONS = {"max_seq_length": 32, "num_calibration_samples": 12}
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
STATIC = {"weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": {"num_bits": 8, "strategy": "tensor"}}
STATIC["input_activations"] = {**STATIC["input_activations"], "symmetric": False}
NO_DATA = (
    "W8A8", "W4A8", "W4AFP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4", "MXFP4XFP8", "MXFP6A8", "MXFP8",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(build("llama", torch.bfloat16, **SIZES), tmp_path_factory.mktemp("schemes") / "base")


def recipe(kind="QuantizationModifier", **keys):
    return {kind: {**keys, "ignore": ["lm_head"]}}


def run(base, out, *, data=True, **keys):
    oneshot(base, token_rows() if data else None, recipe(**keys), output_dir=out, **OPTIONS)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    return tensors(out), config, json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("name", NO_DATA)
def test_without_data_and_without_a_forward(name, base, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(Blocks, "_drive", refuse)
    _, _, report = run(base, tmp_path / "out", data=False, scheme=name)
    assert report["data"] is None
    assert all(row["tokens"] == 0 and row["error_of"] == "weight" for row in report["layers"])
    layers = inspect_checkpoint(tmp_path / "out").layers
    assert {layer.scheme.split()[0] for layer in layers} == {name}
    assert_told_alike(tmp_path / "out")


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


def test_scales_that_move_are_chosen_on_the_built_in_text(base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    make_tokenizer(folder)
    smoothed = [{"SmoothQuantModifier": {}}, recipe(scheme="W8A8")]
    oneshot(folder, None, smoothed, output_dir=tmp_path / "out", **OPTIONS)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert "no dataset was given: the built-in text calibrates" in report["notes"]
    assert report["layers"][0]["method"] == "smoothquant+rtn"


def test_the_plan_says_what_data_are_for():
    from bitpress.modifiers import GPTQModifier, QuantizationModifier

    def reads(*modifiers):
        made = plan.make(
            modifiers, ModuleSubject(build("llama", **SIZES)), samples=4, length=32, device=torch.device("cpu")
        )
        return made.to_dict()["needs_data"]

    assert reads(QuantizationModifier(scheme="FP8_DYNAMIC", ignore="lm_head")) == []
    assert reads(QuantizationModifier(scheme="FP8", ignore="lm_head")) == ["ranges of inputs (FP8 tensor)"]
    assert reads(GPTQModifier(scheme="NVFP4", ignore="lm_head", kv_cache_scheme=CACHE)) == [
        "second moments of inputs (gptq)",
        "ranges of inputs (NVFP4 g16)",
        "ranges of keys and values (kv_cache_scheme)",
    ]


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


@pytest.mark.parametrize(
    ("kind", "name", "shared"),
    [
        ("QuantizationModifier", "NVFP4A16", "weight_global_scale"),
        ("QuantizationModifier", "NVFP4", "weight_global_scale"),
        ("GPTQModifier", "NVFP4", "weight_global_scale"),
        ("QuantizationModifier", "FP8", "weight_scale"),
        ("GPTQModifier", "FP8", "weight_scale"),
    ],
)
def test_partners_of_one_product_share_the_scale_on_top(kind, name, shared, base, tmp_path):
    stored, _, _ = run(base, tmp_path / "out", kind=kind, scheme=name, data=name != "NVFP4A16")
    weights = tensors(base)
    for block in (0, 1):
        tops = {}
        for parent, leaves in (("self_attn", ("q", "k", "v")), ("self_attn", ("o",)), ("mlp", ("gate", "up"))):
            names = [f"model.layers.{block}.{parent}.{leaf}_proj" for leaf in leaves]
            values = {stored[f"{n}.{shared}"].item() for n in names}
            assert len(values) == 1
            tops[leaves] = values.pop()
            if shared == "weight_global_scale":
                absmax = max(weights[f"{n}.weight"].float().abs().max().item() for n in names)
                assert tops[leaves] == pytest.approx(448 * 6 / absmax, rel=1e-6)
        assert len(set(tops.values())) == 3


def test_experts_share_by_expert(tmp_path):
    model = build("mixtral", torch.bfloat16, num_hidden_layers=1)
    for i, expert in enumerate(range(4)):
        model.model.layers[0].mlp.experts.gate_up_proj.data[expert] *= i + 1
    base = save(model, tmp_path / "base")
    stored, _, report = run(base, tmp_path / "out", data=False, scheme="NVFP4A16")
    path = "model.layers.0.block_sparse_moe.experts"
    tops = [stored[f"{path}.{e}.w1.weight_global_scale"].item() for e in range(4)]
    assert tops == [stored[f"{path}.{e}.w3.weight_global_scale"].item() for e in range(4)]
    assert len(set(tops)) == 4
    assert any("transformers misreads experts of this scheme" in n for n in report["notes"])
    # which is why eval does not leave them to it
    make_tokenizer(base)
    make_tokenizer(tmp_path / "out")
    text = " ".join(f"w{7 * i % 90}" for i in range(100))
    result = evaluate(base, tmp_path / "out", text=text, windows=2, length=32, dtype="auto")
    assert any("bitpress's own loader was used" in n and "not rounded" not in n for n in result.notes)
    memory = evaluate(
        SparseAutoModelForCausalLM.from_pretrained(base), SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        text=text, windows=2, length=32, tokenizer=str(base),
    )  # fmt: skip
    assert result.kl == pytest.approx(memory.kl, rel=1e-3)


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


def test_mixed_schemes(base, tmp_path):
    groups = {
        "FP8_DYNAMIC": ["re:.*mlp.*"],
        "a": {**STATIC, "targets": ["re:.*self_attn.*"]},
        "unquantized": ["re:.*o_proj"],
        "NVFP4": ["model.layers.1.mlp.down_proj"],
    }
    stored, config, _ = run(base, tmp_path / "out", config_groups=groups)
    assert config["format"] == "mixed-precision"
    kinds = {group["format"] for group in config["config_groups"].values()}
    assert kinds == {"float-quantized", "int-quantized", "nvfp4-pack-quantized"}
    assert {"model.layers.0.self_attn.o_proj", "lm_head"} <= set(config["ignore"])
    assert stored["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert stored["model.layers.1.mlp.down_proj.weight_packed"].dtype == torch.uint8
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
    assert "null" not in json.dumps(config)
    theirs, ours = client(tmp_path / "out"), SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, weight in ours.state_dict().items():
        assert torch.equal(theirs.get_parameter(name), weight), name
    original = logits(SparseAutoModelForCausalLM.from_pretrained(base)).float()
    assert float((logits(theirs).float() - original).norm() / original.norm()) < 0.5


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(*(t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (a[name], b[name]))), name


PACKED = {"weights": {"num_bits": 4, "group_size": 32}, "format": "pack-quantized"}
PACKED["input_activations"] = {"num_bits": 8, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    "keys",
    [
        {"scheme": "FP8"},
        {"scheme": "FP8_BLOCK"},
        {"kind": "GPTQModifier", "scheme": "NVFP4"},
        {"scheme": "MXFP4", "kv_cache_scheme": CACHE},
        {"scheme": "MXFP6A16"},
        {"config_groups": {"a": STATIC}},
        {"config_groups": {"a": PACKED}},
    ],
    ids=str,
)
def test_dense_beside_scales_packs_to_the_same_bytes(keys, base, tmp_path):
    packed, _, _ = run(base, tmp_path / "packed", **keys)
    made = recipe(**keys)
    oneshot(base, token_rows(), made, output_dir=tmp_path / "dense", save_compressed=False, **OPTIONS)
    again = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    again.save_pretrained(tmp_path / "again", save_compressed=True)
    same(tensors(tmp_path / "again"), packed)
    # a model in memory, and what was loaded packed, save the same
    model = SparseAutoModelForCausalLM.from_pretrained(base)
    oneshot(model, token_rows(), made, **OPTIONS).save_pretrained(tmp_path / "memory")
    same(tensors(tmp_path / "memory"), packed)
    loaded = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    loaded.save_pretrained(tmp_path / "loaded")
    same(tensors(tmp_path / "loaded"), packed)


class Killed(BaseException):
    """The process is gone."""


NVFP4 = recipe("GPTQModifier", scheme="NVFP4", kv_cache_scheme=CACHE, **PLAIN)


@pytest.fixture(scope="module")
def straight(base):
    """What runs that are not killed write, from a folder and from memory."""
    folder, memory = base.parent / "straight", base.parent / "straight-memory"
    oneshot(base, token_rows(), NVFP4, output_dir=folder, **OPTIONS)
    model = SparseAutoModelForCausalLM.from_pretrained(base)
    oneshot(model, token_rows(), NVFP4, output_dir=memory, **OPTIONS)
    same(tensors(folder), tensors(memory))
    return folder


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize("shards", [1, 2])
def test_going_on_with_static_scales_and_caches(shards, where, base, straight, tmp_path, monkeypatch):
    def given():
        return SparseAutoModelForCausalLM.from_pretrained(base) if where == "memory" else base

    def go(**more):
        return oneshot(given(), token_rows(), NVFP4, output_dir=tmp_path / "out", **OPTIONS, **more)

    def digests(folder):
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}

    real = output.Output.write

    def write(self, shard, *args, **options):
        if shard == shards:
            raise Killed
        real(self, shard, *args, **options)

    monkeypatch.setattr(output.Output, "write", write)
    with pytest.raises(Killed):
        go()
    monkeypatch.undo()
    resumed = go(resume=True)
    assert digests(tmp_path / "out") == digests(straight)
    if where == "memory":
        resumed.save_pretrained(tmp_path / "saved")
        same(tensors(tmp_path / "saved"), tensors(straight))


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"scheme": "FP8_BLOCK"}, r"32 x 32 is not divisible into blocks of 128 x 128, as vLLM needs; add it to ign"),
        ({"scheme": "MXFP4XFP8"}, "32 input columns are not divisible by the activations' group_size 128"),
        ({"scheme": "W4A8"}, r"32 input columns are not divisible by group_size 128 \(try 8, 16, 32\)"),
    ],
)
def test_shapes_that_do_not_fit(keys, fault, tmp_path):
    with pytest.raises(PlanError, match=r"model.layers.0.self_attn.q_proj: " + fault):
        run(save(build("llama"), tmp_path / "base"), tmp_path / "out", **keys)


def test_columns_that_a_format_cannot_group(tmp_path):
    model = build("llama", hidden_size=24, num_attention_heads=2, num_key_value_heads=2, head_dim=12)
    with pytest.raises(PlanError, match="24 input columns are not divisible by group_size 16, which its format fixes"):
        run(save(model, tmp_path / "base"), tmp_path / "out", scheme="NVFP4")


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ({"scheme": "NVFP4A16"}, "NVFP4A16 g16: vLLM serves it on GPUs, not on CPUs"),
        ({"scheme": "W4AFP8"}, "W4AFP8 g128: vLLM serves it on Hopper GPUs only"),
        (
            {"scheme": "W4A8"},
            "W4A8 g128: vLLM serves 4 bits stored as int8 on Arm CPUs only. With format: pack-quant",
        ),
        ({"scheme": "MXFP6A16"}, "MXFP6A16 g32: needs compressed-tensors 0.20 or later"),
        ({"scheme": "W3A16"}, "W3A16 g128: needs compressed-tensors 0.19 or later"),
        ({"scheme": "FP8_BLOCK"}, "FP8_BLOCK 128 x 128: needs compressed-tensors 0.19 or later (older ones misread"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: vLLM serves caches of 8-bit floats only"),
        (
            {"config_groups": {"a": {"weights": {"num_bits": 8, "type": "float", "group_size": 32}}}},
            "float8 g32: vLLM does not serve it; this loads in transformers",
        ),
    ],
)
def test_what_clients_cannot_do_is_told(keys, note, base, tmp_path):
    _, _, report = run(base, tmp_path / "out", **keys)
    assert any(n.startswith(note) for n in report["notes"]), report["notes"]


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC"])
def test_what_all_clients_serve_has_no_note(name, base, tmp_path):
    _, _, report = run(base, tmp_path / "out", scheme=name)
    assert not any(name in note for note in report["notes"])
