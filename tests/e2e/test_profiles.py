"""Sparsity spread over the blocks by a survey: the share is kept, blocks with outliers are pruned less."""

from __future__ import annotations

import json

import pytest
import torch

from bitpress import RecipeError, journal, oneshot
from bitpress.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from bitpress.recipe import Recipe
from conftest import build, save, token_rows
from helpers import OPTIONS, PLAIN, assert_same_tensors, make_tokenizer, tensors

ROWS = token_rows()
LAYERS = 4
OWL = {"sparsity": 0.5, "sparsity_profile": "owl", "owl_lmbda": 0.1, "ignore": ["lm_head"]}


@pytest.fixture
def base(tmp_path):
    """A model whose last block has some weights far larger than the others."""
    model = build("llama", torch.bfloat16, num_hidden_layers=LAYERS)
    with torch.no_grad():
        for name, weight in model.model.layers[-1].named_parameters():
            if name.endswith("proj.weight"):
                weight[::8, ::4] *= 30
    make_tokenizer(save(model, tmp_path / "base"))
    return tmp_path / "base"


def zeros(folder):
    """Share of zeros of each block's linears, and of all."""
    found = [
        torch.cat(
            [t.flatten() for n, t in tensors(folder).items() if f"layers.{i}." in n and n.endswith("proj.weight")]
        )
        for i in range(LAYERS)
    ]
    return [float((t == 0).float().mean()) for t in found], float((torch.cat(found) == 0).float().mean())


@pytest.mark.parametrize("modifier", [SparseGPTModifier, WandaPruningModifier])
def test_a_block_with_outliers_is_pruned_less(base, tmp_path, modifier):
    out = tmp_path / "out"
    oneshot(base, ROWS, modifier(**OWL), output_dir=out, **OPTIONS)
    (section,) = json.loads((out / "report.json").read_text())["sparsity_profiles"]
    blocks, whole = zeros(out)
    assert max(section["outliers"]) == section["outliers"][-1]
    assert min(blocks) == blocks[-1] and max(blocks) - min(blocks) == pytest.approx(0.2, abs=0.03)
    assert blocks == pytest.approx(section["sparsity"], abs=0.03)
    assert whole == pytest.approx(0.5, abs=0.02)
    # what was decided is a recipe of its own, without a survey
    text = (out / "recipe.yaml").read_text()
    (written,) = Recipe.load(text).stages[0].modifiers
    assert written.sparsity == section["sparsity"] and written.sparsity_profile is None
    oneshot(base, ROWS, text, output_dir=tmp_path / "again", **OPTIONS)
    assert_same_tensors(tensors(out), tensors(tmp_path / "again"))


def test_a_share_that_could_not_be_told_from_chance(base, tmp_path):
    few = {**OWL, "sparsity": 0.03, "owl_lmbda": 0.025}
    oneshot(base, ROWS, WandaPruningModifier(**few), output_dir=tmp_path / "out", **OPTIONS)
    (section,) = json.loads((tmp_path / "out" / "report.json").read_text())["sparsity_profiles"]
    assert min(section["sparsity"]) in (0, 0.02) and all(s == 0 or s >= 0.02 for s in section["sparsity"])
    assert zeros(tmp_path / "out")[0] == pytest.approx(section["sparsity"], abs=0.02)


def test_with_a_size_target_after_it_and_broken_off(base, tmp_path, monkeypatch):
    recipe = {
        "modifiers": [{"SparseGPTModifier": OWL}, {"GPTQModifier": {"bits": 4.5, "ignore": ["lm_head"], **PLAIN}}]
    }
    oneshot(base, ROWS, recipe, output_dir=tmp_path / "straight", **OPTIONS)
    report = json.loads((tmp_path / "straight/report.json").read_text())
    assert report["totals"]["bits_per_weight"] == pytest.approx(4.5, rel=0.01)
    assert report["totals"]["sparsity"] == pytest.approx(0.5, abs=0.03)
    assert report["sparsity_profiles"][0]["sparsity"][-1] == min(report["sparsity_profiles"][0]["sparsity"])

    class BrokenOffError(Exception):
        pass

    append = journal.Journal._append
    for lines in (2, 3, 2):  # in the survey, after its decision, in the solve pass
        left = [lines]

        def until(self, entry, left=left):
            append(self, entry)
            left[0] -= 1
            if not left[0]:
                raise BrokenOffError

        monkeypatch.setattr(journal.Journal, "_append", until)
        with pytest.raises(BrokenOffError):
            oneshot(base, ROWS, recipe, output_dir=tmp_path / "out", **OPTIONS)
    monkeypatch.setattr(journal.Journal, "_append", append)
    oneshot(base, ROWS, recipe, output_dir=tmp_path / "out", **OPTIONS)
    assert_same_tensors(tensors(tmp_path / "straight"), tensors(tmp_path / "out"))
    for name in ("config.json", "recipe.yaml"):
        assert (tmp_path / "straight" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_in_the_first_of_two_stages(base, tmp_path):
    recipe = {
        "sparsity_stage": {"sparsity_modifiers": {"WandaPruningModifier": OWL}},
        "quantization_stage": {
            "quantization_modifiers": {"GPTQModifier": {"bits": 4.5, "ignore": ["lm_head"], **PLAIN}}
        },
    }
    oneshot(base, ROWS, recipe, output_dir=tmp_path / "out", **OPTIONS)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["sparsity_profiles"][0]["method"] == "wanda"
    assert report["size_target"]["bits_per_weight"] == pytest.approx(4.5, rel=0.01)
    again = Recipe.load((tmp_path / "out/recipe.yaml").read_text())
    assert [s.name for s in again.stages] == ["sparsity_stage", "quantization_stage"]
    assert again.stages[0].modifiers[0].sparsity == report["sparsity_profiles"][0]["sparsity"]
    assert "bits" not in again.stages[1].modifiers[0].to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_structure": "2:4"}, "owl varies the share, which 2:4 fixes"),
        ({"sparsity": [0.5] * LAYERS}, "give sparsity as a number"),
        ({"sparsity": {"re:.*q_proj": 0.5}}, "give sparsity as a number"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(RecipeError, match=message):
        SparseGPTModifier(**{**OWL, **changes})
