"""transformers' Trainer with a teacher, perplexity in its logs, and bitpress's display in place of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from bitpress.data.training import NO_LABEL
from bitpress.errors import NumericsError
from bitpress.math.distill import hidden_loss, token_loss
from bitpress.progress import Progress
from bitpress.training.arguments import Training

LARGEST = 700.0  # exp of more is infinite


class StageTrainer(Trainer):  # type: ignore[misc]
    """Trains on labels, on a teacher's predictions, or on both.

    Args:
        how: hardness, temperature and the weight of hidden states.
        teacher: a model in evaluation mode; None: none.
        given: what Trainer takes.
    """

    def __init__(self, how: Training, teacher: nn.Module | None, **given: Any) -> None:
        super().__init__(**given)
        self.how, self.teacher = how, teacher
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        if teacher is not None:
            teacher.to(self.args.device).eval().requires_grad_(False)
            self.model_accepts_loss_kwargs = True  # the loss is divided by the labels of a whole step, as theirs is
            self._seen = torch.zeros(3, dtype=torch.float64)  # cross entropy, KL and labels since the last log

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch; while evaluating, cross entropy."""
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        how = self.how
        labels: Tensor = inputs["labels"]
        given = {k: v for k, v in inputs.items() if k != "labels"}
        given |= {"use_cache": False, "output_hidden_states": bool(how.distill_hidden)}
        outputs = model(**given)
        with torch.no_grad():
            taught = self.teacher(**given)
        sums = token_loss(
            outputs.logits, labels, taught.logits, temperature=how.distill_temperature, hardness=how.distill_hardness
        )
        count = (labels[:, 1:] != NO_LABEL).sum()
        self._seen = self._seen.to(labels.device) + torch.stack([sums.ce, sums.kl, count]).double()
        if not model.training:
            loss = sums.ce / count.clamp(min=1)
            return (loss, outputs) if return_outputs else loss
        loss = sums.loss / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if how.distill_hidden:
            far = hidden_loss(outputs.hidden_states[1:], taught.hidden_states[1:], given.get("attention_mask"))
            loss = loss + how.distill_hidden * far / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **given: Any) -> dict[str, float]:
        """As Trainer's, with perplexity and, if there is a teacher, KL."""
        if self.teacher is None:
            return super().evaluate(*args, **given)  # type: ignore[no-any-return]
        training, self._seen = self._seen, torch.zeros_like(self._seen)
        try:
            return super().evaluate(*args, **given)  # type: ignore[no-any-return]
        finally:
            self._seen = training

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds perplexity, and with a teacher cross entropy and KL, in nats per label.

        Raises:
            NumericsError: gradients are not numbers, and so no weight is one any more.
        """
        if math.isnan(float(logs.get("grad_norm", 0.0))) and not self.args.fp16:  # whose scaler skips such steps
            raise NumericsError(
                f"training diverged: gradients are not numbers any more, seen after step {self.state.global_step}; "
                "lower learning_rate, warm up (warmup_ratio), or take precision='float32'"
            )
        for prefix in ("", "eval_"):
            if f"{prefix}loss" not in logs:
                continue
            entropy = logs[f"{prefix}loss"]
            if self.teacher is not None:
                ce, kl, count = self.accelerator.reduce(self._seen.clone(), reduction="sum").tolist()
                if count:
                    entropy = ce / count
                    logs |= {f"{prefix}ce": round(entropy, 4), f"{prefix}kl": round(kl / count, 5)}
                self._seen.zero_()
            logs[f"{prefix}perplexity"] = round(math.exp(min(entropy, LARGEST)), 4)
        super().log(logs, start_time)


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Says where training is."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        logs = given.get("logs") or {}
        names = ("loss", "ce", "kl", "perplexity", "eval_loss", "eval_ce", "eval_kl", "eval_perplexity")
        said = ", ".join(f"{name} {logs[name]:.4g}" for name in names if name in logs)
        if "eval_loss" in logs:
            self.progress.note(f"evaluated after step {state.global_step}: {said.replace('eval_', '')}")
        elif said:
            self.progress.at(max(state.global_step - 1, 0), said)
