"""What every checkpoint format is, and the grid that a scheme's weights lie on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitpress.math.grid import Grid, Solved, Values
from bitpress.schemes import BLOCKWISE, QuantArgs, Scheme

if TYPE_CHECKING:
    from bitpress.sites import Site

FLOATS: dict[int, Values] = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor suffix -> dtype, shape


class CheckpointFormat:
    """How the linears of a checkpoint lie on disk, and what config.json says of them. One instance a name.

    Attributes:
        name: what `--format` calls it.
        method: `quant_method` in config.json; None: it has no entry there.
        activations: whether it can say that inputs are rounded.
        mixed: whether linears may differ in scheme.
        rounds: whether what is read back may differ from what was packed by rounding.
        sparse: whether linears that are pruned 2:4 and not quantized are packed too.
        one_file: whether `complete` makes the checkpoint of finished shards; else they are its files.
    """

    name: str = ""
    method: str | None = None
    activations: bool = False
    mixed: bool = True
    rounds: bool = False
    one_file: bool = False
    sparse: bool = False

    def refusal(self, scheme: Scheme, actorder: str | None) -> str | None:
        """Why it cannot hold a scheme without rounding again, None if it can."""
        return None

    def misfit(self, scheme: Scheme, rows: int, columns: int) -> str | None:
        """Why it cannot hold a linear of this shape, None if it can."""
        return None

    def unfit(self, config: Any, folder: Path | None, dtype: torch.dtype, quantized: bool) -> list[str]:
        """Why it cannot hold a model with this configuration, of this folder (None: in memory).

        Args:
            dtype: of the model, in which scales are stored.
            quantized: whether any of its linears is.
        """
        return []

    def together(self, sites: Sequence[Site], ignored: Sequence[str]) -> list[str]:
        """What is wrong with the linears of one checkpoint together."""
        return []

    def describe(self, scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Spec:
        """Tensors that a linear is stored as: suffix -> (dtype, shape)."""
        raise NotImplementedError

    def pack(self, solved: Solved, scheme: Scheme) -> dict[str, Tensor]:
        """A solved linear as tensors, by suffix."""
        raise NotImplementedError

    def unpack(self, tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Solved:
        """What `pack` stored of a model of `dtype`. Its `error` is NaN: the checkpoint does not hold it."""
        raise NotImplementedError

    def describe_plain(self, rows: int, columns: int, dtype: torch.dtype) -> Spec:
        """`describe` of a linear that is 2:4 and not quantized; only where `sparse`."""
        raise NotImplementedError

    def pack_plain(self, weight: Tensor) -> dict[str, Tensor]:
        """`pack` of such a linear."""
        raise NotImplementedError

    def settings(self, sites: Sequence[Site], ignored: Sequence[str], cache: QuantArgs | None) -> dict[str, Any] | None:
        """The `quantization_config` of config.json.

        Args:
            sites: all quantized linears.
            ignored: names on disk and in memory of the linear-like modules that stay as they are.
            cache: how the cache of keys and values is quantized.
        """
        return None

    def complete(self, folder: Path, files: Sequence[Path], config: Any) -> None:
        """Make the checkpoint in `folder`, which has the tokenizer, of finished shards; only where `one_file`."""
        raise NotImplementedError

    def files(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """JSON files that clients look for beside config.json, by name."""
        return {}


def kind_of(args: QuantArgs) -> str:
    """Codes in a word: `int4`, `float8`, `nf4`."""
    return args.type if args.type in BLOCKWISE else f"{args.type}{args.num_bits}"


def grid_of(scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The grid of the weights of a scheme, for a model of `dtype`."""
    args = scheme.weights
    rows, columns = args.block_structure or (1, args.group_size)
    return Grid(
        bits=args.num_bits,
        symmetric=args.symmetric,
        group_size=columns,
        per_tensor=args.strategy == "tensor",
        scale_dtype=dtype,
        values="int" if args.type == "int" else FLOATS[args.num_bits],  # bitsandbytes' types ask it for no values
        scales="two-level" if args.strategy == "tensor_group" else "power of two" if args.scale_dtype else "free",
        block_rows=rows,
        # vLLM's Marlin kernel reads the sign of a group's scale as part of the number where inputs are int8
        signed=scheme.input_activations is None or scheme.input_activations.type != "int",
    )


def describe_inputs(scheme: Scheme, dtype: torch.dtype) -> Spec:
    """What calibration data tell about the inputs, stored beside the weight."""
    inputs = scheme.input_activations
    if inputs is None or inputs.dynamic is True:
        return {}
    if inputs.dynamic == "local":
        return {"input_global_scale": (torch.float32, (1,))}
    spec: Spec = {"input_scale": (dtype, (1,))}
    return spec if inputs.symmetric else spec | {"input_zero_point": (torch.int8, (1,))}


def beside(tensors: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that `describe_inputs` names."""
    return {name: tensors[name] for name in describe_inputs(scheme, dtype)}


def unknown_error() -> Tensor:
    """The error of a linear that was read: no checkpoint holds it."""
    return torch.tensor(float("nan"))
