"""How far a compressed checkpoint is from its base on a text.

The text is tokenized whole, without special tokens, and cut into windows that do not overlap. Perplexity is
over the tokens that have a predecessor in their window; KL and top-1 agreement are over all positions.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.errors import CheckpointError, ConfigError, DataError, NumericsError, counted
from bitpress.generation import device_of, evaluating, generate, in_memory
from bitpress.loading import load_checkpoint, load_model, open_checkpoint, tokenizers_of

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Evaluation", "evaluate", "generate", "load_model"]

BUILT_IN = "bitpress's own evaluation text"
# Elements of (positions, vocabulary) that are compared at a time: 64 MiB in float32.
_CHUNK = 1 << 24
_WARM_UP = 16


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A checkpoint measured against its base.

    Attributes:
        base_perplexity, perplexity: exp of the mean negative log-likelihood per token.
        kl: mean over positions of KL(base || checkpoint), in nats.
        kl_p99: the KL that 99 % of the positions do not exceed, in nats.
        top1: share of the positions where both models rank the same token first.
        tokens: predicted tokens, one less per window than it is long.
        base_bytes, bytes: tensors as stored; of a model in memory, its parameters and buffers.
        base_tokens_per_second, tokens_per_second: forward passes over whole windows, after a warm-up.
        text: which text was used.
        windows, length: windows that were used, and tokens in the longest.
        notes: where this differs from what was asked.
    """

    base_perplexity: float
    perplexity: float
    kl: float
    kl_p99: float
    top1: float
    tokens: int
    base_bytes: int
    bytes: int
    base_tokens_per_second: float
    tokens_per_second: float
    text: str
    windows: int
    length: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"notes": list(self.notes)}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What `judge` measures of a base and a checkpoint, as in `Evaluation`; pairs are base and checkpoint."""

    perplexities: tuple[float, float]
    speeds: tuple[float, float]
    kl: float
    kl_p99: float
    top1: float
    tokens: int
    windows: int
    length: int
    notes: tuple[str, ...]


@dataclass
class _Sums:
    """What adds up over windows."""

    nll: list[float] = field(default_factory=lambda: [0.0, 0.0])
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    kl: list[Tensor] = field(default_factory=list)
    agreed: int = 0
    tokens: int = 0


def evaluate(
    base: str | os.PathLike[str] | nn.Module,
    checkpoint: str | os.PathLike[str] | nn.Module,
    *,
    text: str | Path | None = None,
    windows: int = 8,
    length: int = 2048,
    device: str = "auto",
    dtype: str = "float32",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    trust_pickle: bool = False,
    on_window: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of both models, their KL divergence and top-1 agreement, size and forward speed.

    Args:
        base, checkpoint: a folder, a GGUF file, what `oneshot` returned, or a model in memory, which keeps its
            device and dtype.
        text: a text or a file of it; None is the text that comes with bitpress.
        windows, length: windows and tokens in each; a short text gives fewer, and the notes say so.
        device: "auto" is a GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto" for the one that each checkpoint is stored in.
        tokenizer: a tokenizer or a folder of one, for both models; None is the base's.
        trust_remote_code: run model code that comes with the folders.
        trust_pickle: read pickle weights, which can run code.
        on_window: called before each window with its number, from 0, and their total.

    Raises:
        ConfigError: an argument is out of range, or a model in memory came without a tokenizer.
        DataError: the text is missing, empty or too short.
        CheckpointError: a folder cannot be loaded, or the models do not share their vocabulary.
        NumericsError: a model gives NaN.
    """
    check_windows(windows, length)
    words, label = read_text(text)
    found = [None if in_memory(m) else open_checkpoint(m, trust_pickle) for m in (base, checkpoint)]
    tokens, same = tokenizers_of(tokenizer, found, trust_remote_code)
    ids = token_ids(tokens, words, label)
    loading: list[str] = []
    models = [
        m if at is None else load_checkpoint(at, dtype, device, trust_remote_code, loading)
        for m, at in zip((base, checkpoint), found, strict=True)
    ]
    judged = judge(models, ids, same, windows, length, on_window)
    sizes = [stored_bytes(m) if at is None else at.bytes for m, at in zip(models, found, strict=True)]
    return Evaluation(
        base_perplexity=judged.perplexities[0],
        perplexity=judged.perplexities[1],
        kl=judged.kl,
        kl_p99=judged.kl_p99,
        top1=judged.top1,
        tokens=judged.tokens,
        base_bytes=sizes[0],
        bytes=sizes[1],
        base_tokens_per_second=judged.speeds[0],
        tokens_per_second=judged.speeds[1],
        text=label,
        windows=judged.windows,
        length=judged.length,
        notes=(*loading, *judged.notes),
    )


def judge(
    models: Sequence[Any],
    ids: Tensor,
    same: bool,
    windows: int,
    length: int,
    on_window: Callable[[int, int], None] | None,
) -> Judged:
    """A base and a checkpoint, both loaded, on the tokens of a text.

    Args:
        ids: of the text, (T,).
        same: their tokenizer is known to be the same.
        windows, length, on_window: see `evaluate`.

    Raises:
        CheckpointError: the models do not share their vocabulary.
        NumericsError: a model gives NaN.
    """
    import torch

    cut, notes = _cut(ids, windows, length, models)
    sums = _Sums()
    with torch.no_grad(), evaluating(models):
        vocabulary = _vocabulary(models, ids, same, notes)
        for number, window in enumerate(cut):
            if on_window is not None:
                on_window(number, len(cut))
            _measure(models, window, vocabulary, sums)
    kl = torch.cat(sums.kl)
    return Judged(
        perplexities=(_perplexity(sums.nll[0], sums.tokens), _perplexity(sums.nll[1], sums.tokens)),
        speeds=(len(kl) / max(sums.seconds[0], 1e-9), len(kl) / max(sums.seconds[1], 1e-9)),
        kl=max(0.0, kl.double().mean().item()),
        kl_p99=max(0.0, kl.kthvalue(math.ceil(0.99 * len(kl))).values.item()),
        top1=sums.agreed / len(kl),
        tokens=sums.tokens,
        windows=len(cut),
        length=len(cut[0]),
        notes=tuple(notes),
    )


def windows_of(windows: int, length: int, text: str) -> str:
    """What was judged on, in words."""
    return f"{counted(windows, 'window')} of {'' if windows == 1 else 'up to '}{counted(length, 'token')} of {text}"


def check_windows(windows: int, length: int) -> None:
    """ConfigError for windows that there cannot be."""
    if windows < 1 or length < 2:
        raise ConfigError(f"windows {windows}, length {length}: need at least 1 window of 2 tokens")


def read_text(text: str | Path | None) -> tuple[str, str]:
    """The text, and what to call it."""
    if text is None:
        return (files("bitpress") / "assets" / "evaluation.txt").read_text(encoding="utf-8"), BUILT_IN
    if isinstance(text, str) and not os.path.isfile(text):
        words, label = text, f"a text of {len(text)} characters"
    else:
        label = str(text)
        if not os.path.isfile(text):
            raise DataError(f"{text}: no such file; give a plain text file")
        try:
            words = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{text}: cannot be read as UTF-8 text ({error}); give a plain text file") from None
    if not words.strip():
        raise DataError(f"{label}: the text is empty; give one of a few thousand words")
    return words, label


def token_ids(tokenizer: Any, words: str, label: str) -> Tensor:
    """The tokens of a text, (T,); DataError if there are not two."""
    import torch

    # verbose would warn that the whole text is longer than the model's context
    ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise DataError(f"{label}: {len(ids)} tokens; give a text of a few thousand words")
    return torch.tensor(ids)


def _cut(ids: Tensor, windows: int, length: int, models: Sequence[Any]) -> tuple[list[Tensor], list[str]]:
    """Windows of the text, the last one shorter if the text ends in it, and what was not possible."""
    import torch

    notes = []
    limits = [n for m in models if (n := _setting(m, "max_position_embeddings"))]
    if limits and min(limits) < length:
        notes.append(f"windows of {min(limits)} tokens in place of {length}: the model has no more positions")
        length = min(limits)
    cut = [window for window in torch.split(ids[: windows * length], length) if len(window) > 1]
    if len(ids) < windows * length:
        last = f", the last of {len(cut[-1])}" if len(cut[-1]) < len(cut[0]) else ""
        notes.append(
            f"the text has {counted(len(ids), 'token')}: {counted(len(cut), 'window')} of {len(cut[0])}{last} "
            f"in place of {windows} of {length}"
        )
    return cut, notes


def _setting(model: Any, name: str) -> int | None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    value: int | None = getattr(config, name, None)
    return value


def _vocabulary(models: Sequence[Any], ids: Tensor, same: bool, notes: list[str]) -> int:
    """Run each model once, for its vocabulary and to warm it up; the entries that both have."""
    largest = int(ids.max())
    sizes = []
    for who, model in zip(("base", "checkpoint"), models, strict=True):
        known = _setting(model, "vocab_size")
        if known is not None and largest >= known:
            raise CheckpointError(
                f"the text has token {largest} and the {who} a vocabulary of {known}; give its own tokenizer"
            )
        sizes.append(_logits(model, ids[:_WARM_UP])[0].shape[-1])
    if sizes[0] != sizes[1]:
        if not same:
            raise CheckpointError(
                f"the base has a vocabulary of {sizes[0]} and the checkpoint of {sizes[1]}, and nothing says "
                "that their tokenizer is the same; if it is, name it: tokenizer=, or --tokenizer"
            )
        notes.append(f"vocabularies of {sizes[0]} and {sizes[1]}: the first {min(sizes)} entries are compared")
    return min(sizes)


def _logits(model: Any, window: Tensor) -> tuple[Tensor, float]:
    """Logits (T, V) of a window, and the seconds of the forward pass."""
    import torch

    on = device_of(model)
    ids = window[None].to(on)
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=False)
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return getattr(out, "logits", out)[0], time.perf_counter() - start


def _measure(models: Sequence[Any], window: Tensor, vocabulary: int, sums: _Sums) -> None:
    """Add one window; distributions exist for a chunk of positions at a time."""
    logits = []
    for i, model in enumerate(models):
        scores, seconds = _logits(model, window)
        logits.append(scores)
        sums.seconds[i] += seconds
    on = logits[0].device
    window = window.to(on)
    rows = max(1, _CHUNK // vocabulary)
    for start in range(0, len(window), rows):
        p, q = (part[start : start + rows, :vocabulary].to(on).float().log_softmax(-1) for part in logits)
        for who, log_probs in (("base", p), ("checkpoint", q)):
            if log_probs.isnan().any():
                raise NumericsError(f"the {who} gives NaN logits: {_why_nan(models[who == 'checkpoint'])}")
        sums.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        target = window[start + 1 : start + 1 + rows, None]
        for i, log_probs in enumerate((p, q)):
            sums.nll[i] -= log_probs[: len(target)].gather(1, target).double().sum().item()
        # a token that the base rules out adds nothing, whatever the checkpoint says
        kl = (p.exp() * (p - q)).masked_fill_(p == -math.inf, 0.0).sum(-1)
        sums.kl.append(kl.cpu())
    sums.tokens += len(window) - 1


def _why_nan(model: Any) -> str:
    """Where the NaN comes from, and what to do."""
    import torch

    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not weight.float().isfinite().all():
            return f"its {name} holds NaN or infinity, so the checkpoint is damaged: download or write it again"
    if {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}:
        return "its weights are finite, so products overflow in its dtype: run it in float32"
    return "its weights are finite, also in float32, so products overflow: download or write it again"


def _perplexity(nll: float, tokens: int) -> float:
    return math.exp(nll / tokens) if nll / tokens < 700 else math.inf


def stored_bytes(model: Any) -> int:
    """Bytes of a model in memory."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
