"""What comes out of a run, in memory and on disk, in every form: all of them hold the same codes."""

from __future__ import annotations

import json

import pytest
import torch

from bitpress import PlanError, oneshot, plan
from bitpress.checkpoint import Source
from bitpress.cli import main
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build, save
from helpers import OPTIONS, W4, assert_same_tensors, bytes_of, client, config_of, logits, make_tokenizer, tensors

BF16 = torch.bfloat16


def group(bits, strategy, symmetric=True, size=None, targets=("Linear",), **more):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    return {"weights": weights | ({"group_size": size} if size else {}), "targets": list(targets), **more}


ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
SCHEMES = {
    "W4A16": {"scheme": "W4A16", "group_size": 16},
    "W8A16": {"scheme": "W8A16", "group_size": 16},
    "W4A16_ASYM": {"scheme": "W4A16_ASYM", "group_size": 16},
    "W8A16_ASYM": {"scheme": "W8A16_ASYM", "group_size": 16},
    "W8A8": {"scheme": "W8A8"},
    "int4 channel": {"config_groups": {"g": group(4, "channel")}},
    "int4 asym channel": {"config_groups": {"g": group(4, "channel", symmetric=False)}},
    "int4 tensor": {"config_groups": {"g": group(4, "tensor")}},
    "int8 asym tensor": {"config_groups": {"g": group(8, "tensor", symmetric=False)}},
    "W8A8 tensor": {"config_groups": {"g": group(8, "tensor", input_activations=ACTIVATIONS)}},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_packed_and_dense_hold_the_same_codes(name, tmp_path, rows):
    model = build("llama", BF16)
    wanted = {"GPTQModifier": {"ignore": ["lm_head"], **SCHEMES[name], "refine": 0}}
    returned = oneshot(model, rows, wanted, **OPTIONS)
    assert returned is model
    model.save_pretrained(tmp_path / "packed", save_compressed=True)
    model.save_pretrained(tmp_path / "dense", save_compressed=False)
    expected = logits(model)

    packed, dense = tensors(tmp_path / "packed"), tensors(tmp_path / "dense")
    quantized = [n.removesuffix("_scale") for n in packed if n.endswith("weight_scale")]
    assert len(quantized) == 2 * 7
    codes = [n if "W8A8" in name else n + "_packed" for n in quantized]
    assert all(packed[n].dtype == (torch.int8 if "W8A8" in name else torch.int32) for n in codes)
    for weight in quantized:
        assert dense[weight].dtype == BF16 and torch.equal(dense[weight], model.get_parameter(weight))
        assert torch.equal(dense[weight + "_scale"], packed[weight + "_scale"])
        assert (weight + "_zero_point" in packed) == ("asym" in name.lower())
    zeros = [dense[weight + "_zero_point"] for weight in quantized]  # transformers wants them of symmetric ones too
    assert any(bool(z.any()) for z in zeros) == ("asym" in name.lower())
    assert not any(n.endswith(("_packed", "_shape")) for n in dense)
    assert config_of(tmp_path / "packed")["quantization_config"]["quantization_status"] == "compressed"
    assert config_of(tmp_path / "dense")["quantization_config"]["quantization_status"] == "frozen"

    # compressing the dense form later is the same as compressing at once
    later = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(later), expected)
    later.save_pretrained(tmp_path / "later", save_compressed=True)
    assert_same_tensors(tensors(tmp_path / "later"), packed)
    assert config_of(tmp_path / "later")["quantization_config"] == config_of(tmp_path / "packed")["quantization_config"]

    # and so is packing what was packed; the folder's run writes the same from the start
    again = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    again.save_pretrained(tmp_path / "again", save_compressed=True)
    assert_same_tensors(tensors(tmp_path / "again"), packed)
    base = save(build("llama", BF16), tmp_path / "base")
    for compressed, same in ((True, packed), (False, dense)):
        out = tmp_path / f"streamed-{compressed}"
        oneshot(base, rows, wanted, output_dir=out, save_compressed=compressed, **OPTIONS)
        assert_same_tensors(tensors(out), same)


@pytest.mark.parametrize("name", ["W4A16", "W8A16", "W4A16_ASYM", "W8A8", "int4 channel", "int4 tensor"])
def test_both_forms_load_in_transformers(name, tmp_path, rows):
    model = build("llama", BF16)
    oneshot(model, rows, {"QuantizationModifier": {"ignore": ["lm_head"], **SCHEMES[name]}}, **OPTIONS)
    expected = logits(model)
    for compressed in (True, False):
        model.save_pretrained(tmp_path / str(compressed), save_compressed=compressed)
        loaded = client(tmp_path / str(compressed))
        for key, value in loaded.state_dict().items():
            if key.endswith("_proj.weight"):
                assert torch.equal(value, model.get_parameter(key)), key
        got = logits(loaded)
        if "8" not in name or (compressed and "W8A8" not in name):
            assert torch.equal(got, expected)
        else:  # the client rounds once more: activations to int8, dense weights in bfloat16 to codes
            assert (got - expected).float().norm() < 0.05 * expected.float().norm()


def test_int8_activations_are_dynamic_per_token(tmp_path, rows):
    model = build("llama", BF16)
    oneshot(model, rows, {"QuantizationModifier": {"scheme": "W8A8", "ignore": ["lm_head"]}}, output_dir=tmp_path / "o")
    config = config_of(tmp_path / "o")["quantization_config"]
    assert config["format"] == "int-quantized"
    (only,) = config["config_groups"].values()
    assert only["input_activations"] == ACTIVATIONS
    assert only["weights"]["strategy"] == "channel" and only["weights"]["num_bits"] == 8


def test_a_module_that_comes_from_no_folder(tmp_path, rows):
    model = build("llama")
    model.name_or_path = model.config._name_or_path = ""
    model.save_pretrained(tmp_path / "base")
    oneshot(model, rows, W4, **OPTIONS)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(client(tmp_path / "out")), logits(model))
    oneshot(tmp_path / "base", rows, W4, output_dir=tmp_path / "streamed", **OPTIONS)
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "streamed"))

    nameless = build("llama")
    del nameless.config._name_or_path
    del nameless.name_or_path
    oneshot(nameless, rows, W4, **OPTIONS)
    assert torch.equal(logits(nameless), logits(model))


def test_tied_embeddings_stay_tied(tmp_path, rows):
    model = build("llama_tied", BF16)
    base = save(model, tmp_path / "base")
    oneshot(base, rows, W4, output_dir=tmp_path / "streamed", **OPTIONS)
    oneshot(model, rows, W4, **OPTIONS)
    model.save_pretrained(tmp_path / "out")
    assert "lm_head.weight" not in Source(tmp_path / "out").tensors
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "streamed"))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    loaded = client(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(loaded), logits(model))
    later = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert later.lm_head.weight.data_ptr() == later.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_memory_equal_experts_from_a_folder(family, tmp_path, rows):
    model = build(family, BF16)
    kinds = {n: type(m) for n, m in model.named_modules()}
    base = save(model, tmp_path / "base")
    oneshot(base, rows, W4, output_dir=tmp_path / "streamed", **OPTIONS)
    oneshot(model, rows, W4, **OPTIONS)
    assert {n: type(m) for n, m in model.named_modules()} == kinds  # fused again
    model.save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense", save_compressed=False)
    assert_same_tensors(tensors(tmp_path / "packed"), tensors(tmp_path / "streamed"))
    SparseAutoModelForCausalLM.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "later")
    assert_same_tensors(tensors(tmp_path / "later"), tensors(tmp_path / "packed"))
    assert torch.equal(logits(client(tmp_path / "packed")), logits(model))
    for folder in ("packed", "streamed"):
        assert config_of(tmp_path / folder) == config_of(tmp_path / "packed")


def test_a_path_without_output_dir_gives_a_module(tmp_path, rows):
    base = save(build("llama", BF16), tmp_path / "base")
    before = sorted(f.name for f in tmp_path.iterdir())
    model = oneshot(base, rows, W4, **OPTIONS)
    assert isinstance(model, torch.nn.Module) and model.dtype == BF16
    assert sorted(f.name for f in tmp_path.iterdir()) == before
    model.save_pretrained(tmp_path / "out")
    oneshot(base, rows, W4, output_dir=tmp_path / "streamed", **OPTIONS)
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "streamed"))


def test_a_module_with_an_output_folder_is_written_too(tmp_path, rows):
    model = build("llama", BF16)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    returned = oneshot(model, rows, W4, tokenizer=tokenizer, output_dir=tmp_path / "out", **OPTIONS)
    assert returned is model
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "saved"))
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert torch.equal(logits(client(tmp_path / "out")), logits(model))

    # the same again, from the same weights, is read back instead of solved
    fresh = build("llama", BF16)
    assert oneshot(fresh, rows, W4, tokenizer=tokenizer, output_dir=tmp_path / "out", **OPTIONS) is fresh
    assert torch.equal(logits(fresh), logits(model))
    fresh.save_pretrained(tmp_path / "fresh")
    assert_same_tensors(tensors(tmp_path / "fresh"), tensors(tmp_path / "out"))


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
def test_only_weights_change_in_the_module(family, rows):
    model = build(family).train()
    model.base_model.eval()  # parts in another mode than the whole stay so
    modes = [m.training for m in model.modules()]
    objects = {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    oneshot(model, rows, W4, **OPTIONS)
    assert [m.training for m in model.modules()] == modes
    assert {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()} == objects
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_a_failed_run_restores_the_module_too(rows):
    model = build("mixtral").train()
    kinds = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(PlanError):
        oneshot(model, rows, {"GPTQModifier": {"scheme": "W4A16", "group_size": 24}}, **OPTIONS)
    assert {n: type(m) for n, m in model.named_modules()} == kinds and model.training


CASES = {
    "W4A16": ("llama", SCHEMES["W4A16"]),
    "W4A16_ASYM": ("llama", SCHEMES["W4A16_ASYM"]),
    "W8A8": ("llama", SCHEMES["W8A8"]),
    "int4 tensor asym": ("llama", {"config_groups": {"g": group(4, "tensor", symmetric=False)}}),
    "int3 channel": ("llama", {"config_groups": {"g": group(3, "channel")}}),
    "tied": ("llama_tied", SCHEMES["W4A16"]),
    "experts": ("mixtral", SCHEMES["W4A16"]),
    "biases": ("opt", SCHEMES["W4A16"]),
    "buffers": ("gpt_neox", SCHEMES["W4A16"]),
}


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_plan_knows_the_output_to_the_byte(case, compressed, tmp_path, monkeypatch):
    family, keys = CASES[case]
    base = save(build(family, BF16), tmp_path / "base")
    made = []
    real = plan.make
    monkeypatch.setattr(plan, "make", lambda *args, **options: [made.append(p := real(*args, **options)), p][1])
    wanted = {"QuantizationModifier": {"ignore": ["lm_head", "embed_out"], **keys}}
    oneshot(base, None, wanted, output_dir=tmp_path / "out", save_compressed=compressed)
    assert made[0].output_bytes == bytes_of(tmp_path / "out")
    in_memory = build(family, BF16)
    oneshot(in_memory, None, wanted, output_dir=tmp_path / "memory", save_compressed=compressed)
    assert made[1].output_bytes == bytes_of(tmp_path / "memory")


def test_two_groups_with_schemes_of_their_own(tmp_path, rows):
    wanted = {
        "GPTQModifier": {
            "ignore": ["lm_head"],
            "config_groups": {
                "attention": group(8, "channel", targets=["re:.*self_attn.*"]),
                "mlp": group(4, "group", size=16, targets=["re:.*mlp.*"]),
            },
        }
    }
    model = build("llama", BF16)
    oneshot(model, rows, wanted, output_dir=tmp_path / "out", **OPTIONS)
    config = config_of(tmp_path / "out")["quantization_config"]
    assert len(config["config_groups"]) == 2
    stored = Source(tmp_path / "out")
    assert stored.spec("model.layers.1.mlp.up_proj.weight_packed")[1] == (64, 32 // 8)
    assert stored.spec("model.layers.1.self_attn.q_proj.weight_packed")[1] == (32, 32 // 4)
    expected = logits(model)
    loaded = client(tmp_path / "out", one_scheme=False)
    for key, value in loaded.state_dict().items():
        if key.endswith("_proj.weight"):
            assert torch.equal(value, model.get_parameter(key)), key
    assert torch.equal(logits(loaded), expected)
    again = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors(tmp_path / "again"), tensors(tmp_path / "out"))


def test_the_command_line_writes_the_same(tmp_path, rows, monkeypatch, capsys):
    base = save(build("llama", BF16), tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    arguments = f"--scheme W4A16 --group-size 16 --dataset {tmp_path}/rows.jsonl --num-samples 12 --max-seq-length 32"
    line = f"bitpress oneshot {base} -o {tmp_path}/cli {arguments}"
    monkeypatch.setattr("sys.argv", line.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "checkpoint:" in capsys.readouterr().out
    whole = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
    oneshot(base, tmp_path / "rows.jsonl", whole, output_dir=tmp_path / "api", **OPTIONS)
    assert_same_tensors(tensors(tmp_path / "cli"), tensors(tmp_path / "api"))
