"""Model types whose blocks can be run one at a time by handing their input through; others are checked when met."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from bitpress.errors import PlanError
from bitpress.subject import Subject

# each is checked by the tests on a tiny copy, bit for bit
VERIFIED = (
    "falcon", "gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "mixtral", "opt", "phi3", "qwen2", "qwen3",
    "qwen3_moe",
)  # fmt: skip

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sliding_window": 16,
    "num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 24, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12,
}  # fmt: skip
# lists with a value for each layer, whose pattern a copy of fewer layers keeps
PER_LAYER = ("layer_types", "no_rope_layers")


def check_blocks(subject: Subject, *, trust_remote_code: bool = False) -> None:
    """For a model type that is not listed: run a tiny random copy whole and block by block, and compare.

    Raises:
        PlanError: the outputs differ, or no tiny copy can be made.
    """
    kind = subject.config.model_type
    if kind in VERIFIED:
        return
    remedy = "bitpress cannot run its blocks one at a time; it is not supported yet"
    try:
        model = tiny_copy(subject.config, trust_remote_code=trust_remote_code)
        off = mismatch(model)
    except Exception as error:  # whatever the architecture does not like about a tiny configuration
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlanError(
            f"model type '{kind}' is not on the list of checked ones, and a tiny copy fails: {first}"
        ) from error
    if off > 0:
        raise PlanError(f"model type '{kind}': a tiny copy run block by block differs by {off:.2g}: {remedy}")


def tiny_copy(config: Any, *, layers: int = 4, trust_remote_code: bool = False) -> Any:
    """A model of the same architecture with random weights and small sizes, float32, on the CPU."""
    from transformers import AutoModelForCausalLM

    small = deepcopy(config)
    text = small.get_text_config() if hasattr(small, "get_text_config") else small
    for name, value in SMALL.items():
        if getattr(text, name, None) is not None and not _computed(text, name):
            setattr(text, name, value)
    if getattr(text, "num_kv_heads", None) is not None:  # Falcon: grouped in its newer form only
        text.num_kv_heads = 2 if text.new_decoder_architecture else text.num_attention_heads
    if getattr(text, "kv_lora_rank", None) is not None:  # latent attention has no grouped heads
        text.num_key_value_heads = text.num_attention_heads
    for name in PER_LAYER:
        if (given := getattr(text, name, None)) and not _computed(text, name):
            setattr(text, name, (list(given) * layers)[:layers])
    text.num_hidden_layers = layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(small, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()


def _computed(config: Any, name: str) -> bool:
    """Whether an attribute follows from others and cannot be set."""
    attribute = getattr(type(config), name, None)
    return isinstance(attribute, property) and attribute.fset is None


@torch.no_grad()
def mismatch(model: Any, length: int = 24) -> float:
    """Largest difference between the hidden states of a whole forward and those handed from block to block."""
    from bitpress.blocks import Blocks

    blocks = Blocks(model)
    ids = (
        torch.arange(3, 3 + 2 * length).remainder(model.config.get_text_config().vocab_size - 3).reshape(2, length) + 3
    )
    seen: list[torch.Tensor] = []
    last = blocks.modules[-1]
    handle = last.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    hidden = None
    for index in range(len(blocks)):
        hidden = blocks.run(index, (ids, hidden))
    assert hidden is not None
    return float((hidden - seen[0]).abs().max())
