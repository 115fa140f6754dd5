"""From what the user names to rows: built-in text, registered names, the hub, paths, objects in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from bitpress.data.local import cause_of, looks_like_path, open_local
from bitpress.data.splits import close_name, pick_split, slice_single, split_name
from bitpress.data.table import REGISTERED, Registered, find_registered
from bitpress.errors import DataError, did_you_mean

# rows that are fetched together: one call of a fast tokenizer, and the most that is read too much
CHUNK = 64
STREAM_BUFFER = 1000


@dataclass(frozen=True)
class Source:
    """Opened data.

    Attributes:
        name: what messages and the summary call it.
        rows: list, `datasets.Dataset` or the like (with `len` and `[]`), or any iterable of rows.
        split: the split as written, None where there is none.
        registered: how to read a row, for a registered dataset.
        whole_files: the rows are whole text files.
        ordered: the order is not ours to change (a DataLoader, an iterator).
        notes: what the user should know.
    """

    name: str
    rows: Any
    split: str | None = None
    registered: Registered | None = None
    whole_files: bool = False
    ordered: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What to open, beside the name: split with slice, configuration, path and the loader's options."""

    split: str | None = None
    config: str | None = None
    path: str | Path | None = None
    streaming: bool = False
    workers: int | None = None
    trust_remote_code: bool = False


def default_text() -> str:
    """The built-in calibration text: prose, dialogue, code, arithmetic and several languages, about 65 KB."""
    return resources.files("bitpress").joinpath("assets/calibration.txt").read_text(encoding="utf-8")


def open_source(dataset: Any, wanted: Wanted) -> Source:
    """Open a dataset in any of its forms.

    Raises:
        DataError: it cannot be found, loaded or recognised; the message has the cause in one line.
    """
    if dataset is None:
        if wanted.path is not None:
            return _open_path(Path(wanted.path), wanted)
        note = "no dataset was given: the built-in text calibrates"
        return _documents(Source("built-in text", [default_text()], whole_files=True, notes=(note,)), wanted.split)
    if isinstance(dataset, Path):
        return _open_path(dataset, wanted)
    if isinstance(dataset, str):
        return _open_name(dataset, wanted)
    return _open_object(dataset, wanted)


def _open_name(name: str, wanted: Wanted) -> Source:
    registered = find_registered(name)
    if registered is None and wanted.path is not None:
        raise DataError(
            f"dataset '{name}' is not registered, so it cannot describe dataset_path={wanted.path}."
            + did_you_mean(name, REGISTERED)
        )
    if registered is not None and wanted.path is not None:
        opened = _open_path(Path(wanted.path), wanted, registered.builder)
        return replace(opened, registered=registered)
    if registered is not None and not registered.hub_id:
        raise DataError(
            f"dataset '{name}' is a kind of file. Add dataset_path=<file or folder>, or give that as dataset."
        )
    if registered is None:
        path = _expand(name)
        if path.exists() or looks_like_path(name):
            return _open_path(path, wanted)
    return _open_hub(name, registered, wanted)


def _open_path(path: Path, wanted: Wanted, builder: str = "") -> Source:
    name = str(path)
    sets = open_local(_expand(path), builder=builder, config=wanted.config)
    first = next(iter(sets.values()))
    if isinstance(first, list):
        return _documents(Source(name, first, whole_files=True), wanted.split, strict=True)
    rows, split = pick_split(sets, wanted.split, name)
    return Source(name, rows, split)


def _expand(path: str | Path) -> Path:
    """With the home folder for `~`; unlike pathlib, an unknown user is left for the message of a missing file."""
    return Path(os.path.expanduser(path))


def _documents(source: Source, spec: str | None, *, strict: bool = False) -> Source:
    """Slice text files: by lines where there is one, by files where there are several."""
    if spec is None:
        return source
    one = len(source.rows) == 1
    lines = source.rows[0].splitlines(keepends=True) if one else source.rows
    notes: tuple[str, ...] = ()
    if strict:
        picked = pick_split({"train": lines}, spec, source.name)[0]
    else:
        picked, notes = slice_single(lines, spec, None, source.name)
    return replace(source, rows=["".join(picked)] if one else picked, split=spec, notes=source.notes + notes)


def _open_hub(name: str, registered: Registered | None, wanted: Wanted) -> Source:
    hub_id = registered.hub_id if registered else name
    options: dict[str, Any] = {}
    spec = wanted.split
    if registered is not None:
        spec = spec or registered.split
        if wanted.config is None and registered.data_files:
            # one file of many: the counts that the repository states do not apply
            options = {"data_files": registered.data_files, "verification_mode": "no_checks"}
        if registered.revision:
            options["revision"] = registered.revision
    config = wanted.config or (registered.config if registered else None)
    if wanted.streaming:
        options["streaming"] = True
    elif wanted.workers is not None and wanted.workers > 1:
        options["num_proc"] = wanted.workers
    if wanted.trust_remote_code and _scripts_supported():
        options["trust_remote_code"] = True
    # `datasets` does not slice streams: the whole split is opened, and sliced here
    asked = split_name(spec) if spec and wanted.streaming else spec
    try:
        loaded = _load_hub(hub_id, config, asked, **options)
    except Exception as error:
        hint = close_name(name, REGISTERED) if registered is None else ""
        raise DataError(
            f"dataset '{name}' cannot be loaded: it is no local path, and the hub gave {cause_of(error)}. "
            "Check name, split and network, load it once while online (it is cached), or give a local file, "
            f"folder or datasets.Dataset.{hint}"
        ) from error
    if isinstance(loaded, dict):
        rows, split = pick_split(loaded, spec, name)
        return Source(name, rows, split, registered)
    if asked != spec and spec is not None:
        loaded = pick_split({split_name(spec): loaded}, spec, name)[0]
    return Source(name, loaded, spec, registered)


def _load_hub(hub_id: str, config: str | None, split: str | None, **options: Any) -> Any:
    """The only way to the hub: `datasets.load_dataset`."""
    import datasets

    return datasets.load_dataset(hub_id, name=config, split=split, **options)


def _scripts_supported() -> bool:
    import datasets

    return int(datasets.__version__.split(".")[0]) < 4


def _open_object(dataset: Any, wanted: Wanted) -> Source:
    kind = type(dataset).__name__
    if wanted.path is not None:
        raise DataError(f"dataset is a {kind} and dataset_path is given too. Give one of them.")
    if isinstance(dataset, Mapping) and "input_ids" in dataset:
        return _single(list(batch_rows(dataset)), wanted.split, kind)
    if isinstance(dataset, Mapping):
        rows, split = pick_split(dataset, wanted.split, kind)
        return replace(_single(rows, None, kind), split=split)
    if isinstance(dataset, torch.utils.data.DataLoader):
        if wanted.split is not None:
            raise DataError(f"a DataLoader has no splits, but split '{wanted.split}' is asked for. Leave it out.")
        return Source(kind, _loader_rows(dataset), ordered=True)
    return _single(dataset, wanted.split, kind)


def _single(rows: Any, spec: str | None, kind: str) -> Source:
    indexed = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    if isinstance(rows, str | bytes) or not (indexed or hasattr(rows, "__iter__")):
        raise DataError(
            f"dataset cannot be a {kind}. Give a registered name, hub id or path, a datasets.Dataset, a list "
            "of texts, messages or dicts, or a DataLoader."
        )
    if hasattr(rows, "iloc"):
        raise DataError(f"dataset cannot be a {kind}. Give datasets.Dataset.from_pandas(it).")
    own = getattr(rows, "split", None)
    name = None if own is None or callable(own) else str(own)  # a tensor has a method of this name
    rows, notes = slice_single(rows, spec, name, kind)
    ordered = not indexed and not hasattr(rows, "shuffle")
    return Source(kind, rows, spec or name, ordered=ordered, notes=notes)


def _loader_rows(loader: Iterable[Any]) -> Iterator[Any]:
    for batch in loader:
        yield from batch_rows(batch)


def batch_rows(batch: Any) -> Iterator[Any]:
    """The rows of a collated batch: a tensor of ids (B, L), a list of rows, or a mapping of columns."""
    if isinstance(batch, torch.Tensor):
        yield from ({"input_ids": ids} for ids in (batch if batch.dim() > 1 else batch[None]))
    elif isinstance(batch, Mapping):
        columns = _token_columns(batch) if "input_ids" in batch else dict(batch)
        if any(isinstance(column, str) or not hasattr(column, "__len__") for column in columns.values()):
            yield columns
        else:
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))
    elif isinstance(batch, list | tuple) and any(isinstance(part, torch.Tensor) for part in batch):
        if len(batch) != 1:
            raise DataError(
                f"a batch of the DataLoader has {len(batch)} parts without names. Give dicts with 'input_ids'."
            )
        yield from batch_rows(batch[0])
    elif isinstance(batch, list | tuple):
        yield from batch
    else:
        yield batch


def _token_columns(batch: Mapping[str, Any]) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, with a batch dimension."""
    columns = {name: batch[name] for name in ("input_ids", "attention_mask") if batch.get(name) is not None}
    ids = columns["input_ids"]
    flat = ids.dim() == 1 if isinstance(ids, torch.Tensor) else len(ids) > 0 and not hasattr(ids[0], "__len__")
    return {name: [column] for name, column in columns.items()} if flat else columns


def read_rows(source: Source, shuffle: bool, seed: int) -> Iterator[tuple[int, Any]]:
    """Yield (row number, row), lazily; shuffled by a generator of its own where the order is ours to change.

    A stream of `datasets` is shuffled in a buffer of 1000 rows.
    """
    rows = source.rows
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        if shuffle and not source.ordered:
            rows = rows.shuffle(seed=seed, buffer_size=STREAM_BUFFER)
        yield from enumerate(rows)
        return
    hf = _is_hf_dataset(rows)
    if hf and rows.format["type"] not in (None, "custom"):
        rows = rows.with_format(None)
    count = len(rows)
    order = torch.arange(count)
    if shuffle:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    for start in range(0, count, CHUNK):
        numbers = order[start : start + CHUNK].tolist()
        if not hf:
            yield from ((n, rows[n]) for n in numbers)
            continue
        columns = rows[numbers]
        for i, n in enumerate(numbers):
            yield n, {name: values[i] for name, values in columns.items()}


def _is_hf_dataset(rows: Any) -> bool:
    module = sys.modules.get("datasets")
    return module is not None and isinstance(rows, module.Dataset)
