"""What comes out of a run, in memory and on disk, in every form: all of them hold the same codes."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bitpress import CheckpointError, ConfigError, PlanError, Recipe, budget, formats, oneshot, plan, states
from bitpress.checkpoint import Source
from bitpress.cli import main
from bitpress.modifiers.quantization import GPTQModifier, QuantizationModifier
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build, save, token_rows
from helpers import PLAIN, assert_same_tensors, client, logits, make_tokenizer, tensors

BF16 = torch.bfloat16
OPTIONS = {"max_seq_length": 32, "num_calibration_samples": 12}


def group(bits, strategy, symmetric=True, size=None, targets=("Linear",), **more):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    return {"weights": weights | ({"group_size": size} if size else {}), "targets": list(targets), **more}


def recipe(name, **keys):
    return {"GPTQModifier": {"ignore": ["lm_head"], **keys}} if name == "gptq" else {"QuantizationModifier": keys}


ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
SCHEMES = {
    "W4A16": {"scheme": "W4A16", "group_size": 16},
    "W8A16": {"scheme": "W8A16", "group_size": 16},
    "W4A16_ASYM": {"scheme": "W4A16_ASYM", "group_size": 16},
    "W8A16_ASYM": {"scheme": "W8A16_ASYM", "group_size": 16},
    "W8A8": {"scheme": "W8A8"},
    "int4 channel": {"config_groups": {"g": group(4, "channel")}},
    "int4 asym channel": {"config_groups": {"g": group(4, "channel", symmetric=False)}},
    "int4 tensor": {"config_groups": {"g": group(4, "tensor")}},
    "int8 asym tensor": {"config_groups": {"g": group(8, "tensor", symmetric=False)}},
    "W8A8 tensor": {"config_groups": {"g": group(8, "tensor", input_activations=ACTIVATIONS)}},
}
W4 = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"], **PLAIN}}
ROUND = {"QuantizationModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def bytes_of(folder):
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", SCHEMES)
def test_packed_and_dense_hold_the_same_codes(name, tmp_path, rows):
    model = build("llama", BF16)
    wanted = {"GPTQModifier": {"ignore": ["lm_head"], **SCHEMES[name], "refine": 0}}
    returned = oneshot(model, rows, wanted, **OPTIONS)
    assert returned is model
    model.save_pretrained(tmp_path / "packed", save_compressed=True)
    model.save_pretrained(tmp_path / "dense", save_compressed=False)
    expected = logits(model)

    packed, dense = tensors(tmp_path / "packed"), tensors(tmp_path / "dense")
    quantized = [n.removesuffix("_scale") for n in packed if n.endswith("weight_scale")]
    assert len(quantized) == 2 * 7
    codes = [n if "W8A8" in name else n + "_packed" for n in quantized]
    assert all(packed[n].dtype == (torch.int8 if "W8A8" in name else torch.int32) for n in codes)
    for weight in quantized:
        assert dense[weight].dtype == BF16 and torch.equal(dense[weight], model.get_parameter(weight))
        assert torch.equal(dense[weight + "_scale"], packed[weight + "_scale"])
        assert (weight + "_zero_point" in packed) == ("asym" in name.lower())
    zeros = [dense[weight + "_zero_point"] for weight in quantized]  # transformers wants them of symmetric ones too
    assert any(bool(z.any()) for z in zeros) == ("asym" in name.lower())
    assert not any(n.endswith(("_packed", "_shape")) for n in dense)
    assert config_of(tmp_path / "packed")["quantization_config"]["quantization_status"] == "compressed"
    assert config_of(tmp_path / "dense")["quantization_config"]["quantization_status"] == "frozen"

    # compressing the dense form later is the same as compressing at once
    later = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(later), expected)
    later.save_pretrained(tmp_path / "later", save_compressed=True)
    assert_same_tensors(tensors(tmp_path / "later"), packed)
    assert config_of(tmp_path / "later")["quantization_config"] == config_of(tmp_path / "packed")["quantization_config"]

    # and so is packing what was packed; the folder's run writes the same from the start
    again = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    again.save_pretrained(tmp_path / "again", save_compressed=True)
    assert_same_tensors(tensors(tmp_path / "again"), packed)
    base = save(build("llama", BF16), tmp_path / "base")
    for compressed, same in ((True, packed), (False, dense)):
        out = tmp_path / f"streamed-{compressed}"
        oneshot(base, rows, wanted, output_dir=out, save_compressed=compressed, **OPTIONS)
        assert_same_tensors(tensors(out), same)


@pytest.mark.parametrize("name", ["W4A16", "W8A16", "W4A16_ASYM", "W8A8", "int4 channel", "int4 tensor"])
def test_both_forms_load_in_transformers(name, tmp_path, rows):
    model = build("llama", BF16)
    oneshot(model, rows, {"QuantizationModifier": {"ignore": ["lm_head"], **SCHEMES[name]}}, **OPTIONS)
    expected = logits(model)
    for compressed in (True, False):
        model.save_pretrained(tmp_path / str(compressed), save_compressed=compressed)
        loaded = client(tmp_path / str(compressed))
        for key, value in loaded.state_dict().items():
            if key.endswith("_proj.weight"):
                assert torch.equal(value, model.get_parameter(key)), key
        got = logits(loaded)
        if "8" not in name or (compressed and "W8A8" not in name):
            assert torch.equal(got, expected)
        else:  # the client rounds once more: activations to int8, dense weights in bfloat16 to codes
            assert (got - expected).float().norm() < 0.05 * expected.float().norm()


def test_int8_activations_are_dynamic_per_token(tmp_path, rows):
    model = build("llama", BF16)
    oneshot(model, rows, {"QuantizationModifier": {"scheme": "W8A8", "ignore": ["lm_head"]}}, output_dir=tmp_path / "o")
    config = config_of(tmp_path / "o")["quantization_config"]
    assert config["format"] == "int-quantized"
    (only,) = config["config_groups"].values()
    assert only["input_activations"] == ACTIVATIONS
    assert only["weights"]["strategy"] == "channel" and only["weights"]["num_bits"] == 8


def test_a_module_that_comes_from_no_folder(tmp_path, rows):
    model = build("llama")
    model.name_or_path = model.config._name_or_path = ""
    model.save_pretrained(tmp_path / "base")
    oneshot(model, rows, W4, **OPTIONS)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(client(tmp_path / "out")), logits(model))
    oneshot(tmp_path / "base", rows, W4, output_dir=tmp_path / "streamed", **OPTIONS)
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "streamed"))

    nameless = build("llama")
    del nameless.config._name_or_path
    del nameless.name_or_path
    oneshot(nameless, rows, W4, **OPTIONS)
    assert torch.equal(logits(nameless), logits(model))


def test_tied_embeddings_stay_tied(tmp_path, rows):
    model = build("llama_tied", BF16)
    base = save(model, tmp_path / "base")
    oneshot(base, rows, W4, output_dir=tmp_path / "streamed", **OPTIONS)
    oneshot(model, rows, W4, **OPTIONS)
    model.save_pretrained(tmp_path / "out")
    assert "lm_head.weight" not in Source(tmp_path / "out").tensors
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "streamed"))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    loaded = client(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(loaded), logits(model))
    later = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert later.lm_head.weight.data_ptr() == later.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_memory_equal_experts_from_a_folder(family, tmp_path, rows):
    model = build(family, BF16)
    kinds = {n: type(m) for n, m in model.named_modules()}
    base = save(model, tmp_path / "base")
    oneshot(base, rows, W4, output_dir=tmp_path / "streamed", **OPTIONS)
    oneshot(model, rows, W4, **OPTIONS)
    assert {n: type(m) for n, m in model.named_modules()} == kinds  # fused again
    model.save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense", save_compressed=False)
    assert_same_tensors(tensors(tmp_path / "packed"), tensors(tmp_path / "streamed"))
    SparseAutoModelForCausalLM.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "later")
    assert_same_tensors(tensors(tmp_path / "later"), tensors(tmp_path / "packed"))
    assert torch.equal(logits(client(tmp_path / "packed")), logits(model))
    for folder in ("packed", "streamed"):
        assert config_of(tmp_path / folder) == config_of(tmp_path / "packed")


def test_a_path_without_output_dir_gives_a_module(tmp_path, rows):
    base = save(build("llama", BF16), tmp_path / "base")
    before = sorted(f.name for f in tmp_path.iterdir())
    model = oneshot(base, rows, W4, **OPTIONS)
    assert isinstance(model, torch.nn.Module) and model.dtype == BF16
    assert sorted(f.name for f in tmp_path.iterdir()) == before
    model.save_pretrained(tmp_path / "out")
    oneshot(base, rows, W4, output_dir=tmp_path / "streamed", **OPTIONS)
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "streamed"))


@pytest.fixture
def saved(tmp_path, rows):
    """The handle that a run from a folder gives back, of a base with tokenizer and generation configuration."""
    model = build("llama", BF16)
    model.generation_config.max_length = 77
    base = save(model, tmp_path / "base")
    make_tokenizer(base)
    return oneshot(base, rows, W4, output_dir=tmp_path / "out", **OPTIONS)


def test_a_saved_model_is_copied_and_not_loaded(saved, tmp_path):
    def files(folder):
        return {f.name: f.read_bytes() for f in folder.iterdir()}

    before = files(tmp_path / "out")
    assert {"tokenizer.json", "generation_config.json", "recipe.yaml", "report.json"} <= set(before)
    saved.save_pretrained(tmp_path / "out")
    assert files(tmp_path / "out") == before
    saved.save_pretrained(tmp_path / "copy", save_compressed=True)
    assert files(tmp_path / "copy") == before
    assert saved._model is None
    assert "out" in repr(saved)


def test_a_saved_model_loads_itself_when_it_is_used(saved, tmp_path):
    ids = torch.tensor([[5, 6, 7]])
    told = saved.generate(ids, max_new_tokens=4, do_sample=False)
    assert told.shape == (1, 7)
    assert not saved.training and saved.generation_config.max_length == 77
    assert torch.equal(logits(saved), logits(client(tmp_path / "out")))
    with pytest.raises(AttributeError):
        _ = saved.no_such_thing
    saved.save_pretrained(tmp_path / "copy")
    assert_same_tensors(tensors(tmp_path / "copy"), tensors(tmp_path / "out"))


def test_a_saved_model_becomes_dense_with_its_tokenizer(saved, tmp_path):
    saved.save_pretrained(tmp_path / "dense", save_compressed=False)
    dense = tensors(tmp_path / "dense")
    assert "model.layers.0.mlp.up_proj.weight" in dense and "model.layers.0.mlp.up_proj.weight_scale" in dense
    assert config_of(tmp_path / "dense")["quantization_config"]["quantization_status"] == "frozen"
    assert (tmp_path / "dense/tokenizer.json").is_file() and (tmp_path / "dense/generation_config.json").is_file()
    SparseAutoModelForCausalLM.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "later")
    assert_same_tensors(tensors(tmp_path / "later"), tensors(tmp_path / "out"))


@pytest.mark.parametrize("where", ["copy", "dense"])
def test_a_storage_format_that_is_not_written(where, saved, tmp_path):
    with pytest.raises(ConfigError, match=r"quantization_format: 'pack_quantized' .* Did you mean 'pack-quantized'"):
        saved.save_pretrained(tmp_path / where, save_compressed=where == "copy", quantization_format="pack_quantized")
    assert not (tmp_path / where).exists()


def test_a_module_saved_from_memory_is_no_finished_run(tmp_path, rows):
    base = save(build("llama", BF16), tmp_path / "base")
    model = oneshot(build("llama", BF16), rows, W4, output_dir=tmp_path / "out", **OPTIONS)
    assert "recipe" in report_of(tmp_path / "out")["run"]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model.save_pretrained(tmp_path / "out")
    assert report_of(tmp_path / "out")["run"] == {"saved": "from memory"}
    assert "recipe" in model.bitpress_report["run"]
    for source in (base, build("llama", BF16)):
        with pytest.raises(PlanError, match="holds a finished run with other"):
            oneshot(source, rows, W4, output_dir=tmp_path / "out", **OPTIONS)


def test_old_weights_give_way_to_a_copy(saved, tmp_path):
    other = save(build("llama", num_hidden_layers=4), tmp_path / "other", max_shard_size="20KB")
    (other / "notes.txt").write_text("kept")
    assert len(list(other.glob("model-*.safetensors"))) > 3
    saved.save_pretrained(other)
    files = {f.name for f in (tmp_path / "out").iterdir()}
    assert {f.name for f in other.iterdir()} == files | {"notes.txt"}
    assert config_of(other) == config_of(tmp_path / "out")
    assert torch.equal(logits(client(other)), logits(client(tmp_path / "out")))
    dense = save(build("llama", num_hidden_layers=4), tmp_path / "dense", max_shard_size="20KB")
    saved.save_pretrained(dense, save_compressed=False)
    assert {f.name for f in dense.glob("model*")} == {f.name for f in (tmp_path / "out").glob("model*")}


def test_half_a_copy_does_not_look_whole(saved, tmp_path, monkeypatch):
    other = save(build("llama"), tmp_path / "other")

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("shutil.copytree", full)
    with pytest.raises(OSError, match="no space"):
        saved.save_pretrained(other)
    assert not (other / "config.json").exists()


@pytest.mark.parametrize("compressed", [True, False])
def test_a_file_is_no_place_to_save_to(compressed, saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file; choose a folder"):
        saved.save_pretrained(tmp_path / "file", save_compressed=compressed)
    assert (tmp_path / "file").read_text() == "mine" and saved._model is None


REFUSED = {
    "push_to_hub": (True, "upload_folder"),
    "state_dict": ({}, "load_state_dict"),
    "variant": ("fp16", "a folder of its own"),
    "safe_serialization": (False, "only safetensors"),
    "save_compresed": (True, "unknown. Did you mean 'save_compressed'"),
}


@pytest.mark.parametrize("kind", ["handle", "module"])
def test_arguments_of_save_pretrained(kind, saved, tmp_path):
    model = saved if kind == "handle" else saved.load()
    for name, (value, remedy) in REFUSED.items():
        with pytest.raises(ConfigError, match=rf"save_pretrained: '?{name}.*{re.escape(remedy)}"):
            model.save_pretrained(tmp_path / "copy", **{name: value})
    model.save_pretrained(tmp_path / "copy", is_main_process=False)
    assert not (tmp_path / "copy").exists()
    model.save_pretrained(
        tmp_path / "copy", is_main_process=True, state_dict=None, safe_serialization=True, max_shard_size="5GB",
        variant=None, token=None, push_to_hub=False, save_peft_format=True, save_original_format=True,
    )  # fmt: skip
    assert_same_tensors(tensors(tmp_path / "copy"), tensors(tmp_path / "out"))


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": True, "local_files_only": True, "trust_remote_code": False},
        {"device_map": {"": "cpu"}, "attn_implementation": "eager", "use_safetensors": True},
        {"device_map": "auto", "torch_dtype": "auto", "use_cache": False},
    ],
)
def test_arguments_of_from_pretrained(options, saved, tmp_path):
    loaded = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    assert loaded.dtype == BF16
    assert loaded.config._attn_implementation == options.get("attn_implementation", "sdpa")
    assert loaded.config.use_cache == options.get("use_cache", True)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight.cpu(), saved.model.layers[0].mlp.up_proj.weight)


def test_dtypes_and_devices_of_from_pretrained(saved, tmp_path):
    for dtype in (torch.float32, "float32"):
        assert SparseAutoModelForCausalLM.from_pretrained(saved, torch_dtype=dtype).dtype == torch.float32
    for name, value, fault in (
        ("device_map", {"model": "cpu", "lm_head": "disk"}, "on one device"),
        ("device_map", "nowhere", "on one device"),
        ("dtype", "bfloat", "Did you mean 'bfloat16'"),
        ("atn_implementation", "eager", "Did you mean 'attn_implementation'"),
    ):
        with pytest.raises(ConfigError, match=fault):
            SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out", **{name: value})


@pytest.mark.parametrize("place", ["default", "cache_dir"])
def test_a_hub_id_of_a_compressed_checkpoint(place, saved, tmp_path, monkeypatch):
    cached = tmp_path / "hub/models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    shutil.copytree(tmp_path / "out", cached / "snapshots" / ("0" * 40))
    if place == "default":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True} if place == "cache_dir" else {}
    loaded = SparseAutoModelForCausalLM.from_pretrained("owner/name", **options)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors(tmp_path / "again"), tensors(tmp_path / "out"))
    with pytest.raises(OSError, match="find them in the cached files"):
        SparseAutoModelForCausalLM.from_pretrained("owner/other", **options)


def test_what_bitpress_cannot_read_goes_to_transformers(saved, tmp_path, monkeypatch):
    config = config_of(tmp_path / "out")
    asked = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.append((a, k)))
    blocks = {"num_bits": 8, "type": "int", "strategy": "block", "block_structure": [16, 16]}
    act_order = group(4, "group", size=16)["weights"] | {"actorder": "group"}
    for i, weights in enumerate((blocks, act_order)):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "out", folder)
        settings = config["quantization_config"] | {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        SparseAutoModelForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True)
        assert asked[i] == ((folder,), {"low_cpu_mem_usage": True, "dtype": "auto"})
    SparseAutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert len(asked) == 3


def test_packed_weights_that_older_tools_call_frozen(saved, tmp_path):
    expected = logits(client(tmp_path / "out"))
    config = config_of(tmp_path / "out")
    config["quantization_config"]["quantization_status"] = "frozen"
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    again = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), expected)


def test_a_module_with_an_output_folder_is_written_too(tmp_path, rows):
    model = build("llama", BF16)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    returned = oneshot(model, rows, W4, tokenizer=tokenizer, output_dir=tmp_path / "out", **OPTIONS)
    assert returned is model
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "saved"))
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert torch.equal(logits(client(tmp_path / "out")), logits(model))

    # the same again, from the same weights, is read back instead of solved
    fresh = build("llama", BF16)
    assert oneshot(fresh, rows, W4, tokenizer=tokenizer, output_dir=tmp_path / "out", **OPTIONS) is fresh
    assert torch.equal(logits(fresh), logits(model))
    fresh.save_pretrained(tmp_path / "fresh")
    assert_same_tensors(tensors(tmp_path / "fresh"), tensors(tmp_path / "out"))


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
def test_only_weights_change_in_the_module(family, rows):
    model = build(family).train()
    model.base_model.eval()  # parts in another mode than the whole stay so
    modes = [m.training for m in model.modules()]
    objects = {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    oneshot(model, rows, W4, **OPTIONS)
    assert [m.training for m in model.modules()] == modes
    assert {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()} == objects
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_a_failed_run_restores_the_module_too(rows):
    model = build("mixtral").train()
    kinds = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(PlanError):
        oneshot(model, rows, {"GPTQModifier": {"scheme": "W4A16", "group_size": 24}}, **OPTIONS)
    assert {n: type(m) for n, m in model.named_modules()} == kinds and model.training


@pytest.mark.parametrize("modifier", ["GPTQModifier", "QuantizationModifier"])
def test_an_untied_head_is_quantized_unless_ignored(modifier, tmp_path, rows):
    model = build("llama", BF16)
    base = save(model, tmp_path / "base")
    everything = {modifier: {"scheme": "W4A16", "group_size": 16, "observer": "minmax"}}
    oneshot(base, rows, everything, output_dir=tmp_path / "out", **OPTIONS)
    assert "lm_head.weight_packed" in Source(tmp_path / "out").tensors
    assert "lm_head" not in config_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert report_of(tmp_path / "out")["layers"][-1]["name"] == "lm_head"
    oneshot(model, rows, everything, **OPTIONS)
    model.save_pretrained(tmp_path / "memory")
    assert_same_tensors(tensors(tmp_path / "memory"), tensors(tmp_path / "out"))
    assert torch.equal(logits(client(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("modifier", ["GPTQModifier", "QuantizationModifier"])
def test_a_tied_head_is_refused(modifier, tmp_path, rows):
    base = save(build("llama_tied"), tmp_path / "base")
    for model in (base, build("llama_tied")):
        with pytest.raises(PlanError, match=r"lm_head: tied to the input embedding.*add it to ignore"):
            oneshot(model, rows, {modifier: {"scheme": "W4A16", "group_size": 16}}, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_recipe_beside_the_weights_reads_as_it_was(tmp_path, rows):
    modifiers = [
        GPTQModifier(scheme="W4A16", group_size=16, targets=["re:.*mlp.*"], dampening_frac=0.02, actorder=None),
        QuantizationModifier(config_groups={"a": group(8, "channel", targets=["re:.*self_attn.*"])}, observer="mse"),
    ]
    model = build("llama")
    oneshot(model, rows, modifiers, output_dir=tmp_path / "out", **OPTIONS)
    model.save_pretrained(tmp_path / "saved")
    for folder in ("out", "saved"):
        assert Recipe.load(tmp_path / folder / "recipe.yaml") == Recipe.load(modifiers)


def test_the_report_has_a_row_a_layer_and_the_rest(tmp_path, rows):
    base = save(build("llama", BF16), tmp_path / "base")
    oneshot(base, rows, W4, output_dir=tmp_path / "out", seed=7, **OPTIONS)
    report = report_of(tmp_path / "out")
    stored = Source(tmp_path / "out").tensors
    names = [n.removesuffix(".weight_packed") for n in stored if n.endswith("_packed")]
    assert sorted(r["name"] for r in report["layers"]) == sorted(names) and len(names) == 14
    for row in report["layers"]:
        assert row["method"] == "gptq" and row["scheme"] == "W4A16 g16" and row["policy"] == ""
        assert row["error_of"] == "output" and 0 < row["rel_error"] < 0.1
        assert row["bits_per_weight"] == 4 + 16 / 16
        assert row["tokens"] == 12 * 32 and 0 <= row["sparsity"] < 0.5 and row["seconds"] >= 0
    totals = report["totals"]
    assert totals["layers"] == 14 and totals["bits_per_weight"] == 5
    assert totals["weights"] == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert totals["output_bytes"] == bytes_of(tmp_path / "out")
    assert totals["peak_host_bytes"] > 100 << 20 and totals["seconds"] > 0
    assert report["seed"] == 7 and report["data"]["sequences"] == 12
    assert {"bitpress", "torch", "transformers", "compressed-tensors", "python"} <= set(report["versions"])


@pytest.mark.parametrize("compressed", [True, False])
def test_a_wrong_packing_is_caught_unless_verification_is_off(compressed, tmp_path, rows, monkeypatch):
    base = save(build("llama"), tmp_path / "base")
    name = "pack" if compressed else "dense"
    real = getattr(formats, name)

    def wrong(solved, scheme, *stored):
        parts = real(solved, scheme, *stored)
        if compressed:
            parts["weight_packed"][3, 1] ^= 1 << 9  # one bit of one code
        else:
            parts["weight"][3, 1] += 8 * parts["weight_scale"][3, 0]
        return parts

    monkeypatch.setattr(formats, name, wrong)
    options = {"save_compressed": compressed, **OPTIONS}
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj: .* not the one that was solved"):
        oneshot(base, rows, W4, output_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out/config.json").exists()
    oneshot(base, rows, W4, output_dir=tmp_path / "blind", verify=False, **options)
    monkeypatch.undo()
    oneshot(base, rows, W4, output_dir=tmp_path / "out", **options)  # the shard is written anew
    assert (tmp_path / "out/config.json").exists()
    key = "model.layers.0.self_attn.q_proj.weight" + ("_packed" if compressed else "")
    assert int((tensors(tmp_path / "out")[key] != tensors(tmp_path / "blind")[key]).sum()) == 1


CASES = {
    "W4A16": ("llama", SCHEMES["W4A16"]),
    "W4A16_ASYM": ("llama", SCHEMES["W4A16_ASYM"]),
    "W8A8": ("llama", SCHEMES["W8A8"]),
    "int4 tensor asym": ("llama", {"config_groups": {"g": group(4, "tensor", symmetric=False)}}),
    "int3 channel": ("llama", {"config_groups": {"g": group(3, "channel")}}),
    "tied": ("llama_tied", SCHEMES["W4A16"]),
    "experts": ("mixtral", SCHEMES["W4A16"]),
    "biases": ("opt", SCHEMES["W4A16"]),
    "buffers": ("gpt_neox", SCHEMES["W4A16"]),
}


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_plan_knows_the_output_to_the_byte(case, compressed, tmp_path, monkeypatch):
    family, keys = CASES[case]
    base = save(build(family, BF16), tmp_path / "base")
    made = []
    real = plan.make
    monkeypatch.setattr(plan, "make", lambda *args, **options: [made.append(p := real(*args, **options)), p][1])
    wanted = {"QuantizationModifier": {"ignore": ["lm_head", "embed_out"], **keys}}
    oneshot(base, None, wanted, output_dir=tmp_path / "out", save_compressed=compressed)
    assert made[0].output_bytes == bytes_of(tmp_path / "out")
    in_memory = build(family, BF16)
    oneshot(in_memory, None, wanted, output_dir=tmp_path / "memory", save_compressed=compressed)
    assert made[1].output_bytes == bytes_of(tmp_path / "memory")


def test_a_limit_that_no_block_fits_into(tmp_path, rows):
    base = save(build("llama"), tmp_path / "base")
    with pytest.raises(PlanError, match=r"one block needs .* but the limit is 1\.00 GiB: raise --max-memory"):
        oneshot(base, [{"input_ids": [5] * 100}], W4, output_dir=tmp_path / "out", max_memory="1GiB",
                max_seq_length=4_000_000)  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_under_a_small_limit_hidden_states_go_to_disk(family, tmp_path, monkeypatch):
    rows = token_rows(24, 128)
    base = save(build(family, BF16), tmp_path / "base")
    options = {"max_seq_length": 128, "num_calibration_samples": 24, "batch_size": 1}
    oneshot(base, rows, W4, output_dir=tmp_path / "roomy", **options)

    made = []
    real = states.HiddenStates.__setitem__
    monkeypatch.setattr(states.HiddenStates, "__setitem__", lambda s, i, x: (made.append(s.where), real(s, i, x))[1])
    monkeypatch.setattr(budget, "PROCESS_BYTES", 0)
    with pytest.raises(PlanError, match="one block needs") as refused:
        oneshot(base, rows, W4, output_dir=tmp_path / "tight", max_memory=1000, **options)
    needed = budget.parse_bytes(re.search(r"needs ([\d.]+ [KM]iB)", str(refused.value))[1])
    limit = needed + 100 * 2**10  # leaves less than twice the 192 KiB of hidden states
    oneshot(base, rows, W4, output_dir=tmp_path / "tight", max_memory=limit, **options)
    assert set(made) == {"disk"}
    assert_same_tensors(tensors(tmp_path / "tight"), tensors(tmp_path / "roomy"))
    assert not list((tmp_path / "tight").glob("**/states-*"))


def test_two_groups_with_schemes_of_their_own(tmp_path, rows):
    wanted = {
        "GPTQModifier": {
            "ignore": ["lm_head"],
            "config_groups": {
                "attention": group(8, "channel", targets=["re:.*self_attn.*"]),
                "mlp": group(4, "group", size=16, targets=["re:.*mlp.*"]),
            },
        }
    }
    model = build("llama", BF16)
    oneshot(model, rows, wanted, output_dir=tmp_path / "out", **OPTIONS)
    config = config_of(tmp_path / "out")["quantization_config"]
    assert len(config["config_groups"]) == 2
    stored = Source(tmp_path / "out")
    assert stored.spec("model.layers.1.mlp.up_proj.weight_packed")[1] == (64, 32 // 8)
    assert stored.spec("model.layers.1.self_attn.q_proj.weight_packed")[1] == (32, 32 // 4)
    expected = logits(model)
    loaded = client(tmp_path / "out", one_scheme=False)
    for key, value in loaded.state_dict().items():
        if key.endswith("_proj.weight"):
            assert torch.equal(value, model.get_parameter(key)), key
    assert torch.equal(logits(loaded), expected)
    again = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors(tmp_path / "again"), tensors(tmp_path / "out"))


def test_a_stage_is_saved_into_a_folder_of_its_name(tmp_path, rows):
    base = save(build("llama"), tmp_path / "base")
    text = """
    quantization_stage:
      quantization_modifiers:
        GPTQModifier: {scheme: W4A16, group_size: 16, ignore: [lm_head]}
    other_stage:
      other_modifiers:
        QuantizationModifier: {scheme: W8A16, group_size: 16, ignore: [lm_head]}
    """
    oneshot(base, rows, text, stage="other_stage", output_dir=tmp_path / "out", **OPTIONS)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["other_stage"]
    written = tmp_path / "out/other_stage"
    assert config_of(written)["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    assert [s.name for s in Recipe.load(written / "recipe.yaml").stages] == ["other_stage"]
    oneshot(build("llama"), rows, text, stage="quantization", output_dir=tmp_path / "out", **OPTIONS)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["other_stage", "quantization_stage"]


def test_the_command_line_writes_the_same(tmp_path, rows, monkeypatch, capsys):
    base = save(build("llama", BF16), tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    arguments = f"--scheme W4A16 --group-size 16 --dataset {tmp_path}/rows.jsonl --num-samples 12 --max-seq-length 32"
    line = f"bitpress oneshot {base} -o {tmp_path}/cli {arguments}"
    monkeypatch.setattr("sys.argv", line.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "checkpoint:" in capsys.readouterr().out
    whole = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
    oneshot(base, tmp_path / "rows.jsonl", whole, output_dir=tmp_path / "api", **OPTIONS)
    assert_same_tensors(tensors(tmp_path / "cli"), tensors(tmp_path / "api"))


def test_a_config_keeps_what_the_model_says(tmp_path, rows):
    model = build("qwen3", BF16)
    base = save(model, tmp_path / "base")
    oneshot(base, rows, W4, output_dir=tmp_path / "out", **OPTIONS)
    old, new = config_of(base), config_of(tmp_path / "out")
    assert {k: v for k, v in new.items() if k != "quantization_config"} == old
    assert "null" not in json.dumps(new["quantization_config"])
    oneshot(model, rows, W4, **OPTIONS)
    model.save_pretrained(tmp_path / "memory")
    ours, theirs = AutoConfig.from_pretrained(tmp_path / "memory"), AutoConfig.from_pretrained(tmp_path / "out")
    assert {k: v for k, v in ours.to_dict().items() if k != "_name_or_path"} == {
        k: v for k, v in theirs.to_dict().items() if k != "_name_or_path"
    }
    assert AutoModelForCausalLM.from_pretrained(base).config.architectures == new["architectures"]
