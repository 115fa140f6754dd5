"""Data on this machine: files of every kind, folders of them, saved datasets, and what cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from word_data import ALL, EOS, ROWS, cache, ids, lists, load, message, words, write_jsonl  # noqa: F401  a fixture


def write(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    path, table = folder / f"rows{suffix}", datasets.Dataset.from_list(rows)
    if suffix == ".jsonl":
        write_jsonl(path, rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == ".json.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif suffix in (".csv", ".tsv"):
        table.to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")
    elif suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(folder / "saved")
        next((folder / "saved").glob("*.arrow")).rename(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".json.gz", ".csv", ".tsv", ".parquet", ".arrow"])
def test_local_tables(tmp_path: Path, suffix: str) -> None:
    # a second column, so that the delimiter matters
    path = write(tmp_path, suffix, [{**row, "n": i} for i, row in enumerate(ROWS)])
    for name in (path, str(path)):
        assert lists(load(name, num_samples=20, separator="")) == ALL
    assert lists(load(path, split="train[:10%]", separator="")) == ALL[:2]
    assert "no split 'test'. Splits: train." in message(path, split="test")


def test_local_text_is_one_document_tokenized_whole(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n".join(words(4 * i, 4) for i in range(20)), encoding="utf-8-sig")
    assert lists(load(str(path), num_samples=20)) == ALL
    shuffled = load(path, num_samples=5, shuffle=True)
    assert all(s in ALL for s in lists(shuffled))
    assert lists(shuffled) != ALL[:5]
    assert lists(load(path, pack=False)) == [ALL[0]]
    assert lists(load(path, split="train[50%:60%]")) == ALL[10:12]
    assert "no split 'test'" in message(path, split="test[:5%]")


def test_folder_of_texts(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(words(10 * i, 3), encoding="utf-8")
    assert lists(load(tmp_path, max_seq_length=11)) == [[*ids(0, 3), EOS, *ids(10, 3), EOS, *ids(20, 3)]]
    assert lists(load(tmp_path, split="train[:2]", max_seq_length=7)) == [[*ids(0, 3), EOS, *ids(10, 3)]]


def test_folder_of_tables(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS[:10])
    write_jsonl(tmp_path / "b.jsonl", ROWS[10:])
    assert lists(load(str(tmp_path), num_samples=20, separator="")) == ALL
    (tmp_path / "extra.csv").write_text("text\nw1\n", encoding="utf-8")
    assert "files of several kinds (.csv, .jsonl)" in message(tmp_path)


def test_folder_with_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS[:10])
    write_jsonl(tmp_path / "test.jsonl", ROWS[10:])
    assert lists(load(tmp_path, num_samples=20, separator="")) == ALL[:10]
    assert lists(load(tmp_path, split="test[:2]", separator="")) == ALL[10:12]


def test_folder_of_tsv(tmp_path: Path) -> None:
    write(tmp_path, ".tsv", [{"text": words(0, 4), "n": 1}])
    assert lists(load(tmp_path)) == [ids(0, 4)]


def test_saved_datasets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select(range(3))).save_to_disk(tmp_path / "two")
    assert lists(load(tmp_path / "one", num_samples=20, separator="")) == ALL
    assert lists(load(tmp_path / "one", split="train[:2]", separator="")) == ALL[:2]
    assert lists(load(tmp_path / "two", split="test", separator="")) == ALL[:3]


def test_progress_bars_are_off_while_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disabled: list[bool] = []
    plain = datasets.load_dataset

    def watched(*args: Any, **options: Any) -> Any:
        disabled.append(datasets.are_progress_bars_disabled())
        return plain(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    datasets.enable_progress_bars()
    load(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    assert disabled == [True]
    assert not datasets.are_progress_bars_disabled()


def test_bad_paths(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "rows.jsonl", "./here", "a/b/c", "~no-such-user-here/x"):
        assert f"{name.removeprefix('./')}: no such file or folder" in message(name)
    assert "none.txt: no such file" in message(tmp_path / "none.txt")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    assert "unknown kind of file '.pdf'. Known: .arrow, .csv" in message(tmp_path / "notes.pdf")
    assert "no data in this folder" in message(tmp_path)


def test_unreadable_files(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "w1"\n{"te', encoding="utf-8")
    text = message(broken)
    assert f"{broken}: cannot be read: " in text
    assert "\n" not in text
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl: empty: the file has no rows" in message(tmp_path / "empty.jsonl")
    (tmp_path / "none.json").write_text("[]\n", encoding="utf-8")
    assert "none.json: empty: the file has no rows" in message(tmp_path / "none.json")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert "latin.txt: not UTF-8 text" in message(tmp_path / "latin.txt")
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    assert "empty" in message(tmp_path / "blank.txt")
