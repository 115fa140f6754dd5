"""The script of the staged 2:4 example, stage by stage, runs as it is: only names are replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from bitpress.math.masks import Structure, holds
from conftest import build
from helpers import client, conversations, make_tokenizer, tensors

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a model, the data `ultrachat` with its splits, and the example's recipes; the process in it."""
    monkeypatch.chdir(tmp_path)
    build("llama", torch.bfloat16, hidden_size=128, intermediate_size=256).save_pretrained("tiny/llama")
    make_tokenizer(Path("tiny/llama"))
    Path("ultrachat/data").mkdir(parents=True)
    Dataset.from_list(conversations(160)).to_parquet("ultrachat/data/train_gen-00000-of-00001.parquet")
    for file in EXAMPLES.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["2of4_w4a16_recipe.yaml", "2of4_w4a16_group-128_recipe.yaml"])
def test_the_script(name, workplace):
    # fmt: off
    from pathlib import Path

    import torch
    from loguru import logger  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bitpress import oneshot, train

    # load the model in as bfloat16 to save on memory and compute
    model_stub = "tiny/llama"
    model = AutoModelForCausalLM.from_pretrained(model_stub, torch_dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model_stub)

    dataset = "ultrachat"

    # Select the recipe for 2 of 4 sparsity and 4-bit activation quantization
    recipe = name

    # save location of quantized model
    output_dir = "output_llama7b_2of4_w4a16_channel"
    output_path = Path(output_dir)

    # set dataset config parameters
    splits = {"calibration": "train_gen[:5%]", "train": "train_gen"}
    max_seq_length = 512
    num_calibration_samples = 512

    # set training parameters for finetuning
    num_train_epochs = 0.01
    logging_steps = 500
    save_steps = 5000
    gradient_checkpointing = True  # saves memory during training
    learning_rate = 0.0001
    bf16 = False  # using full precision for training
    lr_scheduler_type = "cosine"
    warmup_ratio = 0.1
    preprocessing_num_workers = 8

    # 1. Oneshot sparsification: apply pruning
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        splits=splits,
        num_calibration_samples=num_calibration_samples,
        preprocessing_num_workers=preprocessing_num_workers,
        output_dir=output_dir,
        stage="sparsity_stage",
    )

    # 2. Sparse fine-tuning: improve accuracy on pruned model
    train(
        model=output_path / "sparsity_stage",
        dataset=dataset,
        recipe=recipe,
        splits=splits,
        num_calibration_samples=num_calibration_samples,
        preprocessing_num_workers=preprocessing_num_workers,
        bf16=bf16,
        max_seq_length=max_seq_length,
        num_train_epochs=num_train_epochs,
        logging_steps=logging_steps,
        save_steps=save_steps,
        gradient_checkpointing=gradient_checkpointing,
        learning_rate=learning_rate,
        lr_scheduler_type=lr_scheduler_type,
        warmup_ratio=warmup_ratio,
        output_dir=output_dir,
        stage="finetuning_stage",
    )

    # 3. Oneshot quantization: compress model weights to lower precision
    quantized_model = oneshot(
        model=output_path / "finetuning_stage",
        dataset=dataset,
        recipe=recipe,
        splits=splits,
        num_calibration_samples=num_calibration_samples,
        preprocessing_num_workers=preprocessing_num_workers,
        output_dir=output_dir,
        stage="quantization_stage",
    )
    # skip_sparsity_compression_stats is set to False
    # to account for sparsity in the model when compressing
    quantized_model.save_pretrained(
        f"{output_dir}/quantization_stage", skip_sparsity_compression_stats=False
    )
    tokenizer.save_pretrained(f"{output_dir}/quantization_stage")
    # fmt: on

    trained = output_path / "finetuning_stage"
    for stage in ("sparsity_stage", "finetuning_stage", "quantization_stage"):
        here = output_path / stage
        for file in ("config.json", "generation_config.json", "recipe.yaml", "report.json", "tokenizer.json"):
            assert (here / file).is_file(), (stage, file)
        assert AutoTokenizer.from_pretrained(here).chat_template
        AutoModelForCausalLM.from_pretrained(here)
    assert (trained / "trainer_state.json").is_file() and list(trained.glob("checkpoint-*"))
    assert json.loads((trained / "train_results.json").read_text())["train_loss"] > 0
    pruned, after = tensors(output_path / "sparsity_stage"), tensors(trained)
    settings = json.loads((output_path / "quantization_stage/config.json").read_text())["quantization_config"]
    weights = settings["config_groups"]["group_0"]["weights"]
    assert settings["format"] == "pack-quantized"
    assert weights["strategy"] == ("group" if "group" in name else "channel")
    final = client(output_path / "quantization_stage").state_dict()
    for key in after:
        if key.endswith("_proj.weight"):
            for weight in (pruned[key], after[key], final[key]):
                assert holds(weight, Structure(2, 4)), key
            assert not ((pruned[key] == 0) & (after[key] != 0)).any()
            assert not ((after[key] == 0) & (final[key] != 0)).any()
