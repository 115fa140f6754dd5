"""Pickle weights (`pytorch_model*.bin`), read only where the user trusts them: reading a pickle can run code."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.checkpoint import Source, is_pickled
from bitpress.errors import CheckpointError

INDEX = "pytorch_model.bin.index.json"


class PickleSource(Source):
    """The tensors of a folder of pickle weights, by name on disk.

    A file is mapped and its tensors are copied as they are asked for, so it takes no more memory than safetensors,
    but for files in the format of torch before 1.6, which are read whole each time.

    Attributes:
        ran: names of files that hold more than tensors, so that they were read by running what they say.

    Raises:
        CheckpointError: a file is missing or damaged, or is no mapping of names to tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = {}
        self.headers = {}
        self.ran: list[str] = []
        for file in pickle_files(folder):
            state, ran = _load(file)
            if ran:
                self.ran.append(file.name)
            for name, tensor in state.items():
                self.tensors[name] = (file, tensor.dtype, tuple(tensor.shape))
            spec = {name: [str(t.dtype), list(t.shape)] for name, t in state.items()}
            self.headers[file.name] = hashlib.sha256(json.dumps(spec).encode()).digest()

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name][0], []).append(name)
        out: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            state, _ = _load(file)
            out |= {name: state[name].to(device, copy=True).contiguous() for name in wanted}
        return out


def open_weights(folder: Path, *, trust_pickle: bool) -> Source:
    """The weights of a model folder; pickles only if they are trusted and there is nothing else."""
    return PickleSource(folder) if trust_pickle and is_pickled(folder) else Source(folder)


def pickle_files(folder: Path) -> list[Path]:
    """The files that the index names, else `pytorch_model.bin`."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a weight index ({error})") from None
        if missing := [n for n in names if not (folder / n).is_file()]:
            raise CheckpointError(f"{folder}: the index names files that are not there: {', '.join(missing)}")
        return [folder / n for n in names]
    one = folder / "pytorch_model.bin"
    if one.is_file():
        return [one]
    raise CheckpointError(f"{folder}: no pytorch_model.bin and no {INDEX}; convert its weights to safetensors")


def _load(file: Path) -> tuple[dict[str, Tensor], bool]:
    """Name -> tensor, mapped where the format allows; whether anything but tensors had to be run for it."""
    ran = False
    try:
        state = _unpickle(file, weights_only=True)
    except pickle.UnpicklingError:
        ran = True
        try:
            state = _unpickle(file, weights_only=False)
        except Exception as error:  # a pickle can raise anything
            raise _damaged(file, error) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    tensors = {n: t for n, t in state.items() if isinstance(t, Tensor)} if isinstance(state, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{file}: holds no tensors by name; save a state_dict")
    return tensors, ran


def _unpickle(file: Path, *, weights_only: bool) -> Any:
    import zipfile

    mapped = zipfile.is_zipfile(file)
    try:
        return torch.load(file, map_location="cpu", mmap=mapped, weights_only=weights_only)
    except pickle.UnpicklingError:
        raise
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CheckpointError:
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return CheckpointError(f"{file}: cannot be read, download it again: {first}")
