"""Measures the staged recipe: 2:4 by SparseGPT, fine-tuning with a teacher, int4; what each stage loses and wins back.

python bench/staged.py OUT --data DIR --quality SCRIPT [--model DIR] [--epochs 8] [--rate 1e-4] [--hidden 0]
    [--batch 8] [--length 512] [--samples 128] [--group-size 64] [--device auto] [--rows N] [--windows 8] [--no-int4]
python bench/staged.py OUT --table
python bench/staged.py OUT --cost [--model DIR] [--batch 8] [--length 512] [--steps 50] [--device auto]

The first form runs `bitpress apply` in fresh processes on WikiText-2's validation text (--train): the first stage once,
the others once for each combination of --epochs, --rate and --hidden, which take several values. Every checkpoint is
judged on texts that it was not trained on (--judged) and its 2:4 counted, while the next one is trained. Each figure
is a line of OUT/staged.jsonl as soon as it is known, and the same command goes on where it was cut off. --table prints
what is there as Markdown. The last form times a training step with and without the mask, alternating: the median ratio
and the quartiles of the single ones, kept in OUT/cost.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

from accuracy import BENCH, QUIET, ROOT, commit, json_lines

PRUNED, TRAINED, ROUNDED = "sparsity_stage", "finetuning_stage", "quantization_stage"
TITLES = {
    PRUNED: "2:4 by SparseGPT",
    TRAINED: "fine-tuned, taught by the dense model",
    ROUNDED: "int4, GPTQ",
}
JUDGES = 2  # at a time, beside the run
WRITING = Lock()


def recipe(group_size: int) -> dict[str, Any]:
    """The recipe of the three stages."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    pruning = {"sparsity": 0.5, "mask_structure": "2:4", "ignore": ["re:.*lm_head"]}
    return {
        PRUNED: {"sparsity_modifiers": {"SparseGPTModifier": pruning}},
        TRAINED: {"finetuning_modifiers": {"ConstantPruningModifier": {"targets": ["re:.*_proj.weight"]}}},
        ROUNDED: {"quantization_modifiers": {"GPTQModifier": {"ignore": ["lm_head"], "config_groups": groups}}},
    }


def model_folder(args: argparse.Namespace) -> Path:
    """The model that was named, else SmolLM2-135M-Instruct."""
    if args.model is not None:
        return Path(args.model)
    from bitpress.demo_model import obtain

    return obtain(ROOT / ".cache" / "smollm2-135m-instruct")


def run(model: Path, stages: Sequence[str], out: Path, args: argparse.Namespace, *more: str) -> float:
    """Some stages of the recipe; returns wall seconds. Killed and started again, it goes on where it was."""
    written = args.out / f"{out.name}.json"
    written.write_text(json.dumps({name: recipe(args.group_size)[name] for name in stages}))
    command = [
        sys.executable, "-m", "bitpress", "apply", str(model), "--recipe", str(written), "--output", str(out),
        "--dataset", str(args.data / args.train), "--num-samples", str(args.samples), "--max-seq-length",
        str(args.length), "--device", args.device, "--no-generate", *more,
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | QUIET)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nfailed with {done.returncode}")
    return time.perf_counter() - start


def train(model: Path, pruned: Path, name: str, how: dict[str, float], args: argparse.Namespace) -> float:
    """The stages after the first, with one choice of options."""
    more = [
        "--epochs", str(how["epochs"]), "--learning-rate", str(how["rate"]), "--train-batch-size", str(args.batch),
        "--distill-teacher", str(model), "--distill-hidden", str(how["hidden"]), "--set", "warmup_ratio=0.1",
        "--set", "lr_scheduler_type=cosine", *(["--bf16"] if args.bf16 else []),
        *(["--max-train-samples", str(args.rows)] if args.rows else []),
    ]  # fmt: skip
    if not args.int4:
        more += ["--stage", TRAINED]
    return run(pruned, [TRAINED, ROUNDED], args.out / name, args, *more)


def keep(line: dict[str, Any], args: argparse.Namespace) -> None:
    """Add a line to the results."""
    with WRITING, (args.out / "staged.jsonl").open("a") as file:
        file.write(json.dumps({**line, "commit": commit()}) + "\n")
        file.flush()


def kept(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines that are there; one that was cut short is left out."""
    found = []
    file = args.out / "staged.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def judge(model: Path, folder: Path, name: str, stage: str, args: argparse.Namespace) -> None:
    """The lines of a checkpoint that are not there yet: 2:4, and each text."""
    there = {line.get("text") for line in kept(args) if (line["try"], line["stage"]) == (name, stage)}
    one = {"try": name, "stage": stage}
    few = ["env", f"OMP_NUM_THREADS={max(1, (os.cpu_count() or 1) // (JUDGES + 1))}", sys.executable]
    log = args.out / f"{name}.{stage}.log"
    if None not in there:
        report = json.loads((folder / "report.json").read_text())
        counted = json_lines([*few, str(BENCH / "mask.py"), str(folder)], log)[-1]
        keep({**one, **counted, "seconds": report["totals"]["seconds"]}, args)
    for text in args.judged:
        if text in there:
            continue
        command = [*few, str(args.quality), str(model), str(folder), "--text", str(args.data / text)]
        found = json_lines([*command, "--windows", str(args.windows)], log)[-1]
        keep({**one, "text": text, **{key: found[key] for key in ("base_ppl", "ppl", "kl", "top1")}}, args)


def measure(model: Path, args: argparse.Namespace) -> list[str]:
    """Runs and judges everything; returns what failed, which does not keep the others from running."""
    args.out.mkdir(parents=True, exist_ok=True)
    pruned, failed = args.out / "pruned" / PRUNED, []
    judging: list[Future[None]] = []
    with ThreadPoolExecutor(JUDGES) as judges:
        run(model, [PRUNED], args.out / "pruned", args)
        judging.append(judges.submit(judge, model, pruned, "pruned", PRUNED, args))
        for epochs, rate, hidden in product(args.epochs, args.rate, args.hidden):
            how = {"epochs": epochs, "rate": rate, "hidden": hidden}
            name = "-".join(f"{key}-{value:g}" for key, value in how.items())
            try:
                seconds = train(model, pruned, name, how, args)
            except RuntimeError as error:
                failed.append(str(error))
                continue
            trained = json.loads((args.out / name / TRAINED / "report.json").read_text())["training"]
            facts = {"steps": trained["steps"], "metrics": trained["metrics"], "wall_seconds": round(seconds, 1)}
            if (name, "run") not in {(line["try"], line["stage"]) for line in kept(args)}:
                keep({"try": name, "stage": "run", **how, "batch": args.batch, "length": args.length, **facts}, args)
            for stage in (TRAINED, ROUNDED)[: 1 + args.int4]:
                judging.append(judges.submit(judge, model, args.out / name / stage, name, stage, args))
    return failed + [str(one.exception()) for one in judging if one.exception() is not None]


def table(lines: list[dict[str, Any]]) -> str:
    """The checkpoints as Markdown, and how much of the KL that pruning opened training closed."""
    by = {(line["try"], line["stage"], line.get("text")): line for line in lines}
    texts = list(dict.fromkeys(line["text"] for line in lines if "text" in line))
    heads = [head for text in texts for head in (f"ppl, {text}", "KL", "top-1")]
    rows = ["| after | training | " + " | ".join([*heads, "2:4 kept, worst layer"]) + " |"]
    rows.append("|" + "---|" * (len(heads) + 3))
    bases = {line["text"]: line["base_ppl"] for line in lines if "text" in line}
    dense = [cell for text in texts for cell in (f"{bases[text]:.2f}", "0", "1")]
    rows.append("| " + " | ".join(["(dense)", "", *dense, ""]) + " |")
    closed = []
    for name, stage in dict.fromkeys((line["try"], line["stage"]) for line in lines if line["stage"] in TITLES):
        cells = [TITLES[stage], "" if stage == PRUNED else name]
        for text in texts:
            one, pruned = by.get((name, stage, text)), by.get(("pruned", PRUNED, text))
            cells += ["", "", ""] if one is None else [f"{one['ppl']:.2f}", f"{one['kl']:.4f}", f"{one['top1']:.3f}"]
            if one is not None and pruned is not None and stage == TRAINED:
                share = 1 - one["kl"] / pruned["kl"]
                closed.append(f"{name}, {text}: training closed {share:.1%} of the KL that pruning had opened")
        counted = by.get((name, stage, None))
        rows.append("| " + " | ".join([*cells, "" if counted is None else f"{counted['worst_2of4']:.4f}"]) + " |")
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
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "cost.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result))


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "runs" / "staged")
    parser.add_argument("--cost", action="store_true", help="time the mask")
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    parser.add_argument("--model", help="folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="folder of the texts")
    parser.add_argument("--quality", type=Path, help="SCRIPT BASE CHECKPOINT --text FILE --windows N: a JSON line")
    parser.add_argument("--train", default="wikitext2-valid.txt", help="text to calibrate and train on")
    parser.add_argument("--judged", nargs="+", default=["wikitext2-test.txt", "gsm8k-test.jsonl"])
    parser.add_argument("--epochs", type=float, nargs="+", default=[8.0])
    parser.add_argument("--rate", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rows", type=int, help="rows to train on at most")
    parser.add_argument("--hidden", type=float, nargs="+", default=[0.0], help="weight of the teacher's hidden states")
    parser.add_argument("--int4", action=argparse.BooleanOptionalAction, default=True, help="the last stage")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50, help="with --cost: pairs of steps")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 products")
    args = parser.parse_args()
    if args.cost:
        cost(args)
        return
    if args.table:
        print(table(kept(args)))
        return
    if args.data is None or args.quality is None or not args.quality.is_file():
        parser.error("--data and --quality are needed: the texts, and a script that judges")
    failed = measure(model_folder(args), args)
    print(table(kept(args)))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
