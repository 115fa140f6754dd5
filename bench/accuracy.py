"""Compares the accuracy of bitpress with its peers at the same bits and on the same tokens.

python bench/accuracy.py RESULTS --data DIR --quality SCRIPT [--models smollm2 docs] [--folder docs=DIR ...]
    [--schemes w4-sym ...] [--tools bitpress llmcompressor ...] [--seeds 0 1] [--samples 128] [--length 512]
    [--work DIR] [--redo] [--keep]
python bench/accuracy.py RESULTS --data DIR --paired 3 --tools bitpress llmcompressor ...
python bench/accuracy.py RESULTS --table

Each run is a fresh process in the environment of its tool (bench/envs.sh) and appends one JSON line to RESULTS. A run
that has its line already is left out, so that a table can be put together from runs made at different times. With
--paired N the tools alternate N times, nothing is judged, and the ratios of their CPU seconds to the first tool's are
printed. --table prints RESULTS as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from common import SCHEMES

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
ENVS = Path(os.environ.get("BITPRESS_BENCH_ENVS", ROOT / ".cache" / "bench-envs"))
# Spinning OpenMP threads collapse when another process takes a core; all tools get the same setting.
QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

GROUPED = ("w4-sym", "w4-asym", "w3-sym", "w2-asym")


@dataclass(frozen=True)
class Tool:
    """How a tool is run.

    Args:
        title: its name in the table.
        environment: the folder in ENVS; None: the interpreter that runs this script.
        script: in bench/.
        schemes: the arguments by scheme; a scheme that is missing is one that the tool does not make.
    """

    title: str
    environment: str | None
    script: str
    schemes: Mapping[str, tuple[str, ...]]


def _bitpress(title: str, *options: str) -> Tool:
    schemes = {
        **dict.fromkeys(GROUPED, options),
        "w8a8": ("--method", "smoothquant-gptq", *options),
        "2of4": ("--method", "sparsegpt", *options),
        "2of4-w4": ("--method", "sparsegpt-gptq", *options),
    }
    return Tool(title, None, "run_bitpress.py", schemes)


def _same(*options: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(GROUPED, options)


TOOLS = {
    "bitpress": _bitpress("bitpress, default"),
    "bitpress-fast": _bitpress("bitpress `fast`", "--effort", "fast"),
    "bitpress-balanced": _bitpress("**bitpress `balanced`**", "--effort", "balanced"),
    "bitpress-best": _bitpress("**bitpress `best`**", "--effort", "best"),
    "llmcompressor": Tool(
        "llm-compressor",
        "llmcompressor",
        "peer_llmcompressor.py",
        {
            **_same("--method", "gptq"),
            "w8a8": ("--method", "smoothquant-gptq"),
            "2of4": ("--method", "sparsegpt"),
            "2of4-w4": ("--method", "sparsegpt-gptq"),
        },
    ),
    "llmcompressor-mse": Tool(
        "llm-compressor, mse observer",
        "llmcompressor",
        "peer_llmcompressor.py",
        {**_same("--method", "gptq", "--observer", "mse"), "w8a8": ("--method", "gptq", "--observer", "mse")},
    ),
    "llmcompressor-awq": Tool(
        "llm-compressor, AWQ", "llmcompressor", "peer_llmcompressor.py", _same("--method", "awq")
    ),
    "autoround": Tool("AutoRound, 200 steps", "autoround", "peer_autoround.py", _same()),
    "autoround-50": Tool("AutoRound, 50 steps", "autoround", "peer_autoround.py", _same("--iters", "50")),
    "gptqmodel": Tool("GPTQModel", "gptqmodel", "peer_gptqmodel.py", _same()),
}


@dataclass(frozen=True)
class Model:
    """A model and its texts, named by their files in --data.

    Args:
        title: its name above the table.
        calibration: the text that is calibrated on.
        judged: the texts that are judged on, none of them calibrated on; the first is the model's own field.
    """

    title: str
    calibration: str
    judged: tuple[str, ...]


MODELS = {
    "smollm2": Model("SmolLM2-135M-Instruct", "wikitext2-valid.txt", ("wikitext2-test.txt", "gsm8k-test.jsonl")),
    "docs": Model("docs-qwen3-16m", "docs-calib.txt", ("docs-eval.txt", "wikitext2-test.txt")),
}


@dataclass(frozen=True)
class Run:
    """One line of the results."""

    model: str
    scheme: str
    tool: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.scheme}-{self.tool}-{self.seed}"


@dataclass
class Results:
    """The file of JSON lines; a later line of the same run replaces an earlier one."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.strip()]

    def append(self, line: dict[str, Any]) -> None:
        """Raises SystemExit if another tool was given other tokens for the same model, seed and sizes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        same = ("model", "seed", "samples", "length")
        for other in self.lines:
            if all(other[key] == line[key] for key in same) and other["tokens_sha256"] != line["tokens_sha256"]:
                sys.exit(
                    f"{line['name']} and {other['name']} were given different calibration tokens: "
                    "do their tokenizers or texts differ?"
                )
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def has(self, run: Run, samples: int, length: int) -> bool:
        return any(
            line["name"] == run.name and (line["samples"], line["length"]) == (samples, length)
            for line in self.lines
            if line.get("judged")
        )


def json_lines(command: list[str], log: Path) -> list[dict[str, Any]]:
    """The JSON lines that a fresh process prints; its other output goes to the log.

    Raises:
        RuntimeError: it failed, or printed none.
    """
    with log.open("w") as errors:
        done = subprocess.run(command, env=os.environ | QUIET, stdout=subprocess.PIPE, stderr=errors, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)}\nfailed with {done.returncode}, see {log}:\n{log.read_text()[-2000:]}")
    return lines


def interpreter(tool: Tool) -> str:
    if tool.environment is None:
        return sys.executable
    found = ENVS / tool.environment / "bin" / "python"
    if not found.exists():
        sys.exit(f"{found}: missing; run bench/envs.sh")
    return str(found)


def commit() -> str:
    """The commit of the working tree, with "+" if it has changes; "unknown" in a copy without its history."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def compress(run: Run, folder: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the tool and returns its line."""
    tool, model = TOOLS[run.tool], MODELS[run.model]
    shutil.rmtree(out, ignore_errors=True)
    command = [interpreter(tool), str(BENCH / tool.script), str(folder), str(out)]
    command += ["--text", str(args.data / model.calibration), "--samples", str(args.samples)]
    command += ["--length", str(args.length), "--seed", str(run.seed), "--group-size", str(args.group_size)]
    command += ["--scheme", run.scheme, *tool.schemes[run.scheme]]
    line = json_lines(command, out.with_suffix(".log"))[-1]
    if tool.environment is None:
        line["commit"] = commit()
    return {"name": run.name, "run": run.tool, "model": run.model, **line}


def judge(run: Run, folder: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures by text, and for a pruned model how much of its mask it kept."""
    figures: dict[str, Any] = {"judged": {}}
    for text in MODELS[run.model].judged:
        command = [sys.executable, str(args.quality), str(folder), str(out), "--text", str(args.data / text)]
        found = json_lines(command, out.with_suffix(".quality.log"))[-1]
        figures["judged"][text] = {key: found[key] for key in ("base_ppl", "ppl", "kl", "top1")}
    if SCHEMES[run.scheme].sparse:
        figures |= json_lines([sys.executable, str(BENCH / "mask.py"), str(out)], out.with_suffix(".mask.log"))[-1]
    return figures


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs asked for; a tool that does not make a scheme has none."""
    return [
        Run(model, scheme, tool, seed)
        for model in args.models
        for scheme in args.schemes
        for seed in args.seeds
        for tool in args.tools
        if scheme in TOOLS[tool].schemes
    ]


def model_folders(args: argparse.Namespace) -> dict[str, Path]:
    folders = dict(pair.split("=", 1) for pair in args.folder)
    if unknown := set(folders) - set(MODELS):
        sys.exit(f"--folder {', '.join(sorted(unknown))}: unknown; models: {', '.join(MODELS)}")
    found = {name: Path(path) for name, path in folders.items()}
    if "smollm2" in args.models and "smollm2" not in found:
        from bitpress.demo_model import obtain

        found["smollm2"] = obtain(ROOT / ".cache" / "smollm2-135m-instruct")
    for name in args.models:
        if name not in found:
            sys.exit(f"--folder {name}=DIR: missing")
    return found


def run_all(args: argparse.Namespace, results: Results) -> int:
    """Runs what has no line yet. Returns how many runs failed."""
    folders, failures = model_folders(args), 0
    for run in plan(args):
        if results.has(run, args.samples, args.length) and not args.redo:
            print(f"{run.name}: has its line", flush=True)
            continue
        out, folder = args.work / run.name, folders[run.model]
        try:
            line = compress(run, folder, out, args) | judge(run, folder, out, args)
        except RuntimeError as error:
            failures += 1
            print(f"{run.name}: {error}", file=sys.stderr, flush=True)
            continue
        results.append(line)
        print(json.dumps(line), flush=True)
        if not args.keep:
            shutil.rmtree(out)
    return failures


def run_paired(args: argparse.Namespace, results: Results) -> int:
    """Alternates the tools and prints the ratios of CPU seconds to those of the first tool."""
    folders = model_folders(args)
    print("| model | scheme | tool | CPU s | ratio to the first, median | single ratios |\n|---|---|---|---|---|---|")
    for model in args.models:
        for scheme in args.schemes:
            tools = [tool for tool in args.tools if scheme in TOOLS[tool].schemes]
            seconds: dict[str, list[float]] = {tool: [] for tool in tools}
            for pair in range(args.paired):
                for tool in tools:
                    run = Run(model, scheme, tool, args.seeds[0])
                    try:
                        line = compress(run, folders[model], args.work / f"{run.name}-paired", args)
                    except RuntimeError as error:
                        print(error, file=sys.stderr)
                        return 1
                    results.append({**line, "pair": pair})
                    seconds[tool].append(line["quantize_cpu_s"])
            for tool in tools:
                ratios = [b / a for a, b in zip(seconds[tools[0]], seconds[tool], strict=True)]
                single = " ".join(f"{ratio:.2f}" for ratio in ratios)
                cells = (MODELS[model].title, SCHEMES[scheme].title, TOOLS[tool].title)
                numbers = (f"{median(seconds[tool]):.0f}", f"{median(ratios):.2f}", single)
                print(f"| {' | '.join((*cells, *numbers))} |", flush=True)
    return 0


def middle(values: Iterable[float], digits: int) -> str:
    """The median, and in brackets the single values if there are several."""
    found = list(values)
    single = f" ({', '.join(f'{value:.{digits}f}' for value in found)})" if len(found) > 1 else ""
    return f"{median(found):.{digits}f}{single}"


def row(lines: list[dict[str, Any]], texts: tuple[str, ...], timed: bool) -> list[str]:
    """The cells of one tool and scheme; `lines` are its seeds, `timed`: whether some tool ran on the CPU."""
    cells = []
    for text in texts:
        judged = [line["judged"][text] for line in lines]
        ppl, top1 = (median(j[key] for j in judged) for key in ("ppl", "top1"))
        cells += [middle((j["kl"] for j in judged), 4), f"{ppl:.2f}", f"{top1:.3f}"]
    on_cpu = [line for line in lines if line["device"] == "cpu"]
    for key in ("quantize_cpu_s", "peak_rss_mb") if timed else ():
        cells.append(f"{median(line[key] for line in on_cpu):.0f}" if on_cpu else "on a GPU")
    kept = [line["kept_2of4"] for line in lines if "kept_2of4" in line]
    return [*cells, f"{median(line['size_mb'] for line in lines):.1f}", f"{min(kept):.4f}" if kept else ""]


def table(results: Results) -> str:
    """The results as Markdown, one table a model; the last line of each run counts."""
    last = {line["name"]: line for line in results.lines if line.get("judged")}
    parts = []
    for name, model in MODELS.items():
        mine = [line for line in last.values() if line["model"] == name]
        if not mine:
            continue
        sizes = sorted({f"{line['samples']} x {line['length']}" for line in mine})
        base = {text: line["judged"][text]["base_ppl"] for line in mine for text in model.judged}
        parts.append(
            f"{model.title}, {' and '.join(sizes)} tokens of {model.calibration}; perplexity of the base: "
            + ", ".join(f"{text} {base[text]:.2f}" for text in model.judged)
        )
        heads = [head for text in model.judged for head in (f"KL, {text}", "ppl", "top-1")]
        timed = any(line["device"] == "cpu" for line in mine)
        heads = ["scheme", "tool", "seeds", *heads, *(("CPU s", "peak RSS, MB") if timed else ())]
        heads += ["weights, MB", "2:4 kept"]
        rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for scheme, what in SCHEMES.items():
            for tool, how in TOOLS.items():
                lines = [line for line in mine if (line["scheme"], line["run"]) == (scheme, tool)]
                if lines:
                    lines.sort(key=lambda line: int(line["seed"]))
                    group = lines[0]["group_size"]
                    title = f"{what.title} g{group}" if group else what.title
                    seeds = ", ".join(str(line["seed"]) for line in lines)
                    rows.append("| " + " | ".join([title, how.title, seeds, *row(lines, model.judged, timed)]) + " |")
        parts.append("\n".join(rows))
    versions = sorted({f"{line['tool']} {line['version']}" for line in last.values()})
    return "\n\n".join([*parts, f"Versions: {', '.join(versions)}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--data", type=Path, help="folder of the texts")
    parser.add_argument("--quality", type=Path, help="SCRIPT BASE CHECKPOINT --text FILE prints a JSON line")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--folder", nargs="+", default=[], metavar="MODEL=DIR")
    parser.add_argument("--schemes", nargs="+", choices=tuple(SCHEMES), default=list(SCHEMES))
    tools = ["bitpress-balanced", "bitpress-best", "llmcompressor", "llmcompressor-awq", "autoround", "gptqmodel"]
    parser.add_argument("--tools", nargs="+", choices=tuple(TOOLS), default=tools)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "accuracy")
    parser.add_argument("--redo", action="store_true", help="run again what has its line")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in --work")
    parser.add_argument("--paired", type=int, metavar="N")
    args = parser.parse_args()
    results = Results(args.results)
    if args.table:
        print(table(results))
        return
    if args.data is None:
        parser.error("--data is needed")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.paired:
        sys.exit(run_paired(args, results))
    if args.quality is None or not args.quality.is_file():
        parser.error("--quality is needed: a script that judges")
    if failures := run_all(args, results):
        sys.exit(f"{failures} runs failed")


if __name__ == "__main__":
    main()
