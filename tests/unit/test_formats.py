"""Stored tensors: the bits by hand, round trips, and compressed-tensors' own reading of them."""

import importlib
import importlib.metadata

import pytest
import torch

from bitpress import formats
from bitpress.formats import bits, small_floats
from bitpress.math.grid import QParams, Solved, dequantize, quantize, values_of
from bitpress.math.scales import find_qparams
from bitpress.schemes import QuantArgs, Scheme, preset

WIDTHS = range(2, 9)
SIZES = [1, 2, 5, 7, 31, 32, 33, 63, 100]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = {"tensor": (5, 48), "channel": (33, 45), "group": (7, 96)}
VERSION = tuple(int(n) for n in importlib.metadata.version("compressed-tensors").split(".")[:2])


def random_codes(rows, columns, width, seed=0):
    half = 1 << (width - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)


def scheme_of(strategy, width, symmetric):
    size = 32 if strategy == "group" else None
    args = QuantArgs(num_bits=width, symmetric=symmetric, strategy=strategy, group_size=size)
    scheme = Scheme(name=None, weights=args)
    assert scheme.faults() == []
    return scheme


SCHEMES = {
    f"{strategy}-{width}-{'sym' if symmetric else 'asym'}": scheme_of(strategy, width, symmetric)
    for strategy in SHAPES
    for width in WIDTHS
    for symmetric in (True, False)
}
SCHEMES["W8A8-channel"] = preset("W8A8")
SCHEMES["W8A8-tensor"] = Scheme(
    name=None,
    weights=QuantArgs(num_bits=8, strategy="tensor"),
    input_activations=preset("W8A8").input_activations,
)


def solved_for(scheme, dtype):
    """Random codes, scales and zero points that use the whole range."""
    args = scheme.weights
    rows, columns = SHAPES[args.strategy]
    codes = random_codes(rows, columns, args.num_bits)
    count = columns // args.group_size if args.group_size else 1
    scale = (torch.rand(rows, count, generator=torch.Generator().manual_seed(2)) * 0.1 + 0.01).to(dtype)
    zero = None if args.symmetric else random_codes(rows, count, args.num_bits, seed=3)
    if args.strategy == "tensor":
        scale, zero = scale[:1].expand(rows, 1), None if zero is None else zero[:1].expand(rows, 1)
    return Solved(codes, QParams(scale, zero), torch.tensor(0.0))


def assert_same(found, expected):
    assert torch.equal(found.codes, expected.codes) and found.codes.dtype == torch.int8
    assert torch.equal(found.qparams.scale, expected.qparams.scale)
    assert found.qparams.scale.dtype == expected.qparams.scale.dtype
    if expected.qparams.zero_point is None:
        assert found.qparams.zero_point is None
    else:
        assert torch.equal(found.qparams.zero_point, expected.qparams.zero_point)
    assert bool(found.error.isnan())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("columns", SIZES)
def test_bits_of_a_row(width, columns):
    codes = random_codes(3, columns, width)
    packed = bits.pack(codes, width)
    assert packed.dtype == torch.int32 and packed.shape == (3, bits.words(columns, width))
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum((code + (1 << (width - 1))) << (i * width) for i, code in enumerate(row))
        expected = [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(len(words))]
        # where the last word is not full, what lies behind the last element is free
        mask = (1 << (columns * width)) - 1
        kept = sum((w & 0xFFFFFFFF) << (32 * k) for k, w in enumerate(words)) & mask
        assert kept == stream == sum(w << (32 * k) for k, w in enumerate(expected))
    assert torch.equal(bits.unpack(packed, width, columns), codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_code_survives(width):
    codes = torch.arange(-(1 << (width - 1)), 1 << (width - 1)).to(torch.int8).repeat(2, 3)
    packed = bits.pack(codes, width)
    assert torch.equal(bits.unpack(packed, width, codes.shape[1]), codes)
    assert packed.numel() == 2 * -(-codes.shape[1] * width // 32)


def test_words():
    assert [bits.words(n, 3) for n in (1, 10, 11, 32, 96)] == [1, 1, 2, 3, 9]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("columns", SIZES)
def test_packing_is_that_of_compressed_tensors(width, columns):
    if VERSION < (0, 19) and width not in (2, 4, 8):
        pytest.skip("before 0.19 widths that do not divide 32 are padded")
    pack, unpack = their_packing()
    codes = random_codes(4, columns, width)
    packed = bits.pack(codes, width)
    assert torch.equal(packed, pack(codes, width))
    assert torch.equal(unpack(packed, width, codes.shape), codes)
    # zero points are packed along the rows
    zero = random_codes(columns, 3, width)
    assert torch.equal(bits.pack(zero.T.contiguous(), width).T, pack(zero, width, packed_dim=0))


def their_packing():
    places = ("compressors.pack_quantized.helpers", "compressors.quantized_compressors.pack_quantized")
    for place in places:
        try:
            module = importlib.import_module(f"compressed_tensors.{place}")
        except ImportError:
            continue
        return module.pack_to_int32, module.unpack_from_int32
    pytest.skip("compressed-tensors has its packing elsewhere")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_pack_is_as_described_and_unpacks(name, dtype):
    scheme = SCHEMES[name]
    solved = solved_for(scheme, dtype)
    tensors = formats.pack(solved, scheme)
    spec = formats.describe(scheme, *solved.codes.shape, dtype)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == spec
    assert all(t.is_contiguous() for t in tensors.values())
    assert ("weight_zero_point" in spec) == (not scheme.weights.symmetric)
    assert_same(formats.unpack(tensors, scheme, dtype), solved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_dense_is_as_described_and_gives_the_codes_back(name, dtype):
    scheme = SCHEMES[name]
    solved = formats.settle(solved_for(scheme, dtype), formats.grid_of(scheme, dtype))
    tensors = formats.dense(solved, scheme)
    spec = formats.describe_dense(scheme, *solved.codes.shape, dtype)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == spec
    assert_same(formats.undense(tensors, scheme), solved)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_code_comes_back_from_dense_bfloat16(symmetric, width):
    """All codes, at the extreme zero points, with every mantissa that a bfloat16 scale has."""
    half = 1 << (width - 1)
    for zero in [0] if symmetric else [-half, 0, half - 1]:
        scale = (1 + torch.arange(128) / 128).to(torch.bfloat16)[:, None] * 2**-7
        codes = torch.arange(-half, half).to(torch.int8).repeat(128, 1)
        zeros = None if symmetric else torch.full((128, 1), zero, dtype=torch.int8)
        scheme = scheme_of("channel", width, symmetric)
        grid = formats.grid_of(scheme, torch.bfloat16)
        solved = formats.settle(Solved(codes, QParams(scale, zeros), torch.tensor(0.0)), grid)
        tensors = formats.dense(solved, scheme)
        assert tensors["weight"].dtype == torch.bfloat16
        assert torch.equal(formats.undense(tensors, scheme).codes, solved.codes)
        # settling moves a code by one, and only where bfloat16 is coarser than the grid
        moved = (solved.codes.int() - codes.int()).abs()
        assert int(moved.max()) == (width == 8 and not symmetric and zero != 0)
        assert float((solved.dense() == dequantize(codes, solved.qparams)).double().mean()) > 0.99


def test_a_changed_dense_weight_is_rounded_with_the_scales_beside_it():
    scheme = SCHEMES["channel-4-asym"]
    solved = solved_for(scheme, torch.float32)
    tensors = formats.dense(solved, scheme)
    tensors["weight"] += 1.1 * tensors["weight_scale"]
    again = formats.undense(tensors, scheme)
    assert torch.equal(again.codes, (solved.codes + 1).clamp(max=7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_reads_the_same_weight(name, dtype):
    scheme = SCHEMES[name]
    if VERSION < (0, 19) and scheme.weights.num_bits not in (2, 4, 8):
        pytest.skip("before 0.19 widths that do not divide 32 are padded")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    packed = scheme.format == "pack-quantized"
    compressor = getattr(compressors, "PackedQuantizationCompressor" if packed else "IntQuantizationCompressor", None)
    if not hasattr(compressor, "decompress"):
        pytest.skip("compressed-tensors decompresses in another way")
    theirs = quantization.QuantizationScheme(targets=["Linear"], **scheme.to_dict())
    solved = solved_for(scheme, dtype)
    weight = compressor.decompress(formats.pack(solved, scheme), theirs)["weight"]
    ours = dequantize(solved.codes, solved.qparams)
    assert weight.dtype == dtype
    assert torch.equal(weight, ours)
    assert torch.equal(formats.unpack(formats.pack(solved, scheme), scheme, dtype).dense(), ours)


def test_grid_of_a_scheme():
    grid = formats.grid_of(SCHEMES["group-3-asym"], torch.float16)
    found = (grid.bits, grid.symmetric, grid.group_size, grid.per_tensor, grid.scale_dtype)
    assert found == (3, False, 32, False, torch.float16)
    assert formats.grid_of(SCHEMES["tensor-8-sym"], torch.float16).per_tensor
    assert formats.grid_of(SCHEMES["channel-8-sym"], torch.float16).group_size is None


@pytest.mark.parametrize("name", ["tensor-4-asym", "group-3-asym", "W8A8-tensor"])
def test_reading_and_writing_leave_their_inputs_alone(name):
    scheme = SCHEMES[name]
    solved = solved_for(scheme, torch.bfloat16)
    codes, scale = solved.codes.clone(), solved.qparams.scale.clone()

    def unpack(tensors, scheme):
        return formats.unpack(tensors, scheme, torch.bfloat16)

    for write, read in ((formats.pack, unpack), (formats.dense, formats.undense)):
        tensors = write(solved, scheme)
        before = {n: t.clone() for n, t in tensors.items()}
        read(tensors, scheme)
        assert all(torch.equal(t, before[n]) for n, t in tensors.items())
    assert torch.equal(solved.codes, codes) and torch.equal(solved.qparams.scale, scale)


FLOATS = {
    name: preset(name)
    for name in ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "MXFP6A16", "MXFP6A8", "MXFP8A16")
}
FLOATS["FP8-weights"] = Scheme(name=None, weights=preset("FP8_DYNAMIC").weights)
FLOATS["FP8-groups"] = Scheme(
    name=None, weights=QuantArgs(num_bits=8, type="float", strategy="group", group_size=32)
)  # fmt: skip
STATIC = {
    f"W8A8-static-{'sym' if symmetric else 'asym'}": Scheme(
        name=None,
        weights=preset("W8A8").weights,
        input_activations=QuantArgs(num_bits=8, symmetric=symmetric, strategy="tensor"),
    )
    for symmetric in (True, False)
}
PACKED = Scheme(
    name=None, weights=preset("W4A8", 32).weights, input_activations=preset("W4A8").input_activations,
    stored_as="pack-quantized",
)  # fmt: skip
RICH = {**FLOATS, **STATIC, "W4A8": preset("W4A8", 32), "W4A4": preset("W4A4", 32), "W4A8-packed": PACKED}
INPUTS = {
    "input_scale": lambda dtype: torch.tensor([0.0123], dtype=dtype),
    "input_zero_point": lambda dtype: torch.tensor([-17], dtype=torch.int8),
    "input_global_scale": lambda dtype: torch.tensor([321.5]),
}


def float_solved(scheme, dtype):
    """A random weight on its grid, with what stands beside it."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(5)) * 0.05
    weight[7, :128] = 0
    grid = formats.grid_of(scheme, dtype)
    qparams = find_qparams(weight, grid)
    beside = {name: INPUTS[name](dtype) for name in formats.describe_inputs(scheme, dtype)}
    return Solved(quantize(weight, qparams, grid), qparams, torch.tensor(0.0), beside=beside)


def assert_equal_solved(found, expected):
    assert found.codes.dtype == expected.codes.dtype
    assert torch.equal(values_of(found.codes), values_of(expected.codes))
    for name in ("scale", "zero_point", "global_scale"):
        a, b = getattr(found.qparams, name), getattr(expected.qparams, name)
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))
    assert found.beside.keys() == expected.beside.keys()
    assert all(torch.equal(found.beside[n], expected.beside[n]) for n in found.beside)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RICH)
def test_floats_and_inputs_are_as_described_and_come_back(name, dtype):
    scheme = RICH[name]
    assert scheme.faults() == []
    solved = formats.settle(float_solved(scheme, dtype), formats.grid_of(scheme, dtype))
    for write, describe, read in (
        (formats.pack, formats.describe, lambda t, s: formats.unpack(t, s, dtype)),
        (formats.dense, formats.describe_dense, formats.undense),
    ):
        tensors = write(solved, scheme)
        assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == describe(scheme, 256, 256, dtype)
        assert all(t.is_contiguous() for t in tensors.values())
        assert_equal_solved(read(tensors, scheme), solved)


def test_bits_of_small_floats():
    fours = torch.tensor([[0.0, 0.5, -1.0, 6.0]]).to(torch.float8_e4m3fn)
    assert small_floats.pack4(fours).tolist() == [[0x10, 0x7A]]
    sixes = torch.tensor([[0.125, -7.5, 1.0, -0.0]]).to(torch.float8_e4m3fn)
    word = 1 | (0x3F << 6) | (8 << 12)
    assert small_floats.pack6(sixes).tolist() == [[word & 255, (word >> 8) & 255, word >> 16]]
    for table, pack, unpack in (
        (small_floats.E2M1, small_floats.pack4, small_floats.unpack4),
        (small_floats.E2M3, small_floats.pack6, small_floats.unpack6),
    ):
        values = torch.tensor([*table, *(-v for v in table)])[None]
        codes = values.to(torch.float8_e4m3fn)
        assert torch.equal(values_of(unpack(pack(codes))), values)


def test_scales_of_mx_are_exponents():
    scheme = preset("MXFP4A16")
    codes = torch.ones(1, 128).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 0.25, 2.0**-126, 2.0**127]])
    tensors = formats.pack(Solved(codes, QParams(scale, None), torch.tensor(0.0)), scheme)
    assert tensors["weight_scale"].tolist() == [[127, 125, 1, 254]]
    assert torch.equal(formats.unpack(tensors, scheme, torch.float32).qparams.scale, scale)
