"""Tuning in a run: better than without, what it refuses, the same after a kill."""

from __future__ import annotations

import pytest
import torch

from bitpress import PlanError, oneshot
from bitpress import plan as planning
from bitpress.blocks import Blocks
from bitpress.math.masks import Structure, holds, keep_best
from conftest import build, save, token_rows
from helpers import (
    PLAIN,
    Killed,
    assert_same_tensors,
    client,
    digests,
    logits,
    make_tokenizer,
    report_of,
    stop_after,
    tensors,
)  # fmt: skip

GPTQ = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
QUICK = {"GPTQModifier": {**GPTQ["GPTQModifier"], **PLAIN}}
TUNE = {"TuneModifier": {"iters": 24, "batch_size": 4, "lr": 0.01}}
ROWS = token_rows(32)
OPTIONS = {"max_seq_length": 32, "num_calibration_samples": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save(build("llama", torch.bfloat16), tmp_path_factory.mktemp("tuning") / "base")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def whole(base):
    """What a run with tuning makes of the base, in one go."""
    folder = base.parent / "tuned"
    oneshot(base, ROWS, {"modifiers": [GPTQ, TUNE]}, output_dir=folder, **OPTIONS)
    return folder


def block_error(folder, base, rows):
    """Of the last block's output, through all blocks, on given tokens."""
    ids = torch.tensor([r["input_ids"] for r in rows])
    outs = []
    for model in (client(folder, torch.float32), client_of_dense(base)):
        blocks, hidden = Blocks(model), None
        for index in range(len(blocks)):
            hidden = blocks.run(index, (ids, hidden))
        outs.append(hidden)
    return float((outs[0] - outs[1]).square().sum() / outs[1].square().sum())


def client_of_dense(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_tuning_that_keeps_nothing_says_so(base, tmp_path):
    still = {"TuneModifier": {"iters": 1, "lr": 0, "scale_lr": 0}}
    oneshot(base, ROWS, {"modifiers": [GPTQ, still]}, output_dir=tmp_path / "out", **OPTIONS)
    found = report_of(tmp_path / "out")
    linears = len(found["layers"])
    assert all(row["tuned"]["steps"] == 0 for row in found["layers"])
    assert [n for n in found["notes"] if f"TuneModifier: {linears} of {linears} linears stayed" in n]


def test_nearer_than_without_and_it_loads(base, whole, tmp_path):
    oneshot(base, ROWS, {"modifiers": [GPTQ]}, output_dir=tmp_path / "gptq", **OPTIONS)
    unseen = token_rows(32, seed=9)
    assert block_error(whole, base, unseen) < block_error(tmp_path / "gptq", base, unseen)
    assert logits(client(whole)).isfinite().all()
    plain, tuned = report_of(tmp_path / "gptq"), report_of(whole)
    for before, after in zip(plain["layers"], tuned["layers"], strict=True):
        assert before["method"] == "gptq" and "tuned" not in before
        assert after["method"] == "gptq+tune" and after["bits_per_weight"] == before["bits_per_weight"]
        says = after["tuned"]
        assert 0 < says["after"] < says["before"] and 0 < says["steps"] <= 24
        assert says["loss"] == ("mse" if ".layers.0." in after["name"] else "kl")
    # what the last block is tuned for, the model's predictions, is nearer in the weights that are stored
    tokens = torch.tensor([r["input_ids"] for r in unseen])
    wanted = client_of_dense(base)(input_ids=tokens).logits.log_softmax(-1)
    lost = []
    for folder in (whole, tmp_path / "gptq"):
        found = client(folder, torch.float32)(input_ids=tokens).logits.log_softmax(-1)
        lost.append(float((wanted.exp() * (wanted - found)).sum().detach()))
    assert lost[0] < 0.97 * lost[1]
    alike = {"TuneModifier": {**TUNE["TuneModifier"], "last_block_loss": "mse"}}
    oneshot(base, ROWS, {"modifiers": [GPTQ, alike]}, output_dir=tmp_path / "alike", **OPTIONS)
    assert {r["tuned"]["loss"] for r in report_of(tmp_path / "alike")["layers"]} == {"mse"}
    assert not any("TuneModifier" in note for note in tuned["notes"])
    # the error is that of the weights as they are stored, on the inputs that the block had
    first = next(r for r in tuned["layers"] if r["name"].endswith("layers.0.self_attn.q_proj"))
    model = client_of_dense(base)
    weight = model.model.layers[0].self_attn.q_proj.weight
    stored = client(whole, torch.float32).model.layers[0].self_attn.q_proj.weight
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor([r["input_ids"] for r in ROWS])))
    error = float((x @ (stored - weight).T).detach().square().sum() / (x @ weight.T).detach().square().sum())
    assert abs(first["rel_error"] / error - 1) < 0.02
    assert tuned["totals"]["seconds_by_phase"]["tune"] > 0


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mixtral", "opt"])
def test_a_module_in_memory_and_other_families(family, tmp_path):
    model, tune = build(family, torch.bfloat16), {"TuneModifier": {**TUNE["TuneModifier"], "iters": 8}}
    recipe = {"modifiers": [QUICK, tune]}
    oneshot(model, ROWS, recipe, **OPTIONS)
    rows = model.bitpress_report["layers"]
    assert {r["method"] for r in rows} == {"gptq+tune"}
    assert all(r["tuned"]["after"] <= r["tuned"]["before"] for r in rows)
    assert all(p.requires_grad for p in model.parameters()) and all(p.grad is None for p in model.parameters())
    model.save_pretrained(tmp_path / "memory")
    base = save(build(family, torch.bfloat16), tmp_path / "base")
    oneshot(base, ROWS, recipe, output_dir=tmp_path / "streamed", **OPTIONS)
    assert_same_tensors(tensors(tmp_path / "memory"), tensors(tmp_path / "streamed"))


@pytest.mark.parametrize("shards", [1, 2])
def test_killed_and_resumed(shards, base, whole, tmp_path, monkeypatch):
    recipe = {"modifiers": [GPTQ, TUNE]}
    with monkeypatch.context() as inside:
        stop_after(inside, shards)
        with pytest.raises(Killed):
            oneshot(base, ROWS, recipe, output_dir=tmp_path / "out", **OPTIONS)
    oneshot(base, ROWS, recipe, output_dir=tmp_path / "out", resume=True, **OPTIONS)
    assert digests(tmp_path / "out") == digests(whole)
    rows = [[{k: v for k, v in r.items() if k != "seconds"} for r in report_of(f)["layers"]]
            for f in (whole, tmp_path / "out")]  # fmt: skip
    assert rows[0] == rows[1]


def test_the_seed_decides(base, tmp_path):
    options = {**OPTIONS, "shuffle_calibration_samples": False}
    for name, seed in (("a", 1), ("b", 2)):
        oneshot(base, ROWS, {"modifiers": [QUICK, TUNE]}, output_dir=tmp_path / name, seed=seed, **options)
    assert digests(tmp_path / "a") != digests(tmp_path / "b")


def test_a_pruned_model_stays_pruned(tmp_path):
    model = build("llama", torch.bfloat16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj.weight"):
                p.mul_(keep_best(p.float().abs(), 0.5, Structure(2, 4)))
    folder = save(model, tmp_path / "base")
    oneshot(folder, ROWS, {"modifiers": [GPTQ, TUNE]}, output_dir=tmp_path / "out", **OPTIONS)
    assert all(r["tuned"]["steps"] > 0 for r in report_of(tmp_path / "out")["layers"])
    for name, p in client(tmp_path / "out").named_parameters():
        if name.endswith("proj.weight"):
            assert holds(p, Structure(2, 4)), name
            assert not p[model.get_parameter(name) == 0].any(), name


PRUNE = {"SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4", "ignore": ["lm_head"]}}


@pytest.mark.parametrize("quantizes", [False, True], ids=["dense", "int4"])
def test_what_is_pruned_in_the_same_stage(quantizes, base, tmp_path):
    steps = [PRUNE, *([GPTQ] if quantizes else [])]
    tune = {"TuneModifier": {"iters": 24, "batch_size": 4, "weight_lr": 0.005, "lr": 0.01}}
    oneshot(base, ROWS, {"modifiers": steps}, output_dir=tmp_path / "solved", **OPTIONS)
    oneshot(base, ROWS, {"modifiers": [*steps, tune]}, output_dir=tmp_path / "tuned", **OPTIONS)
    rows = report_of(tmp_path / "tuned")["layers"]
    assert {r["method"] for r in rows} == {"sparsegpt+gptq+tune" if quantizes else "sparsegpt+tune"}
    assert all(r["mask"] == "2:4" and r["tuned"]["after"] < r["tuned"]["before"] for r in rows)
    load = client if quantizes else client_of_dense
    before, after = (load(tmp_path / f) for f in ("solved", "tuned"))
    first = "model.layers.0."  # in later blocks the masks follow from what the blocks before give
    for name, p in after.named_parameters():
        if name.endswith("proj.weight"):
            assert holds(p, Structure(2, 4)), name
            assert not name.startswith(first) or not p[before.get_parameter(name) == 0].any(), name


def test_weights_that_are_zero_by_chance_are_no_mask(tmp_path):
    model = build("llama", torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight[torch.rand(weight.shape, generator=generator) < 0.008] = 0
    base = save(model, tmp_path / "base")
    oneshot(base, ROWS, {"modifiers": [PRUNE, TUNE]}, output_dir=tmp_path / "out", **OPTIONS)
    assert all(row["mask"] == "2:4" for row in report_of(tmp_path / "out")["layers"])


def test_after_rounding_to_nearest_some_linears_and_not_the_head(base, tmp_path):
    recipe = {"modifiers": [
        {"QuantizationModifier": {"scheme": "W4A16", "group_size": 16}},
        {"TuneModifier": {"iters": 12, "batch_size": 4, "ignore": "re:.*mlp.*"}},
    ]}  # fmt: skip
    oneshot(base, ROWS, recipe, output_dir=tmp_path / "out", **OPTIONS)
    found = report_of(tmp_path / "out")
    for row in found["layers"]:
        tuned = "self_attn" in row["name"]
        assert row["method"] == ("rtn+tune" if tuned else "rtn") and ("tuned" in row) == tuned
    assert any(n.startswith("TuneModifier: the output head") for n in found["notes"])


FAULTS = {
    "alone": ([TUNE], "TuneModifier: nothing before it compresses a linear; put GPTQModifier"),
    "first": ([TUNE, GPTQ], "TuneModifier: must come after GPTQModifier, whose result it tunes"),
    "twice": ([GPTQ, TUNE, TUNE], "TuneModifier: given 2 times"),
    "nothing": ([GPTQ, {"TuneModifier": {"targets": "lm_hed"}}], "TuneModifier.targets: 'lm_hed' matches no linear"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_it_refuses(name, base, tmp_path):
    recipe, message = FAULTS[name]
    with pytest.raises(PlanError, match=message):
        oneshot(base, ROWS, {"modifiers": recipe}, output_dir=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_one_sequence_is_too_few(base, tmp_path):
    with pytest.raises(PlanError, match=r"TuneModifier: needs at least 2 sequences.*raise num_calibration_samples"):
        oneshot(base, ROWS, {"modifiers": [GPTQ, TUNE]}, output_dir=tmp_path / "out", max_seq_length=32,
                num_calibration_samples=1)  # fmt: skip


def test_experts_that_memory_does_not_hold(tmp_path, monkeypatch):
    real = planning.budget

    def budget(subject, sites, *args, **options):
        if any(s.tuning and s.expert is not None for s in sites):
            raise PlanError("one block needs 80 GiB but the limit is 8 GiB: raise --max-memory")
        return real(subject, sites, *args, **options)

    monkeypatch.setattr(planning, "budget", budget)
    folder = save(build("mixtral", torch.bfloat16), tmp_path / "base")
    oneshot(folder, ROWS, {"modifiers": [QUICK, TUNE]}, output_dir=tmp_path / "out", **OPTIONS)
    found = report_of(tmp_path / "out")
    methods = {".experts." in r["name"]: r["method"] for r in found["layers"]}
    assert methods == {True: "gptq", False: "gptq+tune"}
    assert any(
        n.startswith("TuneModifier: experts stay as they are solved: one block needs 80") for n in found["notes"]
    )


@pytest.mark.parametrize("where", ["host", "disk"])
def test_hidden_states_elsewhere(where, base, whole, tmp_path, monkeypatch):
    real = planning.budget
    monkeypatch.setattr(planning, "budget", lambda *a, **k: {**real(*a, **k), "hidden_on": where})
    oneshot(base, ROWS, {"modifiers": [GPTQ, TUNE]}, output_dir=tmp_path / "out", **OPTIONS)
    assert_same_tensors(tensors(tmp_path / "out"), tensors(whole))
