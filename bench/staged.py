"""Measures the staged recipe: 2:4 by SparseGPT, fine-tuning with a teacher, int4; what each stage loses and wins back.

python bench/staged.py OUT --data DIR --quality SCRIPT [--model DIR] [--epochs 8] [--rate 1e-4] [--batch 8]
    [--length 512] [--samples 128] [--group-size 64] [--device auto] [--rows N] [--windows 8]
python bench/staged.py --cost [--model DIR] [--batch 8] [--length 512] [--steps 20] [--device auto]

The first form runs `bitpress apply` in a fresh process on WikiText-2's validation text (--train), judges the
checkpoint of every stage on texts that it was not trained on (--judged), counts 2:4, and prints Markdown; one JSON
line a stage goes to OUT/staged.jsonl. The second times a training step with and without the mask, alternating, and
prints the median ratio and the quartiles of the single ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from accuracy import BENCH, QUIET, ROOT, commit, json_lines

STAGES = ("sparsity_stage", "finetuning_stage", "quantization_stage")
TITLES = {
    "sparsity_stage": "2:4 by SparseGPT",
    "finetuning_stage": "fine-tuned, taught by the dense model",
    "quantization_stage": "int4, GPTQ",
}


def recipe(group_size: int) -> dict[str, Any]:
    """The recipe of the three stages."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    pruning = {"sparsity": 0.5, "mask_structure": "2:4", "ignore": ["re:.*lm_head"]}
    return {
        "sparsity_stage": {"sparsity_modifiers": {"SparseGPTModifier": pruning}},
        "finetuning_stage": {"finetuning_modifiers": {"ConstantPruningModifier": {"targets": ["re:.*_proj.weight"]}}},
        "quantization_stage": {
            "quantization_modifiers": {"GPTQModifier": {"ignore": ["lm_head"], "config_groups": groups}}
        },
    }


def model_folder(args: argparse.Namespace) -> Path:
    """The model that was named, else SmolLM2-135M-Instruct."""
    if args.model is not None:
        return Path(args.model)
    from bitpress.demo_model import obtain

    return obtain(ROOT / ".cache" / "smollm2-135m-instruct")


def run(model: Path, args: argparse.Namespace) -> float:
    """All stages; returns wall seconds. Killed and started again, it goes on where it was."""
    args.out.mkdir(parents=True, exist_ok=True)
    written = args.out / "recipe.json"
    written.write_text(json.dumps(recipe(args.group_size)))
    command = [
        sys.executable, "-m", "bitpress", "apply", str(model), "--recipe", str(written), "--output",
        str(args.out / "run"), "--dataset", str(args.data / args.train), "--num-samples", str(args.samples),
        "--max-seq-length", str(args.length), "--device", args.device, "--epochs", str(args.epochs),
        "--learning-rate", str(args.rate), "--train-batch-size", str(args.batch), "--distill-teacher", "self",
        "--distill-hidden", str(args.hidden), "--set", "warmup_ratio=0.1", "--set", "lr_scheduler_type=cosine",
        *(["--bf16"] if args.bf16 else []), *(["--max-train-samples", str(args.rows)] if args.rows else []),
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | QUIET)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with {done.returncode}")
    return time.perf_counter() - start


def judge(model: Path, stage: str, args: argparse.Namespace) -> dict[str, Any]:
    """The line of a stage."""
    folder = args.out / "run" / stage
    report = json.loads((folder / "report.json").read_text())
    line: dict[str, Any] = {"stage": stage, "seconds": report["totals"]["seconds"], "judged": {}}
    for text in args.judged:
        command = [sys.executable, str(args.quality), str(model), str(folder), "--text", str(args.data / text)]
        command += ["--windows", str(args.windows)]
        found = json_lines(command, args.out / f"{stage}.quality.log")[-1]
        line["judged"][text] = {key: found[key] for key in ("base_ppl", "ppl", "kl", "top1")}
    line |= json_lines([sys.executable, str(BENCH / "mask.py"), str(folder)], args.out / f"{stage}.mask.log")[-1]
    return line


def table(lines: list[dict[str, Any]], judged: list[str]) -> str:
    """The stages as Markdown, and how much of the KL that pruning opened training closed."""
    heads = [head for text in judged for head in (f"ppl, {text}", "KL", "top-1")]
    rows = ["| after | " + " | ".join([*heads, "2:4 kept, worst layer"]) + " |", "|" + "---|" * (len(heads) + 2)]
    dense = [cell for text in judged for cell in (f"{lines[0]['judged'][text]['base_ppl']:.2f}", "0", "1")]
    rows.append("| " + " | ".join(["(dense)", *dense, ""]) + " |")
    for line in lines:
        cells = []
        for text in judged:
            one = line["judged"][text]
            cells += [f"{one['ppl']:.2f}", f"{one['kl']:.4f}", f"{one['top1']:.3f}"]
        rows.append("| " + " | ".join([TITLES[line["stage"]], *cells, f"{line['worst_2of4']:.4f}"]) + " |")
    closed = []
    for text in judged:
        before, after = (line["judged"][text]["kl"] for line in lines[:2])
        closed.append(f"{text}: training closed {1 - after / before:.1%} of the KL that pruning had opened")
    return "\n".join([*rows, "", *closed])


def cost(args: argparse.Namespace) -> None:
    """A training step with the mask and without, by turns, on the same batch."""
    import torch
    from transformers import AutoModelForCausalLM

    from bitpress import oneshot
    from bitpress.training.callback import keep_zeros

    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device)
    device = torch.device("cpu") if args.device == "auto" and device.type != "cuda" else device
    model = AutoModelForCausalLM.from_pretrained(model_folder(args), dtype=torch.float32)
    oneshot(model, None, {"MagnitudePruningModifier": {"mask_structure": "2:4", "ignore": ["lm_head"]}}, device="cpu")
    model.to(device).train()
    masks = keep_zeros(model, {"ConstantPruningModifier": {"targets": "__ALL__", "ignore": "lm_head"}}).masks
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(5, 1000, (args.batch, args.length), device=device)
    # bfloat16 products, as they are used on a GPU: the step is shortest then, and the mask's share largest
    products = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)

    def step(masked: bool) -> float:
        if masked:
            masks.attach(model, optimizer)
        _wait(device)
        start = time.perf_counter()
        with products:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if masked:
            masks.cut()
        optimizer.zero_grad()
        _wait(device)
        seconds = time.perf_counter() - start
        masks.detach()
        return seconds

    for masked in (False, True):
        step(masked)
    ratios, plain = [], []
    for i in range(args.steps):
        order = (False, True) if i % 2 else (True, False)
        times = {masked: step(masked) for masked in order}
        ratios.append(times[True] / times[False])
        plain.append(times[False])
    low, middle, high = statistics.quantiles(ratios, n=4)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    result = {
        "device": name, "batch": args.batch, "length": args.length, "bf16": args.bf16, "steps": args.steps,
        "step_seconds": round(statistics.median(plain), 4), "mask_costs": f"{middle - 1:+.2%}",
        "quartiles": f"{low - 1:+.2%} .. {high - 1:+.2%}", "commit": commit(),
    }  # fmt: skip
    print(json.dumps(result))


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "runs" / "staged")
    parser.add_argument("--cost", action="store_true", help="time the mask")
    parser.add_argument("--model", help="folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="folder of the texts")
    parser.add_argument("--quality", type=Path, help="SCRIPT BASE CHECKPOINT --text FILE --windows N: a JSON line")
    parser.add_argument("--train", default="wikitext2-valid.txt", help="text to calibrate and train on")
    parser.add_argument("--judged", nargs="+", default=["wikitext2-test.txt", "gsm8k-test.jsonl"])
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rows", type=int, help="rows to train on at most")
    parser.add_argument("--hidden", type=float, default=0.0, help="weight of the teacher's hidden states")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="with --cost: pairs of steps")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 products")
    args = parser.parse_args()
    if args.cost:
        cost(args)
        return
    if args.data is None or args.quality is None or not args.quality.is_file():
        parser.error("--data and --quality are needed: the texts, and a script that judges")
    model = model_folder(args)
    seconds = run(model, args)
    lines = [judge(model, stage, args) for stage in STAGES]
    with (args.out / "staged.jsonl").open("a") as file:
        for line in lines:
            how = {key: getattr(args, key) for key in ("epochs", "rate", "batch", "length", "samples", "bf16")}
            file.write(json.dumps({**line, **how, "wall_seconds": round(seconds, 1), "commit": commit()}) + "\n")
    print(table(lines, args.judged))


if __name__ == "__main__":
    main()
