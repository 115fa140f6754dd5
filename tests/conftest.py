"""Tiny models of every supported family, and token rows to calibrate them with."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads cost more than they bring to models this small

import pytest
import torch

gc.set_threshold(50_000, 10, 10)  # what is imported is millions of objects, and a collection looks at all of them
if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Modules are imported: no collection need look at them any more."""
    gc.freeze()


VOCAB = 96
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MOE = {**COMMON, "num_experts_per_tok": 2}
# name -> (configuration class, arguments)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "llama_tied": ("LlamaConfig", {**COMMON, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**COMMON, "head_dim": 8, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {**COMMON, "head_dim": 8, "sliding_window": 16, "num_hidden_layers": 3}),
    "phi3": ("Phi3Config", COMMON),
    "opt": ("OPTConfig", {
        "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 32,
    }),
    "gpt_neox": ("GPTNeoXConfig", {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    }),
    "falcon": ("FalconConfig", {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False,
    }),
    "mixtral": ("MixtralConfig", {**MOE, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {
        **MOE, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }),
}  # fmt: skip


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny random model of a family, in evaluation mode."""
    import transformers

    name, arguments = FAMILIES[family]
    config = getattr(transformers, name)(**{**arguments, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():  # the usual initial weights are so small that outputs hardly differ
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def with_outliers(family: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A model whose norms make some channels stick out, as those of large models do."""
    model = build(family, dtype, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.shape == (32,) and "final" not in name and name.count(".") > 2:
                parameter.copy_(torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.5)
                parameter[::8] *= 6
    return model


def token_rows(count: int = 12, length: int = 32, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows with `input_ids`, which bitpress uses as they are."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (count, length), generator=generator)
    return [{"input_ids": row.tolist()} for row in ids]


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Save a model as transformers does."""
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    return token_rows()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer that has no chat template."""
    from helpers import make_tokenizer

    folder = save(build("llama"), tmp_path_factory.mktemp("tiny") / "llama")
    make_tokenizer(folder, chat=False)
    return folder


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "base"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight fails the test."""
    from bitpress import checkpoint, output

    def read(wanted: Any, *_args: Any, **_options: Any) -> dict[str, torch.Tensor]:
        assert not list(wanted), "a weight was read"
        return {}

    def load(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the model was loaded")

    for place in (checkpoint, output):
        monkeypatch.setattr(place, "read_tensors", read)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)
