"""What a model answers to a prompt, greedily, and how fast."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitpress.errors import ConfigError, DataError
from bitpress.loading import load_checkpoint, open_checkpoint, tokenizers_of

if TYPE_CHECKING:
    from torch import nn

BROKEN = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)  # of a model that loads but does not run


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without the prompt and special tokens.
        tokens: that were generated, the end of text counted.
        seconds: from the prompt to the last token.
    """

    text: str
    tokens: int
    seconds: float


def generate(
    model: str | os.PathLike[str] | nn.Module,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    trust_pickle: bool = False,
) -> str:
    """The greedy answer to a prompt, which goes through the chat template if there is one.

    Args:
        model: a folder, a GGUF file, what `oneshot` returned, or a model in memory with its `tokenizer`.

    Raises:
        ConfigError: no new tokens asked for, or a model in memory came without a tokenizer.
        DataError: the prompt is empty.
        CheckpointError: see `load_model`.
    """
    check_prompts([prompt], max_new_tokens)
    at = None if in_memory(model) else open_checkpoint(model, trust_pickle)
    tokens, _ = tokenizers_of(tokenizer, [at, at], trust_remote_code)
    loaded: Any = model if at is None else load_checkpoint(at, dtype, device, trust_remote_code)
    return answer(loaded, tokens, prompt, max_new_tokens).text


def check_prompts(prompts: Sequence[str], max_new_tokens: int) -> None:
    """Raise what is wrong with prompts, or with the number of tokens to generate.

    Raises:
        ConfigError, DataError: see `generate`.
    """
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: must be positive, got {max_new_tokens}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise DataError(f"a prompt is a text, got {prompt!r}")
        if not prompt.strip():
            raise DataError("the prompt is empty; give a few words to go on from")


def answer(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, *, most_seconds: float | None = None
) -> Answer:
    """The greedy answer of a loaded model, see `generate`.

    Args:
        most_seconds: no token is begun after so long.
    """
    import torch

    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    on = device_of(model)
    given = {key: inputs[key].to(on) for key in ("input_ids", "attention_mask")}
    end = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    asked = int(given["input_ids"].shape[1])
    room = _positions(model) - asked
    if room < 1:
        raise DataError(f"the prompt has {asked} tokens, and the model no position after them; give a shorter one")
    start = time.perf_counter()
    with torch.no_grad(), evaluating([model]):
        out = model.generate(
            **given,
            max_new_tokens=min(max_new_tokens, room),
            max_time=most_seconds,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=end,
        )
    new = out[0, asked:].tolist()  # waits for the device
    seconds = time.perf_counter() - start
    return Answer(str(tokenizer.decode(new, skip_special_tokens=True)), len(new), seconds)


def _positions(model: Any) -> int:
    """Tokens that the model can see; as good as no limit where it says nothing."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) else 1 << 40


def in_memory(model: object) -> bool:
    """Whether a model is given itself, not by its place."""
    from torch import nn

    return isinstance(model, nn.Module)


def device_of(model: Any) -> Any:
    """Where a model's weights are."""
    return next(model.parameters()).device


@contextmanager
def evaluating(models: Sequence[Any]) -> Iterator[None]:
    """Evaluation mode (no dropout), and back to each module's own mode."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
