"""Client x format x scheme: what loads, with which kernel, and whether it says what bitpress's own loader says.

python bench/clients.py MODEL --text FILE [--work DIR] [--cases w4-sym:gptq ...] [--clients vllm ...] [--dtype float32]

Makes checkpoints of MODEL (rounded to nearest, groups of 64; "signed": scales are searched, some are negative), scores
one window of FILE in each client that its format is for, and prints a Markdown table: mean negative log likelihood in
nats per token beside that of bitpress's own loader on the same tokens, the largest difference of a token, and whether
24 greedy tokens are equal (where the two best are close, rounding decides them: read the differences).
lm-evaluation-harness tells only a sum, of the tokens after the first 32 or so. `python bench/clients.py CHECKPOINT ...
--as-is` scores finished ones. `--vllm-options JSON` goes to vllm.LLM. bench/envs.sh makes the clients' environments; a
client without one is left out, and the table says so. A case may name any preset: FP8_BLOCK:compressed-tensors;
those with static scales of inputs want a text, --calibration FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVS = Path(os.environ.get("BITPRESS_BENCH_ENVS", HERE.parent / ".cache" / "bench-envs"))
# By default vLLM quantizes the activations of int4 models to int8 on a CPU.
VLLM = {"VLLM_CPU_INT4_W4A8": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# client -> environment (None: this one), name in client_scores.py, methods that it is for
CLIENTS: dict[str, tuple[str | None, str, tuple[str, ...]]] = {
    "transformers": (None, "transformers", ("dense", "compressed-tensors", "bitsandbytes")),
    "transformers + gptqmodel": ("gptqmodel", "transformers", ("gptq", "awq")),
    "vLLM": ("vllm", "vllm", ("dense", "compressed-tensors", "gptq", "awq")),
    "llama.cpp": ("llamacpp", "llamacpp", ("gguf",)),
    "lm-eval, hf": ("lmeval", "lm_eval", ("dense", "compressed-tensors", "bitsandbytes")),
    "lm-eval, vllm": ("lmevalvllm", "lm_eval_vllm", ("dense", "compressed-tensors", "gptq", "awq")),
}
# vLLM registers the operator of its packed integers where there is AVX-512
NO_KERNEL = ("has no attribute 'cpu_gemm_wna16'", "vLLM's kernel of packed integers needs a processor with AVX-512")
SCHEMES = {
    "w4-sym": "W4A16", "w4-signed": "W4A16", "w4-asym": "W4A16_ASYM", "w8-sym": "W8A16", "w3-sym": "W3A16",
    "w2-asym": "W2A16_ASYM", "w8a8": "W8A8", "fp8": "FP8_DYNAMIC", "nvfp4a16": "NVFP4A16", "nf4": "NF4",
}  # fmt: skip
GROUPED = ("w4-sym", "w4-signed", "w4-asym", "w8-sym", "w3-sym", "w2-asym")
CASES = (
    "w4-sym:dense", "w4-sym:compressed-tensors", "w4-signed:compressed-tensors", "w4-asym:compressed-tensors",
    "w8-sym:compressed-tensors", "w8a8:compressed-tensors", "fp8:compressed-tensors", "nvfp4a16:compressed-tensors",
    "w4-sym:gptq", "w4-signed:gptq", "w4-asym:gptq", "w8-sym:gptq", "w3-sym:gptq", "w2-asym:gptq", "w4-sym:gptq_v2",
    "w4-asym:awq", "nf4:bitsandbytes", "w4-sym:gguf", "w4-signed:gguf", "w4-asym:gguf", "w8-sym:gguf",
)  # fmt: skip
COLUMNS = ("client", "format", "scheme", "loads", "kernel", "NLL", "bitpress", "largest difference", "greedy equal")


def make(model: Path, case: str, work: Path, calibration: Path | None) -> Path:
    """A checkpoint of a case, made once."""
    from bitpress import oneshot

    name, _, stored = case.partition(":")
    folder = work / case.replace(":", "-")
    modifier = "BitsAndBytesModifier" if name == "nf4" else "QuantizationModifier"
    keys: dict[str, Any] = {"ignore": ["lm_head"]}
    if name != "nf4":
        keys["scheme"] = SCHEMES.get(name, name)
    if name in GROUPED:
        keys["group_size"] = 64
    if name == "w4-signed":
        keys["observer"] = "mse"
    recipe = {"quant_stage": {"quant_modifiers": {modifier: keys}}}
    oneshot(
        model, calibration, recipe, output_dir=folder, format=stored, num_calibration_samples=64, max_seq_length=256
    )
    return folder


def score(client: str, env: str | None, folder: Path, ids: Path, dtype: str, options: str = "{}") -> dict[str, Any]:
    """What client_scores.py says of a checkpoint, or `error` with the end of its log."""
    python = sys.executable if env is None else str(ENVS / env / "bin" / "python")
    environment = os.environ | VLLM | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if env is not None:
        environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as work:
        target = Path(work) / "scores.json"
        command = [python, str(HERE / "client_scores.py"), client, str(folder), str(ids), str(target), dtype, options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if NO_KERNEL[0] in done.stderr:
            return {"error": NO_KERNEL[1]}
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error" in line]
            return {"error": (errors or done.stderr.splitlines() or ["no message"])[-1].strip()[:160]}
        found: dict[str, Any] = json.loads(target.read_text())
        return found


def row(name: str, said: tuple[str, str], found: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """One line of the table."""
    if "error" in found:
        return [name, *said, f"no: {found['error']}", "", "", "", "", ""]
    if "mean" in found:
        rest = own["nll"][found["first"] - 1 :]
        return [name, *said, "yes", found["kernel"], f"{found['mean']:.4f}", f"{sum(rest) / len(rest):.4f}", "", ""]
    pairs = list(zip(found["nll"], own["nll"], strict=False))
    mean, ours = (sum(p[i] for p in pairs) / len(pairs) for i in (0, 1))
    gap = max(abs(a - b) for a, b in pairs)
    equal = "yes" if found["greedy"] == own["greedy"] else "no"
    return [name, *said, "yes", found["kernel"], f"{mean:.4f}", f"{ours:.4f}", f"{gap:.3f}", equal]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--as-is", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(".cache/clients"))
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--clients", nargs="*", default=list(CLIENTS), choices=CLIENTS)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--vllm-options", default="{}")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from bitpress import inspect_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(args.models[0])
    tokens = tokenizer(args.text.read_text(encoding="utf-8")[:100_000], add_special_tokens=False)["input_ids"]
    args.work.mkdir(parents=True, exist_ok=True)
    ids = args.work / "ids.json"
    ids.write_text(json.dumps(tokens[: args.length]))
    folders = {str(m): m for m in args.models} if args.as_is else dict.fromkeys(args.cases)
    versions: dict[str, dict[str, str]] = {}
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for case, there in folders.items():
        folder = there or make(args.models[0], case, args.work, args.calibration)
        found = inspect_checkpoint(folder)
        schemes = ", ".join(sorted({x.scheme for x in found.layers})) or "none"
        said = (found.method if found.format is None else f"{found.method} ({found.format})", schemes)
        own = score("bitpress", None, folder, ids, args.dtype)
        if "error" in own:
            print(f"| bitpress | {' | '.join(said)} | no: {own['error']} | | | | | |", flush=True)
            continue
        for client in args.clients:
            env, name, methods = CLIENTS[client]
            if found.method not in methods:
                continue
            if env is not None and not (ENVS / env / "bin" / "python").exists():
                print(f"| {client} | {' | '.join(said)} | no environment: bash bench/envs.sh | | | | | |", flush=True)
                continue
            half = args.dtype == "float32" and "vllm" in name and found.method in ("gptq", "awq")  # its only dtypes
            scores = score(name, env, folder, ids, "bfloat16" if half else args.dtype, args.vllm_options)
            versions.setdefault(client, scores.get("versions", {}))
            print(f"| {' | '.join(row(client, said, scores, own))} |", flush=True)
    for client, packages in versions.items():
        print(f"\n{client}: {', '.join(f'{name} {version}' for name, version in packages.items())}")


if __name__ == "__main__":
    main()
