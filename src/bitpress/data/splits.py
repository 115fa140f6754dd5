"""Which rows are meant: `split`, `splits` and slices such as `train[:5%]+test[10:20]`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from bitpress.errors import DataError, did_you_mean

_PART = re.compile(r"\s*(?P<name>\w+(?:\.\w+)*)\s*(?P<slice>\[[^\]]*\])?")
_STREAM_SLICE = re.compile(r"\[(\d*):(\d*)\]")
EVALUATION = ("validation", "eval", "test")
_FREE_NAMES = ("train", "calibration", "all")


def calibration_split(split: Any, splits: Any) -> str | None:
    """The split that calibrates, from `split` (str) and `splits` (str, list, or a dict by purpose).

    `splits` names the one for "calibration", else the one for "train"; a list is searched by the names of its
    splits, and a list or dict with a single entry means that entry.

    Returns:
        A split as the user wrote it, with its slice, or None where none was asked for.

    Raises:
        DataError: both are given and differ, a wrong type, or nothing in `splits` is for calibration.
    """
    if split is not None and not isinstance(split, str):
        raise DataError(f"split must be a string such as 'train[:5%]', not {type(split).__name__}")
    chosen = _from_splits(splits, ("calibration", "train"))
    if split is not None and chosen is not None and split != chosen:
        raise DataError(f"split='{split}' and splits (calibration: '{chosen}') differ. Give one of them.")
    return split if split is not None else chosen


def training_split(splits: Any) -> str | None:
    """The split to train on: the one for "train", else the only one; None where none was asked for.

    Raises:
        DataError: a wrong type, or nothing in `splits` is for training.
    """
    return _from_splits(splits, ("train",))


def evaluation_split(splits: Any) -> str | None:
    """The split of a dict of splits that is for evaluation ("validation", "eval" or "test"), None if there is none."""
    if not isinstance(splits, Mapping):
        return None
    return next((_as_text(splits[name]) for name in EVALUATION if splits.get(name) is not None), None)


def _from_splits(splits: Any, purposes: Sequence[str]) -> str | None:
    if splits is None or isinstance(splits, str):
        return splits
    if isinstance(splits, Mapping):
        named = {str(key): value for key, value in splits.items() if value is not None}
    elif isinstance(splits, Sequence):
        named = {split_name(value) if isinstance(value, str) else str(value): value for value in splits}
    else:
        raise DataError(f"splits must be a string, a list or a dict, not {type(splits).__name__}")
    if not named:
        return None
    for purpose in purposes:
        if purpose in named:
            return _as_text(named[purpose])
    if len(named) == 1 and not isinstance(splits, Mapping):
        return _as_text(next(iter(named.values())))
    raise DataError(
        f"splits has no {' and no '.join(map(repr, purposes))} (it has: {', '.join(named)}). "
        f"Give splits={{'{purposes[0]}': '<split>'}}."
    )


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"a split must be a string such as 'train[:5%]', not {type(value).__name__}")
    return value


def close_name(name: str, known: Iterable[str]) -> str:
    """The remedy " Did you mean 'train'?" where a name is close, else nothing: the message lists them already."""
    hint = did_you_mean(name, known)
    return hint if hint.startswith(" Did") else ""


def split_name(spec: str) -> str:
    """The name before the slice: `train` of `train[:5%]`."""
    match = _PART.match(spec)
    return match["name"] if match else spec


def has_slice(spec: str) -> bool:
    """Whether a split asks for a part or a sum of splits."""
    return "[" in spec or "+" in spec


def pick_split(sets: Mapping[str, Any], spec: str | None, source: str) -> tuple[Any, str]:
    """Pick one of several named sets of rows, and slice it.

    Args:
        sets: rows by split name.
        spec: the split asked for; None takes "calibration", "train" or the only one there is.
        source: name of the data for messages.

    Returns:
        The rows, and the split as written.

    Raises:
        DataError: the split is not there; the message lists those that are.
    """
    there = ", ".join(sets) or "none"
    if spec is None:
        for name in ("calibration", "train"):
            if name in sets:
                return sets[name], name
        if len(sets) == 1:
            name = next(iter(sets))
            return sets[name], name
        raise DataError(
            f"{source}: no split was asked for, and there is no 'calibration' or 'train'. Splits: {there}. "
            "Give split='<name>'."
        )
    for part in spec.split("+"):
        if split_name(part) not in sets:
            hint = close_name(split_name(part), sets)
            raise DataError(f"{source}: no split '{split_name(part)}'. Splits: {there}.{hint}")
    return slice_rows(sets, spec, source), spec


def slice_rows(sets: Mapping[str, Any], spec: str, source: str) -> Any:
    """The rows of `spec`, sliced and summed as `datasets` does; streams take slices of row numbers only.

    Raises:
        DataError: the slice cannot be read, or cannot be had from a stream.
    """
    if not has_slice(spec):
        return sets[split_name(spec)]
    if any(not hasattr(sets[split_name(part)], "__len__") for part in spec.split("+")):
        return _slice_stream(sets[split_name(spec)], spec, source)
    from datasets import Dataset, ReadInstruction, concatenate_datasets

    try:
        parts = ReadInstruction.from_spec(spec).to_absolute({name: len(rows) for name, rows in sets.items()})
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{source}: split '{spec}' cannot be read: {error} Write it as train[:5%] or train[100:200]."
        ) from error
    pieces = []
    for part in parts:
        rows = sets[part.splitname]
        wanted = range(part.from_, max(part.from_, part.to))
        pieces.append(rows.select(wanted) if isinstance(rows, Dataset) else [rows[i] for i in wanted])
    if len(pieces) == 1:
        return pieces[0]
    if all(isinstance(piece, Dataset) for piece in pieces):
        return concatenate_datasets(pieces)
    return [row for piece in pieces for row in piece]


def _slice_stream(stream: Any, spec: str, source: str) -> Any:
    match = _PART.fullmatch(spec.strip())
    numbers = _STREAM_SLICE.fullmatch(match["slice"]) if match and match["slice"] else None
    if numbers is None:
        raise DataError(
            f"{source}: split '{spec}' needs the number of rows, which a stream does not know. "
            "Use one slice of row numbers such as train[:1000], or streaming=False."
        )
    start, stop = (int(n) if n else None for n in numbers.groups())
    if hasattr(stream, "skip"):
        skipped = stream.skip(start) if start else stream
        return skipped if stop is None else skipped.take(max(0, stop - (start or 0)))
    return islice(stream, start, stop)


def slice_single(rows: Any, spec: str | None, own_name: str | None, source: str) -> tuple[Any, tuple[str, ...]]:
    """Slice data that has no splits of its own; a name that does not belong to it is told in a note.

    Returns:
        The rows, and notes.
    """
    if spec is None:
        return rows, ()
    names = [split_name(part) for part in spec.split("+")]
    known: Iterable[str] = (*_FREE_NAMES, split_name(own_name)) if own_name else _FREE_NAMES
    strange = [name for name in names if name not in known]
    notes = tuple(f"{source} is one set of rows: the split name '{name}' says nothing here" for name in strange)
    return slice_rows(dict.fromkeys(names, rows), spec, source), notes
