"""Names that scripts written for other tools import: `SparseAutoModelForCausalLM`, `oneshot`, `train` and so on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bitpress.apply import apply, compress
from bitpress.oneshot import oneshot
from bitpress.train import train

__all__ = ["SparseAutoModelForCausalLM", "apply", "compress", "oneshot", "train"]


# what says where on the hub files lie
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")


class SparseAutoModelForCausalLM:
    """AutoModelForCausalLM that also loads and decompresses what bitpress writes."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a model; takes the arguments of transformers, and `torch_dtype` for `dtype`.

        A checkpoint in a format that bitpress writes comes with dense weights, and its
        `save_pretrained(dir, save_compressed=True)` packs it again with the same scales. Activations and caches are not
        rounded; transformers' own class does that. All else, schemes that bitpress does not read too, is left to
        transformers. With `semi_structured=True` linears that are 2:4, in any format, become torch's semi-structured
        tensors on the GPU: to run the model, not to save it.
        """
        if not kwargs.pop("semi_structured", False):
            return cls._loaded(pretrained_model_name_or_path, kwargs)
        from bitpress.formats.sparse24 import check_semi_structured, semi_structured

        check_semi_structured()
        model = cls._loaded(pretrained_model_name_or_path, kwargs)
        semi_structured(model)
        return model

    @staticmethod
    def _loaded(pretrained_model_name_or_path: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
        from transformers import AutoModelForCausalLM

        from bitpress.formats import DEFAULT
        from bitpress.inspection import is_quantized
        from bitpress.reading import reload

        ggufs = sorted(Path(pretrained_model_name_or_path).glob("*.gguf"))
        if len(ggufs) == 1 and is_quantized(pretrained_model_name_or_path) == "gguf" and "gguf_file" not in kwargs:
            if (Path(pretrained_model_name_or_path) / "config.json").is_file():
                return reload(pretrained_model_name_or_path, **kwargs)
            kwargs["gguf_file"] = ggufs[0].name
        if "torch_dtype" in kwargs:
            kwargs.setdefault("dtype", kwargs["torch_dtype"])
            del kwargs["torch_dtype"]
        kwargs.setdefault("dtype", "auto")
        place = Path(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in HUB if key in kwargs}
        folder = place if place.is_dir() else _cached_config(os.fspath(pretrained_model_name_or_path), hub)
        if folder is not None and not place.is_dir() and is_quantized(folder) not in (None, DEFAULT):
            folder = _fetched(os.fspath(pretrained_model_name_or_path), hub)  # its tensors tell the schemes
        if folder is None or kwargs.get("subfolder") or not _reloads(folder):
            return AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if not place.is_dir():
            place = _fetched(os.fspath(pretrained_model_name_or_path), hub)
        return reload(place, **kwargs)


def _reloads(folder: Path) -> bool:
    """Whether the configuration in a folder is of a checkpoint that `reading.reload` reads."""
    from bitpress.errors import CheckpointError
    from bitpress.inspection import is_quantized
    from bitpress.reading import described

    method = is_quantized(folder)
    if method in (None, "sparse-24"):
        return method is not None
    try:
        described(folder)
    except CheckpointError:
        return False
    return True


def _cached_config(name: str, hub: dict[str, Any]) -> Path | None:
    """The folder of the hub's cache with a model's config.json; None where transformers shall say what is wrong."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", **hub)).parent
    except Exception:  # the hub raises many unrelated types
        return None


def _fetched(name: str, hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    from bitpress.subject import locate

    return Path(snapshot_download(name, ignore_patterns=list(PICKLES), **hub)) if hub else locate(name)
