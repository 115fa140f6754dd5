"""Bad recipes, data and options: one clear error with the remedy, before any weight is read and anything is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from bad_input import ROUND, ROWS, W4, refused
from bitpress import ConfigError, DataError, PlanError, RecipeError, oneshot
from bitpress.devices import pick_device
from bitpress.evaluate import load_model
from conftest import build
from helpers import OPTIONS, config_of, conversations, report_of


def group(**weights):
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, **weights}}}}


RECIPES = {
    "ignore, and what it should have left": (
        PlanError,
        {"GPTQModifier": {"scheme": "W4A16", "group_size": 100, "ignore": ["lm_haed"]}},
        ["not divisible by group_size 100", "ignore: 'lm_haed' matches no linear", "lm_head"],
    ),
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
            "model.layers.0.self_attn.q_proj: 32 input columns are not divisible by group_size 24 (try 8, 16, 32, -1)",
            "model.layers.0.mlp.down_proj: 64 input columns are not divisible by group_size 24 (try 8, 16, 32, -1)",
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
def test_a_bad_recipe(case, tiny, tmp_path, no_weights):
    error, recipe, words = RECIPES[case]
    refused(error, words, tmp_path / "out", tiny, ROWS, recipe)


def test_faults_that_layers_share_are_told_once(tiny, tmp_path, no_weights):
    error = refused(PlanError, ["claimed by"], tmp_path / "out", tiny, ROWS, [W4, ROUND])
    assert len(error.problems) == 1 and "[and 13 more linears]" in error.problems[0]


def test_no_recipe_and_other_arguments_that_are_wrong(tiny, tmp_path, no_weights):
    words = ["3 problems", "recipe: missing", "batch_size: must be at least 1, got 0", "resume, fresh: give one"]
    refused(ConfigError, words, tmp_path / "out", tiny, ROWS, None, batch_size=0, resume=True, fresh=True)


def test_an_unknown_stage(tiny, tmp_path, no_weights):
    text = "sparsity_stage:\n  a_modifiers: {GPTQModifier: {scheme: W4A16}}\n"
    words = ["stage: 'sparsty_stage' is not in the recipe", "Its stages: sparsity_stage", "Did you mean"]
    refused(RecipeError, words, tmp_path / "out", tiny, ROWS, text, stage="sparsty_stage")
    with pytest.raises(ConfigError, match=r"output_dir: missing; a stage is saved as <output_dir>/<stage>"):
        oneshot(tiny, ROWS, text, stage="sparsity_stage")


def test_several_faults_are_one_error(tiny, tmp_path, no_weights):
    recipe = {
        "GPTQModifier": {
            "scheme": "W4A17", "group_size": 0, "block_size": 0, "dampening_frac": -1, "actordr": "static",
        }
    }  # fmt: skip
    error = refused(RecipeError, ["W4A17", "group_size", "block_size", "dampening_frac", "actordr"], tmp_path / "out",
                    tiny, ROWS, recipe)  # fmt: skip
    assert len(error.problems) == 5 and str(error).startswith("5 problems\n  ")
    plan = {"GPTQModifier": {"scheme": "W4A16", "group_size": 24, "targets": ["Linear", "nothing"]}}
    error = refused(PlanError, ["'nothing' matches no linear", "not divisible"], tmp_path / "out", tiny, ROWS, plan)
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
def test_bad_data(case, tiny, tmp_path, no_weights):
    data, options, words = DATA[case]
    refused(DataError, words, tmp_path / "out", tiny, data, W4, **options)


def test_a_tokenizer_that_is_there_and_cannot_be_loaded(tiny_copy, tmp_path, no_weights):
    (tiny_copy / "tokenizer.json").write_text('{"cut')
    words = ["text needs a tokenizer", f"{tiny_copy}: its own tokenizer cannot be loaded: "]
    refused(DataError, words, tmp_path / "out", tiny_copy, ["w1 w2"], W4)
    refused(DataError, words, tmp_path / "out", tiny_copy, None, W4)


def test_text_without_a_tokenizer(tiny_copy, tmp_path, no_weights):
    for file in tiny_copy.glob("tokenizer*"):
        file.unlink()
    refused(DataError, ["needs a tokenizer"], tmp_path / "out", tiny_copy, ["w1 w2"], W4)
    refused(DataError, ["needs a tokenizer"], tmp_path / "out", tiny_copy, None, W4)  # GPTQ without data: our own text
    refused(ConfigError, ["tokenizer: ", "nowhere"], tmp_path / "out", tiny_copy, ["w1"], W4, tokenizer="./nowhere")


def test_fewer_sequences_than_asked_for_is_told_and_goes_on(tiny, tmp_path):
    oneshot(tiny, ROWS[:5], W4, output_dir=tmp_path / "out", **OPTIONS)
    report = report_of(tmp_path / "out")
    assert "asked for 12 sequences, the data gives 5" in report["notes"]
    assert report["layers"][0]["tokens"] == 5 * 32


def test_an_output_folder_that_holds_other_work(tiny, tmp_path, no_weights):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for options in ({}, {"fresh": True}):
        with pytest.raises(PlanError, match="holds other files, which bitpress does not overwrite: choose another"):
            oneshot(tiny, ROWS, W4, output_dir=out, **OPTIONS, **options)
    assert [f.name for f in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(PlanError, match="is the model's own folder; choose another"):
        oneshot(tiny, ROWS, W4, output_dir=tiny, **OPTIONS)
    with pytest.raises(PlanError, match=r"thesis\.txt: is a file; choose a folder"):
        oneshot(tiny, ROWS, W4, output_dir=out / "thesis.txt", **OPTIONS)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_no_space_on_the_disk(tiny, tmp_path, monkeypatch, no_weights):
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: real._replace(free=64 << 20))
    refused(PlanError, ["the output takes", "only 64.0 MiB are free", "another disk"], tmp_path / "out",
            tiny, ROWS, W4)  # fmt: skip


def test_faults_of_every_kind_come_together(tiny_copy, tmp_path, monkeypatch, no_weights):
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

    all_of([*ours, *recipe, *device, *output, *data], tiny_copy, wrong, **values)
    # with a recipe that can be read, the model is held against it
    uneven = {"GPTQModifier": {"scheme": "W4A16", "group_size": 24, "ignore": ["lm_head", "re:.*down_proj"]}}
    fits = ["q_proj: 32 input columns are not divisible by group_size 24", "one block needs"]
    all_of([*fits, *device, *output, *data], tiny_copy, uneven, max_memory="1MiB")
    all_of([*recipe, *device, *output, *data, "nowhere: no such model folder"], tmp_path / "nowhere", wrong)
    config = config_of(tiny_copy)
    (tiny_copy / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(PlanError) as caught:
        oneshot(tiny_copy, ROWS, wrong, output_dir=tmp_path / "out")
    assert "but config.json asks for" in str(caught.value) and recipe[0] in str(caught.value)


def test_faults_of_one_kind_keep_their_kind(tiny_copy, tmp_path, no_weights):
    with pytest.raises(ConfigError) as caught:
        oneshot(tiny_copy, ROWS, W4, output_dir=tmp_path / "out", device="cuad", seed=-1)
    assert len(caught.value.problems) == 2


def test_devices_that_are_not_there(tiny, tmp_path, monkeypatch, no_weights):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["device: 'cuda' was asked for, but torch sees no GPU", "use cpu or auto"]
    refused(ConfigError, words, tmp_path / "out", tiny, ROWS, W4, device="cuda")
    refused(ConfigError, ["'cuad' is unknown"], tmp_path / "out", tiny, ROWS, W4, device="cuad")
    refused(ConfigError, ["'mps' is not supported"], tmp_path / "out", tiny, ROWS, W4, device="mps")
    refused(ConfigError, ["'cuda:x' is unknown"], tmp_path / "out", tiny, ROWS, W4, device="cuda:x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == pick_device(torch.device("cuda:1")) == torch.device("cuda", 1)
    assert pick_device("auto") == torch.device("cuda")
    for call in (pick_device, lambda name: load_model(tiny, device=name)):
        with pytest.raises(ConfigError, match=r"'cuda:2' was asked for, but torch sees 2 GPUs, from cuda:0 on"):
            call("cuda:2")


@pytest.mark.parametrize("size", ["much", "8XB", "-3GiB", "0"])
def test_sizes_that_are_none(size, tiny, tmp_path, no_weights):
    words = [f"max_memory: '{size}' is not a size", "8GiB"]
    refused(ConfigError, words, tmp_path / "out", tiny, ROWS, W4, max_memory=size)


def test_a_storage_format_that_is_not_there():
    model = build("llama")
    oneshot(model, ROWS, ROUND, **OPTIONS)
    with pytest.raises(ConfigError, match=r"quantization_format: 'int-quantised'.* Did you mean 'int-quantized'"):
        model.save_pretrained("unused", quantization_format="int-quantised")
