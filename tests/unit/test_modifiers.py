"""Fields, groups and faults of modifiers made in Python."""

import dataclasses
import enum
import importlib
import inspect

import pytest

from bitpress.errors import RecipeError
from bitpress.modifiers import MODIFIERS, Modifier
from bitpress.modifiers.awq import AWQMapping
from bitpress.modifiers.quantization import GPTQModifier, QuantizationModifier, SchemeGroup
from bitpress.schemes import preset

BOTH = [QuantizationModifier, GPTQModifier]
CHANNEL = {"weights": {"num_bits": 4, "strategy": "channel"}, "targets": ["Linear"]}


def problems(cls, *args, **keys):
    with pytest.raises(RecipeError) as caught:
        cls(*args, **keys)
    return list(caught.value.problems)


def group(**weights):
    return {"group_0": {"weights": {"num_bits": 4, "strategy": "channel", **weights}, "targets": ["Linear"]}}


def test_the_shortest_recipe():
    modifier = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    assert modifier.groups() == (SchemeGroup("group_0", ("Linear",), preset("W4A16"), "static", "hessian"),)
    assert modifier.to_dict() == {"scheme": "W4A16", "ignore": ["lm_head"]}
    assert modifier == GPTQModifier(scheme="W4A16", ignore=["lm_head"])
    assert modifier.faults() == modifier.notes() == []
    assert (modifier.block_size, modifier.dampening_frac) == (128, 0.01)


def test_round_to_nearest():
    modifier = QuantizationModifier(scheme="w8a8", targets=("q_proj", "k_proj"), observer="mse")
    assert modifier.groups() == (SchemeGroup("group_0", ("q_proj", "k_proj"), preset("W8A8"), None, "mse"),)
    assert modifier.to_dict() == {"scheme": "w8a8", "targets": ["q_proj", "k_proj"], "observer": "mse"}


def test_needs():
    assert GPTQModifier(scheme="W4A16").needs
    assert not QuantizationModifier(scheme="W4A16").needs
    assert not QuantizationModifier(scheme="W8A8").needs


def test_table_and_docstrings_are_complete():
    for name, cls in MODIFIERS.items():
        assert cls.__name__ == name
        assert issubclass(cls, Modifier)
        documented = inspect.getdoc(cls)
        for field in dataclasses.fields(cls):
            assert f"{field.name}: " in documented, f"{name}.{field.name}"


def test_modifiers_are_frozen():
    modifier = GPTQModifier(scheme="W4A16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        modifier.block_size = 64
    assert dataclasses.replace(modifier, block_size=64).block_size == 64
    with pytest.raises(RecipeError, match="block_size: must be at least 1"):
        dataclasses.replace(modifier, block_size=0)


@pytest.mark.parametrize("cls", BOTH)
def test_exactly_one_of_scheme_and_groups(cls):
    name = cls.__name__
    assert problems(cls) == [f"{name}.scheme: missing; give a preset such as 'W4A16', or config_groups"]
    assert problems(cls, config_groups={}) == problems(cls)
    both = problems(cls, scheme="W4A16", config_groups={"group_0": CHANNEL})
    assert both == [f"{name}.scheme: give either scheme or config_groups, not both"]


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"scheme": 4}, "scheme: expected text or null, got 4"),
        ({"scheme": "W4A61"}, "scheme: 'W4A61' is unknown. Did you mean 'W4A16'?"),
        ({"scheme": "FP9"}, "scheme: 'FP9' is unknown. Did you mean 'FP8'?"),
        ({"group_size": True}, "group_size: expected a whole number or null, got True"),
        ({"group_size": 0}, "group_size: expected a positive whole number, or -1 for channel, got 0"),
        ({"scheme": "W8A8", "group_size": 64}, "group_size: W8A8 has one scale per channel; drop"),
        ({"targets": [1]}, "targets: expected a name or a list of names, got [1]"),
        ({"targets": []}, "targets: empty, so nothing would be compressed"),
        ({"targets": "re:("}, "targets: 're:(' is not a regular expression: missing )"),
        ({"ignore": ["re:*"]}, "ignore: 're:*' is not a regular expression: nothing to repeat"),
        ({"ignore": 3}, "ignore: expected a name or a list of names, got 3"),
        ({"observer": "mean"}, "observer: expected 'minmax', 'mse'"),
        ({"kv_cache_scheme": {"num_bits": 9}}, "kv_cache_scheme.num_bits: must be 2 to 8 for int, got 9"),
        ({"group_sise": 64}, "group_sise: unknown key. Did you mean 'group_size'?"),
    ],
)
def test_faults_of_all_quantizers(cls, keys, fault):
    found = problems(cls, **{"scheme": "W4A16", **keys})
    assert len(found) == 1
    assert found[0].startswith(f"{cls.__name__}.{fault}")


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"block_size": "abc"}, "block_size: expected a whole number, got 'abc'"),
        ({"block_size": True}, "block_size: expected a whole number, got True"),
        ({"block_size": 128.0}, "block_size: expected a whole number, got 128.0"),
        ({"block_size": 0}, "block_size: must be at least 1 column, got 0"),
        ({"dampening_frac": -0.1}, "dampening_frac: must be 0 or a positive fraction, got -0.1"),
        ({"dampening_frac": "nan"}, "dampening_frac: must be 0 or a positive fraction, got nan"),
        ({"dampening_frac": "much"}, "dampening_frac: expected a number, got 'much'"),
        ({"dampening_frac": True}, "dampening_frac: expected a number, got True"),
        ({"actorder": "statik"}, "actorder: 'statik' is unknown. Did you mean 'static'?"),
        ({"actorder": 3}, "actorder: expected 'none', 'weight', 'static' or 'group' or null, got 3"),
        ({"sequential_update": "no"}, "sequential_update: expected true or false or null, got 'no'"),
    ],
)
def test_faults_of_gptq(keys, fault):
    found = problems(GPTQModifier, scheme="W4A16", **keys)
    assert len(found) == 1
    assert found[0].startswith(f"GPTQModifier.{fault}")


def test_all_faults_come_together():
    found = problems(
        GPTQModifier, scheme="W4A61", block_size="abc", dampening_frac=-1, blok=1, targets=[1], actorder="x"
    )
    keys = sorted(fault.partition(":")[0].removeprefix("GPTQModifier.") for fault in found)
    assert keys == ["actorder", "block_size", "blok", "dampening_frac", "scheme", "targets"]


def test_values_go_by_name():
    assert problems(GPTQModifier, "W4A16") == ["GPTQModifier: give every value by name, not 'W4A16' alone"]


@pytest.mark.parametrize(
    ("written", "kept", "order"),
    [
        ("static", "static", "static"),
        ("weight", "weight", "static"),
        ("STATIC", "static", "static"),
        ("none", None, None),
        (None, None, None),
        (False, None, None),
    ],
)
def test_act_orders(written, kept, order):
    modifier = GPTQModifier(scheme="W4A16", actorder=written)
    assert modifier.actorder == kept
    assert modifier.groups()[0].actorder == order
    in_group = GPTQModifier(config_groups=group(actorder=written))
    assert in_group.groups()[0].actorder == order


def test_numbers_as_yaml_reads_them():
    assert GPTQModifier(scheme="W4A16", dampening_frac="1e-2") == GPTQModifier(scheme="W4A16")
    assert GPTQModifier(scheme="W4A16", dampening_frac=0).dampening_frac == 0


def test_old_keys_are_explained():
    modifier = GPTQModifier(
        scheme="W4A16",
        sequential_update=False,
        sequential_targets=["LlamaDecoderLayer"],
        offload_hessians=True,
    )
    assert [note.partition(":")[0] for note in modifier.notes()] == [
        "sequential_update",
        "sequential_targets",
        "offload_hessians",
    ]
    assert modifier.notes()[0].endswith("has no effect: bitpress always goes block by block")


def test_groups_keep_their_own_settings():
    modifier = GPTQModifier(
        config_groups={
            "attention": {
                "weights": {"num_bits": 8, "group_size": 64, "actorder": None, "observer": "mse"},
                "targets": ["re:.*self_attn.*"],
            },
            "rest": {"weights": {"num_bits": 4, "strategy": "channel", "observer": None}},
            "W4A16": ["lm_head"],
        },
        targets="down_proj",
        actorder="weight",
    )
    attention, rest, head = modifier.groups()
    assert (attention.name, attention.actorder, attention.observer) == ("attention", None, "mse")
    assert attention.scheme.weights.group_size == 64
    assert (rest.targets, rest.actorder, rest.observer) == (("down_proj",), "static", "hessian")
    assert (head.scheme, head.targets) == (preset("W4A16"), ("lm_head",))
    assert modifier.notes() == []
    assert GPTQModifier(**modifier.to_dict()) == modifier


@pytest.mark.parametrize(
    ("groups", "fault"),
    [
        ({"g": 3}, "config_groups.g: expected weights and targets, got 3"),
        ({"g": {"targets": ["Linear"]}}, "config_groups.g.weights: missing"),
        ({"g": {**CHANNEL, "targets": []}}, "config_groups.g.targets: expected a name or a list of names"),
        ({"g": {**CHANNEL, "targets": [1]}}, "config_groups.g.targets: expected a name, got 1"),
        ({"g": {**CHANNEL, "targets": "re:("}}, "config_groups.g.targets: 're:(' is not a regular"),
        (group(strategy="chanel"), "config_groups.group_0.weights.strategy: 'chanel' is unknown."),
        (group(group_size=64), "config_groups.group_0.weights.group_size: does not go with"),
        (group(actorder="gruop"), "config_groups.group_0.weights.actorder: 'gruop' is unknown. Did you mean 'group'"),
        (group(observer="msee"), "config_groups.group_0.weights.observer: 'msee' is unknown. Did you"),
        ({"W4A61": ["Linear"]}, "config_groups.W4A61: scheme: 'W4A61' is unknown. Did you mean 'W4A16'"),
        ({0: CHANNEL}, "config_groups: expected groups by name or null"),
        ("W4A16", "config_groups: expected groups by name or null, got 'W4A16'"),
    ],
)
@pytest.mark.parametrize("cls", BOTH)
def test_faults_of_groups(cls, groups, fault):
    found = problems(cls, config_groups=groups)
    assert len(found) == 1
    assert found[0].startswith(f"{cls.__name__}.{fault}")


def test_group_size_belongs_to_a_preset():
    (fault,) = problems(GPTQModifier, config_groups=group(), group_size=64)
    assert fault.startswith("GPTQModifier.group_size: goes with scheme; with config_groups, set it in")


def test_faults_of_several_groups_come_together():
    found = problems(GPTQModifier, config_groups={"a": {"weights": {"num_bits": 1}}, "b": 2}, block_size=0)
    assert [fault.partition(":")[0] for fault in found] == [
        "GPTQModifier.config_groups.a.weights.num_bits",
        "GPTQModifier.config_groups.b",
        "GPTQModifier.block_size",
    ]


def test_the_hessian_observer_is_gptqs():
    assert GPTQModifier(config_groups=group(observer="hessian")).groups()[0].observer == "hessian"
    (fault,) = problems(QuantizationModifier, config_groups=group(observer="hessian"))
    assert "weights.observer: 'hessian' is unknown" in fault


def test_settings_without_effect_are_noted():
    (note,) = QuantizationModifier(config_groups=group(actorder="static")).notes()
    assert note == "config_groups.group_0.weights.actorder: has no effect: rounding has no order"
    (note,) = GPTQModifier(config_groups=group(), targets="q_proj").notes()
    assert note.startswith("targets: has no effect")


def test_settings_objects_of_other_tools_become_plain():
    class Strategy(enum.StrEnum):
        CHANNEL = "channel"

    class Settings:
        def model_dump(self, mode):
            return {"weights": {"num_bits": 4, "strategy": Strategy.CHANNEL}, "targets": ["Linear"]}

    modifier = GPTQModifier(config_groups={"group_0": Settings()})
    assert modifier.to_dict() == {"config_groups": {"group_0": CHANNEL}}
    assert type(modifier.to_dict()["config_groups"]["group_0"]["weights"]["strategy"]) is str


def test_what_is_given_is_copied():
    groups = group()
    modifier = GPTQModifier(config_groups=groups)
    groups["group_0"]["weights"]["num_bits"] = 99
    modifier.to_dict()["config_groups"].clear()
    assert modifier.groups()[0].scheme.weights.num_bits == 4


STATIC = {"weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": {"num_bits": 8, "strategy": "tensor"}}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor"}


@pytest.mark.parametrize(
    ("keys", "needs"),
    [
        ({"scheme": "W4A16"}, set()),
        ({"scheme": "FP8_DYNAMIC"}, set()),
        ({"scheme": "FP8"}, {"range"}),
        ({"scheme": "NVFP4"}, {"range"}),
        ({"config_groups": {"a": STATIC, "W4A16": ["re:.*mlp.*"]}}, {"range"}),
        ({"scheme": "W4A16", "kv_cache_scheme": CACHE}, {"cache"}),
        ({"kv_cache_scheme": CACHE}, {"cache"}),
        ({"kv_cache_scheme": {**CACHE, "strategy": "token", "dynamic": True}}, set()),
    ],
)
def test_what_static_scales_need(keys, needs):
    assert QuantizationModifier(**keys).needs == needs
    expected = needs | {"gram"} if "scheme" in keys or "config_groups" in keys else needs
    assert GPTQModifier(**keys).needs == expected


def test_each_claim_needs_only_its_own():
    modifier = QuantizationModifier(config_groups={"a": STATIC, "W4A16": ["re:.*mlp.*"]})
    assert [modifier.needs_of(claim) for claim in modifier.claims()] == [{"range"}, set()]


def test_unquantized_names_linears_to_leave_alone():
    modifier = QuantizationModifier(config_groups={"unquantized": ["re:.*o_proj"], "W8A8": ["Linear"]})
    assert [modifier.leaves(claim) for claim in modifier.claims()] == [True, False]
    assert [group.name for group in modifier.groups()] == ["W8A8"]
    assert problems(QuantizationModifier, config_groups={"UNQUANTIZED": ["Linear"]}) == [
        "QuantizationModifier.config_groups: UNQUANTIZED leaves its linears alone, so nothing would be quantized"
    ]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("awq", "AWQModifier"),
        ("awq", "AWQMapping"),
        ("gptq", "GPTQModifier"),
        ("obcq", "SparseGPTModifier"),
        ("pruning", "MagnitudePruningModifier"),
        ("pruning", "SparseGPTModifier"),
        ("pruning", "WandaPruningModifier"),
        ("pruning.magnitude", "MagnitudePruningModifier"),
        ("pruning.sparsegpt", "SparseGPTModifier"),
        ("pruning.wanda", "WandaPruningModifier"),
        ("quantization", "GPTQModifier"),
        ("quantization", "QuantizationModifier"),
        ("quantization.gptq", "GPTQModifier"),
        ("quantization.quantization", "QuantizationModifier"),
        ("smoothquant", "SmoothQuantModifier"),
        ("transform", "AWQModifier"),
        ("transform", "SmoothQuantModifier"),
        ("transform.awq", "AWQMapping"),
        ("transform.awq", "AWQModifier"),
        ("transform.smoothquant", "SmoothQuantModifier"),
    ],
)
def test_names_are_where_scripts_for_other_tools_import_them_from(module, name):
    found = getattr(importlib.import_module(f"bitpress.modifiers.{module}"), name)
    assert found is (AWQMapping if name == "AWQMapping" else MODIFIERS[name])
