"""Recipes that are asked for by a scheme or a size, and an effort."""

import json

import pytest
from rich.console import Console

from bitpress import ConfigError, RecipeError, oneshot, options
from bitpress.effort import EFFORTS, METHODS, asked_for, recipe
from bitpress.recipe import Recipe
from bitpress.tables import report_table
from conftest import build, save, token_rows

KEYS = {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}


def names(effort, keys=KEYS):
    return [type(m).__name__ for m in Recipe.load(recipe(effort, keys)).stages[0].modifiers]


def test_each_effort_adds_to_the_one_before():
    assert names("fast") == ["GPTQModifier"]
    assert names("balanced") == ["AWQModifier", "GPTQModifier"]
    assert names("best") == ["AWQModifier", "GPTQModifier", "TuneModifier"]
    assert Recipe.load(recipe("fast", KEYS)).stages[0].modifiers[0].refine == 0


def test_pruning_goes_before_the_quantizer_and_nothing_is_scaled():
    pruning = {"SparseGPTModifier": {"mask_structure": "2:4"}}
    made = Recipe.load(recipe("best", KEYS, pruning)).stages[0].modifiers
    assert [type(m).__name__ for m in made] == ["SparseGPTModifier", "GPTQModifier", "TuneModifier"]
    assert recipe("fast", None, pruning) == pruning
    for effort in ("balanced", "best"):  # the last one undoes
        assert recipe(effort, None, pruning)["SparseGPTModifier"] == {"correct": 0.4, "mask_structure": "2:4"}
        assert recipe(effort, KEYS, pruning)["SparseGPTModifier"] == {"mask_structure": "2:4"}
        assert recipe(effort, KEYS, pruning)["GPTQModifier"]["correct"] == 0.4


def test_a_sparsity_prunes_first():
    assert asked_for(sparsity="2:4") == {"SparseGPTModifier": {"mask_structure": "2:4", "ignore": ["lm_head"]}}
    assert asked_for(sparsity=124) == {"SparseGPTModifier": {"mask_structure": 124, "ignore": ["lm_head"]}}  # of YAML
    made = asked_for(sparsity="0.5", scheme="W4A16", group_size=16, effort="best", ignore=["a"])
    assert list(made) == ["SparseGPTModifier", "GPTQModifier", "TuneModifier"]
    assert made["SparseGPTModifier"] == {"sparsity": "0.5", "ignore": ["a"]}
    assert made["TuneModifier"] == {"batch_size": 8}
    rounded = asked_for(sparsity="2:4", scheme="W4A16", method="rtn")
    assert list(rounded) == ["SparseGPTModifier", "QuantizationModifier"]
    assert list(asked_for(sparsity="2:4", effort="best")) == ["SparseGPTModifier", "TuneModifier"]
    assert list(asked_for(sparsity="2:4", bits=4.5, effort="balanced")) == ["SparseGPTModifier", "GPTQModifier"]
    for sparsity, key in (
        ("2-4", "sparsity"),
        ("4:2", "mask_structure"),
        (1.5, "sparsity"),
        (75, "sparsity"),
        ("half", "sparsity"),
    ):
        with pytest.raises(RecipeError, match=f"^SparseGPTModifier.{key}: "):
            Recipe.load(asked_for(sparsity=sparsity))


def test_eight_bits_are_not_tuned():
    assert names("best", {"scheme": "W8A8"}) == ["SmoothQuantModifier", "GPTQModifier"]
    assert names("best", {"scheme": "FP8_DYNAMIC"}) == ["AWQModifier", "GPTQModifier"]
    assert names("best", {"scheme": "W4A8"})[-1] == "TuneModifier"
    groups = {n: {"weights": {"num_bits": bits}, "targets": ["Linear"]} for n, bits in (("a", 8), ("b", 4))}
    assert "TuneModifier" in recipe("best", {"config_groups": groups})
    assert "TuneModifier" not in recipe("best", {"config_groups": {"a": groups["a"]}})
    assert "TuneModifier" in recipe("best", {})  # of a size target
    assert "TuneModifier" in recipe("best", {"scheme": "W8A8"}, {"SparseGPTModifier": {"mask_structure": "2:4"}})


def test_integer_activations_are_smoothed():
    assert names("balanced", {"scheme": "W8A8"})[0] == "SmoothQuantModifier"
    assert names("balanced", {"scheme": "FP8_DYNAMIC"})[0] == "AWQModifier"


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_unknown_scheme_is_told_by_the_recipe(effort):
    with pytest.raises(RecipeError, match=r"^GPTQModifier\.scheme: 'W4A61' is unknown"):
        Recipe.load(recipe(effort, {"scheme": "W4A61"}))


def test_a_scheme_is_a_recipe():
    plain = {"GPTQModifier": {"ignore": ["lm_head"], "scheme": "W4A16", "group_size": 16}}
    assert asked_for(scheme="W4A16", group_size=16) == plain
    assert asked_for(scheme="W4A16", effort="best", group_size=16) == recipe("best", plain["GPTQModifier"])
    assert asked_for(bits=4.25) == {"GPTQModifier": {"ignore": ["lm_head"]}}
    assert asked_for(scheme="FP8_DYNAMIC", method="rtn", ignore="q_proj") == {
        "QuantizationModifier": {"ignore": "q_proj", "scheme": "FP8_DYNAMIC"}
    }
    assert asked_for(written="recipe.yaml") == "recipe.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"effort": "best", "written": "W"}, r"effort: cannot go with recipe; write it into the recipe"),
        ({"scheme": "W4A16", "ignore": ["a"], "written": "W"}, "scheme, ignore: cannot go with recipe"),
        ({"effort": "fast"}, r"effort: nothing says .* give scheme \(such as W4A16\), bits"),
        ({}, r"recipe: missing; give scheme \(such as W4A16\), bits"),
        ({"scheme": "W4A16", "effort": "balancd"}, "effort: 'balancd' is unknown. Did you mean 'balanced'?"),
        ({"scheme": "W4A16", "effort": 3}, "effort: 3 is unknown. Known: balanced, best, fast"),
        ({"scheme": "W4A16", "effort": "fast", "method": "rtn"}, "effort: goes with method gptq"),
        ({"scheme": "W4A16", "bits": 4.5, "effort": "fast"}, "scheme: cannot go with bits"),
        ({"sparsity": "2:4", "method": "rtn", "group_size": 64}, "group_size: goes with scheme or bits"),
        ({"sparsity": "0", "scheme": "W4A16"}, "sparsity: 0 prunes nothing; leave it out"),
        ({"sparsity": "0.00"}, "sparsity: 0.00 prunes nothing"),
        ({"scheme": "W4A61", "effort": "bst"}, "GPTQModifier.scheme: 'W4A61' is unknown. Did you mean 'W4A16'?"),
        ({"sparsity": "5:4", "effort": "bst"}, "SparseGPTModifier.mask_structure: 5:4 prunes 5 of 4"),
        ({"sparsity": 0.0}, "sparsity: 0.0 prunes nothing; leave it out"),
        ({"sparsity": "2:4", "scheme": "NF4"}, "sparsity: NF4 is rounded to nearest by bitsandbytes; drop it"),
        ({"sparsity": "2:4", "written": "W"}, "sparsity: cannot go with recipe"),
    ],
)
def test_what_does_not_go_together(arguments, message):
    with pytest.raises(ConfigError, match=message):
        asked_for(**arguments)


def test_oneshot_takes_a_sparsity(tmp_path):
    base, out = save(build("llama"), tmp_path / "base"), tmp_path / "out"
    options = {"max_seq_length": 32, "num_calibration_samples": 4, "output_dir": out}
    oneshot(base, token_rows(4), sparsity="2:4", scheme="W4A16", group_size=16, effort="balanced", **options)
    report = json.loads((out / "report.json").read_text())
    rows = report["layers"]
    with (console := Console(width=120)).capture() as printed:
        console.print(report_table(report, None))
    assert "14 linears, 5" in printed.get() and "% zeros on average, 2:4" in printed.get()
    assert {row["mask"] for row in rows} == {"2:4"} and {row["scheme"] for row in rows} == {"W4A16 g16"}


def test_oneshot_takes_an_effort(tmp_path):
    base, out = save(build("llama"), tmp_path / "base"), tmp_path / "out"
    options = {"max_seq_length": 32, "num_calibration_samples": 4}
    oneshot(base, token_rows(4), scheme="W4A16", group_size=16, effort="balanced", output_dir=out, **options)
    written = Recipe.load(out / "recipe.yaml")
    assert written.to_dict() == Recipe.load(recipe("balanced", KEYS)).to_dict()
    with pytest.raises(ConfigError) as caught:
        oneshot(base, recipe=recipe("best", KEYS), effort="best", output_dir=out, batch_size=0)
    assert "effort: cannot go with recipe" in str(caught.value) and "batch_size" in str(caught.value)


def test_the_shell_completes_what_there_is():
    assert options.EFFORTS == EFFORTS and tuple(METHODS) == options.METHODS
