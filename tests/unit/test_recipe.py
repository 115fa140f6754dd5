"""Every form of a recipe, the round trip, and every message."""

import json

import pytest

from bitpress.errors import RecipeError
from bitpress.modifiers.quantization import GPTQModifier, QuantizationModifier
from bitpress.recipe import Recipe, Stage

W4A16 = {"scheme": "W4A16", "ignore": ["lm_head"]}
GPTQ = GPTQModifier(**W4A16)
RTN = QuantizationModifier(scheme="W8A8")

CHANNEL_STAGE = """
quantization_stage:
  run_type: oneshot
  quantization_modifiers:
    GPTQModifier:
      ignore: ["lm_head"]
      sequential_update: false
      config_groups:
        group_0:
          weights:
            num_bits: 4
            type: "int"
            symmetric: true
            strategy: "channel"
          targets: ["Linear"]
"""

STAGED = """
sparsity_stage:
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4"}
finetuning_stage:
  finetuning_modifiers:
    ConstantPruningModifier: {targets: ["re:.*q_proj.weight"], start: 0}
"""


def problems(source):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(source)
    return list(caught.value.problems)


def problem(source):
    (only,) = problems(source)
    return only


def default(*modifiers):
    return Recipe((Stage("default", "oneshot", modifiers),))


@pytest.mark.parametrize(
    "source",
    [
        GPTQ,
        [GPTQ],
        (GPTQ,),
        [{"GPTQModifier": W4A16}],
        {"GPTQModifier": W4A16},
        {"quantization_modifiers": {"GPTQModifier": W4A16}},
        {"quantization_modifiers": [{"GPTQModifier": W4A16}]},
        {"modifiers": [{"GPTQModifier": W4A16}]},
        {"modifiers": {"GPTQModifier": W4A16}},
        {"modifiers": [GPTQ]},
        {"default_stage": {"default_modifiers": {"GPTQModifier": W4A16}}},
        {"stages": {"default": {"modifiers": [{"GPTQModifier": W4A16}]}}},
        {"stages": {"default_stage": {"GPTQModifier": W4A16}}},
        {"version": 1, "args": {}, "metadata": None, "run_type": "oneshot", "GPTQModifier": W4A16},
        "GPTQModifier: {scheme: W4A16, ignore: [lm_head]}",
        "GPTQModifier:\n  scheme: W4A16\n  ignore: [lm_head]\n",
        "- GPTQModifier: {scheme: W4A16, ignore: [lm_head]}",
        "{GPTQModifier: {scheme: W4A16, ignore: [lm_head]}}",
        json.dumps({"GPTQModifier": W4A16}),
        json.dumps({"GPTQModifier": W4A16}, indent="\t"),
    ],
)
def test_forms_of_one_modifier(source):
    assert Recipe.load(source) == default(GPTQ)


def test_a_recipe_is_its_own_form():
    recipe = default(GPTQ)
    assert Recipe.load(recipe) is recipe


def test_a_staged_recipe():
    recipe = Recipe.load(CHANNEL_STAGE)
    (stage,) = recipe.stages
    assert (stage.name, stage.run_type) == ("quantization_stage", "oneshot")
    (modifier,) = stage.modifiers
    assert modifier.groups()[0].scheme.weights.strategy == "channel"
    assert modifier.sequential_update is False


def test_files(tmp_path):
    for name, text in {
        "2:4_w4a16_recipe.yaml": CHANNEL_STAGE,
        "r.yml": CHANNEL_STAGE,
        "r.json": json.dumps(Recipe.load(CHANNEL_STAGE).to_dict()),
    }.items():
        path = tmp_path / name
        path.write_text(text)
        assert Recipe.load(path) == Recipe.load(str(path)) == Recipe.load(CHANNEL_STAGE)


def test_order_of_stages_and_modifiers():
    recipe = Recipe.load(
        {
            "b_stage": {"b_modifiers": {"QuantizationModifier": {"scheme": "W8A8"}, "GPTQModifier": W4A16}},
            "GPTQModifier": W4A16,
            "stages": {"free name": {"modifiers": [RTN]}},
            "a_stage": {"one_modifiers": [RTN], "GPTQModifier": W4A16, "two_modifiers": [RTN, GPTQ]},
        }
    )
    assert [stage.name for stage in recipe.stages] == ["b_stage", "default", "free name", "a_stage"]
    assert recipe.stages[0].modifiers == (RTN, GPTQ)
    assert recipe.stages[3].modifiers == (RTN, GPTQ, RTN, GPTQ)


@pytest.mark.parametrize(
    "recipe",
    [
        default(GPTQ),
        default(RTN, GPTQ, RTN),
        Recipe.load(CHANNEL_STAGE),
        default(GPTQModifier(scheme="W3A16_ASYM", dampening_frac=1e-5, actorder=None, targets=["re:.*'\"é"])),
        Recipe((Stage("a_stage", "oneshot", (GPTQ,)), Stage("b_stage", "train", (RTN,)))),
        Recipe((Stage("default", "oneshot", (GPTQ,)), Stage("second", "train", (RTN, RTN)))),
    ],
)
def test_round_trip(recipe):
    text = recipe.to_yaml()
    assert Recipe.load(text) == recipe
    assert Recipe.load(recipe.to_dict()) == recipe
    assert Recipe.load(json.dumps(recipe.to_dict())) == recipe
    assert Recipe.load(text).to_yaml() == text


def test_written_form():
    assert default(GPTQ).to_dict() == {
        "default_stage": {"run_type": "oneshot", "default_modifiers": {"GPTQModifier": W4A16}}
    }


def test_run_type():
    body = {"quantization_modifiers": {"GPTQModifier": W4A16}}
    assert Recipe.load({"a_stage": {**body, "run_type": "train"}}).stages[0].run_type == "train"
    assert Recipe.load({"a_stage": body}).stages[0].run_type == "oneshot"
    fault = problem({"a_stage": {**body, "run_type": "one_shot"}})
    assert fault == "a_stage.run_type: 'one_shot' is unknown. Did you mean 'oneshot'?"


def test_choosing_a_stage():
    recipe = Recipe((Stage("sparsity_stage", "oneshot", (RTN,)), Stage("quant", "oneshot", (GPTQ,))))
    assert recipe.stage("sparsity_stage").name == "sparsity_stage"
    assert recipe.stage("sparsity").name == "sparsity_stage"
    assert recipe.stage("quant_stage").name == "quant"
    assert default(GPTQ).stage(None).name == "default"
    with pytest.raises(RecipeError, match=r"has 2 stages, choose one: sparsity_stage, quant$"):
        recipe.stage(None)
    with pytest.raises(RecipeError) as caught:
        recipe.stage("sparcity_stage")
    assert str(caught.value) == (
        "stage: 'sparcity_stage' is not in the recipe. Its stages: sparsity_stage, quant. "
        "Did you mean 'sparsity_stage'?"
    )
    with pytest.raises(RecipeError, match=r"Its stages: sparsity_stage, quant\.$"):
        recipe.stage("xyz")


@pytest.mark.parametrize(
    ("key", "body", "fault"),
    [
        (
            "quantization_modifier",
            {"GPTQModifier": W4A16},
            "groups of modifiers must end in '_modifiers'. Did you mean 'quantization_modifiers'?",
        ),
        (
            "quantization",
            {"GPTQModifier": W4A16},
            "groups of modifiers must end in '_modifiers'. Did you mean 'quantization_modifiers'?",
        ),
        (
            "quantizaton_stages",
            {"quantization_modifiers": {"GPTQModifier": W4A16}},
            "stages must end in '_stage'. Did you mean 'quantizaton_stage'?",
        ),
        (
            "quantization",
            {"quantization_modifiers": {"GPTQModifier": W4A16}},
            "stages must end in '_stage'. Did you mean 'quantization_stage'?",
        ),
        ("modifier", [], "unknown key. Did you mean 'modifiers'?"),
        ("stage", {}, "unknown key. Did you mean 'stages'?"),
        ("gptqmodifier", W4A16, "unknown key. Did you mean 'GPTQModifier'?"),
        ("GPTQModifer", W4A16, "unknown key. Did you mean 'GPTQModifier'?"),
        ("GPTTModifier", W4A16, "unknown modifier. Did you mean 'GPTQModifier'?"),
        ("runtype", "oneshot", "unknown key. Did you mean 'run_type'?"),
        ("zzz", 1, "unknown key. Known: AWQModifier,"),
        (7, 1, "unknown key. Known: AWQModifier,"),
    ],
)
def test_unknown_keys(key, body, fault):
    assert problem({key: body}).startswith(f"{key}: {fault}")


def test_unknown_keys_in_a_stage():
    stage = {"quantization_modifier": {"GPTQModifier": W4A16}}
    assert problem({"a_stage": stage}).startswith(
        "a_stage.quantization_modifier: groups of modifiers must end in '_modifiers'."
    )
    assert problem({"a_stage": {"runtype": "oneshot"}}).startswith("a_stage.runtype: unknown key. Did you mean")
    fault = problem({"a_stage": {"b_modifiers": {"GPTQ": W4A16}}})
    assert fault == "a_stage.b_modifiers.GPTQ: unknown modifier. Did you mean 'GPTQModifier'?"
    fault = problem([{"a_stage": {"b_modifiers": {"GPTQModifier": W4A16}}}])
    assert fault == "[0].a_stage: expected a modifier here, not a stage or a group of modifiers"


def test_all_faults_come_together_with_their_places():
    text = STAGED.replace("start: 0", "start: 2") + CHANNEL_STAGE.replace("num_bits: 4", "num_bits: 11").replace(
        "sequential", "sequental"
    )
    text += "\nother_stage:\n  x_modifiers: [{GPTQModifier: {scheme: W4A16, block_size: abc}}]\nzzz: 1\n"
    assert [fault.partition(": ")[0] for fault in problems(text)] == [
        "finetuning_stage.finetuning_modifiers.ConstantPruningModifier.start",
        "quantization_stage.quantization_modifiers.GPTQModifier.sequental_update",
        "quantization_stage.quantization_modifiers.GPTQModifier.config_groups.group_0.weights.num_bits",
        "other_stage.x_modifiers[0].GPTQModifier.block_size",
        "zzz",
    ]


def test_a_modifier_without_keys_has_its_defaults():
    fault = "missing; give a preset such as 'W4A16', or config_groups"
    assert problem("GPTQModifier:") == f"GPTQModifier.scheme: {fault}"
    assert problem({"modifiers": ["GPTQModifier"]}) == f"modifiers[0].GPTQModifier.scheme: {fault}"
    assert problem("GPTQModifier: W4A16") == "GPTQModifier: expected the modifier's keys, got 'W4A16'"


@pytest.mark.parametrize("source", ["", "# nothing\n", {}, [], (), None, "{}", {"version": 1}, {"modifiers": []}])
def test_empty_recipes(source):
    assert problem(source).startswith("the recipe is empty; a recipe is a mapping of stages or modifiers")


@pytest.mark.parametrize("body", [None, {}, {"run_type": "oneshot"}, {"a_modifiers": None}])
def test_empty_stages(body):
    assert problem({"a_stage": body}) == "a_stage: has no modifiers"


def test_a_training_stage_needs_none():
    plain = Recipe.load({"a_stage": {"run_type": "train"}})
    assert plain.stages[0].run_type == "train" and not plain.stages[0].modifiers
    assert Recipe.load(plain.to_yaml()) == plain


@pytest.mark.parametrize("source", ["W4A16", 3, GPTQModifier])
def test_what_is_no_recipe(source):
    assert problem(source).startswith("expected a recipe, got ")


def test_values_of_the_wrong_kind():
    assert problems({"a_stage": 3}) == ["a_stage: expected modifiers by name, got 3"]
    assert problems({"a_modifiers": 3}) == ["a_modifiers: expected modifiers by name, got 3"]
    assert problems({"stages": [3]}) == ["stages: expected modifiers by name, got [3]"]
    assert problems([3]) == ["[0]: expected modifiers by name, got 3"]


def test_two_stages_of_one_name():
    body = {"modifiers": [GPTQ]}
    fault = "a_stage: the recipe has two stages of this name"
    assert problem({"a_stage": body, "stages": {"a_stage": body}}) == fault
    assert problem({"default_stage": body, **body}) == fault.replace("a_stage", "default")


def test_missing_and_odd_files(tmp_path):
    assert problem("no/such.yaml") == "no/such.yaml: there is no such recipe file"
    assert problem(tmp_path / "r.toml").endswith("a recipe file ends in .yaml, .yml, .json")
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    assert "cannot be read: " in problem(folder)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    assert "cannot be read: " in problem(tmp_path / "latin.yaml")


def test_syntax_errors_say_where(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("GPTQModifier:\n  scheme: [W4A16\n")
    assert problem(path).startswith(f"{path}, line 3, column 1: not valid YAML: ")
    assert problem("a: 1\n b: 2\n").startswith("recipe, line 2, column 3: not valid YAML: ")
    assert "not valid YAML" in problem("a: !!python/object:os.system {}\n")
    assert "not valid YAML" in problem("a: \x01\n")
    path = tmp_path / "r.json"
    path.write_text('{"GPTQModifier": {"scheme": }}')
    assert problem(path).startswith(f"{path}, line 1, column 29: not valid JSON: ")


def test_repeated_keys_are_faults():
    yaml = "GPTQModifier:\n  scheme: W4A16\n  block_size: 0\n  scheme: W8A16\n"
    assert problems(yaml) == [
        "recipe, line 4: the key 'scheme' is there twice",
        "GPTQModifier.block_size: must be at least 1 column, got 0",
    ]
    assert problem('{"GPTQModifier": {"scheme": "W4A16", "scheme": "W8A16"}}') == (
        "recipe: the key 'scheme' is there twice"
    )
    merged = "GPTQModifier:\n  <<: {scheme: W8A16, block_size: 64}\n  scheme: W4A16\n"
    assert Recipe.load(merged) == default(GPTQModifier(scheme="W4A16", block_size=64))


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("dampening_frac: 1e-2", "dampening_frac", 0.01),
        ("dampening_frac: 1.0e-2", "dampening_frac", 0.01),
        ("actorder: none", "actorder", None),
        ("actorder: null", "actorder", None),
        ("actorder: ~", "actorder", None),
        ("actorder: off", "actorder", None),
        ("actorder: weight", "actorder", "weight"),
        ("group_size: -1", "group_size", -1),
    ],
)
def test_yaml_quirks(line, key, value):
    (stage,) = Recipe.load(f"GPTQModifier:\n  scheme: W4A16\n  {line}\n").stages
    assert getattr(stage.modifiers[0], key) == value
