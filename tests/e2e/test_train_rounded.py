"""Quantization-aware training: what is trained is what is served, in every format."""

from __future__ import annotations

import json

import pytest
import torch

from bitpress import PlanError, apply, evaluate, oneshot, train
from bitpress.math.masks import Structure, holds
from bitpress.training.rounding import Roundings
from conftest import build, save
from helpers import assert_same_tensors, client, conversations, logits, make_tokenizer, tensors

BF16 = torch.bfloat16
FAST = {"max_seq_length": 32, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "num_train_epochs": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("rounded") / "base"
    make_tokenizer(save(build("llama", BF16, hidden_size=64, intermediate_size=128), place))
    return place


def qat(scheme, **keys):
    modifier = {"scheme": scheme, "ignore": ["lm_head"], **keys}
    return {"qat_stage": {"run_type": "train", "qat_modifiers": {"QuantizationModifier": modifier}}}


@pytest.mark.parametrize(
    ("scheme", "keys"),
    [
        ("W4A16", {"group_size": 32}),
        ("W4A16_ASYM", {"group_size": 32, "observer": "mse", "learn_scales": True}),
        ("W8A8", {"learn_scales": True}),
        ("FP8", {"observer": "mse"}),
        ("NVFP4", {}),
        ("MXFP4", {}),
    ],
)
def test_the_checkpoint_is_what_was_trained(scheme, keys, base, tmp_path, monkeypatch):
    seen = {}
    real = Roundings.remove

    def remove(self, solved):  # what the forward of training gives, just before
        model = seen["model"]
        if "logits" not in seen:
            model.eval()
            seen["logits"] = logits(model).float()
        real(self, solved)

    init = Roundings.__init__

    def start(self, model, sites):
        seen["model"] = model
        init(self, model, sites)

    monkeypatch.setattr(Roundings, "remove", remove)
    monkeypatch.setattr(Roundings, "__init__", start)
    train(base, conversations(40), qat(scheme, **keys), output_dir=tmp_path / "out", **FAST)
    found = tensors(tmp_path / "out")
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings["quantization_status"] == "compressed"
    assert not any("bitpress" in name for name in found)
    assert ("model.layers.0.mlp.up_proj.input_scale" in found) == (scheme == "FP8")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {row["method"] for row in report["layers"]} == {"lsq" if keys.get("learn_scales") else "qat"}
    if scheme in ("W4A16", "W4A16_ASYM", "W8A8"):  # rounds inputs as training did
        from transformers import AutoModelForCausalLM

        served = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=BF16).eval()
        # all but the quantized linears is rounded to bfloat16 when it is stored
        assert float((logits(served).float() - seen["logits"]).abs().mean()) < 0.05 * float(seen["logits"].abs().mean())
    one_shot = oneshot(base, conversations(8), qat_one_shot(scheme, keys), output_dir=tmp_path / "rounded",
                       max_seq_length=32, num_calibration_samples=8)  # fmt: skip
    assert tensors(one_shot.folder).keys() == found.keys()
    assert {n: (t.dtype, t.shape) for n, t in tensors(one_shot.folder).items()} == {
        n: (t.dtype, t.shape) for n, t in found.items()
    }


def qat_one_shot(scheme, keys):
    keys = {k: v for k, v in keys.items() if k != "learn_scales"}
    return {"QuantizationModifier": {"scheme": scheme, "ignore": ["lm_head"], **keys}}


@pytest.mark.parametrize("learn", [False, True])
def test_it_is_nearer_to_the_teacher_than_rounding_is(learn, base, tmp_path):
    rows = conversations(120)
    (tmp_path / "text.txt").write_text("\n".join(" ".join(m["content"] for m in r["messages"]) for r in rows))
    scheme = {"group_size": 32, "learn_scales": learn}
    oneshot(base, None, qat_one_shot("W3A16", scheme), output_dir=tmp_path / "rounded")
    options = FAST | {"num_train_epochs": 4, "mask_prompts": False}
    train(base, rows, qat("W3A16", **scheme), output_dir=tmp_path / "trained", distill_teacher=base, **options)
    kl = {
        name: evaluate(base, tmp_path / name, text=tmp_path / "text.txt", windows=4, length=64).kl
        for name in ("rounded", "trained")
    }
    assert kl["trained"] < 0.8 * kl["rounded"]


def test_pruned_then_trained_with_zeros_and_rounding(base, tmp_path):
    recipe = {
        "sparsity_stage": {
            "m_modifiers": {"MagnitudePruningModifier": {"mask_structure": "2:4", "ignore": ["lm_head"]}}
        },
        "qat_stage": {
            "run_type": "train",
            "m_modifiers": {
                "ConstantPruningModifier": {"targets": "__ALL__"},
                "QuantizationModifier": {"scheme": "W4A16", "group_size": 32, "ignore": ["lm_head"]},
            },
        },
    }
    rows = conversations(40)
    apply(base, rows, recipe, output_dir=tmp_path / "out", **FAST)
    pruned = tensors(tmp_path / "out/sparsity_stage")
    final = client(tmp_path / "out")
    for name, weight in final.state_dict().items():
        if name.endswith("_proj.weight"):
            assert holds(weight, Structure(2, 4)) and not (weight[pruned[name] == 0] != 0).any()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {r["method"] for r in report["layers"] if r["stage"] == "qat_stage"} == {"masked+qat"}
    # in memory, in place
    model = build("llama", BF16, hidden_size=64, intermediate_size=128)
    apply(model, rows, recipe, output_dir=tmp_path / "memory", tokenizer=str(base), **FAST)
    assert_same_tensors(tensors(tmp_path / "memory"), tensors(tmp_path / "out"))
    assert torch.equal(logits(model), logits(final))
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tensors(tmp_path / "saved"), tensors(tmp_path / "out"))


def test_resume_with_learned_scales_and_ranges(base, tmp_path):
    from transformers import TrainerCallback

    class StopError(Exception):
        pass

    class Killer(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise StopError

    recipe = qat("W4A16", group_size=32, learn_scales=True)
    recipe["qat_stage"]["qat_modifiers"] = [
        {"QuantizationModifier": {"scheme": "W4A16", "group_size": 32, "targets": "re:.*mlp.*", "learn_scales": True}},
        {"QuantizationModifier": {"scheme": "FP8", "targets": "re:.*attn.*"}},
    ]
    options = FAST | {"save_steps": 2, "learning_rate": 1e-2}
    rows = conversations(60)
    train(base, rows, recipe, output_dir=tmp_path / "straight", **options)
    with pytest.raises(StopError):
        train(base, rows, recipe, output_dir=tmp_path / "out", callbacks=[Killer()], **options)
    train(base, rows, recipe, output_dir=tmp_path / "out", resume=True, **options)
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "straight"))


def test_faults(base, tmp_path):
    rows = conversations(8)
    for keys, words in (
        ({"scheme": "MXFP4", "learn_scales": True}, "learn_scales: MXFP4 g32: its scales are powers of two"),
        ({"scheme": "FP8", "learn_scales": True}, "linears that run as one product share its scale"),
        ({"scheme": "W4A16", "group_size": 24}, "64 input columns are not divisible by group_size 24"),
    ):
        with pytest.raises(PlanError, match=words):
            train(base, rows, qat(**keys), output_dir=tmp_path / "out", **FAST)
    late = {**qat("W4A16", group_size=32), "last_stage": {
        "run_type": "train", "m_modifiers": {"ConstantPruningModifier": {}}}}  # fmt: skip
    with pytest.raises(PlanError, match="last_stage: 14 linears are quantized in an earlier stage, and training would"):
        apply(base, rows, late, output_dir=tmp_path / "out", **FAST)
