"""What a model folder holds, read from its configuration and its safetensors headers alone.

Tensor names decide which linears are quantized, config.json decides how; where it is silent the shapes tell.
The name of the folder is the last hint. No weight is read, only the few bytes of stored shapes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitpress.errors import CheckpointError, counted
from bitpress.recognise import (
    FLOATS,
    METHODS,
    QuantizedLayer,
    Stored,
    cache_of,
    config_groups_of,
    is_note,
    read_layer,
    scale_of,
    tensor_method,
)

UNFINISHED = "unfinished bitpress run: run the same command again to go on, or delete the folder"
_JOURNAL = Path(".bitpress") / "journal.jsonl"
_SHARD_OF = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAME_HINT = re.compile(r"[-_.](awq|gptq|gguf|[48]-?bit)([-_.]int[48])?$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        method: "dense", "compressed-tensors", "gptq", "awq", "bitsandbytes", "fp8", "gguf", "unfinished",
            "unknown" (weights that are not read), or the quant_method of a library that is not read here.
        layers: the quantized linears in the order of their names.
        parameters: logical parameters: a packed linear counts rows x columns.
        bytes: all tensors as stored.
        bits_per_weight: average over the quantized linears, scales and zero points included, or None.
        bits_per_parameter: average over everything stored; None if nothing was read.
        ignored: modules that the configuration leaves unquantized.
        cache: how keys and values are quantized in the cache, such as "float8 tensor sym static"; None if not.
        pruned: what the run's report.json says of linears with a mask, such as "14 linears, 50.0 % zeros, 2:4"; None
            if there are none. Zeros themselves are not counted.
        messages: what is odd, and what to do about it.
    """

    path: str
    method: str
    finished: bool = True
    format: str | None = None
    model_type: str | None = None
    architectures: tuple[str, ...] = ()
    dtype: str | None = None
    layers: tuple[QuantizedLayer, ...] = ()
    parameters: int = 0
    bytes: int = 0
    ignored: tuple[str, ...] = ()
    cache: str | None = None
    pruned: str | None = None
    tied_embeddings: bool = False
    has_recipe: bool = False
    has_report: bool = False
    shards: int = 0
    messages: tuple[str, ...] = ()

    @property
    def quantized_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float | None:
        weights = sum(layer.rows * layer.columns for layer in self.layers)
        return 8 * self.quantized_bytes / weights if weights else None

    @property
    def bits_per_parameter(self) -> float | None:
        return 8 * self.bytes / self.parameters if self.parameters else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every field and every derived figure."""
        out = asdict(self) | {
            "quantized_bytes": self.quantized_bytes,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_parameter": self.bits_per_parameter,
        }
        out["layers"] = [asdict(layer) | {"bits_per_weight": layer.bits_per_weight} for layer in self.layers]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in out.items()}


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Say what a model folder (or a GGUF file) holds, without reading its weights.

    Raises:
        CheckpointError: no such folder, not a checkpoint, an unreadable config.json, a shard that is missing
            or cut short. An unfinished run is no error: its method is "unfinished".
    """
    folder = Path(path)
    if folder.is_file() and folder.suffix == ".gguf":
        return _inspect_gguf(folder, [folder])
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder; give one with config.json, or a .gguf file")
    safetensors = any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and not safetensors and not (folder / _JOURNAL).is_file():
        return _inspect_gguf(folder, ggufs)
    if not (folder / "config.json").is_file():
        return _inspect_unfinished(folder)
    config = read_config(folder)
    if not safetensors and (pickles := sorted(folder.glob("*model*.bin"))):
        return Inspection(
            **_described(folder, config),
            method=_config_method(config) or _name_hint(folder.resolve().name) or "unknown",
            bytes=sum(f.stat().st_size for f in pickles),
            shards=len(pickles),
            messages=("pickle weights (*.bin) are not read: convert them to safetensors to see inside",),
        )
    return _inspect_safetensors(folder, config)


def is_quantized(source: str | Path | Mapping[str, Any] | Any) -> str | None:
    """The quantization method of a model, or None for a dense one.

    Args:
        source: a folder, a GGUF file, a configuration (a mapping or transformers' object), or a model id
            that is not on disk, where the name alone is judged.

    Raises:
        CheckpointError: a folder that is not a checkpoint, or that an unfinished run left behind.
    """
    if not isinstance(source, str | Path):
        return _config_method(source if isinstance(source, Mapping) else source.to_dict())
    if not Path(source).exists():
        return _name_hint(str(source))
    if (Path(source) / "config.json").is_file() and (named := _config_method(read_config(Path(source)))):
        return named
    found = inspect_checkpoint(source)
    if not found.finished:
        raise CheckpointError(f"{source}: {UNFINISHED}")
    return None if found.method in ("dense", "unknown") else found.method


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        CheckpointError: it is not there, or not a JSON object.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); copy it again from its source") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object; copy it again from its source")
    return config


def _inspect_unfinished(folder: Path) -> Inspection:
    """A folder without config.json: an unfinished run, which journals before it writes, or no checkpoint."""
    if (folder / _JOURNAL).is_file():
        shards = len(list(folder.glob("*.safetensors")))
        return Inspection(path=str(folder), method="unfinished", finished=False, shards=shards, messages=(UNFINISHED,))
    below = ", ".join(sorted(f.parent.name for f in folder.glob("*/config.json")))
    remedy = f"did you mean a folder in it: {below}?" if below else "give the folder that holds one"
    raise CheckpointError(f"{folder}: not a checkpoint, it has no config.json; {remedy}")


def _described(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an Inspection that configuration and file names give."""
    text = _text_config(config)
    settings = _settings(config)
    ignored = settings.get("ignore") or settings.get("modules_to_not_convert")
    groups = config_groups_of(settings)
    formats = dict.fromkeys(str(g["format"]) for g in groups if g.get("format"))
    keys = ("format", "checkpoint_format", "bnb_4bit_quant_type")
    format_ = next((settings[key] for key in keys if settings.get(key)), None)
    dtype = next((c[key] for c in (config, text) for key in ("dtype", "torch_dtype") if c.get(key)), None)
    return {
        "path": str(folder),
        "format": ", ".join(formats) if formats and format_ in (None, "mixed-precision") else format_,
        "model_type": config.get("model_type"),
        "architectures": tuple(config.get("architectures") or ()),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "ignored": tuple(ignored or settings.get("llm_int8_skip_modules") or ()),
        "cache": cache_of(settings),
        "pruned": _pruned(folder),
        "tied_embeddings": bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        "has_recipe": (folder / "recipe.yaml").is_file(),
        "has_report": (folder / "report.json").is_file(),
    }


def _pruned(folder: Path) -> str | None:
    """What the last stage of a run reports of each linear that has a mask."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        rows = {row["name"]: row for row in report["layers"]}.values()
        masked = [(row["mask"], float(row["sparsity"])) for row in rows if row["mask"]]
    except (OSError, ValueError, KeyError, TypeError):  # none, or another program's
        return None
    if not masked:
        return None
    masks = ", ".join(dict.fromkeys(mask for mask, _ in masked))
    return f"{counted(len(masked), 'linear')}, {sum(share for _, share in masked) / len(masked):.1%} zeros, {masks}"


def declared_dtype(found: Inspection) -> str | None:
    """The dtype of a model's plain weights, as its configuration or its files say."""
    return found.dtype if found.dtype in _DTYPES.values() else None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization settings, wherever this release of the writer put them; empty for a dense model."""
    for place in (config, _text_config(config)):
        for key in ("quantization_config", "compression_config", "quantization"):
            found: Any = place.get(key)
            if hasattr(found, "to_dict"):
                found = found.to_dict()
            if isinstance(found, Mapping) and found and (key != "quantization" or "bits" in found):
                default = {"quantization": "mlx", "compression_config": "compressed-tensors"}.get(key)
                return {"quant_method": default} | dict(found)
    return {}


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a configuration for several kinds of input."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else {}


def _config_method(config: Mapping[str, Any]) -> str | None:
    settings = _settings(config)
    if not settings:
        return None
    method = settings.get("quant_method")
    if method is None and settings.get("format") == METHODS[-1]:
        return METHODS[-1]
    if method is None:
        by_key = {"load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes", "config_groups": METHODS[0]}
        return next((name for key, name in by_key.items() if settings.get(key)), "unnamed")
    return str(getattr(method, "value", method)).replace("_", "-").lower()


def _name_hint(name: str) -> str | None:
    found = _NAME_HINT.search(name)
    if found is None:
        return None
    word = found[1].lower()
    return word if word in ("awq", "gptq", "gguf") else "bitsandbytes"


def _inspect_safetensors(folder: Path, config: dict[str, Any]) -> Inspection:
    from bitpress.checkpoint import read_tensors, weight_files

    files = weight_files(folder)
    modules = _modules(files)
    notes = read_tensors(
        (f"{module}.{part}", stored.file)
        for module, parts in modules.items()
        for part, stored in parts.items()
        if is_note(part)
    )
    settings = _settings(config)
    named, by_tensors = _config_method(config), tensor_method(modules)
    layers: list[QuantizedLayer] = []
    parameters = 0
    for module in sorted(modules, key=_natural):
        parts = modules[module]
        # A library that is not known here may mean something else by the same names.
        layer = read_layer(module, parts, settings, notes) if named in (None, *METHODS) else None
        if layer is None:
            parameters += sum(math.prod(stored.shape) for stored in parts.values())
        else:
            layers.append(layer)
            bias = parts.get("bias")
            parameters += layer.rows * layer.columns + (math.prod(bias.shape) if bias else 0)
    described = _described(folder, config)
    dtypes = Counter(t.dtype for parts in modules.values() for t in parts.values() if t.dtype in FLOATS)
    if described["dtype"] is None and dtypes:
        described["dtype"] = _DTYPES[dtypes.most_common(1)[0][0]]
    return Inspection(
        **described,
        method=named or by_tensors or "dense",
        layers=tuple(layers),
        parameters=parameters,
        bytes=sum(stored.bytes for parts in modules.values() for stored in parts.values()),
        shards=len(files),
        messages=tuple(_oddities(folder, named, by_tensors, modules)),
    )


def _modules(files: list[Path]) -> dict[str, dict[str, Stored]]:
    """Tensors by module and by the rest of their names: `a.weight.absmax` is "weight.absmax" of `a`."""
    from bitpress.checkpoint import read_header

    modules: dict[str, dict[str, Stored]] = {}
    for file in files:
        for name, entry in read_header(file)[1].items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            module, below, part = name.partition(".weight.")
            if below:
                part = "weight." + part
            else:
                module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = Stored(file, entry["dtype"], tuple(entry["shape"]), end - begin)
    return modules


def _oddities(
    folder: Path, named: str | None, by_tensors: str | None, modules: Mapping[str, Mapping[str, Stored]]
) -> Iterator[str]:
    """Where configuration, tensors and the folder's name disagree."""
    if named is not None and named not in METHODS:
        yield f"quant_method '{named}' is not one that bitpress reads: its layers are not listed"
    elif named is not None and by_tensors is None and cache_of(_settings(read_config(folder))) is None:
        yield f"config.json says {named}, but no tensor is quantized"
    elif named is None and by_tensors is not None:
        yield f"config.json names no quantization, but tensors are stored as {by_tensors} stores them"
    elif by_tensors is None and (hint := _name_hint(folder.resolve().name)):
        yield f"the folder's name says {hint}, but neither config.json nor the tensors do"
    if any(scale_of(parts) and "weight" in parts and parts["weight"].dtype in FLOATS for parts in modules.values()):
        yield "quantized weights are stored dense beside their scales"


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _inspect_gguf(path: Path, files: list[Path]) -> Inspection:
    """GGUF names its tensor types itself; the optional gguf package reads them."""
    if len({_SHARD_OF.sub("", f.name) for f in files}) > 1:
        names = ", ".join(f.name for f in files)
        raise CheckpointError(f"{path}: holds several GGUF models; give one of the files {names}")
    size = sum(f.stat().st_size for f in files)
    try:
        import gguf
    except ImportError:
        remedy = "install the gguf package to see what it holds: pip install --no-deps gguf"
        return Inspection(path=str(path), method="gguf", bytes=size, shards=len(files), messages=(remedy,))
    layers, parameters, stored, architecture = [], 0, 0, None
    for file in files:
        try:
            reader = gguf.GGUFReader(file)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise CheckpointError(f"{file}: not a GGUF file, or cut short ({error}); download it again") from None
        if (named := reader.get_field("general.architecture")) is not None:
            architecture = str(named.contents())
        for tensor in reader.tensors:
            parameters += int(tensor.n_elements)
            stored += int(tensor.n_bytes)
            block = int(gguf.GGML_QUANT_SIZES[tensor.tensor_type][0])
            if block > 1:
                layers.append(_gguf_layer(tensor, block))
    kinds = Counter(layer.scheme for layer in layers)
    return Inspection(
        path=str(path),
        method="gguf",
        format=kinds.most_common(1)[0][0] if kinds else None,
        model_type=architecture,
        layers=tuple(layers),
        parameters=parameters,
        bytes=stored,
        shards=len(files),
    )


def _gguf_layer(tensor: Any, block: int) -> QuantizedLayer:
    kind, columns = tensor.tensor_type.name, int(tensor.shape[0])
    bits = re.search(r"\d+", kind)
    return QuantizedLayer(
        name=tensor.name.removesuffix(".weight"),
        rows=int(tensor.n_elements) // columns,
        columns=columns,
        scheme=kind,
        num_bits=int(bits[0]) if bits else 0,
        group_size=block,
        strategy="group",
        symmetric=None,
        activations=None,
        bytes=int(tensor.n_bytes),
    )
