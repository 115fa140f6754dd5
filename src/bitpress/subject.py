"""The model being compressed: a folder that is streamed, or a module in memory. Both look alike to the pipeline.

A folder's model is a skeleton on the meta device; the parts outside the blocks are loaded once, a block when it is
its turn, and freed after it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.ahead import Ahead
from bitpress.blocks import Blocks
from bitpress.checkpoint import Source
from bitpress.errors import CheckpointError, ConfigError, PlanError
from bitpress.experts import UnfusedExperts, refuse, unfuse
from bitpress.names import Layout, layout, names_on_disk
from bitpress.pickles import open_weights


class Subject:
    """What the pipeline needs of a model.

    Attributes:
        model: the module tree, experts unfused.
        blocks: its decoder blocks.
        layout: names on disk of its tensors.
        dtype: the checkpoint's dtype, in which forwards run and scales are stored.
        turned: weights are turned into that dtype, and are stored in another one.
        streamed: parameters are on the meta device until loaded.
    """

    model: nn.Module
    blocks: Blocks
    layout: Layout
    dtype: torch.dtype
    experts: dict[str, UnfusedExperts]
    folder: Path | None = None
    streamed: bool
    turned: bool = False

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        return bool(getattr(text, "tie_word_embeddings", False))

    def keys(self, prefix: str | None) -> list[str]:
        """Names of the stored tensors of a block, or (None) of all that is outside the blocks, sorted by disk name."""
        inside = self.blocks.path + "."
        names = self.layout.disk_of
        keys = [k for k in names if (k.startswith(prefix) if prefix is not None else not k.startswith(inside))]
        return sorted(keys, key=names.__getitem__)

    def spec(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of a stored tensor, by module tensor name."""
        raise NotImplementedError

    def stored(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as the checkpoint stores them, by module tensor name, on the CPU."""
        raise NotImplementedError

    def load(self, prefix: str | None, device: torch.device, weights: dict[str, Tensor] | None = None) -> None:
        """Make a block (None: what is outside the blocks) ready to run; `weights` take the place of stored ones."""
        raise NotImplementedError

    def fetch(self, prefix: str, onto: torch.device | None) -> None:
        """Begin to read what `load` is going to need, and to copy it to a GPU if one is named."""

    def forget(self) -> None:
        """Give up what was begun to be read."""

    def unload(self, prefix: str | None) -> None:
        """Free what `load` took."""
        raise NotImplementedError

    def extra(self) -> dict[str, Tensor]:
        """Tensors on disk that the model has no place for, by name on disk."""
        return {}

    def extra_specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of what `extra` returns."""
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """What tells this model from another."""
        raise NotImplementedError

    def close(self) -> None:
        """Put back what was changed in the module tree, but for the weights."""


def read_config(folder: Path | str, *, trust_remote_code: bool = False) -> Any:
    """The model configuration of a folder; CheckpointError where there is none or it needs remote code."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = ""
        if "trust_remote_code" in str(error):
            hint = " The model brings its own code: pass trust_remote_code (--trust-remote-code) if you trust it."
        raise CheckpointError(f"{folder}: config.json cannot be used: {first}{hint}") from None


def locate(model: str | os.PathLike[str], *, trust_pickle: bool = False) -> Path:
    """The folder of a model given as a folder or as a hub id (downloaded to the hub's cache).

    Args:
        trust_pickle: download pickle weights too, if the hub has no others.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            from bitpress.journal import WORK

            why = "an unfinished bitpress run" if (path / WORK).is_dir() else "there is no config.json in it"
            raise CheckpointError(f"{path}: not a model folder: {why}")
        return path
    if path.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") != 1:
        raise CheckpointError(f"{model}: no such model folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
    try:
        folder = Path(snapshot_download(str(model), allow_patterns=patterns))
        if trust_pickle and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(model), allow_patterns=[*patterns, "pytorch_model*.bin"]))
        return folder
    except Exception as error:  # the hub raises many unrelated types; the reason is kept
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{model}: no such folder, and the hub does not give it: {first}") from error


def checkpoint_dtype(config: Any, source: Source) -> torch.dtype:
    """The dtype that the configuration declares, else that of most weights."""
    declared = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(declared, str):
        declared = getattr(torch, declared, None)
    if isinstance(declared, torch.dtype):
        return declared
    sizes: dict[torch.dtype, int] = {}
    for _, dtype, shape in source.tensors.values():
        if dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + torch.Size(shape).numel()
    return max(sizes, key=sizes.__getitem__)


class FolderSubject(Subject):
    """A model folder, streamed block by block.

    Args:
        trust_pickle: read pickle weights if there are no others.
        hidden: names on disk of tensors that are no part of the model: scales beside dense weights.
        dtype: what weights are turned into when they are read, by name; those of another dtype than most stay as they
            are. None: nothing is turned.
        attention: transformers' name of the attention; None: its choice.
        source: its tensors, where they are not simply those of its files.

    Raises:
        CheckpointError: the folder cannot be read.
        PlanError: not a decoder language model, or a layout on disk that cannot be followed.
        ConfigError: this attention cannot be had.
    """

    streamed = True

    def __init__(
        self,
        folder: Path,
        *,
        trust_remote_code: bool = False,
        trust_pickle: bool = False,
        hidden: Iterable[str] = (),
        dtype: str | None = None,
        attention: str | None = None,
        source: Source | None = None,
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.folder = folder
        config = read_config(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "is_encoder_decoder", False):
            raise PlanError(f"{config.model_type}: an encoder-decoder; bitpress compresses decoder language models")
        if hasattr(config, "quantization_config"):  # of an earlier stage; its dense weights are what is loaded
            del config.quantization_config
        self.source = source or open_weights(folder, trust_pickle=trust_pickle)
        self.stored_dtype = self.dtype = checkpoint_dtype(config, self.source)
        if isinstance(wanted := getattr(torch, dtype or "", None), torch.dtype):
            self.dtype, self.turned = wanted, wanted != self.stored_dtype
        options = {} if attention is None else {"attn_implementation": attention}
        try:
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(
                    config, dtype=self.dtype, trust_remote_code=trust_remote_code, **options
                )
        except (ValueError, ImportError) as error:
            first = str(error).strip().splitlines()[0]
            if options and type(config) in AutoModelForCausalLM._model_mapping:
                raise ConfigError(f"attn_implementation: '{attention}' cannot be had: {first}") from None
            raise PlanError(f"{config.model_type}: not a decoder language model: {first}") from None
        self.model.eval().requires_grad_(False)
        self.layout = layout(self.model, self.source.tensors.keys() - set(hidden))
        self.blocks = Blocks(self.model)
        self.experts = unfuse(self.model)
        self._ahead = Ahead(self._ready)
        self._check_complete()

    def _check_complete(self) -> None:
        shapes = {k: tuple(v.shape) for k, v in self.model.state_dict().items()}
        tied = set(_tied_names(self.model)) if self.tied else set()
        problems = [f"{k}: in no weight file" for k in shapes if k not in self.layout.disk_of and k not in tied]
        for key, disk in self.layout.disk_of.items():
            if self.source.spec(disk)[1] != shapes.get(key):
                problems.append(
                    f"{disk}: shape {self.source.spec(disk)[1]}, but config.json asks for {shapes.get(key)}"
                )
        if problems:
            raise CheckpointError([f"{self.folder}: {p}" for p in problems[:8]])

    def spec(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        dtype, shape = self.source.spec(self.layout.disk_of[key])
        return self.dtype if self.turned and dtype == self.stored_dtype else dtype, shape

    def stored(self, keys: Iterable[str]) -> dict[str, Tensor]:
        names = {self.layout.disk_of[k]: k for k in keys}
        found = {names[disk]: tensor for disk, tensor in self.source.read(names).items()}
        if not self.turned:
            return found
        return {key: t.to(self.dtype) if t.dtype == self.stored_dtype else t for key, t in found.items()}

    def load(self, prefix: str | None, device: torch.device, weights: dict[str, Tensor] | None = None) -> None:
        weights = weights or {}
        keys = [k for k in self.keys(prefix) if k not in weights]
        ahead = self._ahead.take(prefix, device)
        stored = self.stored(keys) if ahead is None else {k: t for k, t in ahead.items() if k in keys}
        for key, tensor in {**stored, **weights}.items():
            _set_tensor(self.model, key, tensor, device)
        if prefix is None:
            if self.tied:
                self.model.tie_weights()  # type: ignore[operator]
            for name, buffer in self.model.named_buffers():
                _set_buffer(self.model, name, buffer.to(device))

    def fetch(self, prefix: str, onto: torch.device | None) -> None:
        self._ahead.start(prefix, onto)

    def forget(self) -> None:
        self._ahead.close()

    def _ready(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of a block as `load` will have them, on the host."""
        held = {name: p.dtype for name, p in self.model.named_parameters()}
        return {key: tensor.to(held.get(key)) for key, tensor in self.stored(self.keys(prefix)).items()}

    def unload(self, prefix: str | None) -> None:
        for key in self.keys(prefix):
            parent, _, leaf = key.rpartition(".")
            module = self.model.get_submodule(parent)
            old = module._parameters.get(leaf)
            if old is not None:
                module._parameters[leaf] = nn.Parameter(torch.empty_like(old, device="meta"), requires_grad=False)

    def extra(self) -> dict[str, Tensor]:
        return self.source.read(self.layout.unknown)

    def extra_specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: self.source.spec(name) for name in self.layout.unknown}

    def fingerprint(self) -> dict[str, Any]:
        return self.source.fingerprint()


class ModuleSubject(Subject):
    """A model in memory, changed in place.

    Raises:
        PlanError: not a transformers model, or its weights are dispatched over devices or offloaded.
    """

    streamed = False

    def __init__(self, model: nn.Module) -> None:
        if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
            raise PlanError(
                f"{type(model).__name__}: not a transformers model (no config); load it with AutoModelForCausalLM"
            )
        devices = {p.device for p in model.parameters()}
        if torch.device("meta") in devices or len({d.type for d in devices}) > 1 or len(devices) > 1:
            raise PlanError(
                "the model's weights are spread over devices or offloaded (device_map): load it without device_map, "
                "or give its folder instead, which is streamed in bounded memory"
            )
        if getattr(model.config, "is_encoder_decoder", False):
            raise PlanError("an encoder-decoder; bitpress compresses decoder language models")
        self.model = model
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.layout = layout(model, names_on_disk(model))
        self.blocks = Blocks(model)
        self._training = [m for m in model.modules() if m.training]
        self.experts = unfuse(model)
        model.eval()
        self.home = next(iter(devices))

    def spec(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        tensor = self._tensor(key)
        return tensor.dtype, tuple(tensor.shape)

    def _tensor(self, key: str) -> Tensor:
        parent, _, leaf = key.rpartition(".")
        tensor = getattr(self.model.get_submodule(parent), leaf)
        assert isinstance(tensor, Tensor)
        return tensor

    def stored(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return {k: self._tensor(k).detach().to("cpu", copy=True) for k in keys}

    def load(self, prefix: str | None, device: torch.device, weights: dict[str, Tensor] | None = None) -> None:
        self.assign(weights or {})
        self._move(prefix, device)

    @torch.no_grad()
    def assign(self, weights: dict[str, Tensor]) -> None:
        """Write tensors into the model, by module tensor name."""
        for key, tensor in weights.items():
            self._tensor(key).copy_(tensor)

    def unload(self, prefix: str | None) -> None:
        self._move(prefix, self.home)

    def _move(self, prefix: str | None, device: torch.device) -> None:
        if device == self.home and prefix is not None and self._tensor(self.keys(prefix)[0]).device == device:
            return
        if prefix is not None:
            self.model.get_submodule(prefix.rstrip(".")).to(device)
            return
        for key in self.keys(None):
            tensor = self._tensor(key)
            tensor.data = tensor.data.to(device)
        for name, buffer in self.model.named_buffers():
            _set_buffer(self.model, name, buffer.to(device))

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for key in sorted(self.layout.disk_of):
            tensor = self._tensor(key).detach().cpu().contiguous()
            digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).reshape(-1).numpy().data)
        return {"module": type(self.model).__name__, "sha256": digest.hexdigest()}

    def close(self) -> None:
        refuse(self.model, self.experts)
        for module in self._training:
            module.training = True


def output_head(model: Any) -> nn.Module | None:
    """The output head of a language model, if it has one."""
    head: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head


def _tied_names(model: nn.Module) -> list[str]:
    """Names of the output head's tensors, which a tied checkpoint need not hold."""
    head = output_head(model)
    return [f"{n}.weight" for n, m in model.named_modules() if m is head]


def _set_tensor(model: nn.Module, key: str, tensor: Tensor, device: torch.device) -> None:
    parent, _, leaf = key.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._buffers:
        old = module._buffers[leaf]
        module._buffers[leaf] = tensor.to(device, None if old is None else old.dtype)
        return
    dtype = module._parameters[leaf].dtype  # type: ignore[union-attr]
    module._parameters[leaf] = nn.Parameter(
        tensor.to(device, dtype, non_blocking=tensor.is_pinned()), requires_grad=False
    )


def _set_buffer(model: nn.Module, name: str, buffer: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._buffers[leaf] = buffer
