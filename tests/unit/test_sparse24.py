"""2:4 storage: the bits by hand, fewer than two weights kept, and the size."""

import pytest
import torch

from bitpress import formats
from bitpress.errors import ConfigError, NumericsError
from bitpress.formats.sparse24 import semi_structured, spread, squeezed
from bitpress.math.grid import QParams, Solved
from bitpress.math.masks import Structure, keep_best
from bitpress.schemes import preset


def pruned(rows, columns, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return weight * keep_best(weight.float().abs(), 0.5, Structure(2, 4))


def test_positions_by_hand():
    weight = torch.tensor([[5.0, 0, 0, 7, 0, 0, 3, 0], [0, 0, 0, 0, 0, 1, 2, 0]])
    values, positions = squeezed(weight, weight != 0)
    assert values[0].tolist() == [5, 7, 0, 3] and values[1].tolist() == [0, 0, 1, 2]
    # a pair is first | second << 2: columns 0 and 3, then 0 (which fills up) and 2
    assert positions[0].item() == (0 | 3 << 2) | (0 | 2 << 2) << 4
    assert torch.equal(spread(values, positions, torch.zeros(())), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_takes_three_bits(symmetric):
    scheme = preset("W4A16" if symmetric else "W4A16_ASYM", 64)
    keep = pruned(32, 128) != 0
    codes = torch.randint(-8, 8, (32, 128), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    zero = None if symmetric else torch.randint(-8, 8, (32, 2)).to(torch.int8)
    empty = torch.zeros(32, 128, dtype=torch.int8) if zero is None else zero.repeat_interleave(64, 1)
    codes = torch.where(keep, codes, empty)
    solved = Solved(codes, QParams(torch.rand(32, 2).to(torch.bfloat16) + 0.1, zero), torch.tensor(0.0))
    tensors = formats.pack(solved, scheme, "sparse-24")
    spec = formats.describe(scheme, 32, 128, torch.bfloat16, "sparse-24")
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == spec
    assert 8 * sum(tensors[n].nbytes for n in ("values", "positions")) == 3 * 32 * 128
    assert torch.equal(formats.unpack(tensors, scheme, torch.bfloat16, "sparse-24").codes, codes)


def test_bfloat16_takes_nine_bits():
    form, weight = formats.CHECKPOINTS["sparse-24"], pruned(16, 64)
    tensors = form.pack_plain(weight)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == form.describe_plain(16, 64, torch.bfloat16)
    assert 8 * sum(t.nbytes for t in tensors.values()) == 9 * 16 * 64
    zeros = torch.zeros((), dtype=torch.bfloat16)
    assert torch.equal(spread(tensors["values"], tensors["positions"], zeros), weight)


def test_what_it_refuses():
    form = formats.CHECKPOINTS["sparse-24"]
    with pytest.raises(NumericsError, match="is not 2:4"):
        form.pack_plain(torch.ones(4, 16))
    assert "holds int4 and plain weights, not int8" in form.refusal(preset("W8A16"), None)
    assert "divisible by 16" in form.misfit(preset("W4A16"), 8, 24)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"semi_structured: needs an NVIDIA GPU"):
            semi_structured(torch.nn.Linear(64, 64))
