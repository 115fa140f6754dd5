"""The registered datasets: where they lie, which split calibrates, and how a row reads as text."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Registered:
    """One registered dataset.

    Attributes:
        hub_id: repository on the hub; "" for a kind of file, which needs a path.
        config: configuration name on the hub.
        split: split that calibrates when none is asked for.
        template: format string over the row's columns; "" for messages or the user's own columns.
        data_files: files by split, where the whole repository would be too much to download.
        revision: branch, where the main branch holds a script instead of data.
        builder: reader of `datasets` for a kind of file; "" goes by the file's suffix.
    """

    hub_id: str = ""
    config: str | None = None
    split: str | None = None
    template: str = ""
    data_files: dict[str, str] | None = None
    revision: str | None = None
    builder: str = ""

    @property
    def answer(self) -> Callable[[Any], list[tuple[int, int]]] | None:
        """Where in `text` the answer to the rest stands: the last of several columns; None if there is but one."""
        if len(self.columns) < 2:
            return None
        last = self.columns[-1]

        def span(row: Any) -> list[tuple[int, int]]:
            text = self.text(row)
            return [(len(text) - len(row[last] or ""), len(text))]

        return span

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template reads."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.template) if name)

    def text(self, row: Any) -> str:
        """The row as one text; a column without a value reads as nothing."""
        return self.template.format(**{c: "" if row[c] is None else row[c] for c in self.columns})


_INSTRUCTION = "### Instruction:\n{instruction}\n\n### Response:\n{output}"

REGISTERED: dict[str, Registered] = {
    "c4": Registered(
        "allenai/c4",
        split="train",
        template="{text}",
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "cnn_dailymail": Registered("abisee/cnn_dailymail", "3.0.0", "train", "{article}\n\n{highlights}"),
    "csv": Registered(builder="csv"),
    "custom": Registered(),
    "evolcodealpaca": Registered("theblackcat102/evol-codealpaca-v1", None, "train", _INSTRUCTION),
    "gsm8k": Registered("openai/gsm8k", "main", "train", "Question: {question}\nAnswer: {answer}"),
    "json": Registered(builder="json"),
    "open_platypus": Registered("garage-bAInd/Open-Platypus", None, "train", _INSTRUCTION),
    "ptb": Registered(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "train",
        "{sentence}",
        revision="refs/convert/parquet",
    ),
    "ultrachat_200k": Registered("HuggingFaceH4/ultrachat_200k", None, "train_sft"),
    "wikitext": Registered("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "{text}"),
}

_BY_HUB_ID = {entry.hub_id.lower(): entry for entry in REGISTERED.values() if entry.hub_id}


def find_registered(name: str) -> Registered | None:
    """The entry of a registered name ('-' as '_', any case) or of its hub id, else None."""
    return REGISTERED.get(name.lower().replace("-", "_")) or _BY_HUB_ID.get(name.lower())
