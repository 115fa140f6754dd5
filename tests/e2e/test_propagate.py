"""Calibration on the uncompressed model's stream: one forward of the data instead of two."""

import json
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from bitpress import oneshot, residual
from bitpress.blocks import Blocks
from bitpress.errors import NumericsError, PlanError
from bitpress.modifiers.quantization import GPTQModifier
from conftest import build

RECIPE = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"], "refine": 0}}
ROWS = [
    {"input_ids": torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(i)).tolist()} for i in range(8)
]


def saved(tmp_path, family="llama", **changes):
    folder = tmp_path / "model"
    build(family, **changes).save_pretrained(folder)
    return folder


def compressed(model, out, **more):
    oneshot(model, ROWS, RECIPE, output_dir=out, max_seq_length=24, num_calibration_samples=8, **more)
    return {n: t for f in sorted(out.glob("*.safetensors")) for n, t in load_file(f).items()}


def counted(monkeypatch):
    calls = []
    visit = Blocks.visit

    def counting(self, index, batch, weights=None):
        calls.append(index)
        return visit(self, index, batch, weights)

    monkeypatch.setattr(Blocks, "visit", counting)
    return calls


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_blocks_are_calibrated_on_what_the_uncompressed_ones_give(tmp_path, family):
    """The statistics of the last block are those of the original model, whatever came of the blocks before."""
    folder = saved(tmp_path, family)
    found = compressed(folder, tmp_path / "all", propagate=False)
    alone = {"GPTQModifier": {**RECIPE["GPTQModifier"], "ignore": ["lm_head", r"re:.*layers\.0\..*"]}}
    oneshot(folder, ROWS, alone, output_dir=tmp_path / "last", max_seq_length=24, num_calibration_samples=8)
    last = {n: t for f in (tmp_path / "last").glob("*.safetensors") for n, t in load_file(f).items()}
    names = [n for n in last if "layers.1." in n]
    assert any(n.endswith("weight_packed") for n in names)
    assert all(torch.equal(found[n], last[n]) for n in names)
    drifted = compressed(folder, tmp_path / "drifted")
    assert any(not torch.equal(found[n], drifted[n]) for n in names)


def test_one_forward_instead_of_two(tmp_path, monkeypatch):
    folder, calls = saved(tmp_path), counted(monkeypatch)
    compressed(folder, tmp_path / "two", batch_size=8)
    assert calls == [0, 0, 1]
    calls.clear()
    compressed(folder, tmp_path / "one", batch_size=8, propagate=False)
    assert calls == [0, 1]


@pytest.mark.parametrize("least", [1, 10_000], ids=["usual", "starved"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_one_forward_of_experts(tmp_path, monkeypatch, family, least):
    """Where there is room for outputs beside inputs; starved experts take another of the same inputs."""
    from bitpress import plan

    folder, real, common = saved(tmp_path, family), plan.budget, {"propagate": False, "min_expert_tokens": least}
    found, calls = {}, counted(monkeypatch)
    for name, changes in {"one": {}, "two": {"spare_hidden": False}, "beside": {"solves_beside": True}}.items():
        calls.clear()
        monkeypatch.setattr(plan, "budget", lambda *a, _as=changes, **k: {**real(*a, **k), **_as})
        found[name] = compressed(folder, tmp_path / name, batch_size=8, **common)
        forwards = 2 if least > 1 else 1  # of the last block too
        assert calls.count(0) == forwards + (name == "two") and calls.count(1) == forwards
        policies = json.loads((tmp_path / name / "report.json").read_text())["totals"]["policies"]
        assert bool(policies) == (least > 1)
    for name in ("two", "beside"):
        assert all(torch.equal(found["one"][n], found[name][n]) for n in found["one"])


def test_fast_is_without(tmp_path, monkeypatch):
    folder, calls = saved(tmp_path), counted(monkeypatch)
    common = {"max_seq_length": 24, "num_calibration_samples": 8, "group_size": 16, "scheme": "W4A16", "batch_size": 8}
    oneshot(folder, ROWS, effort="fast", output_dir=tmp_path / "fast", **common)
    assert calls == [0, 1]
    calls.clear()
    oneshot(folder, ROWS, effort="fast", propagate=True, output_dir=tmp_path / "asked", **common)
    assert calls == [0, 0, 1]


def test_statistics_in_several_passes(tmp_path, monkeypatch):
    """Where memory defers some, the next block's input comes of a forward of its own."""
    from bitpress import plan

    folder = saved(tmp_path)
    whole = compressed(folder, tmp_path / "whole", propagate=False)
    real = plan.budget
    monkeypatch.setattr(plan, "budget", lambda *a, **k: {**real(*a, **k), "gram_bytes": 1})
    parts = compressed(folder, tmp_path / "parts", propagate=False)
    assert all(torch.equal(whole[n], parts[n]) for n in whole)


def beside(monkeypatch):
    """Blocks are finished while the next one runs, as on a GPU; returns the threads that solve."""
    from bitpress import pipeline, plan

    real, solve, threads = plan.budget, pipeline.solve_from, []
    monkeypatch.setattr(plan, "budget", lambda *a, **k: {**real(*a, **k), "solves_beside": True})

    def solving(run, sites, inputs):
        threads.append(threading.current_thread().name)
        return solve(run, sites, inputs)

    monkeypatch.setattr(pipeline, "solve_from", solving)
    return threads


def test_blocks_finished_beside_the_next_one(tmp_path, monkeypatch):
    folder = saved(tmp_path, num_hidden_layers=5)
    whole = compressed(folder, tmp_path / "whole", propagate=False)
    threads = beside(monkeypatch)
    found = compressed(folder, tmp_path / "beside", propagate=False)
    assert len(threads) == 4 and all("solver" in name for name in threads)  # nothing runs beside the last one
    assert whole.keys() == found.keys() and all(torch.equal(whole[n], found[n]) for n in whole)
    reports = [json.loads((tmp_path / n / "report.json").read_text())["layers"] for n in ("whole", "beside")]
    assert [[row["name"] for row in rows] for rows in reports] == [[row["name"] for row in reports[0]]] * 2
    model = build("llama", num_hidden_layers=5)
    model = oneshot(model, ROWS, RECIPE, max_seq_length=24, num_calibration_samples=8, propagate=False)
    assert len(threads) == 8
    model.save_pretrained(tmp_path / "memory")
    memory = {n: t for f in (tmp_path / "memory").glob("*.safetensors") for n, t in load_file(f).items()}
    assert all(torch.equal(whole[n], memory[n]) for n in whole)


def test_an_error_beside_ends_the_run_which_can_go_on(tmp_path, monkeypatch):
    from bitpress import pipeline

    folder = saved(tmp_path, num_hidden_layers=5)
    whole = compressed(folder, tmp_path / "whole", propagate=False)
    threads, solving = beside(monkeypatch), pipeline.solve_from

    def failing(run, sites, inputs):
        if sites[0].block == 2:
            raise NumericsError("model.layers.2.self_attn.q_proj: broken")
        return solving(run, sites, inputs)

    with monkeypatch.context() as patch, pytest.raises(NumericsError, match="broken"):
        patch.setattr(pipeline, "solve_from", failing)
        compressed(folder, tmp_path / "out", propagate=False)
    assert len(threads) == 2 and not (tmp_path / "out" / "config.json").exists()
    found = compressed(folder, tmp_path / "out", propagate=False, resume=True)
    assert len(threads) == 4 and all(torch.equal(whole[n], found[n]) for n in whole)


def test_the_last_block_is_finished_before_a_quantized_head(tmp_path, monkeypatch):
    from bitpress import pipeline

    recipe = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "refine": 0}}
    changes = {"num_hidden_layers": 3, "tie_word_embeddings": False}
    folder = saved(tmp_path, **changes)
    common = {"max_seq_length": 24, "num_calibration_samples": 8, "propagate": False}
    oneshot(folder, ROWS, recipe, output_dir=tmp_path / "whole", **common)
    threads, solving = beside(monkeypatch), pipeline.solve_from

    def slow(run, sites, inputs):
        time.sleep(0.3 * (sites[0].block == 2))
        return solving(run, sites, inputs)

    monkeypatch.setattr(pipeline, "solve_from", slow)
    oneshot(folder, ROWS, recipe, output_dir=tmp_path / "beside", **common)
    assert len(threads) == 3
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("whole", "beside")]
    names = [[row["name"] for row in report["layers"]] for report in reports]
    assert names[0] == names[1] and names[0][-1] == "lm_head"
    assert reports[1]["totals"]["seconds_by_phase"]["solve"] >= 0.3  # the wait for it is time of the run
    found = [{n: t for f in (tmp_path / k).glob("*.safetensors") for n, t in load_file(f).items()}
             for k in ("whole", "beside")]  # fmt: skip
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())

    def failing(run, sites, inputs):
        if sites[0].block == 2:
            raise NumericsError("model.layers.2.mlp: broken")
        return solving(run, sites, inputs)

    monkeypatch.setattr(pipeline, "solve_from", failing)
    with pytest.raises(NumericsError, match="broken"):
        oneshot(folder, ROWS, recipe, output_dir=tmp_path / "failed", **common)
    with pytest.raises(NumericsError, match="broken"):
        oneshot(build("llama", **changes), ROWS, recipe, **common)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    from bitpress import pipeline

    folder = saved(tmp_path)
    whole = compressed(folder, tmp_path / "whole", propagate=False)
    block = pipeline._block

    def dying(run, index, *args, **kwargs):
        if index == 1:
            raise KeyboardInterrupt
        block(run, index, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_block", dying)
        compressed(folder, tmp_path / "killed", propagate=False)
    found = compressed(folder, tmp_path / "killed", propagate=False, resume=True)
    assert all(torch.equal(whole[n], found[n]) for n in whole)


def test_a_module_in_memory(tmp_path):
    folder = saved(tmp_path)
    found = compressed(folder, tmp_path / "streamed", propagate=False)
    model = oneshot(build("llama"), ROWS, RECIPE, max_seq_length=24, num_calibration_samples=8, propagate=False)
    model.save_pretrained(tmp_path / "memory")
    saved_too = {n: t for f in (tmp_path / "memory").glob("*.safetensors") for n, t in load_file(f).items()}
    assert all(torch.equal(found[n], saved_too[n]) for n in found)


def test_what_compares_with_the_compressed_stream_is_refused(tmp_path):
    folder = saved(tmp_path)
    recipe = {"GPTQModifier": {**RECIPE["GPTQModifier"], "correct": 0.4}, "TuneModifier": {}}
    with pytest.raises(PlanError) as caught:
        oneshot(folder, ROWS, recipe, output_dir=tmp_path / "out", propagate=False)
    told = str(caught.value)
    assert "GPTQModifier.correct" in told and "TuneModifier" in told
    cache = GPTQModifier(
        scheme="W4A16", group_size=16, ignore=["lm_head"],
        kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    )  # fmt: skip
    with pytest.raises(PlanError, match="kv_cache_scheme"):
        oneshot(folder, ROWS, cache, output_dir=tmp_path / "out", propagate=False)
    assert not (tmp_path / "out" / "config.json").exists()


def test_it_is_part_of_what_a_run_is(tmp_path):
    folder = saved(tmp_path)
    compressed(folder, tmp_path / "out", propagate=False)
    assert json.loads((tmp_path / "out" / "report.json").read_text())
    with pytest.raises(Exception, match="propagate"):
        compressed(folder, tmp_path / "out", propagate=True)


def test_what_blocks_lack_is_taken_up_by_the_linear_that_writes_into_them(monkeypatch):
    """On other tokens the model ends nearer to the original than where each linear undoes its input's drift alone."""
    ids, rows = (torch.randint(3, 96, (n, 64), generator=torch.Generator().manual_seed(n)) for n in (16, 64))
    recipe = {"GPTQModifier": {"scheme": "W3A16", "group_size": 32, "ignore": ["lm_head"], "correct": 0.4}}
    wanted, away = randomized()(ids).logits, []
    for writer in (residual.writer, lambda *args: None):
        monkeypatch.setattr(residual, "writer", writer)
        model = randomized()
        data = [{"input_ids": row.tolist()} for row in rows]
        oneshot(model, data, recipe, max_seq_length=64, num_calibration_samples=64, batch_size=4)
        away.append(float((model(ids).logits - wanted).norm()))
    assert away[0] < 0.97 * away[1]


@pytest.mark.parametrize(
    "recipe",
    [
        {"GPTQModifier": {"correct": 0.4, "scheme": "W4A16", "group_size": 16}},
        {"SparseGPTModifier": {"correct": 0.4, "mask_structure": "2:4"}},
        {
            "AWQModifier": {},
            "GPTQModifier": {"correct": 0.4, "scheme": "W4A16", "group_size": 16},
            "TuneModifier": {"iters": 2},
        },
    ],
    ids=lambda r: next(iter(r)),
)
@pytest.mark.parametrize("left", ["[23]", "[013]", "[03].*mlp"])
def test_blocks_may_be_left_out(tmp_path, recipe, left):
    """The uncompressed stream ends where nothing reads it any more: later blocks are not in memory."""
    folder = saved(tmp_path, num_hidden_layers=4)
    recipe = {name: {**keys, "ignore": ["lm_head", rf"re:.*layers\.{left}.*"]} for name, keys in recipe.items()}
    options = {"max_seq_length": 24, "num_calibration_samples": 8, "batch_size": 2}
    oneshot(folder, ROWS, recipe, output_dir=tmp_path / "out", **options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"[23]": 14, "[013]": 7, "[03].*mlp": 22}[left] == len(report["layers"])


def randomized():
    """Six blocks, each with weights of its own."""
    model = build("opt", num_hidden_layers=6).requires_grad_(False)
    for number, parameter in enumerate(p for p in model.parameters() if p.dim() >= 2):
        parameter.normal_(std=0.15, generator=torch.Generator().manual_seed(number))
    return model
