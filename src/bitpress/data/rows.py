"""How one row reads: token ids as they are, messages through the chat template, or text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitpress.data.splits import close_name
from bitpress.data.table import Registered
from bitpress.errors import DataError

# what ShareGPT-like data calls the speakers
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function_response": "tool",
}
Span = tuple[int, int]  # first character and the one after the last
_CHATS = ("messages", "conversations")
_ANSWERS = ("response", "completion")


@dataclass(frozen=True)
class Reader:
    """How the rows of one dataset read.

    Attributes:
        kind: "ids", "chat" or "text".
        columns: what a row must have; empty for rows that are no mappings.
        read: row -> int64 ids (L,) for kind "ids", else the text ("" where the row has none).
        answers: row -> where in that text stands what is to be answered: the rest is a prompt, which training does
            not teach. None: there are no prompts.
    """

    kind: str
    columns: tuple[str, ...]
    read: Callable[[Any], Any]
    answers: Callable[[Any], list[Span]] | None = None

    def spans(self, number: int, row: Any) -> list[Span] | None:
        """Where the answers of row `number` stand in its text; None: it has no prompt."""
        if self.answers is None:
            return None
        try:
            return self.answers(row)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error

    def __call__(self, number: int, row: Any) -> Any:
        """Read row `number`; a fault names it."""
        if bool(self.columns) != isinstance(row, Mapping):
            raise DataError(
                f"row {number} is a {type(row).__name__}, unlike the rows before it. Give rows of one form."
            )
        missing = [c for c in self.columns if c not in row]
        if missing:
            raise DataError(
                f"row {number} has no column '{missing[0]}' (it has: {_names(row)}). Give rows of one form."
            )
        try:
            return self.read(row)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error


def choose_reader(row: Any, *, source: str, tokenizer: Any, text_column: str, registered: Registered | None) -> Reader:
    """Choose, from the first row, how all rows are read.

    In this order: `input_ids`; a text column that was named; the template of a registered dataset; `messages`
    or `conversations`; the column "text"; `prompt` with `response` or `completion`.

    Raises:
        DataError: nothing of these is there, or the tokenizer that it takes is missing.
    """
    reader = _find_reader(row, tokenizer, text_column, registered)
    if isinstance(reader, str):
        raise DataError(f"{source}: {reader}")
    if reader.kind != "ids" and tokenizer is None:
        raise DataError(
            f"{source}: text needs a tokenizer and none was given. Copy the tokenizer's files into the model's folder, "
            "pass tokenizer=..., or give data that has 'input_ids'."
        )
    if reader.kind == "chat" and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{source}: the data are messages, but the tokenizer has no chat template. Take the tokenizer of an "
            "instruct model, set tokenizer.chat_template, or name a column of plain text with text_column."
        )
    return reader


def _find_reader(row: Any, tokenizer: Any, text_column: str, registered: Registered | None) -> Reader | str:
    """The reader, or what is missing."""

    def chat(messages: Any) -> str:
        return _render(_as_messages(messages), tokenizer)

    def turns(messages: Any) -> list[Span]:
        return answers_of(_as_messages(messages), tokenizer)

    if isinstance(row, str):
        return Reader("text", (), _as_text)
    if not isinstance(row, Mapping):
        return Reader("chat", (), chat, turns) if _is_conversation(row) else Reader("ids", (), _as_ids)
    if row.get("input_ids") is not None:
        return Reader("ids", ("input_ids",), lambda r: _as_ids(r["input_ids"], r.get("attention_mask")))
    named = text_column != "text"
    if not named and registered is not None and registered.template and set(registered.columns) <= set(row):
        return Reader("text", registered.columns, registered.text, registered.answer)
    column = next((c for c in ((text_column,) if named else (*_CHATS, "text")) if c in row), None)
    if column is not None:
        if column in _CHATS or _is_conversation(row[column]):
            return Reader("chat", (column,), lambda r: chat(r[column]), lambda r: turns(r[column]))
        after = (lambda r: _after_prompt(r, column)) if isinstance(row.get("prompt"), str) else None
        return Reader("text", (column,), lambda r: _as_text(r[column]), after)
    answer = next((c for c in _ANSWERS if c in row), None)
    if named or answer is None or "prompt" not in row:
        return _missing_column(row, text_column)
    if _is_conversation(row["prompt"]):
        return Reader(
            "chat", ("prompt", answer), lambda r: chat([*r["prompt"], *r[answer]]),
            lambda r: answers_of(_as_messages([*r["prompt"], *r[answer]]), tokenizer, len(r["prompt"])),
        )  # fmt: skip
    return Reader(
        "text", ("prompt", answer), lambda r: _join(r["prompt"], r[answer]),
        lambda r: _last_part(_join(r["prompt"], r[answer]), _as_text(r[answer])),
    )  # fmt: skip


def _missing_column(row: Mapping[str, Any], text_column: str) -> str:
    if {"role", "content"} <= set(row):
        return "the rows are single messages (role, content). Put each conversation into a list of its own."
    if not row:
        return "the rows have no columns."
    hint = close_name(text_column, map(str, row))
    return (
        f"the rows have no column '{text_column}'. Columns: {_names(row)}.{hint} Name the column with "
        "text_column (--text-column), or in Python turn rows into text with preprocessing_func."
    )


def _names(row: Any) -> str:
    return ", ".join(map(str, row)) or "none"


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"text must be a string, not {type(value).__name__}. Name the column of text with text_column.")
    return value


def _join(prompt: Any, answer: Any) -> str:
    first, second = _as_text(prompt), _as_text(answer)
    spaced = not first or not second or first[-1].isspace() or second[0].isspace()
    return first + second if spaced else f"{first}\n{second}"


def _as_ids(value: Any, mask: Any = None) -> Tensor:
    """Ids (L,) as int64; positions where the mask is zero are left out."""
    ids = as_vector(value, "input_ids")
    if mask is not None:
        keep = as_vector(mask, "attention_mask")
        if keep.shape != ids.shape:
            raise DataError(f"attention_mask has {len(keep)} positions and input_ids has {len(ids)}. Make them equal.")
        ids = ids[keep != 0]
    if len(ids) and int(ids.min()) < 0:
        raise DataError(f"input_ids has the negative id {int(ids.min())}. Take ids, not labels.")
    return ids


def as_vector(value: Any, name: str) -> Tensor:
    """A column of one row as (L,) int64; DataError if it is not one."""
    try:
        vector = torch.as_tensor(value if value is not None else [])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} must be a list of integers, not {type(value).__name__}.") from error
    if vector.dim() == 2 and vector.shape[0] == 1:
        vector = vector[0]
    if vector.dim() != 1:
        raise DataError(
            f"{name} must have one dimension, not the shape {tuple(vector.shape)}. Give one row a sequence."
        )
    if len(vector) and (vector.is_floating_point() or vector.is_complex()):
        raise DataError(f"{name} must be integers, not {vector.dtype}.")
    return vector.to(torch.int64)


def _is_conversation(value: Any) -> bool:
    """A list of mappings, or the mapping of lists that columnar files make of it."""
    if isinstance(value, Mapping):
        return bool({"role", "from"} & set(value))
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Mapping)


def _as_messages(value: Any) -> list[dict[str, Any]]:
    """Messages as `{role, content, ...}`; keys without a value, which columnar files add, are left out."""
    if value is None:
        return []
    if isinstance(value, str):
        raise DataError("messages must be a list of dicts with role and content, not str.")
    if isinstance(value, Mapping):
        value = [dict(zip(value, item, strict=True)) for item in zip(*value.values(), strict=True)]
    return [_as_message(message) for message in value]


def _as_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"a message must be a dict with role and content, not {type(message).__name__}.")
    given = {key: item for key, item in message.items() if item is not None}
    if "from" in given and "role" not in given:
        speaker = str(given.pop("from"))
        said = {"content": given.pop("value")} if "value" in given else {}
        given = {"role": _ROLES.get(speaker.lower(), speaker), **said, **given}
    if "role" not in given:
        raise DataError(f"a message has no 'role' (it has: {_names(given)}). Give role and content, or from and value.")
    if set(given) <= {"role", "name"}:  # one that calls tools may do without content
        raise DataError(
            f"a message of '{given['role']}' has no 'content'. Give role and content, or from and value; an empty text "
            "where nothing is said."
        )
    return {"content": "", **given}


def _last_part(text: str, answer: str) -> list[Span]:
    return [(len(text) - len(answer), len(text))]


def _after_prompt(row: Mapping[str, Any], column: str) -> list[Span]:
    """What follows the column "prompt" in a text that begins with it; the whole text where it does not."""
    text, prompt = _as_text(row[column]), row.get("prompt")
    starts = isinstance(prompt, str) and text.startswith(prompt)
    return [(len(prompt) if starts and prompt else 0, len(text))]


def answers_of(messages: list[dict[str, Any]], tokenizer: Any, first: int = 0) -> list[Span]:
    """Where the assistant's turns from message `first` on stand in a rendered conversation, closing tokens included.

    Raises:
        DataError: the template does not let them be found.
    """
    whole, spans, at = _render(messages, tokenizer), [], 0
    for i in range(len(messages)):
        if messages[i]["role"] != "assistant" or i < first:
            continue
        # most templates render a conversation that is cut off as the beginning of the whole one
        start = _prefix(messages[:i], tokenizer, whole, prompt=True)
        end = _prefix(messages[: i + 1], tokenizer, whole, prompt=False)
        if start is None or end is None or not at <= start < end:  # others drop or move parts of earlier turns
            said = str(messages[i]["content"]).strip()
            start = whole.find(said, at)
            if start < 0:
                raise DataError(
                    "the assistant's turn cannot be found in what the chat template makes of it; train on prompts too: "
                    "mask_prompts=False (--no-mask-prompts)"
                )
            end = start + len(said)
        spans.append((start, end))
        at = end
    return spans


def _prefix(messages: list[dict[str, Any]], tokenizer: Any, whole: str, *, prompt: bool) -> int | None:
    """The length of a conversation's rendered beginning; None if the whole does not begin with it."""
    if not messages:
        return 0
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception:  # templates raise what they like, such as for a conversation that ends with the user
        return None
    return len(text) if whole.startswith(text) else None


def _render(messages: list[dict[str, Any]], tokenizer: Any) -> str:
    if not messages:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        roles = ", ".join(str(m["role"]) for m in messages)
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the chat template refuses these messages ({roles}): {cause}") from error
