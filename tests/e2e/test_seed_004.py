"""The snippets of a guide to quantization, for bitpress: names replaced, models and data on this machine."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitpress import PlanError, inspect_checkpoint, oneshot
from bitpress.modifiers.awq import AWQModifier
from bitpress.modifiers.quantization import GPTQModifier
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build
from helpers import WORDS, client, conversations, logits, make_tokenizer

MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders by the names that model and data have on the hub."""
    place = tmp_path_factory.mktemp("seed_004")
    model = build("llama", torch.bfloat16, hidden_size=128, intermediate_size=256)
    model.save_pretrained(place / MODEL)
    make_tokenizer(place / MODEL)
    texts = [{"text": " ".join(WORDS[(7 * i + j) % 90] for j in range(60))} for i in range(200)]
    for name, file, rows in (
        ("HuggingFaceH4/ultrachat_200k", "data/train_sft-00000-of-00001.parquet", conversations(300)),
        ("mit-han-lab/pile-val-backup", "validation.parquet", texts),
    ):
        (place / name / file).parent.mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(place / name / file)
    (place / "allenai/c4/en").mkdir(parents=True)
    for shard in ("c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"):
        (place / "allenai/c4/en" / shard).write_bytes(gzip.compress("\n".join(map(json.dumps, texts)).encode()))
    return place


@pytest.fixture
def place(hub, monkeypatch):
    monkeypatch.chdir(hub)
    return hub


def scheme_of(folder):
    (group,) = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    return {k: group["weights"][k] for k in ("num_bits", "symmetric", "strategy", "group_size")}


def test_gptq_by_its_modifier(place):
    # fmt: off
    # Load the base model
    model_id = "meta-llama/Meta-Llama-3-8B-Instruct"
    model = AutoModelForCausalLM.from_pretrained(model_id, torch_dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_id)

    # Define a GPTQ recipe: 4-bit weights (W4A16), target Linear layers, skip the LM head
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])

    # Apply GPTQ using a small calibration dataset (internally sampled by your script/flags)
    oneshot(model=model, dataset="HuggingFaceH4/ultrachat_200k", recipe=recipe)

    # Save the compressed checkpoint
    save_dir = "Meta-Llama-3-8B-Instruct-W4A16-G128"
    model.save_pretrained(save_dir, save_compressed=True)
    tokenizer.save_pretrained(save_dir)
    # fmt: on

    folder = place / save_dir
    assert scheme_of(folder) == {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 128}
    data = json.loads((folder / "report.json").read_text())["data"]
    assert data["split"] == "train_sft" and data["tokens"] > 2000
    assert torch.equal(logits(client(folder)), logits(model))
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    # what is quantized is recognised, and not quantized again
    assert "W4A16" in str(inspect_checkpoint(folder))
    with pytest.raises(PlanError, match=r"is quantized already .*start from the full-precision model"):
        oneshot(folder, "HuggingFaceH4/ultrachat_200k", recipe, output_dir=place / "again")


def test_awq_with_zero_points(place):
    # fmt: off
    # Load model and tokenizer
    MODEL_ID = "meta-llama/Meta-Llama-3-8B-Instruct"
    model = AutoModelForCausalLM.from_pretrained(MODEL_ID, torch_dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_ID, trust_remote_code=True)

    # Define AWQ recipe: 4-bit weights (W4A16_ASYM), target Linear layers, skip LM head
    recipe = [AWQModifier(targets=["Linear"], scheme="W4A16_ASYM", ignore=["lm_head"])]

    # Apply AWQ with a small calibration set (dataset can be your own or a public one)
    oneshot(
        model=model,
        dataset="mit-han-lab/pile-val-backup",  # uses 'validation' split by default inside your script/flags
        recipe=recipe,
    )

    # Save compressed checkpoint
    SAVE_DIR = "Meta-Llama-3-8B-Instruct-awq-asym"
    model.save_pretrained(SAVE_DIR, save_compressed=True)
    tokenizer.save_pretrained(SAVE_DIR)
    # fmt: on

    folder = place / SAVE_DIR
    assert scheme_of(folder) == {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 128}
    report = json.loads((folder / "report.json").read_text())
    assert report["data"]["split"] == "validation" and len(report["layers"]) == 14
    assert torch.equal(logits(SparseAutoModelForCausalLM.from_pretrained(folder)), logits(model))


def test_gptq_in_one_step_into_a_checkpoint(place):
    """`GPTQConfig(bits=4, dataset="c4", group_size=128, sym=False)`: the original is not needed to load the result."""
    oneshot(MODEL, "c4", scheme="W4A16_ASYM", group_size=128, output_dir="llama-gptq", num_calibration_samples=16)
    folder = Path("llama-gptq")
    assert scheme_of(folder) == {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 128}
    assert json.loads((folder / "report.json").read_text())["data"]["source"] == "c4"
    report = json.loads((folder / "report.json").read_text())
    assert report["totals"]["mean_rel_error"] < 0.02
    assert torch.isfinite(logits(SparseAutoModelForCausalLM.from_pretrained(folder))).all()
    sizes = [sum(f.stat().st_size for f in Path(p).glob("*.safetensors")) for p in (MODEL, folder)]
    assert sizes[1] < 0.5 * sizes[0]
