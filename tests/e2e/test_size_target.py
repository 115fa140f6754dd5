"""A size target: sizes met, one scheme where clients fuse, the same bytes after kills and from the recipe it writes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bitpress import ConfigError, PlanError, RecipeError, decision, inspect_checkpoint, oneshot
from bitpress.modifiers.quantization import GPTQModifier, QuantizationModifier
from bitpress.recipe import Recipe
from bitpress.size_target import fusion_groups
from conftest import build, save, token_rows
from helpers import OPTIONS, PLAIN, assert_same_tensors, client, logits, make_tokenizer, report_of, tensors

ROWS = token_rows()
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
SMALL = {"hidden_size": 64, "intermediate_size": 128}


def folder_of(tmp_path, family="llama", **changes):
    base = tmp_path / "base"
    make_tokenizer(save(build(family, torch.bfloat16, **changes), base))
    return base


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("wide"), **WIDE)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.fixture(scope="module")
def chosen(wide):
    """The wide model at 4.25 bits."""
    out = wide.parent / "chosen"
    oneshot(wide, ROWS, bits=4.25, output_dir=out, **OPTIONS)
    return out


def stored_bits(folder, inside="layers"):
    """Bits per weight of the packed linears, from the files alone."""
    bits = weights = 0
    for name, tensor in tensors(folder).items():
        if inside in name and name.endswith(("weight_packed", "weight_scale", "weight_zero_point")):
            bits += 8 * tensor.numel() * tensor.element_size()
        if inside in name and name.endswith("weight_shape"):
            weights += int(tensor[0]) * int(tensor[1])
    return bits / weights


@pytest.mark.parametrize("bits", [4.25, 4.4, 3.3, 6.0])
def test_the_size_is_met_and_partners_agree(tmp_path, bits, request):
    if bits == 4.25:
        out, blocks = request.getfixturevalue("chosen"), 3
    else:
        out, blocks = tmp_path / "out", 2
        oneshot(request.getfixturevalue("small"), ROWS, bits=bits, output_dir=out, **OPTIONS)
    section = report_of(out)["size_target"]
    assert section["bits"] == bits and abs(section["bits_per_weight"] / bits - 1) <= 0.01
    assert stored_bits(out) == pytest.approx(section["bits_per_weight"], rel=1e-4)
    assert inspect_checkpoint(out).bits_per_weight == pytest.approx(section["bits_per_weight"], rel=1e-3)
    scheme = {row["name"]: row["scheme"] for row in report_of(out)["layers"]}
    assert len(scheme) == blocks * 7 and len(set(scheme.values())) > 1
    for i in range(blocks):
        layer = f"model.layers.{i}"
        assert len({scheme[f"{layer}.self_attn.{p}_proj"] for p in "qkv"}) == 1
        assert len({scheme[f"{layer}.mlp.{p}_proj"] for p in ("gate", "up")}) == 1
    assert {g["scheme"] for g in section["groups"]} == set(scheme.values())
    if bits > 4:
        assert not any(s.startswith(("W2", "W3")) for s in scheme.values())
    model = client(out)
    assert torch.isfinite(logits(model)).all()


def test_its_recipe_gives_the_same_checkpoint_without_a_survey(wide, chosen, tmp_path, monkeypatch):
    again = tmp_path / "again"
    text = (chosen / "recipe.yaml").read_text()
    assert Recipe.load(text).to_yaml() == text and "bits" not in Recipe.load(text).to_dict()
    monkeypatch.setattr(decision, "survey", None)
    oneshot(wide, ROWS, text, output_dir=again, **OPTIONS)
    assert_same_tensors(tensors(chosen), tensors(again))
    assert (chosen / "config.json").read_text() == (again / "config.json").read_text()


def test_experts_of_a_layer_share_a_scheme(tmp_path):
    base = folder_of(tmp_path, "qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    out = tmp_path / "out"
    recipe = {"GPTQModifier": {"bits": 4.3, "ignore": ["lm_head", "re:.*gate$"], **PLAIN}}
    oneshot(base, ROWS, recipe, output_dir=out, **OPTIONS)
    section = report_of(out)["size_target"]
    assert abs(stored_bits(out) / 4.3 - 1) <= 0.01
    scheme = {row["name"]: row["scheme"] for row in report_of(out)["layers"]}
    for i in range(2):
        mine = {s for name, s in scheme.items() if f"layers.{i}.mlp.experts" in name}
        assert len(mine) == 1 and "ASYM" not in mine.pop()
    assert any(g["linears"] == 12 for g in section["groups"])
    again = tmp_path / "again"
    oneshot(base, ROWS, (out / "recipe.yaml").read_text(), output_dir=again, **OPTIONS)
    assert_same_tensors(tensors(out), tensors(again))
    assert torch.isfinite(logits(client(out))).all()


def test_rounding_and_a_model_in_memory_with_its_head(tmp_path):
    model = build("llama", torch.bfloat16, **WIDE)
    recipe = QuantizationModifier(bits=4.2, candidates=["W4A16", {"scheme": "W4A16", "group_size": 32}, "UNQUANTIZED"])
    done = oneshot(model, ROWS, recipe, output_dir=tmp_path / "out", **OPTIONS)
    section = report_of(tmp_path / "out")["size_target"]
    assert abs(section["bits_per_weight"] / 4.2 - 1) <= 0.01
    assert any(g["name"] == "lm_head" for g in section["groups"])
    assert {row["method"] for row in report_of(tmp_path / "out")["layers"]} == {"rtn"}
    expected = logits(client(tmp_path / "out"))
    torch.testing.assert_close(logits(done), expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    # the same call again reads the finished folder, with the schemes that were chosen
    other = oneshot(build("llama", torch.bfloat16, **WIDE), ROWS, recipe, output_dir=tmp_path / "out", **OPTIONS)
    assert torch.equal(logits(other), logits(done))


def test_full_precision_is_a_choice(wide, tmp_path):
    base, out = wide, tmp_path / "out"
    recipe = GPTQModifier(bits=5.9, candidates=["W4A16", "UNQUANTIZED"], ignore=["lm_head"], **PLAIN)
    oneshot(base, ROWS, recipe, output_dir=out, **OPTIONS)
    section = report_of(out)["size_target"]
    dense = [g["name"] for g in section["groups"] if g["scheme"] == "dense"]
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert dense and abs(section["bits_per_weight"] / 5.9 - 1) <= 0.01
    totals = report_of(out)["totals"]
    assert totals["bits_per_weight"] == pytest.approx(section["bits_per_weight"], abs=1e-4)
    assert totals["layers"] + totals["left_dense"] == 21 and totals["left_dense"] >= len(dense)
    assert all(any(name.startswith(d.split("+")[0]) for name in ignored) for d in dense)
    oneshot(base, ROWS, (out / "recipe.yaml").read_text(), output_dir=tmp_path / "again", **OPTIONS)
    assert_same_tensors(tensors(out), tensors(tmp_path / "again"))


def test_the_uniform_scheme_is_kept_where_it_wins(small, tmp_path, monkeypatch):
    base, out = small, tmp_path / "out"
    monkeypatch.setattr(decision, "compare", lambda run, target, rivals: {n: float(n == "mixed") for n in rivals})
    oneshot(base, ROWS, bits=4.25, output_dir=out, **OPTIONS)
    section = report_of(out)["size_target"]
    assert {g["scheme"] for g in section["groups"]} == {"W4A16 g64"}
    assert "W4A16 g64 it is" in " ".join(section["notes"])
    plain = tmp_path / "plain"
    oneshot(base, ROWS, {"GPTQModifier": {"scheme": "W4A16", "group_size": 64, "ignore": ["lm_head"]}},
            output_dir=plain, **OPTIONS)  # fmt: skip
    assert_same_tensors(tensors(out), tensors(plain))


def test_the_survey_changes_nothing():
    model = build("llama", torch.bfloat16, **SMALL)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    seen = {}

    def look(run, journal):
        found = decision_of(run, journal)
        seen.update(
            {n: torch.equal(p, before[n]) and p.dtype == before[n].dtype for n, p in model.state_dict().items()}
        )
        return found

    decision_of, decision.decide = decision.decide, look
    try:
        oneshot(model, ROWS, bits=4.25, **OPTIONS)
    finally:
        decision.decide = decision_of
    assert len(seen) == len(before) and all(seen.values())


# bad input


@pytest.mark.parametrize(
    ("recipe", "bits", "message"),
    [  # recipes without a name are keys of GPTQModifier
        (None, 1.0, "1 bits per weight are out of reach: the candidates give 2"),
        (None, 17, "17 bits per weight are out of reach"),
        (None, 0, "bits: must be a positive number"),
        (None, float("nan"), "bits: must be a positive number"),
        (None, "4.25", "^bits: expected a number"),  # and nothing that follows from it
        ({"GPTQModifier": {"scheme": "W4A16"}}, 4.25, "chooses the schemes itself: drop scheme"),
        ({"bits": 4.25, "group_size": 64}, None, "drop group_size"),
        ({"bits": 4.25, "candidates": ["W8A8"]}, None, "quantizes activations too"),
        ({"bits": 4.25, "candidates": ["W4A17"]}, None, "candidates.0..*Did you mean"),
        ({"bits": 4.25, "candidates": []}, None, "nothing to choose from"),
        ({"candidates": ["W4A16"], "scheme": "W4A16"}, None, "candidates: are what bits chooses from"),
        ({"bits": 6, "candidates": ["W4A16"]}, None, "out of reach: the candidates give 4.125 to 4.125"),
        ({}, 16, "16 bits per weight are what these linears have as they are"),
        ({"SmoothQuantModifier": {}}, 4.25, "no modifier that quantizes"),
        (
            [GPTQModifier(bits=4, targets=["q_proj"]), QuantizationModifier(bits=4, targets=["k_proj"])],
            None,
            "two modifiers have a size target",
        ),
        ({"bits": 4.1, "candidates": ["W4A16", {"scheme": "W4A16", "group_size": 96}]}, None, "W4A16 g96 fits none"),
    ],
)  # fmt: skip
def test_bad_input(wide, tmp_path, recipe, bits, message):
    if isinstance(recipe, dict) and not any(key.endswith("Modifier") for key in recipe):
        recipe = {"GPTQModifier": recipe}
    with pytest.raises((ConfigError, PlanError, RecipeError), match=message):
        oneshot(wide, ROWS, recipe, bits=bits, output_dir=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_between_two_sizes(tmp_path):
    base = folder_of(tmp_path)
    recipe = {"GPTQModifier": {"bits": 6, "targets": ["re:.*layers.0.*o_proj"], "candidates": [
        {"scheme": "W4A16", "group_size": 32}, {"scheme": "W8A16", "group_size": 32}]}}  # fmt: skip
    with pytest.raises(
        PlanError, match=r"no choice of schemes gives 6 bits per weight within 1 %: the nearest is 4\.500"
    ):
        oneshot(base, ROWS, recipe, output_dir=tmp_path / "out", **OPTIONS)


# the command line, killed


def start(place, out, *more):
    words = [
        "oneshot", place / "base", "-o", out, "--bits", "4.25", "--dataset", place / "rows.jsonl",
        "--num-samples", "24", "--max-seq-length", "128", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "bitpress", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def digests(folder):
    names = [f for f in folder.iterdir() if f.name not in ("report.json", "report.html")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in names}


@pytest.mark.slow
def test_killed_in_the_survey_and_in_the_solve_pass(tmp_path):
    changes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "max_position_embeddings": 512}
    folder_of(tmp_path, **changes)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in token_rows(24, 128)))
    said = start(tmp_path, tmp_path / "straight").communicate()[0]
    assert (tmp_path / "straight/config.json").is_file(), said
    out = tmp_path / "out"
    log = out / ".bitpress/journal.jsonl"
    for kind, count in (('"survey"', 2), ('"shard"', 2)):
        process = start(tmp_path, out)
        until = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < until:
            if log.is_file() and log.read_text(errors="replace").count(f"{{{kind}") >= count:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0]
        assert (kind == '"survey"') != ("of 3 blocks are done; going on there" in said)
        assert process.returncode == -signal.SIGKILL, said
        done = log.read_text().count(f"{{{kind}")
        assert count <= done <= count + 2
    said = start(tmp_path, out, "--resume").communicate()[0]
    assert "of 4 shards are finished; going on from there" in said
    assert "survey: block" not in said
    assert digests(out) == digests(tmp_path / "straight")
    assert not (out / ".bitpress").exists()
    different = start(tmp_path, out, "--bits", "4.5").communicate()[0]
    assert "finished run with other recipe" in different


def run_cli(monkeypatch, *words):
    from bitpress.cli import main

    monkeypatch.setattr("sys.argv", ["bitpress", *map(str, words)])
    try:
        main()
    except SystemExit as ended:
        return ended.code or 0
    return 0


def test_plan_says_what_will_happen(wide, tmp_path, monkeypatch, capsys):
    common = ["plan", wide, "--max-seq-length", "32", "--num-samples", "8"]
    assert run_cli(monkeypatch, *common, "--bits", "4.25", "--method", "rtn") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "by survey" in said and "at most: exact once the survey has chosen" in said
    assert "possible: 4.1" in said and "a survey of the uncompressed model comes first" in said
    assert run_cli(monkeypatch, *common, "--bits", "4.25", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["size_target"]["bits"] == 4.25 and plan["sites"][0]["scheme"] is None
    assert run_cli(monkeypatch, *common, "--bits", "4.25", "--scheme", "W4A16") == 1
    assert "--scheme: cannot go with --bits" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("GPTQModifier: {ignore: [lm_head]}\n")
    assert run_cli(monkeypatch, *common, "--bits", "4.25", "--recipe", recipe) == 0
    assert "by survey" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ({"AWQModifier": {}, "GPTQModifier": {"bits": 4.25, "ignore": ["lm_head"]}}, "AWQModifier"),
        pytest.param({"AWQModifier": {"bits": 4.25, "ignore": ["lm_head"]}}, "AWQModifier", marks=pytest.mark.slow),
        pytest.param(
            {
                "WandaPruningModifier": {"mask_structure": "2:4", "ignore": ["lm_head"]},
                "GPTQModifier": {"bits": 4.25, "ignore": ["lm_head"]},
            },
            "WandaPruningModifier",
            marks=pytest.mark.slow,
        ),
        ({"GPTQModifier": {"bits": 4.25, "ignore": ["lm_head"]}}, None),
    ],
)
def test_what_the_survey_does_not_see_is_told(small, tmp_path, recipe, names):
    out = tmp_path / "out"
    oneshot(small, ROWS, recipe, output_dir=out, **OPTIONS)
    told = [n for n in report_of(out)["notes"] if "the survey measures linears as they are" in n]
    assert [f"before {names};" in n for n in told] == ([] if names is None else [True])
    assert abs(report_of(out)["size_target"]["bits_per_weight"] / 4.25 - 1) <= 0.01


def test_groups_are_those_of_clients():
    class Named:
        def __init__(self, name, expert=None):
            self.name, self.expert = name, expert

    names = ["l.0.self_attn.q_proj", "l.0.self_attn.v_proj", "l.0.self_attn.o_proj", "l.0.mlp.up_proj"]
    experts = [Named(f"l.1.block_sparse_moe.experts.{e}.w{k}", e) for e in (0, 1) for k in (1, 2, 3)]
    found = fusion_groups([*map(Named, names), *experts])
    assert {k: len(v) for k, v in found.items()} == {
        "l.0.self_attn.q_proj+k_proj+v_proj": 2, "l.0.self_attn.o_proj": 1, "l.0.mlp.gate_proj+up_proj": 1,
        "l.1.block_sparse_moe.experts": 6,
    }  # fmt: skip
