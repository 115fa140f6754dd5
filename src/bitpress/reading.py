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

from bitpress.errors import CheckpointError, ConfigError, RecipeError, did_you_mean
from bitpress.result import attach

if TYPE_CHECKING:
    from bitpress.checkpoint import Source
    from bitpress.modifiers.quantization import QuantizationModifier
    from bitpress.plan import Plan
    from bitpress.sites import Site
    from bitpress.subject import ModuleSubject

# arguments of from_pretrained that say where files come from or how to read them, which is settled for a folder
IDLE = (
    "low_cpu_mem_usage", "local_files_only", "token", "use_auth_token", "revision", "cache_dir", "force_download",
    "resume_download", "proxies", "use_safetensors", "quantization_config", "max_memory", "offload_folder",
    "offload_state_dict", "offload_buffers",
)  # fmt: skip


def load_into(subject: ModuleSubject, plan: Plan, folder: Path) -> nn.Module:
    """Put a finished output's weights into the module that it was made from, or into one loaded from it."""
    from bitpress.checkpoint import Source
    from bitpress.output import read_site

    source = Source(folder)
    solved = []
    try:
        for site in plan.sites:
            z = read_site(lambda name: source.tensors[name][0], site, compressed=_packed(source, site))
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
    """A compressed-tensors checkpoint as a dense module that packs again when saved; activations stay as they are.

    Reads the weights itself, so it also loads what transformers cannot decompress (experts with zero points).

    Raises:
        CheckpointError: a scheme that bitpress does not write, or tensors that are not there.
        ConfigError: a device_map over several devices, or an argument that from_pretrained does not have.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from bitpress import plan
    from bitpress.checkpoint import Source
    from bitpress.subject import ModuleSubject, checkpoint_dtype

    folder = Path(place)
    modifier = modifier_of(folder)
    device = _one_device(device_map)
    source = Source(folder)
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
        dtype = checkpoint_dtype(config, source)
    elif isinstance(dtype, str):
        dtype = _dtype(dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **passed_on).eval()
    model.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    subject = ModuleSubject(model)
    made = plan.make([modifier], subject, samples=1, length=1, device=subject.home)
    packed = {site.key for site in made.sites}
    for key, disk in subject.layout.disk_of.items():
        if key not in packed:
            subject.assign({key: source.read([disk])[disk]})
    load_into(subject, made, folder)
    if device is not None:
        model.to(device)
    return model  # type: ignore[no-any-return]


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
