"""The W4A16 one-shot script of the first generation of such tools runs as it is: only names are replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from bitpress.checkpoint import Source
from conftest import build
from helpers import client, conversations, logits, make_tokenizer


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the model `meta/tiny-llama` and the data `hub/ultrachat`, and the process in it."""
    monkeypatch.chdir(tmp_path)
    model = build("llama", torch.bfloat16, hidden_size=128, intermediate_size=256)
    model.generation_config.max_length = 77
    model.save_pretrained("meta/tiny-llama")
    make_tokenizer(Path("meta/tiny-llama"))
    Path("hub/ultrachat/data").mkdir(parents=True)
    Dataset.from_list(conversations(600)).to_parquet("hub/ultrachat/data/train_sft-00000-of-00001.parquet")
    return tmp_path


def test_the_script(workplace):
    # fmt: off
    from transformers import AutoTokenizer

    from bitpress.transformers import SparseAutoModelForCausalLM

    MODEL_ID = "meta/tiny-llama"
    model = SparseAutoModelForCausalLM.from_pretrained(
        MODEL_ID, device_map="auto", torch_dtype="auto",
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)

    from datasets import load_dataset

    NUM_CALIBRATION_SAMPLES=512
    MAX_SEQUENCE_LENGTH=2048

    # Load dataset.
    ds = load_dataset("hub/ultrachat", split="train_sft")
    ds = ds.shuffle(seed=42).select(range(NUM_CALIBRATION_SAMPLES))

    # Preprocess the data into the format the model is trained with.
    def preprocess(example):
        return {"text": tokenizer.apply_chat_template(example["messages"], tokenize=False,)}
    ds = ds.map(preprocess)

    # Tokenize the data (the chat template has already added the special tokens).
    def tokenize(sample):
        return tokenizer(sample["text"], padding=False, max_length=MAX_SEQUENCE_LENGTH, truncation=True, add_special_tokens=False)  # noqa: E501
    ds = ds.map(tokenize, remove_columns=ds.column_names)

    from bitpress.modifiers.quantization import GPTQModifier
    from bitpress.transformers import oneshot

    # Configure the quantization algorithm to run.
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])

    before = {n: p.detach().clone() for n, p in model.named_parameters()}  # for the checks below

    # Apply quantization.
    oneshot(
        model=model, dataset=ds,
        recipe=recipe,
        max_seq_length=MAX_SEQUENCE_LENGTH,
        num_calibration_samples=NUM_CALIBRATION_SAMPLES,
    )

    # Save to disk compressed.
    SAVE_DIR = MODEL_ID.split("/")[1] + "-W4A16-G128"
    model.save_pretrained(SAVE_DIR, save_compressed=True)
    tokenizer.save_pretrained(SAVE_DIR)
    # fmt: on

    folder = workplace / "tiny-llama-W4A16-G128"
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.endswith("_proj.weight")}
    assert len(changed) == 2 * 7

    # what is on disk is packed int4 in groups of 128
    written = Source(folder)
    assert {n.removesuffix("_packed") for n in written.tensors if n.endswith("_packed")} == changed
    assert written.spec("model.layers.0.mlp.down_proj.weight_packed")[1] == (128, 256 // 8)
    assert written.spec("model.layers.0.mlp.down_proj.weight_scale") == (torch.bfloat16, (128, 2))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"] == {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False,
        },
        "format": "pack-quantized",
    }  # fmt: skip

    # all 512 rows have calibrated, each as it is
    tokens = sum(len(row) for row in ds["input_ids"])
    report = json.loads((folder / "report.json").read_text())
    assert {row["tokens"] for row in report["layers"]} == {tokens}
    assert report["data"]["sequences"] == 512 and not report["data"]["packed"]

    # transformers loads it, and computes what the model in memory does
    loaded = client(folder)
    assert loaded.dtype == torch.bfloat16 == model.dtype
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generation_config.max_length == 77
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == tokenizer.chat_template
    assert SparseAutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
