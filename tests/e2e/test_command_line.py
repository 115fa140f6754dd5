"""What the command line does whatever the command: exit codes, tracebacks, colours, completion, the bug report."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module

import click
import pytest
import torch
import typer

from bitpress import NumericsError, __version__, cli, entry, environment, formats, harness, loading


@pytest.fixture
def start(monkeypatch, capsys):
    """The command line in this process: exit code, output, errors."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["bitpress", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture
def failing(monkeypatch):
    """`bitpress env` fails as it is told."""

    def fail(error):
        def environment_():
            raise error

        monkeypatch.setattr(environment, "environment", environment_)

    return fail


def test_the_version(start):
    assert start("--version") == (0, f"bitpress {__version__}\n", "")


def test_what_to_paste_into_a_bug_report(start, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out, err = start("env")
    assert code == 0 and not err
    for words in (__version__, torch.__version__, "transformers", "instructions", "free memory:", "HF_HUB_OFFLINE 1"):
        assert words in out, words
    assert "secret" not in out and os.path.expanduser("~") not in out
    found = json.loads(start("env", "--json")[1])
    assert found["packages"]["torch"] == torch.__version__ and len(found["gpus"]) == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NumericsError(["a: NaN", "b: NaN"]), 1, "NumericsError: 2 problems\n  a: NaN\n  b: NaN\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x.safetensors"), 1, "No space left on device: 'x.safetens"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "PermissionError: [Errno 13] Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory: CUDA out of memory.\nGive --max-memory"),
        (MemoryError(), 1, "out of memory: not enough memory\n"),
        (KeyError("q_proj"), 3, "KeyError: 'q_proj'\nThis was not foreseen: --debug shows where it comes from."),
    ],
)
def test_failures(error, code, said, start, failing):
    failing(error)
    ended, out, err = start("env")
    assert ended == code and not out and said in err and "Traceback" not in err


@pytest.mark.parametrize("words", [["--debug", "env"], ["env", "--debug"]])
def test_debug_shows_where(words, failing, monkeypatch):
    failing(NumericsError("NaN"))
    monkeypatch.setattr(sys, "argv", ["bitpress", *words])
    with pytest.raises(NumericsError, match="NaN") as caught:
        cli.main()
    assert "environment_" in [frame.name for frame in caught.traceback]


def test_wrong_usage(start):
    for words in (["oneshott"], ["env", "--jsonn"], ["oneshot"]):
        code, out, err = start(*words)
        assert code == 2 and not out and "Traceback" not in err and "Usage:" in err


@pytest.mark.parametrize(("number", "code", "said"), [
    (signal.SIGTERM, entry.TERMINATED, "terminated; the same command goes on"),
    (signal.SIGINT, entry.INTERRUPTED, "interrupted; the same command goes on"),
])  # fmt: skip
def test_signals(number, code, said, start, monkeypatch):
    def wait():
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(environment, "environment", wait)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background
    before = signal.getsignal(signal.SIGTERM)
    ended, _, err = start("env")
    signal.signal(signal.SIGINT, ignored)
    assert ended == code and said in err and signal.getsignal(signal.SIGTERM) is before


def test_one_of_several_processes_speaks(start, failing, monkeypatch):
    told = NumericsError("NaN")
    told.agreed = True
    failing(told)
    monkeypatch.setattr(entry, "_alone", lambda: "")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("bitpress.options.out.quiet", False)
    assert start("env") == (1, "", "")
    told.agreed = False
    assert "NaN" in start("env")[2]


def test_colours_and_completion():
    def start(*words, **settings):
        done = subprocess.run(
            [sys.executable, "-c", "import sys; sys.argv[0] = 'bitpress'; import bitpress.cli as c; c.main()", *words],
            capture_output=True, text=True, env={**os.environ, **settings},
        )  # fmt: skip
        return done.stdout + done.stderr

    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert colour.search(start("--help", FORCE_COLOR="1", TERM="xterm-256color"))
    assert not colour.search(start("--help", FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1"))
    words = {
        "_BITPRESS_COMPLETE": "complete_bash",
        "COMP_WORDS": "bitpress oneshot m --scheme W4A16",
        "COMP_CWORD": "4",
    }
    assert start(**words).split() == ["W4A16", "W4A16_ASYM"]
    assert "run" in start(**{**words, "COMP_WORDS": "bitpress ru", "COMP_CWORD": "1"}).split()


def test_values_are_completed_as_their_tables_have_them():
    commands = typer.main.get_command(cli.app).commands

    def completed(command, option, begun=""):
        found = next(p for p in commands[command].params if option in p.opts)
        return {item.value for item in found.shell_complete(click.Context(commands[command]), begun)}

    for command in ("oneshot", "plan", "convert"):
        assert completed(command, "--format") == set(formats.CHECKPOINTS)
    assert completed("convert", "--format", "g") == {"gptq", "gptq_v2", "gguf"}
    assert completed("oneshot", "--dtype") == set(import_module("bitpress.oneshot").DTYPES)
    assert completed("eval", "--dtype") == completed("compare", "--dtype") == set(loading.DTYPES)
    assert completed("lm-eval", "--backend") == set(harness.BACKENDS)
    assert completed("plan", "--scheme", "NF") == {"NF4"} and completed("plan", "--scheme", "FP4") == {"FP4"}
    assert completed("scan", "--device", "cu") == {"cuda", "cuda:0"}


def test_every_command_that_says_something_at_work_can_be_quiet():
    commands = typer.main.get_command(cli.app).commands
    assert {n for n, c in commands.items() if not any("-q" in p.opts for p in c.params)} == {"env", "inspect"}
