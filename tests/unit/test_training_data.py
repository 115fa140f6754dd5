"""Training sequences: prompts without labels, packing, padding, rows that bring their own labels."""

from __future__ import annotations

import json

import pytest
import torch

from bitpress.data.splits import evaluation_split, training_split
from bitpress.data.table import REGISTERED
from bitpress.data.training import Collate, load_training
from bitpress.errors import DataError
from helpers import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def read(data, tokenizer, **options):
    loaded = load_training(data, tokenizer=tokenizer, **options)
    return loaded, [loaded[i] for i in range(len(loaded))]


def words(tokenizer, row, *, taught=True):
    """What has labels in a row, or what has none."""
    chosen = (row["labels"] != -100) == taught
    assert (row["labels"][row["labels"] != -100] == row["input_ids"][row["labels"] != -100]).all()
    return tokenizer.decode(row["input_ids"][chosen])


CHAT = [
    {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"},
    {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"},
]  # fmt: skip


def test_the_turns_of_the_assistant_are_taught(tokenizer):
    data, (row,) = read([{"messages": CHAT}], tokenizer, pack=False)
    assert words(tokenizer, row) == "w3 w4 </s> w6 </s>"
    assert words(tokenizer, row, taught=False) == "<s> <|user|> w1 w2 </s> <|assistant|> <|user|> w5 </s> <|assistant|>"
    assert data.summary["labels"] == 5 and data.summary["tokens"] == 15
    _, (whole,) = read([{"messages": CHAT}], tokenizer, pack=False, mask_prompts=False)
    assert (whole["labels"] == whole["input_ids"]).all()


def test_a_template_that_moves_earlier_turns(tokenizer):
    """It drops what earlier turns begin with, as templates of models that think do."""
    moving = make_copy(tokenizer)
    moving.chat_template = (
        "{% for m in messages %}{% if not loop.last and m['role'] == 'assistant' %}w0 {{ m['content'] }} "
        "{% else %}<|{{ m['role'] }}|> {{ m['content'] }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    _, (row,) = read([{"messages": CHAT}], moving, pack=False)
    assert words(moving, row) == "w3 w4 w6"
    moving.chat_template = "{% if messages|length > 3 %}w9 w8{% else %}w7{% endif %}"
    with pytest.raises(DataError, match="row 0: the assistant's turn cannot be found"):
        read([{"messages": CHAT}], moving, pack=False)


def make_copy(tokenizer):
    import copy

    return copy.deepcopy(tokenizer)


@pytest.mark.parametrize(
    ("row", "taught"),
    [
        ({"prompt": "w1 w2", "completion": "w3"}, "w3 </s>"),
        ({"prompt": "w1 w2", "response": "w3 w4"}, "w3 w4 </s>"),
        ({"prompt": CHAT[:3], "completion": CHAT[3:]}, "w6 </s>"),
        ({"prompt": "w1 w2", "text": "w1 w2 w3"}, "w3 </s>"),
        ({"prompt": "w9", "text": "w1 w2 w3"}, "w1 w2 w3 </s>"),
        ({"text": "w1 w2 w3"}, "w1 w2 w3 </s>"),
        ({"input_ids": [6, 7, 8], "labels": [-100, 7, 8]}, "w1 w2"),
        ({"input_ids": [6, 7, 8, 0], "attention_mask": [1, 1, 1, 0], "labels": [-100, 7, 8, -100]}, "w1 w2"),
        ({"input_ids": [6, 7, 8]}, "w0 w1 w2"),
    ],
)
def test_forms_of_rows(row, taught, tokenizer):
    _, (found,) = read([row], tokenizer, pack=False)
    assert words(tokenizer, found) == taught


def test_registered_data_teach_their_last_column(tokenizer, tmp_path):
    (tmp_path / "g.jsonl").write_text(json.dumps({"question": "w1 w2", "answer": "w3 w4"}) + "\n")
    _, (row,) = read("gsm8k", tokenizer, dataset_path=tmp_path / "g.jsonl", pack=False)
    assert words(tokenizer, row) == "w3 w4 </s>"
    for name, entry in REGISTERED.items():
        assert entry.answer is None or entry.template.endswith("{" + entry.columns[-1] + "}"), name


def test_packing(tokenizer):
    rows = [{"prompt": f"w{i} w{i}", "completion": f"w{i + 1}"} for i in range(10)]
    data, found = read(rows, tokenizer, max_seq_length=16)
    assert [len(r["input_ids"]) for r in found] == [16, 16] and data.summary["packed"]
    joined = torch.cat([r["input_ids"] for r in found])
    assert tokenizer.decode(joined[:8]) == "w0 w0 w1 </s> w1 w1 w2 </s>"
    assert words(tokenizer, found[0]) == "w1 </s> w2 </s> w3 </s> w4 </s>"
    short, (only,) = read(rows[:2], tokenizer, max_seq_length=16)
    assert len(only["input_ids"]) == 7 and len(short) == 1
    assert data.summary["fingerprint"] != short.summary["fingerprint"]
    again, _ = read(rows, tokenizer, max_seq_length=16)
    assert again.summary == data.summary


def test_padding():
    rows = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 6, 7])},
            {"input_ids": torch.tensor([8]), "labels": torch.tensor([8])}]  # fmt: skip
    batch = Collate(0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in Collate(0)(rows[:1])


def test_what_has_no_answer_is_left_out_and_told(tokenizer):
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}]
    data, _ = read(rows, tokenizer, pack=False)
    assert len(data) == 1 and any("left out: 1 sequence without an answer" in n for n in data.notes)
    with pytest.raises(DataError, match="nothing to learn from: all of it is prompts"):
        read(rows[1:], tokenizer, pack=False)
    with pytest.raises(DataError, match="row 0: labels must be the input_ids"):
        read([{"input_ids": [6, 7], "labels": [7, 8]}], tokenizer)
    with pytest.raises(DataError, match="max_samples must be an integer of at least 1"):
        read(rows, tokenizer, max_samples=0)
    assert len(load_training(rows[:1] * 5, tokenizer=tokenizer, pack=False, max_samples=3)) == 3


def test_splits_by_purpose():
    splits = {"calibration": "a[:5%]", "train": "a", "validation": "b"}
    assert (training_split(splits), evaluation_split(splits)) == ("a", "b")
    assert (training_split("a"), evaluation_split("a")) == ("a", None)
    assert training_split(["calibration", "train[:3]"]) == "train[:3]"
    with pytest.raises(DataError, match="splits has no 'train'"):
        training_split({"calibration": "a"})
