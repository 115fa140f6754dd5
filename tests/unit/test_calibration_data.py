"""Calibration data: packing, order, how much is read, and what is told of them."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import datasets
import pytest
import torch

from bitpress.data import load_calibration
from bitpress.errors import DataError
from word_data import BOS, EOS, FIRST, SEP, ids, lists, load, make_tokenizer, message, words

# --- packing ---------------------------------------------------------------------------------------------------


def test_texts_are_joined_with_one_eos_and_cut() -> None:
    data = load([words(0, 3), words(10, 5), words(20, 2)], max_seq_length=4)
    assert lists(data) == [[*ids(0, 3), EOS], ids(10, 4), [*ids(14, 1), EOS, *ids(20, 2)]]
    assert all(s.dtype == torch.int64 for s in data.sequences)


@pytest.mark.parametrize(("separator", "between"), [("", []), ("<sep>", [SEP]), ("w7 w8", ids(7, 2))])
def test_separator(separator: str, between: list[int]) -> None:
    data = load([words(0, 2), words(10, 2)], separator=separator, max_seq_length=4 + len(between))
    assert lists(data) == [[*ids(0, 2), *between, *ids(10, 2)]]


def test_a_document_that_ends_with_the_separator_gets_no_second_one() -> None:
    assert lists(load([words(0, 2) + " <eos>", words(10, 1)])) == [[*ids(0, 2), EOS, *ids(10, 1)]]


def test_without_eos_documents_are_joined_directly_and_it_is_said() -> None:
    data = load([words(0, 2), words(10, 2)], tokenizer=make_tokenizer(eos=None))
    assert lists(data) == [[*ids(0, 2), *ids(10, 2)]]
    assert any("no end-of-text token" in note for note in data.notes)


def test_bad_separator() -> None:
    assert "separator must be a string" in message(["w1"], separator=3)
    assert "separator ' ' has no token" in message(["w1 w2 w3 w4"], separator=" ")


def test_fewer_sequences_are_said() -> None:
    data = load([words(0, 10)], num_samples=512)
    assert len(data.sequences) == 2
    assert data.notes == ("asked for 512 sequences of 4 tokens, the data gives 2",)
    assert load([words(0, 8)], num_samples=2).notes == ()


def test_less_than_one_sequence_gives_a_short_one() -> None:
    data = load([words(0, 3)], num_samples=2)
    assert lists(data) == [ids(0, 3)]
    assert data.notes == ("asked for 2 sequences of 4 tokens, the data gives one of 3 tokens",)


def test_unpacked_rows_stay_apart_with_special_tokens_and_are_truncated() -> None:
    data = load([words(0, 2), words(10, 9), "", words(20, 2)], pack=False)
    assert lists(data) == [[BOS, *ids(0, 2)], [BOS, *ids(10, 3)], [BOS, *ids(20, 2)]]
    assert "skipped: 1 row without tokens" in data.notes
    assert "asked for 8 sequences, the data gives 3" in data.notes
    assert data.summary["packed"] is False


def test_batches_group_equal_lengths_longest_first() -> None:
    data = load([words(0, 1), words(10, 3), words(20, 1), words(30, 3), words(40, 3)], pack=False)
    batches = [batch.tolist() for batch in data.batches(2)]
    long = [[BOS, *ids(start, 3)] for start in (10, 30, 40)]
    assert batches == [long[:2], long[2:], [[BOS, *ids(0, 1)], [BOS, *ids(20, 1)]]]
    assert next(data.batches(2)).dtype == torch.int64
    with pytest.raises(DataError, match="batch_size must be an integer of at least 1, not 0"):
        next(data.batches(0))


def test_summary() -> None:
    data = load([words(0, 9)], seed=5)
    fingerprint = data.summary.pop("fingerprint")
    assert data.summary == {
        "source": "list", "split": None, "sequences": 2, "tokens": 8, "min_length": 4, "max_length": 4,
        "packed": True, "shuffled": False, "seed": 5,
    }  # fmt: skip
    assert len(fingerprint) == 64
    assert load([words(0, 9)]).summary["fingerprint"] == fingerprint
    assert load([words(1, 9)]).summary["fingerprint"] != fingerprint
    # the same ids in other lengths are other data
    assert load([words(0, 8)], max_seq_length=8).summary["fingerprint"] != fingerprint


# --- reading and order -----------------------------------------------------------------------------------------


class CountedRows:
    """A sequence that remembers which rows were read."""

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length, self.read = count, length, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> str:
        self.read.append(i)
        return words(i % 1000, self.length)


@pytest.mark.parametrize("shuffle", [False, True])
def test_reading_stops_when_there_is_enough(shuffle: bool) -> None:
    rows = CountedRows(1_000_000, 8)
    data = load(rows, num_samples=16, max_seq_length=8, shuffle=shuffle)
    assert len(data.sequences) == 16
    assert len(rows.read) <= 64
    unpacked = CountedRows(1_000_000, 8)
    assert len(load(unpacked, num_samples=16, pack=False, shuffle=shuffle).sequences) == 16
    assert len(unpacked.read) <= 64


def test_preprocessing_stops_too() -> None:
    seen: list[str] = []
    load((words(i, 8) for i in range(100_000)), num_samples=2, preprocessing_func=lambda r: seen.append(r) or r)
    assert len(seen) <= 3


def test_shuffle_takes_rows_by_seed_and_leaves_global_state() -> None:
    rows = [words(4 * i, 4) for i in range(50)]
    torch.manual_seed(0)
    random.seed(0)
    before = torch.random.get_rng_state(), random.getstate()
    first = load(rows, shuffle=True, seed=1, separator="")
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()
    torch.manual_seed(99)
    assert lists(first) == lists(load(rows, shuffle=True, seed=1, separator=""))
    assert lists(first) != lists(load(rows, shuffle=True, seed=2, separator=""))
    assert lists(first) != lists(load(rows, separator=""))
    assert {tuple(s) for s in lists(first)} <= {tuple(ids(4 * i, 4)) for i in range(50)}
    assert first.summary["shuffled"] is True


def test_order_is_the_same_in_another_process() -> None:
    program = (
        "import datasets; from bitpress.data import load_calibration as load;"
        "rows = datasets.Dataset.from_dict({'input_ids': [[i, i + 1] for i in range(100)]});"
        "print(load(rows, num_samples=20).summary['fingerprint'])"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    rows = datasets.Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(100)]})
    assert load_calibration(rows, num_samples=20).summary["fingerprint"] == there.strip()


def test_one_document_with_shuffle_chooses_windows() -> None:
    document = [words(0, 400)]
    data = load(document, shuffle=True, num_samples=10)
    windows = [ids(4 * i, 4) for i in range(100)]
    assert all(s in windows for s in lists(data))
    assert len({tuple(s) for s in lists(data)}) == 10
    assert lists(data) != windows[:10]
    assert max(s[0] for s in lists(data)) > FIRST + 40  # from the whole text, not its beginning
    assert lists(load(document, shuffle=True, num_samples=10, seed=7)) != lists(data)
    assert lists(load(document, num_samples=10)) == windows[:10]


def test_preprocessing_func() -> None:
    data = load([{"q": "w1 w2", "a": "w3 w4"}], preprocessing_func=lambda r: {"text": r["q"] + " " + r["a"]})
    assert lists(data) == [ids(1, 4)]
    assert "preprocessing_func: failed on row 0: KeyError: 'zzz'" in message(
        [{"q": "w1"}], preprocessing_func=lambda r: r["zzz"]
    )
    assert "preprocessing_func must be a function" in message(["w1"], preprocessing_func="tool.py:clean")


@pytest.mark.parametrize("empty", [[], {"train": []}, [""], [{"text": None}], [{"input_ids": []}], iter([])])
def test_empty_data(empty: Any) -> None:
    assert "empty" in message(empty)


def test_bad_values_are_reported_together() -> None:
    text = message(["w1"], num_samples=0, max_seq_length=-1, preprocessing_num_workers=0)
    assert "3 problems" in text
    assert "num_samples must be an integer of at least 1, not 0" in text
    assert "max_seq_length must be an integer of at least 1, not -1" in text
    assert "preprocessing_num_workers must be an integer of at least 1, not 0" in text
    assert "num_samples must be an integer" in message(["w1"], num_samples=True)
    assert "max_seq_length must be an integer" in message(["w1"], max_seq_length=2.5)
