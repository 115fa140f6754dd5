"""The table `[generation]`, held against the arguments of generation that transformers has."""

from __future__ import annotations

import re
from typing import Any, Literal

from bitpress.configs.check import Checker
from bitpress.data.local import cause_of

WHOLE = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "top_k", "max_cache_len",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "pad_token_id", "bos_token_id",
    "num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size",
)  # fmt: skip
NUMBERS = (
    "max_time", "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "encoder_repetition_penalty", "length_penalty", "guidance_scale",
    "assistant_confidence_threshold", "assistant_ensemble_weight",
)  # fmt: skip
SWITCHES = (
    "do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "token_healing", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "disable_compile",
)  # fmt: skip
# types of the arguments, which transformers says in prose only; those that are not here are left to it
KINDS: dict[str, Any] = {
    **dict.fromkeys(WHOLE, int | None),
    **dict.fromkeys(NUMBERS, float | None),
    **dict.fromkeys(SWITCHES, bool | None),
    **dict.fromkeys(("eos_token_id", "decoder_start_token_id", "forced_eos_token_id"), int | list[int] | None),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), list[int] | None),
    "stop_strings": str | list[str] | None, "early_stopping": bool | Literal["never"] | None,
    "bad_words_ids": list[list[int]] | None, "cache_implementation": str | None,
    "watermarking_config": dict[str, Any] | None, "cache_config": dict[str, Any] | None,
}  # fmt: skip


def checked(checker: Checker, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of generation as they were given; every fault is noted at its key."""
    if not given:
        return {}
    from transformers import GenerationConfig

    known = {key: KINDS.get(key, Any) for key in GenerationConfig().to_dict()}
    rest = checker.keys(known, given, ("generation",)) or {}
    while rest:  # one refused value hides the others: what is refused is left out and the rest asked again
        try:
            GenerationConfig(**rest).validate(strict=True)
            break
        except (ValueError, TypeError, AttributeError) as error:
            told = re.findall(r"^- `(\w+)`: (.*)", str(error), re.MULTILINE)  # several are told one a line
            told = told or [(key, str(error).splitlines()[0]) for key in rest if f"`{key}`" in str(error)][:1]
            wrong = set(given) - set(rest)
            for key, text in told:
                if not any(f"`{other}`" in text for other in wrong):  # that one is noted, and this may go with it
                    checker.fault(("generation", key), text)
            if not told:
                checker.fault(("generation",), cause_of(error))
            left = {key: value for key, value in rest.items() if key not in dict(told)}
            rest = left if len(left) < len(rest) else {}
    return given
