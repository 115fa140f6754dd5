"""Pairs of source and target as one text: what a decoder that translates or summarizes is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bitpress.errors import DataError

COLUMNS = ("source", "target")
READ_FIRST = ("input_ids", "messages", "conversations", "text")


def joined(separator: str, end: str, before: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
    """A function that makes a text of a row with source and target, and leaves other rows as they are.

    Args:
        separator: between the two.
        end: after them: the end-of-text token, or nothing.
        before: is applied to the row first.
    """

    def join(row: Any) -> Any:
        row = row if before is None else before(row)
        if not isinstance(row, Mapping) or any(c not in row for c in COLUMNS) or any(c in row for c in READ_FIRST):
            return row
        source, target = row["source"], row["target"]
        if not isinstance(source, str) or not isinstance(target, str):
            kinds = ", ".join(type(row[c]).__name__ for c in COLUMNS)
            raise DataError(f"source and target must be texts, not {kinds}")
        return {"text": f"{source}{separator}{target}{end}"}

    return join
