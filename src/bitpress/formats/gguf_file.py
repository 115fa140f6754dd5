"""The GGUF file of a model: names, metadata and tensors in llama.cpp's words, written tensor by tensor."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.checkpoint import read_header, read_tensors, sync
from bitpress.errors import CheckpointError, NumericsError
from bitpress.formats.gguf_vocab import add_vocabulary, vocabulary_fault

# model_type -> llama.cpp's architecture, and whether it turns neighbouring pairs of a head, not its halves
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
}  # fmt: skip
ROPES = ("default", "linear", "llama3", "yarn")
KINDS = {"q4_0": 2, "q4_1": 3, "q8_0": 7}  # types of linears, and how llama.cpp numbers files that are mostly of one
HALF = 1
UNUSED = "rotary_emb.inv_freq"  # in old checkpoints


@dataclass(frozen=True)
class Part:
    """One tensor: where it lies, what it is called in GGUF, its type there, and heads whose rows are reordered."""

    file: Path
    name: str
    short: str
    kind: str | None
    shape: tuple[int, ...]
    heads: int | None


def model_faults(config: Any, folder: Path | None) -> list[str]:
    """Why a model cannot go into a GGUF file."""
    if importlib.util.find_spec("gguf") is None:
        return ["needs the gguf package: pip install 'bitpress[gguf]'"]
    if config.model_type not in ARCHITECTURES:
        return [f"'{config.model_type}' is not written, only {', '.join(ARCHITECTURES)}; llama.cpp's own converter may"]
    found = []
    rope = config.rope_parameters["rope_type"]
    if rope not in ROPES:
        found.append(f"rope_type '{rope}' is not written, only {', '.join(ROPES)}")
    if getattr(config, "use_sliding_window", False):
        found.append("a sliding window (use_sliding_window) is not written")
    if folder is None:
        found.append("is written from a model folder, with its tokenizer; save the model, and give its folder")
    elif (fault := vocabulary_fault(folder)) is not None:
        found.append(fault)
    return found


def assemble(target: Path, folder: Path, files: Sequence[Path], config: Any) -> None:
    """Write the file from finished shards and the tokenizer in `folder`; at most one tensor is in memory.

    Raises:
        CheckpointError: llama.cpp has no name for a tensor, or the tokenizer cannot be written.
        NumericsError: a weight that float16 cannot hold.
    """
    import gguf
    import numpy as np

    arch, turned = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    parts = _parts(files, config, names, turned)
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, arch)
    kinds = Counter(p.kind for p in parts if p.kind)
    _metadata(writer, config, KINDS[kinds.most_common(1)[0][0]] if kinds else HALF)
    add_vocabulary(writer, folder, config)
    for part in parts:
        if part.kind:
            raw = gguf.GGMLQuantizationType[part.kind.upper()]
            writer.add_tensor_info(part.short, part.shape, np.dtype(np.uint8), math.prod(part.shape), raw)
        else:
            kind = np.dtype(np.float16 if len(part.shape) > 1 else np.float32)
            writer.add_tensor_info(part.short, part.shape, kind, math.prod(part.shape) * kind.itemsize)
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part in parts:
        tensor = read_tensors([(part.name, part.file)])[part.name]
        tensor = tensor if part.kind else _plain(part.name, tensor)
        writer.write_tensor_data((tensor if part.heads is None else interleaved(tensor, part.heads)).numpy())
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    writer.close()
    sync(partial)
    partial.rename(target)
    sync(folder)


def _parts(files: Sequence[Path], config: Any, names: Any, turned: bool) -> list[Part]:
    parts = []
    for file in files:
        for name, entry in read_header(file)[1].items():
            if name == "__metadata__" or name.endswith(UNUSED):
                continue
            kind = next((k for k in KINDS if name.endswith(f".{k}")), None)
            plain = name.removesuffix(f".{kind}") + ".weight" if kind else name
            short = names.get_name(plain, try_suffixes=(".weight", ".bias"))
            if short is None:
                raise CheckpointError(f"{name}: llama.cpp has no name for it, so a GGUF file cannot hold it")
            heads = heads_of(plain, config) if turned else None
            parts.append(Part(file, name, short, kind, tuple(entry["shape"]), heads))
    return parts


def heads_of(name: str, config: Any) -> int | None:
    """The number of heads that a tensor's rows make up, None if they turn nothing."""
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a projection whose heads turn in halves, in the order in which neighbouring pairs turn."""
    rows = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape).contiguous()


def _plain(name: str, tensor: Tensor) -> Tensor:
    """Matrices in float16, vectors in float32."""
    if tensor.dim() < 2:
        return tensor.float()
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise NumericsError(f"{name}: a weight is beyond float16, in which GGUF stores it")
    return half


def _metadata(writer: Any, config: Any, file_type: int) -> None:
    import gguf

    heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // heads
    rope = config.rope_parameters
    writer.add_name(Path(str(getattr(config, "_name_or_path", "") or config.model_type)).name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        kind = gguf.RopeScalingType.LINEAR if rope["rope_type"] == "linear" else gguf.RopeScalingType.YARN
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(before))
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def rope_factors(config: Any) -> Tensor | None:
    """By what llama.cpp divides the frequencies of Llama 3.1's stretched positions; None for others."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high, factor = (float(rope[k]) for k in ("low_freq_factor", "high_freq_factor", "factor"))
    before = float(rope["original_max_position_embeddings"])
    frequencies = float(rope["rope_theta"]) ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    waves = 2 * math.pi / frequencies
    smooth = ((before / waves - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors
