"""Several stages in one call: each reads a checkpoint and writes one, and a killed run goes on where it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from test_resume import kill_at, start

from bitpress import PlanError, inspect_checkpoint, oneshot, output
from bitpress.modifiers import MODIFIERS
from bitpress.recipe import Recipe
from bitpress.result import SavedModel
from conftest import build, save, token_rows
from helpers import OPTIONS, PLAIN, Killed, assert_same_tensors, client, digests, logits, make_tokenizer, tensors

ROWS = token_rows()
BF16 = torch.bfloat16


def weights(bits, size):
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": size}


FIRST = {
    "GPTQModifier": {"config_groups": {"a": {"weights": weights(8, 16), "targets": ["re:.*self_attn.*"]}}, **PLAIN}
}
SECOND = {
    "GPTQModifier": {
        "ignore": ["re:.*self_attn.*", "lm_head", "re:.*gate$"],
        "config_groups": {"m": {"weights": weights(4, 16), "targets": ["Linear"]}},
        **PLAIN,
    }
}
BOTH = {"attention_stage": {"quantization_modifiers": FIRST}, "mlp_stage": {"quantization_modifiers": SECOND}}
SPARSE = {
    "sparsity_stage": {
        "sparsity_modifiers": {
            "SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4", "ignore": ["re:.*lm_head"]}
        }
    },
    "quantization_stage": {
        "quantization_modifiers": {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}
    },
}


def by_hand(family, recipes):
    """One stage after the other, each on a module that knows nothing of the stages before it but the weights."""
    model = build(family, BF16)
    for recipe in recipes:
        fresh = build(family, BF16)
        fresh.load_state_dict(copy.deepcopy(model.state_dict()))
        model = oneshot(fresh, ROWS, recipe, **OPTIONS)
    return model


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_second_stage_sees_what_the_first_has_made(family, tmp_path):
    base = save(build(family, BF16), tmp_path / "base")
    made = oneshot(base, ROWS, BOTH, output_dir=tmp_path / "out", **OPTIONS)
    assert isinstance(made, SavedModel) and not (tmp_path / "out/.bitpress").exists()
    expected = by_hand(family, [FIRST, SECOND])
    found = made.load()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    # and is another than both at once
    at_once = {"GPTQModifier": {"config_groups": {**FIRST["GPTQModifier"]["config_groups"],
                                                  **SECOND["GPTQModifier"]["config_groups"]},
                                "ignore": ["lm_head", "re:.*gate$"], **PLAIN}}  # fmt: skip
    once = oneshot(build(family, BF16), ROWS, at_once, **OPTIONS)
    assert not torch.equal(logits(once), logits(expected))
    if family == "llama":
        assert torch.equal(logits(client(tmp_path / "out", one_scheme=False)), logits(expected))

    # in memory, saved by the run and afterwards
    model = build(family, BF16)
    oneshot(model, ROWS, BOTH, output_dir=tmp_path / "memory", **OPTIONS)
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "saved")
    for name in ("memory", "saved"):
        assert_same_tensors(tensors(tmp_path / name), tensors(tmp_path / "out"))
    unsaved = oneshot(build(family, BF16), ROWS, BOTH, **OPTIONS)
    unsaved.save_pretrained(tmp_path / "unsaved")
    assert_same_tensors(tensors(tmp_path / "unsaved"), tensors(tmp_path / "out"))

    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2
    assert not any("self_attn" in name or "up_proj" in name for name in config["ignore"])
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [row["stage"] for row in report["layers"][:8]] == ["attention_stage"] * 8
    assert {row["stage"] for row in report["layers"]} == {"attention_stage", "mlp_stage"}
    assert report["totals"]["layers"] == len(report["layers"])
    size = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert report["totals"]["output_bytes"] == size
    assert Recipe.load(tmp_path / "out/recipe.yaml") == Recipe.load(BOTH)


SMOOTH = {
    "attention_stage": BOTH["attention_stage"],
    "mlp_stage": {"quantization_modifiers": {"SmoothQuantModifier": {"smoothing_strength": 0.8}, **SECOND}},
}


def test_smoothing_in_a_later_stage(tmp_path):
    base = save(build("llama", BF16), tmp_path / "base")
    oneshot(base, ROWS, SMOOTH, output_dir=tmp_path / "out", **OPTIONS)
    expected = by_hand("llama", list(SMOOTH.values()))
    assert torch.equal(logits(client(tmp_path / "out", one_scheme=False)), logits(expected))
    for _ in range(2):  # the second time it is complete already
        model = build("llama", BF16)
        oneshot(model, ROWS, SMOOTH, output_dir=tmp_path / "memory", **OPTIONS)
        assert torch.equal(logits(model), logits(expected))
    assert_same_tensors(tensors(tmp_path / "memory"), tensors(tmp_path / "out"))


@pytest.mark.skipif("SparseGPTModifier" not in MODIFIERS, reason="not there yet")
@pytest.mark.parametrize("compressed", [True, False])
def test_pruned_then_quantized(compressed, tmp_path):
    base = save(build("llama", BF16), tmp_path / "base")
    oneshot(base, ROWS, SPARSE, output_dir=tmp_path / "out", save_compressed=compressed, **OPTIONS)
    found = client(tmp_path / "out")
    expected = by_hand("llama", [SPARSE["sparsity_stage"], SPARSE["quantization_stage"]])
    assert torch.equal(logits(found), logits(expected))
    for name, weight in found.state_dict().items():
        if name.endswith("_proj.weight"):
            assert int((weight.reshape(-1, 4) == 0).sum(1).min()) >= 2, name
    again = build("llama", BF16)
    oneshot(again, ROWS, SPARSE, output_dir=tmp_path / "memory", save_compressed=compressed, **OPTIONS)
    oneshot(again2 := build("llama", BF16), ROWS, SPARSE, output_dir=tmp_path / "memory", save_compressed=compressed,
            **OPTIONS)  # fmt: skip
    assert torch.equal(logits(again2), logits(again)) and torch.equal(logits(again), logits(expected))
    assert_same_tensors(tensors(tmp_path / "memory"), tensors(tmp_path / "out"))
    assert inspect_checkpoint(tmp_path / "out").finished


def stop_after(monkeypatch, count):
    """The run dies before it writes one more than `count` shards."""
    real, written = output.Output.write, []

    def write(self, shard, *args, **options):
        if len(written) == count:
            raise Killed
        written.append(shard)
        real(self, shard, *args, **options)

    monkeypatch.setattr(output.Output, "write", write)
    return written


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A model, and what its two stages make of it without a break: the same bytes from its folder and from memory."""
    place = tmp_path_factory.mktemp("straight")
    base = save(build("llama", BF16), place / "base")
    oneshot(base, ROWS, BOTH, output_dir=place / "out", **OPTIONS)
    oneshot(build("llama", BF16), ROWS, BOTH, output_dir=place / "memory", **OPTIONS)
    assert_same_tensors(tensors(place / "memory"), tensors(place / "out"))
    return {"folder": (base, place / "out"), "memory": (base, place / "memory")}


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_going_on_in_the_first_unfinished_stage(count, where, straight, tmp_path, monkeypatch):
    """Two blocks and the rest: three shards a stage."""
    base, whole = straight[where]

    def given():
        return build("llama", BF16) if where == "memory" else base

    out = tmp_path / "out"
    stop_after(monkeypatch, count)
    with pytest.raises(Killed):
        oneshot(given(), ROWS, BOTH, output_dir=out, **OPTIONS)
    monkeypatch.undo()
    assert inspect_checkpoint(out).method == "unfinished"
    with pytest.raises(PlanError, match="an unfinished run with other recipe"):
        oneshot(given(), ROWS, SMOOTH, output_dir=out, **OPTIONS)
    with pytest.raises(PlanError, match="an unfinished run with other recipe"):
        oneshot(given(), ROWS, FIRST, output_dir=out, **OPTIONS)
    written = stop_after(monkeypatch, 99)
    model = given()
    resumed = oneshot(model, ROWS, BOTH, output_dir=out, resume=True, **OPTIONS)
    assert written == [0, 1, 2, 0, 1, 2][count:]
    assert digests(out) == digests(whole)
    rows = [json.loads((f / "report.json").read_text())["layers"] for f in (whole, out)]
    for a, b in zip(*rows, strict=True):
        assert (a["name"], a["rel_error"], a["stage"]) == (b["name"], b["rel_error"], b["stage"])
    if where == "memory":
        resumed.save_pretrained(tmp_path / "saved")
        assert_same_tensors(tensors(tmp_path / "saved"), tensors(out))


@pytest.mark.slow
def test_killed_in_each_stage_and_still_the_same_bytes(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "max_position_embeddings": 512}
    make_tokenizer(save(build("llama", BF16, **sizes), tmp_path / "base"))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in token_rows(32, 128)))
    (tmp_path / "recipe.yaml").write_text(Recipe.load(BOTH).to_yaml())
    words = ["--recipe", tmp_path / "recipe.yaml"]
    start(tmp_path, tmp_path / "straight", *words, scheme=False).communicate()
    out, killed = tmp_path / "out", 0
    for place in (out / ".bitpress/stages/1-attention_stage", out):
        process = start(tmp_path, out, *words, scheme=False)
        killed += kill_at(process, place, 3, 0.0)  # its head and two blocks
    assert killed == 2
    assert (out / ".bitpress/stages/1-attention_stage/config.json").is_file()
    said = start(tmp_path, out, "--resume", *words, scheme=False).communicate()[0]
    assert "stage attention_stage is finished; going on from there" in said
    assert "2 of 5 shards are finished" in said
    assert digests(out) == digests(tmp_path / "straight")


def test_faults_of_all_stages_come_together(tmp_path):
    base = save(build("llama", BF16), tmp_path / "base")
    twice = {"one_stage": {"modifiers": FIRST}, "two_stage": {"modifiers": {
        "GPTQModifier": {"scheme": "W4A16", "group_size": 24, "ignore": ["lm_head"]}}}}  # fmt: skip
    with pytest.raises(PlanError) as caught:
        oneshot(base, ROWS, twice, output_dir=tmp_path / "out", **OPTIONS)
    said = str(caught.value)
    assert "two_stage: model.layers.0.self_attn.q_proj: quantized in an earlier stage; add it to ignore" in said
    assert "two_stage: model.layers.0.self_attn.q_proj: 32 input columns are not divisible by group_size 24" in said
    cache = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    early = copy.deepcopy(BOTH)
    early["attention_stage"]["quantization_modifiers"]["GPTQModifier"]["kv_cache_scheme"] = cache
    with pytest.raises(PlanError, match=r"attention_stage: kv_cache_scheme: .* give it in the last stage"):
        oneshot(base, ROWS, early, output_dir=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
