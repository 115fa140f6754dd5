"""Data on this machine: files, folders of files, and folders that `datasets` saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitpress.errors import DataError

# suffix -> reader of `datasets`; a text file is one document and is read here
_READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_SUFFIXES = (*_READERS, ".txt")
_PACKED = (".gz", ".xz", ".zst")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
# what `datasets` writes beside its data
_SIDE_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def looks_like_path(name: str) -> bool:
    """Whether a name that is not there must have been meant as a path: a separator (other than owner/name), a
    leading dot or tilde, or the suffix of a data file."""
    if _suffix(Path(name)) in _SUFFIXES or name.startswith((".", "~")):
        return True
    return _HUB_ID.fullmatch(name) is None


def open_local(path: Path, *, builder: str = "", config: str | None = None) -> dict[str, Any]:
    """Open a file or a folder.

    Args:
        path: jsonl, json, csv, tsv, parquet, arrow or txt file; a folder of such files of one kind; a
            folder of `save_to_disk`.
        builder: reader of `datasets` for files without a known suffix; "" goes by the suffix.
        config: configuration name, for a folder that describes several.

    Returns:
        Rows by split name: a `datasets.Dataset`, or a list of str with one document a text file.

    Raises:
        DataError: the path does not exist, has no data of a known kind or several kinds, or cannot be read.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder. Check the path.")
    if path.is_dir():
        return _open_folder(path, builder, config)
    suffix = _suffix(path)
    if suffix == ".txt" and not builder:
        return {"train": [_read_text(path)]}
    reader = builder or _READERS.get(suffix)
    if reader is None:
        raise DataError(f"{path}: unknown kind of file '{path.suffix}'. Known: {', '.join(sorted(_SUFFIXES))}.")
    return _load([path], reader, tabs=suffix == ".tsv")


def _open_folder(path: Path, builder: str, config: str | None) -> dict[str, Any]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _load_saved(path)
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.name not in _SIDE_FILES and _visible(f, path))
    kinds = {_suffix(f) for f in files} & set(_SUFFIXES)
    if not kinds and not builder:
        raise DataError(f"{path}: no data in this folder. Known kinds: {', '.join(sorted(_SUFFIXES))}.")
    # a README may describe which files are data: then `datasets` reads it
    described = (path / "README.md").exists() and ".txt" not in kinds
    if len({_READERS.get(k, k) for k in kinds}) > 1 and not described:
        raise DataError(
            f"{path}: files of several kinds ({', '.join(sorted(kinds))}). Give a file, or a folder of one kind."
        )
    if kinds == {".txt"} and not builder:
        return {"train": [_read_text(f) for f in files if _suffix(f) == ".txt"]}
    if described or (len(kinds) == 1 and ".tsv" not in kinds):
        return dict(_guarded(lambda d: d.load_dataset(str(path), name=config), str(path)))
    return _load(files, builder or _READERS[min(kinds)], tabs=kinds == {".tsv"})


def _is_blank(file: Path) -> bool:
    """Whether nothing is in a file but space, or an empty list."""
    return file.stat().st_size < 64 and file.read_bytes().strip() in (b"", b"[]")


def _load_saved(path: Path) -> dict[str, Any]:
    import datasets

    loaded = _guarded(lambda d: d.load_from_disk(str(path)), str(path))
    return {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)


def _load(files: list[Path], reader: str, *, tabs: bool) -> dict[str, Any]:
    if all(_is_blank(f) for f in files):
        raise DataError(f"{files[0]}: empty: the file has no rows.")
    options = {"sep": "\t"} if tabs else {}
    names = [str(f) for f in files]
    return dict(_guarded(lambda d: d.load_dataset(reader, data_files=names, **options), names[0]))


def _guarded(load: Callable[[Any], Any], source: str) -> Any:
    import datasets

    try:
        with _quiet(datasets):
            return load(datasets)
    except Exception as error:
        raise DataError(f"{source}: cannot be read: {cause_of(error)}. Check that the file is whole.") from error


def cause_of(error: BaseException) -> str:
    """The innermost reason of a chain of errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    text = lines[0].strip().rstrip(".") if lines else ""
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars while local files are read: only the command line prints."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _suffix(path: Path) -> str:
    """The lower-case suffix that tells the kind; the `.json` of `part.json.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix


def _visible(file: Path, folder: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _read_text(path: Path) -> str:
    if path.suffix.lower() != ".txt":
        raise DataError(f"{path}: a packed text file. Unpack it first.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Convert it.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check its permissions.") from error
