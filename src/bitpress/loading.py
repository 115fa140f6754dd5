"""Checkpoints as transformers models that run, and their tokenizers."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.devices import pick_device
from bitpress.errors import CheckpointError, ConfigError, counted, did_you_mean
from bitpress.inspection import UNFINISHED, Inspection, inspect_checkpoint, read_config

if TYPE_CHECKING:
    from torch import nn

DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(
    path: str | os.PathLike[str],
    dtype: str = "float32",
    device: str = "auto",
    *,
    trust_remote_code: bool = False,
    trust_pickle: bool = False,
) -> nn.Module:
    """A checkpoint as a transformers model in evaluation mode, compressed-tensors decompressed.

    Args:
        path: a folder, a hub id, a GGUF file, or a `bitpress.result.SavedModel`.

    Raises:
        ConfigError: an unknown dtype, or a device that is not there.
        CheckpointError: no finished checkpoint, pickle weights that are not trusted, weights that the
            files lack, or a package that the format needs and that is not installed.
    """
    model: nn.Module = load_checkpoint(open_checkpoint(path, trust_pickle), dtype, device, trust_remote_code)
    return model


def open_checkpoint(path: Any, trust: bool) -> Inspection:
    """What a folder (or a hub id, fetched to the hub's cache) holds, if it can be loaded.

    Raises:
        ConfigError: it is no place.
        CheckpointError: no finished checkpoint, or pickle weights that are not trusted.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"expected a folder, a hub id, a GGUF file or a model in memory, got {path!r}")
    path = os.fspath(path)
    if not Path(path).exists():
        from bitpress.subject import locate

        path = locate(path, trust_pickle=trust)
    found = inspect_checkpoint(path)
    if not found.finished:
        raise CheckpointError(f"{path}: {UNFINISHED}")
    if found.method != "gguf" and not found.parameters and not trust:
        raise CheckpointError(
            f"{path}: pickle weights can run code when read; pass trust_pickle (--trust-pickle) if you trust them, "
            "or convert them to safetensors"
        )
    return found


def load_checkpoint(found: Inspection, dtype: str, device: str, trust: bool, notes: list[str] | None = None) -> Any:
    """The model of an inspected checkpoint; see `load_model`.

    Args:
        notes: is given what is to be said about how it was loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    on = check_options(dtype, device)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if found.method == "compressed-tensors" and _is_uniform(found):
        options["quantization_config"] = _decompressing()
    if on.type != "cpu":
        options["device_map"] = {"": on}
    folder, gguf_file = _place(found)
    if gguf_file:
        options["gguf_file"] = gguf_file
    if gguf_file and (Path(folder) / "config.json").is_file():  # transformers takes part of it from the file, wrongly
        return _reloaded(found, options["dtype"], on, trust, None)
    if found.method == "sparse-24":
        return _reloaded(found, options["dtype"], on, trust, None)
    own = found.method not in ("dense", "gguf") and _own_loader(Path(folder))
    # other formats need a package of their own in transformers, and kernels that round in their own way
    if own and found.method != "compressed-tensors":
        return _reloaded(found, options["dtype"], on, trust, None)
    if own and (_misread_experts(found) or _rounded_experts(found) or _mixed_experts(found)):
        return _reloaded(found, options["dtype"], on, trust, notes)
    try:
        with _quiet(reports=own):
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=trust, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )  # so that mismatches are told, below
    except (OSError, ValueError, ImportError, RuntimeError, LookupError, AttributeError) as error:
        if own:
            return _reloaded(found, options["dtype"], on, trust, notes)
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        remedy = "; with the model's own config.json beside the file bitpress reads it itself" if gguf_file else ""
        raise CheckpointError(f"{found.path}: transformers cannot load it: {first}{remedy}") from error
    if own and (info["missing_keys"] or info["mismatched_keys"]):
        return _reloaded(found, options["dtype"], on, trust, notes)
    _check_whole(found.path, info)
    if found.method == "compressed-tensors":
        with _quiet(reports=False):
            _decompress(model)
        _cast(model, options["dtype"])
    return model.eval()


def _check_whole(path: str, info: Mapping[str, Any]) -> None:
    """CheckpointError if transformers has filled in what the files lack, or hold in another shape."""
    lacking, odd = sorted(map(str, info["missing_keys"])), sorted(info["mismatched_keys"])
    what = [f"{counted(len(lacking), 'weight')} missing from its files ({', '.join(lacking[:5])})"] if lacking else []
    if odd:
        some = ", ".join(f"{name} is {_by(held)}, by its config.json {_by(meant)}" for name, held, meant in odd[:5])
        what.append(f"{counted(len(odd), 'weight')} of another shape ({some})")
    if what:
        raise CheckpointError(f"{path}: {' and '.join(what)}; download or write it again")


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _own_loader(folder: Path) -> bool:
    """Whether bitpress reads it by itself."""
    from bitpress.reading import described

    try:
        described(folder)
    except CheckpointError:
        return False
    return True


def _rounded_experts(found: Inspection) -> bool:
    """Whether experts round their inputs, which transformers leaves out."""
    from bitpress.reading import modifier_of

    groups = modifier_of(Path(found.path)).groups()
    inside = any(".experts." in layer.name for layer in found.layers)
    return inside and any(g.scheme.input_activations is not None for g in groups)


def _mixed_experts(found: Inspection) -> bool:
    """Whether experts differ in scheme: transformers reads all of them by one."""
    mine = (layer for layer in found.layers if ".experts." in layer.name)
    return len({(x.scheme, x.num_bits, x.strategy, x.group_size, x.symmetric) for x in mine}) > 1


def _misread_experts(found: Inspection) -> bool:
    """Whether transformers would load experts and get other weights than are stored."""
    from bitpress.clients import misread_as_experts
    from bitpress.reading import modifier_of

    if not any(".experts." in layer.name and layer.scheme.startswith("NVFP4") for layer in found.layers):
        return False
    return any(misread_as_experts(group.scheme) for group in modifier_of(Path(found.path)).groups())


def _reloaded(found: Inspection, dtype: Any, on: Any, trust: bool, notes: list[str] | None) -> Any:
    """What transformers cannot load, as bitpress reads it: the same weights, dense, and inputs rounded on the way."""
    from bitpress.reading import described, reload
    from bitpress.rounding import round_inputs

    cache = None if found.method in ("gguf", "sparse-24") else described(Path(found.path))[0].cache()
    if cache is not None and notes is None:  # nobody would know
        raise CheckpointError(
            f"{found.path}: transformers cannot load it as it is meant, and bitpress's own loader does not round "
            "the cache of keys and values (kv_cache_scheme); serve it in vLLM"
        )
    try:
        model = reload(found.path, dtype=dtype, device_map=on, trust_remote_code=trust)
        if found.method == "compressed-tensors":  # no other format says how inputs are rounded
            round_inputs(model, Path(found.path))
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, AttributeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{found.path}: neither transformers nor bitpress can load it: {first}") from error
    if notes is not None:
        left = "" if cache is None else "; the cache of keys and values is not rounded"
        notes.append(
            f"{found.path}: transformers cannot load it as it is meant, so bitpress's own loader was used{left}"
        )
    return model.eval()


def _cast(model: Any, dtype: Any) -> None:
    """Bring weights to one dtype: those of experts are decompressed to that of their scales, whatever is asked for."""
    import torch

    dtype = getattr(model.config, "dtype", None) if dtype == "auto" else dtype
    if isinstance(dtype, torch.dtype):
        for parameter in model.parameters():
            if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
                parameter.data = parameter.data.to(dtype)


@contextmanager
def _quiet(*, reports: bool) -> Iterator[None]:
    """Without the bars of a load, warnings about decompression and, with `reports`, the report on missing weights.

    compressed-tensors has no switch for its bars, so tqdm's own default is changed for the time of the load.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    def first(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "disable": True})

    def kept(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    made = tqdm.__init__
    log = logging.getLogger("transformers.modeling_utils")
    # it looks for linears by name once more when they are decompressed already, and says so of each
    matching = logging.getLogger("compressed_tensors.utils.match")
    level = matching.level
    with warnings.catch_warnings():
        # it says that the checkpoint's own scheme is kept, which is what is wanted
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        tqdm.__init__ = first
        matching.setLevel(logging.ERROR)
        if reports:
            log.addFilter(kept)
        try:
            yield
        finally:
            tqdm.__init__ = made
            matching.setLevel(level)
            log.removeFilter(kept)


def _decompressing() -> Any:
    """The request to decompress at load, in the words of the installed transformers."""
    from transformers import CompressedTensorsConfig

    known = inspect.signature(CompressedTensorsConfig.__init__).parameters
    return CompressedTensorsConfig(**({"dequantize": True} if "dequantize" in known else {"run_compressed": False}))


def _is_uniform(found: Inspection) -> bool:
    """Whether one scheme of weights says all.

    Only then a request to decompress is followed: since 5.23 transformers decompresses every linear by the first
    scheme, and leaves out what is said of activations.
    """
    groups = (read_config(Path(found.path)).get("quantization_config") or {}).get("config_groups") or {}
    schemes = [{k: v for k, v in g.items() if k != "targets" and v is not None} for g in groups.values()]
    return all(s == schemes[0] and not s.get("input_activations") for s in schemes)


def _decompress(model: Any) -> None:
    """Decompress now what transformers left for the first forward."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.is_quantization_compressed:
        quantizer.compressor.decompress_model(model=model)


def _place(found: Inspection) -> tuple[str, str | None]:
    """The folder to load from, and the GGUF file in it."""
    path = Path(found.path)
    if path.is_file():
        return str(path.parent), path.name
    return str(path), min(f.name for f in path.glob("*.gguf")) if found.method == "gguf" else None


def check_options(dtype: str, device: str) -> Any:
    """The device that is meant; ConfigError for an unknown dtype, or a device that is not there."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is unknown.{did_you_mean(str(dtype), DTYPES)}")
    return pick_device(device)


def tokenizers_of(given: Any, found: list[Inspection | None], trust: bool) -> tuple[Any, bool]:
    """The tokenizer of the base, and whether the checkpoint's is known to be the same.

    Args:
        given: a tokenizer, or a folder of one, that stands for both.
        found: base and checkpoint as inspected; None is a model in memory.

    Raises:
        ConfigError: a base in memory, and no tokenizer given.
        CheckpointError: a tokenizer that cannot be loaded, or two that differ.
    """
    base, checkpoint = found
    if given is not None:
        return (_load_tokenizer(str(given), None, trust) if isinstance(given, str | Path) else given), True
    if base is None:
        raise ConfigError("tokenizer: a model in memory brings none; pass tokenizer=")
    tokenizer = _load_tokenizer(*_place(base), trust)
    # the tokenizer that GGUF holds spells the same entries in its own way
    if checkpoint is None or checkpoint.method == "gguf" or not _has_tokenizer(Path(checkpoint.path)):
        return tokenizer, False
    if checkpoint.path != base.path:
        other = _load_tokenizer(*_place(checkpoint), trust)
        if other.get_vocab() != tokenizer.get_vocab():
            raise CheckpointError(
                f"{checkpoint.path}: its tokenizer is not that of {base.path}, so that their distributions "
                "cannot be compared; give the base that the checkpoint was made from"
            )
    return tokenizer, True


def _load_tokenizer(folder: str, gguf_file: str | None, trust: bool) -> Any:
    from transformers import AutoTokenizer

    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        there = gguf_file is not None or not Path(folder).is_dir() or _has_tokenizer(Path(folder))
        why = " ".join(str(error).split()) if there else f"it holds none of {', '.join(TOKENIZERS)}"
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded ({why}); copy the tokenizer's files into the folder, or name "
            "another's: tokenizer=, or --tokenizer of eval and compare"
        ) from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)
