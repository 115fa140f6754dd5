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

from bitpress.errors import BitpressError, CheckpointError, ConfigError, Faults
from bitpress.evaluate import check_windows, judge, read_text, stored_bytes, token_ids
from bitpress.generation import BROKEN, answer, check_prompts, in_memory
from bitpress.inspection import Inspection
from bitpress.loading import check_options, load_checkpoint, open_checkpoint, tokenizers_of
from bitpress.report import versions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitpress.evaluate import Judged

QUICK = 10.0  # seconds of a load that is repeated


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One checkpoint of a comparison; what was not measured is None.

    Attributes:
        name: the last part of its path, or more of it where two would be alike.
        path: as given; "" for a model in memory.
        kind: method and scheme, such as "compressed-tensors, W4A16 g64"; "unreadable" if its files do not tell.
        bytes: tensors as stored; of a model in memory, its parameters and buffers.
        bits_per_weight: average over the quantized linears, scales and zero points counted.
        bits_per_parameter: average over everything stored.
        load_seconds: from the files to a model that runs, decompressed where transformers does so; of the second load
            where the first was quick, as that also imports what its format needs.
        tokens_per_second: forward passes over whole windows.
        generated_per_second: tokens of the answers, one after the other.
        perplexity, kl, kl_p99, top1: see `bitpress.evaluate.Evaluation`; KL and top-1 are those to the base.
        answers: to each prompt.
        notes: what differs from what was asked.
        error: why it could not be loaded, judged or asked; None if all went well.
    """

    name: str
    path: str
    kind: str
    bytes: int | None = None
    bits_per_weight: float | None = None
    bits_per_parameter: float | None = None
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
        """Checkpoints that could not be loaded, judged or asked."""
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

    A checkpoint that is there and cannot be read, loaded or judged keeps its place, with its `error`; the others are
    judged.

    Args:
        base, checkpoints: folders, hub ids, GGUF files, what `oneshot` returned, or models in memory.
        prompts: what each of them answers, greedily and through the chat template if there is one.
        max_new_tokens: of an answer, at most.
        text, windows, length, device, dtype, tokenizer, trust_remote_code, trust_pickle: see
            `bitpress.evaluate.evaluate`.
        html: also write a page to this file.
        on_step: is told what is at work.

    Raises:
        ConfigError, DataError, CheckpointError, PlanError: all that is wrong with the arguments, a place where nothing
            is among them; or the base, or none of the checkpoints, can be loaded and judged.
    """
    models = (base, *checkpoints)
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
    opened = _opened(models, tokenizer, trust_remote_code, trust_pickle)
    lost = [o.error for o in opened[1:] if o.error is not None]
    nowhere = any(o.error is not None and not there(m) for m, o in zip(models, opened, strict=True))
    if faults.errors or opened[0].error is not None or nowhere or len(lost) == len(checkpoints):
        faults.errors += [o.error for o in opened if o.error is not None]
    faults.report()
    work = _Work(
        models, opened, tuple(prompts), max_new_tokens, on_step or (lambda _: None),
        lambda at, notes: load_checkpoint(at, dtype, device, trust_remote_code, notes),
    )  # fmt: skip
    judged = work.execute(token_ids(opened[0].tokenizer, words, label), windows, length)
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
    if not os.access(Path(file) if Path(file).exists() else Path(file).absolute().parent, os.W_OK):
        raise ConfigError(f"html: {file}: cannot be written; name another file")


@dataclass(frozen=True)
class _Opened:
    """A model before it is loaded.

    Attributes:
        at: what its folder holds; None of a model in memory, or if it cannot be read.
        tokenizer, same: see `tokenizers_of`.
        error: why it cannot be compared.
    """

    at: Inspection | None = None
    tokenizer: Any = None
    same: bool = False
    error: BitpressError | None = None


def _opened(models: Sequence[Any], tokenizer: Any, trust_code: bool, trust_pickle: bool) -> list[_Opened]:
    """A look at each; a base that cannot be read leaves the others without a tokenizer."""
    found: list[_Opened] = []
    for model in models:
        try:
            at = None if in_memory(model) else open_checkpoint(model, trust_pickle)
            if found and found[0].error is not None:
                found.append(_Opened(at))
                continue
            pair = [found[0].at if found else at, at]
            found.append(_Opened(at, *tokenizers_of(tokenizer, pair, trust_code)))
        except BitpressError as error:
            found.append(_Opened(error=error))
    return found


def there(model: Any) -> bool:
    """Whether a model is in memory, or something lies at its place."""
    return in_memory(model) or (isinstance(model, str | os.PathLike) and Path(model).expanduser().exists())


class _Work:
    """The models of a comparison, one checkpoint at a time beside the base; fills `rows`."""

    def __init__(
        self,
        models: Sequence[Any],
        opened: Sequence[_Opened],
        prompts: tuple[str, ...],
        max_new_tokens: int,
        say: Callable[[str], None],
        load: Callable[[Inspection, list[str]], Any],
    ) -> None:
        self.models, self.opened = models, opened
        self.prompts, self.max_new_tokens, self.say, self.load = prompts, max_new_tokens, say, load
        paths = [
            "" if in_memory(m) else os.fspath(m) if o.at is None else o.at.path
            for m, o in zip(models, opened, strict=True)
        ]
        self.rows = [
            describe(name, model, o.at) if o.error is None
            else Compared(name=name, path=path, kind="unreadable", error=str(o.error))
            for name, path, model, o in zip(_names(paths), paths, models, opened, strict=True)
        ]  # fmt: skip

    def execute(self, ids: Tensor, windows: int, length: int) -> Judged:
        """What was judged of the first checkpoint that could be."""
        for row in self.rows:
            if row.error is not None:
                self.say(f"{row.name}: left out: {row.error}")
        base, first = self._loaded(0), None
        self._ask(0, base)
        for i in range(1, len(self.models)):
            if self.opened[i].error is not None:
                continue
            other = None
            try:
                other = self._loaded(i)
                judged = judge((base, other), ids, self.opened[i].same, windows, length, partial(self._at, i))
                first = first or judged
                self._add(
                    i, perplexity=judged.perplexities[1], kl=judged.kl, kl_p99=judged.kl_p99, top1=judged.top1,
                    tokens_per_second=judged.speeds[1], notes=(*self.rows[i].notes, *judged.notes),
                )  # fmt: skip
                self._ask(i, other)
            except BitpressError as error:
                self._add(i, error=str(error))
            except BROKEN as error:
                self._add(i, error=f"{type(error).__name__}: {error}")
            finally:
                del other
                _free()
        if first is None:
            told = [(row, str(row.error)) for row in self.rows[1:]]  # most say themselves where
            raise CheckpointError([e if e.startswith(f"{row.path}: ") else f"{row.name}: {e}" for row, e in told])
        self._add(0, perplexity=first.perplexities[0], tokens_per_second=first.speeds[0])
        return first

    def _add(self, i: int, **measured: Any) -> None:
        self.rows[i] = replace(self.rows[i], **measured)

    def _at(self, i: int, window: int, total: int) -> None:
        self.say(f"{self.rows[i].name}: window {window + 1} of {total}")

    def _loaded(self, i: int) -> Any:
        at = self.opened[i].at
        if at is None:
            return self.models[i]
        self.say(f"{self.rows[i].name}: loading")
        loaded, seconds, notes = self._timed(at)
        if seconds < QUICK:
            del loaded
            _free()
            loaded, seconds, notes = self._timed(at)
        self._add(i, load_seconds=seconds, notes=(*self.rows[i].notes, *notes))
        return loaded

    def _timed(self, at: Inspection) -> tuple[Any, float, list[str]]:
        start, notes = time.perf_counter(), list[str]()
        return self.load(at, notes), time.perf_counter() - start, notes

    def _ask(self, i: int, model: Any) -> None:
        if not self.prompts:
            return
        tokenizer = self.opened[i].tokenizer
        self.say(f"{self.rows[i].name}: answering")
        answer(model, tokenizer, self.prompts[0], 2)  # the first call sets caches and kernels up
        answers = [answer(model, tokenizer, prompt, self.max_new_tokens) for prompt in self.prompts]
        speed = sum(a.tokens for a in answers) / max(sum(a.seconds for a in answers), 1e-9)
        self._add(i, answers=tuple(a.text for a in answers), generated_per_second=speed)


def describe(name: str, model: Any, at: Inspection | None) -> Compared:
    """What is known of a model before it is loaded."""
    if at is None:
        return Compared(name=name, path="", kind="in memory", bytes=stored_bytes(model))
    labels = Counter(layer.scheme for layer in at.layers)
    kinds = [at.method, *([f"{len(labels)} schemes"] if len(labels) > 1 else labels)]
    notes = tuple(at.messages)
    return Compared(
        name=name, path=at.path, kind=", ".join(kinds), bytes=at.bytes, bits_per_weight=at.bits_per_weight,
        bits_per_parameter=at.bits_per_parameter, notes=notes,
    )  # fmt: skip


def _names(places: Sequence[str]) -> list[str]:
    """A short name for each: as many last parts of its path as tell it from the others."""
    paths = [Path(place or f"model {i}").expanduser() for i, place in enumerate(places)]
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
