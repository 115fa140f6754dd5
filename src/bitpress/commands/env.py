"""`bitpress env`."""

from __future__ import annotations

from typing import Any

from bitpress.options import Json, out, print_json


def env(as_json: Json = False) -> None:
    """Say what to paste into a bug report: versions, processor, memory, GPUs, settings. No paths, no secrets."""
    from bitpress.environment import environment

    found = environment()
    if as_json:
        print_json(found)
        return
    for topic, value in found.items():
        out.print(f"{topic + ':':<26}{_text(value)}", markup=False, highlight=False)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {of}" for name, of in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(value) or "none"
    return {True: "yes", False: "no", None: "none"}.get(value, value) if not isinstance(value, str) else value
