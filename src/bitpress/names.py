"""Names on disk and names in memory.

transformers renames and fuses tensors when it loads a checkpoint (GPT-NeoX `embed_out` becomes `lm_head`, Mixtral's
`block_sparse_moe.experts.1.w1` becomes a slice of `mlp.experts.gate_up_proj`). Sites, reports and outputs use the
names on disk, so this file, alone, asks transformers for its mapping and turns it around.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitpress.errors import PlanError
from bitpress.experts import LEAVES

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a checkpoint belongs.

    Attributes:
        disk_of: module tensor name (experts unfused: `...experts.3.gate_proj.weight`) -> name on disk.
        unknown: names on disk that the model has no place for; they are carried over unread.
    """

    disk_of: dict[str, str]
    unknown: tuple[str, ...]


def layout(model: nn.Module, disk_names: Iterable[str]) -> Layout:
    """The layout of a checkpoint with these tensors for a model whose experts are still fused.

    Raises:
        PlanError: a tensor on disk is split or merged in a way other than the unfusing of experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", None)
    disk_of: dict[str, str] = {}
    unknown, odd = [], []
    for disk in sorted(disk_names):
        target, pattern = rename_source_key(disk, renamings, converters, prefix, state)
        if target not in state:
            unknown.append(disk)
        elif pattern is None:
            disk_of[target] = disk
        elif (name := _expert_name(disk, target, pattern, converters)) is not None:
            disk_of[name] = disk
        else:
            odd.append(f"{disk}: transformers converts this tensor into {target}, which bitpress cannot follow yet")
    if odd:
        raise PlanError(odd[:5])
    return Layout(disk_of, tuple(unknown))


def _expert_name(disk: str, target: str, pattern: str, converters: list[Any]) -> str | None:
    """`...experts.3.gate_proj.weight` for an expert's tensor on disk, None if it is something else."""
    found = _EXPERT.search(disk)
    parent, _, leaf = target.rpartition(".")
    converter = next(c for c in converters if pattern in c.source_patterns)
    sources = list(converter.source_patterns)
    if found is None or (leaf, len(sources)) not in (("gate_up_proj", 2), ("down_proj", 1)):
        return None
    part = LEAVES[sources.index(pattern)] if leaf == "gate_up_proj" else LEAVES[2]
    return f"{parent}.{found.group(1)}.{part}.weight"


def names_on_disk(model: nn.Module) -> list[str]:
    """The names under which transformers would save a model in memory, each tied tensor once."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    seen: set[int] = set()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return list(revert_weight_conversion(model, state))
