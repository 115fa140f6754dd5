"""A folder of each format, built tensor by tensor: what it is, its schemes, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from bitpress.errors import CheckpointError
from bitpress.inspection import UNFINISHED, inspect_checkpoint, is_quantized
from bitpress.tables import inspection_table

R, C, G = 64, 256, 128  # rows, columns, group size of the linear `a.0.q_proj`
NAME = "a.0.q_proj"
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": G}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def folder(path: Path, tensors: dict[str, torch.Tensor], settings=None, **config) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **config}
    if settings is not None:
        config["quantization_config"] = settings
    (path / "config.json").write_text(json.dumps(config))
    save_file({"embed.weight": torch.zeros(10, 8, dtype=torch.bfloat16), **tensors}, path / "model.safetensors")
    return path


def compressed(groups: list[dict], format="pack-quantized", ignore=("lm_head",)) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "ignore": list(ignore),
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }


def packed(name=NAME, bits=4, groups=C // G, zero_point=False, columns=C) -> dict[str, torch.Tensor]:
    words = -(-columns * bits // 32)
    out = {
        f"{name}.weight_packed": torch.zeros(R, words, dtype=torch.int32),
        f"{name}.weight_scale": torch.zeros(R, groups, dtype=torch.bfloat16),
        f"{name}.weight_shape": torch.tensor([R, columns]),
    }
    if zero_point:
        out[f"{name}.weight_zero_point"] = torch.zeros(R * bits // 32, groups, dtype=torch.int32)
    return out


def gptq(bits=4) -> dict[str, torch.Tensor]:
    return {
        f"{NAME}.qweight": torch.zeros(C * bits // 32, R, dtype=torch.int32),
        f"{NAME}.qzeros": torch.zeros(C // G, R * bits // 32, dtype=torch.int32),
        f"{NAME}.scales": torch.zeros(C // G, R, dtype=torch.float16),
        f"{NAME}.g_idx": torch.zeros(C, dtype=torch.int32),
    }


def awq() -> dict[str, torch.Tensor]:
    return {
        f"{NAME}.qweight": torch.zeros(C, R // 8, dtype=torch.int32),
        f"{NAME}.qzeros": torch.zeros(C // G, R // 8, dtype=torch.int32),
        f"{NAME}.scales": torch.zeros(C // G, R, dtype=torch.float16),
    }


def nf4() -> dict[str, torch.Tensor]:
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [R, C]})
    return {
        f"{NAME}.weight": torch.zeros(R * C // 2, 1, dtype=torch.uint8),
        f"{NAME}.weight.absmax": torch.zeros(R * C // 64, dtype=torch.float32),
        f"{NAME}.weight.quant_map": torch.zeros(16, dtype=torch.float32),
        f"{NAME}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }


def the_layer(path: Path):
    (layer,) = inspect_checkpoint(path).layers
    assert (layer.name, layer.rows, layer.columns) == (NAME, R, C)
    return layer


def test_dense(tmp_path):
    tensors = {f"{NAME}.weight": torch.zeros(R, C, dtype=torch.bfloat16)}
    path = folder(tmp_path / "m", tensors, tie_word_embeddings=True)
    found = inspect_checkpoint(path)
    assert (found.method, found.layers, found.bits_per_weight) == ("dense", (), None)
    assert found.parameters == R * C + 80 and found.bytes == 2 * found.parameters
    assert found.bits_per_parameter == 16 and found.tied_embeddings and found.finished and not found.messages
    assert (found.model_type, found.architectures, found.dtype) == ("llama", ("LlamaForCausalLM",), "bfloat16")
    assert not found.has_recipe and is_quantized(path) is None
    (path / "recipe.yaml").write_text("x: 1")
    assert inspect_checkpoint(path).has_recipe


def test_pack_quantized(tmp_path):
    tensors = {**packed(), f"{NAME}.bias": torch.zeros(R)}
    path = folder(tmp_path, tensors, compressed([{"targets": ["Linear"], "weights": INT4}]))
    found, layer = inspect_checkpoint(path), the_layer(path)
    assert (found.method, found.format, found.ignored) == ("compressed-tensors", "pack-quantized", ("lm_head",))
    assert (layer.scheme, layer.num_bits, layer.group_size) == (f"W4A16 g{G}", 4, G)
    assert (layer.strategy, layer.symmetric, layer.activations) == ("group", True, None)
    assert layer.bits_per_weight == found.bits_per_weight == 4 + 16 / G
    assert found.parameters == R * C + R + 80  # neither words, scales nor the shape are parameters
    assert found.quantized_bytes == R * C // 2 + R * (C // G) * 2
    assert is_quantized(path) == "compressed-tensors"
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["bits_per_weight"] == 4.125


@pytest.mark.parametrize("columns", [256, 250])
def test_columns_come_from_the_stored_shape(tmp_path, columns):
    group = {"targets": ["Linear"], "weights": {**INT4, "strategy": "channel", "group_size": None}}
    path = folder(tmp_path, packed(groups=1, columns=columns), compressed([group]))
    (layer,) = inspect_checkpoint(path).layers
    assert (layer.columns, layer.scheme) == (columns, "W4A16 channel")


def test_asymmetric_counts_zero_points(tmp_path):
    group = {"targets": ["Linear"], "weights": {**INT4, "symmetric": False}}
    layer = the_layer(folder(tmp_path, packed(zero_point=True), compressed([group])))
    assert (layer.scheme, layer.bits_per_weight) == (f"W4A16_ASYM g{G}", 4 + (16 + 4) / G)
    silent = folder(tmp_path / "silent", packed(zero_point=True))
    assert the_layer(silent).scheme == f"W4A16_ASYM g{G}"


def test_int_quantized(tmp_path):
    tensors = {
        f"{NAME}.weight": torch.zeros(R, C, dtype=torch.int8),
        f"{NAME}.weight_scale": torch.zeros(R, 1, dtype=torch.bfloat16),
    }
    group = {"targets": ["Linear"], "weights": INT8, "input_activations": TOKEN}
    layer = the_layer(folder(tmp_path, tensors, compressed([group], "int-quantized")))
    assert (layer.scheme, layer.activations) == ("W8A8 channel", "int8 token sym dynamic")
    assert layer.bits_per_weight == 8 + 16 / C
    static = {**group, "input_activations": {**TOKEN, "strategy": "tensor", "dynamic": False}}
    layer = the_layer(folder(tmp_path, tensors, compressed([static], "int-quantized")))
    assert layer.scheme == "int8 channel, inputs int8 tensor sym static"


def test_groups_are_found_by_name_then_expression_then_class(tmp_path):
    names = ["a.0.q_proj", "a.1.q_proj", "a.10.v_proj", "a.2.v_proj", "a.3.k_proj"]
    groups = [
        {"targets": ["Linear"], "weights": {**INT4, "group_size": 64}},
        {"targets": [r"re:.*\.q_proj$"], "weights": INT4},
        {"targets": ["a.1.q_proj"], "weights": {**INT4, "group_size": 32}},
    ]
    tensors = {k: v for name in names for k, v in packed(name).items()}
    path = folder(tmp_path, tensors, compressed(groups, ignore=["re:.*k_proj"]))
    schemes = {layer.name: layer.scheme for layer in inspect_checkpoint(path).layers}
    assert schemes == {
        "a.0.q_proj": f"W4A16 g{G}",
        "a.1.q_proj": "W4A16 g32",
        "a.2.v_proj": "W4A16 g64",
        "a.3.k_proj": f"W4A16 g{G}",  # ignored, though packed: told from its shapes
        "a.10.v_proj": "W4A16 g64",
    }
    assert list(schemes)[-1] == "a.10.v_proj"  # in the order of the numbers


def test_gptq_by_config_and_by_tensors(tmp_path):
    named = folder(tmp_path / "a", gptq(), {"quant_method": "gptq", "bits": 4, "group_size": G, "sym": True})
    silent = folder(tmp_path / "b", gptq(bits=8))
    assert inspect_checkpoint(named).method == inspect_checkpoint(silent).method == "gptq"
    assert (the_layer(named).scheme, the_layer(silent).scheme) == (f"W4A16 g{G}", f"int8 g{G}")
    assert the_layer(silent).symmetric is None
    assert the_layer(named).bits_per_weight == 4 + 16 / G + 4 / G + 32 / R  # scales, zero points, g_idx
    assert "names no quantization" in inspect_checkpoint(silent).messages[0]
    assert is_quantized(silent) == "gptq"
    tensors = {n: t[:1] if n.endswith(("qzeros", "scales")) else t for n, t in gptq().items()}
    for size, scheme in ((C, f"W4A16 g{C}"), (-1, "W4A16 channel")):  # one group, by either name
        one = folder(
            tmp_path / str(size), tensors, {"quant_method": "gptq", "bits": 4, "group_size": size, "sym": True}
        )
        assert the_layer(one).scheme == scheme


def test_awq(tmp_path):
    path = folder(tmp_path / "a", awq(), {"quant_method": "awq", "bits": 4, "zero_point": True})
    assert (inspect_checkpoint(path).method, the_layer(path).scheme) == ("awq", f"W4A16_ASYM g{G}")
    assert inspect_checkpoint(folder(tmp_path / "b", awq())).method == "awq"


def test_bitsandbytes(tmp_path):
    path = folder(tmp_path / "a", nf4(), {"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert (inspect_checkpoint(path).method, the_layer(path).scheme) == ("bitsandbytes", "nf4 g64")
    assert 4.5 <= the_layer(path).bits_per_weight < 4.6
    eight = {
        f"{NAME}.weight": torch.zeros(R, C, dtype=torch.int8),
        f"{NAME}.SCB": torch.zeros(R, dtype=torch.float32),
    }
    path = folder(tmp_path / "b", eight)
    assert inspect_checkpoint(path).method == "bitsandbytes" and the_layer(path).num_bits == 8


def test_fp8_blocks(tmp_path):
    tensors = {
        f"{NAME}.weight": torch.zeros(R, C).to(torch.float8_e4m3fn),
        f"{NAME}.weight_scale_inv": torch.zeros(1, 2),
    }
    path = folder(tmp_path, tensors, {"quant_method": "fp8", "activation_scheme": "dynamic"})
    assert inspect_checkpoint(path).method == "fp8"
    assert the_layer(path).scheme == "float8 block 128, inputs float8 dynamic"


def test_dense_beside_scales(tmp_path):
    tensors = {
        f"{NAME}.weight": torch.zeros(R, C, dtype=torch.bfloat16),
        f"{NAME}.weight_scale": torch.zeros(R, C // G, dtype=torch.bfloat16),
    }
    path = folder(tmp_path, tensors, compressed([{"targets": ["Linear"], "weights": INT4}]))
    assert the_layer(path).scheme == f"W4A16 g{G}" and the_layer(path).bits_per_weight > 16
    assert any("stored dense" in message for message in inspect_checkpoint(path).messages)


def test_unknown_method_is_named(tmp_path):
    found = inspect_checkpoint(folder(tmp_path, packed(), {"quant_method": "hqq"}))
    assert (found.method, found.layers) == ("hqq", ()) and "'hqq'" in found.messages[0]


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    import numpy

    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    data = numpy.zeros((R, C), dtype=numpy.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.attn_q.weight", gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", numpy.zeros(C, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for path in (file, tmp_path):
        found = inspect_checkpoint(path)
        (layer,) = found.layers
        assert (found.method, found.format, found.model_type) == ("gguf", "Q8_0", "llama")
        assert (layer.rows, layer.columns, layer.scheme, layer.bits_per_weight) == (R, C, "Q8_0", 8.5)
        assert found.parameters == R * C + C and is_quantized(path) == "gguf"
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"several GGUF models.*m\.gguf"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"other\.gguf: not a GGUF file"):
        inspect_checkpoint(tmp_path / "other.gguf")


def test_unfinished_run(tmp_path):
    (tmp_path / ".bitpress").mkdir()
    (tmp_path / ".bitpress" / "journal.jsonl").write_text("{}\n")
    found = inspect_checkpoint(tmp_path)
    assert (found.method, found.finished, found.messages) == ("unfinished", False, (UNFINISHED,))
    with pytest.raises(CheckpointError, match="run the same command again"):
        is_quantized(tmp_path)
    assert inspect_checkpoint(folder(tmp_path, {})).finished  # config.json comes last


def test_names_are_only_hints(tmp_path):
    path = folder(tmp_path / "Model-7B-AWQ", {})
    assert is_quantized(path) is None and "name says awq" in inspect_checkpoint(path).messages[0]
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert inspect_checkpoint(path).method == is_quantized(path) == "awq"  # nothing else can say it
    hints = {"o/m-GPTQ": "gptq", "o/m-GPTQ-Int4": "gptq", "o/m-GGUF": "gguf", "o/m-8bit": "bitsandbytes", "o/m": None}
    assert {name: is_quantized(name) for name in hints} == hints


@pytest.mark.parametrize("wrap", [dict, lambda c: SimpleNamespace(to_dict=lambda: c)], ids=["dict", "object"])
def test_is_quantized_reads_configurations(wrap):
    assert is_quantized(wrap({"model_type": "llama"})) is None
    assert is_quantized(wrap({"quantization_config": {"quant_method": "gptq"}})) == "gptq"
    assert is_quantized(wrap({"text_config": {"quantization_config": {"quant_method": "awq"}}})) == "awq"
    assert is_quantized(wrap({"quantization_config": {"load_in_8bit": True}})) == "bitsandbytes"


def test_faults_name_the_place_and_the_remedy(tmp_path):
    with pytest.raises(CheckpointError, match="no such model folder"):
        inspect_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        inspect_checkpoint(tmp_path)
    path = folder(tmp_path / "stage_one", {})
    with pytest.raises(CheckpointError, match="did you mean a folder in it: stage_one"):
        inspect_checkpoint(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    for cut in (whole[:-2], whole[:20], b""):
        (path / "model.safetensors").write_bytes(cut)
        with pytest.raises(CheckpointError, match=r"stage_one.model\.safetensors"):
            inspect_checkpoint(path)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        inspect_checkpoint(path)


def test_half_a_linear_and_a_bad_target(tmp_path):
    tensors = packed()
    del tensors[f"{NAME}.weight_scale"]
    with pytest.raises(CheckpointError, match=f"'{NAME}' is not a whole quantized linear"):
        inspect_checkpoint(folder(tmp_path, tensors, compressed([{"targets": ["Linear"], "weights": INT4}])))
    with pytest.raises(CheckpointError, match="not a regular expression"):
        inspect_checkpoint(folder(tmp_path, packed(), compressed([{"targets": ["re:*"], "weights": INT4}])))


def test_table_groups_many_layers(tmp_path):
    names = [f"a.{i}.{kind}" for i in range(3) for kind in ("q_proj", "v_proj")]
    tensors = {k: v for name in names for k, v in packed(name).items()}
    found = inspect_checkpoint(folder(tmp_path, tensors, compressed([{"targets": ["Linear"], "weights": INT4}])))

    def text(limit):
        console = Console(width=200, file=None, record=True, quiet=False)
        with console.capture() as captured:
            console.print(inspection_table(found, limit))
        return captured.get()

    assert "6 layers W4A16 g128" in text(5) and "a.1.q_proj" not in text(5)
    assert all(name in text(None) and name in text(6) for name in names)
