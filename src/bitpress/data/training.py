"""Training sequences: token ids with labels, read from any data that calibration is read from.

Prompts have no labels: of a conversation the assistant's turns are taught, of `prompt` and `response` the response.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bitpress.data.calibration import check_positive, preprocessed, separator_ids
from bitpress.data.rows import Reader, Span, as_vector, choose_reader
from bitpress.data.sources import CHUNK, Wanted, open_source, read_rows
from bitpress.errors import DataError, counted

NO_LABEL = -100  # what losses leave out
Unit = np.ndarray[Any, np.dtype[np.int32]]  # ids of one document; -1 - id where there is no label


@dataclass
class TrainingData(Dataset[dict[str, Tensor]]):
    """Token sequences with labels. They lie in a nameless temporary file, so memory does not grow with the data.

    Attributes:
        store: all sequences after one another, int32; -1 - id where there is no label.
        starts: where each begins, and the end.
        summary: source, split, sequences, tokens, labels, packed, fingerprint (SHA-256 over all of it).
        notes: what the user should know.
    """

    store: Unit
    starts: np.ndarray[Any, np.dtype[np.int64]]
    summary: dict[str, Any]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, each int64 (L,)."""
        raw = torch.from_numpy(self.store[self.starts[i] : self.starts[i + 1]].astype(np.int64))
        return {"input_ids": torch.where(raw < 0, -1 - raw, raw), "labels": torch.where(raw < 0, NO_LABEL, raw)}

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return max(int(self.store.max()), -1 - int(self.store.min()))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(np.diff(self.starts).max())


@dataclass(frozen=True)
class TrainingSets:
    """What is trained on, and what is evaluated on, if anything."""

    train: TrainingData
    evaluation: TrainingData | None


def load_training(
    dataset: Any,
    *,
    tokenizer: Any = None,
    split: str | None = None,
    dataset_config_name: str | None = None,
    dataset_path: str | Path | None = None,
    text_column: str = "text",
    max_seq_length: int = 384,
    pack: bool = True,
    separator: str | None = None,
    mask_prompts: bool = True,
    max_samples: int | None = None,
    preprocessing_num_workers: int | None = None,
    preprocessing_func: Callable[[Any], Any] | None = None,
    trust_remote_code: bool = False,
    streaming: bool = False,
) -> TrainingData:
    """Read training sequences.

    Args:
        dataset, tokenizer, dataset_config_name, dataset_path, text_column, separator, preprocessing_func,
            preprocessing_num_workers, trust_remote_code, streaming: as for `load_calibration`.
        split: split with an optional slice.
        max_seq_length: tokens a sequence; longer rows are cut off, or with `pack` cut into several.
        pack: join rows with the separator and cut them into full sequences. Rows of token ids are never joined.
        mask_prompts: give prompts no labels.
        max_samples: rows to read at most.

    Raises:
        DataError: as of `load_calibration`, or nothing has a label.
    """
    check_positive(
        max_seq_length=max_seq_length, max_samples=max_samples, preprocessing_num_workers=preprocessing_num_workers
    )
    if split is None and isinstance(dataset, Mapping) and "train" in dataset:
        split = "train"
    wanted = Wanted(
        split=split, config=dataset_config_name, path=dataset_path, streaming=streaming,
        workers=preprocessing_num_workers, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    source = open_source(dataset, wanted)
    rows = preprocessed(islice(read_rows(source, False, 0), max_samples), preprocessing_func)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source.name}: empty: there are no rows. Check the data and the split.")
    reader = choose_reader(
        first[1], source=source.name, tokenizer=tokenizer, text_column=text_column, registered=source.registered
    )
    rows, notes = chain([first], rows), list(source.notes)
    if reader.kind == "ids":
        units, pack = _id_rows(rows, reader), False
    else:
        closing = separator_ids(tokenizer, separator, notes).numpy().astype(np.int32)
        if mask_prompts and reader.answers is not None and not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{source.name}: prompts are found in the tokens by a fast tokenizer alone, and this is none; train on "
                "prompts too: mask_prompts=False (--no-mask-prompts)"
            )
        special = not pack and reader.kind == "text" and not source.whole_files
        units = _tokenized(rows, reader, tokenizer, special, mask_prompts)
        units = _joined(units, closing, reader, max_seq_length) if pack else _closed(units, closing, reader)
    written = _written(unit[:max_seq_length] for unit in units)
    if not written.sequences:
        prompts = f"all of it is prompts, of sequences cut at max_seq_length {max_seq_length}"
        why = prompts if written.silent else "no row has two tokens"
        raise DataError(f"{source.name}: nothing to learn from: {why}. Check the data, or mask_prompts=False.")
    if written.silent:
        notes.append(f"left out: {counted(written.silent, 'sequence')} without an answer")
    summary = {
        "source": source.name, "split": source.split, "sequences": written.sequences, "tokens": int(written.starts[-1]),
        "labels": written.labels, "packed": pack, "fingerprint": written.digest,
    }  # fmt: skip
    return TrainingData(written.store, written.starts, summary, tuple(notes))


class Collate:
    """Sequences as a batch (B, L), padded at the end where their lengths differ.

    Args:
        pad: id to pad with.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`input_ids`, `labels` and, if there is padding, `attention_mask`."""
        from torch.nn.utils.rnn import pad_sequence

        ids = pad_sequence([r["input_ids"] for r in rows], batch_first=True, padding_value=self.pad)
        batch = {
            "input_ids": ids,
            "labels": pad_sequence([r["labels"] for r in rows], batch_first=True, padding_value=NO_LABEL),
        }
        lengths = torch.tensor([len(r["input_ids"]) for r in rows])
        if int(lengths.min()) < ids.shape[1]:
            batch["attention_mask"] = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        return batch


def _id_rows(rows: Iterable[tuple[int, Any]], reader: Reader) -> Iterator[Unit]:
    """Rows that are token ids, with their own labels if they bring any."""
    for number, row in rows:
        ids = reader(number, row).numpy().astype(np.int32)
        if isinstance(row, Mapping) and row.get("labels") is not None:
            labels = as_vector(row["labels"], "labels")
            if row.get("attention_mask") is not None and len(labels) != len(ids):
                labels = labels[as_vector(row["attention_mask"], "attention_mask") != 0]
            found = labels.numpy()
            if len(found) != len(ids) or (found[found != NO_LABEL] != ids[found != NO_LABEL]).any():
                raise DataError(f"row {number}: labels must be the input_ids, {NO_LABEL} where there is no loss.")
            ids = np.where(found == NO_LABEL, -1 - ids, ids)
        yield ids


def _tokenized(
    rows: Iterable[tuple[int, Any]], reader: Reader, tokenizer: Any, special: bool, mask: bool
) -> Iterator[Unit]:
    """The ids of each text, without labels outside its answers."""
    size, iterator = 1, iter(rows)
    while chunk := list(islice(iterator, size)):
        read = [(reader(number, row), reader.spans(number, row) if mask else None) for number, row in chunk]
        read = [(text, spans) for text, spans in read if text.strip()]
        if read:
            where = any(spans is not None for _, spans in read)
            encoded = tokenizer(
                [text for text, _ in read], add_special_tokens=special, return_attention_mask=False, verbose=False,
                return_offsets_mapping=where,
            )  # fmt: skip
            for i, (_, spans) in enumerate(read):
                ids = np.array(encoded["input_ids"][i], dtype=np.int32)
                yield ids if spans is None else np.where(_inside(encoded["offset_mapping"][i], spans), ids, -1 - ids)
        size = min(2 * size, CHUNK)


def _inside(offsets: list[tuple[int, int]], spans: list[Span]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which tokens, by the characters (L, 2) that they stand for, belong to the spans: those that end in one."""
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    inside = np.zeros(len(places), dtype=np.bool_)
    for start, end in spans:
        inside |= (places[:, 1] > start) & (places[:, 1] <= end) & (places[:, 1] > places[:, 0])
    return inside


def _ends_with(unit: Unit, closing: Unit) -> bool:
    tail = unit[len(unit) - len(closing) :]
    return len(unit) >= len(closing) and bool((np.where(tail < 0, -1 - tail, tail) == closing).all())


def _closed(units: Iterable[Unit], closing: Unit, reader: Reader) -> Iterator[Unit]:
    """Each text with what closes a document, which is taught too; a chat template closes its own."""
    for unit in units:
        yield unit if reader.kind == "chat" or _ends_with(unit, closing) else np.concatenate([unit, closing])


def _joined(units: Iterable[Unit], closing: Unit, reader: Reader, length: int) -> Iterator[Unit]:
    """Documents joined and cut into sequences of `length`; a shorter rest counts only if it is all."""
    between = -1 - closing if reader.kind == "chat" else closing
    waiting: list[Unit] = []
    held, any_full = 0, False
    last: Unit | None = None
    for unit in units:
        if last is not None and not _ends_with(last, closing):
            waiting.append(between)
            held += len(between)
        waiting.append(unit)
        held, last = held + len(unit), unit
        if held >= length:
            joined = np.concatenate(waiting)
            full = held // length * length
            yield from joined[:full].reshape(-1, length)
            waiting, held, any_full = [joined[full:]], held - full, True
    if waiting and held and not any_full:
        yield np.concatenate(waiting)


class _Written(NamedTuple):
    """Sequences in their file."""

    store: Unit
    starts: np.ndarray[Any, np.dtype[np.int64]]
    sequences: int
    labels: int
    silent: int
    digest: str


def _written(units: Iterable[Unit]) -> _Written:
    """Write sequences to a nameless file; those in which nothing can be learnt are counted and left out."""
    lengths, labels, silent, digest = [0], 0, 0, hashlib.sha256()
    with tempfile.TemporaryFile(prefix="bitpress-") as file:
        for unit in units:
            taught = int((unit[1:] >= 0).sum())  # the first token is predicted from nothing
            if not taught:
                silent += 1 if len(unit) > 1 else 0
                continue
            raw = unit.astype("<i4").tobytes()
            file.write(raw)
            digest.update(len(unit).to_bytes(8, "little") + raw)
            lengths.append(len(unit))
            labels += taught
        file.flush()
        empty = np.zeros(0, dtype=np.int32)
        store = np.memmap(file, dtype=np.int32, mode="r") if len(lengths) > 1 else empty
    return _Written(store, np.cumsum(lengths), len(lengths) - 1, labels, silent, digest.hexdigest())
