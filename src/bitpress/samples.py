"""Answers of a model before and after compression, for the report of a run.

They need a model as a whole, which a run does not. So a run makes them only if it is given prompts; the command line
also does without, where that takes no more memory than the run has taken, and stops after a few seconds.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitpress.budget import gib
from bitpress.errors import BitpressError, CheckpointError
from bitpress.generation import BROKEN, answer
from bitpress.inspection import Inspection
from bitpress.loading import load_checkpoint, open_checkpoint, tokenizers_of
from bitpress.report import write_report

PROMPT = "What is the capital of France, and what is it known for?"  # where the user gives none
NEW_TOKENS = 64
MOST_SECONDS = 10.0  # an answer, where the user gives no prompt


def section(prompts: Sequence[str], before: Sequence[str], after: Sequence[str], note: str = "") -> dict[str, Any]:
    """The report's section "generations"."""
    found = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)]
    return {"answers": found, "note": note}


def told(model: Any, tokenizer: Any, prompts: Sequence[str], most_seconds: float | None = None) -> list[str]:
    """What a loaded model answers."""
    return [answer(model, tokenizer, p, NEW_TOKENS, most_seconds=most_seconds).text for p in prompts]


def add(
    folder: Path,
    base: str | os.PathLike[str] | None = None,
    prompts: Sequence[str] = (),
    *,
    tokenizer: Any = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    trust_pickle: bool = False,
) -> str:
    """Write the answers of base and checkpoint into the report of a finished run.

    Args:
        base: None: where the report says that it was.
        prompts: none: `PROMPT`, if there is memory for it and a tokenizer.

    Returns:
        Why there are none; empty if all went well.
    """
    report = read(folder)
    given, limit = bool(prompts), None if prompts else MOST_SECONDS
    prompts = tuple(prompts) or (PROMPT,)
    held = [a["prompt"] for a in (report.get("generations") or {}).get("answers", ())]
    if held == list(prompts) or (held and not given):
        return ""
    try:
        found = [open_checkpoint(place, trust_pickle) for place in (base or _base_of(report), folder)]
        tokens, _ = tokenizers_of(tokenizer, [found[0], found[0]], trust_remote_code)
        if not given and (why := _too_large(found[0], report["totals"])):
            raise CheckpointError(why)
        said: list[list[str]] = []
        for at in found:
            model = load_checkpoint(at, "auto", device, trust_remote_code)
            said.append(told(model, tokens, prompts, limit))
            del model
            gc.collect()
        made, why = section(prompts, said[0], said[1], _note(limit)), ""
    except (BitpressError, *BROKEN) as error:  # the checkpoint is finished all the same
        why = f"no generations: {str(error) or type(error).__name__}"
        made = section((), (), (), f"{why[0].upper()}{why[1:]}")
    write_report(folder, {**report, "generations": made}, recipe_of(folder))
    return why


def read(folder: Path) -> dict[str, Any]:
    """report.json of a run.

    Raises:
        CheckpointError: there is none, or the run is not finished.
    """
    file = folder / "report.json"
    if file.is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: holds no config.json, so its run is not finished: start its command again")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        known = isinstance(report["layers"], list) and "totals" in report and "run" in report
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise CheckpointError(f"{file}: no report of a bitpress run; give the output folder of a finished one")
    return dict(report)


def recipe_of(folder: Path) -> str:
    """recipe.yaml of a run; empty if it is gone."""
    file = folder / "recipe.yaml"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _base_of(report: Mapping[str, Any]) -> str:
    """The folder of the model that was compressed.

    Raises:
        CheckpointError: it was in memory.
    """
    model = report["run"].get("model")
    if not isinstance(model, dict) or "folder" not in model:
        raise CheckpointError("the report does not say where the model was that was compressed; give it (--base)")
    return str(model["folder"])


def _note(limit: float | None) -> str:
    cut = "" if limit is None else f", or {limit:.0f} s"
    return f"Greedy, in the model's dtype, up to {NEW_TOKENS} tokens{cut}. Marked: from where it differs."


def _too_large(base: Inspection, totals: Mapping[str, Any]) -> str:
    """Why the whole model would take more memory than the run has; empty if it would not."""
    had = totals["peak_device_bytes"] or totals["peak_host_bytes"] // 2  # the other half is the process itself
    if base.bytes <= had:
        return ""
    how = "bitpress report OUT --prompt TEXT makes some"
    return f"the whole model takes {gib(base.bytes)}, more than the run did; {how}"
