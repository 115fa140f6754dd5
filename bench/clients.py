"""Compares a checkpoint in vLLM (CPU), transformers bfloat16 and transformers float32, token by token.

python bench/clients.py MODEL --text FILE [--length 512] [--vllm-dtype bfloat16]

Greedy tokens say nothing where the two best are close, so the negative log likelihood of every token of one
window is compared. bench/envs.sh makes the environment of vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVS = Path(os.environ.get("BITPRESS_BENCH_ENVS", ROOT / ".cache" / "bench-envs"))
# By default vLLM quantizes the activations of int4 models to int8 on a CPU.
VLLM = {"VLLM_CPU_INT4_W4A8": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def vllm_nll(model: str, ids: list[int], dtype: str) -> list[float]:
    """Negative log likelihood of every token but the first, in nats."""
    from vllm import LLM, SamplingParams

    client = LLM(model, dtype=dtype, max_model_len=len(ids) + 16, max_num_seqs=1, enforce_eager=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    scores = client.generate([{"prompt_token_ids": ids}], sampling)[0].prompt_logprobs
    assert scores is not None
    return [-scores[i][ids[i]].logprob for i in range(1, len(ids))]


def transformers_nll(model: str, ids: list[int], dtype: str) -> list[float]:
    """Negative log likelihood of every token but the first, in nats."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

    settings = getattr(AutoConfig.from_pretrained(model), "quantization_config", None) or {}
    options = {}
    if settings.get("quant_method") == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **options).eval()
    tokens = torch.tensor(ids)
    with torch.no_grad():
        logits = net(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
    nll: list[float] = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").tolist()
    return nll


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vllm-dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--score", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.score:
        client, dtype, source, target = args.score
        score = vllm_nll if client == "vllm" else transformers_nll
        Path(target).write_text(json.dumps(score(args.model, json.loads(Path(source).read_text()), dtype)))
        return
    if args.text is None:
        parser.error("--text is missing")
    python = {"vllm": str(ENVS / "vllm" / "bin" / "python"), "transformers": sys.executable}
    if not Path(python["vllm"]).exists():
        sys.exit(f"{python['vllm']}: missing; run bench/envs.sh")

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    environment = os.environ | VLLM | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    nll: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "ids.json"
        source.write_text(json.dumps(ids[: args.length]))
        for client, dtype in (
            ("vllm", args.vllm_dtype),
            ("transformers", "bfloat16"),
            ("transformers", "float32"),
        ):
            target, log = Path(work) / "nll.json", Path(work) / "log.txt"
            command = [
                python[client],
                __file__,
                args.model,
                "--score",
                client,
                dtype,
                str(source),
                str(target),
            ]
            with log.open("w") as output:
                done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            if done.returncode:
                sys.exit(f"{client} {dtype} failed with {done.returncode}:\n{log.read_text()[-3000:]}")
            nll[f"{client} {dtype}"] = json.loads(target.read_text())
    for name, values in nll.items():
        print(f"{name:22} mean NLL {sum(values) / len(values):.4f} over {len(values)} tokens")
    for a, b in combinations(nll, 2):
        gaps = [abs(x - y) for x, y in zip(nll[a], nll[b], strict=True)]
        print(f"{a} - {b}: largest difference {max(gaps):.4f}, mean {sum(gaps) / len(gaps):.4f}")


if __name__ == "__main__":
    main()
