"""`oneshot`: compress a model with a recipe, from calibration data, without training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bitpress import ranks
from bitpress.devices import working_on
from bitpress.errors import ConfigError, did_you_mean
from bitpress.prepare import Prepared, is_path, prepare_together
from bitpress.progress import Progress, choose_progress
from bitpress.training.arguments import Training

if TYPE_CHECKING:
    from torch import nn

DTYPES = ("bfloat16", "float16", "float32")


IN_MEMORY = "Greedy. The weights after are those that are stored; activations are not rounded."


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """All arguments of `oneshot`, checked. See there."""

    model: Any
    dataset: Any = None
    recipe: Any = None
    scheme: str | None = None
    bits: float | None = None
    group_size: int | None = None
    method: str | None = None
    effort: str | None = None
    sparsity: str | float | None = None
    ignore: str | list[str] | None = None
    tokenizer: Any = None
    splits: Any = None
    dataset_config_name: str | None = None
    dataset_path: Any = None
    text_column: str = "text"
    num_calibration_samples: int = 512
    max_seq_length: int = 384
    shuffle_calibration_samples: bool = True
    concatenate_data: bool = True
    separator: str | None = None
    preprocessing_func: Callable[[Any], Any] | None = None
    preprocessing_num_workers: int | None = None
    streaming: bool = False
    output_dir: Path | None = None
    stage: str | None = None
    save_compressed: bool = True
    dtype: str | None = None
    attn_implementation: str | None = None
    format: str = "compressed-tensors"
    device: str = "auto"
    max_memory: int | str | None = None
    batch_size: int | None = None
    min_expert_tokens: int = 256
    propagate: bool | None = None
    seed: int = 42
    verify: bool = True
    resume: bool = False
    fresh: bool = False
    trust_remote_code_model: bool = False
    trust_remote_code_data: bool = False
    trust_pickle: bool = False
    prompts: tuple[str, ...] = ()
    progress: Progress = field(default_factory=Progress)
    verb: Literal["oneshot", "train", "apply"] = "oneshot"
    training: Training = field(default_factory=Training)

    @property
    def limit(self) -> int | None:
        """`max_memory` in bytes."""
        from bitpress.budget import parse_bytes

        return parse_bytes(self.max_memory)

    @property
    def propagates(self) -> bool:
        """Whether blocks are calibrated on what the compressed ones before them give."""
        return self.effort != "fast" if self.propagate is None else self.propagate

    def check(self) -> None:
        """ConfigError with all that is wrong with the values in themselves."""
        faults = [
            f"{name}: must be at least 1, got {getattr(self, name)!r}"
            for name in ("num_calibration_samples", "max_seq_length", "batch_size", "min_expert_tokens")
            if getattr(self, name) is not None and not _positive(getattr(self, name), name == "min_expert_tokens")
        ]
        if self.bits is not None and (not isinstance(self.bits, int | float) or isinstance(self.bits, bool)):
            faults.append(f"bits: expected a number of bits per weight such as 4.25, got {self.bits!r}")
        try:
            _ = self.limit
        except ConfigError as error:
            faults += error.problems
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 1 << 63:
            faults.append(f"seed: expected a whole number from 0 to 2^63 - 1, got {self.seed!r}")
        if any(not isinstance(p, str) or not p.strip() for p in self.prompts):
            faults.append("prompts: expected texts that are not empty")
        if self.stage is not None and not isinstance(self.stage, str):
            faults.append(f"stage: expected a name, got {self.stage!r}")
        if self.dtype not in (None, "auto", *DTYPES):
            faults.append(f"dtype: {self.dtype!r} is unknown.{did_you_mean(str(self.dtype), DTYPES)}")
        if not is_path(self.model):
            for name in ("dtype", "attn_implementation"):
                if getattr(self, name) not in (None, "auto"):
                    faults.append(f"{name}: the model is in memory; load it with that {name}")
        if self.resume and self.fresh:
            faults.append("resume, fresh: give one of the two")
        if self.output_dir is None and (self.verb == "apply" or (self.stage is not None and is_path(self.model))):
            faults.append("output_dir: missing; a stage is saved as <output_dir>/<stage>")
        faults += self._format_faults()
        if faults:
            raise ConfigError(faults)

    def _format_faults(self) -> list[str]:
        from bitpress.formats import CHECKPOINTS, DEFAULT

        if self.format not in CHECKPOINTS:
            return [f"format: {self.format!r} is unknown.{did_you_mean(str(self.format), CHECKPOINTS)}"]
        if self.format != DEFAULT and not self.save_compressed:
            return [f"save_compressed, format: dense weights beside scales (--dense) are a form of {DEFAULT}; drop one"]
        return []


def _positive(value: Any, zero: bool) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= (0 if zero else 1)


def oneshot(
    model: str | os.PathLike[str] | nn.Module,
    dataset: Any = None,
    recipe: Any = None,
    *,
    scheme: str | None = None,
    bits: float | None = None,
    group_size: int | None = None,
    method: Literal["gptq", "rtn"] | None = None,
    effort: Literal["fast", "balanced", "best"] | None = None,
    sparsity: str | float | None = None,
    ignore: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    splits: str | Sequence[str] | Mapping[str, str] | None = None,
    dataset_config_name: str | None = None,
    dataset_path: str | os.PathLike[str] | None = None,
    text_column: str = "text",
    num_calibration_samples: int = 512,
    max_seq_length: int = 384,
    shuffle_calibration_samples: bool = True,
    concatenate_data: bool = True,
    pad_to_max_length: bool | None = None,
    separator: str | None = None,
    preprocessing_func: Callable[[Any], Any] | None = None,
    preprocessing_num_workers: int | None = None,
    streaming: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    stage: str | None = None,
    save_compressed: bool = True,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    format: str = "compressed-tensors",
    device: str = "auto",
    max_memory: int | str | None = None,
    batch_size: int | None = None,
    min_expert_tokens: int = 256,
    propagate: bool | None = None,
    seed: int = 42,
    verify: bool = True,
    resume: bool = False,
    fresh: bool = False,
    trust_remote_code_model: bool = False,
    trust_remote_code_data: bool = False,
    trust_pickle: bool = False,
    prompts: str | Sequence[str] = (),
    progress: Progress | bool | None = None,
) -> Any:
    """Compress a model in one shot.

    A folder or hub id with an `output_dir` is streamed block by block in bounded memory and can be killed at any time:
    the same call goes on where it was. Without `output_dir` it is loaded whole. A module is changed in place. Several
    processes that torchrun or accelerate has started share the work.

    Args:
        model: folder, hub id, or a causal language model of transformers in memory.
        dataset: calibration data: a registered name ("ultrachat-200k", "gsm8k", ...), a hub id, a file or folder, a
            `datasets.Dataset`, a list of texts or of message lists, a DataLoader; None: a text that bitpress ships.
        recipe: path, YAML or JSON text, dict, modifier, or list of modifiers; see `bitpress.recipe`. In its place:
            scheme, bits or sparsity, which make a recipe of their own.
        scheme: preset such as "W4A16"; see `bitpress.schemes`.
        bits: a size target: stored bits per weight on average over the compressed linears, scales and zero points
            counted. A survey finds out how much each linear matters and chooses its scheme. It goes to the recipe's
            modifier that quantizes, which then names no scheme.
        group_size: with scheme: input columns per scale in place of the preset's; -1 is one scale a row.
        method: with scheme or bits: "gptq", the default, or "rtn", which rounds to nearest.
        effort: with scheme, bits or sparsity: "fast" only sweeps, without `propagate`; "balanced" moves scales between
            layers first and undoes part of the error of those before, without gradients; "best" tunes each block with
            gradients after that; see `bitpress.effort`. None: GPTQ with its defaults.
        sparsity: "2:4", another N:M, or a share of zeros: SparseGPT prunes, before the quantizer if there is a scheme.
        ignore: with scheme, bits or sparsity: linears to leave, patterns of `bitpress.targets`. None: "lm_head".
        tokenizer: object or path; None: the model's own. `processor` is the same under another name.
        splits: split of the data: "train[:5%]", a list, or {"calibration": ..., "train": ...}.
        dataset_config_name: configuration of a hub dataset.
        dataset_path: file or folder that a registered name is read from ("custom", "json" and "csv" need one).
        text_column: column that holds the text.
        num_calibration_samples: sequences.
        max_seq_length: tokens per sequence.
        shuffle_calibration_samples: draw the samples at random, by `seed`, instead of taking the first.
        concatenate_data: join texts and cut them into full sequences; else each text is one sequence, cut off.
            Nothing is ever padded; `pad_to_max_length` is accepted and has no effect.
        separator: text between joined documents; None: the end-of-sequence token.
        preprocessing_func: maps a row to a row with text, messages or input_ids.
        preprocessing_num_workers: accepted for compatibility; tokenizing uses the tokenizer's own threads.
        streaming: do not download a hub dataset as a whole.
        output_dir: where the checkpoint goes; with `stage`, to `<output_dir>/<stage>`.
        stage: run this stage of the recipe alone. None: all of them.
        save_compressed: packed weights; else dense ones beside their scales and zero points.
        dtype: "bfloat16", "float16" or "float32": what the model's weights are turned into first; None: as they are.
        attn_implementation: attention of the forwards, by transformers' name ("sdpa", "eager", "flash_attention_2");
            None: transformers' choice.
        format: how the checkpoint is stored: "compressed-tensors", "gptq", "awq", "dense", ...; see `bitpress.formats`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        max_memory: limit for the device's memory (host memory on the CPU): bytes or "8GiB".
        batch_size: sequences per forward; None: by memory.
        min_expert_tokens: an expert of a mixture that the router gave fewer tokens takes its statistics from all
            tokens of the block; the report says so.
        propagate: calibrate each block on what the compressed blocks before it give; else on what the uncompressed
            ones give, which takes one forward of the data instead of two and is less accurate. None: yes, except
            with effort "fast".
        seed: of everything random.
        verify: read back what was written and compare it with what was solved.
        resume: fail if there is nothing to go on from. (Going on is automatic where the arguments match.)
        fresh: delete what an earlier run left in `output_dir` and start anew.
        trust_remote_code_model, trust_remote_code_data: run code that the model or the dataset brings.
        trust_pickle: read pickle weights (pytorch_model.bin) where a model has no others; reading them can run code.
        prompts: answered by the model before and after, for the report; that loads it whole, once the run is over.
        progress: what to say while working. None: a live display if stderr is a terminal, else nothing; True: also
            without a terminal, a line a block; False: nothing; or an object of `bitpress.progress`.

    Returns:
        The model that was passed, changed, with a `save_pretrained` that packs; for a folder or hub id with an
        `output_dir`, a handle that loads the checkpoint when it is used (`bitpress.result.SavedModel`).

    Raises:
        RecipeError, ConfigError, PlanError, DataError, CheckpointError: user errors, before weights are loaded.
        NumericsError: NaN or infinity, or a Gram matrix that is not positive definite.
    """
    arguments = Arguments(
        model=model, dataset=dataset, recipe=recipe, scheme=scheme, bits=bits, group_size=group_size, method=method,
        effort=effort, sparsity=sparsity, ignore=ignore if ignore is None or isinstance(ignore, str) else list(ignore),
        tokenizer=tokenizer if tokenizer is not None else processor,
        splits=splits, dataset_config_name=dataset_config_name, dataset_path=dataset_path, text_column=text_column,
        num_calibration_samples=num_calibration_samples, max_seq_length=max_seq_length,
        shuffle_calibration_samples=shuffle_calibration_samples, concatenate_data=concatenate_data,
        separator=separator, preprocessing_func=preprocessing_func,
        preprocessing_num_workers=preprocessing_num_workers, streaming=streaming,
        output_dir=None if output_dir is None else Path(output_dir).expanduser(), stage=stage,
        save_compressed=save_compressed, dtype=dtype, attn_implementation=attn_implementation,
        format=format,
        device=device, max_memory=max_memory, batch_size=batch_size,
        min_expert_tokens=min_expert_tokens, propagate=propagate, seed=seed, verify=verify, resume=resume, fresh=fresh,
        trust_remote_code_model=trust_remote_code_model, trust_remote_code_data=trust_remote_code_data,
        trust_pickle=trust_pickle, prompts=(prompts,) if isinstance(prompts, str) else tuple(prompts),
        progress=choose_progress(progress),
    )  # fmt: skip
    return run(arguments)


def run(args: Arguments) -> Any:
    """What `oneshot`, `train` and `apply` do."""
    from bitpress import journal, samples
    from bitpress.report import write_report
    from bitpress.result import SavedModel, attach
    from bitpress.stages import ONE_ANEW, check_earlier, run_stages

    started = time.perf_counter()
    ranks.join(args.device)
    if not ranks.first():
        args = replace(args, progress=Progress())
    ready = prepare_together(args)
    identity = _identity(args, ready)
    ranks.same([identity, [len(p.sites) for p in ready.plans]], "run to do")
    for note in (*ready.plan.notes, *(ready.data.notes if ready.data else ())):
        args.progress.note(note)
    place = ready.output
    if place is not None and args.training.overwrite and ranks.from_first(lambda: not journal.same(place, identity)):
        args = replace(args, fresh=True)
    streamed, before = ready.subject.streamed, list[str]()
    remedy = ONE_ANEW if args.verb == "apply" else ""
    try:
        if args.verb == "apply":
            check_earlier(args, ready, identity)
        if place is not None and ranks.from_first(
            lambda: journal.prepare(place, identity, fresh=args.fresh, resume=args.resume, remedy=remedy)
        ):
            args.progress.note(f"{place}: complete already, nothing to do")
            if not streamed:
                return _loaded_into(args, ready)
            _sample(args, ready, place)
            return SavedModel(place)
        if args.prompts and not streamed:
            before = samples.told(ready.subject.model, ready.tokenizer, args.prompts)
        with working_on(ready.device):
            done = run_stages(args, ready, identity, started)
        if args.verb == "apply" and args.stage is None and not ready.subject.streamed:
            return _loaded_into(args, ready)  # stages may have been finished before
    finally:
        ready.subject.close()
    if args.verb == "apply" and args.stage is not None:
        return SavedModel(args.output_dir / ready.recipe.stage(args.stage).name)  # type: ignore[operator]  # checked
    if streamed:
        assert place is not None
        _sample(args, ready, place)
        return SavedModel(place)
    report = done.report
    if args.prompts:
        after = samples.told(ready.subject.model, ready.tokenizer, args.prompts)
        report = {**report, "generations": samples.section(args.prompts, before, after, IN_MEMORY)}
        if place is not None and ranks.first():
            write_report(place, report, samples.recipe_of(place))
    return attach(ready.subject.model, done.plan, done.solved, done.caches, done.recipe.to_yaml(), report)


def _sample(args: Arguments, ready: Prepared, place: Path) -> None:
    """Answers of a streamed model and of its checkpoint, for the report."""
    from bitpress import samples

    if not args.prompts or not ranks.first():
        return
    why = samples.add(
        place, args.model, args.prompts, tokenizer=ready.tokenizer, device=str(ready.device),
        trust_remote_code=args.trust_remote_code_model, trust_pickle=args.trust_pickle,
    )  # fmt: skip
    if why:
        args.progress.note(why)


def _loaded_into(args: Arguments, ready: Prepared) -> Any:
    """A finished output read back into the module that was passed."""
    import json

    from bitpress.checkpoint import Source
    from bitpress.plan import settle, whole
    from bitpress.reading import load_into
    from bitpress.subject import ModuleSubject

    assert ready.output is not None and isinstance(ready.subject, ModuleSubject)
    plan = ready.plan
    if ready.plans[-1].target is not None:
        report = json.loads((ready.output / "report.json").read_text(encoding="utf-8"))
        last = replace(ready.plans[-1], profiles=())  # of no matter for how weights are stored
        last = settle(last, ready.subject, report["size_target"]["picks"], (), compressed=args.save_compressed)
        plan = whole([*ready.plans[:-1], last])
    source, solved = Source(ready.output), {s.key for s in plan.sites}
    for key, disk in ready.subject.layout.disk_of.items():
        if key not in solved:  # smoothing changes norms and the like
            ready.subject.assign({key: source.read([disk])[disk]})
    return load_into(ready.subject, plan, ready.output)


def _identity(args: Arguments, ready: Prepared) -> dict[str, Any]:
    """What makes two runs the same run."""
    from bitpress.recipe import fingerprint
    from bitpress.report import versions

    trains = any(p.trains for p in ready.plans)
    return {
        "recipe": fingerprint(ready.recipe),
        "model": ready.subject.fingerprint(),
        "data": ready.data.summary["fingerprint"] if ready.data else None,
        "arguments": {
            "save_compressed": args.save_compressed,
            "format": args.format,
            "min_expert_tokens": args.min_expert_tokens,
            "batch_size": args.batch_size,
            "max_memory": args.limit,
            "propagate": args.propagates,
            "seed": args.seed,
            "stage": None if args.verb == "apply" else args.stage,
            "dtype": args.dtype,
            "attn_implementation": args.attn_implementation,
        },
        **({"training": {**args.training.identity(), **ready.training_data}} if trains else {}),
        "versions": versions(),
    }
