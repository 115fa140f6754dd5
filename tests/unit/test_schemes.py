"""Presets, config_groups entries and the faults of both."""

import pytest

from bitpress.errors import RecipeError
from bitpress.schemes import PRESETS, QuantArgs, Scheme, cache_scheme, preset, scheme_from_group


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


def test_unquantized_is_no_scheme_of_its_own():
    with pytest.raises(RecipeError, match="UNQUANTIZED would quantize nothing"):
        preset("unquantized")


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
        ({"dynamic": "local"}, "weights.dynamic: 'local' goes with strategy 'tensor_group' (NVFP4)"),
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


INT8_INPUTS = {"num_bits": 8, "strategy": "token", "dynamic": True}
FP8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float"}
NVFP4 = {**FP4, "strategy": "tensor_group", "group_size": 16}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({**FP8, "num_bits": 5}, "num_bits: must be 4, 6 or 8 for float, got 5"),
        ({**FP8, "symmetric": False}, "symmetric: float codes have no zero point; use symmetric: true"),
        ({**FP8, "strategy": "block"}, "block_structure: strategy 'block' needs one, such as [128, 128]"),
        ({**FP8, "strategy": "block", "block_structure": [128]}, "block_structure: expected two positive numbers"),
        ({**FP8, "strategy": "block", "block_structure": "128x"}, "block_structure: expected two positive numbers"),
        ({**FP8, "strategy": "block", "block_structure": [128, 0]}, "block_structure: expected two positive numbers"),
        ({"strategy": "group", "group_size": 64, "block_structure": [1, 64]}, "block_structure: does not go with"),
        ({"strategy": "block", "block_structure": [64, 64]}, "strategy: 'block' is for float weights; int weights"),
        ({**FP8, "strategy": "attn_head"}, "strategy: 'attn_head' is for the cache of keys and values; weights have"),
        ({"strategy": "tensor_group", "group_size": 16}, "strategy: 'tensor_group' is for float weights; int"),
        ({**FP8, "strategy": "tensor_group", "group_size": 16}, "strategy: 'tensor_group' is for float4; float8"),
        ({**FP4, "strategy": "tensor_group"}, "group_size: strategy 'tensor_group' needs one, such as 16"),
        ({**NVFP4, "group_size": 32}, "strategy: float4 weights are stored as NVFP4 (tensor_group, group_size: 16) or"),
        ({**FP4, "strategy": "channel"}, "strategy: float4 weights are stored as NVFP4"),
        ({**FP8, "num_bits": 6, "group_size": 64}, "strategy: float6 weights are stored as MXFP6 (group, group_size"),
        ({"group_size": 32, "scale_dtype": "uint8"}, "scale_dtype: 'uint8' (powers of two) goes with float codes"),
        ({**FP8, "group_size": 64, "scale_dtype": "uint8"}, "scale_dtype: 'uint8' (powers of two) goes with float"),
        ({**FP8, "scale_dtype": "torch.float8_e4m3fn"}, "scale_dtype: 'float8_e4m3fn' goes with strategy"),
        ({**FP8, "scale_dtype": "torch.uint9"}, "scale_dtype: 'uint9' is unknown. Did you mean 'uint8'?"),
        ({**FP8, "dynamic": "local"}, "dynamic: 'local' goes with strategy 'tensor_group' (NVFP4)"),
    ],
)
def test_faults_of_float_weights(keys, fault):
    (found,) = problems({"weights": keys})
    assert found.startswith(f"weights.{fault}")


@pytest.mark.parametrize(
    ("weight_keys", "input_keys", "fault"),
    [
        ({"num_bits": 8}, {**INT8_INPUTS, "dynamic": False}, ".dynamic: activations with one scale per token are dyn"),
        ({"num_bits": 8}, {"num_bits": 8, "group_size": 64}, ".dynamic: activations with one scale per group are dyn"),
        ({"num_bits": 8}, {**INT8_INPUTS, "strategy": "channel"}, ".strategy: 'channel' is for weights; activations"),
        ({"num_bits": 8}, {**INT8_INPUTS, "strategy": "attn_head"}, ".strategy: 'attn_head' is for the cache of keys"),
        ({"num_bits": 8}, {**INT8_INPUTS, "observer": "mse"}, ".observer: activations take the range that was seen"),
        ({"num_bits": 8}, {**INT8_INPUTS, "symetric": True}, ".symetric: unknown key. Did you mean 'symmetric'?"),
        (NVFP4, {**NVFP4, "dynamic": True}, ".dynamic: must be 'local' with strategy 'tensor_group'"),
        (NVFP4, {**NVFP4, "group_size": 32, "dynamic": "local"}, ".strategy: 'tensor_group' is for float4 activations"),
        ({**FP4, **MX}, {**FP4, "strategy": "token", "dynamic": True}, ".strategy: float4 activations are MX (group"),
        (FP8, INT8_INPUTS, ": int activations do not go with float weights; use type: float"),
        (FP8, {**NVFP4, "dynamic": "local"}, ": NVFP4 activations go with NVFP4 weights"),
        (NVFP4, {**FP8, "strategy": "token", "dynamic": True}, ": NVFP4 weights go with NVFP4 activations or none"),
        (
            {**FP8, "strategy": "block", "block_structure": [128, 128]},
            FP8,
            ": activations of weights in blocks are dyn",
        ),
    ],
)
def test_faults_of_activations(weight_keys, input_keys, fault):
    (found,) = problems({"weights": weight_keys, "input_activations": input_keys})
    assert found.startswith(f"input_activations{fault}")


@pytest.mark.parametrize(
    ("weight_keys", "input_keys", "stored"),
    [
        ({"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "strategy": "tensor"}, "int-quantized"),
        ({"num_bits": 8}, {**INT8_INPUTS, "symmetric": False}, "int-quantized"),
        ({"num_bits": 8, "symmetric": False}, {**INT8_INPUTS, "strategy": "tensor"}, "int-quantized"),
        ({"num_bits": 4, "group_size": 32}, INT8_INPUTS, "int-quantized"),
        ({"num_bits": 8, "group_size": 32}, {**FP8, "strategy": "token", "dynamic": True}, "pack-quantized"),
        (FP8, FP8, "float-quantized"),
        ({**FP8, "group_size": 32}, {**FP8, "strategy": "tensor", "dynamic": True}, "float-quantized"),
        ({**FP8, "strategy": "channel"}, None, "naive-quantized"),
        ({**FP8, "strategy": "block", "block_structure": "128x64"}, None, "naive-quantized"),
        ({**FP8, **MX}, {**FP8, **MX, "dynamic": True}, "mxfp8-quantized"),
        ({**FP4, "group_size": 32}, {**FP4, **MX, "dynamic": True}, "mxfp4-pack-quantized"),
        ({**FP8, "num_bits": 6, "group_size": 32}, None, "mxfp6-pack-quantized"),
        (NVFP4, {**NVFP4, "dynamic": "local"}, "nvfp4-pack-quantized"),
    ],
)
def test_formats(weight_keys, input_keys, stored):
    scheme = scheme_from_group({"weights": weight_keys, "input_activations": input_keys})
    assert scheme.format == stored
    again = scheme_from_group({**scheme.to_dict(), "format": stored})
    assert again == scheme


def test_scales_of_mx_and_nvfp4_are_what_their_formats_have():
    assert scheme_from_group({"weights": {**FP4, "group_size": 32}}).weights == preset("MXFP4A16").weights
    assert scheme_from_group({"weights": NVFP4}).weights == preset("NVFP4A16").weights
    assert scheme_from_group({"weights": {**FP8, "group_size": 32}}).weights.scale_dtype is None


def test_another_format_that_holds_the_scheme_may_be_asked_for():
    entry = {"weights": {"num_bits": 4, "group_size": 32}, "input_activations": INT8_INPUTS}
    assert scheme_from_group({**entry, "format": "pack-quantized"}).format == "pack-quantized"
    (fault,) = problems({**entry, "format": "float-quantized"})
    assert fault.endswith("does not hold this scheme; drop it or use 'int-quantized' or 'pack-quantized'")


@pytest.mark.parametrize(
    ("name", "static"),
    [("FP8", True), ("NVFP4", True), ("FP8_DYNAMIC", False), ("NVFP4A16", False), ("W8A8", False), ("MXFP8", False)],
)
def test_static_inputs(name, static):
    assert preset(name).static_inputs is static


@pytest.mark.parametrize(
    ("name", "size", "fault"),
    [
        ("NVFP4", 32, "group_size: NVFP4 has groups of 16 by definition; drop group_size"),
        ("MXFP8", -1, "group_size: MXFP8 has groups of 32 by definition; drop group_size"),
        ("FP8", -1, "group_size: FP8 has one scale per tensor; drop group_size"),
        ("FP8_BLOCK", 128, "group_size: FP8_BLOCK has one scale per a block of 128 x 128; drop group_size"),
    ],
)
def test_group_sizes_that_a_preset_fixes(name, size, fault):
    with pytest.raises(RecipeError, match=fault):
        preset(name, size)
    assert preset("NVFP4", 16) == preset("NVFP4")
    assert preset("W4A8", 64).weights.group_size == 64


CACHE = {**FP8, "strategy": "tensor"}


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"type": "int", "symmetric": False}, "symmetric: a cache with zero points is read by no client"),
        ({"num_bits": 4}, "num_bits: a float cache has 8 bits, got 4"),
        ({"strategy": "channel"}, "strategy: 'channel' is not for caches; use tensor, attn_head or token"),
        ({"strategy": "attn_head", "dynamic": True}, "dynamic: scales per attention head are static"),
        ({"strategy": "token"}, "dynamic: scales per token are dynamic; use true"),
        ({"nmu_bits": 8}, "nmu_bits: unknown key. Did you mean 'num_bits'?"),
    ],
)
def test_faults_of_a_cache_scheme(keys, fault):
    with pytest.raises(RecipeError) as caught:
        cache_scheme({**CACHE, **keys}, "kv_cache_scheme")
    assert caught.value.problems[0].startswith(f"kv_cache_scheme.{fault}")


def test_cache_schemes():
    assert cache_scheme(CACHE, "c") == QuantArgs(num_bits=8, type="float", strategy="tensor")
    assert cache_scheme({**CACHE, "strategy": "attn_head"}, "c").strategy == "attn_head"
    assert cache_scheme({**CACHE, "strategy": "token", "dynamic": True}, "c").dynamic is True
    with pytest.raises(RecipeError, match="c: expected keys such as num_bits and strategy, got 8"):
        cache_scheme(8, "c")


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
    assert fault == (
        "output_activations: no client quantizes the outputs of a linear; drop it, or for keys and values in the "
        "cache give the modifier kv_cache_scheme"
    )
    inputs = {**INT8_INPUTS, "actorder": "weight"}
    (fault,) = problems({"weights": {"num_bits": 8}, "input_activations": inputs})
    assert fault == "input_activations.actorder: only weights have an act-order; drop it"


def test_all_faults_come_together_with_their_place():
    entry = {"weights": {"num_bits": 9, "strategy": "grup", "x": 1}, "input_activations": {"type": "flaot"}}
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
