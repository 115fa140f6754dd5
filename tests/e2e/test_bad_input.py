"""Bad input: one clear error with the remedy, before any weight is read and anything is written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitpress.output  # before its functions are patched
from bitpress import CheckpointError, ConfigError, DataError, NumericsError, PlanError, RecipeError, oneshot
from bitpress.devices import pick_device
from bitpress.evaluate import load_model
from conftest import build, save, token_rows
from helpers import conversations, make_tokenizer

OPTIONS = {"max_seq_length": 32, "num_calibration_samples": 12}
W4 = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
ROUND = {"QuantizationModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
ROWS = token_rows()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A tiny Llama with a tokenizer that has no chat template."""
    folder = save(build("llama"), tmp_path_factory.mktemp("models") / "llama")
    make_tokenizer(folder, chat=False)
    return folder


@pytest.fixture
def base(shared, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(shared, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def no_weights(monkeypatch):
    """Reading a weight fails the test."""

    def read(wanted, *_args, **_options):
        assert not list(wanted), "a weight was read"
        return {}

    def load(*_args, **_options):
        raise AssertionError("the model was loaded")

    for place in (bitpress.checkpoint, bitpress.output):
        monkeypatch.setattr(place, "read_tensors", read)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)


def group(**weights):
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, **weights}}}}


def refused(error, words, out, *arguments, **options):
    """The call fails with exactly this class, its message has these words, and nothing has been written."""
    with pytest.raises(error) as caught:
        oneshot(*arguments, **{"output_dir": out, **OPTIONS, **options})
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert not out.exists()
    return caught.value


RECIPES = {
    "scheme": (RecipeError, {"GPTQModifier": {"scheme": "W4A16_ASYMM"}}, ["W4A16_ASYMM", "Did you mean 'W4A16_ASYM'?"]),
    "modifier": (RecipeError, {"GPTQModifer": {"scheme": "W4A16"}}, ["GPTQModifer", "Did you mean 'GPTQModifier'?"]),
    "short modifier": (RecipeError, {"modifiers": ["GPTQ"]}, ["GPTQ: unknown", "Did you mean 'GPTQModifier'?"]),
    "key": (
        RecipeError,
        {"GPTQModifier": {"scheme": "W4A16", "dampening_fraction": 0.1}},
        ["GPTQModifier.dampening_fraction: unknown key", "Did you mean 'dampening_frac'?"],
    ),
    "strategy": (RecipeError, {"GPTQModifier": group(strategy="chanel")}, ["'chanel'", "Did you mean 'channel'?"]),
    "group size 0": (RecipeError, {"GPTQModifier": {"scheme": "W4A16", "group_size": 0}}, ["group_size", "got 0"]),
    "group size -5": (RecipeError, {"GPTQModifier": {"scheme": "W4A16", "group_size": -5}}, ["group_size", "got -5"]),
    "group size 0 of a group": (
        RecipeError,
        {"GPTQModifier": group(strategy="group", group_size=0)},
        ["config_groups.g.weights.group_size: must be positive, got 0"],
    ),
    "group size that does not divide": (
        PlanError,
        {"GPTQModifier": {"scheme": "W4A16", "group_size": 24, "ignore": ["lm_head"]}},
        [
            "model.layers.0.self_attn.q_proj: 32 input columns are not divisible by group_size 24 (try 8, 16, 32)",
            "model.layers.0.mlp.down_proj: 64 input columns are not divisible by group_size 24 (try 8, 16, 32)",
            "[and 11 more linears]",
        ],
    ),
    "group size of a preset without groups": (
        RecipeError,
        {"GPTQModifier": {"scheme": "W8A8", "group_size": 16}},
        ["group_size: W8A8 has one scale per channel", "drop group_size"],
    ),
    "group size with channel": (
        RecipeError,
        {"GPTQModifier": group(strategy="channel", group_size=16)},
        ["group_size: does not go with strategy 'channel'", "drop group_size or use strategy: group"],
    ),
    "no match": (
        PlanError,
        {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "targets": ["q_prj"]}},
        ["targets: 'q_prj' matches no linear", "Did you mean 'q_proj'"],
    ),
    "all ignored": (
        PlanError,
        {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["Linear"]}},
        ["ignore: ignores all 15 linears"],
    ),
    "suffix of a stage": (
        RecipeError,
        {"quant_stag": {"quant_modifiers": W4}},
        ["stages must end in '_stage'", "Did you mean 'quant_stage'?"],
    ),
    "suffix of a group": (
        RecipeError,
        {"quant_stage": {"quant_modifier": W4}},
        ["groups of modifiers must end in '_modifiers'", "Did you mean 'quant_modifiers'?"],
    ),
    "empty": (RecipeError, "", ["recipe is empty", "GPTQModifier: {scheme: W4A16}"]),
    "empty mapping": (RecipeError, {}, ["recipe is empty"]),
    "empty stage": (RecipeError, "a_stage:\n", ["a_stage: has no modifiers"]),
    "missing file": (RecipeError, "no-such-recipe.yaml", ["no-such-recipe.yaml: there is no such recipe file"]),
    "no yaml": (RecipeError, "GPTQModifier: [\n  a: }", ["recipe, line 2", "not valid YAML"]),
    "training": (RecipeError, {"run_type": "train", **W4}, ["a training stage, which oneshot does not run"]),
    "twice": (
        PlanError,
        [W4, ROUND],
        ["model.layers.0.self_attn.q_proj: claimed by GPTQModifier and by QuantizationModifier", "ignore"],
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_bad_recipe(case, shared, tmp_path, no_weights):
    error, recipe, words = RECIPES[case]
    refused(error, words, tmp_path / "out", shared, ROWS, recipe)


def test_faults_that_layers_share_are_told_once(shared, tmp_path, no_weights):
    error = refused(PlanError, ["claimed by"], tmp_path / "out", shared, ROWS, [W4, ROUND])
    assert len(error.problems) == 1 and "[and 13 more linears]" in error.problems[0]


def test_no_recipe_and_other_arguments_that_are_wrong(shared, tmp_path, no_weights):
    words = ["3 problems", "recipe: missing", "batch_size: must be at least 1, got 0", "resume, fresh: give one"]
    refused(ConfigError, words, tmp_path / "out", shared, ROWS, None, batch_size=0, resume=True, fresh=True)


def test_an_unknown_stage(shared, tmp_path, no_weights):
    text = "sparsity_stage:\n  a_modifiers: {GPTQModifier: {scheme: W4A16}}\n"
    words = ["stage: 'sparsty_stage' is not in the recipe", "Its stages: sparsity_stage", "Did you mean"]
    refused(RecipeError, words, tmp_path / "out", shared, ROWS, text, stage="sparsty_stage")
    with pytest.raises(ConfigError, match=r"output_dir: missing; a stage is saved as <output_dir>/<stage>"):
        oneshot(shared, ROWS, text, stage="sparsity_stage")


def test_several_faults_are_one_error(shared, tmp_path, no_weights):
    recipe = {
        "GPTQModifier": {
            "scheme": "W4A17", "group_size": 0, "block_size": 0, "dampening_frac": -1, "actordr": "static",
        }
    }  # fmt: skip
    error = refused(RecipeError, ["W4A17", "group_size", "block_size", "dampening_frac", "actordr"], tmp_path / "out",
                    shared, ROWS, recipe)  # fmt: skip
    assert len(error.problems) == 5 and str(error).startswith("5 problems\n  ")
    plan = {"GPTQModifier": {"scheme": "W4A16", "group_size": 24, "targets": ["Linear", "nothing"]}}
    error = refused(PlanError, ["'nothing' matches no linear", "not divisible"], tmp_path / "out", shared, ROWS, plan)
    assert len(error.problems) >= 3


DATA = {
    "missing file": ("data/none.jsonl", {}, ["data/none.jsonl: no such file or folder"]),
    "missing column": ([{"story": "w1 w2", "id": 3}], {}, ["no column 'text'", "Columns: story, id"]),
    "missing named column": ([{"story": "w1", "id": 3}], {"text_column": "stori"}, ["'stori'", "Did you mean 'story'"]),
    "empty": ([], {}, ["empty"]),
    "without tokens": ([{"input_ids": []}], {}, ["empty", "none of 1 row has a token"]),
    "no chat template": (conversations(3), {}, ["messages", "no chat template", "set tokenizer.chat_template"]),
    "ids of another model": ([{"input_ids": [5, 96]}], {}, ["token id 96, but the model embeds 96"]),
    "negative ids": ([{"input_ids": [5, -100]}], {}, ["negative id -100"]),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data(case, shared, tmp_path, no_weights):
    data, options, words = DATA[case]
    refused(DataError, words, tmp_path / "out", shared, data, W4, **options)


def test_a_tokenizer_that_is_there_and_cannot_be_loaded(base, tmp_path, no_weights):
    (base / "tokenizer.json").write_text('{"cut')
    words = ["text needs a tokenizer", f"{base}: its own tokenizer cannot be loaded: "]
    refused(DataError, words, tmp_path / "out", base, ["w1 w2"], W4)
    refused(DataError, words, tmp_path / "out", base, None, W4)


def test_text_without_a_tokenizer(base, tmp_path, no_weights):
    for file in base.glob("tokenizer*"):
        file.unlink()
    refused(DataError, ["needs a tokenizer"], tmp_path / "out", base, ["w1 w2"], W4)
    refused(DataError, ["needs a tokenizer"], tmp_path / "out", base, None, W4)  # GPTQ without data: our own text
    refused(ConfigError, ["tokenizer: ", "nowhere"], tmp_path / "out", base, ["w1"], W4, tokenizer="./nowhere")


def test_fewer_sequences_than_asked_for_is_told_and_goes_on(shared, tmp_path):
    oneshot(shared, ROWS[:5], W4, output_dir=tmp_path / "out", **OPTIONS)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert "asked for 12 sequences, the data gives 5" in report["notes"]
    assert report["layers"][0]["tokens"] == 5 * 32


def test_a_model_that_is_quantized_already(shared, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    oneshot(shared, ROWS, W4, output_dir=tmp_path / "once", **OPTIONS)
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
    config = json.loads((tmp_path / "once/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "once/config.json").write_text(json.dumps(config))
    refused(PlanError, ["is quantized already"], tmp_path / "out", tmp_path / "once", ROWS, W4)


def test_compressing_a_result_again_in_memory(shared, tmp_path):
    model = build("llama")
    oneshot(model, ROWS, W4, **OPTIONS)
    refused(PlanError, ["is quantized already", "full-precision"], tmp_path / "out", model, ROWS, W4)


def test_an_output_folder_that_holds_other_work(shared, tmp_path, no_weights):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for options in ({}, {"fresh": True}):
        with pytest.raises(PlanError, match="holds other files, which bitpress does not overwrite: choose another"):
            oneshot(shared, ROWS, W4, output_dir=out, **OPTIONS, **options)
    assert [f.name for f in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(PlanError, match="is the model's own folder; choose another"):
        oneshot(shared, ROWS, W4, output_dir=shared, **OPTIONS)
    with pytest.raises(PlanError, match=r"thesis\.txt: is a file; choose a folder"):
        oneshot(shared, ROWS, W4, output_dir=out / "thesis.txt", **OPTIONS)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_no_space_on_the_disk(shared, tmp_path, monkeypatch, no_weights):
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: real._replace(free=64 << 20))
    refused(PlanError, ["the output takes", "only 64.0 MiB are free", "another disk"], tmp_path / "out",
            shared, ROWS, W4)  # fmt: skip


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


def test_a_gram_matrix_that_is_not_positive_definite(shared, tmp_path):
    undamped = {"GPTQModifier": {**W4["GPTQModifier"], "dampening_frac": 0}}
    words = ["model.layers.0.", "the Gram matrix is not positive definite: raise dampening_frac or give more data"]
    stopped(words, shared, tmp_path / "out", undamped, [{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}])
    oneshot(shared, token_rows(12, 64), undamped, output_dir=tmp_path / "enough", **OPTIONS)


def test_pickle_weights(base, tmp_path, no_weights):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    words = ["holds pickle weights, which can run code", "trust_pickle=True (--trust-pickle)", "NEW_FOLDER"]
    refused(CheckpointError, words, tmp_path / "out", base, ROWS, W4)
    refused(CheckpointError, words, tmp_path / "out", base, ROWS, W4, output_dir=None)


def test_remote_code(base, tmp_path, no_weights):
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "home.Config", "AutoModelForCausalLM": "home.Model"},
    }
    (base / "config.json").write_text(json.dumps(config))
    (base / "home.py").write_text("raise SystemExit('the code ran')")
    words = ["brings its own code", "trust_remote_code (--trust-remote-code) if you trust it"]
    refused(CheckpointError, words, tmp_path / "out", base, ROWS, W4)
    refused(CheckpointError, words, tmp_path / "out", base, ROWS, W4, output_dir=None)


def test_an_unknown_model_type(base, tmp_path, no_weights):
    config = json.loads((base / "config.json").read_text()) | {"model_type": "homemade"}
    (base / "config.json").write_text(json.dumps(config))
    refused(CheckpointError, ["config.json cannot be used", "homemade"], tmp_path / "out", base, ROWS, W4)


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


def test_faults_of_every_kind_come_together(base, tmp_path, monkeypatch, no_weights):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").touch()
    values = {"num_calibration_samples": 0, "max_seq_length": 32, "max_memory": "8XB"}
    ours = ["num_calibration_samples: must be at least 1, got 0", "max_memory: '8XB' is not a size"]
    output, data = ["out: holds other files"], ["none.jsonl: no such file or folder"]
    device = ["device: 'cuda' was asked for, but torch sees no GPU"]
    wrong = {"GPTQModifier": {"scheme": "W4A61", "block_size": 0}}
    recipe = ["GPTQModifier.scheme: 'W4A61' is unknown", "GPTQModifier.block_size: must be at least 1"]

    def all_of(words, model, given, **options):
        with pytest.raises(PlanError) as caught:
            oneshot(model, "none.jsonl", given, output_dir=tmp_path / "out", **{"device": "cuda", **options})
        assert len(caught.value.problems) == len(words), caught.value
        for word in words:
            assert word in str(caught.value)

    all_of([*ours, *recipe, *device, *output, *data], base, wrong, **values)
    # with a recipe that can be read, the model is held against it
    uneven = {"GPTQModifier": {"scheme": "W4A16", "group_size": 24, "ignore": ["lm_head", "re:.*down_proj"]}}
    fits = ["q_proj: 32 input columns are not divisible by group_size 24", "one block needs"]
    all_of([*fits, *device, *output, *data], base, uneven, max_memory="1MiB")
    all_of([*recipe, *device, *output, *data, "nowhere: no such model folder"], tmp_path / "nowhere", wrong)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(PlanError) as caught:
        oneshot(base, ROWS, wrong, output_dir=tmp_path / "out")
    assert "but config.json asks for" in str(caught.value) and recipe[0] in str(caught.value)


def test_faults_of_one_kind_keep_their_kind(base, tmp_path, no_weights):
    with pytest.raises(ConfigError) as caught:
        oneshot(base, ROWS, W4, output_dir=tmp_path / "out", device="cuad", seed=-1)
    assert len(caught.value.problems) == 2


def test_models_that_are_none(tmp_path, no_weights):
    (tmp_path / "empty").mkdir()
    refused(CheckpointError, ["no config.json"], tmp_path / "out", tmp_path / "empty", ROWS, W4)
    refused(CheckpointError, ["no such model folder"], tmp_path / "out", tmp_path / "nowhere", ROWS, W4)
    refused(PlanError, ["Linear: not a transformers model"], tmp_path / "out", torch.nn.Linear(3, 3), ROWS, W4)
    with torch.device("meta"):
        offloaded = build("llama")
    refused(PlanError, ["spread over devices or offloaded", "give its folder"], tmp_path / "out", offloaded, ROWS, W4)


def test_damaged_weight_files(base, tmp_path, no_weights):
    file = base / "model.safetensors"
    whole = file.read_bytes()
    out = tmp_path / "out"
    for cut in (len(whole) - 100, 50, 3):
        file.write_bytes(whole[:cut])
        refused(CheckpointError, ["model.safetensors"], out, base, ROWS, W4)
    weights = load_file_bytes(whole)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, file, metadata={"format": "pt"})
    refused(CheckpointError, [f"{name}: in no weight file"], out, base, ROWS, W4)
    save_file({**weights, name: torch.zeros(60, 32)}, file, metadata={"format": "pt"})
    words = [f"{name}: shape (60, 32), but config.json asks for (64, 32)"]
    refused(CheckpointError, words, out, base, ROWS, W4)


def load_file_bytes(raw):
    from safetensors.torch import load

    return load(raw)


def test_a_missing_shard(tmp_path, no_weights):
    base = save(build("llama"), tmp_path / "sharded", max_shard_size="40KB")
    gone = sorted(base.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(CheckpointError, [gone.name], tmp_path / "out", base, ROWS, W4)


def test_devices_that_are_not_there(shared, tmp_path, monkeypatch, no_weights):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["device: 'cuda' was asked for, but torch sees no GPU", "use cpu or auto"]
    refused(ConfigError, words, tmp_path / "out", shared, ROWS, W4, device="cuda")
    refused(ConfigError, ["'cuad' is unknown"], tmp_path / "out", shared, ROWS, W4, device="cuad")
    refused(ConfigError, ["'mps' is not supported"], tmp_path / "out", shared, ROWS, W4, device="mps")
    refused(ConfigError, ["'cuda:x' is unknown"], tmp_path / "out", shared, ROWS, W4, device="cuda:x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == pick_device(torch.device("cuda:1")) == torch.device("cuda", 1)
    assert pick_device("auto") == torch.device("cuda")
    for call in (pick_device, lambda name: load_model(shared, device=name)):
        with pytest.raises(ConfigError, match=r"'cuda:2' was asked for, but torch sees 2 GPUs, from cuda:0 on"):
            call("cuda:2")


def test_the_output_is_checked_with_all_else(base, tmp_path, monkeypatch, capsys, no_weights):
    words = [base, "--scheme", "W4A61", "--num-samples", "0"]
    wrong = ["4 problems", "GPTQModifier.scheme: 'W4A61' is unknown", "num_calibration_samples: must be", "none.jsonl"]
    (tmp_path / "file").write_text("")
    for place, said in [
        ([], "--output: missing; name the folder"),
        (["-o", tmp_path / "file"], "is a file; choose a folder"),
        (["-o", tmp_path / "file/out"], "file is a file; choose another output folder"),
        (["-o", base], "is the model's own folder"),
    ]:
        code, _, err = cli(monkeypatch, capsys, "oneshot", *words, "--dataset", "none.jsonl", *place)
        assert code == 1 and all(text in err for text in (*wrong, said)), err
    for verb in ("train", "apply"):
        code, _, err = cli(monkeypatch, capsys, verb, base, "--dataset", "none.jsonl")
        assert code == 1 and all(
            w in err for w in ("3 problems", "--output: missing", "--recipe: missing", "none.jsonl")
        )
    code, _, err = cli(monkeypatch, capsys, "convert", tmp_path / "nowhere", tmp_path / "file", "--format", "gptqq")
    assert code == 1 and all(w in err for w in ("3 problems", "Did you mean 'gptq'", "nowhere", "is a file")), err
    monkeypatch.setattr("os.access", lambda *_: False)
    refused(PlanError, [f"{tmp_path} cannot be written to"], tmp_path / "out", base, ROWS, W4)


@pytest.mark.parametrize("size", ["much", "8XB", "-3GiB", "0"])
def test_sizes_that_are_none(size, shared, tmp_path, no_weights):
    words = [f"max_memory: '{size}' is not a size", "8GiB"]
    refused(ConfigError, words, tmp_path / "out", shared, ROWS, W4, max_memory=size)


def test_a_storage_format_that_is_not_there():
    model = build("llama")
    oneshot(model, ROWS, ROUND, **OPTIONS)
    with pytest.raises(ConfigError, match=r"quantization_format: 'int-quantised'.* Did you mean 'int-quantized'"):
        model.save_pretrained("unused", quantization_format="int-quantised")


@pytest.mark.parametrize("verb", ["oneshot", "plan"])
def test_the_command_line_says_one_message(verb, shared, tmp_path, monkeypatch, capsys):
    words = [verb, shared, "-o", tmp_path / "out", "--scheme", "W4A16", "--group-size", "24"]
    if verb == "oneshot":  # as people start it; the others in this process, which has imported all that it takes
        command = [sys.executable, "-m", "bitpress", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = written(monkeypatch, capsys, *words)
    assert code == 1 and out == ""
    assert err.startswith("PlanError: 2 problems\n  model.layers.0.self_attn.q_proj: 32 input columns are not")
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def written(monkeypatch, capsys, *words):
    """The command line in this process: exit code, output, errors."""
    from bitpress.cli import main

    monkeypatch.setattr("sys.argv", ["bitpress", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def cli(monkeypatch, capsys, *words):
    """The same, with the errors in one line."""
    code, out, err = written(monkeypatch, capsys, *words)
    return code, out, " ".join(err.split())


@pytest.mark.parametrize("verb", ["oneshot", "plan"])
@pytest.mark.parametrize(
    ("code", "words", "options"),
    [
        (1, "RecipeError: GPTQModifier.scheme: 'W4A61' is unknown. Did you mean 'W4A16'?", ["--scheme", "W4A61"]),
        (
            1,
            "ConfigError: --recipe: missing; give --scheme (such as W4A16), --bits (such as 4.25), --sparsity (such as "
            "2:4) or --recipe",
            [],
        ),
        (1, "ConfigError: --recipe: none.yaml: no such file", ["--recipe", "none.yaml"]),
        (1, "ConfigError: --scheme: cannot go with --recipe", ["--recipe", "none.yaml", "--scheme", "W4A16"]),
        (1, "ConfigError: --group-size: cannot go with --recipe", ["--recipe", "none.yaml", "--group-size", "0"]),
        (1, "ConfigError: --group-size: cannot go with --bits", ["--bits", "4.5", "--group-size", "0"]),
        (1, "DataError: none.jsonl: no such file", ["--scheme=W8A16", "--group-size=16", "--dataset=none.jsonl"]),
        (1, "PlanError: one block needs", ["--scheme", "W4A16", "--group-size", "16", "--max-memory", "1MiB"]),
        (1, "ConfigError: device: 'cuda:3' was asked for", ["--scheme=W8A16", "--group-size=16", "--device=cuda:3"]),
        (2, "Invalid value for '--num-samples'", ["--scheme", "W4A16", "--num-samples", "many"]),
        (2, "No such option", ["--scheme", "W4A16", "--sheme", "W8A16"]),
        (2, "Invalid value for '--method'", ["--scheme", "W4A16", "--method", "gtpq"]),
    ],
)  # fmt: skip
def test_faults_on_the_command_line(verb, code, words, options, shared, tmp_path, monkeypatch, capsys, no_weights):
    ended, out, err = cli(monkeypatch, capsys, verb, shared, "-o", tmp_path / "out", *options)
    assert (ended, out) == (code, "") and words in err.replace("│ ", "").replace(" │", ""), err
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_options_that_do_not_go_together_come_with_the_other_faults(shared, monkeypatch, capsys, no_weights):
    options = ["--scheme", "W4A16", "--bits", "4", "--dataset", "none.jsonl", "--max-memory", "8XB"]
    ended, _, err = cli(monkeypatch, capsys, "plan", shared, *options)
    assert ended == 1 and "3 problems" in err
    for words in ("--scheme: cannot go with --bits", "none.jsonl: no such file", "max_memory: '8XB' is not a size"):
        assert words in err


def test_the_plan_leaves_nothing_that_it_prunes(shared, tmp_path, monkeypatch, capsys, no_weights):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("MagnitudePruningModifier: {sparsity: 0.5, ignore: [lm_head]}")
    ended, out, _ = cli(monkeypatch, capsys, "plan", shared, "--recipe", recipe)
    left = out[out.index("left as they are") :]
    assert ended == 0 and "lm_head" in left and "q_proj" not in left


def test_the_plan_sees_that_the_folder_is_taken(shared, tmp_path, monkeypatch, capsys, no_weights):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    ended, _, err = cli(monkeypatch, capsys, "plan", shared, "-o", out, "--scheme", "W4A16", "--group-size", "16")
    assert ended == 1 and "holds other files" in err


def test_the_plan_of_a_good_run_reads_and_writes_nothing(shared, tmp_path, monkeypatch, capsys, no_weights):
    words = ["plan", shared, "-o", tmp_path / "out", "--scheme", "W4A16", "--group-size", "16", "--json"]
    ended, out, _ = cli(monkeypatch, capsys, *words)
    assert ended == 0 and len(json.loads(out)["sites"]) == 14
    assert not (tmp_path / "out").exists()
