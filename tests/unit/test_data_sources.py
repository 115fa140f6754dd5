"""Where rows come from: objects in memory, their splits, registered names, the hub, the built-in text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bitpress.data import default_text, sources
from bitpress.data.table import REGISTERED, find_registered
from word_data import (
    ALL,
    CHAT,
    EOS,
    ROWS,
    TURNS,
    UNK,
    cache,  # noqa: F401  a fixture
    ids,
    lists,
    load,
    message,
    words,
    write_jsonl,
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Stands in for the hub: each call is recorded, and answered by `reply` of the record list."""
    calls: list[dict[str, Any]] = []

    class Calls(list):  # type: ignore[type-arg]
        reply: Any = None

    record = Calls(calls)

    def stand_in(hub_id: str, config: str | None, split: str | None, **options: Any) -> Any:
        record.append({"id": hub_id, "config": config, "split": split, **options})
        if isinstance(record.reply, Exception):
            raise record.reply
        return record.reply

    monkeypatch.setattr(sources, "_load_hub", stand_in)
    yield record


def test_a_tensor_of_ids_has_no_split() -> None:
    data = load(torch.arange(3, 11).reshape(2, 4), num_samples=2, shuffle=False)
    assert [s.tolist() for s in data.sequences] == [[3, 4, 5, 6], [7, 8, 9, 10]]
    assert data.summary["split"] is None


def test_a_table_of_another_library() -> None:
    class Frame:
        iloc = None

        def __len__(self) -> int:
            return 1

        def __getitem__(self, column: object) -> object:
            raise KeyError(column)

    assert "dataset cannot be a Frame. Give datasets.Dataset.from_pandas(it)." in message(Frame())


# --- objects in memory -----------------------------------------------------------------------------------------


def test_dataset_dict_takes_calibration_then_train_then_the_only_one() -> None:
    def rows(start: int) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [words(start, 4)]})

    train, other = rows(0), rows(100)
    assert lists(load(datasets.DatasetDict(train=train, calibration=other))) == [ids(100, 4)]
    both = load(datasets.DatasetDict(test=other, train=train))
    assert (lists(both), both.summary["split"]) == ([ids(0, 4)], "train")
    assert lists(load(datasets.DatasetDict(test=other))) == [ids(100, 4)]
    assert lists(load(datasets.DatasetDict(train=train, test=other), split="test")) == [ids(100, 4)]
    two = datasets.DatasetDict(test=other, validation=train)
    assert "no split was asked for" in message(two)
    assert "Splits: test, validation." in message(two)
    assert "no split 'tests'. Splits: test, validation. Did you mean 'test'?" in message(two, split="tests")


@pytest.mark.parametrize("form", ["dataset", "list"])
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("train[:5%]", [0, 1, 2]),
        ("train[2:4]", [2, 3]),
        ("train[-2:]", [48, 49]),
        ("train[:1]+train[49:]", [0, 49]),
        ("train[96%:]", [48, 49]),
    ],
)
def test_slices(form: str, spec: str, expected: list[int]) -> None:
    texts = [words(4 * i, 4) for i in range(50)]
    rows: Any = datasets.Dataset.from_dict({"text": texts}) if form == "dataset" else texts
    if spec == "train[:5%]":
        expected = expected[: round(0.05 * 50)]
    assert lists(load(rows, split=spec, separator="")) == [ids(4 * i, 4) for i in expected]
    named = datasets.DatasetDict(train=rows) if form == "dataset" else {"train": rows}
    assert lists(load(named, split=spec, separator="")) == [ids(4 * i, 4) for i in expected]


def test_splits_argument() -> None:
    sets = {name: [words(100 * i, 4)] for i, name in enumerate(("train", "calibration", "held"))}
    assert lists(load(sets, splits={"calibration": "held", "train": "train"})) == [ids(200, 4)]
    assert lists(load(sets, splits={"train": "held"})) == [ids(200, 4)]
    assert lists(load(sets, splits="held[:100%]")) == [ids(200, 4)]
    assert lists(load(sets, splits=["train", "calibration[:1]"])) == [ids(100, 4)]
    assert lists(load(sets, splits=["held", "train[:1]"])) == [ids(0, 4)]
    assert lists(load(sets, splits=["held[:1]"])) == [ids(200, 4)]
    assert load(sets, splits={"calibration": "held[:1]"}).summary["split"] == "held[:1]"


def test_bad_splits() -> None:
    rows = ["w1"]
    assert "no 'calibration' and no 'train' (it has: eval)" in message(rows, splits={"eval": "test"})
    assert "splits must be a string, a list or a dict, not int" in message(rows, splits=3)
    assert "split must be a string" in message(rows, split=5)
    assert "a split must be a string" in message(rows, splits={"train": 5})
    assert "split='train' and splits (calibration: 'test') differ" in message(rows, split="train", splits="test")
    assert "split 'train[:a]' cannot be read" in message(rows, split="train[:a]")
    assert "split 'train[:200%]' cannot be read" in message(rows, split="train[:200%]")
    assert "empty: there are no rows" in message(rows, split="train[1:]")


def test_split_name_of_a_plain_dataset_is_told() -> None:
    rows = datasets.Dataset.from_dict({"text": [words(0, 4), words(10, 4)]}, split="train_sft")
    assert load(rows, split="train_sft[:1]", num_samples=1).notes == ()
    data = load(rows, split="train_gen[:1]", num_samples=1)
    assert lists(data) == [ids(0, 4)]
    assert data.notes == ("Dataset is one set of rows: the split name 'train_gen' says nothing here",)


def test_streams() -> None:
    rows = datasets.Dataset.from_dict({"text": [words(4 * i, 4) for i in range(20)]}).to_iterable_dataset()
    assert lists(load(rows, num_samples=3, separator="")) == [ids(0, 4), ids(4, 4), ids(8, 4)]
    assert lists(load(rows, split="train[5:7]", separator="")) == [ids(20, 4), ids(24, 4)]
    shuffled = load(rows, shuffle=True, separator="", num_samples=20)
    assert sorted(lists(shuffled)) == [ids(4 * i, 4) for i in range(20)]
    assert lists(shuffled) != sorted(lists(shuffled))
    assert lists(shuffled) == lists(load(rows, shuffle=True, separator="", num_samples=20))
    assert "a stream does not know" in message(rows, split="train[:5%]")
    generated = load((words(4 * i, 4) for i in range(5)), shuffle=True, separator="", split="train[1:3]")
    assert lists(generated) == [ids(4, 4), ids(8, 4)]
    assert generated.summary["shuffled"] is False


def test_data_loaders() -> None:
    tensors = torch.arange(12).view(4, 3)
    wanted = tensors.tolist()
    data = load(DataLoader(TensorDataset(tensors), batch_size=3), tokenizer=None, shuffle=True)
    assert lists(data) == wanted
    assert data.summary["shuffled"] is False
    assert lists(load(DataLoader(tensors, batch_size=2), tokenizer=None)) == wanted
    rows = [{"input_ids": row, "attention_mask": torch.tensor([0, 1, 1]), "labels": row} for row in tensors]
    masked = load(DataLoader(rows, batch_size=3), tokenizer=None)
    assert lists(masked) == [row[1:] for row in wanted]
    assert lists(load(DataLoader(rows, batch_size=None), tokenizer=None)) == [row[1:] for row in wanted]
    texts = DataLoader([words(0, 4), words(10, 4)], batch_size=2)
    assert lists(load(texts, separator="")) == [ids(0, 4), ids(10, 4)]
    columns = DataLoader([{"text": words(0, 4)}, {"text": words(10, 4)}], batch_size=2)
    assert lists(load(columns, separator="")) == [ids(0, 4), ids(10, 4)]


def test_data_loader_stops_early() -> None:
    class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            while True:
                yield {"input_ids": torch.ones(4, dtype=torch.int64)}

    assert len(load(DataLoader(Endless(), batch_size=2), tokenizer=None, num_samples=5).sequences) == 5


def test_bad_objects() -> None:
    loader = DataLoader(TensorDataset(torch.ones(2, 3), torch.ones(2, 3)))
    assert "2 parts without names. Give dicts with 'input_ids'" in message(loader)
    assert "a DataLoader has no splits, but split 'train'" in message(loader, split="train")
    assert "dataset cannot be a int" in message(17)
    assert "dataset_path is given too" in message(["w1"], dataset_path="rows.jsonl")


# --- registered datasets and the hub ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        ("gsm8k", {"question": "Q", "answer": "A"}, "Question: Q\nAnswer: A"),
        ("open_platypus", {"instruction": "I", "output": "O", "input": ""}, "### Instruction:\nI\n\n### Response:\nO"),
        ("evolcodealpaca", {"instruction": "I", "output": "{x}"}, "### Instruction:\nI\n\n### Response:\n{x}"),
        ("cnn_dailymail", {"article": "A", "highlights": None, "id": "1"}, "A\n\n"),
        ("ptb", {"sentence": "S"}, "S"),
        ("wikitext", {"text": "T"}, "T"),
        ("c4", {"text": "T", "url": "U"}, "T"),
    ],
)
def test_registered_templates(name: str, row: dict[str, Any], text: str) -> None:
    assert REGISTERED[name].text(row) == text


def test_registered_names() -> None:
    for name in ("ultrachat-200k", "Ultrachat_200K", "HuggingFaceH4/ultrachat_200k"):
        assert find_registered(name) is REGISTERED["ultrachat_200k"]
    assert find_registered("Open-Platypus") is REGISTERED["open_platypus"]
    assert find_registered("nothing") is None


def test_registered_dataset_on_the_hub(hub: Any) -> None:
    hub.reply = datasets.Dataset.from_dict({"question": ["w1 w2"], "answer": ["w3"]})
    data = load("GSM8K", max_seq_length=5)
    assert hub == [{"id": "openai/gsm8k", "config": "main", "split": "train"}]
    assert lists(data) == [[UNK, *ids(1, 2), UNK, *ids(3, 1)]]
    assert data.summary["split"] == "train"
    assert data.summary["source"] == "GSM8K"


def test_users_split_and_config_go_to_the_hub_as_they_are(hub: Any) -> None:
    hub.reply = datasets.Dataset.from_dict({"messages": [TURNS]})
    load("ultrachat-200k", tokenizer=CHAT, splits={"calibration": "train_gen[:5%]", "train": "train_gen"})
    load("ultrachat_200k", tokenizer=CHAT)
    assert [call["split"] for call in hub] == ["train_gen[:5%]", "train_sft"]
    load("c4", text_column="messages", tokenizer=CHAT)
    load("c4", text_column="messages", tokenizer=CHAT, dataset_config_name="de", preprocessing_num_workers=3)
    assert hub[2]["data_files"]["train"].startswith("en/c4-train.00000")
    assert hub[3] == {"id": "allenai/c4", "config": "de", "split": "train", "num_proc": 3}


def test_any_hub_id(hub: Any) -> None:
    hub.reply = datasets.DatasetDict(validation=datasets.Dataset.from_list(ROWS))
    data = load("somebody/some-text", num_samples=20, separator="")
    assert hub == [{"id": "somebody/some-text", "config": None, "split": None}]
    assert lists(data) == ALL
    assert data.summary["split"] == "validation"


def test_streaming_from_the_hub_slices_here(hub: Any) -> None:
    hub.reply = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    data = load("wikitext", split="test[2:4]", streaming=True, preprocessing_num_workers=4, separator="")
    assert hub == [{"id": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test", "streaming": True}]
    assert lists(data) == ALL[2:4]


def test_template_gives_way_to_the_users_columns(hub: Any) -> None:
    hub.reply = datasets.Dataset.from_dict({"question": [words(0, 4)], "answer": ["w9"]})
    assert lists(load("gsm8k", text_column="question")) == [ids(0, 4)]
    assert lists(load("gsm8k", preprocessing_func=lambda r: {"text": r["question"]})) == [ids(0, 4)]


def test_hub_failure_is_one_line_with_the_remedy(hub: Any) -> None:
    hub.reply = ConnectionError("the hub is out of reach\nand a long trace")
    text = message("gsm8kk")
    assert "dataset 'gsm8kk' cannot be loaded" in text
    assert "ConnectionError: the hub is out of reach." in text
    assert "local file" in text
    assert "Did you mean 'gsm8k'?" in text
    assert "\n" not in text
    assert "Did you mean" not in message("gsm8k")


def test_offline_hub_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "dataset 'nobody/nothing-here' cannot be loaded" in message("nobody/nothing-here")


def test_dataset_path_reads_local_data_as_registered(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "w1 w2", "answer": "w3"}])
    assert lists(load("gsm8k", dataset_path=path, max_seq_length=5)) == [[UNK, *ids(1, 2), UNK, *ids(3, 1)]]
    plain = write_jsonl(tmp_path / "rows.data", ROWS)
    assert lists(load("json", dataset_path=plain, num_samples=20, separator="")) == ALL
    assert lists(load("custom", dataset_path=str(path), text_column="question", max_seq_length=2)) == [ids(1, 2)]
    assert "is a kind of file. Add dataset_path=" in message("custom")
    assert "'gsm' is not registered" in message("gsm", dataset_path=path)


# --- the built-in text -----------------------------------------------------------------------------------------


def test_built_in_text() -> None:
    text = default_text()
    assert 55_000 < len(text.encode()) < 110_000
    lines = [line for line in text.splitlines() if len(line) > 60]
    assert len(lines) == len(set(lines))
    data = load(None, shuffle=True, num_samples=64, max_seq_length=128)
    assert len(data.sequences) == 64
    assert data.summary["source"] == "built-in text"
    assert data.notes == ("no dataset was given: the built-in text calibrates",)
    assert "asked for 512 sequences" in load(None, num_samples=512, max_seq_length=384).notes[1]
    assert EOS not in torch.cat(data.sequences).tolist()
