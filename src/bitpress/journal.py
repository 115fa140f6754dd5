"""What is finished, so that a killed run goes on where it was.

All of a run's files lie in `<output>/.bitpress/` until the last moment: one safetensors shard per block, and
`journal.jsonl`, whose first line says what run this is and each further line that a shard is complete. Only then are
the shards moved to their places and config.json is written, last. So an output folder without config.json is
unfinished, and one with it is whole.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from bitpress import ranks
from bitpress.checkpoint import sync
from bitpress.errors import CheckpointError, PlanError

WORK = ".bitpress"
JOURNAL = "journal.jsonl"
# what the earlier run may have copied from another model, and what would be read with this one
OF_THE_MODEL = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip

OF_FORMATS = ("quantize_config.json", "model.gguf")
OF_TRAINING = ("trainer_state.json", "train_results.json", "eval_results.json")


class Journal:
    """The record of one run in its work folder.

    Args:
        folder: the work folder; made if need be.
        run: what identifies the run: recipe, model, data, arguments, versions. Plain data.
        numerics: what must stay the same for identical bits: batch size, threads, device and the like. Of these the
            recorded values are taken on resume. None: not known yet, another stage goes first.
        remedy: what else can be done where the folder holds another run.

    Attributes:
        numerics: the given ones on a new run, the recorded ones on resume.
        done: entries of finished shards, by shard number.
        survey: entries of blocks that a survey has been through, in order.
        decision: what was decided after it; None before.
        laps: time and memory by phase that earlier attempts have noted, see `bitpress.phases`.

    Raises:
        PlanError: the folder holds another run.
    """

    def __init__(self, folder: Path, run: dict[str, Any], numerics: dict[str, Any] | None, *, remedy: str = "") -> None:
        self.folder = folder
        self.file = folder / JOURNAL
        self.numerics: dict[str, Any] = numerics or {}
        self.done: dict[int, dict[str, Any]] = {}
        self.survey: list[dict[str, Any]] = []
        self.decision: dict[str, Any] | None = None
        self.laps: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(
                f"{folder.parent}: cannot be made: {error.strerror}; choose another output folder"
            ) from None
        lines = _whole_lines(self.file)
        if not lines:
            self._rewrite([{"run": run, "numerics": numerics}])
            return
        head = lines[0]
        if different := _differences(head["run"], json.loads(json.dumps(run))):
            raise PlanError(
                f"{folder.parent}: holds an unfinished run with other {', '.join(different)}: give the same arguments "
                f"to go on, --fresh (fresh=True) to start anew, or another output folder{remedy}"
            )
        head["numerics"] = head["numerics"] or numerics
        self.numerics = head["numerics"] or {}
        for entry in lines[1:]:
            self.laps += [entry["phases"]] if "phases" in entry else []
            if "shard" not in entry:
                self._take(entry)
                continue
            file = folder / entry["file"]
            if not file.is_file():  # a run killed while it moved shards to their places
                file = folder.parent / entry["file"]
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise CheckpointError(
                    f"{file}: the journal says it is complete, but it is not there or has another size: "
                    "start anew with --fresh"
                )
            self.done[entry["shard"]] = entry
        self._rewrite(lines)  # a line cut short by a kill goes

    def add(self, entry: dict[str, Any]) -> None:
        """Record a finished shard; returns when the line is on the disk. Of several processes the first one writes."""
        self.done[entry["shard"]] = entry
        self._append(entry)

    def note(self, entry: dict[str, Any]) -> None:
        """Record what a survey found in a block, or what was decided after it."""
        self._take(entry)
        self._append(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "survey" in entry:
            self.survey.append(entry)
        else:
            self.decision = entry["decision"]

    def visible(self) -> None:
        """Raises PlanError where this process does not see the folder that the first one writes to."""
        if not self.file.is_file():
            raise PlanError(
                f"{self.folder.parent}: is not there on {platform.node()}: all machines of a run must see the output "
                "folder, so choose one on a file system that they share"
            )

    def _append(self, entry: dict[str, Any]) -> None:
        if not ranks.first():
            return
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        sync(partial)
        os.replace(partial, self.file)
        sync(self.folder)

    def remove(self) -> None:
        """Delete the work folder; the run is complete."""
        shutil.rmtree(self.folder)


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    # bytes: a kill may cut a character, and some characters in a text look like line ends
    raw = file.read_bytes().splitlines(keepends=True)
    if raw and not raw[-1].endswith(b"\n"):
        raw.pop()
    return [json.loads(line) for line in raw]


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What is not the same: `data`, `arguments (seed)`."""
    found = []
    for key in {**old, **new}:
        was, now = old.get(key), new.get(key)
        if was != now:
            inner = _differences(was, now) if key in ("arguments", "versions") and was and now else []
            found.append(f"{key} ({', '.join(inner)})" if inner else key)
    return found


def prepare(output: Path, run: dict[str, Any], *, fresh: bool, resume: bool, remedy: str = "") -> bool:
    """Make the output folder ready; True if it already holds this very run, finished.

    Args:
        remedy: what else can be done where it holds another run.

    Raises:
        PlanError: the folder holds other work, which is never overwritten; or `resume` was asked for and there is
            nothing to go on from.
    """
    check(output)
    config = output / "config.json"
    held = _run_of(output / "report.json")
    if fresh:
        _clear(output)
    elif config.is_file() and held is not None:
        different = _differences(held, json.loads(json.dumps(run)))
        if not different:
            shutil.rmtree(output / WORK, ignore_errors=True)  # killed between its last two steps
            return True
        raise PlanError(
            f"{output}: holds a finished run with other {', '.join(different)}: choose another output folder, or "
            f"--fresh (fresh=True) to replace it{remedy}"
        )
    elif held is not None and not (output / WORK).is_dir():
        raise PlanError(f"{output}: holds half of a deleted run: choose another output folder, or --fresh (fresh=True)")
    if resume and not (output / WORK / JOURNAL).is_file():
        raise PlanError(f"{output}: nothing to resume there; leave --resume out to start")
    return False


def finished(output: Path, run: dict[str, Any]) -> bool:
    """Whether a folder holds this very run, finished."""
    return (output / "config.json").is_file() and _run_of(output / "report.json") == json.loads(json.dumps(run))


def same(output: Path, run: dict[str, Any]) -> bool:
    """Whether a folder holds this very run, finished or not, or nothing."""
    held = _run_of(output / "report.json")
    lines = _whole_lines(output / WORK / JOURNAL)
    held = lines[0]["run"] if held is None and lines else held
    return held is None or not _differences(held, json.loads(json.dumps(run)))


def check(output: Path) -> None:
    """Refuse a place that is not free for a run.

    Raises:
        PlanError: it is a file, a folder with files that no bitpress run has left, or where nothing can be written.
    """
    check_place(output)
    ours = (output / WORK).is_dir() or _run_of(output / "report.json") is not None
    if not ours and output.is_dir() and any(output.iterdir()):
        raise PlanError(f"{output}: holds other files, which bitpress does not overwrite: choose another output folder")


def check_place(output: Path) -> None:
    """PlanError if a place is no folder and cannot become one, or cannot be written to."""
    if os.path.exists(output) and not output.is_dir():
        raise PlanError(f"{output}: is a file; choose a folder")
    above = next(p for p in (output.absolute(), *output.absolute().parents) if os.path.exists(p))
    if not above.is_dir():
        raise PlanError(f"{output}: {above} is a file; choose another output folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PlanError(f"{output}: {above} cannot be written to; choose another output folder")


def _run_of(report: Path) -> dict[str, Any] | None:
    """What run a report.json is of; None if it is not one of ours."""
    if not report.is_file():
        return None
    try:
        run = json.loads(report.read_text(encoding="utf-8"))["run"]
    except (ValueError, KeyError, TypeError):
        return None
    return run if isinstance(run, dict) else None


def _clear(output: Path) -> None:
    """Delete what a bitpress run has written.

    config.json goes first, so that no half of it looks complete, and report.json last: it says that the rest is ours.
    """
    from bitpress.checkpoint import INDEX
    from bitpress.report import PAGE

    for name in ("config.json", INDEX, "recipe.yaml", PAGE, *OF_FORMATS, *OF_THE_MODEL, *OF_TRAINING):
        (output / name).unlink(missing_ok=True)
    for folder in output.glob("checkpoint-*"):
        if folder.is_dir():
            shutil.rmtree(folder)
    for shard in output.glob("model-*-of-*.safetensors"):
        shard.unlink()
    shutil.rmtree(output / WORK, ignore_errors=True)
    (output / "report.json").unlink(missing_ok=True)
