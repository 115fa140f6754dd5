"""A killed run goes on where it was, and ends with the same bytes as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from bitpress import CheckpointError, ConfigError, PlanError, checkpoint, inspect_checkpoint, journal, oneshot, output
from bitpress.result import SavedModel
from conftest import build, save, token_rows
from helpers import OPTIONS, PLAIN, W4, Killed, assert_same_tensors, digests, make_tokenizer, stop_after, tensors

ROWS = token_rows()
BLOCKS = 6


# kills of a process


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose blocks take some tenths of a second each, data, and what an uninterrupted run makes of them."""
    place = tmp_path_factory.mktemp("resume")
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": BLOCKS, "max_position_embeddings": 512}
    make_tokenizer(save(build("llama", torch.bfloat16, **sizes), place / "base"))
    lines = [json.dumps(row) for row in token_rows(64, 128)]
    (place / "rows.jsonl").write_text("\n".join(lines))
    done = start(place, place / "straight").communicate()
    assert (place / "straight/config.json").is_file(), done
    return place


def start(place, out, *more, scheme=True):
    words = [
        "oneshot", place / "base", "-o", out, *(["--scheme", "W4A16", "--group-size", "64"] if scheme else []),
        "--no-generate",
        "--dataset", place / "rows.jsonl", "--num-samples", "64", "--max-seq-length", "128", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "bitpress", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "200"},
        # a shell starts what runs in the background with interrupts ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def kill_at(process, out, lines, delay):
    """SIGKILL once the journal has that many lines and some time has passed; whether it came in time."""
    log = out / ".bitpress/journal.jsonl"
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if log.is_file() and log.read_bytes().count(b"\n") >= lines:
            time.sleep(delay)
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_three_times_and_still_the_same_bytes(wide, tmp_path, monkeypatch, capsys):
    chance, out = random.Random(1), tmp_path / "out"
    moments = sorted(chance.sample(range(1, BLOCKS + 1), 3))  # lines of the journal: its head, then one a block
    in_time = []
    for lines in moments:
        process = start(wide, out, *(["--resume"] if in_time else []))
        in_time.append(kill_at(process, out, lines, chance.uniform(0, 0.1)))
        if not in_time[-1]:
            break
        if not (out / "config.json").exists():
            found = inspect_checkpoint(out)
            assert found.method == "unfinished" and not found.finished and "run the same command again" in str(found)
            with pytest.raises(CheckpointError, match="unfinished bitpress run"):
                oneshot(out, ROWS, W4, output_dir=tmp_path / "other")
    assert all(in_time[:2])  # on a busy machine the last may come when all is done
    going = "complete already"
    if not (out / "config.json").exists():
        shards = len((out / ".bitpress/journal.jsonl").read_text().splitlines()) - 1
        assert shards >= moments[-1] - 1
        going = f"{shards} of {BLOCKS + 1} shards are finished; going on from there"
    said = start(wide, out, "--resume").communicate()[0]
    assert going in said
    assert digests(out) == digests(wide / "straight")
    assert len(digests(out)) >= BLOCKS + 1 + 4
    assert not (out / ".bitpress").exists()
    assert inspect_checkpoint(out).finished

    # the command that says so
    (out / ".bitpress").mkdir()
    (out / ".bitpress/journal.jsonl").touch()
    (out / "config.json").rename(tmp_path / "config.json")
    from bitpress.cli import main

    monkeypatch.setattr("sys.argv", ["bitpress", "inspect", str(out)])
    with pytest.raises(SystemExit):
        main()
    assert "unfinished" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupt_is_told_and_resumed(wide, tmp_path):
    out = tmp_path / "out"
    process = start(wide, out)
    log = out / ".bitpress/journal.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= 2):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130 and "interrupted; the same command goes on where it was" in said
    assert "Traceback" not in said and not (out / "config.json").exists()
    start(wide, out).communicate()
    assert digests(out) == digests(wide / "straight")


# failures inside the process


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save(build("llama", torch.bfloat16), tmp_path_factory.mktemp("resume") / "base")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def straight(base):
    """What an uninterrupted run makes of the base."""
    folder = base.parent / "straight"
    oneshot(base, ROWS, W4, output_dir=folder, **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Runs that several tests compare with, each made once: a function of a key and of what makes the folder."""
    place, made = tmp_path_factory.mktemp("once"), {}

    def get(key, make):
        if key not in made:
            folder = place / str(len(made))
            made[key] = folder, make(folder)
        return made[key]

    return get


STEPS = {
    "tokenizer and the like": (output, "copy_companions"),
    "recipe": (output, "write_text"),
    "report": (output, "write_report"),
    "index": (output, "write_index"),
    "first shard in place": (os, "replace"),
    "all in place": (output, "sync"),
    "before the configuration": (output, "read_header"),
    "work folder": (journal.Journal, "remove"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_while_it_finishes(step, when, base, straight, tmp_path, monkeypatch):
    out = tmp_path / "out"
    holder, name = STEPS[step]
    real, real_finish = getattr(holder, name), output.Output.finish

    def die(*args, **options):
        if when == "after":
            real(*args, **options)
        raise Killed

    def finish(*args, **options):
        with monkeypatch.context() as inside:
            inside.setattr(holder, name, die)
            real_finish(*args, **options)

    monkeypatch.setattr(output.Output, "finish", finish)
    with pytest.raises(Killed):
        oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)
    monkeypatch.undo()
    complete = step == "work folder"  # config.json is there: all is done but for the cleaning
    assert (out / "config.json").exists() == complete
    assert inspect_checkpoint(out).finished == complete

    # every block is read from its shard, none is solved again
    monkeypatch.setattr("bitpress.solving._solve", None)
    assert isinstance(oneshot(base, ROWS, W4, output_dir=out, **OPTIONS), SavedModel)
    assert digests(out) == digests(straight)
    assert not (out / ".bitpress").exists()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize(("shards", "correct"), [(0, 0.0), (1, 0.0), (2, 0.0), (1, 0.5)])
def test_going_on_after_each_shard(shards, correct, where, family, once, tmp_path, monkeypatch):
    def given():
        return build(family, torch.bfloat16) if where == "memory" else tmp_path / "base"

    if where == "folder":
        save(build(family, torch.bfloat16), tmp_path / "base")
    more = {"correct": correct} if correct else PLAIN
    recipe = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, **more}}  # the head too
    folder, straight = once(
        (correct, where, family), lambda out: oneshot(given(), ROWS, recipe, output_dir=out, **OPTIONS)
    )
    stop_after(monkeypatch, shards)
    with pytest.raises(Killed):
        oneshot(given(), ROWS, recipe, output_dir=tmp_path / "out", **OPTIONS)
    monkeypatch.undo()
    model = given()
    resumed = oneshot(model, ROWS, recipe, output_dir=tmp_path / "out", resume=True, **OPTIONS)
    assert digests(tmp_path / "out") == digests(folder)
    rows = [json.loads((f / "report.json").read_text())["layers"] for f in (folder, tmp_path / "out")]
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    if where == "memory":
        assert resumed is model
        for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b), name
        resumed.save_pretrained(tmp_path / "saved")
        assert_same_tensors(tensors(tmp_path / "saved"), tensors(tmp_path / "out"))


CHANGES = {
    "recipe": ({}, {"GPTQModifier": {**W4["GPTQModifier"], "dampening_frac": 0.02}}, ROWS),
    "data": ({}, W4, ROWS[1:]),
    "arguments (seed)": ({"seed": 43, "shuffle_calibration_samples": False}, W4, ROWS),
    "arguments (save_compressed)": ({"save_compressed": False}, W4, ROWS),
    "arguments (batch_size)": ({"batch_size": 3}, W4, ROWS),
}


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
@pytest.mark.parametrize("what", CHANGES)
def test_other_arguments_are_refused_and_named(what, finished, base, once, tmp_path, monkeypatch):
    out, same = tmp_path / "out", {"output_dir": tmp_path / "out", "shuffle_calibration_samples": False, **OPTIONS}
    if finished:
        oneshot(base, ROWS, W4, **same)
    else:
        stop_after(monkeypatch, 1)
        with pytest.raises(Killed):
            oneshot(base, ROWS, W4, **same)
        monkeypatch.undo()
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    changes, recipe, data = CHANGES[what]
    with pytest.raises(PlanError) as refused:
        oneshot(base, data, recipe, **{**same, **changes})
    kind = "a finished" if finished else "an unfinished"
    assert f"holds {kind} run with other {what}: " in str(refused.value) and "--fresh" in str(refused.value)
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.name != "journal.jsonl"}.items() <= before.items()

    # --fresh starts anew
    oneshot(base, data, recipe, **{**same, **changes}, fresh=True)
    folder, _ = once(what, lambda out: oneshot(base, data, recipe, **{**same, **changes, "output_dir": out}))
    assert digests(out) == digests(folder)


def test_another_model_is_refused(base, tmp_path, monkeypatch):
    stop_after(monkeypatch, 1)
    with pytest.raises(Killed):
        oneshot(base, ROWS, W4, output_dir=tmp_path / "out", **OPTIONS)
    monkeypatch.undo()
    other = save(build("llama", torch.bfloat16, rope_theta=5000.0), tmp_path / "other")
    with pytest.raises(PlanError, match="holds an unfinished run with other model"):
        oneshot(other, ROWS, W4, output_dir=tmp_path / "out", **OPTIONS)


def test_nothing_to_resume(base, tmp_path):
    with pytest.raises(PlanError, match=r"out: nothing to resume there; leave --resume out to start"):
        oneshot(base, ROWS, W4, output_dir=tmp_path / "out", resume=True, **OPTIONS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="resume, fresh: give one of the two"):
        oneshot(base, ROWS, W4, output_dir=tmp_path / "out", resume=True, fresh=True, **OPTIONS)


def test_what_is_complete_is_left_alone(base, tmp_path, monkeypatch):
    from bitpress.progress import Progress

    class Heard(Progress):
        def __init__(self):
            self.notes = []

        def note(self, text):
            self.notes.append(text)

    out, heard = tmp_path / "out", Heard()
    oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in out.iterdir()}
    monkeypatch.setattr("bitpress.pipeline.execute", None)
    for resume in (False, True):
        again = oneshot(base, ROWS, W4, output_dir=out, progress=heard, resume=resume, **OPTIONS)
        assert heard.notes[-1] == f"{out}: complete already, nothing to do"
        assert isinstance(again, SavedModel) and again.folder == out
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in out.iterdir()} == before


def test_a_shard_that_was_damaged_after_it_was_finished(base, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_after(monkeypatch, 1)
    with pytest.raises(Killed):
        oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)
    monkeypatch.undo()
    (shard,) = (out / ".bitpress").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: the journal says it is complete.*--fresh"):
        oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)
    oneshot(base, ROWS, W4, output_dir=out, fresh=True, **OPTIONS)
    assert inspect_checkpoint(out).finished


def test_a_line_of_the_journal_cut_short(base, straight, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_after(monkeypatch, 2)
    with pytest.raises(Killed):
        oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)
    monkeypatch.undo()
    log = out / ".bitpress/journal.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    oneshot(base, ROWS, W4, output_dir=out, resume=True, **OPTIONS)
    assert digests(out) == digests(straight)


def test_numerics_of_the_first_start_are_kept(base, tmp_path, monkeypatch):
    out, threads = tmp_path / "out", torch.get_num_threads()
    stop_after(monkeypatch, 1)
    with pytest.raises(Killed):
        oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)
    monkeypatch.undo()
    assert torch.get_num_threads() == threads
    log = out / ".bitpress/journal.jsonl"
    head, *rest = log.read_text().splitlines(keepends=True)
    recorded = json.loads(head)
    recorded["numerics"] |= {"batch_size": 5, "threads": threads + 1}
    log.write_text(json.dumps(recorded) + "\n" + "".join(rest))
    oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)
    numerics = json.loads((out / "report.json").read_text())["numerics"]
    assert numerics["batch_size"] == 5 and numerics["threads"] == threads + 1
    assert torch.get_num_threads() == threads


def test_other_numerics_that_cannot_be_had_are_refused(base, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_after(monkeypatch, 1)
    with pytest.raises(Killed):
        oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)
    monkeypatch.undo()
    log = out / ".bitpress/journal.jsonl"
    log.write_text(re.sub('"device": "cpu[^"]*"', '"device": "Some GPU"', log.read_text(), count=1))
    with pytest.raises(PlanError, match=r"cannot go on with the same bits: device was Some GPU, is cpu .*--fresh"):
        oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)


def test_a_killed_write_leaves_no_shard(base, straight, tmp_path, monkeypatch):
    """A file is moved to its name when it is whole and on the disk."""
    out = tmp_path / "out"

    def die(_path):
        raise Killed

    with monkeypatch.context() as inside:
        inside.setattr(checkpoint, "sync", die)
        with pytest.raises(Killed):
            oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)
    assert not list(out.rglob("*.safetensors")) and not (out / "config.json").exists()
    oneshot(base, ROWS, W4, output_dir=out, **OPTIONS)
    assert digests(out) == digests(straight)
