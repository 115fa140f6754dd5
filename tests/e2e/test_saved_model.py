"""What a run from a folder gives back, `save_pretrained` and `from_pretrained`, and their arguments."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitpress import CheckpointError, ConfigError, PlanError, oneshot
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build, save
from helpers import OPTIONS, W4, assert_same_tensors, client, config_of, logits, make_tokenizer, report_of, tensors

BF16 = torch.bfloat16


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
    act_order = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16, "actorder": "group",
    }  # fmt: skip
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
