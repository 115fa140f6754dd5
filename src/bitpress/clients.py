"""What the clients of a checkpoint cannot do with it, said when the scheme is chosen.

Read in vLLM 0.23 and 0.32, transformers 5.17 to 5.24 and compressed-tensors 0.17, 0.19 and 0.20.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bitpress.experts import LEAVES
from bitpress.formats import DEFAULT
from bitpress.formats.gptq import alike_in_blocks
from bitpress.schemes import QuantArgs, Scheme
from bitpress.sites import FUSED, Site, label
from bitpress.subject import Subject

UNSERVED = "vLLM does not serve it; this loads in transformers"
ON_GPUS = "vLLM serves it on GPUs, not on CPUs"
OLDER_GPUS = f"{ON_GPUS}; on those before Blackwell it does not round the inputs"
ODD_WIDTHS = "needs compressed-tensors 0.19 or later (older ones misread these widths)"


def client_notes(
    subject: Subject, sites: Sequence[Site], caches: Sequence[QuantArgs], stored: str = DEFAULT
) -> list[str]:
    """One line for each thing that a client cannot do.

    Args:
        caches: the stage's cache schemes.
        stored: the checkpoint format.
    """
    here = processor_notes(stored, [s.scheme for s in sites if s.scheme is not None])
    if stored != DEFAULT:
        return format_notes(stored, sites) + here
    notes = here
    for group in {s.group.name: s.group for s in sites if s.group is not None}.values():
        scheme, mine = group.scheme, [s for s in sites if s.group is group]
        found = [vllm_limit(scheme), release_limit(scheme, mine)]
        if any(s.expert is not None for s in mine) and not loads_as_experts(scheme):
            what = (
                "misreads experts of this scheme"
                if misread_as_experts(scheme)
                else "cannot load experts of this scheme"
            )
            found.append(
                f"transformers {what} (it reads symmetric packed integers and fp8, such as W4A16, FP8_DYNAMIC); "
                "load it with bitpress.transformers"
            )
        if scheme.format.startswith(("nvfp4", "mxfp")):
            found.append("transformers runs it in bfloat16 only; bitpress.transformers in any dtype")
        notes += [f"{label(group)}: {text}" for text in found if text]
    for cache in dict.fromkeys(caches):
        limits = (_cache_limit(cache), _cache_in_transformers(subject, sites))
        notes += [f"kv_cache_scheme: {text}" for text in limits if text]
    notes += _newer_transformers([s.scheme for s in sites if s.scheme is not None])
    odd = {
        type(m).__name__
        for s in sites
        if s.group is not None and type(m := subject.model.get_submodule(s.module)) is not nn.Linear
    }
    if odd:
        notes.append(
            f"{', '.join(sorted(odd))}: transformers decompresses plain Linears only; use bitpress.transformers"
        )
    return notes + _mixed_experts(subject, sites) + _split_partners(subject, sites)


def format_notes(stored: str, sites: Sequence[Site]) -> list[str]:
    """What is to be known of a format other than compressed-tensors."""
    if stored == "sparse-24":
        return ["sparse-24: only bitpress.transformers reads it; for vLLM and transformers store compressed-tensors"]
    quantized = [s for s in sites if s.group is not None]
    weights = [s.scheme.weights for s in quantized if s.scheme is not None]
    if not weights:
        return []
    if stored == "dense":
        inputs = any(s.scheme is not None and s.scheme.input_activations is not None for s in quantized)
        lost = " and inputs are not rounded" if inputs else ""
        return [f"dense: weights are stored in full again: no client needs less memory for them{lost}"]
    if stored == "bitsandbytes":
        return ["bitsandbytes: transformers reads it with bitsandbytes installed; vLLM does not"]
    if stored == "gguf":
        return ["gguf: llama.cpp reads it; its kernels round activations to 8 bits"]
    notes = [f"{stored}: transformers reads it with gptqmodel installed; bitpress.transformers without"]
    if stored in ("gptq", "gptq_v2"):
        if any(not w.symmetric for w in weights):
            notes.append(f"{stored}: vLLM refuses zero points in it; use W4A16, or --format awq or compressed-tensors")
        if any(w.num_bits not in (4, 8) for w in weights):
            notes.append(f"{stored}: vLLM serves 4 and 8 bits only; the others load in transformers with gptqmodel")
        if any(w.num_bits == 8 for w in weights):
            notes.append(f"{stored}: 8 bits: {ON_GPUS}")
        if any(s.group is not None and s.group.actorder == "group" for s in quantized):
            notes.append(f"{stored}: actorder 'group': vLLM's CPU build refuses it; 'static' runs everywhere")
        several = len({str(s.scheme) for s in quantized}) > 1
        if several or alike_in_blocks(quantized) is None:
            what = "several schemes" if several else "linears quantized in some blocks only"
            notes.append(f"{stored}: {what}: gptqmodel's own loader reads this, transformers with it does not")
    odd = {w.group_size for w in weights} - {32, 64, 128, 256}
    if odd and any(w.num_bits == 4 for w in weights):
        notes.append(f"{stored}: gptqmodel on a CPU needs groups of 32, 64, 128 or 256 at 4 bits")
    if any(s.block is None for s in quantized):
        notes.append(f"{stored}: transformers leaves a quantized output head random; add lm_head to ignore for it")
    if any(s.expert is not None for s in quantized):
        notes.append(f"{stored}: experts: not tried in any client; compressed-tensors is")
    return notes


def processor_notes(stored: str, schemes: Sequence[Scheme]) -> list[str]:
    """What vLLM cannot run on this very machine: its CPU build has packed integers for AVX-512 alone, of x86."""
    if torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return []
    packed = [s for s in schemes if s.format == "pack-quantized" and vllm_limit(s) is None]
    in_gptq = stored in ("gptq", "gptq_v2") and any(s.weights.symmetric for s in packed)
    if not packed or not (in_gptq or stored in (DEFAULT, "awq")):
        return []
    return ["packed integers: vLLM serves them on GPUs and on CPUs with AVX-512, which this processor has not"]


def _mixed_experts(subject: Subject, sites: Sequence[Site]) -> list[str]:
    """transformers decompresses the experts of all layers by one scheme."""
    mine = [s for s in sites if s.expert is not None and s.scheme is not None]
    schemes = {str(s.scheme) for s in mine}
    every = sum(len(experts) * len(LEAVES) for experts in subject.experts.values())
    if not mine or (len(schemes) == 1 and len(mine) == every):
        return []
    what = f"{len(schemes)} schemes" if len(schemes) > 1 else "part"
    return [f"experts quantized in {what}: transformers reads all experts by one; load it with bitpress.transformers"]


def _newer_transformers(schemes: Sequence[Scheme]) -> list[str]:
    """What 5.23 and later lost: several schemes with dequantize=True, packed zero points without it."""
    several = len({str(s) for s in schemes}) > 1
    zeros = any(s.format == "pack-quantized" and not s.weights.symmetric for s in schemes)
    if not several and not zeros:
        return []
    what = " with ".join(["several schemes"] * several + ["zero points"] * zeros)
    how = "not at all; use bitpress.transformers" if several and zeros else f"with dequantize={zeros} only"
    return [f"{what}: transformers 5.23 and later load this {how}"]


def vllm_limit(scheme: Scheme) -> str | None:
    """What vLLM cannot do with a scheme, None if it serves it everywhere."""
    weights, inputs = scheme.weights, scheme.input_activations
    in_rows = weights.strategy in ("group", "channel")
    match scheme.format:
        case "pack-quantized" if inputs is None:
            if not in_rows:
                return "vLLM serves strategy group or channel only; this loads in transformers"
            if weights.num_bits == 8:
                return ON_GPUS  # the CPU build has a kernel for 4 bits alone
            return None if weights.num_bits == 4 else "vLLM serves 4 and 8 bits only; this loads in transformers"
        case "pack-quantized" if inputs is not None and inputs.type == "float":
            served = (weights.num_bits, weights.group_size, inputs.strategy) == (4, 128, "token") and weights.symmetric
            return "vLLM serves it on Hopper GPUs only" if served and inputs.num_bits == 8 else UNSERVED
        case "pack-quantized":
            return ON_GPUS if _served_packed(weights, inputs) else UNSERVED
        case "int-quantized":
            return _int_limit(weights, inputs)
        case "float-quantized" | "naive-quantized":
            if weights.strategy == "group":
                return UNSERVED
            return ON_GPUS if scheme.static_inputs else None  # the CPU build lacks the operator for static scales
        case "mxfp6-pack-quantized":
            return UNSERVED
        case "nvfp4-pack-quantized" | "mxfp4-pack-quantized" if inputs is not None and inputs.num_bits == 4:
            return OLDER_GPUS
        case "mxfp8-quantized" if inputs is not None:
            return OLDER_GPUS
    return ON_GPUS


def _int_limit(weights: QuantArgs, inputs: QuantArgs | None) -> str | None:
    assert inputs is not None
    scaled = (inputs.strategy, inputs.dynamic) in (("tensor", False), ("token", True))
    plain = weights.symmetric and weights.strategy in ("channel", "tensor")
    if (weights.num_bits, inputs.num_bits) == (8, 8) and plain and scaled:
        return None
    packed = _served_packed(weights, inputs)
    hint = ". With format: pack-quantized in config_groups vLLM serves it on GPUs" if packed else ""
    if packed and (weights.num_bits, inputs.num_bits, inputs.strategy) == (4, 8, "token") and weights.symmetric:
        return f"vLLM serves 4 bits stored as int8 on Arm CPUs only{hint}"
    return f"{UNSERVED}{hint}"


def _served_packed(weights: QuantArgs, inputs: QuantArgs | None) -> bool:
    """Whether vLLM has a kernel for packed integers with these integer activations."""
    return (
        inputs is not None
        and inputs.type == "int"
        and weights.strategy in ("group", "channel")
        and inputs.symmetric
        and inputs.dynamic is True
        and inputs.strategy in ("token", "group")
        and inputs.num_bits in (4, 8)
    )


def release_limit(scheme: Scheme, sites: Sequence[Site]) -> str | None:
    """What older releases of compressed-tensors cannot read, None if 0.17 and later do."""
    weights = scheme.weights
    if scheme.format == "mxfp6-pack-quantized":
        return "needs compressed-tensors 0.20 or later (older ones do not know 6-bit floats)"
    if scheme.format == "pack-quantized" and weights.num_bits not in (2, 4, 8):
        return ODD_WIDTHS
    if weights.block_structure is not None:
        rows, columns = weights.block_structure
        if any(s.columns == columns and s.rows > rows for s in sites):
            return f"needs compressed-tensors 0.19 or later (older ones misread weights of {columns} columns in blocks)"
    return None


def misread_as_experts(scheme: Scheme) -> bool:
    """Whether transformers loads experts of a scheme without an error, and wrong: it leaves out the scale on top."""
    return scheme.format == "nvfp4-pack-quantized"


def loads_as_experts(scheme: Scheme) -> bool:
    """Whether transformers decompresses it for experts, which it holds as one parameter."""
    match scheme.format:
        case "pack-quantized":
            return scheme.weights.symmetric
        case "float-quantized" | "naive-quantized":
            return scheme.weights.strategy in ("tensor", "channel")
    return scheme.format in ("mxfp4-pack-quantized", "mxfp6-pack-quantized")


def _cache_limit(cache: QuantArgs) -> str | None:
    if (cache.type, cache.num_bits) != ("float", 8):
        return "vLLM serves caches of 8-bit floats only (num_bits: 8, type: float); this runs in transformers"
    if cache.strategy == "token":
        return "vLLM serves caches with strategy tensor or attn_head only; this runs in transformers"
    return None


def _cache_in_transformers(subject: Subject, sites: Sequence[Site]) -> str | None:
    config = subject.config.get_text_config() if hasattr(subject.config, "get_text_config") else subject.config
    if getattr(config, "num_key_value_heads", None) is None:
        return f"transformers cannot load it: the configuration of {config.model_type} has no num_key_value_heads"
    if subject.experts and not any(s.group is not None for s in sites):
        return "transformers cannot load it: it takes the experts for quantized"
    return None


def _split_partners(subject: Subject, sites: Sequence[Site]) -> list[str]:
    """Linears that vLLM runs as one product and that differ in scheme."""
    by_name = {s.module: str(s.scheme) for s in sites if s.group is not None}
    split = []
    for parent, module in subject.model.named_modules():
        for partners in FUSED:
            there = [f"{parent}.{p}" for p in partners if hasattr(module, p)]
            if len({by_name.get(name) for name in there}) > 1:
                split.append(f"{parent}: {', '.join(partners)}")
    if not split:
        return []
    return [f"{split[0]} differ in scheme (and {len(split) - 1} more): vLLM fuses them and needs one scheme"]
