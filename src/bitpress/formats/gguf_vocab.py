"""A tokenizer in a GGUF file: llama.cpp has a splitter for each family, found by what tokenizer.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitpress.errors import CheckpointError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# what splits a text before byte pairs are merged -> llama.cpp's name of it
SPLITTERS = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
    "digits, words": "smollm",
    "words": "gpt-2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens


def vocabulary_fault(folder: Path) -> str | None:
    """Why the tokenizer of a folder cannot be written, None if it can."""
    try:
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "needs the tokenizer, and there is no tokenizer.json beside the model"
    if _is_sentencepiece(model):
        return None
    if model["model"]["type"] != "BPE":
        return f"a tokenizer of type {model['model']['type']} is not written, only byte pairs"
    if splitter_of(model) is None:
        return "llama.cpp's name of the tokenizer's pre_tokenizer is not known here; its own converter may know it"
    return None


def _is_sentencepiece(model: dict[str, Any]) -> bool:
    return model["model"]["type"] == "BPE" and bool(model["model"].get("byte_fallback"))


def splitter_of(model: dict[str, Any]) -> str | None:
    """llama.cpp's name for the pre_tokenizer of a tokenizer.json."""
    steps = model.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    words = []
    for step in steps:
        match step.get("type"):
            case "Split":
                words.append(step["pattern"].get("Regex", ""))
            case "Digits" if step.get("individual_digits"):
                words.append("digits")
            case "ByteLevel" if step.get("use_regex", True) and not step.get("add_prefix_space"):
                words.append("words")
            case "ByteLevel" if not step.get("add_prefix_space"):
                continue
            case _:
                return None
    return SPLITTERS.get(", ".join(words))


def add_vocabulary(writer: Any, folder: Path, config: Any) -> None:
    """Tokens, merges, special tokens and the chat template.

    Raises:
        CheckpointError: a tokenizer that cannot be written.
    """
    import gguf

    if fault := vocabulary_fault(folder):
        raise CheckpointError(f"{folder}: {fault}")
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    size = config.vocab_size
    if _is_sentencepiece(model):
        vocab = gguf.LlamaHfVocab(folder)
        entries = list(vocab.all_tokens())
        entries += [(f"[PAD{i}]".encode(), -1000.0, UNUSED) for i in range(len(entries), size)]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([e[0] for e in entries])
        writer.add_token_scores([e[1] for e in entries])
        writer.add_token_types([int(e[2]) for e in entries])
    else:
        tokens, types = _tokens(model, size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitter_of(model))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["model"]["merges"]]
        writer.add_token_merges(merges)
    _special(writer, folder)


def _tokens(model: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """All tokens by id, and their types; ids that the tokenizer leaves out are unused."""
    by_id = {i: token for token, i in model["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in model.get("added_tokens", ())}
    tokens, types = [], []
    for i in range(size):
        if i in added:
            tokens.append(added[i]["content"])
            types.append(CONTROL if added[i]["special"] else USER_DEFINED)
        else:
            tokens.append(by_id.get(i, f"[PAD{i}]"))
            types.append(NORMAL if i in by_id else UNUSED)
    return tokens, types


def _special(writer: Any, folder: Path) -> None:
    """Ids of special tokens, whether one is put first, and the chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for name in ("bos", "eos", "unk", "pad"):
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is not None:
            getattr(writer, f"add_{name}_token_id")(found)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
