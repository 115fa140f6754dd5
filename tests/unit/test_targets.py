"""Patterns against names, and what matches nothing."""

import pytest

from bitpress.targets import LinearName, match, pattern_fault, resolve

NAME = "model.layers.0.self_attn.q_proj"


def linear(*names, class_name="Linear"):
    return LinearName(names, class_name)


MODEL = [
    linear("model.layers.0.self_attn.q_proj"),
    linear("model.layers.0.self_attn.k_proj"),
    linear("model.layers.0.mlp.gate_proj"),
    linear("model.layers.0.mlp.gate"),
    linear("lm_head", "embed_out"),
]


@pytest.mark.parametrize(
    "pattern",
    [
        "Linear",
        "Linear.weight",
        NAME,
        NAME + ".weight",
        "q_proj",
        "q_proj.weight",
        "self_attn.q_proj",
        "re:.*q_proj",
        "re:.*q_proj$",
        "re:.*q_proj.weight",
        r"re:.*q_proj\.weight$",
        "re:model",
        "re:(?!.*lm_head).*",
        "__ALL__",
        "__ALL_PRUNABLE__",
    ],
)
def test_patterns_that_match(pattern):
    assert match(NAME, "Linear", [pattern])
    assert match(NAME, "Linear", ["nothing", pattern])


@pytest.mark.parametrize(
    "pattern",
    [
        "proj",
        "_proj",
        "layers.0",
        "linear",
        "Conv1D",
        "re:q_proj",
        "re:.*q_pro$",
        "re:.*q_proj.bias",
        "re:(?!.*q_proj$).*",
        "q_proj.weight.weight",
    ],
)
def test_patterns_that_do_not_match(pattern):
    assert not match(NAME, "Linear", [pattern])
    assert not match(NAME, "Linear", [])


def test_a_dot_bounds_a_suffix():
    assert match("model.lm_head", "Linear", ["lm_head"])
    assert not match("model.my_lm_head", "Linear", ["lm_head"])


def test_resolve_keeps_the_models_order_and_takes_out_ignored():
    result = resolve(MODEL, ["Linear"], ["lm_head", "gate"], "GPTQModifier")
    assert result.linears == MODEL[:3]
    assert result.faults == []
    assert result.notes == []
    assert resolve(MODEL, ["k_proj", "q_proj"], [], "x").linears == MODEL[:2]


def test_either_name_of_a_linear_matches():
    for name in ("lm_head", "embed_out", "embed_out.weight"):
        assert resolve(MODEL, [name], [], "x").linears == [MODEL[4]]
        assert MODEL[4] not in resolve(MODEL, ["Linear"], [name], "x").linears


def test_a_target_that_matches_nothing_is_a_fault_with_the_nearest_names():
    result = resolve(MODEL, ["Linear", "q_prj", "re:.*k_prj.weight", "zzz"], [], "GPTQModifier")
    assert result.faults[0].startswith("GPTQModifier.targets: 'q_prj' matches no linear. Did you mean 'q_proj'")
    assert "'re:.*k_prj.weight' matches no linear. Did you mean 'k_proj'" in result.faults[1]
    known = "Known: 'Linear', 'q_proj', 'k_proj', 'gate_proj', 'gate', 'lm_head', 'embed_out'."
    assert result.faults[2].endswith(known)
    assert len(result.linears) == len(MODEL)


def test_a_full_name_finds_full_names():
    (fault,) = resolve(MODEL, ["model.layers.0.self_attn.q_prj"], [], "").faults
    assert fault.startswith("targets: 'model.layers.0.self_attn.q_prj' matches no linear.")
    assert "'model.layers.0.self_attn.q_proj'" in fault


def test_nearest_names_list_a_layer_once():
    layers = [linear(f"layers.{i}.mlp.experts.{e}.up_proj") for i in range(30) for e in range(30)]
    (fault,) = resolve(layers, ["layers.0.mlp.experts.0.up_prj"], [], "x").faults
    assert fault.count("experts.0.up_proj") == 1
    assert len(fault) < 200


def test_numbers_that_are_part_of_a_name_are_told_apart():
    layers = [linear(f"layers.{i}.{name}") for i in range(2) for name in ("fc1", "fc2", "gate")]
    assert resolve(layers, ["zzz"], [], "").faults == [
        "targets: 'zzz' matches no linear. Known: 'Linear', 'fc1', 'fc2', 'gate'."
    ]


def test_an_ignore_that_matches_nothing_is_a_note():
    result = resolve(MODEL, ["Linear"], ["lm_heads"], "x")
    assert result.faults == []
    assert result.notes[0].startswith("x.ignore: 'lm_heads' matches no linear. Did you mean 'lm_head'")
    assert result.linears == MODEL


def test_nothing_left_is_a_fault():
    result = resolve(MODEL, ["Linear"], ["__ALL__"], "x")
    assert result.faults == ["x.ignore: ignores all 5 linears that the targets match"]
    assert result.linears == []
    assert resolve([], ["Linear"], [], "x").faults == [
        "x.targets: 'Linear' matches no linear. The model has no linears."
    ]


def test_bad_patterns_are_faults():
    result = resolve(MODEL, ["re:(", "Linear"], ["re:*", ""], "x")
    assert len(result.faults) == 3
    assert result.faults[0].startswith("x.targets: 're:(' is not a regular expression: missing )")
    assert result.faults[1].startswith("x.ignore: 're:*' is not a regular expression")
    assert result.faults[2] == "x.ignore: '' is an empty pattern"
    assert len(result.linears) == len(MODEL)
    assert pattern_fault("re:") == "'re:' is an empty pattern"
    assert pattern_fault("re:.*") is None


def test_modules_around_linears():
    """As older recipes name decoder blocks; only where no linear matches, so that what excludes some still does."""
    found = resolve(MODEL, [r"re:model.layers.\d*$"], ["re:.*gate$"], "Pruner")
    assert [x.names[0] for x in found.linears] == [x.names[0] for x in MODEL[:3]] and not found.faults
    assert found.notes == [r"Pruner.targets: 're:model.layers.\d*$' matches modules that hold linears; these are meant"]
    assert len(resolve(MODEL, ["re:(?!.*q_proj$).*"], [], "").linears) == len(MODEL) - 1
    assert "matches no linear" in resolve(MODEL, [r"re:model.block.\d*$"], [], "").faults[0]
