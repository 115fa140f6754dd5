"""Bad input on the command line: one message, without a traceback, before any weight is read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bad_input import ROWS, W4, refused
from bitpress import PlanError


def test_the_output_is_checked_with_all_else(tiny_copy, tmp_path, monkeypatch, capsys, no_weights):
    words = [tiny_copy, "--scheme", "W4A61", "--num-samples", "0"]
    wrong = ["4 problems", "GPTQModifier.scheme: 'W4A61' is unknown", "num_calibration_samples: must be", "none.jsonl"]
    (tmp_path / "file").write_text("")
    for place, said in [
        ([], "--output: missing; name the folder"),
        (["-o", tmp_path / "file"], "is a file; choose a folder"),
        (["-o", tmp_path / "file/out"], "file is a file; choose another output folder"),
        (["-o", tiny_copy], "is the model's own folder"),
    ]:
        code, _, err = cli(monkeypatch, capsys, "oneshot", *words, "--dataset", "none.jsonl", *place)
        assert code == 1 and all(text in err for text in (*wrong, said)), err
    for verb in ("train", "apply"):
        code, _, err = cli(monkeypatch, capsys, verb, tiny_copy, "--dataset", "none.jsonl")
        assert code == 1 and all(
            w in err for w in ("3 problems", "--output: missing", "--recipe: missing", "none.jsonl")
        )
    code, _, err = cli(monkeypatch, capsys, "convert", tmp_path / "nowhere", tmp_path / "file", "--format", "gptqq")
    assert code == 1 and all(w in err for w in ("3 problems", "Did you mean 'gptq'", "nowhere", "is a file")), err
    monkeypatch.setattr("os.access", lambda *_: False)
    refused(PlanError, [f"{tmp_path} cannot be written to"], tmp_path / "out", tiny_copy, ROWS, W4)


@pytest.mark.parametrize("verb", ["oneshot", "plan"])
def test_the_command_line_says_one_message(verb, tiny, tmp_path, monkeypatch, capsys):
    words = [verb, tiny, "-o", tmp_path / "out", "--scheme", "W4A16", "--group-size", "24"]
    if verb == "oneshot":  # as people start it; the others in this process, which has imported all that it takes
        command = [sys.executable, "-m", "bitpress", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = written(monkeypatch, capsys, *words)
    assert code == 1 and out == ""
    assert err.startswith("PlanError: 2 problems\n  model.layers.0.self_attn.q_proj: 32 input columns are not")
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def written(monkeypatch, capsys, *words):
    """The command line in this process: exit code, output, errors."""
    from bitpress.cli import main

    monkeypatch.setattr("sys.argv", ["bitpress", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def cli(monkeypatch, capsys, *words):
    """The same, with the errors in one line."""
    code, out, err = written(monkeypatch, capsys, *words)
    return code, out, " ".join(err.split())


@pytest.mark.parametrize("verb", ["oneshot", "plan"])
@pytest.mark.parametrize(
    ("code", "words", "options"),
    [
        (1, "RecipeError: GPTQModifier.scheme: 'W4A61' is unknown. Did you mean 'W4A16'?", ["--scheme", "W4A61"]),
        (
            1,
            "ConfigError: --recipe: missing; give --scheme (such as W4A16), --bits (such as 4.25), --sparsity (such as "
            "2:4) or --recipe",
            [],
        ),
        (1, "ConfigError: --recipe: none.yaml: no such file", ["--recipe", "none.yaml"]),
        (1, "ConfigError: --scheme: cannot go with --recipe", ["--recipe", "none.yaml", "--scheme", "W4A16"]),
        (1, "ConfigError: --group-size: cannot go with --recipe", ["--recipe", "none.yaml", "--group-size", "0"]),
        (1, "ConfigError: --group-size: cannot go with --bits", ["--bits", "4.5", "--group-size", "0"]),
        (1, "DataError: none.jsonl: no such file", ["--scheme=W8A16", "--group-size=16", "--dataset=none.jsonl"]),
        (1, "PlanError: one block needs", ["--scheme", "W4A16", "--group-size", "16", "--max-memory", "1MiB"]),
        (1, "ConfigError: device: 'cuda:3' was asked for", ["--scheme=W8A16", "--group-size=16", "--device=cuda:3"]),
        (2, "Invalid value for '--num-samples'", ["--scheme", "W4A16", "--num-samples", "many"]),
        (2, "No such option", ["--scheme", "W4A16", "--sheme", "W8A16"]),
        (1, "--method: 'gtpq' is unknown. Did you mean 'gptq'?", ["--scheme", "W4A16", "--method", "gtpq"]),
        (1, "GPTQModifier.scheme: 'W4A61' is unknown.", ["--scheme", "W4A61", "--effort", "besst"]),
    ],
)  # fmt: skip
def test_faults_on_the_command_line(verb, code, words, options, tiny, tmp_path, monkeypatch, capsys, no_weights):
    ended, out, err = cli(monkeypatch, capsys, verb, tiny, "-o", tmp_path / "out", *options)
    assert (ended, out) == (code, "") and words in err.replace("│ ", "").replace(" │", ""), err
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_options_that_do_not_go_together_come_with_the_other_faults(tiny, monkeypatch, capsys, no_weights):
    options = ["--scheme", "W4A16", "--bits", "4", "--dataset", "none.jsonl", "--max-memory", "8XB"]
    ended, _, err = cli(monkeypatch, capsys, "plan", tiny, *options)
    assert ended == 1 and "3 problems" in err
    for words in ("--scheme: cannot go with --bits", "none.jsonl: no such file", "max_memory: '8XB' is not a size"):
        assert words in err


def test_the_plan_leaves_nothing_that_it_prunes(tiny, tmp_path, monkeypatch, capsys, no_weights):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("MagnitudePruningModifier: {sparsity: 0.5, ignore: [lm_head]}")
    ended, out, _ = cli(monkeypatch, capsys, "plan", tiny, "--recipe", recipe)
    left = out[out.index("left as they are") :]
    assert ended == 0 and "lm_head" in left and "q_proj" not in left


def test_the_plan_sees_that_the_folder_is_taken(tiny, tmp_path, monkeypatch, capsys, no_weights):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    ended, _, err = cli(monkeypatch, capsys, "plan", tiny, "-o", out, "--scheme", "W4A16", "--group-size", "16")
    assert ended == 1 and "holds other files" in err


def test_the_plan_of_a_good_run_reads_and_writes_nothing(tiny, tmp_path, monkeypatch, capsys, no_weights):
    words = ["plan", tiny, "-o", tmp_path / "out", "--scheme", "W4A16", "--group-size", "16", "--json"]
    ended, out, _ = cli(monkeypatch, capsys, *words)
    assert ended == 0 and len(json.loads(out)["sites"]) == 14
    assert not (tmp_path / "out").exists()
