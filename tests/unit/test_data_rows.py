"""How a row reads: token ids, messages through the chat template, text, and the message of each bad row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from word_data import ASSISTANT, CHAT, TURNS, USER, ids, lists, load, make_tokenizer, message, words

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


def test_text_needs_a_tokenizer() -> None:
    text = message(["w1"], tokenizer=None)
    assert "text needs a tokenizer" in text
    assert "'input_ids'" in text
