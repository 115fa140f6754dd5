"""What several end-to-end tests do: read a folder's tensors, make a tiny tokenizer, compare models."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from bitpress import output
from bitpress.checkpoint import Source

CHAT_TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [f"w{i}" for i in range(90)]
# keys of GPTQModifier that leave out its search for scales and the refinement of codes, three quarters of its time: for
# tests of what is around the solver. The search alone finds negative scales: what stores and reads them needs it
PLAIN = {"observer": "minmax", "refine": 0}
W4 = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"], **PLAIN}}
OPTIONS: dict[str, Any] = {"max_seq_length": 32, "num_calibration_samples": 12}  # all of `conftest.token_rows()`


class Killed(BaseException):
    """The process is gone: nothing in the product catches it."""


def stop_after(monkeypatch: Any, shards: int) -> None:
    """The run dies before it writes one more shard."""
    real = output.Output.write

    def write(self: Any, shard: int, *args: Any, **options: Any) -> None:
        if shard == shards:
            raise Killed
        real(self, shard, *args, **options)

    monkeypatch.setattr(output.Output, "write", write)


def digests(folder: Path) -> dict[str, str]:
    """Of everything that must be the same: the report, which has times, is left out."""
    names = [f for f in folder.iterdir() if f.name not in ("report.json", "report.html")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in names}


def make_tokenizer(folder: Path, *, chat: bool = True) -> Any:
    """A tokenizer of whole words w0 .. w89, 96 ids, saved to a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    made.save_pretrained(folder)
    return made


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with `messages` of random words."""
    generator = torch.Generator().manual_seed(seed)

    def sentence() -> str:
        length = int(torch.randint(4, 12, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, 90, (length,), generator=generator).tolist())

    def row() -> dict[str, Any]:
        return {"messages": [{"role": r, "content": sentence()} for r in ("user", "assistant")]}

    return [row() for _ in range(count)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the safetensors files of a folder."""
    source = Source(folder)
    return source.read(source.tensors)


def bytes_of(folder: Path) -> int:
    """What these files take."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def config_of(folder: Path) -> Any:
    """The model's configuration, with what it says of quantization."""
    return json.loads((folder / "config.json").read_text())


def report_of(folder: Path) -> Any:
    """What a run wrote of itself."""
    return json.loads((folder / "report.json").read_text())


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        bits = (t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (a[name], b[name]))  # of 8-bit floats too
        assert torch.equal(*bits), name


def client(folder: Path, dtype: Any = "auto", *, one_scheme: bool = True) -> Any:
    """A compressed-tensors folder as transformers alone loads it, decompressed (with several schemes: in a forward)."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if one_scheme else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    if not one_scheme:
        model.hf_quantizer.compressor.decompress_model(model=model)
    return model


@torch.no_grad()
def logits(model: Any, vocab: int = 96) -> torch.Tensor:
    """Of two fixed sequences."""
    ids = torch.randint(3, vocab, (2, 24), generator=torch.Generator().manual_seed(99))
    out: torch.Tensor = model(input_ids=ids).logits
    return out


def distance(new: Any, old: Any) -> float:
    """How far a model's logits are from another's, as a share of theirs."""
    a, b = logits(new).float(), logits(old).float()
    return float((a - b).norm() / b.norm())


def assert_told_alike(folder: Path) -> None:
    """What a run's report says of each linear is what `inspect` and `compare` say: what it is called, and its bits."""
    from bitpress.compare import describe
    from bitpress.inspection import inspect_checkpoint

    report, found = report_of(folder), inspect_checkpoint(folder)
    reported = {row["name"]: (row["scheme"], row["bits_per_weight"]) for row in report["layers"]}
    assert {x.name: (x.scheme, round(x.bits_per_weight, 5)) for x in found.layers} == reported
    row = describe("it", folder, found)
    assert row.bits_per_weight == found.bits_per_weight and f"{row.bits_per_weight:.4f}" == (
        f"{report['totals']['bits_per_weight']:.4f}"
    )
    assert row.kind.split(", ", 1)[1] in {scheme for scheme, _ in reported.values()}
