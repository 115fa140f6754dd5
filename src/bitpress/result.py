"""What a run gives back: a module that saves itself packed, or a handle on a saved checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from bitpress import ranks
from bitpress.errors import CheckpointError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from bitpress.math.grid import Solved
    from bitpress.plan import Plan
    from bitpress.sites import Site

STORED = ("compressed-tensors", "gptq", "gptq_v2", "awq")  # of `bitpress.formats`; "dense" is beside scales here
FORMATS = (
    None, *STORED, "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
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
    """Whether this process saves at all: of several the first one, unless is_main_process says no.

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
    return bool(options.get("is_main_process", True)) and ranks.first()


def check_format(name: str | None) -> None:
    """ConfigError for a storage format that bitpress does not write."""
    if name not in FORMATS:
        known = [f for f in FORMATS if f]
        if name is not None and ("24" in name or "sparse" in name):
            raise ConfigError(
                f"quantization_format: '{name}' is not written from memory; 2:4 storage is, by oneshot and apply "
                "with format='sparse-24', or from the saved folder: bitpress convert DIR OUT --format sparse-24"
            )
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
    from bitpress.formatplan import in_format

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
            quantization_format: None, or the format that the scheme has anyway; or a checkpoint format such as
                "gptq"; "dense" means save_compressed=False.
            kwargs: other arguments of transformers' method. They change nothing here, but for is_main_process=False,
                which writes nothing; what cannot be followed (push_to_hub, state_dict, ...) is a ConfigError.
        """
        check_format(quantization_format)
        if not check_options(kwargs):
            return
        compressed = save_compressed and quantization_format != "dense"
        stored = quantization_format if quantization_format in STORED else plan.stored
        written = in_format(plan, stored)
        sites = {s.name: s for s in written.quantized}
        here = [(sites[s.name], z) for s, z in solved]
        save_module(self, Path(save_directory), written, here, caches, recipe, report, compressed=compressed)

    model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]
    model.bitpress_report = report  # type: ignore[assignment]
    model.bitpress_quantized = bool(solved)  # type: ignore[assignment]  # a pruned model can be compressed further
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
