"""Calibration data: every form of dataset, splits, packing, and the message of each bad input."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast

from bitpress.data import CalibrationData, default_text, load_calibration, sources
from bitpress.data.table import REGISTERED, find_registered
from bitpress.errors import DataError

UNK, EOS, BOS, SEP, USER, ASSISTANT, SYSTEM = range(7)
FIRST = 10  # the id of "w0"
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ 'w99 ' if 'tool_calls' in m }}{{ m['content'] }} {% endfor %}"


def make_tokenizer(template: str | None = None, eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    named = ["<unk>", "<eos>", "<bos>", "<sep>", "user", "assistant", "system"]
    vocabulary = {word: i for i, word in enumerate(named)} | {f"w{i}": FIRST + i for i in range(2000)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token=eos, chat_template=template
    )


TOKENIZER = make_tokenizer()
CHAT = make_tokenizer(TEMPLATE)


def words(start: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


def ids(start: int, count: int) -> list[int]:
    return list(range(FIRST + start, FIRST + start + count))


def load(dataset: Any, **options: Any) -> CalibrationData:
    """In order and four tokens a sequence unless a test says otherwise."""
    return load_calibration(
        dataset, **{"tokenizer": TOKENIZER, "shuffle": False, "num_samples": 8, "max_seq_length": 4} | options
    )


def lists(data: CalibrationData) -> list[list[int]]:
    return [s.tolist() for s in data.sequences]


def message(dataset: Any, **options: Any) -> str:
    with pytest.raises(DataError) as raised:
        load(dataset, **options)
    return str(raised.value)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


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


# --- rows with input_ids ---------------------------------------------------------------------------------------


def test_input_ids_are_truncated_never_joined_and_need_no_tokenizer() -> None:
    rows = [{"input_ids": [5, 6]}, {"input_ids": [7, 8, 9, 10, 11]}, {"input_ids": []}, {"input_ids": [1, 2]}]
    data = load(rows, tokenizer=None)
    assert lists(data) == [[5, 6], [7, 8, 9, 10], [1, 2]]
    assert [b.tolist() for b in data.batches(8)] == [[[7, 8, 9, 10]], [[5, 6], [1, 2]]]
    assert data.notes == ("asked for 8 sequences, the data gives 3", "skipped: 1 row without tokens")
    assert data.summary["packed"] is False


def test_attention_mask_strips_padding_before_truncation() -> None:
    rows = [
        {"input_ids": [0, 0, 5, 6, 7, 8, 9], "attention_mask": [0, 0, 1, 1, 1, 1, 1]},
        {"input_ids": [3, 4, 0], "attention_mask": [1, 1, 0]},
    ]
    assert lists(load(rows, tokenizer=None)) == [[5, 6, 7, 8], [3, 4]]


@pytest.mark.parametrize("form", ["torch", "numpy", None])
def test_input_ids_of_a_formatted_dataset(form: str | None) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]], "attention_mask": [[1, 1], [1, 0, 1]]})
    assert lists(load(rows.with_format(form))) == [[1, 2], [3, 5]]


def test_transform_of_a_dataset_is_kept() -> None:
    rows = datasets.Dataset.from_dict({"n": [0, 10]})
    rows.set_transform(lambda batch: {"text": [words(n, 4) for n in batch["n"]]})
    assert lists(load(rows, separator="")) == [ids(0, 4), ids(10, 4)]


def test_ids_without_names() -> None:
    assert lists(load([[1, 2, 3], [4, 5]], tokenizer=None)) == [[1, 2, 3], [4, 5]]
    assert lists(load([torch.tensor([1, 2]), torch.tensor([[3, 4]])], tokenizer=None)) == [[1, 2], [3, 4]]
    assert lists(load({"input_ids": torch.tensor([[1, 2], [3, 4]])}, tokenizer=None)) == [[1, 2], [3, 4]]


def test_bad_input_ids() -> None:
    assert "row 0: input_ids must be integers" in message([{"input_ids": [0.5, 1.0]}])
    assert "row 0: input_ids must have one dimension, not the shape (2, 2)" in message(
        [{"input_ids": [[1, 2], [3, 4]]}]
    )
    assert "row 1: input_ids has the negative id -100" in message([{"input_ids": [1]}, {"input_ids": [-100]}])
    assert "row 0: input_ids must be a list of integers" in message([{"input_ids": ["a", "b"]}])
    mask = [{"input_ids": [1, 2], "attention_mask": [1]}]
    assert "attention_mask has 1 positions and input_ids has 2" in message(mask)
    assert "row 1 has no column 'input_ids' (it has: text)" in message([{"input_ids": [1]}, {"text": "w1"}])
    assert "row 1 is a str, unlike the rows before it" in message([{"input_ids": [1]}, "w1"])


# --- messages and columns --------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
TURN_IDS = [USER, *ids(1, 2), ASSISTANT, *ids(3, 1)]


@pytest.mark.parametrize(
    "row",
    [
        TURNS,
        {"messages": TURNS},
        {"messages": {"role": ["user", "assistant"], "content": ["w1 w2", "w3"]}},
        {"messages": [{**turn, "tool_calls": None} for turn in TURNS], "text": "w9"},
        {"conversations": [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
    ],
)
def test_messages_go_through_the_chat_template_without_special_tokens(row: Any) -> None:
    assert lists(load([row], tokenizer=CHAT, max_seq_length=5)) == [TURN_IDS]
    assert lists(load([row], tokenizer=CHAT, max_seq_length=5, pack=False)) == [TURN_IDS]


def test_messages_in_another_column() -> None:
    assert lists(load([{"chat": TURNS}], tokenizer=CHAT, text_column="chat", max_seq_length=5)) == [TURN_IDS]


def test_empty_conversation_is_skipped() -> None:
    data = load([{"messages": []}, {"messages": TURNS}], tokenizer=CHAT, max_seq_length=5)
    assert lists(data) == [TURN_IDS]
    assert "skipped: 1 row without tokens" in data.notes


def test_bad_messages() -> None:
    text = message([{"messages": TURNS}])
    assert "no chat template" in text
    assert "set tokenizer.chat_template" in text
    assert "row 0: a message has no 'role' (it has: content)" in message([[{"content": "w1"}]], tokenizer=CHAT)
    assert "Put each conversation into a list of its own" in message(TURNS, tokenizer=CHAT)
    assert "messages must be a list of dicts" in message([{"messages": "w1"}], tokenizer=CHAT)
    strict = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    assert "the chat template refuses these messages (user, assistant): roles must alternate" in message(
        [{"messages": TURNS}], tokenizer=strict
    )


def test_text_column() -> None:
    rows = [{"text": "w1", "body": words(10, 4), "messages": TURNS}]
    assert lists(load(rows, text_column="body")) == [ids(10, 4)]
    assert lists(load([{"text": words(10, 4), "label": 1}])) == [ids(10, 4)]


def test_a_text_column_that_is_not_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(words(0, 8))
    for rows in (str(tmp_path / "words.txt"), [words(0, 4)], [TURNS], None):
        notes = load(rows, tokenizer=CHAT, text_column="body").notes
        assert "text_column: 'body' is not used: the rows have no columns" in notes
        assert not any("text_column" in n for n in load(rows, tokenizer=CHAT).notes)
    notes = load([{"input_ids": [1, 2], "body": "w1"}], text_column="body").notes
    assert "text_column: 'body' is not used: 'input_ids' goes before it" in notes
    assert not any("text_column" in n for n in load([{"body": "w1"}], text_column="body").notes)


@pytest.mark.parametrize("answer", ["response", "completion"])
def test_prompt_and_answer_are_joined(answer: str) -> None:
    assert lists(load([{"prompt": "w1 w2", answer: "w3 w4"}])) == [ids(1, 4)]
    assert lists(load([{"prompt": "w1 w2", answer: " w3 w4"}])) == [ids(1, 4)]


def test_missing_column_lists_columns_and_suggests() -> None:
    text = message([{"texts": "w1", "label": 0}])
    assert "list: the rows have no column 'text'. Columns: texts, label. Did you mean 'texts'?" in text
    assert "text_column" in text
    text = message([{"prompt": "w1", "response": "w2"}], text_column="body")
    assert "no column 'body'. Columns: prompt, response. Name the column" in text


def test_text_of_the_wrong_type() -> None:
    assert "row 0: text must be a string, not int" in message([{"text": 3}])


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


def test_text_needs_a_tokenizer() -> None:
    text = message(["w1"], tokenizer=None)
    assert "text needs a tokenizer" in text
    assert "'input_ids'" in text


def test_preprocessing_func() -> None:
    data = load([{"q": "w1 w2", "a": "w3 w4"}], preprocessing_func=lambda r: {"text": r["q"] + " " + r["a"]})
    assert lists(data) == [ids(1, 4)]
    assert "preprocessing_func: failed on row 0: KeyError: 'zzz'" in message(
        [{"q": "w1"}], preprocessing_func=lambda r: r["zzz"]
    )
    assert "preprocessing_func must be a function" in message(["w1"], preprocessing_func="tool.py:clean")


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


# --- local files -----------------------------------------------------------------------------------------------

ROWS = [{"text": words(4 * i, 4)} for i in range(20)]
ALL = [ids(4 * i, 4) for i in range(20)]


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
