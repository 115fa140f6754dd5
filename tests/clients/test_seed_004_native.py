"""The snippets of a guide to quantization that are transformers' own, and what bitpress says of their results.

BITPRESS_BENCH_ENVS=.cache/bench-envs python -m pytest -m client tests/clients     # after bash bench/envs.sh

They are skipped without that variable. GPTQ runs in the environment `gptqmodel` there, which compiles for some minutes
the first time.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from bitpress import PlanError, inspect_checkpoint, oneshot
from conftest import build, token_rows
from helpers import logits, make_tokenizer
from snippets import blocks

ENVIRONMENTS = os.environ.get("BITPRESS_BENCH_ENVS")
pytestmark = [pytest.mark.client, pytest.mark.skipif(not ENVIRONMENTS, reason="BITPRESS_BENCH_ENVS is not set")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "model"
    build("llama", torch.bfloat16, hidden_size=128, intermediate_size=256).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


WALKTHROUGH = Path(__file__).parents[2] / "docs/howto/walkthrough.md"


def snippet(word, base):
    """The block of the walk-through in which a word stands, with names on this machine."""
    (text,) = [t for language, t in blocks(WALKTHROUGH) if language == "py" and word in t]
    texts = [" ".join(f"w{(7 * i + j) % 90}" for j in range(60)) for i in range(16)]
    return text.replace('"meta-llama/Meta-Llama-3-8B-Instruct"', repr(str(base))).replace('"c4"', repr(texts))


def refused(folder, out):
    """bitpress does not quantize what is quantized."""
    with pytest.raises(PlanError, match=r"is quantized already .*start from the full-precision model"):
        oneshot(folder, token_rows(), scheme="W4A16", output_dir=out)


def test_nf4(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    # fmt: off
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bnb_config = BitsAndBytesConfig(
       load_in_4bit=True,
       bnb_4bit_quant_type="nf4",
       bnb_4bit_compute_dtype=torch.bfloat16,
       bnb_4bit_use_double_quant=True,
       bnb_4bit_quant_storage=torch.bfloat16,
    )

    model = AutoModelForCausalLM.from_pretrained(
       base,
       quantization_config=bnb_config,
    )
    # fmt: on
    model.save_pretrained(tmp_path / "nf4")
    original = logits(AutoModelForCausalLM.from_pretrained(base, dtype="auto")).float()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")  # with no configuration given
    assert torch.allclose(logits(again), logits(model), rtol=0.02, atol=0.02)
    assert not torch.allclose(logits(again).float(), original, rtol=0.02, atol=0.02)
    assert "bitsandbytes" in str(inspect_checkpoint(tmp_path / "nf4"))
    refused(tmp_path / "nf4", tmp_path / "out")


def test_nf4_of_the_walkthrough(base):
    pytest.importorskip("bitsandbytes")
    scope = {}
    exec(snippet("BitsAndBytesConfig", base), scope)
    assert scope["model"].config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert torch.isfinite(logits(scope["model"])).all()


def test_gptq_of_the_walkthrough(base):
    python = Path(ENVIRONMENTS or "") / "gptqmodel/bin/python"
    if not python.is_file():
        pytest.skip(f"{python}: is not there")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"GPTQMODEL_CPU_WORKERS": "2"}
    code = snippet("GPTQConfig", base) + "\nprint(type(model.model.layers[0].mlp.up_proj).__name__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] != "Linear"


def test_gptq(base, tmp_path):
    python = Path(ENVIRONMENTS or "") / "gptqmodel/bin/python"
    if not python.is_file():
        pytest.skip(f"{python}: is not there")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"GPTQMODEL_CPU_WORKERS": "2"}
    script = Path(__file__).with_name("native_gptq.py")
    done = subprocess.run([python, script, base, tmp_path / "gptq"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads([line for line in done.stdout.splitlines() if line.startswith('{"finite"')][-1])
    assert said["finite"] and said["linear"] != "Linear"
    found = str(inspect_checkpoint(tmp_path / "gptq"))
    assert "gptq" in found.lower()
    refused(tmp_path / "gptq", tmp_path / "out")
