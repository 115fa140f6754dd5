"""GGUF: blocks against llama.cpp's own reading of them, rows of heads, rope factors, tokenizers."""

import json

import pytest
import torch

from bitpress import formats
from bitpress.errors import NumericsError
from bitpress.formats.gguf import type_of
from bitpress.formats.gguf_file import interleaved, rope_factors
from bitpress.formats.gguf_read import halved
from bitpress.formats.gguf_vocab import SPLITTERS, splitter_of, vocabulary_fault
from bitpress.math.grid import QParams, Solved
from bitpress.schemes import QuantArgs, Scheme, preset
from helpers import make_tokenizer

gguf = pytest.importorskip("gguf")


def solved_for(scheme, dtype=torch.bfloat16, rows=8, columns=128):
    args = scheme.weights
    generator = torch.Generator().manual_seed(args.num_bits)
    half = 1 << (args.num_bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    groups = columns // args.group_size if args.group_size else 1
    scale = (torch.rand(rows, groups, generator=generator) * 0.1 + 0.01).to(dtype)
    zero = None if args.symmetric else torch.randint(-half, half, (rows, groups), generator=generator).to(torch.int8)
    return Solved(codes, QParams(scale, zero), torch.tensor(0.0))


def scheme_of(bits, symmetric, size):
    strategy = "group" if size else "channel"
    args = QuantArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size)
    return Scheme(name=None, weights=args)


@pytest.mark.parametrize("size", [32, 64, None])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (4, True), (6, True), (8, True), (4, False)])
def test_blocks_mean_what_was_solved(bits, symmetric, size):
    scheme = scheme_of(bits, symmetric, size)
    solved = solved_for(scheme)
    tensors = formats.pack(solved, scheme, "gguf")
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == formats.describe(
        scheme, 8, 128, torch.bfloat16, "gguf"
    )
    kind = type_of(scheme)
    theirs = gguf.quants.dequantize(tensors[kind].numpy(), gguf.GGMLQuantizationType[kind.upper()])
    theirs = torch.from_numpy(theirs).to(torch.bfloat16)
    read = formats.unpack(tensors, scheme, torch.bfloat16, "gguf")
    assert torch.equal(read.dense(), theirs)
    if symmetric:
        assert torch.equal(theirs, solved.dense()) and torch.equal(read.codes, solved.codes)
    else:  # m = -d * (zero point + 8) is rounded to float16
        room = 16 * solved.qparams.scale.float().max() * (2.0**-11 + 2.0**-8)
        assert (theirs.float() - solved.dense().float()).abs().max() <= room


def test_what_readers_compute_is_what_the_run_goes_on_with():
    scheme = preset("W4A16_ASYM", 32)
    solved = solved_for(scheme)
    seen = formats.as_read(solved, scheme, torch.bfloat16, "gguf")
    stored = formats.unpack(formats.pack(seen, scheme, "gguf"), scheme, torch.bfloat16, "gguf")
    assert torch.equal(stored.dense(), seen.dense()) and not torch.equal(seen.dense(), solved.dense())
    assert formats.as_read(solved, scheme, torch.bfloat16, "gptq_v2") is solved


def test_a_scale_that_float16_cannot_hold():
    scheme = preset("W4A16", 32)
    solved = solved_for(scheme)
    solved.qparams.scale[0, 0] = 3e-7
    with pytest.raises(NumericsError, match="is no float16 number"):
        formats.pack(solved, scheme, "gguf")


@pytest.mark.parametrize(
    ("scheme", "order", "why"),
    [
        (preset("W8A16_ASYM"), None, "no type for 8 bits with zero points"),
        (preset("NVFP4A16"), None, "integers only"),
        (preset("W4A16", 16), None, "groups of 16 do not consist of"),
        (preset("W4A16"), "group", "adjacent columns"),
    ],
)
def test_refusals(scheme, order, why):
    assert why in formats.CHECKPOINTS["gguf"].refusal(scheme, order)
    assert "blocks of 32" in formats.CHECKPOINTS["gguf"].misfit(preset("W4A16"), 8, 48)


def test_heads_turn_in_pairs_instead_of_halves():
    rows = torch.arange(16.0)[:, None].expand(16, 3)
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(halved(interleaved(rows, 2), 2), rows)


def test_rope_factors_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2).float() / 128)
    assert torch.allclose(plain / rope_factors(config), stretched, rtol=1e-5)
    assert rope_factors(LlamaConfig()) is None


def test_tokenizers_that_are_known(tmp_path):
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    split = {"type": "Split", "pattern": {"Regex": next(iter(SPLITTERS))}, "behavior": "Isolated"}
    quiet = level | {"use_regex": False}
    assert splitter_of({"pre_tokenizer": level}) == "gpt-2"
    assert splitter_of({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, level]}}) == "smollm"
    assert splitter_of({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, quiet]}}) == "llama-bpe"
    assert splitter_of({"pre_tokenizer": {"type": "Whitespace"}}) is None
    assert "no tokenizer.json" in vocabulary_fault(tmp_path)
    make_tokenizer(tmp_path)
    assert "type WordLevel" in vocabulary_fault(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}, "pre_tokenizer": None}))
    assert "pre_tokenizer is not known" in vocabulary_fault(tmp_path)
