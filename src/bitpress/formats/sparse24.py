"""2:4 for real: only the two weights that are kept of every four columns, and where they are.

values: int4 codes in int32 words (R, C / 16), or plain weights (R, C / 2) in the model's dtype; positions (R, C / 8)
uint8, two bits a kept weight, its column among the four. With codes also scales (R, G) and, with zero points, zeros
(R, G) int8. That is 3 bits a weight for int4 and 9 for bfloat16, scales apart. Only bitpress reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitpress.checkpoint import Source, read_tensors
from bitpress.errors import CheckpointError, ConfigError, NumericsError
from bitpress.formats import bits
from bitpress.formats.base import CheckpointFormat, Spec, grid_of, kind_of, unknown_error
from bitpress.math.grid import QParams, Solved
from bitpress.math.masks import Structure, holds
from bitpress.schemes import QuantArgs, Scheme

if TYPE_CHECKING:
    from bitpress.sites import Site

TWO_OF_FOUR = Structure(2, 4)
NAME = "sparse-24"


class Sparse24(CheckpointFormat):
    """Pruned weights at the size that their mask allows, for bitpress's own loader."""

    name = NAME
    method = NAME
    sparse = True

    def refusal(self, scheme: Scheme, actorder: str | None) -> str | None:
        args = scheme.weights
        if args.type != "int" or args.num_bits != 4:
            return f"holds int4 and plain weights, not {kind_of(args)}"
        if args.strategy not in ("group", "channel"):
            return f"has one scale a group of columns or a row, not one a {args.strategy}"
        return "has groups of adjacent columns only, not actorder: 'group'" if actorder == "group" else None

    def misfit(self, scheme: Scheme, rows: int, columns: int) -> str | None:
        return f"{columns} input columns are not divisible by 16" if columns % 16 else None

    def describe(self, scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Spec:
        groups = grid_of(scheme, dtype).groups(columns)
        spec: Spec = {
            "values": (torch.int32, (rows, columns // 16)),
            "positions": (torch.uint8, (rows, columns // 8)),
            "scales": (dtype, (rows, groups)),
        }
        return spec if scheme.weights.symmetric else spec | {"zeros": (torch.int8, (rows, groups))}

    def describe_plain(self, rows: int, columns: int, dtype: torch.dtype) -> Spec:
        return {"values": (dtype, (rows, columns // 2)), "positions": (torch.uint8, (rows, columns // 8))}

    def pack(self, solved: Solved, scheme: Scheme) -> dict[str, Tensor]:
        codes, qparams = solved.quantized
        values, positions = squeezed(codes, solved.dense() != 0)
        tensors = {"values": bits.pack(values, 4), "positions": positions, "scales": qparams.scale.contiguous()}
        return tensors if qparams.zero_point is None else tensors | {"zeros": qparams.zero_point.contiguous()}

    def pack_plain(self, weight: Tensor) -> dict[str, Tensor]:
        values, positions = squeezed(weight, weight != 0)
        return {"values": values, "positions": positions}

    def unpack(self, tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Solved:
        scale, zero = tensors["scales"], tensors.get("zeros")
        columns = 8 * tensors["positions"].shape[1]
        kept = bits.unpack(tensors["values"], 4, columns // 2)
        each = columns // scale.shape[1]
        empty = torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero
        codes = spread(kept, tensors["positions"], empty.repeat_interleave(each, 1))
        return Solved(codes, QParams(scale, zero), unknown_error())

    def settings(self, sites: Sequence[Site], ignored: Sequence[str], cache: QuantArgs | None) -> dict[str, Any] | None:
        groups: dict[str, dict[str, Any]] = {}
        for site in sites:
            weights = None if site.scheme is None else site.scheme.weights.to_dict()
            entry = groups.setdefault(json.dumps(weights), {"targets": [], "weights": weights})
            entry["targets"].append(site.name)
        named = {f"group_{i}": group for i, group in enumerate(groups.values())}
        # without a quant_method transformers refuses it; one that it does not know it leaves out, and weights with it
        return {"format": NAME, "config_groups": named, "ignore": list(ignored)} if named else None


class Sparse24Source(Source):
    """The tensors of a folder in this format, a dense `weight` in place of those of each linear."""

    def __init__(self, folder: Path, groups: Iterable[dict[str, Any]], dtype: torch.dtype) -> None:
        super().__init__(folder)
        self.parts = dict(self.tensors)
        for group in groups:
            for name in group["targets"]:
                file, _, (rows, eighths) = self.tensors[f"{name}.positions"]
                for suffix in ("values", "positions", "scales", "zeros"):
                    self.tensors.pop(f"{name}.{suffix}", None)
                self.tensors[f"{name}.weight"] = (file, dtype, (rows, 8 * eighths))

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        wanted = list(names)
        out = read_tensors(((n, self.parts[n][0]) for n in wanted if n in self.parts), device)
        return out | {n: self.dense(n.removesuffix(".weight"), device) for n in wanted if n not in self.parts}

    def dense(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A linear's weight (R, C)."""
        suffixes = [s for s in ("values", "positions", "scales", "zeros") if f"{name}.{s}" in self.parts]
        read = read_tensors(((f"{name}.{s}", self.parts[f"{name}.{s}"][0]) for s in suffixes), device)
        tensors = {s: read[f"{name}.{s}"] for s in suffixes}
        if "scales" not in tensors:
            zeros = torch.zeros((), dtype=tensors["values"].dtype, device=tensors["values"].device)
            return spread(tensors["values"], tensors["positions"], zeros)
        scale, zero = tensors["scales"], tensors.get("zeros")
        args = QuantArgs(num_bits=4, symmetric=zero is None, strategy="channel")
        return Sparse24().unpack(tensors, Scheme(name=None, weights=args), scale.dtype).dense()


def open_sparse(folder: Path, dtype: torch.dtype) -> tuple[Sparse24Source, set[str]]:
    """A checkpoint in this format, and the names of its pruned linears.

    Raises:
        CheckpointError: config.json does not name them.
    """
    from bitpress.inspection import read_config

    groups = (read_config(folder).get("quantization_config") or {}).get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) and g.get("targets") for g in groups.values()):
        raise CheckpointError(f"{folder}: config.json does not say which linears are stored 2:4; write it again")
    return Sparse24Source(folder, groups.values(), dtype), {n for g in groups.values() for n in g["targets"]}


def squeezed(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The two kept numbers of every four columns (R, C / 2), in their order, and where they were (R, C / 8).

    Raises:
        NumericsError: more than two are kept somewhere.
    """
    if not holds(keep.float(), TWO_OF_FOUR):
        raise NumericsError("is not 2:4, so it cannot be stored so; prune it to 2:4 first, or add it to ignore")
    R, C = x.shape
    # kept ones first, then by column: of fewer than two, zeros fill up
    order = torch.argsort((~keep.reshape(R, -1, 4)).to(torch.uint8), dim=-1, stable=True)[..., :2].sort(-1).values
    values = x.reshape(R, -1, 4).gather(-1, order)
    pairs = (order[..., 0] | (order[..., 1] << 2)).to(torch.uint8).reshape(R, -1, 2)
    return values.reshape(R, C // 2).contiguous(), (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous()


def spread(values: Tensor, positions: Tensor, empty: Tensor) -> Tensor:
    """The inverse of `squeezed`: (R, C), with `empty`, (R, C) or one number, where nothing is kept."""
    R, C = len(values), 2 * values.shape[1]
    nibbles = torch.stack([positions & 15, positions >> 4], -1).reshape(R, -1)
    order = torch.stack([nibbles & 3, nibbles >> 2], -1).long()
    out = empty.expand(R, C).reshape(R, -1, 4).clone()
    return out.scatter_(-1, order, values.reshape(R, -1, 2)).reshape(R, C)


def check_semi_structured() -> None:
    """ConfigError where torch has no semi-structured tensors."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise ConfigError("semi_structured: needs an NVIDIA GPU of compute capability 8.0 or later; leave it out")


def semi_structured(model: torch.nn.Module) -> int:
    """Move a model to the GPU and make the weights of its 2:4 linears torch's semi-structured tensors, to run it.

    Returns:
        How many; those whose shape or dtype torch does not take stay dense.

    Raises:
        ConfigError: no GPU that can, or no linear that is 2:4.
    """
    from torch.sparse import to_sparse_semi_structured

    check_semi_structured()
    model.to("cuda")
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    pruned = [m for m in linears if m.in_features % 4 == 0 and holds(m.weight.detach(), TWO_OF_FOUR)]
    if not pruned:
        raise ConfigError("semi_structured: no linear of this model is pruned 2:4; leave it out")
    made = 0
    for linear in pruned:
        rows, columns = linear.weight.shape
        if rows % 32 or columns % 64 or linear.weight.dtype not in (torch.bfloat16, torch.float16):
            continue
        sparse = to_sparse_semi_structured(linear.weight.data)
        linear.weight = torch.nn.Parameter(sparse, requires_grad=False)
        made += 1
    return made
