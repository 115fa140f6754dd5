"""What a run gives back: a module that saves itself packed, or a handle on a saved checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitpress.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from bitpress.math.grid import QParams
    from bitpress.plan import Plan, Site
    from bitpress.subject import ModuleSubject

FORMATS = (None, "compressed-tensors", "pack-quantized", "int-quantized", "dense")


class SavedModel:
    """A checkpoint on disk that is loaded when it is first used as a model.

    `save_pretrained` copies files as long as it has not been. Any other attribute, and a call, load the model with
    transformers, decompressed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model: Any = None

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
        target = Path(save_directory)
        status = read_config(self.folder).get("quantization_config", {}).get("quantization_status")
        packed = status == "compressed"
        wanted = packed if save_compressed is None else save_compressed
        if self._model is None and wanted == packed:
            if target.resolve() != self.folder.resolve():
                shutil.copytree(self.folder, target, dirs_exist_ok=True)
            return
        if target.resolve() != self.folder.resolve() and not target.is_file():
            target.mkdir(parents=True, exist_ok=True)
            copy_companions(self.folder, target)
        self.load().save_pretrained(target, save_compressed=wanted, quantization_format=quantization_format, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.load(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)

    def __repr__(self) -> str:
        return f"SavedModel({str(self.folder)!r})"


def check_format(name: str | None) -> None:
    """ConfigError for a storage format that bitpress does not write."""
    from bitpress.errors import did_you_mean

    if name not in FORMATS:
        known = [f for f in FORMATS if f]
        raise ConfigError(f"quantization_format: '{name}' cannot be written.{did_you_mean(str(name), known)}")


def attach(
    model: nn.Module, plan: Plan, solved: Sequence[tuple[Site, QParams]], recipe: str, report: dict[str, Any]
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
            kwargs: arguments of transformers' method; those that have a meaning here are none.
        """
        check_format(quantization_format)
        compressed = save_compressed and quantization_format != "dense"
        save_module(self, Path(save_directory), plan, solved, recipe, report, compressed=compressed)

    model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]
    model.bitpress_report = report  # type: ignore[assignment]
    return model


def save_module(
    model: nn.Module,
    folder: Path,
    plan: Plan,
    solved: Sequence[tuple[Site, QParams]],
    recipe: str,
    report: dict[str, Any],
    *,
    compressed: bool,
) -> None:
    """Write a module in memory with the streaming writer: the same files as a streamed run."""
    from bitpress import formats
    from bitpress.journal import WORK, Journal
    from bitpress.math.grid import Solved, dequantize, quantize
    from bitpress.output import Output
    from bitpress.subject import ModuleSubject

    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; choose a folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):
        old.unlink()
    shutil.rmtree(folder / WORK, ignore_errors=True)
    subject = ModuleSubject(model)
    try:
        total = len(subject.blocks) + 1
        output = Output(folder, Journal(folder / WORK, {}, {}), total, compressed=compressed, verify=True)
        for shard in range(total):
            prefix = None if shard == total - 1 else subject.blocks.prefix(shard)
            keys = set(subject.keys(prefix))
            here = []
            for site, qparams in solved:
                if site.key in keys:
                    weight = subject.stored([site.key])[site.key].float()
                    codes = quantize(weight, qparams, formats.grid_of(site.group.scheme, subject.dtype))
                    here.append((site, Solved(codes, qparams, (dequantize(codes, qparams).float() - weight).sum())))
            output.write(shard, subject, sorted(keys), here, [], last=prefix is None)
        output.finish(subject, plan, recipe, report, None)
    finally:
        subject.close()


def load_into(subject: ModuleSubject, plan: Plan, folder: Path) -> nn.Module:
    """Put a finished output's weights into the module that it was made from, or into one loaded from it."""
    from bitpress.checkpoint import Source
    from bitpress.inspection import read_config
    from bitpress.output import read_site

    source = Source(folder)
    status = read_config(folder)["quantization_config"]["quantization_status"]
    solved = []
    for site in plan.sites:
        z = read_site(lambda name: source.tensors[name][0], site, compressed=status == "compressed")
        subject.assign({site.key: z.dense()})
        solved.append((site, z.qparams))
    report, recipe = folder / "report.json", folder / "recipe.yaml"
    subject.close()
    return attach(
        subject.model,
        plan,
        solved,
        recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {},
    )


def reload(place: str | os.PathLike[str], *, dtype: Any = "auto", device_map: Any = None, **kwargs: Any) -> nn.Module:
    """A compressed-tensors checkpoint of integer weights as a dense module that packs again when saved.

    Reads the weights itself, so it also loads what transformers cannot decompress (experts with zero points).

    Raises:
        CheckpointError: a scheme that bitpress does not write.
        ConfigError: a device_map over several devices.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from bitpress import plan
    from bitpress.checkpoint import Source
    from bitpress.errors import RecipeError
    from bitpress.inspection import read_config
    from bitpress.modifiers.quantization import QuantizationModifier
    from bitpress.subject import ModuleSubject, checkpoint_dtype

    folder = Path(place)
    settings = read_config(folder)["quantization_config"]
    # "Linear" takes what no other group names, so it comes last
    groups = sorted(settings["config_groups"].items(), key=lambda item: "Linear" in item[1]["targets"])
    plain = {name: {k: v for k, v in group.items() if k != "format"} for name, group in groups}
    try:
        modifier = QuantizationModifier(config_groups=plain, ignore=settings.get("ignore", []))
    except RecipeError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if device_map not in (None, "auto") and not isinstance(device_map, str | torch.device):
        raise ConfigError("device_map: a compressed checkpoint is loaded on one device; give 'auto', 'cpu' or 'cuda'")
    source = Source(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **kwargs)
    del config.quantization_config
    dtype = checkpoint_dtype(config, source) if dtype == "auto" else dtype
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs).eval()
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
    if device_map is not None:
        model.to(
            "cuda"
            if device_map == "auto" and torch.cuda.is_available()
            else "cpu"
            if device_map == "auto"
            else device_map
        )
    return model  # type: ignore[no-any-return]
