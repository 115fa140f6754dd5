"""The record of a run, and which output folders may be written to."""

import json
import os

import pytest

from bitpress.checkpoint import INDEX
from bitpress.errors import CheckpointError, PlanError
from bitpress.journal import JOURNAL, WORK, Journal, prepare

RUN = {"recipe": {"scheme": "W4A16"}, "model": "m", "data": ["a", 1], "versions": {"torch": "2"}}
NUMERICS = {"batch_size": 4, "threads": 2}


def shard(folder, number, size=10):
    """Write a shard's file; returns its entry."""
    name = f"shard-{number}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x" * size)
    return {"shard": number, "file": name, "bytes": size, "rows": [{"name": "é\u2028\x85"}]}


@pytest.fixture
def work(tmp_path):
    return tmp_path / "out" / WORK


@pytest.fixture
def half(work):
    """A journal with two finished shards."""
    journal = Journal(work, RUN, NUMERICS)
    for number in (0, 1):
        journal.add(shard(work, number))
    return journal


def finished(output, run=RUN):
    """What a run leaves behind."""
    output.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", INDEX, "recipe.yaml"):
        (output / name).write_text("{}")
    (output / "report.json").write_text(json.dumps({"run": run, "layers": []}))
    for i in (1, 2):
        (output / f"model-0000{i}-of-00002.safetensors").write_text("x")


def test_a_new_run(work):
    journal = Journal(work, RUN, NUMERICS)
    assert journal.done == {} and journal.numerics == NUMERICS
    assert json.loads((work / JOURNAL).read_text()) == {"run": RUN, "numerics": NUMERICS}


def test_going_on(half, work):
    again = Journal(work, RUN, {"batch_size": 8, "threads": 1})
    assert again.done == half.done and set(again.done) == {0, 1}
    assert again.numerics == NUMERICS, "those of the first run"
    again.add(shard(work, 2))
    assert set(Journal(work, RUN, NUMERICS).done) == {0, 1, 2}


def test_tuples_are_the_same_as_lists(work):
    Journal(work, {"a": (1, 2)}, NUMERICS)
    Journal(work, {"a": [1, 2]}, NUMERICS)
    Journal(work, {"a": (1, 2)}, NUMERICS)


def test_a_last_line_cut_short_is_dropped(half, work):
    whole = (work / JOURNAL).read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = b"".join(lines[:2])
    for cut in range(len(lines[2])):
        (work / JOURNAL).write_bytes(kept + lines[2][:cut])
        journal = Journal(work, RUN, NUMERICS)
        assert set(journal.done) == {0}, cut
        assert (work / JOURNAL).read_bytes() == kept
    journal.add(shard(work, 1))
    assert (work / JOURNAL).read_bytes() == whole


def test_a_first_line_cut_short_starts_anew(half, work):
    (work / JOURNAL).write_bytes((work / JOURNAL).read_bytes()[:20])
    assert Journal(work, RUN, NUMERICS).done == {}


def test_another_run_is_refused_by_what_differs(half, work):
    other = {**RUN, "model": "n", "data": ["a", 2]}
    with pytest.raises(PlanError, match=r"holds an unfinished run with other model, data: .*--fresh \(fresh=True\)"):
        Journal(work, other, NUMERICS)
    with pytest.raises(PlanError, match="with other more:"):
        Journal(work, {**RUN, "more": 1}, NUMERICS)
    with pytest.raises(PlanError, match="with other versions:"):
        Journal(work, {k: v for k, v in RUN.items() if k != "versions"}, NUMERICS)
    assert set(Journal(work, RUN, NUMERICS).done) == {0, 1}, "the refusal changed nothing"


def test_shards_must_be_as_recorded(half, work):
    os.replace(work / "shard-0.safetensors", work.parent / "shard-0.safetensors")  # killed while moving them
    assert set(Journal(work, RUN, NUMERICS).done) == {0, 1}
    (work / "shard-1.safetensors").write_bytes(b"x" * 9)
    with pytest.raises(CheckpointError, match=r"shard-1\.safetensors: .* not there or has another size: start anew"):
        Journal(work, RUN, NUMERICS)
    (work / "shard-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="start anew with --fresh"):
        Journal(work, RUN, NUMERICS)


def test_remove(half, work):
    half.remove()
    assert os.listdir(work.parent) == []


def test_folders_that_may_be_written(tmp_path, half, work):
    for output in (tmp_path / "none", work.parent):
        assert prepare(output, RUN, fresh=False, resume=False) is False
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "empty", RUN, fresh=False, resume=False) is False
    assert set(Journal(work, RUN, NUMERICS).done) == {0, 1}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("names", [["notes.txt"], ["config.json"], ["config.json", "report.json"]])
def test_foreign_folders_are_refused(names, fresh, tmp_path):
    for name in names:
        (tmp_path / name).write_text('{"model_type": "llama", "run": 3}')
    with pytest.raises(PlanError, match="holds other files, which bitpress does not overwrite"):
        prepare(tmp_path, RUN, fresh=fresh, resume=False)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"run": 3}', '{"layers": []}'])
def test_reports_of_others(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PlanError, match="holds other files"):
        prepare(tmp_path, RUN, fresh=True, resume=False)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(PlanError, match="is a file; choose a folder"):
        prepare(tmp_path / "out", RUN, fresh=False, resume=False)


def test_the_same_finished_run_is_accepted(tmp_path):
    finished(tmp_path)
    before = sorted(os.listdir(tmp_path))
    (tmp_path / WORK).mkdir()  # killed between the last two steps
    assert prepare(tmp_path, {**RUN, "data": ("a", 1)}, fresh=False, resume=False) is True
    assert prepare(tmp_path, RUN, fresh=False, resume=True) is True
    assert sorted(os.listdir(tmp_path)) == before


def test_another_finished_run_is_refused_by_what_differs(tmp_path):
    finished(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(PlanError, match="holds a finished run with other recipe: choose another output folder"):
        prepare(tmp_path, {**RUN, "recipe": {}}, fresh=False, resume=False)
    assert sorted(os.listdir(tmp_path)) == before


def test_resume_needs_something(tmp_path, half, work):
    with pytest.raises(PlanError, match="nothing to resume there; leave --resume out to start"):
        prepare(tmp_path / "new", RUN, fresh=False, resume=True)
    assert prepare(work.parent, RUN, fresh=False, resume=True) is False


def test_fresh_clears_what_bitpress_wrote_and_no_more(tmp_path):
    finished(tmp_path)
    shard(tmp_path / WORK, 0)
    others = ["notes.txt", "model.safetensors", "adapter-1-of-2.safetensors"]
    for name in others:
        (tmp_path / name).write_text("mine")
    assert prepare(tmp_path, {**RUN, "recipe": {}}, fresh=True, resume=False) is False
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    assert all((tmp_path / name).read_text() == "mine" for name in others)


@pytest.mark.parametrize("steps", range(6))
def test_clearing_can_be_killed_and_done_again(steps, tmp_path, monkeypatch):
    finished(tmp_path)
    unlink, left = type(tmp_path).unlink, [steps]

    def killed_later(self, *args, **kwargs):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(tmp_path), "unlink", killed_later)
        prepare(tmp_path, RUN, fresh=True, resume=False)
    assert steps == 0 or not (tmp_path / "config.json").exists()
    assert prepare(tmp_path, RUN, fresh=True, resume=False) is False
    assert os.listdir(tmp_path) == []
