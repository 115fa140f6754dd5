"""Which linear writes into a block's output, and what is summed with its input."""

import pytest
import torch
from torch import nn

from bitpress.blocks import Blocks, collect
from bitpress.math.correct import changes
from bitpress.math.gptq import gptq
from bitpress.math.grid import Grid
from bitpress.math.stats import EXTREME, InputStats, StatsAccumulator
from bitpress.residual import writer
from conftest import FAMILIES, VOCAB, build


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DRIFT = frozenset({"gram", "drift"})
WRITERS = {
    "opt": "fc2", "gpt_neox": "mlp.dense_4h_to_h", "falcon": "mlp.dense_4h_to_h",
    "gemma2": None, "gemma3": None, "mixtral": None, "qwen3_moe": None,  # a norm or a router comes after it
}  # fmt: skip


def linears_of(block):
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_writer_of_each_family(family, dtype):
    blocks = Blocks(build(family, dtype))
    batch = torch.randint(3, VOCAB, (1, 12)), normal(1, 12, 32, seed=3).to(dtype)
    for index, block in enumerate(blocks.modules):
        before = {n: p.clone() for n, p in block.named_parameters()}
        found = writer(lambda b, i=index: blocks.run(i, b), linears_of(block), batch)
        assert found == WRITERS.get(family, "mlp.down_proj")
        assert all(torch.equal(before[n], p) for n, p in block.named_parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


class Small(nn.Module):
    """x + last(y), and what may make that no writer."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first = nn.Linear(8, 12, bias=False)
        self.last = nn.Linear(8 if how == "more rows" else 12, 16 if how == "more rows" else 8, bias=False)
        self.beside = nn.Linear(12, 8, bias=False)

    def forward(self, x):
        if self.how == "more rows":
            return x.repeat(1, 1, 2) + self.last(x)
        y = torch.tanh(self.first(x))
        if self.how == "shared":
            return x + self.beside(y).tanh() + self.last(y)
        if self.how == "twice":
            return x + self.last(y) + self.last(y.flip(1))
        if self.how == "read":
            z = x + self.last(y)
            return z + 0.5 * z.tanh()
        if self.how == "other order":
            return x + self.last(y.flip(1)).flip(1)
        return x + (0.9 if self.how == "scaled" else 1) * self.last(y)


@pytest.mark.parametrize("how", ["plain", "more rows", "shared", "twice", "read", "other order", "scaled"])
@torch.no_grad()
def test_what_is_no_writer(how):
    torch.manual_seed(0)
    block = Small(how)
    found = writer(lambda batch: block(batch[1]), linears_of(block), (torch.zeros(1, 10), torch.randn(1, 10, 8)))
    assert found == ("last" if how == "plain" else None)
    assert writer(lambda batch: block(batch[1]), {}, (torch.zeros(1, 10), torch.randn(1, 10, 8))) is None


@pytest.mark.parametrize("adds", ["mlp.down_proj", None])
def test_the_lag_of_batches_in_both_streams(adds):
    model = build("llama")
    blocks, rows = Blocks(model), torch.randint(3, VOCAB, (4, 2, 12), generator=torch.Generator().manual_seed(1))
    full = [normal(2, 12, 32, seed=i) for i in range(4)]
    here = [x + 0.1 * normal(2, 12, 32, seed=10 + i) for i, x in enumerate(full)]
    block = blocks.modules[1]
    inputs, handle = [], block.mlp.down_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    kept, ends = {}, []
    end = block.mlp.down_proj.register_forward_hook(lambda *a: ends.append(1))
    got = collect(
        lambda batch: blocks.visit(1, batch), linears_of(block), list(zip(rows, here, strict=True)), budget=1 << 40,
        needs=DRIFT, beside=lambda i: (rows[i], full[i]) if i % 2 == 0 else None, keep=kept.__setitem__, adds=adds,
    )  # fmt: skip
    handle.remove()
    end.remove()
    stats = {readers[-1]: s for s, readers in got.groups}
    mine = stats["mlp.down_proj"]
    assert all(s.lag is None and s.drift is not None for n, s in stats.items() if n != adds)
    seen = inputs[1], inputs[4]  # of batches 0 and 2: those of the other stream come before
    lacks = [kept[i] - blocks.run(1, (rows[i], here[i])) for i in (0, 2)]
    if adds is None:
        drift = sum((inputs[i] - inputs[i + 1]).flatten(0, 1).T @ inputs[i + 1].flatten(0, 1) for i in (0, 3))
        torch.testing.assert_close(mine.drift, drift, rtol=1e-3, atol=1e-3)
    else:
        assert mine.drift is None
        lag = sum(e.flatten(0, 1).T @ x.flatten(0, 1) for e, x in zip(lacks, seen, strict=True))
        torch.testing.assert_close(mine.lag, lag, rtol=1e-3, atol=1e-3)
    gram = sum(inputs[i].flatten(0, 1).T @ inputs[i].flatten(0, 1) for i in (1, 2, 4, 5))
    torch.testing.assert_close(mine.gram, gram, rtol=1e-3, atol=1e-3)
    assert mine.tokens == 4 * 24
    # two of the other stream, and the first; the rest is left early where nothing reads the output
    assert len(ends) == (4 if adds else 3)


def test_a_lag_is_summed_without_extreme_tokens_and_goes_with_scales():
    x, lack = normal(300, 24), normal(300, 16, seed=2)
    x[5] *= 100
    lack[9] *= 100
    sums = StatsAccumulator(24, torch.device("cpu"), DRIFT, 16)
    sums.add(x[:200], lack=lack[:200])
    sums.add(x[200:])
    stats = sums.finish()
    usual = torch.ones(200, dtype=torch.bool)
    usual[[5, 9]] = False
    assert EXTREME < 100**2 / 4
    torch.testing.assert_close(stats.lag, lack[:200][usual].T @ x[:200][usual], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stats.gram, x.T @ x, rtol=1e-3, atol=1.0)
    scale, order = 0.5 + torch.rand(24), torch.randperm(24)
    torch.testing.assert_close(
        stats.smoothed(scale).lag, lack[:200][usual].T @ (x[:200][usual] / scale), rtol=1e-3, atol=1e-3
    )
    assert torch.equal(stats.permuted(order).lag, stats.lag[:, order])
    torch.testing.assert_close(stats.merge(stats).lag, 2 * stats.lag)


def test_the_writer_takes_up_what_the_output_lacks():
    """By least squares in float64; an error that its own input does not show is undone, which its drift would leave."""
    x, weight = normal(400, 32), normal(16, 32, seed=1)
    lack = 0.3 * x @ normal(32, 16, seed=2) + 0.1 * normal(400, 16, seed=3)
    gram = x.T @ x
    stats = InputStats(gram, 400, lag=lack.T @ x, paired=gram)
    (change,) = changes([weight], stats, 0.5)
    damped = gram.double() + 0.2 * gram.double().diagonal().mean() * torch.eye(32)
    expected = 0.5 * (lack.double().T @ x.double()) @ torch.linalg.inv(damped)
    torch.testing.assert_close(change.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = x @ weight.T + lack
    grid = Grid(8, True, None, False, torch.float32)
    errors = [
        float((x @ gptq([weight], stats, grid, correct=share)[0].dense().T - wanted).norm())
        for share in (0.0, 0.5, 1.0)
    ]
    assert errors[2] < 0.6 * errors[0] and errors[2] < errors[1] < errors[0]
    assert torch.equal(gptq([weight], stats, grid)[0].codes, gptq([weight], InputStats(gram, 400), grid)[0].codes)
