"""`bitpress run`: the shipped configurations, those of training wizards, and what is said of bad ones."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from bitpress import BitpressError, ConfigError, cli, inspect_checkpoint, oneshot
from bitpress.configs import run
from bitpress.configs.document import read
from bitpress.configs.runs import load
from conftest import build, save, token_rows
from helpers import WORDS, assert_same_tensors, conversations, make_tokenizer, tensors

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model with a chat template."""
    folder = save(build("llama", BF16, hidden_size=64, intermediate_size=128), tmp_path_factory.mktemp("model") / "m")
    make_tokenizer(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder: pairs, and a module of the user's."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"source": " ".join(WORDS[i : i + 8]), "target": " ".join(WORDS[i + 3 : i + 9])} for i in range(40)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, conversations(20))))
    return tmp_path


def recipe_of(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def fault(config, *overrides):
    """The problems of a configuration, each a line."""
    with pytest.raises(BitpressError) as caught:
        run(config, overrides)
    return caught.value.problems


# the shipped ones


def test_pairs_in_int8(base, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    run(EXAMPLES / "w8a8-pairs.toml", [f"model={base}", f"output_dir={out}", "num_calibration_samples=4"])
    (stage,) = recipe_of(out).values()
    first, second = stage["default_modifiers"].items()
    assert first == ("SmoothQuantModifier", {"smoothing_strength": 0.8})
    assert second == ("GPTQModifier", {"scheme": "W8A8", "ignore": ["lm_head"]})
    report = json.loads((out / "report.json").read_text())
    assert report["data"]["sequences"] == 4 and not report["data"]["packed"]
    again = f"cd {ROOT} && bitpress run {EXAMPLES / 'w8a8-pairs.toml'} --set model={base} --set output_dir={out} --set "
    assert report["again"] == f"{again}num_calibration_samples=4 --set output_dir={out}-again"
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 256
    assert json.loads((out / "tokenizer_config.json").read_text())["padding_side"] == "left"
    assert "W8A8" in str(inspect_checkpoint(out))


def test_chat_in_int4(base, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    run(EXAMPLES / "w4a16-chat.yaml", [f"model={base}", f"output_dir={out}", "group_size=16"])
    (stage,) = recipe_of(out).values()
    assert stage["default_modifiers"] == {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
    assert json.loads((out / "report.json").read_text())["data"]["sequences"] == 4


def test_staged_2_of_4(base, place):
    run(EXAMPLES / "staged-2of4.yaml", [
        f"model={base}", "output_dir=out", "dataset=chats.jsonl", "splits=train", "num_calibration_samples=8",
        "max_seq_length=32",
    ])  # fmt: skip
    weights = {n: t for n, t in tensors(place / "out").items() if n.endswith("weight_packed")}
    assert len(weights) == 14 and list(recipe_of(place / "out")) == ["sparsity_stage", "quantization_stage"]
    assert all(row["mask"] == "2:4" for row in json.loads(Path("out/report.json").read_text())["layers"])


def test_staged_with_training(base, place):
    small = [f"model={base}", "output_dir=out", "dataset=chats.jsonl", "splits=train", "num_calibration_samples=8",
             "max_seq_length=32", "training.max_steps=2", "training.learning_rate=0.01"]  # fmt: skip
    run(EXAMPLES / "staged-training.yaml", small)
    assert list(recipe_of(place / "out")) == ["sparsity_stage", "finetuning_stage", "quantization_stage"]
    before, after = (tensors(place / f"out/{s}_stage") for s in ("sparsity", "finetuning"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(before[name], after[name]) and torch.equal(before[name] == 0, after[name] == 0)
    said = "\n".join(fault(EXAMPLES / "staged-training.yaml", *small, "training.learning_rte=1", "output_dir=two"))
    assert "--set training.learning_rte: " in said and "learning_rate" in said
    said = "\n".join(fault(EXAMPLES / "staged-2of4.yaml", *small))
    assert "--set training: the recipe has no training stage" in said or "training: the recipe has no" in said


# the same as by hand


def test_pairs_are_the_texts_that_they_should_be(base, place):
    text = 'model = "{}"\noutput_dir = "{}"\nrecipe = {{GPTQModifier = {{scheme = "W4A16", group_size = 16, '
    text += 'ignore = ["lm_head"]}}}}\nseparator_token = " w1 "\nmax_seq_length = 12\n[dataset_spec]\n'
    text += 'data_files = "pairs*.jsonl"\nshuffle = false\ntake = 10\n'
    Path("a.toml").write_text(text.format(base, "a"))
    run("a.toml")
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()][:10]
    oneshot(
        base, [f"{r['source']} w1 {r['target']}</s>" for r in rows],
        {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}},
        output_dir="b", concatenate_data=False, shuffle_calibration_samples=False, max_seq_length=12,
    )  # fmt: skip
    assert_same_tensors(tensors(Path("a")), tensors(Path("b")))
    # the same command again has nothing to do; killed before its end, it goes on
    before = (place / "a/report.json").stat().st_mtime_ns
    run("a.toml", resume=False)
    assert (place / "a/report.json").stat().st_mtime_ns == before


def test_a_failed_run_is_tried_again_with_the_same_command(base, place, monkeypatch):
    from bitpress import output

    config = {"model": str(base), "output_dir": "out", "scheme": "W4A16", "group_size": 16, "max_seq_length": 32,
              "dataset": "chats.jsonl"}  # fmt: skip
    Path("run.json").write_text(json.dumps(config, indent="\t"))
    real, calls = output.write_shard, []

    def fails(file, found):
        calls.append(file)
        if len(calls) == 2:
            raise OSError("no space left on device")
        real(file, found)

    monkeypatch.setattr(output, "write_shard", fails)
    with pytest.raises(OSError, match="no space"):
        run("run.json")
    run("run.json")
    assert len(calls) == 4 and (place / "out/config.json").is_file()  # the first block's shard was kept


WIZARD = """
spec_class = "training_wizard.recipes.quantize_llm.LLMQuantizationSpec"

output_dir = "out"
scheme = "W4A16"
num_calibration_samples = 4
batch_size = 1

[wizard_module]
spec_class = "training_wizard.specs.modules.causal_seq2seq.CausalSeq2SeqModule"
eval_sample_size = 0
separator_token = "<sep>"

[wizard_module.generation_args]
max_new_tokens = 256
do_sample = false
stop_strings = "\\n\\n"

[wizard_module.transformer_spec]
pretrained_name = "Qwen/Qwen2.5-0.5B-Instruct"
from_pretrained_kwargs = {torch_dtype = "bf16", attn_implementation = "sdpa"}

[wizard_module.transformer_spec.tokenizer_init_kwargs]
padding_side = "left"

[wizard_module.transformer_spec.tokenizer_call_kwargs]
max_length = 10
truncation = true

[dataset_spec]
spec_class = "training_wizard.specs.dataset.SimpleDataSourceSpec"
data_files = "pairs.jsonl"
"""


@pytest.mark.parametrize("key", ["recipe_class", "spec_class"])
def test_a_training_wizards_configuration(key, base, place):
    Path("config.toml").write_text(WIZARD.replace("spec_class", key, 1))
    run("config.toml", [f"wizard_module.transformer_spec.pretrained_name={base}", "group_size=16"])
    (stage,) = recipe_of(place / "out").values()
    smooth, quantize = stage["default_modifiers"].items()
    assert smooth == ("SmoothQuantModifier", {"smoothing_strength": 0.8, "required": False})
    assert quantize[1] == {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}
    report = json.loads(Path("out/report.json").read_text())
    assert report["data"]["sequences"] == 4 and report["data"]["max_length"] == 10
    assert json.loads(Path("out/generation_config.json").read_text())["stop_strings"] == "\n\n"


def test_its_instruction_module(base, place):
    config = yaml.safe_load("""
    recipe_class: training_wizard.recipes.quantize_llm.LLMQuantizationSpec
    output_dir: out
    scheme: W8A8
    wizard_module:
      spec_class: training_wizard.specs.modules.instruction_tune.InstructionTuningModule
      transformer_spec: {pretrained_name: X, tokenizer_call_kwargs: {max_length: 32, truncation: true}}
    dataset_spec:
      spec_class: training_wizard.specs.dataset.MultiDataSourceSpec
      parents:
        - spec_class: training_wizard.specs.dataset.TemplateInstructDatasourceSpec
          messages_template: [{role: user, content: "{source}"}, {role: assistant, content: "{target}"}]
          parent:
            spec_class: training_wizard.specs.dataset.SimpleDataSourceSpec
            data_files: pairs.jsonl
            preprocessing: {take: 5}
        - {data_files: chats.jsonl, take: 3}
    """)
    config["wizard_module"]["transformer_spec"]["pretrained_name"] = str(base)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    run("config.yaml")
    report = json.loads(Path("out/report.json").read_text())
    assert report["data"]["sequences"] == 8
    first = load(Path("config.yaml")).arguments["dataset"][0]
    assert first["messages"][1]["role"] == "assistant" and first["messages"][0]["content"].startswith("w0 w1")


# sources of the user's

MODULE = """
class Source:
    def __init__(self, path, parent=None, repeat=1):
        self.path, self.repeat, self.parent = path, repeat, parent

    @property
    def dataset(self):
        rows = [{"text": line} for line in open(self.path)] * self.repeat
        return rows + [dict(text=r["source"]) for r in (self.parent.dataset if self.parent else [])]


def rows(count: int):
    yield from ({"input_ids": list(range(3, 35))} for _ in range(count))


def broken():
    raise ValueError("the database is away")
"""


def test_a_source_of_the_users(base, place):
    (place / "mine").mkdir()
    (place / "mine/sources.py").write_text(MODULE)
    Path("lines.txt").write_text("\n".join(" ".join(WORDS[i : i + 9]) for i in range(9)))
    head = {"model": str(base), "output_dir": "out", "scheme": "W4A16", "group_size": 16, "max_seq_length": 32}
    spec = {"spec_class": "mine.sources.Source", "path": "lines.txt", "repeat": 2,
            "parent": {"spec_class": "SimpleDataSourceSpec", "data_files": "pairs.jsonl", "take": 4}}  # fmt: skip
    Path("run.json").write_text(json.dumps({**head, "dataset_spec": spec}))
    run("run.json")
    assert json.loads(Path("out/report.json").read_text())["data"]["sequences"] == 22
    run("run.json", ["output_dir=two", 'dataset_spec={spec_class="mine.sources.rows", count=6}'])
    assert json.loads(Path("two/report.json").read_text())["data"]["sequences"] == 6

    def said(spec):
        Path("bad.json").write_text(json.dumps({**head, "dataset_spec": spec}, indent=1))
        return " | ".join(fault("bad.json"))

    assert "line 9: dataset_spec.cuont: unknown key. Did you mean 'count'?" in said(
        {"spec_class": "mine.sources.rows", "cuont": 3}
    )
    assert "dataset_spec.count: missing" in said({"spec_class": "mine.sources.rows"})
    assert "the database is away" in said({"spec_class": "mine.sources.broken"})
    assert "mine.sources has no 'Sourse'. Did you mean 'Source'?" in said({"spec_class": "mine.sources.Sourse"})
    assert "yours cannot be imported" in said({"spec_class": "yours.Source"})


# bad ones


def test_all_faults_at_once_with_line_and_key(base, place):
    Path("bad.toml").write_text(
        f"""model = "{base}"
output_dir = "out"
sheme = "W4A16"
scheme = "W4A17"
num_calibration_samples = "many"
batch_size = 0

[tokenizer]
max_length = 16
truncation = false
padding_side = "middle"

[generation]
max_new_tokns = 3

[dataset_spec]
data_files = "no-such.jsonl"
loader = "jsonl"
take = 0
"""
    )
    found = fault("bad.toml")
    for part in (
        "bad.toml, line 3: sheme: unknown key. Did you mean 'scheme'?",
        "bad.toml, line 4: scheme: 'W4A17' is unknown. Did you mean 'W4A16'?",
        "bad.toml, line 5: num_calibration_samples: expected a whole number, got 'many'",
        "bad.toml, line 6: batch_size: must be at least 1, got 0",
        "bad.toml, line 10: tokenizer.truncation: cannot be false",
        "bad.toml, line 11: tokenizer.padding_side: expected 'left' or 'right', got 'middle'",
        "bad.toml, line 14: generation.max_new_tokns: unknown key. Did you mean 'max_new_tokens'?",
        "bad.toml, line 17: dataset_spec.data_files: no-such.jsonl: no such file",
        "bad.toml, line 18: dataset_spec.loader: expected 'json' or 'csv'",
    ):
        assert sum(p.startswith(part) for p in found) == 1, (part, found)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("scheme = ", r"bad.toml, line 3, column 10: not valid TOML"),
        ('scheme = "W4A16"\nscheme = "W8A8"', "line 4, column 16: not valid TOML: Cannot overwrite"),
        ('scheme = "W4A16"\ngroup_size = 100', r"bad.toml, line 4: group_size|input columns"),
        ('recipe = {GPTQModifier = {scheme = "W4A16", group_sise = 16}}', "line 3: recipe.GPTQModifier.group_sise"),
        ('scheme = "W4A16"\nbits = 4.0', "line 3: scheme: cannot go with bits"),
        ('scheme = "W4A16"\nsmoothing_strength = 2', "line 4: smoothing_strength: must be from 0 to 1, got 2"),
        ('effort = "best"\nscheme = "W4A16"\nsmoothing_strength = 0.5', "line 5: smoothing_strength: cannot go"),
        ('scheme = "W4A16"\ndtype = "bfloat17"', "line 4: dtype: 'bfloat17' is unknown. Did you mean 'bfloat16'?"),
        ('scheme = "W4A16"\nattn_implementation = "flash"', "line 4: attn_implementation: 'flash' cannot be had"),
        ('scheme = "W4A16"\ndataset = "no-such.jsonl"', "line 4: dataset: no-such.jsonl: no such file or folder"),
        ('scheme = "W4A16"\npreprocessing_func = "os.pathh"', "line 4: preprocessing_func: 'os.pathh': os has no"),
        ('scheme = "W4A16"\nstage = "two"', "line 4: stage: 'two' is not in the recipe"),
        ('scheme = "W4A16"\ntokenizer.max_length = 0', "line 4: tokenizer.max_length: must be at least 1, got 0"),
        ('scheme = "W4A16"\n[generation]\ntop_k = 3\ntemperature = 0.5', "line 6: generation.temperature: .*do_sample"),
        ('recipe_class = "a.b.Prune"\nscheme = "W4A16"', "line 3: recipe_class: 'a.b.Prune' is no recipe"),
        ('recipe_class = "training_wizard.recipes.modular.ModularTrainingSpec"', "line 3: recipe_class: .* trains"),
        ('scheme = "W4A16"\n[wizard_module.transformer_spec]\npretrained_name = "x"', "line 5: .* given twice"),
        ('scheme = "W4A16"\n[wizard_module]\nspec_class = "a.Seq2SeqModule"', "line 5: .* an encoder-decoder"),
    ],
)  # fmt: skip
def test_faults(lines, said, base, place):
    Path("bad.toml").write_text(f'model = "{base}"\noutput_dir = "out"\n{lines}\n')
    found = "\n".join(fault("bad.toml"))
    assert re.search(said, found), found
    assert not Path("out").exists()


def test_overrides(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: {b: [1, {c: 2}]}\nd: x\n")
    found = read(file, ["a.b.1.c=[1, 2]", "d=W8A8", "e.f=true", "g=0.8", 'i="7"', "j=a=b"])
    assert found.data == {
        "a": {"b": [1, {"c": [1, 2]}]}, "d": "W8A8", "e": {"f": True}, "g": 0.8, "i": "7", "j": "a=b",
    }  # fmt: skip
    assert (
        found.place(("e", "f")) == "--set e.f"
        and found.place(("e",)) == "--set e"
        and found.place(("a",)).endswith("line 1: a")
    )
    for bad, said in (("a", "key=value"), ("a.b.7=1", "list of 2"), ("d.e=1", "has no keys"), ("=1", "key=value")):
        (fault,) = read(file, [bad]).faults
        assert said in fault


def test_on_the_command_line(base, place, monkeypatch, capsys):
    Path("run.toml").write_text(f'model = "{base}"\nscheme = "W4A16"\ndataset = "chats.jsonl"\nmax_seq_length = 32\n')

    def start(*words):
        monkeypatch.setattr(sys, "argv", ["bitpress", "run", "run.toml", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr()

    code, said = start("--set", "group_sizee=16")
    assert code == 1 and said.err.startswith("ConfigError: 3 problems\n") and not said.out
    assert "--set group_sizee: unknown key. Did you mean 'group_size'?" in said.err
    assert "run.toml: output_dir: missing" in said.err
    code, said = start("--set", "group_size=16", "--set", "output_dir=out")
    assert code == 0 and Path("out/config.json").is_file()
    assert "checkpoint:" in said.out and "embeddings and head" in said.err


def test_weights_are_turned_into_another_dtype(tmp_path):
    model = build("llama")
    save(model, tmp_path / "float32")
    recipe = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
    options = {"max_seq_length": 32, "num_calibration_samples": 12}
    oneshot(tmp_path / "float32", token_rows(), recipe, output_dir=tmp_path / "a", dtype="bfloat16", **options)
    save(model.to(BF16), tmp_path / "bfloat16")
    oneshot(tmp_path / "bfloat16", token_rows(), recipe, output_dir=tmp_path / "b", **options)
    assert_same_tensors(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match="the model is in memory"):
        oneshot(build("llama"), token_rows(), recipe, dtype="bfloat16", **options)
