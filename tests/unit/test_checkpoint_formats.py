"""Formats other than compressed-tensors: the bits by hand, round trips, and what they refuse."""

import pytest
import torch

from bitpress import formats
from bitpress.formats.awq import ORDER
from bitpress.math.gptq import gptq
from bitpress.math.grid import Grid, QParams, Solved, dequantize, quantize
from bitpress.math.stats import InputStats
from bitpress.schemes import QuantArgs, Scheme, preset


def scheme_of(bits, symmetric, size=32):
    return Scheme(
        name=None, weights=QuantArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=size)
    )  # fmt: skip


def solved_for(bits, symmetric, rows=64, columns=96, dtype=torch.bfloat16, g_idx=None):
    """Random codes and zero points over the whole range, both ends of it included."""
    generator = torch.Generator().manual_seed(bits)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    scale = (torch.rand(rows, columns // 32, generator=generator) * 0.1 + 0.01).to(dtype)
    zero = None
    if not symmetric:
        zero = torch.randint(-half, half, scale.shape, generator=generator).to(torch.int8)
        zero[0, 0], zero[1, 0] = -half, half - 1
    return Solved(codes, QParams(scale, zero, g_idx=g_idx), torch.tensor(0.0))


def unpacked(words, bits, count):
    """`count` numbers of `bits` bits from each row of int32 words, bit by bit."""
    out = []
    for row in words.tolist():
        stream = 0
        for i, word in enumerate(row):
            stream |= (word & 0xFFFFFFFF) << (32 * i)
        out.append([(stream >> (bits * k)) & ((1 << bits) - 1) for k in range(count)])
    return torch.tensor(out)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_bits_by_hand(bits, symmetric, version):
    if version == 1 and not symmetric:
        pytest.skip("refused, below")
    scheme, solved = scheme_of(bits, symmetric), solved_for(bits, symmetric)
    name = "gptq" if version == 1 else "gptq_v2"
    tensors = formats.pack(solved, scheme, name)
    spec = formats.describe(scheme, 64, 96, torch.bfloat16, name)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == spec
    half = 1 << (bits - 1)
    assert torch.equal(unpacked(tensors["qweight"].T, bits, 96) - half, solved.codes.long())
    zeros = unpacked(tensors["qzeros"], bits, 64).T
    expected = torch.zeros_like(solved.qparams.scale) if symmetric else solved.qparams.zero_point
    assert torch.equal(zeros, expected.long() + half - (1 if version == 1 else 0))
    assert tensors["g_idx"].tolist() == [c // 32 for c in range(96)]
    again = formats.unpack(tensors, scheme, torch.bfloat16, name)
    assert torch.equal(again.codes, solved.codes) and torch.equal(again.dense(), solved.dense())
    assert again.qparams.g_idx is None


def test_gptq_version_1_of_others_wraps_its_zero_points():
    scheme, solved = scheme_of(4, False), solved_for(4, False)
    tensors = formats.pack(solved, scheme, "gptq_v2")
    stored = (solved.qparams.zero_point.T.to(torch.int16) + 8 - 1) % 16 - 8
    from bitpress.formats import bits

    tensors["qzeros"] = bits.pack(stored.to(torch.int8).contiguous(), 4)
    assert torch.equal(formats.unpack(tensors, scheme, torch.bfloat16, "gptq").dense(), solved.dense())


def test_gptq_keeps_which_column_is_in_which_group():
    g_idx = torch.randperm(96, generator=torch.Generator().manual_seed(0)) // 32
    scheme, solved = scheme_of(4, True), solved_for(4, True, g_idx=g_idx)
    tensors = formats.pack(solved, scheme, "gptq")
    assert torch.equal(tensors["g_idx"].long(), g_idx)
    again = formats.unpack(tensors, scheme, torch.bfloat16, "gptq")
    assert torch.equal(again.dense(), solved.dense())
    dense = formats.dense(solved, scheme)
    spec = formats.describe_dense(scheme, 64, 96, torch.bfloat16, regrouped=True)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in dense.items()} == spec
    assert torch.equal(formats.undense(dense, scheme).codes, solved.codes)


def test_scales_meet_the_columns_of_their_group():
    g_idx = torch.tensor([1, 0, 1, 0])
    qparams = QParams(torch.tensor([[1.0, 10.0]]), torch.tensor([[1, -1]], dtype=torch.int8), g_idx=g_idx)
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.int8)
    weight = dequantize(codes, qparams)
    assert weight.tolist() == [[20.0, 1.0, 40.0, 3.0]]
    assert torch.equal(quantize(weight, qparams, Grid(4, False, 2, False, torch.float32)), codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_bits_by_hand(symmetric):
    scheme, solved = scheme_of(4, symmetric), solved_for(4, symmetric)
    tensors = formats.pack(solved, scheme, "awq")
    spec = formats.describe(scheme, 64, 96, torch.bfloat16, "awq")
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == spec
    nibbles = unpacked(tensors["qweight"], 4, 64)
    for place, row in enumerate(ORDER):
        assert torch.equal(nibbles[:, place::8] - 8, solved.codes.T[:, row::8].long())
    again = formats.unpack(tensors, scheme, torch.bfloat16, "awq")
    assert torch.equal(again.dense(), solved.dense())
    if symmetric:
        assert bool((tensors["qzeros"].view(torch.uint8) == 0x88).all())


@pytest.mark.parametrize(
    ("name", "scheme", "actorder", "why"),
    [
        ("compressed-tensors", preset("W4A16"), "group", "actorder: 'group' needs the GPTQ format"),
        ("gptq", preset("W5A16"), None, "holds 2, 3, 4 and 8 bits, not 5"),
        ("gptq", preset("FP8_DYNAMIC"), None, "holds integers only, not float8"),
        ("gptq", preset("W4A16_ASYM"), None, "use gptq_v2"),
        ("gptq_v2", Scheme(name=None, weights=QuantArgs(num_bits=4, strategy="tensor")), None, "not one a tensor"),
        ("awq", preset("W8A16"), None, "holds 4-bit integers only, not int8"),
        ("awq", preset("W4A16"), "group", "groups of adjacent columns only"),
    ],
)
def test_refusals(name, scheme, actorder, why):
    assert why in formats.CHECKPOINTS[name].refusal(scheme, actorder)


def test_nothing_is_refused_that_fits():
    for name, scheme in (("gptq", "W4A16"), ("gptq_v2", "W2A16_ASYM"), ("awq", "W4A16_ASYM"), ("dense", "NVFP4A16")):
        assert formats.CHECKPOINTS[name].refusal(preset(scheme), None) is None
    assert formats.CHECKPOINTS["gptq"].refusal(preset("W4A16"), "group") is None
    assert "divisible by 32" in formats.CHECKPOINTS["gptq"].misfit(preset("W3A16"), 40, 64)
    assert formats.CHECKPOINTS["gptq"].misfit(preset("W4A16"), 40, 64) is None
    assert "divisible by 8" in formats.CHECKPOINTS["awq"].misfit(preset("W4A16"), 12, 64)


def test_groups_of_the_act_order():
    """Solving in sorted columns and putting them back is what `regroup` means."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=generator) * torch.logspace(-1.5, 0.5, 64)[torch.randperm(64)]
    weight = torch.randn(48, 64, generator=generator)
    stats, grid = InputStats(x.T @ x, 400), Grid(3, True, 16, False, torch.float32)
    (found,) = gptq([weight], stats, grid, regroup=True)
    perm = torch.argsort(stats.gram.diagonal(), descending=True, stable=True)
    (sorted_,) = gptq([weight[:, perm]], InputStats(stats.gram[perm][:, perm], 400), grid, order=False)
    assert torch.equal(found.dense()[:, perm], sorted_.dense())
    assert torch.equal(found.qparams.g_idx[perm], torch.arange(64) // 16)
