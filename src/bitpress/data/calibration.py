"""Calibration sequences: text is joined and cut to one length, rows that are token ids stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.data.local import cause_of
from bitpress.data.rows import Reader, choose_reader
from bitpress.data.sources import CHUNK, Source, Wanted, default_text, open_source, read_rows
from bitpress.data.splits import calibration_split
from bitpress.errors import DataError, counted

__all__ = ["CalibrationData", "default_text", "load_calibration"]


@dataclass(frozen=True)
class CalibrationData:
    """Token sequences for calibration, without padding.

    Attributes:
        sequences: each int64 (L,); all of one length when packed (but for a single short one).
        summary: source, split, sequences, tokens, min_length, max_length, packed, shuffled, seed, fingerprint
            (SHA-256 over all ids and lengths, in order).
        notes: what the user should know, such as fewer sequences than asked for.
    """

    sequences: tuple[Tensor, ...]
    summary: dict[str, Any]
    notes: tuple[str, ...] = ()

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield int64 (B, L), B <= batch_size: equal lengths together, the longest first, else in order.

        Raises:
            DataError: batch_size is below 1.
        """
        check_positive(batch_size=batch_size)
        by_length: dict[int, list[Tensor]] = {}
        for sequence in self.sequences:
            by_length.setdefault(len(sequence), []).append(sequence)
        for length in sorted(by_length, reverse=True):
            group = by_length[length]
            for start in range(0, len(group), batch_size):
                yield torch.stack(group[start : start + batch_size])


def load_calibration(
    dataset: Any = None,
    *,
    tokenizer: Any = None,
    split: str | None = None,
    splits: Any = None,
    dataset_config_name: str | None = None,
    dataset_path: str | Path | None = None,
    text_column: str = "text",
    num_samples: int = 512,
    max_seq_length: int = 384,
    pack: bool = True,
    separator: str | None = None,
    shuffle: bool = True,
    seed: int = 42,
    preprocessing_num_workers: int | None = None,
    preprocessing_func: Callable[[Any], Any] | None = None,
    trust_remote_code: bool = False,
    streaming: bool = False,
) -> CalibrationData:
    """Load calibration sequences from any form of data.

    Text and messages are tokenized, joined with the separator and cut into `num_samples` sequences of exactly
    `max_seq_length` tokens; reading stops as soon as there are enough. Rows with `input_ids` are never
    joined: they are truncated, and positions that an `attention_mask` leaves out are dropped.

    With `shuffle` rows are read in a seeded order. Data that is one single document (a .txt file, the
    built-in text) is tokenized whole without special tokens and cut into windows, of which the seed chooses
    `num_samples`. A stream is shuffled in a buffer of 1000 rows; a DataLoader and an iterator keep their own
    order. The order depends on the seed alone, never on the global random state.

    Args:
        dataset: None for the built-in text; a registered name (see `bitpress.data.table`) or hub id; a local
            file (jsonl, json, csv, tsv, parquet, arrow, txt: one document) or folder; a `datasets` object; a
            list of texts, of message lists or of dicts; a DataLoader that gives `input_ids` or texts.
        tokenizer: a transformers tokenizer; not needed for data with `input_ids`.
        split: split with an optional slice, `train[:5%]`; of a single .txt file the slice counts lines.
        splits: the same by purpose: str, list, or dict with "calibration", else "train".
        dataset_config_name: configuration of a hub dataset.
        dataset_path: file or folder that is read as the registered dataset (`custom`, `json`, `gsm8k`, ...).
        text_column: column of the text; a name other than "text" goes before messages and registered columns.
        num_samples: sequences asked for; fewer are told in the notes.
        max_seq_length: tokens a sequence.
        pack: False keeps each row of text a sequence of its own, truncated, with its special tokens.
        separator: text between documents; None for the tokenizer's end-of-text token, "" for nothing.
        shuffle: False takes the first rows or windows in order.
        seed: of the shuffle.
        preprocessing_num_workers: processes that prepare a hub dataset.
        preprocessing_func: row -> row, before anything else is read from it.
        trust_remote_code: for dataset scripts, which `datasets` runs before version 4 only.
        streaming: read a hub dataset without downloading it whole.

    Raises:
        DataError: a bad value, data that cannot be found or read, a missing split, column, tokenizer or chat
            template, or no tokens.
    """
    check_positive(
        num_samples=num_samples,
        max_seq_length=max_seq_length,
        preprocessing_num_workers=preprocessing_num_workers,
    )
    wanted = Wanted(
        split=calibration_split(split, splits),
        config=dataset_config_name,
        path=dataset_path,
        streaming=streaming,
        workers=preprocessing_num_workers,
        trust_remote_code=trust_remote_code,
    )
    source = open_source(dataset, wanted)
    rows = preprocessed(read_rows(source, shuffle, seed), preprocessing_func)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source.name}: empty: there are no rows. Check the data and the split.")
    reader = choose_reader(
        first[1], source=source.name, tokenizer=tokenizer, text_column=text_column, registered=source.registered
    )
    rows = chain([first], rows)

    skipped = _Skipped()
    notes = list(source.notes)
    if text_column not in ("text", *reader.columns):
        why = f"'{reader.columns[0]}' goes before it" if reader.columns else "the rows have no columns"
        notes.append(f"text_column: '{text_column}' is not used: {why}")
    if reader.kind == "ids":
        pack = False
        units = _token_rows(rows, reader, skipped)
    else:
        # a window may begin anywhere, so only whole rows get special tokens; a template brings its own
        special = not pack and reader.kind == "text" and not source.whole_files
        units = _tokenized(rows, reader, tokenizer, skipped, special)
    if pack:
        ids = separator_ids(tokenizer, separator, notes)
        # with one document there are no rows to shuffle: windows are chosen instead
        choose = shuffle and hasattr(source.rows, "__len__") and len(source.rows) == 1
        sequences = _packed(units, ids, num_samples, max_seq_length, seed if choose else None)
    else:
        sequences = [unit[:max_seq_length].clone() for _, unit in zip(range(num_samples), units, strict=False)]
    if not sequences:
        raise DataError(f"{source.name}: empty: none of {counted(skipped.count, 'row')} has a token. Check the data.")

    notes += _shortage(sequences, num_samples, max_seq_length, pack)
    if skipped.count:
        notes.append(f"skipped: {counted(skipped.count, 'row')} without tokens")
    summary = _summary(source, sequences, pack, shuffle and not source.ordered, seed)
    return CalibrationData(tuple(sequences), summary, tuple(notes))


@dataclass
class _Skipped:
    """Rows that had no tokens."""

    count: int = 0


def check_positive(**values: int | None) -> None:
    """DataError with every value that is not a whole number of at least 1; None is none."""
    problems = [
        f"{name} must be an integer of at least 1, not {value!r}"
        for name, value in values.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
    ]
    if problems:
        raise DataError(problems)


def preprocessed(rows: Iterable[tuple[int, Any]], function: Callable[[Any], Any] | None) -> Iterator[tuple[int, Any]]:
    """Rows after the user's function; DataError where it fails, or is none."""
    if function is not None and not callable(function):
        raise DataError(f"preprocessing_func must be a function of a row, not {function!r}")
    return _preprocessed(rows, function)


def _preprocessed(rows: Iterable[tuple[int, Any]], function: Callable[[Any], Any] | None) -> Iterator[tuple[int, Any]]:
    for number, row in rows:
        if function is not None:
            try:
                row = function(row)
            except Exception as error:
                raise DataError(f"preprocessing_func: failed on row {number}: {cause_of(error)}") from error
        yield number, row


def _token_rows(rows: Iterable[tuple[int, Any]], reader: Reader, skipped: _Skipped) -> Iterator[Tensor]:
    """The ids of each row, each int64 (L,)."""
    for number, row in rows:
        ids = reader(number, row)
        if len(ids):
            yield ids
        else:
            skipped.count += 1


def _tokenized(
    rows: Iterable[tuple[int, Any]], reader: Reader, tokenizer: Any, skipped: _Skipped, special: bool
) -> Iterator[Tensor]:
    """The ids of each text, each int64 (L,); chunks grow, since a few long documents may be enough."""
    iterator = iter(rows)
    size = 1
    while chunk := [row for _, row in zip(range(size), iterator, strict=False)]:
        texts = [reader(number, row) for number, row in chunk]
        full = [text for text in texts if text.strip()]
        skipped.count += len(texts) - len(full)
        if full:
            encoded = tokenizer(full, add_special_tokens=special, return_attention_mask=False, verbose=False)
            for ids in encoded["input_ids"]:
                if ids:
                    yield torch.tensor(ids, dtype=torch.int64)
                else:
                    skipped.count += 1
        size = min(2 * size, CHUNK)


def separator_ids(tokenizer: Any, separator: str | None, notes: list[str]) -> Tensor:
    """The ids (S,) between two documents."""
    if separator is None:
        if tokenizer.eos_token_id is None:
            notes.append("the tokenizer has no end-of-text token: documents are joined without a separator")
            return torch.empty(0, dtype=torch.int64)
        return torch.tensor([tokenizer.eos_token_id], dtype=torch.int64)
    if not isinstance(separator, str):
        raise DataError(f"separator must be a string ('' for none), not {type(separator).__name__}")
    ids = tokenizer([separator], add_special_tokens=False, return_attention_mask=False)["input_ids"][0]
    if separator and not ids:
        raise DataError(f"separator {separator!r} has no token here. Give another, or '' for none.")
    return torch.tensor(ids, dtype=torch.int64)


def _packed(
    units: Iterable[Tensor], separator: Tensor, count: int, length: int, choice_seed: int | None
) -> list[Tensor]:
    """Join documents and cut them: up to `count` tensors (length,), or one short tensor if that is all.

    With `choice_seed` everything is read, and the seed chooses among the windows.
    """
    parts: list[Tensor] = []
    total = 0
    for unit in units:
        # a chat template may close a document with the separator itself
        if parts and len(separator) and not torch.equal(parts[-1][-len(separator) :], separator):
            parts.append(separator)
            total += len(separator)
        parts.append(unit)
        total += len(unit)
        if choice_seed is None and total >= count * length:
            break
    if not parts:
        return []
    stream = torch.cat(parts)
    if total < length:
        return [stream]
    windows = stream[: total // length * length].view(-1, length)
    if choice_seed is None:
        return [window.clone() for window in windows[:count]]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(choice_seed))
    return [windows[i].clone() for i in order[:count].tolist()]


def _shortage(sequences: list[Tensor], count: int, length: int, packed: bool) -> list[str]:
    """A note where the data gives less than was asked for."""
    if packed and len(sequences) == 1 and len(sequences[0]) < length:
        given = f"one of {len(sequences[0])} tokens"
    elif len(sequences) < count:
        given = str(len(sequences))
    else:
        return []
    size = f" of {length} tokens" if packed else ""
    return [f"asked for {counted(count, 'sequence')}{size}, the data gives {given}"]


def _summary(source: Source, sequences: list[Tensor], packed: bool, shuffled: bool, seed: int) -> dict[str, Any]:
    lengths = [len(s) for s in sequences]
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.numpy().astype("<i8").tobytes())
    return {
        "source": source.name,
        "split": source.split,
        "sequences": len(sequences),
        "tokens": sum(lengths),
        "min_length": min(lengths),
        "max_length": max(lengths),
        "packed": packed,
        "shuffled": shuffled,
        "seed": seed,
        "fingerprint": digest.hexdigest(),
    }
