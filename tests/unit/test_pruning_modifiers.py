"""The keys of the pruning modifiers: what they accept, what they refuse, what they mean."""

import math

import pytest
import torch

from bitpress.errors import PlanError, RecipeError
from bitpress.math.masks import Structure, find_structure
from bitpress.math.stats import InputStats
from bitpress.modifiers import MagnitudePruningModifier, SparseGPTModifier, WandaPruningModifier
from bitpress.modifiers.pruning import SparsityClaim
from bitpress.recipe import Recipe

ALL = [SparseGPTModifier, WandaPruningModifier, MagnitudePruningModifier]


def problems(cls, **keys):
    with pytest.raises(RecipeError) as error:
        cls(**keys)
    return list(error.value.problems)


def claims(modifier):
    return [(c.targets, c.sparsity) for c in modifier.claims()]


@pytest.mark.parametrize("cls", ALL)
def test_the_usual_recipe(cls):
    modifier = cls(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])
    assert modifier.structure == Structure(2, 4) and modifier.group_columns() == 4
    assert claims(modifier) == [(("Linear",), 0.5)]
    assert modifier.notes() == []
    assert modifier.needs == (frozenset() if cls is MagnitudePruningModifier else {"gram"})
    assert claims(cls(mask_structure="2:4")) == claims(cls(sparsity=0.5)) == [(("Linear",), 0.5)]
    assert cls(sparsity=0.5).structure is None and cls(sparsity=0.5).group_columns() == 1
    again = Recipe.load(Recipe.load(modifier).to_yaml()).stages[0].modifiers[0]
    assert again == modifier


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    ("written", "meant"),
    [("2:4", "2:4"), ("'2:4'", "2:4"), ("4:8", "4:8"), ("16:32", "16:32"), ("0:0", None), ("Unstructured", None)],
)
def test_structures_as_yaml_has_them(cls, written, meant):
    text = f"{cls.__name__}: {{sparsity: 5e-1, mask_structure: {written}}}"
    (modifier,) = Recipe.load(text).stages[0].modifiers
    assert modifier.structure == (meant and Structure(*map(int, meant.split(":"))))
    assert modifier.sparsity == 0.5


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"mask_structure": "2;4"}, "mask_structure: expected 'N:M' or 'unstructured', got '2;4'. Did you mean '2:4'"),
        ({"mask_structure": "4:4"}, "mask_structure: 4:4 prunes 4 of 4; N must be between 0 and M"),
        ({"mask_structure": "block4", "sparsity": 0.5}, "mask_structure: expected 'N:M' or 'unstructured', got 'block"),
        ({"mask_structure": 3}, "mask_structure: expected 'N:M' or 'unstructured', got 3"),
        ({"mask_structure": "1:128"}, "mask_structure: 1:128 prunes 0.0078 of the weights; the least is 0.02"),
        ({"sparsity": 1.0}, "{key}: must be 0, or from 0.02 to below 1, got 1.0"),
        ({"sparsity": 0.001}, "{key}: must be 0, or from 0.02 to below 1, got 0.001"),
        ({"sparsity": -0.5}, "{key}: must be 0, or from 0.02 to below 1, got -0.5"),
        ({"sparsity": math.nan}, "{key}: must be 0, or from 0.02 to below 1, got nan"),
        ({"sparsity": "half"}, "sparsity: expected a share of zeros, a list of them, or a mapping of patterns"),
        ({"sparsity": True}, "sparsity: expected a share of zeros"),
        ({"sparsity": []}, "{key}: an empty list; give a value for each decoder block"),
        ({"sparsity": [0.5, 2]}, "{key}: must be 0, or from 0.02 to below 1, got 2"),
        ({"sparsity": {}}, "{key}: empty, so nothing would be pruned"),
        ({"sparsity": {"re:(": 0.5}}, "{key}: 're:(' is not a regular expression"),
        ({"sparsity": {"q_proj": 1}}, "{key}.q_proj: must be 0, or from 0.02 to below 1, got 1"),
        ({"sparsity": {"q_proj": "x"}}, "{key}.q_proj: expected a number, got 'x'"),
        ({"sparsity": {"q_proj": 0.5}, "targets": "k_proj"}, "targets: the patterns of {key} are the targets"),
        ({"sparsity": 0.7, "mask_structure": "2:4"}, "{key}: 2:4 prunes 0.5 of the weights, not 0.7"),
        ({"sparsity": 0.75, "mask_structure": "1:4"}, "{key}: 1:4 prunes 0.25 of the weights, not 0.75; 3:4 prunes"),
        ({}, "{key}: missing; give the share of zeros, such as 0.5"),
        ({"sparsity": 0.5, "targets": []}, "targets: empty"),
        ({"sparsity": 0.5, "ignore": ["re:*"]}, "ignore: 're:*' is not a regular expression"),
        ({"sparsity": 0.5, "spasity": 0.5}, "spasity: unknown key. Did you mean 'sparsity'"),
    ],
)
def test_faults(cls, keys, fault):
    found = problems(cls, **keys)
    assert len(found) == 1, found
    assert found[0].startswith(f"{cls.__name__}." + fault.replace("{key}", cls.claims_key)), found


def test_faults_of_single_modifiers():
    assert problems(SparseGPTModifier, sparsity=0.5, block_size=0, dampening_frac=-1.0, mask_rounds=-1, correct=2) == [
        "SparseGPTModifier.block_size: must be at least 1 column, got 0",
        "SparseGPTModifier.dampening_frac: must be 0 or a positive fraction, got -1.0",
        "SparseGPTModifier.correct: must be a share from 0 to 1, got 2.0",
        "SparseGPTModifier.mask_rounds: must be 0 or more, got -1",
    ]
    for cls in (SparseGPTModifier, WandaPruningModifier):
        (fault,) = problems(cls, sparsity=0.5, sparsity_profile="awl")
        assert "sparsity_profile: 'awl' is unknown. Did you mean 'owl'" in fault
        assert "owl_m: must be positive" in problems(cls, sparsity=0.5, owl_m=0)[0]
    (fault,) = problems(MagnitudePruningModifier, sparsity=0.5, final_sparsity=0.6)
    assert fault.endswith("sparsity: give either sparsity or final_sparsity, not both")


def test_keys_of_a_schedule_have_no_effect():
    keys = {
        "init_sparsity": 0.0, "final_sparsity": 0.5, "start": 0, "end": 1.0, "update_frequency": 0.5,
        "update_scheduler": "cubic", "scheduler_args": {}, "leave_enabled": True, "apply_globally": False,
    }  # fmt: skip
    modifier = MagnitudePruningModifier(targets="__ALL_PRUNABLE__", mask_structure="unstructured", **keys)
    assert claims(modifier) == [(("__ALL_PRUNABLE__",), 0.5)]
    told = [note.partition(":")[0] for note in modifier.notes()]
    assert told == [key for key in keys if key not in ("final_sparsity", "apply_globally")]


@pytest.mark.parametrize("cls", [SparseGPTModifier, WandaPruningModifier])
def test_keys_of_other_pipelines_have_no_effect(cls):
    modifier = cls(sparsity=0.5, sequential_update=False, sequential_targets=["LlamaDecoderLayer"], owl_m=5)
    assert [n.partition(":")[0] for n in modifier.notes()] == ["sequential_update", "sequential_targets", "owl_m"]


def test_sparsity_by_block_and_by_pattern():
    modifier = SparseGPTModifier(sparsity=[0, 0.5, "7e-1"])
    (claim,) = modifier.claims()
    assert [modifier.sparsity_at(claim, block, 3) for block in range(3)] == [0.0, 0.5, 0.7]
    with pytest.raises(PlanError, match="sparsity: a list of 3 values for 4 decoder blocks"):
        claim.at(0, 4)
    with pytest.raises(PlanError, match="add the output head to ignore"):
        claim.at(None, 3)
    modifier = WandaPruningModifier(sparsity={"re:.*mlp.*": 0.6, "Linear": [0.5, 0.4]})
    assert modifier.claims() == (
        SparsityClaim("re:.*mlp.*", ("re:.*mlp.*",), 0.6),
        SparsityClaim("Linear", ("Linear",), (0.5, 0.4)),
    )
    assert claims(SparseGPTModifier(sparsity=[0, 0.5], mask_structure="2:4")) == [(("Linear",), (0.0, 0.5))]


@pytest.mark.parametrize("cls", ALL)
def test_prune(cls):
    generator = torch.Generator().manual_seed(0)
    weights, x = [torch.randn(8, 32, generator=generator) for _ in range(2)], torch.randn(200, 32, generator=generator)
    stats = InputStats(x.T @ x, 200)
    for found in cls(mask_structure="2:4").prune(weights, stats, 0.5):
        assert find_structure(found) == Structure(2, 4) and float((found == 0).float().mean()) == 0.5
    for found in cls(sparsity=0.25).prune(weights, stats, 0.25):
        assert float((found == 0).float().mean()) == 0.25
    assert all(torch.equal(a, b) for a, b in zip(cls(sparsity=0).prune(weights, stats, 0.0), weights, strict=True))


def test_what_correction_needs():
    assert SparseGPTModifier(sparsity=0.5, correct=0.5).needs == {"gram", "drift"}


def test_settings_reach_the_solver():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 32, generator=generator), torch.randn(200, 32, generator=generator)
    x = x @ torch.randn(32, 32, generator=generator)
    stats = InputStats(x.T @ x, 200)
    weight[0, 1:4] = 0

    def found(**keys):
        return SparseGPTModifier(sparsity=0.5, mask_structure="2:4", **keys).prune([weight], stats, 0.5)[0]

    usual = found()
    for keys in ({"dampening_frac": 0.5}, {"mask_rounds": 0}, {"mask_rounds": 2}, {"preserve_sparsity_mask": True}):
        assert not torch.equal(found(**keys), usual), keys
    assert not found(preserve_sparsity_mask=True)[weight == 0].any()
    loose = SparseGPTModifier(sparsity=0.5, mask_rounds=0, block_size=4).prune([weight], stats, 0.5)[0]
    assert not torch.equal(loose, SparseGPTModifier(sparsity=0.5, mask_rounds=0).prune([weight], stats, 0.5)[0])
