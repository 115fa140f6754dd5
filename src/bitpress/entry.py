"""The console script: what a failure looks like, and its exit code.

| code | |
|------|------------------------------------------------------------------------------------------------|
| 0    | done                                                                                           |
| 1    | a fault of input, data or the machine, told in one message: a BitpressError, no memory, no disk |
| 2    | wrong usage: an option or command that there is not                                            |
| 3    | a fault that was not foreseen; `--debug` shows where                                           |
| 130  | interrupted (Ctrl-C)                                                                           |
| 143  | terminated (SIGTERM), as launchers and job schedulers do                                       |

A traceback is shown with `--debug` only, before or after the command's name. Of several processes the first one speaks;
another one does where it alone has something to say.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from bitpress.errors import BitpressError

FAULT, UNFORESEEN, INTERRUPTED, TERMINATED = 1, 3, 130, 143
SEVERAL = ("apply", "oneshot", "plan", "run", "train")  # commands whose processes share the work
AGAIN = "the same command goes on where it was"


def main() -> None:
    """Run a command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--debug"]
    from bitpress.cli import app
    from bitpress.options import out

    out.quiet = out.quiet or not _speaks()
    if fault := _alone():
        _say(fault)
        sys.exit(FAULT)
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        app(prog_name="bitpress")
    except SystemExit as ended:  # also what typer makes of an interrupt
        if ended.code == INTERRUPTED:
            _say(f"interrupted; {AGAIN}")
        elif ended.code == TERMINATED:
            _say(f"terminated; {AGAIN}")
        raise
    except Exception as error:
        if debug:
            raise
        sys.exit(_told(error))
    finally:
        signal.signal(signal.SIGTERM, before)


def _speaks() -> bool:
    """Whether this process is the only one, or the first."""
    return os.environ.get("RANK", "0") == "0"


def _alone() -> str:
    """What to say if several processes were started for a command that is of one."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    if os.environ.get("WORLD_SIZE", "1") in ("", "1") or not words or words[0] in SEVERAL:
        return ""
    known = ", ".join(SEVERAL)
    return f"ConfigError: bitpress {words[0]} is for one process: start it without a launcher. For several: {known}"


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


def _told(error: Exception) -> int:
    """Say what is wrong; returns the exit code."""
    name, text = type(error).__name__, str(error).strip()
    if isinstance(error, BitpressError):
        if _speaks() or not error.agreed:
            _say(f"{name}: {text}")
        return FAULT
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":  # the latter is torch's, which may not be there
        first = text.splitlines()[0] if text else "not enough memory"
        _say(f"out of memory: {first}\nGive --max-memory or a smaller --batch-size or --max-seq-length; {AGAIN}.")
        return FAULT
    if isinstance(error, OSError):
        _say(f"{name}: {text}\nMend that and start again; {AGAIN}.")
        return FAULT
    _say(
        f"{name}: {text or '(it says nothing)'}\nThis was not foreseen: --debug shows where it comes from. If it is "
        "bitpress's fault, please report it with that and what `bitpress env` prints."
    )
    return UNFORESEEN


def _say(text: str) -> None:
    from bitpress.options import err

    err.print(text, markup=False, highlight=False)
