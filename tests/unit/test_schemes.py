"""Presets, config_groups entries and the faults of both."""

import pytest

from bitpress.errors import RecipeError
from bitpress.schemes import PRESETS, PRESETS_LATER, QuantArgs, Scheme, preset, scheme_from_group


def problems(group, where=""):
    with pytest.raises(RecipeError) as caught:
        scheme_from_group(group, where)
    return list(caught.value.problems)


def weights(**keys):
    return {"weights": {"num_bits": 4, **keys}, "targets": ["Linear"]}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("suffix", ["", "_ASYM"])
def test_weight_only_presets(bits, suffix):
    name = f"W{bits}A16{suffix}"
    expected = QuantArgs(num_bits=bits, symmetric=not suffix, strategy="group", group_size=128)
    assert preset(name.lower()) == Scheme(name=name, weights=expected)
    assert preset(name).format == "pack-quantized"


def test_w8a8_and_its_alias():
    scheme = preset("W8A8")
    assert scheme.weights == QuantArgs(num_bits=8, strategy="channel")
    assert scheme.input_activations == QuantArgs(num_bits=8, strategy="token", dynamic=True)
    assert scheme.format == "int-quantized"
    assert preset("int8") == scheme


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_no_faults_and_round_trip_as_groups(name):
    scheme = preset(name)
    assert scheme.faults() == []
    again = scheme_from_group({**scheme.to_dict(), "targets": ["Linear"]})
    assert (again.weights, again.input_activations) == (scheme.weights, scheme.input_activations)
    assert again.name is None


def test_group_size_overrides_the_presets():
    assert preset("W4A16", 32).weights.group_size == 32
    assert preset("W4A16").weights.group_size == 128
    for name in ("W4A16", "W8A8"):
        channel = preset(name, -1).weights
        assert (channel.strategy, channel.group_size) == ("channel", None)


@pytest.mark.parametrize("size", [0, -2, True, 1.5, "128"])
def test_group_sizes_that_are_none(size):
    with pytest.raises(RecipeError, match=r"group_size: expected a positive whole number, or -1 for channel"):
        preset("W4A16", size)


def test_group_size_with_a_channel_preset():
    with pytest.raises(RecipeError, match=r"group_size: W8A8 has one scale per channel; drop group_size"):
        preset("W8A8", 64)


def test_unknown_preset_and_group_size_are_reported_together():
    with pytest.raises(RecipeError) as caught:
        preset("W4A16_ASYMM", 0)
    assert caught.value.problems[0] == "scheme: 'W4A16_ASYMM' is unknown. Did you mean 'W4A16_ASYM'?"
    assert caught.value.problems[1].startswith("group_size: ")
    with pytest.raises(RecipeError, match="scheme: 4 is unknown"):
        preset(4)


@pytest.mark.parametrize("name", PRESETS_LATER)
def test_presets_of_other_tools_are_never_unknown(name):
    with pytest.raises(RecipeError, match=r"known but not implemented yet; available: W2A16, .*W8A8") as caught:
        preset(name.lower())
    assert "unknown" not in str(caught.value)
    assert name not in PRESETS


def test_to_dict_is_the_common_subset():
    assert preset("W4A16").to_dict() == {
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 128,
            "dynamic": False,
        }
    }
    assert preset("W8A8").to_dict()["input_activations"]["dynamic"] is True
    assert "group_size" not in preset("W8A8").to_dict()["weights"]


@pytest.mark.parametrize(
    ("keys", "strategy", "size"),
    [
        ({}, "tensor", None),
        ({"group_size": 64}, "group", 64),
        ({"group_size": -1}, "channel", None),
        ({"group_size": -1, "strategy": "channel"}, "channel", None),
        ({"strategy": "CHANNEL", "type": "INT"}, "channel", None),
        ({"strategy": "group", "group_size": 128}, "group", 128),
        ({"strategy": "tensor", "group_size": None}, "tensor", None),
    ],
)
def test_strategy_of_a_group(keys, strategy, size):
    args = scheme_from_group(weights(**keys)).weights
    assert (args.strategy, args.group_size) == (strategy, size)


def test_keys_that_other_tools_write_are_read():
    entry = {
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": 128,
            "dynamic": False,
            "block_structure": None,
            "actorder": "weight",
            "observer": "minmax",
            "observer_kwargs": {},
            "scale_dtype": None,
            "zp_dtype": "torch.int8",
        },
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
        "targets": ["Linear"],
    }
    assert scheme_from_group(entry).weights == preset("W4A16_ASYM").weights


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"num_bits": 1}, "weights.num_bits: must be 2 to 8 for int, got 1"),
        ({"num_bits": 9}, "weights.num_bits: must be 2 to 8 for int, got 9"),
        ({"num_bits": True}, "weights.num_bits: expected a whole number, got True"),
        ({"type": "float"}, "weights.type: 'float' is not implemented yet; available: 'int'"),
        ({"type": "itn"}, "weights.type: 'itn' is unknown. Did you mean 'int'?"),
        ({"symmetric": "yes"}, "weights.symmetric: expected true or false, got 'yes'"),
        ({"strategy": "chanel"}, "weights.strategy: 'chanel' is unknown. Did you mean 'channel'?"),
        ({"strategy": ["group"]}, "weights.strategy: ['group'] is unknown. Did you mean 'group'?"),
        ({"strategy": "group"}, "weights.group_size: strategy 'group' needs one, such as 128 or 64"),
        ({"group_size": 0}, "weights.group_size: must be positive, got 0; for one scale per row use"),
        ({"group_size": "64"}, "weights.group_size: expected a positive whole number, got '64'"),
        (
            {"strategy": "channel", "group_size": 64},
            "weights.group_size: does not go with strategy 'channel': drop group_size or use strategy: group",
        ),
        (
            {"strategy": "tensor", "group_size": 64},
            "weights.group_size: does not go with strategy 'tensor': drop group_size or use strategy: group",
        ),
        ({"strategy": "token"}, "weights.strategy: 'token' is for activations; weights have tensor, channel"),
        ({"dynamic": True}, "weights.dynamic: weights are quantized once; drop it"),
        ({"dynamic": "local"}, "weights.dynamic: 'local' is not implemented yet"),
        ({"dynamic": 1}, "weights.dynamic: expected true or false, got 1"),
        ({"group_sise": 64}, "weights.group_sise: unknown key. Did you mean 'group_size'?"),
        ({"observer_kwargs": {"maxshrink": 0.1}}, "weights.observer_kwargs: not implemented yet; drop it"),
        ({"zp_dtype": "torch.int32"}, "weights.zp_dtype: not implemented yet; drop it"),
    ],
)
def test_faults_of_weights(keys, fault):
    found = problems(weights(**keys))
    assert len(found) == 1
    assert found[0].startswith(fault)


@pytest.mark.parametrize("strategy", ["block", "tensor_group", "attn_head"])
def test_strategies_to_come(strategy):
    (fault,) = problems(weights(strategy=strategy, group_size=16))
    assert fault.startswith(f"weights.strategy: '{strategy}' is not implemented yet; available: tensor,")


INT8_INPUTS = {"num_bits": 8, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("weight_keys", "input_keys", "fault"),
    [
        ({"num_bits": 8}, {"dynamic": False}, "these activations are not implemented yet; available: int8"),
        ({"num_bits": 8}, {"num_bits": 4}, "these activations are not implemented yet"),
        ({"num_bits": 8}, {"symmetric": False}, "these activations are not implemented yet"),
        ({"num_bits": 8}, {"strategy": "tensor"}, "these activations are not implemented yet"),
        ({"num_bits": 4}, {}, "activations with these weights are not implemented yet"),
        ({"num_bits": 8, "group_size": 128}, {}, "activations with these weights are not implemented yet"),
        ({"num_bits": 8, "symmetric": False}, {}, "activations with these weights are not implemented yet"),
    ],
)
def test_activations_to_come(weight_keys, input_keys, fault):
    (found,) = problems({"weights": weight_keys, "input_activations": {**INT8_INPUTS, **input_keys}})
    assert found.startswith(f"input_activations: {fault}")
    assert "W8A8" in found


def test_int8_activations_with_per_tensor_weights():
    scheme = scheme_from_group({"weights": {"num_bits": 8}, "input_activations": INT8_INPUTS})
    assert scheme.weights.strategy == "tensor"
    assert scheme.format == "int-quantized"


def test_faults_of_an_entry():
    assert problems({"targets": ["Linear"]}) == ["weights: missing; give at least num_bits and strategy"]
    assert problems({"weights": 4}) == ["weights: expected keys such as num_bits and strategy, got 4"]
    (fault,) = problems(weights() | {"wieghts": {}})
    assert fault == "wieghts: unknown key. Did you mean 'weights'?"
    (fault,) = problems(weights() | {"format": "int-quantized"})
    assert fault.endswith("does not hold this scheme; drop it or use 'pack-quantized'")
    (fault,) = problems(weights() | {"output_activations": {"num_bits": 8}})
    assert fault == "output_activations: not implemented yet; drop it"
    inputs = {**INT8_INPUTS, "actorder": "weight"}
    (fault,) = problems({"weights": {"num_bits": 8}, "input_activations": inputs})
    assert fault == "input_activations.actorder: only weights have an act-order; drop it"


def test_all_faults_come_together_with_their_place():
    entry = {"weights": {"num_bits": 9, "strategy": "grup", "x": 1}, "input_activations": {"type": "float"}}
    found = problems(entry, "config_groups.group_0")
    assert [fault.partition(":")[0] for fault in found] == [
        "config_groups.group_0.weights.x",
        "config_groups.group_0.weights.num_bits",
        "config_groups.group_0.weights.strategy",
        "config_groups.group_0.input_activations.type",
    ]
    assert QuantArgs(num_bits=9, strategy="group").faults("w") == [
        "w.num_bits: must be 2 to 8 for int, got 9",
        "w.group_size: strategy 'group' needs one, such as 128 or 64",
    ]
