"""Checkpoints that bitpress wrote, read back into modules."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitpress import formats
from bitpress.errors import CheckpointError, ConfigError, RecipeError, did_you_mean
from bitpress.result import attach

if TYPE_CHECKING:
    from bitpress.checkpoint import Source
    from bitpress.inspection import Inspection
    from bitpress.modifiers.quantization import QuantizationModifier, SchemeModifier
    from bitpress.plan import Plan
    from bitpress.recognise import QuantizedLayer
    from bitpress.sites import Site
    from bitpress.subject import ModuleSubject

# arguments of from_pretrained that say where files come from or how to read them, which is settled for a folder
IDLE = (
    "low_cpu_mem_usage", "local_files_only", "token", "use_auth_token", "revision", "cache_dir", "force_download",
    "resume_download", "proxies", "use_safetensors", "quantization_config", "max_memory", "offload_folder",
    "offload_state_dict", "offload_buffers",
)  # fmt: skip


def load_into(subject: ModuleSubject, plan: Plan, folder: Path, stored: str | None = None) -> nn.Module:
    """Put a finished output's weights into the module that it was made from, or into one loaded from it.

    Args:
        stored: the format that it has; None: that of the plan, in which the module will be saved.
    """
    from bitpress.checkpoint import Source
    from bitpress.output import read_site

    source = Source(folder)
    solved = []
    try:
        for site in plan.sites:
            there = site if stored is None else replace(site, stored=stored)
            packed = there.stored != formats.DEFAULT or _packed(source, there)
            z = read_site(lambda name: source.tensors[name][0], there, compressed=packed)
            subject.assign({site.key: z.dense()})
            if z.qparams is not None:
                solved.append((site, replace(z, codes=None)))
        caches = source.read([name for cache in plan.caches for name in cache.spec()])
    except KeyError as error:
        raise CheckpointError(f"{folder}: {error} is in no weight file; download or write it again") from None
    report, recipe = folder / "report.json", folder / "recipe.yaml"
    subject.close()
    return attach(
        subject.model,
        plan,
        solved,
        caches,
        recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {},
    )


def _packed(source: Source, site: Site) -> bool:
    """Whether a linear's codes are stored; the status in config.json is not to be trusted in older checkpoints."""
    weight = f"{site.name}.weight"
    return f"{weight}_packed" in source.tensors or source.spec(weight)[0].itemsize == 1


def described(folder: Path) -> tuple[SchemeModifier, str]:
    """The modifier that describes a quantized checkpoint, and the name of its format.

    Raises:
        CheckpointError: a format or scheme that bitpress does not write.
    """
    from bitpress.checkpoint import Source
    from bitpress.inspection import inspect_checkpoint, read_config
    from bitpress.modifiers.quantization import GPTQModifier, QuantizationModifier

    settings = read_config(folder).get("quantization_config") or {}
    found = inspect_checkpoint(folder)
    if found.method == formats.DEFAULT:
        return modifier_of(folder), formats.DEFAULT
    names = [n for n, form in formats.CHECKPOINTS.items() if form.method == found.method and form.method is not None]
    if not names:
        raise CheckpointError(f"{folder}: bitpress does not read {found.method} checkpoints")
    name = str(settings.get("checkpoint_format") or names[0])
    if name not in names:
        raise CheckpointError(f"{folder}: checkpoint_format '{name}' is not read, only {' and '.join(names)}")
    if name == "bitsandbytes":
        return _blockwise(folder, found, settings), name
    groups: dict[str, Any] = {}
    source = Source(folder)
    for layer in found.layers:
        symmetric = bool(layer.symmetric) if name != "awq" else _centred(source, layer.name)
        weights = {"num_bits": layer.num_bits, "type": "int", "symmetric": symmetric, "strategy": layer.strategy}
        weights |= {"group_size": layer.group_size} if layer.group_size else {}
        weights |= {"actorder": "group"} if found.method == "gptq" and _regrouped(source, layer) else {}
        groups.setdefault(json.dumps(weights), {"weights": weights, "targets": []})["targets"].append(layer.name)
    ordered = any("actorder" in group["weights"] for group in groups.values())
    kind = GPTQModifier if ordered else QuantizationModifier
    try:
        return kind(config_groups={f"group_{i}": g for i, g in enumerate(groups.values())}), name
    except RecipeError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _blockwise(folder: Path, found: Inspection, settings: dict[str, Any]) -> SchemeModifier:
    """The modifier of 4-bit weights of bitsandbytes."""
    from bitpress.modifiers.quantization import BitsAndBytesModifier
    from bitpress.schemes import BLOCKWISE

    kinds = {(layer.scheme.split("4")[0] + "4", layer.group_size) for layer in found.layers}
    if len(kinds) != 1 or (kind := next(iter(kinds)))[0] not in BLOCKWISE:
        raise CheckpointError(f"{folder}: bitpress reads NF4 and FP4 of bitsandbytes; load it in transformers")
    keys: dict[str, Any] = {
        "quant_type": kind[0],
        "blocksize": kind[1],
        "double_quant": bool(settings.get("bnb_4bit_use_double_quant")),
        "quant_storage": str(settings.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch."),
        "compute_dtype": str(settings.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch."),
        "targets": [layer.name for layer in found.layers],
    }
    try:
        return BitsAndBytesModifier(**keys)
    except RecipeError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _regrouped(source: Source, layer: QuantizedLayer) -> bool:
    """Whether the columns of a group in GPTQ's format lie apart, whatever desc_act says.

    Raises:
        CheckpointError: no group of a column, or one that is not there.
    """
    name, size = f"{layer.name}.g_idx", layer.group_size or layer.columns
    if name not in source.tensors:
        raise CheckpointError(f"{source.folder}: '{name}' is missing; download it again")
    g_idx = source.read([name])[name]
    if not bool(((g_idx >= 0) & (g_idx < -(-layer.columns // size))).all()):
        raise CheckpointError(f"{source.folder}: '{name}' names groups that are not there; download it again")
    return not torch.equal(g_idx.long(), torch.arange(layer.columns) // size)


def _centred(source: Source, name: str) -> bool:
    """Whether all zero points of a linear in AWQ's format are in the middle, so that it needs none."""
    zeros = f"{name}.qzeros"
    return bool((source.read([zeros])[zeros].view(torch.uint8) == 0x88).all())


def modifier_of(folder: Path) -> QuantizationModifier:
    """The modifier that describes a compressed-tensors checkpoint.

    Raises:
        CheckpointError: it has a scheme, or something beside it, that bitpress does not write.
    """
    from bitpress.inspection import read_config
    from bitpress.modifiers.quantization import QuantizationModifier

    settings = read_config(folder).get("quantization_config") or {}
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) and g.get("targets") for g in groups.values()):
        raise CheckpointError(f"{folder}: config.json has no config_groups with targets that bitpress reads")
    extra = ["transform_config"] if settings.get("transform_config") else []
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        extra.append("sparsity_config")
    if extra:
        raise CheckpointError(
            f"{folder}: has {', '.join(extra)}, which bitpress does not read; load it in transformers"
        )
    if any((g.get("weights") or {}).get("actorder") in ("group", True) for g in groups.values()):
        raise CheckpointError(f"{folder}: has actorder 'group' in compressed-tensors, which no client reads any more")
    # "Linear" takes what no other group names, so it comes last
    ordered = sorted(groups.items(), key=lambda item: "Linear" in item[1]["targets"])
    # dense weights say nothing of how they are to be packed
    plain = {n: {k: v for k, v in group.items() if (k, v) != ("format", "dense")} for n, group in ordered}
    cache = settings.get("kv_cache_scheme")
    try:
        return QuantizationModifier(
            config_groups=plain or None, ignore=settings.get("ignore") or [], kv_cache_scheme=cache
        )
    except RecipeError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def reload(place: str | os.PathLike[str], *, dtype: Any = "auto", device_map: Any = None, **kwargs: Any) -> nn.Module:
    """A quantized checkpoint as a dense module that packs again when saved; activations stay as they are.

    Reads the weights itself, so it also loads what transformers cannot decompress (experts with zero points).

    Args:
        place: its folder, or a GGUF file beside the model's config.json.

    Raises:
        CheckpointError: a scheme that bitpress does not write, or tensors that are not there.
        ConfigError: a device_map over several devices, or an argument that from_pretrained does not have.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from bitpress import plan
    from bitpress.checkpoint import Source
    from bitpress.inspection import is_quantized
    from bitpress.subject import ModuleSubject, checkpoint_dtype

    folder = Path(place)
    method = is_quantized(folder)
    file = folder if folder.is_file() else min(folder.glob("*.gguf"), default=None)
    folder = folder.parent if folder.is_file() else folder
    gguf, sparse = method == "gguf", method == "sparse-24"
    modifier, stored = (None, str(method)) if gguf or sparse else described(folder)
    device = _one_device(device_map)
    source = None if gguf else Source(folder)
    given = {key: value for key, value in kwargs.items() if key not in IDLE}
    passed_on = {key: given.pop(key) for key in ("attn_implementation", "trust_remote_code") if key in given}
    config = copy.deepcopy(given.pop("config", None))
    if config is None:
        config, given = AutoConfig.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=passed_on.get("trust_remote_code"),
            return_unused_kwargs=True,
            **given,
        )
    if given:
        known = (*IDLE, "dtype", "torch_dtype", "device_map", "attn_implementation", "trust_remote_code", "config")
        raise ConfigError([f"from_pretrained: '{key}' is unknown.{did_you_mean(key, known)}" for key in given])
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if dtype in (None, "auto"):
        dtype = checkpoint_dtype(config, source) if source is not None else config.dtype or torch.bfloat16
    elif isinstance(dtype, str):
        dtype = _dtype(dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **passed_on).eval()
    model.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    subject = ModuleSubject(model)
    if modifier is None or source is None:
        if source is None:
            assert file is not None
            _assign_gguf(subject, file, config)
        else:
            _assign_sparse(subject, folder, dtype)
        model.to(device or "cpu")
        return model  # type: ignore[no-any-return]
    saved = "dense" if stored == "bitsandbytes" else stored  # which is written from folders only
    made = plan.make([modifier], subject, samples=1, length=1, device=subject.home, stored=saved)
    packed = {site.key for site in made.sites}
    for key, disk in subject.layout.disk_of.items():
        if key not in packed:
            subject.assign({key: source.read([disk])[disk]})
    load_into(subject, made, folder, stored)
    if device is not None:
        model.to(device)
    return model  # type: ignore[no-any-return]


def _assign_gguf(subject: ModuleSubject, file: Path, config: Any) -> None:
    """The weights of a GGUF file, dense; a later save stores them so."""
    from bitpress.formats.gguf_read import read_weights

    keys = {disk: key for key, disk in subject.layout.disk_of.items()}
    for disk, tensor in read_weights(file, config, keys):
        subject.assign({keys[disk]: tensor})
    subject.close()


def _assign_sparse(subject: ModuleSubject, folder: Path, dtype: torch.dtype) -> None:
    """The weights of a checkpoint stored by its 2:4 masks, dense."""
    from bitpress.formats.sparse24 import open_sparse

    source, _ = open_sparse(folder, dtype)
    for key, disk in dict(subject.layout.disk_of).items():
        subject.assign({key: source.read([disk])[disk]})
    subject.close()


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(
            f"dtype: '{name}' is unknown.{did_you_mean(name, ('float32', 'bfloat16', 'float16', 'auto'))}"
        )
    return found


def _one_device(device_map: Any) -> torch.device | None:
    """The device that a device_map names, None if it is None; ConfigError where there are several."""
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    place = places.pop() if len(places) == 1 else ...
    if place is None:
        return None
    if place in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(place, int):
        return torch.device("cuda", place)
    if isinstance(place, str | torch.device):
        try:
            return torch.device(place)
        except RuntimeError:
            pass
    raise ConfigError("device_map: a compressed checkpoint is loaded on one device; give 'auto', 'cpu' or 'cuda'")
