"""Models that cannot be compressed: one clear error, or a stop at the layer whose numbers are none."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bad_input import ROUND, ROWS, W4, refused
from bitpress import CheckpointError, NumericsError, PlanError, oneshot
from conftest import build, save, token_rows
from helpers import OPTIONS, config_of


def test_a_model_that_is_quantized_already(tiny, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    oneshot(tiny, ROWS, W4, output_dir=tmp_path / "once", **OPTIONS)
    words = ["is quantized already (compressed-tensors)", "start from the full-precision model"]
    refused(PlanError, words, tmp_path / "out", tmp_path / "once", ROWS, W4)
    refused(
        PlanError,
        ["is quantized already"],
        tmp_path / "out",
        AutoModelForCausalLM.from_pretrained(tmp_path / "once"),
        ROWS,
        W4,
    )
    config = config_of(tmp_path / "once")
    del config["quantization_config"]
    (tmp_path / "once/config.json").write_text(json.dumps(config))
    refused(PlanError, ["is quantized already"], tmp_path / "out", tmp_path / "once", ROWS, W4)


def test_compressing_a_result_again_in_memory(tiny, tmp_path):
    model = build("llama")
    oneshot(model, ROWS, W4, **OPTIONS)
    refused(PlanError, ["is quantized already", "full-precision"], tmp_path / "out", model, ROWS, W4)


def stopped(words, model, out, recipe=W4, data=ROWS):
    """The run stops with NumericsError at the layer, and the folder does not look complete."""
    with pytest.raises(NumericsError) as caught:
        oneshot(model, data, recipe, output_dir=out, **OPTIONS)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("recipe", [W4, ROUND], ids=["gptq", "rtn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["layers.1.self_attn.v_proj", "layers.0.mlp.down_proj"])
def test_a_weight_that_is_no_number(layer, value, recipe, tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.get_submodule(layer).weight[3, 5] = value
    stopped([f"model.{layer}: NaN or infinity in the weight"], save(model, tmp_path / "base"), tmp_path / "a", recipe)
    stopped([f"model.{layer}: NaN or infinity in the weight"], model, tmp_path / "b", recipe)


def test_a_weight_that_is_no_number_is_named_before_scales_move(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[3, 5] = float("nan")
    words = ["model.layers.0.mlp.gate_proj: NaN or infinity in the weight"]
    stopped(words, model, tmp_path / "out", [{"AWQModifier": {}}, W4])


def test_activations_that_are_no_numbers(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[ROWS[3]["input_ids"][7]] = float("inf")
    stopped(["model.layers.0.self_attn.q_proj: NaN or infinity in the input activations"], model, tmp_path / "out")


def test_activations_that_overflow_half_precision(tmp_path):
    model = build("llama", torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(6e4)
    stopped(["model.layers.1.mlp.down_proj: NaN or infinity in the input activations"], model, tmp_path / "out")


def test_a_gram_matrix_that_is_not_positive_definite(tiny, tmp_path):
    undamped = {"GPTQModifier": {**W4["GPTQModifier"], "dampening_frac": 0}}
    words = ["model.layers.0.", "the Gram matrix is not positive definite: raise dampening_frac or give more data"]
    stopped(words, tiny, tmp_path / "out", undamped, [{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}])
    oneshot(tiny, token_rows(12, 64), undamped, output_dir=tmp_path / "enough", **OPTIONS)


def test_pickle_weights(tiny_copy, tmp_path, no_weights):
    torch.save(load_file(tiny_copy / "model.safetensors"), tiny_copy / "pytorch_model.bin")
    (tiny_copy / "model.safetensors").unlink()
    words = ["holds pickle weights, which can run code", "trust_pickle=True (--trust-pickle)", "NEW_FOLDER"]
    refused(CheckpointError, words, tmp_path / "out", tiny_copy, ROWS, W4)
    refused(CheckpointError, words, tmp_path / "out", tiny_copy, ROWS, W4, output_dir=None)


def test_remote_code(tiny_copy, tmp_path, no_weights):
    config = config_of(tiny_copy)
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "home.Config", "AutoModelForCausalLM": "home.Model"},
    }
    (tiny_copy / "config.json").write_text(json.dumps(config))
    (tiny_copy / "home.py").write_text("raise SystemExit('the code ran')")
    words = ["brings its own code", "trust_remote_code (--trust-remote-code) if you trust it"]
    refused(CheckpointError, words, tmp_path / "out", tiny_copy, ROWS, W4)
    refused(CheckpointError, words, tmp_path / "out", tiny_copy, ROWS, W4, output_dir=None)


def test_an_unknown_model_type(tiny_copy, tmp_path, no_weights):
    config = config_of(tiny_copy) | {"model_type": "homemade"}
    (tiny_copy / "config.json").write_text(json.dumps(config))
    refused(CheckpointError, ["config.json cannot be used", "homemade"], tmp_path / "out", tiny_copy, ROWS, W4)


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_an_encoder_decoder(where, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    model = T5ForConditionalGeneration(config)
    given = save(model, tmp_path / "t5") if where == "folder" else model
    refused(PlanError, ["encoder-decoder", "decoder language models"], tmp_path / "out", given, ROWS, W4)


@pytest.mark.parametrize("targets", ["Linear", "Conv1D", "re:.*c_fc"])
def test_linears_that_are_stored_transposed(targets, tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config)
    recipe = {"GPTQModifier": {**W4["GPTQModifier"], "targets": targets}}
    words = ["transformer.h.0.attn.c_attn and 7 more: Conv1D", "Choose a model whose projections are Linear"]
    refused(PlanError, words, tmp_path / "out", save(model, tmp_path / "base"), ROWS, recipe)
    refused(PlanError, words, tmp_path / "out", model, ROWS, recipe)


def test_models_that_are_none(tmp_path, no_weights):
    (tmp_path / "empty").mkdir()
    refused(CheckpointError, ["no config.json"], tmp_path / "out", tmp_path / "empty", ROWS, W4)
    refused(CheckpointError, ["no such model folder"], tmp_path / "out", tmp_path / "nowhere", ROWS, W4)
    refused(PlanError, ["Linear: not a transformers model"], tmp_path / "out", torch.nn.Linear(3, 3), ROWS, W4)
    with torch.device("meta"):
        offloaded = build("llama")
    refused(PlanError, ["spread over devices or offloaded", "give its folder"], tmp_path / "out", offloaded, ROWS, W4)


def test_damaged_weight_files(tiny_copy, tmp_path, no_weights):
    file = tiny_copy / "model.safetensors"
    whole = file.read_bytes()
    out = tmp_path / "out"
    for cut in (len(whole) - 100, 50, 3):
        file.write_bytes(whole[:cut])
        refused(CheckpointError, ["model.safetensors"], out, tiny_copy, ROWS, W4)
    weights = load_file_bytes(whole)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, file, metadata={"format": "pt"})
    refused(CheckpointError, [f"{name}: in no weight file"], out, tiny_copy, ROWS, W4)
    save_file({**weights, name: torch.zeros(60, 32)}, file, metadata={"format": "pt"})
    words = [f"{name}: shape (60, 32), but config.json asks for (64, 32)"]
    refused(CheckpointError, words, out, tiny_copy, ROWS, W4)


def load_file_bytes(raw):
    from safetensors.torch import load

    return load(raw)


def test_a_missing_shard(tmp_path, no_weights):
    base = save(build("llama"), tmp_path / "sharded", max_shard_size="40KB")
    gone = sorted(base.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(CheckpointError, [gone.name], tmp_path / "out", base, ROWS, W4)
