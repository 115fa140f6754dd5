"""Several checkpoints against one base: size, speed, distance from the base, and what each of them says.

The base stays loaded; the checkpoints are loaded one after the other, so two models are in memory at a time.
"""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.errors import CheckpointError, ConfigError, Faults, NumericsError
from bitpress.evaluate import check_windows, judge, read_text, stored_bytes, token_ids
from bitpress.generation import answer, check_prompts, in_memory
from bitpress.inspection import Inspection
from bitpress.loading import check_options, load_checkpoint, open_checkpoint, tokenizers_of
from bitpress.report import versions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitpress.evaluate import Judged


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One checkpoint of a comparison; what was not measured is None.

    Attributes:
        name: the last part of its path, or more of it where two would be alike.
        path: as given; "" for a model in memory.
        kind: method and scheme, such as "compressed-tensors, W4A16 g64".
        bytes: tensors as stored; of a model in memory, its parameters and buffers.
        bits_per_weight: average over the quantized linears, scales and zero points counted.
        bits_per_parameter: average over everything stored.
        load_seconds: from the files to a model that runs, decompressed where transformers does so.
        tokens_per_second: forward passes over whole windows.
        generated_per_second: tokens of the answers, one after the other.
        perplexity, kl, kl_p99, top1: see `bitpress.evaluate.Evaluation`; KL and top-1 are those to the base.
        answers: to each prompt.
        notes: what differs from what was asked.
        error: why it could not be loaded or judged; None if all went well.
    """

    name: str
    path: str
    kind: str
    bytes: int
    bits_per_weight: float | None
    bits_per_parameter: float | None
    load_seconds: float | None = None
    tokens_per_second: float | None = None
    generated_per_second: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    answers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A base and its checkpoints.

    Attributes:
        text: which text was used; windows of up to `length` tokens of it, `tokens` of them predicted.
        prompts: whose answers are in `base` and `checkpoints`.
    """

    base: Compared
    checkpoints: tuple[Compared, ...]
    text: str
    windows: int
    length: int
    tokens: int
    dtype: str
    prompts: tuple[str, ...]
    versions: dict[str, str]

    @property
    def failed(self) -> tuple[Compared, ...]:
        """Checkpoints that could not be loaded or judged."""
        return tuple(c for c in self.checkpoints if c.error is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def compare(
    base: str | os.PathLike[str] | nn.Module,
    *checkpoints: str | os.PathLike[str] | nn.Module,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 64,
    text: str | Path | None = None,
    windows: int = 8,
    length: int = 2048,
    device: str = "auto",
    dtype: str = "float32",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    trust_pickle: bool = False,
    html: str | Path | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Comparison:
    """Hold checkpoints of any formats that transformers loads, or bitpress, against the model they were made from.

    A checkpoint that turns out not to load keeps its place, with its `error`, and the others are judged.

    Args:
        base, checkpoints: folders, hub ids, GGUF files, what `oneshot` returned, or models in memory.
        prompts: what each of them answers, greedily and through the chat template if there is one.
        max_new_tokens: of an answer, at most.
        text, windows, length, device, dtype, tokenizer, trust_remote_code, trust_pickle: see
            `bitpress.evaluate.evaluate`.
        html: also write a page to this file.
        on_step: is told what is at work.

    Raises:
        ConfigError, DataError, CheckpointError, PlanError: all that is wrong with the arguments, or that a look at
            the folders tells; or the base cannot be loaded.
        NumericsError: every checkpoint, or the base, gives NaN.
    """
    models = (base, *checkpoints)
    found: list[Inspection | None] = []
    tokenizers: list[tuple[Any, bool]] = []
    faults = Faults()
    with faults:
        if not checkpoints:
            raise ConfigError("checkpoints: none given; name at least one to hold against the base")
    with faults:
        check_windows(windows, length)
    with faults:
        check_options(dtype, device)
    with faults:
        check_prompts(prompts, max_new_tokens)
    with faults:
        words, label = read_text(text)
    with faults:
        check_page(html)
    for model in models:
        with faults:
            found.append(None if in_memory(model) else open_checkpoint(model, trust_pickle))
    if len(found) == len(models):
        for at in found[1:]:
            with faults:
                tokenizers.append(tokenizers_of(tokenizer, [found[0], at], trust_remote_code))
    faults.report()
    work = _Work(
        models, found, tokenizers, tuple(prompts), max_new_tokens, on_step or (lambda _: None),
        lambda at, notes: load_checkpoint(at, dtype, device, trust_remote_code, notes),
    )  # fmt: skip
    judged = work.execute(token_ids(tokenizers[0][0], words, label), windows, length)
    result = Comparison(
        base=work.rows[0], checkpoints=tuple(work.rows[1:]), text=label, windows=judged.windows,
        length=judged.length, tokens=judged.tokens, dtype=dtype, prompts=tuple(prompts), versions=versions(),
    )  # fmt: skip
    if html is not None:
        from bitpress.views.comparison import comparison_page

        Path(html).write_text(comparison_page(result), encoding="utf-8")
    return result


def check_page(file: str | Path | None) -> None:
    """ConfigError if a page could not be written there, told before the work."""
    if file is None:
        return
    if Path(file).is_dir():
        raise ConfigError(f"html: {file}: is a folder; name a file in it")
    if not Path(file).absolute().parent.is_dir():
        raise ConfigError(f"html: {Path(file).parent}: no such folder; make it first")


class _Work:
    """The models of a comparison, one checkpoint at a time beside the base; fills `rows`."""

    def __init__(
        self,
        models: Sequence[Any],
        found: Sequence[Inspection | None],
        tokenizers: Sequence[tuple[Any, bool]],
        prompts: tuple[str, ...],
        max_new_tokens: int,
        say: Callable[[str], None],
        load: Callable[[Inspection, list[str]], Any],
    ) -> None:
        self.models, self.found, self.tokenizers = models, found, tokenizers
        self.prompts, self.max_new_tokens, self.say, self.load = prompts, max_new_tokens, say, load
        self.rows = [_described(*parts) for parts in zip(_names(found), models, found, strict=True)]

    def execute(self, ids: Tensor, windows: int, length: int) -> Judged:
        """What was judged of the first checkpoint that could be."""
        from transformers import AutoModelForCausalLM

        assert AutoModelForCausalLM  # imported now: the time of the first load is that of its files
        base, first = self._loaded(0), None
        self._ask(0, base, self.tokenizers[0][0])
        for i in range(1, len(self.models)):
            other = None
            try:
                other = self._loaded(i)
                tokens, same = self.tokenizers[i - 1]
                judged = judge((base, other), ids, same, windows, length, partial(self._at, i))
                self._ask(i, other, tokens)
            except (CheckpointError, NumericsError) as error:
                self._add(i, error=str(error))
            else:
                first = first or judged
                self._add(
                    i, perplexity=judged.perplexities[1], kl=judged.kl, kl_p99=judged.kl_p99, top1=judged.top1,
                    tokens_per_second=judged.speeds[1], notes=(*self.rows[i].notes, *judged.notes),
                )  # fmt: skip
            finally:
                del other
                _free()
        if first is None:
            raise CheckpointError([f"{row.name}: {row.error}" for row in self.rows[1:]])
        self._add(0, perplexity=first.perplexities[0], tokens_per_second=first.speeds[0])
        return first

    def _add(self, i: int, **measured: Any) -> None:
        self.rows[i] = replace(self.rows[i], **measured)

    def _at(self, i: int, window: int, total: int) -> None:
        self.say(f"{self.rows[i].name}: window {window + 1} of {total}")

    def _loaded(self, i: int) -> Any:
        at = self.found[i]
        if at is None:
            return self.models[i]
        self.say(f"{self.rows[i].name}: loading")
        start, notes = time.perf_counter(), list[str]()
        loaded = self.load(at, notes)
        self._add(i, load_seconds=time.perf_counter() - start, notes=(*self.rows[i].notes, *notes))
        return loaded

    def _ask(self, i: int, model: Any, tokenizer: Any) -> None:
        if not self.prompts:
            return
        self.say(f"{self.rows[i].name}: answering")
        answer(model, tokenizer, self.prompts[0], 2)  # the first call sets caches and kernels up
        answers = [answer(model, tokenizer, prompt, self.max_new_tokens) for prompt in self.prompts]
        speed = sum(a.tokens for a in answers) / max(sum(a.seconds for a in answers), 1e-9)
        self._add(i, answers=tuple(a.text for a in answers), generated_per_second=speed)


def _described(name: str, model: Any, at: Inspection | None) -> Compared:
    """What is known before it is loaded."""
    if at is None:
        return Compared(
            name=name, path="", kind="in memory", bytes=stored_bytes(model), bits_per_weight=None,
            bits_per_parameter=None,
        )  # fmt: skip
    labels = Counter(layer.label for layer in at.layers)
    kinds = [at.method, *([f"{len(labels)} schemes"] if len(labels) > 1 else labels)]
    notes = tuple(at.messages)
    return Compared(
        name=name, path=at.path, kind=", ".join(kinds), bytes=at.bytes, bits_per_weight=at.bits_per_weight,
        bits_per_parameter=at.bits_per_parameter, notes=notes,
    )  # fmt: skip


def _names(found: Sequence[Inspection | None]) -> list[str]:
    """A short name for each: as many last parts of its path as tell it from the others."""
    paths = [Path(f"model {i}" if at is None else at.path).expanduser() for i, at in enumerate(found)]
    names = []
    for path in paths:
        for count in range(1, len(path.parts) + 1):
            name = "/".join(path.parts[-count:])
            if sum(("/" + "/".join(other.parts)).endswith("/" + name) for other in set(paths)) == 1:
                break
        names.append(name)
    # the same checkpoint given twice
    return [n if names.count(n) == 1 else f"{n} ({names[: i + 1].count(n)})" for i, n in enumerate(names)]


def _free() -> None:
    """Give the memory of a model back before the next is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
