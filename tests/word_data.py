"""Data of the words w0, w1, ..., a tokenizer that knows them, and what calibration makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bitpress.data import CalibrationData, load_calibration
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


ROWS = [{"text": words(4 * i, 4)} for i in range(20)]
ALL = [ids(4 * i, 4) for i in range(20)]
TURNS = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]


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
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that `datasets` reads are not kept; a file of tests has it by importing it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
