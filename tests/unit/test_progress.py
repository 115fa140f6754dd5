"""What is said during a run."""

import io
import itertools

import pytest
from rich.console import Console

from bitpress import ConfigError, progress
from bitpress.progress import Lines, Live, Progress, choose_progress, clock, place


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200, force_terminal=False)


def said(console):
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (42.4, "42 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 0 min"),
        (2 * 3600 + 5 * 60 + 59, "2 h 5 min"),
    ],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_place():
    assert [place(i, 3) for i in range(4)] == ["block 1 of 3", "block 2 of 3", "block 3 of 3", "embeddings and head"]
    assert place(0, 0) == place(0, None) == "embeddings and head"


def test_the_silent_one_takes_everything(capsys):
    silent = Progress()
    silent.begin("quantize", 2)
    silent.at(0, "loading")
    silent.at(1, "solving", 0.5)
    silent.note("something")
    silent.end(True)
    assert capsys.readouterr() == ("", "")


def report(lines, blocks):
    lines.begin("quantize", 4)
    for block in blocks:
        for doing in ("loading", "statistics", "statistics", "solving"):
            lines.at(block, doing, 0.1)
    lines.end(True)


def test_a_line_a_block(console, monkeypatch):
    ticks = itertools.count(100.0, 10.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))
    report(Lines(console), [0, 1, 2, 3, 4])
    assert said(console) == [
        "quantize: block 1 of 4: statistics",
        "quantize: block 2 of 4: statistics, ETA 1 min 0 s",  # 20 s for one, three to go
        "quantize: block 3 of 4: statistics, ETA 30 s",
        "quantize: block 4 of 4: statistics, ETA 13 s",
        "quantize: embeddings and head: statistics, ETA 0 s",
    ]


def test_a_run_that_goes_on_counts_from_where_it_was(console, monkeypatch):
    ticks = itertools.count(100.0, 10.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))
    report(Lines(console), [2, 3])
    assert said(console) == ["quantize: block 3 of 4: statistics", "quantize: block 4 of 4: statistics, ETA 20 s"]


def test_a_line_a_phase(console):
    report(Lines(console, verbose=True), [0, 1])
    phases = [line.split(",")[0].rpartition(": ")[2] for line in said(console)]
    assert phases == ["loading", "statistics", "solving"] * 2


@pytest.mark.parametrize("kind", [Lines, Live])
def test_text_is_not_taken_for_markup(kind, console):
    shown = kind(console)
    shown.begin("[red]stage[/red]", 2)
    shown.at(0, "loading [/x]")
    shown.note("re:.*[abc] and [/nothing]")
    shown.end(True)
    assert "note: re:.*[abc] and [/nothing]" in said(console)
    assert any("[red]stage[/red]" in line for line in said(console))


def test_the_live_display_ends_full(console):
    live = Live(console)
    live.begin("quantize", 3)
    live.at(1, "solving", 0.25)
    task = live.bars.tasks[0]
    assert (task.completed, task.fields["at"], task.fields["doing"]) == (1.25, "block 2 of 3", "solving")
    live.end(True)
    assert task.finished and not live.bars.live.is_started
    assert "quantize" in console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_who_is_told(terminal, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    assert type(choose_progress(None)) is (Live if terminal else Progress)
    assert type(choose_progress(True)) is (Live if terminal else Lines)
    assert type(choose_progress(True, verbose=True)) is Lines
    assert type(choose_progress(False)) is Progress
    mine = Progress()
    assert choose_progress(mine) is mine
    with pytest.raises(ConfigError, match="progress: expected True, False, None"):
        choose_progress("yes")
