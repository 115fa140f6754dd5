"""Cases that several processes run together; `tests/e2e/test_processes.py` starts them, and compares with one process.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/ranked.py FOLDER CASE...
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress import BitpressError, budget, cli, oneshot, pipeline, plan, ranks
from bitpress.blocks import Blocks
from conftest import build, token_rows
from helpers import OPTIONS, PLAIN

GPTQ = {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head", "re:.*gate$"], **PLAIN}
WHOLE = {key: value for key, value in GPTQ.items() if key not in PLAIN}
KV = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
# name -> (model, recipe, other arguments)
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "gptq": ("llama", {"GPTQModifier": WHOLE}, {}),
    "drift": ("llama", {"GPTQModifier": {**GPTQ, "correct": 0.4, "dampening_frac": 0.05}}, {"batch_size": 1}),
    "smooth": ("llama", {"SmoothQuantModifier": {"smoothing_strength": "search"},
                         "GPTQModifier": {"scheme": "W8A8", "ignore": ["lm_head"]}}, {}),
    "awq": ("llama", {"AWQModifier": {"n_grid": 5}, "GPTQModifier": {**GPTQ, "observer": "hessian"}}, {}),
    "caches": ("llama", {"QuantizationModifier": {
        "scheme": "W8A16", "group_size": 16, "ignore": GPTQ["ignore"], "kv_cache_scheme": KV}}, {}),
    "experts": ("mixtral", {"GPTQModifier": GPTQ}, {"min_expert_tokens": 90}),
    "tight": ("mixtral", {"GPTQModifier": GPTQ}, {"min_expert_tokens": 0}),
    "tune": ("llama", {"GPTQModifier": GPTQ, "TuneModifier": {"iters": 10, "batch_size": 2}}, {}),
    "size": ("llama", {"GPTQModifier": {"bits": 4.5, "ignore": ["lm_head"], **PLAIN}}, {}),
    "owl": ("llama", {"SparseGPTModifier": {"sparsity": 0.5, "sparsity_profile": "owl", "ignore": ["lm_head"]}}, {}),
    "stages": ("llama", {
        "sparsity_stage": {"sparsity_modifiers": {
            "SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4", "ignore": ["lm_head"]}}},
        "quantization_stage": {"quantization_modifiers": {"GPTQModifier": GPTQ}},
    }, {}),
}  # fmt: skip


def run(case: str, folder: Path, patch: Any) -> None:
    """One case, from the model's folder to its own."""
    family, recipe, options = CASES[case]
    if case == "tight":  # room for the Gram matrices of a few experts only
        patch.setattr(plan, "budget", lambda *a, **k: {**budget.budget(*a, **k), "gram_bytes": 3 * 4 * 64 * 64})
    oneshot(folder / family, token_rows(), recipe, output_dir=folder / case, **{**OPTIONS, **options})


def counted(patch: Any) -> list[int]:
    """Grows by the sequences that this process sends through the first block."""
    seen, real = [0], Blocks.visit

    def visit(self: Any, index: int, batch: Any, weights: Any = None) -> Any:
        seen[0] += len(batch[0]) if index == 0 else 0
        return real(self, index, batch, weights)

    patch.setattr(Blocks, "visit", visit)
    return seen


def dying(words: list[str]) -> None:
    """A command whose second process is killed in the second block."""
    real = pipeline._store

    def store(run: Any, shard: int, *args: Any) -> None:
        if shard == 1 and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real(run, shard, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_store", store)
        patch.setattr(sys, "argv", ["bitpress", *words])
        cli.main()


def in_memory(folder: Path) -> None:
    """A module in every process; all end with the same weights."""
    model = build("llama", torch.bfloat16)
    oneshot(model, token_rows(), CASES["gptq"][1], **OPTIONS)
    sums = ranks.gathered([float(p.detach().double().sum()) for p in model.parameters()])
    assert sums[0] == sums[1]
    model.save_pretrained(folder / "memory")
    ranks.barrier()


def failing(folder: Path) -> list[str]:
    """What is said of faults: of both processes, and of one."""
    said = []
    for rows, recipe in (
        (token_rows(1), CASES["gptq"][1]),
        (token_rows(), {"GPTQModifier": {**GPTQ, "group_size": 7}}),
        (token_rows(12 + int(os.environ["RANK"])), CASES["gptq"][1]),
    ):
        try:
            oneshot(folder / "llama", rows, recipe, output_dir=folder / "failing", **OPTIONS)
        except BitpressError as error:
            said.append(f"{type(error).__name__}: {error} ({error.agreed})")
    return said


if __name__ == "__main__":
    place, *cases = sys.argv[1:]
    number = os.environ["RANK"]
    torch.manual_seed(int(number))  # processes do not share it
    if cases[0] == "dying":
        dying(cases[1:])
    told: dict[str, Any] = {}
    sequences = counted(pytest.MonkeyPatch())
    for name in cases:
        before = sequences[0]
        if name == "memory":
            in_memory(Path(place))
        elif name == "failing":
            told["said"] = failing(Path(place))
        else:
            with pytest.MonkeyPatch.context() as patch:
                run(name, Path(place), patch)
            told[name] = sequences[0] - before
    Path(place, f"told-{number}.json").write_text(json.dumps(told))
