"""What bitpress writes, as the installed compressed-tensors reads it. `make contract` runs this on several releases."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from bitpress import oneshot
from bitpress.formats import bits
from bitpress.schemes import PRESETS, UNQUANTIZED, scheme_from_group
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build, save, token_rows

RELEASE = tuple(int(part) for part in version("compressed-tensors").split(".")[:2])
DENSE_PACKING = RELEASE >= (0, 19)
WIDTHS = range(2, 9)


def pack_to_int32():
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32 as found
    except ImportError:
        from compressed_tensors.compressors.quantized_compressors.pack_quantized import pack_to_int32 as found
    return found


def test_the_release_under_test_is_the_one_asked_for():
    import os

    assert version("compressed-tensors").startswith(os.environ.get("BITPRESS_CONTRACT", ""))


@pytest.mark.parametrize("width", WIDTHS)
def test_packing(width):
    codes = torch.randint(-(1 << (width - 1)), 1 << (width - 1), (5, 96), dtype=torch.int8)
    theirs, ours = pack_to_int32()(codes, width), bits.pack(codes, width)
    if DENSE_PACKING or width in (2, 4, 8):
        assert torch.equal(ours, theirs)
    else:  # the older releases pad: other words, and a run with these widths says so
        assert ours.shape != theirs.shape or not torch.equal(ours, theirs)


def test_presets_mean_the_same():
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme

    shared = [name for name in PRESETS if name in PRESET_SCHEMES]
    assert set(PRESET_SCHEMES) - {UNQUANTIZED} == set(shared)
    assert PRESET_SCHEMES[UNQUANTIZED] == {}
    for name in shared:
        theirs = preset_name_to_scheme(name, ["Linear"])
        assert PRESETS[name] == replace(
            scheme_from_group(theirs.model_dump(exclude_none=True)), name=PRESETS[name].name
        )
        ours = QuantizationScheme(targets=["Linear"], **PRESETS[name].to_dict())
        for part in ("weights", "input_activations"):
            mine, other = getattr(ours, part), getattr(theirs, part)
            assert (mine is None) == (other is None), name
            if mine is not None:
                keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
                for key in (*keys, "block_structure", "scale_dtype"):
                    assert getattr(mine, key) == getattr(other, key), (name, part, key)


CASES = {
    "W4A16": {"scheme": "W4A16", "group_size": 16},
    "W4A16_ASYM": {"scheme": "W4A16_ASYM", "group_size": 16},
    "W8A16": {"scheme": "W8A16", "group_size": 16},
    "W4A16 channel": {"scheme": "W4A16", "group_size": -1},
    "W2A16": {"scheme": "W2A16", "group_size": 16},
    "W3A16": {"scheme": "W3A16", "group_size": 16},
    "W8A8": {"scheme": "W8A8"},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_weights_that_were_solved(case, dtype, tmp_path):
    base = save(build("llama", dtype), tmp_path / "base")
    recipe = {"GPTQModifier": {**CASES[case], "ignore": ["lm_head"], "refine": 0}}
    out = tmp_path / "out"
    oneshot(base, token_rows(), recipe, output_dir=out, max_seq_length=32, num_calibration_samples=12)
    if case == "W3A16" and not DENSE_PACKING:
        notes = json.loads((out / "report.json").read_text())["notes"]
        assert any("compressed-tensors 0.19" in note for note in notes)
        return
    config = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(out, quantization_config=config, dtype=dtype)
    ours = SparseAutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    for name, weight in ours.state_dict().items():
        assert torch.equal(theirs.get_parameter(name), weight), name
