"""Real clients load what is written and say what bitpress's own loader says. Opt-in: each needs its environment.

    bash bench/envs.sh
    BITPRESS_BENCH_ENVS=.cache/bench-envs python -m pytest -m client tests/clients

A client whose environment is not there is skipped, with the reason.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bitpress import convert, oneshot

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"
ENVS = os.environ.get("BITPRESS_BENCH_ENVS")
VLLM = {"VLLM_CPU_INT4_W4A8": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
MODIFIERS = {"NF4": "BitsAndBytesModifier"}
IDS = torch.randint(3, 1000, (48,), generator=torch.Generator().manual_seed(0)).tolist()

pytestmark = pytest.mark.client


def python_of(name):
    """The interpreter of a client's environment; "own" is this one."""
    if name in (None, "own"):
        return sys.executable
    if ENVS is None:
        pytest.skip("BITPRESS_BENCH_ENVS does not name the folder of the clients' environments (bash bench/envs.sh)")
    python = Path(ENVS) / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python}: not there (bash bench/envs.sh)")
    return str(python)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama that is large enough for every client's kernels, with a tokenizer of byte pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("client")
    config = AutoConfig.for_model(
        "llama", vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, 1022)}
    vocab |= {"t": 1022, "3": 1023}  # llama.cpp wants a pair that merges
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "3")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(folder)
    return folder


def client_scores():
    spec = importlib.util.spec_from_file_location("client_scores", BENCH / "client_scores.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scores(client, environment, folder, tmp_path, dtype):
    """What bench/client_scores.py says of a folder: in a process of an environment, or (None) in this one."""
    if environment is None:
        return client_scores().CLIENTS[client](str(folder), IDS, dtype)
    ids, target = tmp_path / "ids.json", tmp_path / f"{client}.json"
    ids.write_text(json.dumps(IDS))
    variables = os.environ | VLLM | {"HF_HUB_OFFLINE": "1"}
    variables.pop("PYTHONPATH", None)
    script = str(BENCH / "client_scores.py")
    command = [python_of(environment), script, client, str(folder), str(ids), str(target), dtype, "{}"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, errors="replace")
    if "has no attribute 'cpu_gemm_wna16'" in done.stderr:
        pytest.skip("vLLM's CPU build has its kernel of packed integers for processors with AVX-512 only")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(target.read_text())


@pytest.mark.parametrize(
    ("client", "environment", "scheme", "stored", "room"),
    [
        ("transformers", "own", "W4A16", "compressed-tensors", 0.001),
        ("transformers", None, "W4A16 signed", "compressed-tensors", 0.001),
        ("transformers", None, "NF4", "bitsandbytes", 0.02),
        ("transformers", "gptqmodel", "W4A16", "gptq", 0.05),
        ("transformers", "gptqmodel", "W4A16 signed", "gptq", 0.05),
        ("transformers", "gptqmodel", "W4A16_ASYM", "gptq", 0.05),
        ("transformers", "gptqmodel", "W2A16_ASYM", "gptq", 0.05),
        ("transformers", "gptqmodel", "W3A16", "gptq", 0.05),
        ("transformers", "gptqmodel", "W8A16", "gptq_v2", 0.05),
        ("transformers", "gptqmodel", "W4A16_ASYM", "awq", 0.05),
        ("vllm", "vllm", "W4A16", "compressed-tensors", 0.05),
        ("transformers", None, "W4A16 head", "compressed-tensors", 0.001),
        ("vllm", "vllm", "W8A8 head", "compressed-tensors", 0.1),
        ("vllm", "vllm", "W4A16 head", "compressed-tensors", 0.05),
        ("vllm", "vllm", "W4A16 signed", "compressed-tensors", 0.05),
        ("vllm", "vllm", "W4A16", "gptq", 0.05),
        ("vllm", "vllm", "W4A16 signed", "gptq", 0.05),
        ("vllm", "vllm", "W4A16_ASYM", "awq", 0.05),
        ("llamacpp", "llamacpp", "W4A16", "gguf", 0.1),
        ("llamacpp", "llamacpp", "W4A16 signed", "gguf", 0.1),
        ("llamacpp", "llamacpp", "W4A16_ASYM", "gguf", 0.1),
        ("llamacpp", "llamacpp", "W8A16", "gguf", 0.1),
    ],
)
def test_a_client_says_what_bitpress_says(base, tmp_path, client, environment, scheme, stored, room):
    python_of(environment)
    keys = {} if scheme == "NF4" else {"scheme": scheme.split()[0]}
    if "A16" in scheme:
        keys["group_size"] = 64
    if scheme.endswith("signed"):  # scales that are searched may be negative
        keys["observer"] = "mse"
    if scheme != "NF4" and not scheme.endswith("head"):
        keys["ignore"] = ["lm_head"]
    recipe = {"quant_stage": {"quant_modifiers": {MODIFIERS.get(scheme, "QuantizationModifier"): keys}}}
    folder = oneshot(base, None, recipe, output_dir=tmp_path / "out", format=stored).folder
    dtype = "float32" if environment in (None, "own") else "bfloat16"
    theirs = scores(client, environment, folder, tmp_path, dtype)
    ours = scores("bitpress", None, folder, tmp_path, dtype)
    pairs = list(zip(theirs["nll"], ours["nll"], strict=False))
    assert len(pairs) >= 40
    assert abs(sum(a - b for a, b in pairs)) / len(pairs) <= room
    assert max(abs(a - b) for a, b in pairs) <= 10 * room


def test_the_harness_reads_a_local_task(base, tmp_path):
    python = python_of("lmeval")
    folder = oneshot(base, None, scheme="W4A16", group_size=64, method="rtn", output_dir=tmp_path / "out").folder
    (tmp_path / "text.txt").write_text("t5 t9 t11 t40\nt8 t7 t700\n")
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: text\ndataset_kwargs: {data_files: " + str(tmp_path / "text.txt") + "}\n"
        "test_split: train\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )  # fmt: skip
    source = str(BENCH.parent / "src")
    command = [python, "-m", "bitpress", "lm-eval", str(folder), "--tasks", "tiny", "--include_path", str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bits_per_byte" in done.stdout and "add_bos_token=False" in done.stderr


def test_a_converted_checkpoint_in_llama_cpp(base, tmp_path):
    python_of("llamacpp")
    packed = oneshot(base, None, scheme="W4A16", group_size=64, method="rtn", output_dir=tmp_path / "packed").folder
    folder = convert(packed, tmp_path / "out", format="gguf").folder
    theirs, ours = (
        scores(c, e, folder, tmp_path, "float32") for c, e in (("llamacpp", "llamacpp"), ("bitpress", None))
    )
    gaps = [abs(a - b) for a, b in zip(theirs["nll"], ours["nll"], strict=False)]
    assert sum(gaps) / len(gaps) <= 0.1
