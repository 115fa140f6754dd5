"""Training stages: zeros that stay, kills, teachers, data, faults."""

from __future__ import annotations

import json
import multiprocessing
import time

import pytest
import torch
from transformers import TrainerCallback

from bitpress import ConfigError, DataError, NumericsError, PlanError, RecipeError, apply, oneshot, train
from bitpress.math.masks import Structure, holds
from bitpress.recipe import Recipe
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build, save, token_rows
from helpers import PLAIN, assert_same_tensors, conversations, logits, make_tokenizer, tensors

BF16 = torch.bfloat16
KEEP = {"ConstantPruningModifier": {"targets": ["re:.*_proj.weight"], "start": 0}}
PRUNE = {"MagnitudePruningModifier": {"mask_structure": "2:4", "ignore": ["lm_head"]}}
GPTQ = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"], **PLAIN}}
STAGES = {
    "sparsity_stage": {"sparsity_modifiers": PRUNE},
    "finetuning_stage": {"finetuning_modifiers": KEEP},
    "quantization_stage": {"quantization_modifiers": GPTQ},
}
FAST = {"max_seq_length": 32, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "num_train_epochs": 1}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A 2:4 model in bfloat16, beside the dense one."""
    place = tmp_path_factory.mktemp("train")
    make_tokenizer(save(build("llama", BF16), place / "base"))
    oneshot(place / "base", None, PRUNE, output_dir=place / "pruned")
    return place


def zeros(folder):
    return {n: t == 0 for n, t in tensors(folder).items() if n.endswith("_proj.weight")}


class Look(TrainerCallback):
    """Zeros of weights, gradients and moments before and after every step."""

    def __init__(self):
        self.steps = 0

    def _masks(self, model):
        return {n: p == 0 for n, p in model.named_parameters() if n.endswith("_proj.weight")}

    def on_train_begin(self, args, state, control, model, **_):
        self.masks = self._masks(model)
        assert all(0.49 < float(m.float().mean()) < 0.51 for m in self.masks.values())

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        for name, p in model.named_parameters():
            if name in self.masks:
                assert not (p.grad[self.masks[name]] != 0).any() and (p.grad != 0).any()

    def on_step_end(self, args, state, control, model, optimizer, **_):
        self.steps += 1
        inner = getattr(optimizer, "optimizer", optimizer)
        for name, p in model.named_parameters():
            if name in self.masks:
                mask = self.masks[name]
                assert not (p[mask] != 0).any()
                for state in inner.state[p].values():
                    if torch.is_tensor(state) and state.shape == p.shape:
                        assert not (state[mask] != 0).any()


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.5, "gradient_accumulation_steps": 2, "max_grad_norm": 0.01},
        {"bf16": True, "gradient_checkpointing": True, "optim": "adafactor"},
        {"precision": "bfloat16", "weight_decay": 0.1, "optim": "adamw_torch"},
        {"optim": "sgd", "learning_rate": 1.0, "optim_args": "momentum=0.9"},
    ],
)
def test_zeros_stay(options, pruned, tmp_path):
    if options.get("optim") == "sgd":
        options = {k: v for k, v in options.items() if k != "optim_args"}
    look = Look()
    train(pruned / "pruned", conversations(40), KEEP, output_dir=tmp_path, callbacks=[look], **(FAST | options))
    assert look.steps
    before, after = tensors(pruned / "pruned"), tensors(tmp_path)
    for name, mask in zeros(pruned / "pruned").items():
        assert not (after[name][mask] != 0).any() and holds(after[name], Structure(2, 4))
        assert not torch.equal(before[name], after[name])
    assert {t.dtype for t in after.values()} == {BF16}
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["mask"] for row in report["layers"]} == {"2:4"} and len(report["layers"]) == 14
    assert report["training"]["steps"] == look.steps


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_neox", "llama_tied"])
def test_other_families(family, tmp_path):
    save(build(family), tmp_path / "base")
    ignore = ["re:.*gate$", "lm_head", "embed_out"]
    prune = {"MagnitudePruningModifier": {"mask_structure": "2:4", "ignore": ignore}}
    oneshot(tmp_path / "base", None, prune, output_dir=tmp_path / "pruned")
    keep = {"ConstantPruningModifier": {"targets": "__ALL__", "ignore": ignore}}
    train(tmp_path / "pruned", token_rows(16), keep, output_dir=tmp_path / "out", **FAST)
    before, after = tensors(tmp_path / "pruned"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    sparse = [n for n, t in before.items() if t.dim() == 2 and float((t == 0).float().mean()) > 0.4]
    assert len(sparse) >= 8
    moved = 0
    for name in sparse:
        assert not (after[name][before[name] == 0] != 0).any() and holds(after[name], Structure(2, 4)), name
        moved += not torch.equal(before[name], after[name])
    assert moved >= len(sparse) - 4  # an expert may have seen no token


def test_a_module_in_memory(pruned, tmp_path):
    model = oneshot(build("llama", BF16), None, PRUNE)
    own = {"tokenizer": str(pruned / "base")}
    same = train(model, conversations(40), KEEP, **own, **FAST)
    assert same is model and model.dtype == BF16 and not model.training
    train(pruned / "pruned", conversations(40), KEEP, output_dir=tmp_path / "out", **FAST)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tensors(tmp_path / "saved"), tensors(tmp_path / "out"))
    loaded = train(pruned / "pruned", conversations(40), KEEP, **FAST)  # loaded whole, not saved
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(PlanError, match="none of the 15 linears that it means is pruned"):
        train(build("llama"), conversations(40), {"ConstantPruningModifier": {}}, **own, **FAST)


def test_a_teacher_is_learnt(pruned, tmp_path):
    """More of the teacher than labels alone give, and by way of hidden states."""
    from bitpress import evaluate

    rows = conversations(80)
    (tmp_path / "text.txt").write_text("\n".join(" ".join(m["content"] for m in r["messages"]) for r in rows))
    options = FAST | {"num_train_epochs": 4, "learning_rate": 3e-3, "mask_prompts": False}
    with_labels = train(pruned / "pruned", rows, KEEP, output_dir=tmp_path / "labels", **options)
    soft = train(
        pruned / "pruned", rows, KEEP, output_dir=tmp_path / "taught", distill_teacher=pruned / "base",
        distill_temperature=2.0, distill_hardness=0.9, distill_hidden=0.1, **options,
    )  # fmt: skip

    def kl(folder):
        return evaluate(pruned / "base", folder, text=tmp_path / "text.txt", windows=4, length=64).kl

    assert kl(soft.folder) < 0.7 * kl(pruned / "pruned") and kl(soft.folder) < kl(with_labels.folder)
    log = json.loads((tmp_path / "taught/trainer_state.json").read_text())["log_history"]
    assert log[-2]["kl"] < log[0]["kl"] and "ce" in log[0] and log[0]["perplexity"] > 1


def test_evaluation_while_training(pruned, tmp_path):
    said = []

    class Lines:
        def print(self, text, **_):
            said.append(text)

    from bitpress.progress import Lines as Display

    train(
        pruned / "pruned", {"train": conversations(40), "validation": conversations(8, seed=1)}, KEEP,
        splits={"train": "train", "validation": "validation"}, output_dir=tmp_path / "out", eval_steps=3,
        logging_steps=1, progress=Display(Lines()), **FAST,
    )  # fmt: skip
    found = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert found["eval_perplexity"] == pytest.approx(torch.tensor(found["eval_loss"]).exp().item(), rel=1e-3)
    assert any("evaluated after step 3: loss" in line for line in said)
    assert any("step 1 of" in line and "perplexity" in line for line in said)


FAULTS = {
    "no data": ({"dataset": None}, DataError, ["dataset: missing; training needs data"]),
    "unknown argument": ({"learning_rte": 1}, ConfigError, [
        "learning_rte: unknown argument. Did you mean 'learning_rate'?"]),
    "not a number": ({"learning_rate": "fast", "num_train_epochs": -1}, ConfigError, [
        "learning_rate: expected a number, got 'fast'", "num_train_epochs: must be more than 0, got -1"]),
    "no numbers": ({"learning_rate": float("nan"), "max_steps": 0}, ConfigError, [
        "learning_rate: expected a number, got nan", "max_steps: must be at least 1 (or -1"]),
    "callback": ({"callbacks": ["x"], "report_to": "paper"}, ConfigError, [
        "callbacks: expected a TrainerCallback of transformers, got 'x'", "report_to: paper is not supported"]),
    "smoothing": ({"label_smoothing_factor": 0.1, "distill_teacher": "none/there"}, ConfigError, [
        "label_smoothing_factor: has no effect on what a teacher teaches"]),
    "no teacher": ({"distill_teacher": "./nowhere"}, ConfigError, ["distill_teacher: ./nowhere: no such model folder"]),
    "scheduler": ({"lr_scheduler_type": "cosin"}, ConfigError, ["training arguments: cosin is not a valid"]),
    "warmup": ({"warmup_ratio": 2}, ConfigError, ["warmup_ratio: must be a share from 0 to 1"]),
    "pickles": ({"save_safetensors": False}, ConfigError, ["save_safetensors: only safetensors are written"]),
    "evaluation": ({"eval_strategy": "steps"}, DataError, ["eval_strategy: there is no data to evaluate on"]),
    "temperature": ({"distill_temperature": 2.0}, ConfigError, ["distill_teacher: missing"]),
    "teacher": ({"distill_teacher": "self"}, ConfigError, ["'self' is the model that apply was given"]),
    "precision": ({"precision": "bf16"}, ConfigError, ["precision: 'bf16' is unknown"]),
    "no match": ({"recipe": {"ConstantPruningModifier": {"targets": ["re:.*q_prj.weight"]}}}, PlanError, [
        "ConstantPruningModifier.targets: 're:.*q_prj.weight' matches no linear", "Did you mean 'q_proj'"]),
    "one-shot": ({"recipe": {"run_type": "train", "a_modifiers": GPTQ}},
                 PlanError, ["GPTQModifier: runs in one shot, not in a training stage"]),
    "stages": ({"recipe": STAGES}, RecipeError, ["give stage='finetuning_stage'"]),
    "a stage that does not train": ({"recipe": STAGES, "stage": "sparsity_stage"}, RecipeError, ["a one-shot stage"]),
    "start": ({"recipe": {"ConstantPruningModifier": {"start": 1}}}, RecipeError, ["ConstantPruningModifier.start"]),
    "dense": ({"model": "base"}, PlanError, ["no zeros to keep: prune first"]),
    "no prompts": ({"dataset": [{"prompt": "w1 w2", "response": ""}]}, DataError, ["nothing to learn from"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name, pruned, tmp_path):
    changes, kind, words = FAULTS[name]
    given = {"dataset": conversations(8), "recipe": KEEP, **FAST, **changes}
    with pytest.raises(kind) as caught:
        train(pruned / given.pop("model", "pruned"), output_dir=tmp_path / "out", **given)
    for word in words:
        assert word in str(caught.value)
    assert name == "dense" or not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_are_not_saved(pruned, tmp_path):
    for recipe, name, words in ((None, "a", "training diverged"), (KEEP, "b", "has NaN or infinity after training")):
        steps = {"a": 1, "b": 1000}[name]  # between two looks at the gradients
        with pytest.raises(NumericsError, match=words):
            train(pruned / "pruned", conversations(40), recipe, output_dir=tmp_path / name, logging_steps=steps,
                  **(FAST | {"learning_rate": 1e30}))  # fmt: skip
        assert not (tmp_path / name / "config.json").exists()


@pytest.mark.parametrize("last", ["finetuning_stage", "quantization_stage"])
def test_stored_by_the_mask(last, pruned, tmp_path):
    """Stages that end in 2:4 storage: trained weights, and codes."""
    recipe = {name: STAGES[name] for name in list(STAGES)[: list(STAGES).index(last) + 1]}
    options = FAST | {"num_calibration_samples": 8}
    for form, name in (("sparse-24", "small"), ("compressed-tensors", "plain")):
        apply(pruned / "base", conversations(40), recipe, output_dir=tmp_path / name, format=form, **options)
    found = tensors(tmp_path / "small")
    assert "model.layers.0.mlp.up_proj.positions" in found and "model.layers.0.mlp.up_proj.weight" not in found
    small, plain = (SparseAutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("small", "plain"))
    assert torch.equal(logits(small), logits(plain))
    if not torch.cuda.is_available():
        for folder in (tmp_path / "plain", pruned / "pruned"):  # whatever the format
            with pytest.raises(ConfigError, match="semi_structured: needs an NVIDIA GPU"):
                SparseAutoModelForCausalLM.from_pretrained(folder, semi_structured=True)
    if last == "quantization_stage":
        with pytest.raises(ConfigError, match=r"'sparse-24-bitmask' is not written from memory; .* bitpress convert"):
            plain.save_pretrained(tmp_path / "z", quantization_format="sparse-24-bitmask")
    with pytest.raises(PlanError, match="no linear is known to be pruned 2:4, so sparse-24 cannot hold them"):
        train(pruned / "pruned", conversations(8), None, output_dir=tmp_path / "x", format="sparse-24", **FAST)
    with pytest.raises(PlanError, match="format: gptq is of quantized weights, and nothing is quantized"):
        train(pruned / "pruned", conversations(8), KEEP, output_dir=tmp_path / "y", format="gptq", **FAST)


def test_faults_of_all_stages_come_together(pruned, tmp_path):
    wrong = Recipe.load(STAGES).to_dict()
    wrong["finetuning_stage"]["finetuning_modifiers"]["ConstantPruningModifier"]["targets"] = ["nope"]
    wrong["quantization_stage"]["quantization_modifiers"]["GPTQModifier"]["group_size"] = 24
    with pytest.raises(PlanError) as caught:
        apply(pruned / "base", conversations(8), wrong, output_dir=tmp_path / "out", max_stepz=3)
    said = str(caught.value)
    for words in (
        "max_stepz: unknown argument. Did you mean 'max_steps'?",
        "finetuning_stage: ConstantPruningModifier.targets: 'nope' matches no linear",
        "quantization_stage: model.layers.0.self_attn.q_proj: 32 input columns are not divisible by group_size 24",
    ):
        assert words in said
    assert not (tmp_path / "out").exists()


def test_old_names_and_what_is_left_behind(pruned, tmp_path):
    old = {"warmup_ratio": 0.1, "overwrite_output_dir": True, "save_safetensors": True, "evaluation_strategy": "no",
           "do_train": True, "logging_dir": "x", "no_cuda": True}  # fmt: skip
    rows = conversations(16)
    train(pruned / "pruned", rows, KEEP, output_dir=tmp_path / "out", **FAST, **old)
    first = tensors(tmp_path / "out")
    with pytest.raises(PlanError, match="holds a finished run with other"):
        train(pruned / "pruned", rows, KEEP, output_dir=tmp_path / "out", **(FAST | {"learning_rate": 1e-3}))
    again = train(pruned / "pruned", rows, KEEP, output_dir=tmp_path / "out", **FAST, **old)
    assert_same_tensors(tensors(again.folder), first)
    train(pruned / "pruned", rows, KEEP, output_dir=tmp_path / "out", **(FAST | {"learning_rate": 1e-3}), **old)
    assert any(not torch.equal(a, first[n]) for n, a in tensors(tmp_path / "out").items())


# kills


def start(base, out):
    """All stages in a process of their own. It is forked: what takes long in a new one is importing."""
    options = FAST | {
        "num_calibration_samples": 16, "num_train_epochs": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "distill_teacher": "self", "save_steps": 5, "save_total_limit": 3,
    }  # fmt: skip
    process = multiprocessing.get_context("fork").Process(
        target=apply, args=(base, conversations(160), STAGES), kwargs={"output_dir": out, **options}
    )
    process.start()
    return process


def kept(folder):
    """Every file of a checkpoint that must be the same, by its content; those that are not say how long it took."""
    names = ("report.json", "report.html", "trainer_state.json", "train_results.json")
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file() and f.name not in names}


def test_killed_in_every_stage_and_still_the_same_bytes(pruned, tmp_path):
    start(pruned / "base", tmp_path / "straight").join()
    assert (tmp_path / "straight/config.json").is_file()
    out = tmp_path / "out"
    waits = (
        lambda: (out / "sparsity_stage/.bitpress/journal.jsonl").is_file(),
        lambda: (out / "finetuning_stage/checkpoint-5").is_dir(),  # in the middle of writing it, most often
        lambda: (out / "finetuning_stage/checkpoint-15/trainer_state.json").is_file(),
        lambda: (out / "finetuning_stage/trainer_state.json").is_file(),  # while the checkpoint is written
        lambda: (out / "quantization_stage/.bitpress").is_dir(),
        lambda: (out / "report.json").is_file(),  # while the last one's files become those of the whole
    )
    killed = 0
    for ready in waits:
        process = start(pruned / "base", out)
        while process.is_alive() and not ready():
            time.sleep(0.001)
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
    assert killed >= 4
    start(pruned / "base", out).join()
    assert (out / "config.json").is_file()
    for stage in ("sparsity_stage", "finetuning_stage", "quantization_stage", "."):
        assert kept(out / stage) == kept(tmp_path / "straight" / stage), stage
    assert not (out / ".bitpress").exists()


def test_the_commands(pruned, tmp_path):
    from typer.testing import CliRunner

    from bitpress.cli import app

    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in conversations(40)))
    (tmp_path / "recipe.yaml").write_text(Recipe.load(STAGES).to_yaml())
    common = ["--recipe", tmp_path / "recipe.yaml", "--dataset", tmp_path / "rows.jsonl", "--max-seq-length", 32]
    training = ["--epochs", 1, "--learning-rate", "1e-3", "--train-batch-size", 4, "--set", "warmup_ratio=0.1",
                "--set", "eval_strategy=no",
                "--distill-teacher", pruned / "base", "--no-mask-prompts"]  # fmt: skip

    def run(*words, code=0):
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == code, done.output
        return done

    said = run("plan", pruned / "base", *common, "--num-samples", 8).output
    assert "zeros kept" in said and "training: weights, gradients and Adam's moments" in said
    run("apply", pruned / "base", *common, *training, "--num-samples", 8, "-o", tmp_path / "out")
    run("train", tmp_path / "out/sparsity_stage", *common, *training, "--stage", "finetuning_stage", "-o",
        tmp_path / "alone")  # fmt: skip
    assert_same_tensors(tensors(tmp_path / "alone/finetuning_stage"), tensors(tmp_path / "out/finetuning_stage"))
    done = run("train", pruned / "base", *common, "--stage", "sparsity_stage", "-o", tmp_path / "no", code=1)
    assert "a one-shot stage, which train does not run" in str(done.exception)
    assert run("train", pruned / "base", *common, "--set", "x", "-o", tmp_path / "no", code=2)


def test_stages_one_by_one(pruned, tmp_path):
    options = FAST | {"num_calibration_samples": 8}
    out, rows = tmp_path / "out", conversations(40)
    with pytest.raises(PlanError, match="sparsity_stage: has not run in"):
        apply(pruned / "base", rows, STAGES, output_dir=out, stage="finetuning_stage", **options)
    for stage in STAGES:
        made = apply(pruned / "base", rows, STAGES, output_dir=out, stage=stage, **options)
        assert made.folder == out / stage and (made.folder / "config.json").is_file()
    apply(pruned / "base", rows, STAGES, output_dir=tmp_path / "whole", **options)
    assert_same_tensors(tensors(out), tensors(tmp_path / "whole"))
    # in memory, in place; and once more where all is finished
    for _ in range(2):
        model = build("llama", BF16)
        own = {"tokenizer": str(pruned / "base")}
        assert apply(model, rows, STAGES, output_dir=tmp_path / "memory", **own, **options) is model
        assert_same_tensors(tensors(tmp_path / "memory"), tensors(out))
        model.save_pretrained(tmp_path / "saved", save_compressed=True)
        assert_same_tensors(tensors(tmp_path / "saved"), tensors(out))
    old = (out / "sparsity_stage/config.json").stat().st_mtime_ns
    fresh = apply(pruned / "base", rows, STAGES, output_dir=out, fresh=True, **options)
    assert (out / "sparsity_stage/config.json").stat().st_mtime_ns > old
    assert_same_tensors(tensors(fresh.folder), tensors(tmp_path / "whole"))


def test_one_stage_anew_on_those_before_it(pruned, tmp_path):
    options = FAST | {"num_calibration_samples": 8}
    out, rows, other = tmp_path / "out", conversations(40), options | {"learning_rate": 1e-3, "format": "sparse-24"}
    apply(pruned / "base", rows, STAGES, output_dir=out, **options)
    with pytest.raises(PlanError, match=r"finished run with other .*training.*--stage NAME --fresh"):
        apply(pruned / "base", rows, STAGES, output_dir=out, **other)
    old = (out / "sparsity_stage/config.json").stat().st_mtime_ns
    apply(pruned / "base", rows, STAGES, output_dir=out, stage="finetuning_stage", fresh=True, **other)
    assert not (out / "config.json").exists() and not (out / "quantization_stage/config.json").exists()
    apply(pruned / "base", rows, STAGES, output_dir=out, **other)
    assert (out / "sparsity_stage/config.json").stat().st_mtime_ns == old
    apply(pruned / "base", rows, STAGES, output_dir=tmp_path / "straight", **other)
    assert_same_tensors(tensors(out), tensors(tmp_path / "straight"))
    changed = STAGES | {"sparsity_stage": {"sparsity_modifiers": {"WandaPruningModifier": {"mask_structure": "2:4"}}}}
    with pytest.raises(PlanError, match="sparsity_stage: has not run in"):
        apply(pruned / "base", rows, changed, output_dir=out, stage="finetuning_stage", fresh=True, **other)
    assert (out / "config.json").is_file() and (out / "quantization_stage/config.json").is_file()  # all is there still
