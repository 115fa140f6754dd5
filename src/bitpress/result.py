"""What a run gives back: a module that saves itself packed, or a handle on a saved checkpoint."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitpress.errors import CheckpointError, ConfigError, RecipeError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from bitpress.checkpoint import Source
    from bitpress.math.grid import Solved
    from bitpress.modifiers.quantization import QuantizationModifier
    from bitpress.plan import Plan
    from bitpress.sites import Site
    from bitpress.subject import ModuleSubject

FORMATS = (
    None, "compressed-tensors", "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
# arguments of transformers' save_pretrained: those that are refused unless they say what is done anyway, with the
# remedy, and those that change nothing here
REFUSED: dict[str, tuple[Any, str]] = {
    "push_to_hub": (False, "save, then upload the folder: huggingface_hub.HfApi().upload_folder"),
    "state_dict": (None, "put the weights into the model (load_state_dict), then save it"),
    "variant": (None, "give each variant a folder of its own"),
    "safe_serialization": (True, "only safetensors are written; drop it"),
}
ACCEPTED = (
    "is_main_process", "max_shard_size", "save_function", "token", "use_auth_token", "save_peft_format",
    "save_original_format", "distributed_checkpoint",
)  # fmt: skip
# arguments of from_pretrained that say where files come from or how to read them, which is settled for a folder
IDLE = (
    "low_cpu_mem_usage", "local_files_only", "token", "use_auth_token", "revision", "cache_dir", "force_download",
    "resume_download", "proxies", "use_safetensors", "quantization_config", "max_memory", "offload_folder",
    "offload_state_dict", "offload_buffers",
)  # fmt: skip


class SavedModel:
    """A checkpoint on disk that is loaded when it is first used as a model.

    `save_pretrained` copies files as long as it has not been. Any other attribute, and a call, load the model with
    transformers, decompressed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model: Any = None

    def __fspath__(self) -> str:
        return str(self.folder)

    def load(self) -> Any:
        """The model, loaded once."""
        if self._model is None:
            from bitpress.transformers import SparseAutoModelForCausalLM

            self._model = SparseAutoModelForCausalLM.from_pretrained(self.folder)
        return self._model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        save_compressed: bool | None = None,
        skip_sparsity_compression_stats: bool = True,
        disable_sparse_compression: bool = False,
        quantization_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save to another folder, packed or (save_compressed=False) dense beside scales; see `attach`."""
        from bitpress.checkpoint import copy_companions
        from bitpress.inspection import read_config

        check_format(quantization_format)
        if not check_options(kwargs):
            return
        target = Path(save_directory)
        if target.is_file():
            raise CheckpointError(f"{target}: is a file; choose a folder")
        elsewhere = target.resolve() != self.folder.resolve()
        status = read_config(self.folder).get("quantization_config", {}).get("quantization_status")
        packed = status == "compressed"
        wanted = packed if save_compressed is None else save_compressed
        if self._model is None and wanted == packed:
            if elsewhere:
                _copy(self.folder, target)
            return
        model = self.load()
        if elsewhere:
            clear(target)
            copy_companions(self.folder, target)
        model.save_pretrained(target, save_compressed=wanted, quantization_format=quantization_format)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.load(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)

    def __repr__(self) -> str:
        return f"SavedModel({str(self.folder)!r})"


def clear(folder: Path) -> None:
    """Make a folder ready for a checkpoint: an old one's weights go, its config.json first, other files stay."""
    from bitpress.checkpoint import INDEX
    from bitpress.journal import WORK

    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; choose a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", INDEX):
        (folder / name).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):
        old.unlink()
    shutil.rmtree(folder / WORK, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a finished checkpoint, config.json last, so that half a copy does not look whole."""

    def left_out(place: str, names: list[str]) -> set[str]:
        here = Path(place)
        return {n for n in names if here / n in (source / "config.json", target)}

    clear(target)
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=left_out)
    partial = target / "config.json.partial"
    shutil.copyfile(source / "config.json", partial)
    os.replace(partial, target / "config.json")


def check_options(options: Mapping[str, Any]) -> bool:
    """Whether this process saves at all (is_main_process).

    Raises:
        ConfigError: an argument that transformers' save_pretrained does not have, or that cannot be followed.
    """
    faults = []
    for name, value in options.items():
        if name in REFUSED:
            idle, remedy = REFUSED[name]
            if value is not idle and value is not None:
                faults.append(f"save_pretrained: {name} is not supported; {remedy}")
        elif name not in ACCEPTED:
            own = ("save_compressed", "quantization_format")
            faults.append(f"save_pretrained: '{name}' is unknown.{did_you_mean(name, (*own, *ACCEPTED, *REFUSED))}")
    if faults:
        raise ConfigError(faults)
    return bool(options.get("is_main_process", True))


def check_format(name: str | None) -> None:
    """ConfigError for a storage format that bitpress does not write."""
    if name not in FORMATS:
        known = [f for f in FORMATS if f]
        raise ConfigError(f"quantization_format: '{name}' cannot be written.{did_you_mean(str(name), known)}")


def attach(
    model: nn.Module,
    plan: Plan,
    solved: Sequence[tuple[Site, Solved]],
    caches: Mapping[str, Tensor],
    recipe: str,
    report: dict[str, Any],
) -> nn.Module:
    """Give a compressed module in memory a `save_pretrained` that packs.

    The weights in memory are the dequantized ones. They are rounded with the scales found, which gives the solved
    codes again, also after changes to the weights (fine-tuning) have moved them off the grid.
    """

    def save_pretrained(
        self: nn.Module,
        save_directory: str | os.PathLike[str],
        save_compressed: bool = True,
        skip_sparsity_compression_stats: bool = True,
        disable_sparse_compression: bool = False,
        quantization_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save in compressed-tensors format, or (save_compressed=False) dense weights beside scales and zero points.

        Args:
            save_directory: the folder, made if need be.
            skip_sparsity_compression_stats, disable_sparse_compression: accepted; there is no sparse format.
            quantization_format: None, or the format that the scheme has anyway.
            kwargs: other arguments of transformers' method. They change nothing here, but for is_main_process=False,
                which writes nothing; what cannot be followed (push_to_hub, state_dict, ...) is a ConfigError.
        """
        check_format(quantization_format)
        if not check_options(kwargs):
            return
        compressed = save_compressed and quantization_format != "dense"
        save_module(self, Path(save_directory), plan, solved, caches, recipe, report, compressed=compressed)

    model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]
    model.bitpress_report = report  # type: ignore[assignment]
    return model


def save_module(
    model: nn.Module,
    folder: Path,
    plan: Plan,
    solved: Sequence[tuple[Site, Solved]],
    caches: Mapping[str, Tensor],
    recipe: str,
    report: dict[str, Any],
    *,
    compressed: bool,
) -> None:
    """Write a module in memory with the streaming writer: the same files as a streamed run.

    Args:
        solved: its quantized linears, without codes.
        caches: scales of caches, by name on disk.
    """
    from bitpress import formats
    from bitpress.journal import WORK, Journal
    from bitpress.math.grid import quantize
    from bitpress.output import Output
    from bitpress.subject import ModuleSubject

    clear(folder)
    # the weights may have changed since the run: a later run into this folder must not take them for its own
    report = {**report, "run": {"saved": "from memory"}}
    subject = ModuleSubject(model)
    try:
        total = len(subject.blocks) + 1
        output = Output(folder, Journal(folder / WORK, {}, {}), total, compressed=compressed, verify=True)
        for shard in range(total):
            prefix = None if shard == total - 1 else subject.blocks.prefix(shard)
            keys = set(subject.keys(prefix))
            here = []
            for site, kept in solved:
                if site.key in keys:
                    assert site.scheme is not None and kept.qparams is not None
                    weight = subject.stored([site.key])[site.key].float()
                    codes = quantize(weight, kept.qparams, formats.grid_of(site.scheme, subject.dtype))
                    here.append((site, replace(kept, codes=codes)))
            beside = {n: caches[n] for c in plan.caches if c.block == shard for n in c.spec()}
            output.write(shard, subject, sorted(keys), here, [], last=prefix is None, beside=beside)
        output.finish(subject, plan, recipe, report, None)
    finally:
        subject.close()


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


def is_weight_only(folder: Path) -> bool:
    """Whether `reload` gives the model that was stored: a scheme of bitpress that leaves activations alone."""
    try:
        modifier = modifier_of(folder)
    except CheckpointError:
        return False
    return modifier.cache() is None and all(g.scheme.input_activations is None for g in modifier.groups())


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
