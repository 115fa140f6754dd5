"""Runs into GGUF and bitsandbytes: what clients of these packages read, and what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitpress import NumericsError, PlanError, RecipeError, convert, oneshot
from bitpress.inspection import inspect_checkpoint
from bitpress.loading import load_model
from bitpress.modifiers.quantization import BitsAndBytesModifier, QuantizationModifier
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build, save, token_rows
from helpers import assert_same_tensors, assert_told_alike, logits, make_tokenizer, tensors


def byte_pairs(folder):
    """A tokenizer of byte pairs with 96 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    letters = [chr(c) for c in range(33, 122)] + ["Ġ"]
    vocab = {t: i for i, t in enumerate([*special, *letters, "th", "the", "Ġthe"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e"), ("Ġ", "the")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save(build(request.param, torch.bfloat16), folder)
    return byte_pairs(folder)


def rtn(scheme):
    return QuantizationModifier(scheme=scheme, group_size=32, ignore=["lm_head"])


@pytest.mark.parametrize(("scheme", "kind"), [("W4A16", "Q4_0"), ("W8A16", "Q8_0"), ("W4A16_ASYM", "Q4_1")])
def test_gguf_has_the_weights_of_the_packed_checkpoint(base, tmp_path, scheme, kind):
    gguf = pytest.importorskip("gguf")
    packed = oneshot(base, None, rtn(scheme), output_dir=tmp_path / "packed").folder
    made = oneshot(base, None, rtn(scheme), output_dir=tmp_path / "made", format="gguf").folder
    turned = convert(packed, tmp_path / "turned", format="gguf").folder
    data = [{t.name: t.data.tobytes() for t in gguf.GGUFReader(d / "model.gguf").tensors} for d in (made, turned)]
    assert data[0] == data[1]
    assert not list(made.glob("*.safetensors")) and (made / "config.json").is_file()
    found = inspect_checkpoint(made)
    assert (found.method, found.format, len(found.layers)) == ("gguf", kind, 14)
    expected, read = logits(load_model(packed, "bfloat16")), logits(load_model(made, "bfloat16"))
    if kind == "Q4_1":
        assert torch.allclose(read, expected, atol=0.1)
    else:
        assert torch.equal(read, expected)
    assert torch.equal(logits(SparseAutoModelForCausalLM.from_pretrained(made)), read)
    assert torch.equal(logits(load_model(made / "model.gguf", "bfloat16")), read)


def test_gguf_of_a_dense_model_and_its_metadata(base, tmp_path):
    gguf = pytest.importorskip("gguf")
    folder = convert(base, tmp_path / "out", format="gguf").folder
    reader = gguf.GGUFReader(folder / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = json.loads((base / "config.json").read_text())
    arch = fields["general.architecture"]
    assert arch == config["model_type"] and fields[f"{arch}.block_count"] == 2
    assert fields["tokenizer.ggml.tokens"][95] == "Ġthe" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.merges"] == ["t h", "th e", "Ġ the"]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["token_embd.weight"] == "F16" and kinds["output_norm.weight"] == "F32"
    assert torch.equal(logits(load_model(folder, "bfloat16")), logits(load_model(base, "bfloat16")))


def test_what_gguf_cannot_hold(tmp_path):
    pytest.importorskip("gguf")
    gemma = byte_pairs(save(build("gemma2", torch.bfloat16), tmp_path / "gemma"))
    with pytest.raises(PlanError, match="'gemma2' is not written, only llama, mistral, qwen2, qwen3"):
        oneshot(gemma, None, rtn("W4A16"), output_dir=tmp_path / "out", format="gguf")
    words = save(build("llama", torch.bfloat16), tmp_path / "words")
    with pytest.raises(PlanError, match=r"no tokenizer\.json"):
        oneshot(words, None, rtn("W4A16"), output_dir=tmp_path / "out", format="gguf")
    make_tokenizer(words)
    with pytest.raises(PlanError, match="only byte pairs"):
        oneshot(words, None, rtn("W4A16"), output_dir=tmp_path / "out", format="gguf")
    long = byte_pairs(save(build("llama"), tmp_path / "long"))
    with pytest.raises(PlanError, match="this model's are float32"):
        oneshot(long, None, rtn("W4A16"), output_dir=tmp_path / "out", format="gguf")
    with pytest.raises(PlanError, match="written from a model folder"):
        oneshot(build("llama", torch.bfloat16), None, rtn("W4A16"), format="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "keys", [{}, {"quant_type": "fp4", "double_quant": False, "quant_storage": "bfloat16", "blocksize": 128}]
)
def test_transformers_reads_bitsandbytes_with_no_configuration_given(base, tmp_path, keys):
    functional = pytest.importorskip("bitsandbytes.functional")
    modifier = BitsAndBytesModifier(ignore=["lm_head"], compute_dtype="float16", **keys)
    folder = oneshot(base, None, modifier, output_dir=tmp_path / "out").folder
    kind = keys.get("quant_type", "nf4")
    found = inspect_checkpoint(folder)
    assert (found.method, found.format, len(found.layers)) == ("bitsandbytes", kind, 14)
    assert_told_alike(folder)
    report = json.loads((folder / "report.json").read_text())
    assert report["totals"]["output_bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours, dense = load_model(folder, "bfloat16"), load_model(base, "bfloat16")
    for name, module in ours.named_modules():
        if not name.endswith("_proj"):
            continue
        layer = theirs.get_submodule(name)
        assert layer.compute_dtype == torch.float16
        assert torch.equal(functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), module.weight)
        own = dense.get_submodule(name).weight
        packed, state = functional.quantize_4bit(
            own.data, quant_type=kind, blocksize=keys.get("blocksize", 64), compress_statistics=not keys
        )
        assert torch.equal(functional.dequantize_4bit(packed, state), module.weight)
    out = convert(folder, tmp_path / "dense", format="dense").folder
    again = json.loads((out / "report.json").read_text())["again"]
    assert again == f"bitpress convert {folder} {tmp_path / 'dense'}-again --format dense"
    assert torch.equal(logits(load_model(out, "bfloat16")), logits(ours))
    ours.save_pretrained(tmp_path / "again")
    assert inspect_checkpoint(tmp_path / "again").method == "dense"
    with pytest.raises(PlanError, match="NF4 and FP4 are in no other format"):
        convert(folder, tmp_path / "gptq", format="gptq")


def test_what_bitsandbytes_is_not_for(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = oneshot(base, None, scheme="NF4", group_size=128, output_dir=tmp_path / "out").folder
    assert {x.group_size for x in inspect_checkpoint(out).layers} == {128}
    with pytest.raises(PlanError, match="holds NF4 and FP4 only, not int4: use --scheme NF4"):
        oneshot(base, None, rtn("W4A16"), output_dir=tmp_path / "x", format="bitsandbytes")
    with pytest.raises(PlanError, match="NF4 and FP4 are in no other format"):
        convert(out, tmp_path / "x", format="compressed-tensors")
    with pytest.raises(PlanError, match="holds integers only, not nf4"):
        oneshot(base, None, scheme="NF4", output_dir=tmp_path / "x", format="gptq")
    with pytest.raises(PlanError, match="TuneModifier: codes of bitsandbytes"):
        oneshot(base, token_rows(), {"BitsAndBytesModifier": {"ignore": "lm_head"}, "TuneModifier": {"iters": 1}},
                output_dir=tmp_path / "x")  # fmt: skip
    with pytest.raises(PlanError, match="written from a model folder"):
        oneshot(build("llama", torch.bfloat16), None, scheme="NF4")
    with pytest.raises(PlanError, match="packed only"):
        oneshot(base, None, scheme="NF4", output_dir=tmp_path / "x", save_compressed=False)
    with pytest.raises(RecipeError, match=r"blocksize: must be one of 32.*, got 48"):
        BitsAndBytesModifier(blocksize=48)
    with pytest.raises(RecipeError, match="scheme: is not for bitsandbytes; use quant_type; drop it"):
        BitsAndBytesModifier(scheme="W4A16")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("scheme", [None, "W4A16", "W4A16_ASYM"])
def test_two_of_four_at_the_size_of_its_mask(tmp_path, scheme):
    base = byte_pairs(save(build("llama", torch.bfloat16), tmp_path / "base"))
    recipe = {"SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4", "ignore": "lm_head"}}
    if scheme is not None:
        recipe["GPTQModifier"] = {"scheme": scheme, "group_size": 16, "ignore": "lm_head", "refine": 0}
    sizes = {"num_calibration_samples": 6, "max_seq_length": 24}
    plain = oneshot(base, token_rows(), recipe, output_dir=tmp_path / "plain", **sizes).folder
    small = oneshot(base, token_rows(), recipe, output_dir=tmp_path / "small", format="sparse-24", **sizes).folder
    again = convert(plain, tmp_path / "again", format="sparse-24").folder
    assert_same_tensors(tensors(again), tensors(small))
    bits = {None: 9.0, "W4A16": 3.0 + 1.0, "W4A16_ASYM": 3.0 + 1.5}[scheme]  # scales a 16th of bfloat16, zeros of int8
    assert inspect_checkpoint(small).bits_per_weight == pytest.approx(bits)
    notes = json.loads((small / "report.json").read_text())["notes"]
    assert any("only bitpress.transformers reads it" in note for note in notes)
    expected = logits(load_model(plain, "bfloat16"))
    assert torch.equal(logits(load_model(small, "bfloat16")), expected)
    assert torch.equal(logits(SparseAutoModelForCausalLM.from_pretrained(small)), expected)
    dense = convert(small, tmp_path / "dense", format="dense").folder
    assert torch.equal(logits(load_model(dense, "bfloat16")), expected)
    with pytest.raises(ValueError, match="no `quant_method`"):
        AutoModelForCausalLM.from_pretrained(small)


def test_what_is_not_pruned_is_not_stored_so(tmp_path):
    base = byte_pairs(save(build("llama", torch.bfloat16), tmp_path / "base"))
    with pytest.raises(PlanError, match="no linear is pruned 2:4"):
        convert(base, tmp_path / "x", format="sparse-24")
    four = oneshot(base, None, QuantizationModifier(scheme="W4A16", group_size=16, ignore=["lm_head"]),
                   output_dir=tmp_path / "four").folder  # fmt: skip
    with pytest.raises(PlanError, match="13 more: not 2:4"):
        convert(four, tmp_path / "x", format="sparse-24")
    with pytest.raises(NumericsError, match=r"model\.layers\.0\..*: is not 2:4"):
        oneshot(base, None, QuantizationModifier(scheme="W4A16", group_size=16, ignore=["lm_head"]),
                output_dir=tmp_path / "y", format="sparse-24")  # fmt: skip
