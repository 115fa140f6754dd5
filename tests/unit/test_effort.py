"""The recipes behind --effort."""

import pytest

from bitpress.effort import EFFORTS, recipe
from bitpress.recipe import Recipe

KEYS = {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}


def names(effort, keys=KEYS):
    return [type(m).__name__ for m in Recipe.load(recipe(effort, keys)).stages[0].modifiers]


def test_each_effort_adds_to_the_one_before():
    assert names("fast") == ["GPTQModifier"]
    assert names("balanced") == ["AWQModifier", "GPTQModifier"]
    assert names("best") == ["AWQModifier", "GPTQModifier", "TuneModifier"]
    assert Recipe.load(recipe("fast", KEYS)).stages[0].modifiers[0].refine == 0


def test_integer_activations_are_smoothed():
    assert names("balanced", {"scheme": "W8A8"})[0] == "SmoothQuantModifier"
    assert names("balanced", {"scheme": "FP8_DYNAMIC"})[0] == "AWQModifier"


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_unknown_scheme_is_told_by_the_recipe(effort):
    with pytest.raises(Exception, match="W4A61"):
        Recipe.load(recipe(effort, {"scheme": "W4A61"}))
