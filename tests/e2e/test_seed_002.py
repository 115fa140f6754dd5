"""The whole staged recipe in one call, and its result compressed later, as the oldest example has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_seed_000 import EXAMPLES, workplace  # noqa: F401  a fixture

from bitpress import oneshot
from bitpress.math.masks import Structure, holds
from helpers import assert_same_tensors, client, tensors

OPTIONS = {
    "max_seq_length": 64, "num_calibration_samples": 16,
    "splits": {"calibration": "train_gen[:20%]", "train": "train_gen"},
    "num_train_epochs": 0.5, "learning_rate": 1e-3, "per_device_train_batch_size": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", ["2of4_w4a16_run-types_recipe.yaml", "2of4_w4a16_group-128_recipe.yaml"])
def test_apply_then_compress(name, workplace):  # noqa: F811
    from bitpress.transformers import SparseAutoModelForCausalLM, apply

    output_dir, compressed_output_dir = "uncompressed", "compressed"
    apply(model="tiny/llama", dataset="ultrachat", recipe=name, output_dir=output_dir, save_compressed=False, **OPTIONS)
    # fmt: off
    model = SparseAutoModelForCausalLM.from_pretrained(output_dir, torch_dtype=torch.bfloat16)
    model.save_pretrained(compressed_output_dir, save_compressed=True)
    # fmt: on
    stages = ("sparsity_stage", "finetuning_stage", "quantization_stage")
    for stage in stages:
        assert (Path(output_dir) / stage / "config.json").is_file()
    dense = tensors(Path(output_dir))
    assert "model.layers.0.mlp.up_proj.weight_scale" in dense and "model.layers.0.mlp.up_proj.weight" in dense
    assert json.loads(Path(compressed_output_dir, "config.json").read_text())["quantization_config"]["format"] == (
        "pack-quantized"
    )
    # the same codes as compressing at once: the last stage alone, from the same checkpoint
    oneshot(
        Path(output_dir) / stages[1], "ultrachat", EXAMPLES / name, stage=stages[2], output_dir="at_once",
        **{k: OPTIONS[k] for k in ("max_seq_length", "num_calibration_samples", "splits")},
    )  # fmt: skip
    assert_same_tensors(tensors(Path("at_once") / stages[2]), tensors(Path(compressed_output_dir)))
    for key, weight in client(Path(compressed_output_dir)).state_dict().items():
        if key.endswith("_proj.weight"):
            assert holds(weight, Structure(2, 4)), key


def test_pruning_and_training_by_turns(workplace):  # noqa: F811
    from bitpress import compress

    made = compress("tiny/llama", "ultrachat", "alternating_recipe.yaml", output_dir="out", **OPTIONS)
    report = json.loads(Path("out/report.json").read_text())
    assert list(dict.fromkeys(row["stage"] for row in report["layers"])) == [
        "prune1_stage", "train1_stage", "prune2_stage", "train2_stage",
    ]  # fmt: skip
    for stage, share in (("prune1", 0.5), ("train1", 0.5), ("prune2", 0.7), ("train2", 0.7)):
        found = tensors(Path(f"out/{stage}_stage"))
        for name, weight in found.items():
            if name.endswith("_proj.weight"):
                assert float((weight == 0).float().mean()) == pytest.approx(share, abs=0.002), (stage, name)
    assert_same_tensors(tensors(Path("out")), tensors(Path("out/train2_stage")))
    kept = (tensors(Path("out/prune2_stage"))[n] == 0 for n in found if n.endswith("_proj.weight"))
    assert all(bool((found[n][z] == 0).all()) for n, z in zip((n for n in found if n.endswith("_proj.weight")), kept))  # noqa: B905
    assert made.load().config.model_type == "llama"
    shutil.rmtree("out/train2_stage")  # the copy stands alone
    assert tensors(Path("out"))
