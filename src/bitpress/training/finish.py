"""What a training stage leaves: the model put together again, its linears as they are stored, the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitpress import formats, ranks
from bitpress.checkpoint import write_json
from bitpress.errors import CheckpointError, ConfigError, NumericsError, PlanError
from bitpress.experts import unfuse
from bitpress.formats.sparse24 import TWO_OF_FOUR
from bitpress.journal import Journal
from bitpress.math.grid import Solved
from bitpress.math.masks import holds, name_of
from bitpress.modifiers.quantization import QuantizationModifier
from bitpress.output import Output
from bitpress.report import LayerReport
from bitpress.sites import Site, bits_per_weight, label
from bitpress.subject import ModuleSubject, Subject

if TYPE_CHECKING:
    from bitpress.oneshot import Arguments
    from bitpress.plan import Plan
    from bitpress.prepare import Prepared
    from bitpress.stages import Done
    from bitpress.training.masks import Masks
    from bitpress.training.rounding import Roundings
    from bitpress.training.trainer import StageTrainer

STATE = "trainer_state.json"  # what Trainer writes last into a checkpoint


def convert(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters other dtypes, in place."""
    for name, parameter in model.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])


def check_finite(model: nn.Module) -> None:
    """NumericsError if training has made weights that are no numbers."""
    lost = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise NumericsError(
            f"{lost[0]}{more}: has NaN or infinity after training; lower learning_rate, or warm up (warmup_ratio)"
        )


def packs(args: Arguments, ready: Prepared, i: int) -> bool:
    """Whether stage `i` writes what the run's format says; else dense weights, for the next one."""
    return args.save_compressed and i == len(ready.plans) - 1


def check_format(model: nn.Module, plan: Plan, masks: Masks | None) -> None:
    """PlanError, before anything is trained, if weights are to be stored by their 2:4 masks and have none."""
    if not formats.CHECKPOINTS[plan.stored].sparse:
        return
    weights = dict(model.named_parameters())
    found = {site.name: weights[site.key].detach() for site in plan.sites}
    if masks is not None:
        parts = [p for p in masks.parts if p.name not in {*found, *masks.dense}]
        found |= {p.name: (~p.of(masks.pruned[p.parameter])).float() for p in parts}
    odd = [name for name, weight in found.items() if not holds(weight, TWO_OF_FOUR)]
    if odd or not found:
        what = f"{odd[0]} and {len(odd) - 1} more: not 2:4" if odd else "no linear is known to be pruned 2:4"
        raise PlanError(
            f"{what}, so {plan.stored} cannot hold them: prune to 2:4 first (ConstantPruningModifier keeps it), or use "
            "another format"
        )


def is_sharded(trainer: StageTrainer) -> bool:
    """Whether no process has the whole model."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def gathered(
    trainer: StageTrainer,
    args: Arguments,
    subject: Subject,
    plan: Plan,
    dtypes: Mapping[str, torch.dtype],
    wide: torch.dtype,
) -> tuple[Any, Roundings]:
    """A model that was sharded, whole and on the CPU, with its rounding; of use in the first process alone.

    Args:
        dtypes, wide: of its parameters as stored, and while training.
    """
    from bitpress.prepare import whole_model
    from bitpress.training.rounding import Roundings

    state: dict[str, Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if isinstance(subject, ModuleSubject):
        raise ConfigError("a module in memory cannot be put together again after sharded training: give its folder")
    whole = whole_model(args, subject)
    convert(whole, {name: wide for name, dtype in dtypes.items() if dtype == subject.dtype})
    roundings = Roundings(whole, plan.sites)
    if ranks.first():
        missing, unexpected = whole.load_state_dict(state, strict=False)
        tied = set(getattr(whole, "_tied_weights_keys", None) or ())
        if left := [n for n in (*missing, *unexpected) if n not in tied]:
            raise CheckpointError(f"{left[0]} (and {len(left) - 1} more): did not come back from sharded training")
        whole.tie_weights()
    return whole, roundings


class _Trained(ModuleSubject):
    """A trained model that is written as the folder it came from: the same names, the same files beside it."""

    def __init__(self, model: nn.Module, source: Subject) -> None:
        super().__init__(model)
        self.layout, self.folder, self._source = source.layout, source.folder, source
        self.turned = source.turned

    def extra(self) -> dict[str, Tensor]:
        return self._source.extra()


def written_from(model: Any, subject: Subject) -> Subject:
    """What is written: the module itself, or the folder's model in its place."""
    model.to("cpu" if not isinstance(subject, ModuleSubject) else subject.home)
    model.eval()
    if not isinstance(subject, ModuleSubject):
        return _Trained(model, subject)
    subject.experts = unfuse(model)
    return subject


def solved(
    plan: Plan, target: Subject, shares: Mapping[str, float], quantized: Mapping[str, Solved]
) -> list[tuple[Site, Solved]]:
    """The linears that a stage is about, as they are stored: those that round, then those whose zeros were kept."""
    found = [(site, quantized[site.name]) for site in plan.sites]
    kept = [site for site in plan.masked if site.name in shares and site.name not in quantized]
    weights = target.stored(site.key for site in kept)
    nothing = torch.tensor(float("nan"))
    return found + [(site, Solved(None, None, nothing, weight=weights[site.key])) for site in kept]


def row(site: Site, z: Solved, masked: bool, seconds: float) -> dict[str, Any]:
    """A linear's row in the report."""
    weight = z.dense()
    zeros = float((weight == 0).float().mean())
    methods = ["masked"] if masked else []
    modifier = site.steps[0].modifier if site.steps else None
    if isinstance(modifier, QuantizationModifier):
        methods.append("lsq" if modifier.learn_scales else "qat")
    return LayerReport(
        name=site.name, method="+".join(methods), scheme=label(site.group),
        rel_error=0.0 if z.codes is None else float(z.error), error_of="weight", bits_per_weight=bits_per_weight(site),
        sparsity=zeros, mask=name_of(weight) if masked else "", tokens=0, policy="", seconds=seconds,
    ).to_dict()  # fmt: skip


def training_report(trainer: StageTrainer, result: Any, ready: Prepared) -> dict[str, Any]:
    """What report.json says of the training."""
    sets = ready.training
    assert sets is not None
    return {
        "steps": trainer.state.global_step,
        "metrics": result.metrics,
        "data": dict(sets.train.summary),
        "evaluation_data": None if sets.evaluation is None else dict(sets.evaluation.summary),
        "log": trainer.state.log_history,
    }


def write(
    args: Arguments,
    ready: Prepared,
    i: int,
    target: Subject,
    place: Path,
    log: Journal,
    solved: list[tuple[Site, Solved]],
    rows: list[dict[str, Any]],
    done: Done,
    trainer: StageTrainer,
) -> None:
    """The checkpoint, with what Trainer leaves beside one."""
    plan, last = ready.plans[i], i == len(ready.plans) - 1
    total = len(target.blocks) + 1
    output = Output(place, log, total, compressed=packs(args, ready, i), verify=args.verify)
    plan = replace(plan, masked=tuple(site for site, _ in solved if site in plan.masked))  # those that had zeros
    for shard in range(total):
        keys = target.keys(None if shard == total - 1 else target.blocks.prefix(shard))
        here = [(site, z) for site, z in solved if site.key in set(keys)]
        names = {site.name for site, _ in here}
        output.write(shard, target, keys, here, [r for r in rows if r["name"] in names], last=shard == total - 1)
    history = trainer.state.log_history
    trained = [entry for entry in history if "train_runtime" in entry]
    evaluated = [entry for entry in history if "eval_loss" in entry]
    trainer.state.save_to_json(str(place / STATE))
    write_json(place / "train_results.json", trained[-1] if trained else {})
    if evaluated:
        write_json(place / "eval_results.json", evaluated[-1])
    text = done.recipe if last else replace(ready.recipe, stages=(done.recipe.stages[i],))
    output.finish(target, plan, text.to_yaml(), done.report, ready.tokenizer)
