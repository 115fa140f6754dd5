"""Model folders: safetensors in, shards out, index and config.

A folder is read tensor by tensor and never as a whole; every file is written beside its place and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.errors import CheckpointError

DTYPES = {  # in the order in which safetensors lays out a file
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
JOINED = 16 << 20  # bytes that leave a GPU in one copy, of small tensors or a large one
# what a checkpoint carries besides weights, config and index: tokenizer, templates, remote code, licence
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.md", "*.tiktoken", "LICENSE*", "NOTICE*")
NOT_COMPANIONS = (
    "config.json",
    INDEX,
    "pytorch_model.bin.index.json",
    "report.json",
    "quantize_config.json",
    "trainer_state.json",
    "training_args.bin",
    "train_results.json",
    "eval_results.json",
)


class Source:
    """The tensors of a model folder, by name on disk.

    Args:
        folder: a folder with safetensors files.

    Raises:
        CheckpointError: no folder, no safetensors in it (pickles: `bitpress.pickles`), a file cut short, or an
            unknown dtype.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, tuple[Path, torch.dtype, tuple[int, ...]]] = {}
        self.headers: dict[str, bytes] = {}
        for file in weight_files(folder):
            raw, header = read_header(file)
            self.headers[file.name] = raw
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] not in DTYPES:
                    raise CheckpointError(f"{file}: {name} has dtype {entry['dtype']}, which is not supported")
                self.tensors[name] = (file, DTYPES[entry["dtype"]], tuple(entry["shape"]))

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of a tensor."""
        _, dtype, shape = self.tensors[name]
        return dtype, shape

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors by name, in memory of their own (the files are closed again)."""
        return read_tensors(((name, self.tensors[name][0]) for name in names), device)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this folder from another without reading the weights: headers, sizes, times of change."""
        import hashlib

        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name, raw in sorted(self.headers.items()):
            stat = (self.folder / name).stat()
            digest.update(f"{name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
            digest.update(raw)
        return {"folder": str(self.folder.resolve()), "sha256": digest.hexdigest()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those its index names, else all."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a weight index ({error})") from None
        files = [folder / name for name in names]
        if missing := [f.name for f in files if not f.is_file()]:
            raise CheckpointError(f"{folder}: the index names files that are not there: {', '.join(missing)}")
        return files
    whole = folder / "model.safetensors"  # what transformers reads; other files beside it are other forms of the model
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder}: holds GGUF, which is quantized already. Load it with transformers' gguf_file= (which "
            "dequantizes), save_pretrained it, and compress that folder"
        )
    if is_pickled(folder) or any(folder.glob("*.pt*")):
        raise CheckpointError(
            f"{folder}: holds pickle weights, which can run code when read. If you trust them, pass trust_pickle=True "
            "(--trust-pickle), or convert them: "
            f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained(NEW_FOLDER)"
        )
    raise CheckpointError(f"{folder}: no safetensors files in it")


def is_pickled(folder: Path) -> bool:
    """Whether a folder has weights as pickles and as nothing else."""
    return folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))


def read_header(file: Path) -> tuple[bytes, dict[str, Any]]:
    """The header of a safetensors file, raw and parsed; the file's length is checked against it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        raw = stream.read(length) if 0 <= length <= size - 8 else b""
    try:
        header: dict[str, Any] = json.loads(raw)
        ends = [e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file}: not a safetensors file, or cut short: download it again") from None
    if size != 8 + length + max(ends, default=0):
        raise CheckpointError(f"{file}: {size} bytes, but its header asks for {8 + length + max(ends, default=0)}")
    return raw, header


def read_tensors(wanted: Iterable[tuple[str, Path]], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Tensors from (name, file) pairs; each file is mapped only while it is read."""
    by_file: dict[Path, list[str]] = {}
    for name, file in wanted:
        by_file.setdefault(file, []).append(name)
    out: dict[str, Tensor] = {}
    for file, names in by_file.items():
        with opened(file) as get:
            for name in names:
                # a mapped tensor keeps the whole file mapped: copy it
                out[name] = get(name).to(device, copy=True)
    return out


@contextmanager
def opened(file: Path) -> Iterator[Callable[[str], Tensor]]:
    """Within it, the tensors of a safetensors file are had by name: mapped, so to be copied by who keeps them."""
    from safetensors import safe_open

    with safe_open(file, "pt") as held:
        yield held.get_tensor


def on_device(file: Path, device: torch.device) -> Callable[[str], Tensor]:
    """The tensors of a safetensors file by name, on a GPU in one copy: thousands of small ones would each be waited
    for."""
    raw, header = read_header(file)
    start = 8 + len(raw)
    whole = torch.empty(file.stat().st_size - start, dtype=torch.uint8, pin_memory=True)
    with file.open("rb") as stream:
        stream.seek(start)
        stream.readinto(whole.numpy().data)
    there = whole.to(device)

    def get(name: str) -> Tensor:
        entry = header[name]
        begin, end = entry["data_offsets"]
        # int64 are shapes: numbers for Python, for which the device would be waited for
        held = whole if entry["dtype"] == "I64" else there
        return held[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])

    return get


Spec = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def _header(spec: Spec) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file of these dtypes and shapes begins with, and the bytes of its tensors, in their order."""
    rank = {dtype: i for i, dtype in enumerate(CODES)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sizes: dict[str, int] = {}
    offset = 0
    for name in sorted(spec, key=lambda name: (rank[spec[name][0]], name)):
        dtype, shape = spec[name]
        sizes[name] = dtype.itemsize * int(torch.Size(shape).numel())
        end = offset + sizes[name]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, sizes


def file_size(spec: Spec) -> int:
    """Exact bytes of the safetensors file that holds tensors of these dtypes and shapes."""
    raw, sizes = _header(spec)
    return len(raw) + sum(sizes.values())


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file so that it is there whole, on the disk, or not at all.

    The bytes are those of `safetensors.torch.save_file`, which holds the interpreter while it writes: a block at work
    beside it would stand still.
    """
    partial = file.with_suffix(".partial")
    raw, sizes = _header({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    with partial.open("wb") as out:
        out.write(raw)
        for part in _joined(_bytes_of(tensors[name]) for name in sizes):
            for piece in _on_host(part):
                out.write(piece.numpy().data)
    sync(partial)
    os.replace(partial, file)
    sync(file.parent)


def _bytes_of(tensor: Tensor) -> Tensor:
    """Its numbers in order, as bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # of one number: any stride counts as contiguous, but cannot be read as bytes
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _joined(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Small neighbours on a GPU as one: it is waited for once a copy, however small."""
    waiting: list[Tensor] = []
    for part in parts:
        if waiting and (part.device != waiting[0].device or sum(map(len, waiting)) + len(part) > JOINED):
            yield torch.cat(waiting)
            waiting = []
        if part.device.type == "cpu" or len(part) > JOINED:
            yield part
        else:
            waiting.append(part)
    if waiting:
        yield torch.cat(waiting)


def _on_host(part: Tensor) -> Iterator[Tensor]:
    """Its pieces in host memory, each until the next; a GPU's by way of page-locked memory, as a copy to other memory
    is slower and keeps what runs beside it from being launched."""
    if part.device.type == "cpu":
        yield part
        return
    held = torch.empty(min(len(part), JOINED), dtype=torch.uint8, pin_memory=True)
    for piece in part.split(JOINED):  # type: ignore[no-untyped-call]
        copied = held[: len(piece)].copy_(piece, non_blocking=True)
        torch.cuda.current_stream(part.device).synchronize()
        yield copied


def write_text(file: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, file)
    sync(file.parent)


def write_json(file: Path, value: Any) -> None:
    """Write JSON, keys in the given order, whole or not at all."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_index(folder: Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    """The index of all shards: file name -> tensor name -> bytes."""
    weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(n for tensors in shards.values() for n in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, chat template, generation config and the like from one folder to another."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name not in NOT_COMPANIONS:
                shutil.copyfile(file, target / file.name)


def link_checkpoint(source: Path, target: Path, report: Mapping[str, Any]) -> None:
    """Make a finished checkpoint that of another folder too, by hard links where the disk can, config.json last.

    Args:
        report: the target's report.json.
    """
    files = [f for f in sorted(source.iterdir()) if f.is_file() and f.name not in ("config.json", "report.json")]
    for file in [*files, source / "config.json"]:
        if file.name == "config.json":
            write_json(target / "report.json", report)
        partial = target / (file.name + ".partial")
        partial.unlink(missing_ok=True)
        try:
            os.link(file, partial)
        except OSError:
            shutil.copyfile(file, partial)
            sync(partial)
        os.replace(partial, target / file.name)
        partial.unlink(missing_ok=True)  # to rename a link over another one of the same file does nothing
    sync(target)
