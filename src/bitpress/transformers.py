"""Names that scripts written for other tools import: `SparseAutoModelForCausalLM`, `oneshot`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bitpress.oneshot import oneshot

__all__ = ["SparseAutoModelForCausalLM", "oneshot"]


class SparseAutoModelForCausalLM:
    """AutoModelForCausalLM that also loads and decompresses what bitpress writes."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a model; takes the arguments of transformers, and `torch_dtype` for `dtype`.

        A checkpoint in compressed-tensors format comes dense, and its `save_pretrained(dir, save_compressed=True)`
        packs it again with the same scales.
        """
        from transformers import AutoModelForCausalLM

        from bitpress.inspection import is_quantized

        if "torch_dtype" in kwargs:
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        kwargs.setdefault("dtype", "auto")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir() or is_quantized(folder) != "compressed-tensors":
            return AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **kwargs)
        from bitpress.result import reload

        return reload(folder, **kwargs)
