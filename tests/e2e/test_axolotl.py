"""The plugin for Axolotl, driven as Axolotl drives it, with transformers' own Trainer."""

from __future__ import annotations

import importlib

import pytest
import torch
import yaml
from pydantic import ValidationError
from transformers import Trainer, TrainingArguments

from bitpress import ConfigError, NumericsError, PlanError, RecipeError, oneshot
from bitpress.data.training import Collate, load_training
from bitpress.math.masks import Structure, holds
from conftest import build, token_rows

CONFIG = """
base_model: out/sparsity_stage
plugins:
  - bitpress.axolotl.BitpressPlugin
bitpress:
  recipe:
    finetuning_stage:
      finetuning_modifiers:
        ConstantPruningModifier:
          targets: ['re:.*_proj.weight']
          start: 0
"""
PRUNE = {"MagnitudePruningModifier": {"mask_structure": "2:4", "ignore": ["lm_head"]}}


def plugin_of(cfg):
    """As Axolotl finds it: module and class by the name in the YAML."""
    module, _, name = cfg["plugins"][0].rpartition(".")
    made = getattr(importlib.import_module(module), name)()
    arguments = made.get_input_args().rpartition(".")
    keys = getattr(importlib.import_module(arguments[0]), arguments[2])
    assert keys(bitpress=cfg["bitpress"]).bitpress.recipe == cfg["bitpress"]["recipe"]
    return made


def trainer_of(model, folder, **options):
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1, report_to="none",
        save_strategy="steps", save_steps=2, use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    data = load_training(token_rows(24))
    return Trainer(model, arguments, train_dataset=data, data_collator=Collate(0))


def run(cfg, model, folder, **options):
    made = plugin_of(cfg)
    made.pre_model_load(cfg)
    trainer = trainer_of(model, folder, **options)
    for callback in made.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    return trainer


def test_zeros_stay_in_its_training(tmp_path):
    model = oneshot(build("llama"), None, PRUNE)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = run(yaml.safe_load(CONFIG), model, tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.1)
    trainer.train()
    for name, p in model.named_parameters():
        if name.endswith("_proj.weight"):
            assert holds(p, Structure(2, 4)) and not (p[before[name] == 0] != 0).any()
            assert not torch.equal(p, before[name])
    # a later start of the same training, from its checkpoint
    again = oneshot(build("llama"), None, PRUNE)
    run(yaml.safe_load(CONFIG), again, tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.1).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_weight_that_comes_back_is_told(tmp_path, monkeypatch):
    from bitpress.training.masks import Masks

    monkeypatch.setattr(Masks, "attach", lambda self, model, optimizer: None)
    monkeypatch.setattr(Masks, "cut", lambda self: None)
    model = oneshot(build("llama"), None, PRUNE)
    with pytest.raises(NumericsError, match="is not 2:4 any more after training"):
        run(yaml.safe_load(CONFIG), model, tmp_path).train()


def test_faults(tmp_path):
    cfg = yaml.safe_load(CONFIG)
    with pytest.raises(ConfigError, match=r"bitpress\.recipe: missing"):
        plugin_of(cfg).pre_model_load({"plugins": cfg["plugins"]})
    asked = {"bitpress": cfg["bitpress"] | {"save_compressed": True}}
    with pytest.raises(ConfigError, match=r"bitpress\.save_compressed: Axolotl writes plain weights"):
        plugin_of(cfg).pre_model_load(asked)
    with pytest.raises(ValidationError, match="recipy"):
        plugin_of(cfg | {"bitpress": cfg["bitpress"] | {"recipy": 1}})
    with pytest.raises(ConfigError, match="adapter: lora"):
        plugin_of(cfg).pre_model_load(cfg | {"adapter": "lora"})
    wrong = yaml.safe_load(CONFIG.replace("ConstantPruningModifier", "ConstantPruninModifier"))
    with pytest.raises(RecipeError, match="Did you mean 'ConstantPruningModifier'"):
        plugin_of(wrong).pre_model_load(wrong)
    with pytest.raises(RecipeError, match="the recipe has 0 training stages"):
        plugin_of(cfg).pre_model_load({"bitpress": {"recipe": PRUNE}})
    missing = yaml.safe_load(CONFIG.replace("_proj.weight", "_prj.weight"))
    with pytest.raises(PlanError, match="matches no linear"):
        run(missing, oneshot(build("llama"), None, PRUNE), tmp_path)
    with pytest.raises(PlanError, match="no zeros to keep"):
        run(cfg, build("llama"), tmp_path)
