"""Blocks run one at a time, and what is collected in them, on a small model written here."""

import pytest
import torch
from torch import nn

from bitpress.blocks import Blocks, collect, find_blocks
from bitpress.errors import NumericsError, PlanError
from bitpress.math.stats import GramAccumulator

WIDTH, WIDE, TOKENS, LENGTH = 8, 12, 20, 6
ALL = 1 << 40
NAMES = ("q", "k", "v", "o", "gate", "up", "down")


class Block(nn.Module):
    """Attention-like and gated; returns a tensor or a tuple, and is called by position or by name."""

    def __init__(self, tuples):
        super().__init__()
        self.tuples, self.ended = tuples, 0
        for name in NAMES:
            rows, columns = (WIDE, WIDTH) if name in ("gate", "up") else (WIDTH, WIDTH)
            self.add_module(name, nn.Linear(WIDE if name == "down" else columns, rows, bias=False))

    def forward(self, hidden_states, shift=0.0):
        x = hidden_states + shift
        x = x + self.o(torch.tanh(self.q(x) * self.k(x)) + self.v(x))
        y = torch.tanh(x)
        x = x + self.down(torch.sigmoid(self.gate(y)) * self.up(y))
        self.ended += 1
        return (x, None) if self.tuples else x


class Model(nn.Module):
    def __init__(self, tuples=False, by_name=False):
        super().__init__()
        self.by_name = by_name
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(Block(tuples) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, input_ids, use_cache):
        assert use_cache is False and not torch.is_grad_enabled()
        x = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            x = layer(hidden_states=x, shift=0.1 * i) if self.by_name else layer(x, 0.1 * i)
            x = x[0] if layer.tuples else x  # like a model that knows its blocks
        return self.head(self.norm(x))


@pytest.fixture(params=[(False, False), (True, False), (False, True), (True, True)], ids=str)
def model(request):
    torch.manual_seed(0)
    return Model(*request.param)


def plain():
    torch.manual_seed(0)
    return Model()


def ids(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, TOKENS, (2, LENGTH), generator=generator) for _ in range(count)]


def overridden(model):
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def hidden_before(model, index):
    """Batches as block `index` gets them."""
    blocks = Blocks(model)
    batches = [(i, None) for i in ids()]
    for k in range(index):
        batches = [(i, blocks.run(k, (i, h))) for i, h in batches]
    return batches


def inputs_of(model, index):
    """Every input of every linear of a block, by hand: (tokens, columns) in float64."""
    caught = {name: [] for name in NAMES}
    handles = [
        model.layers[index].get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: caught[name].append(args[0].detach().flatten(0, -2).double())
        )
        for name in NAMES
    ]  # fmt: skip
    with torch.no_grad():
        for batch in ids():
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in caught.items()}


def linears_of(model, index):
    return {name: model.layers[index].get_submodule(name) for name in NAMES}


def grams(collected):
    return {name: stats.gram for stats, readers in collected.groups for name in readers}


def test_find_blocks():
    model = plain()
    model.extra = nn.ModuleList([nn.Linear(2, 2)])
    model.layers[0].experts = nn.ModuleList([nn.Linear(50, 50), nn.Linear(50, 50)])  # inside a block: not the blocks
    name, found = find_blocks(model)
    assert name == "layers" and found == list(model.layers)
    assert Blocks(model).prefix(2) == "layers.2." and len(Blocks(model)) == 3


def test_a_model_without_blocks():
    with pytest.raises(PlanError, match="Linear: no list of decoder blocks found"):
        find_blocks(nn.Linear(2, 2))


def test_one_at_a_time_equals_the_whole_forward(model):
    blocks, batch = Blocks(model), ids(1)[0]
    with torch.no_grad():
        expected = model(input_ids=batch, use_cache=False)
    hidden = None
    for index in range(3):
        ended = [layer.ended for layer in model.layers]
        hidden = blocks.run(index, (batch, hidden))
        ran = [layer.ended - before for layer, before in zip(model.layers, ended, strict=True)]
        assert ran == [int(k == index) for k in range(3)]
        assert not hidden.requires_grad
    with torch.no_grad():
        assert torch.equal(model.head(model.norm(hidden)), expected)
    seen = []
    model.head.register_forward_hook(lambda module, args, out: seen.append(out))
    ended = [layer.ended for layer in model.layers]
    blocks.visit_tail((batch, hidden))
    assert torch.equal(seen[0], expected)
    assert [layer.ended for layer in model.layers] == ended
    assert overridden(model) == []


@pytest.mark.parametrize("broken", ["layers.1.v", "layers.1", "norm", "embed"])
def test_forwards_are_put_back_after_an_exception(model, broken):
    def fail(module, args):
        raise ValueError("broken")

    blocks, batch = Blocks(model), ids(1)[0]
    handle = model.get_submodule(broken).register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="broken"):
        blocks.visit_tail((batch, torch.zeros(2, LENGTH, WIDTH))) if broken == "norm" else blocks.run(1, (batch, None))
    assert overridden(model) == []
    handle.remove()
    with torch.no_grad():
        model(input_ids=batch, use_cache=False)


def test_forwards_that_others_have_replaced_stay(model):
    batch = ids(1)[0]
    calls, original = [], model.layers[1].forward

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.layers[1].forward = counted
    blocks = Blocks(model)
    for index in range(3):
        blocks.run(index, (batch, None))
    assert overridden(model) == ["layers.1"] and model.layers[1].forward is counted
    assert len(calls) == 1


@pytest.mark.parametrize("leave_early", [True, False])
def test_linears_of_one_input_share_its_gram(model, leave_early):
    blocks, linears = Blocks(model), linears_of(model, 1)
    batches = hidden_before(model, 1)
    got = collect(lambda b: blocks.visit(1, b), linears, batches, budget=ALL, leave_early=leave_early)
    assert [readers for _, readers in got.groups] == [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
    assert got.deferred == ()
    for stats, readers in got.groups:
        assert stats.tokens == 3 * 2 * LENGTH
        for name in readers:
            x = inputs_of(model, 1)[name]
            torch.testing.assert_close(stats.gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    assert overridden(model) == []
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_leaving_early_gives_the_same_and_does_less():
    model = plain()
    blocks, linears, batches = Blocks(model), linears_of(model, 1), hidden_before(model, 1)
    results, ended = [], []
    for leave_early in (True, False):
        before = model.layers[1].ended
        run = collect(lambda b: blocks.visit(1, b), linears, batches, budget=ALL, leave_early=leave_early)
        results.append(run)
        ended.append(model.layers[1].ended - before)
    assert ended == [1, 3]  # the first batch shows which linear is the last
    early, whole = (grams(r) for r in results)
    assert early.keys() == whole.keys() == set(NAMES)
    assert all(torch.equal(early[n], whole[n]) for n in NAMES)
    # half of the linears: left after the last of these
    before = model.layers[1].ended
    part = collect(lambda b: blocks.visit(1, b), {"q": linears["q"]}, batches, budget=ALL)
    assert torch.equal(grams(part)["q"], whole["q"]) and model.layers[1].ended - before == 1
    assert blocks.visit(1, batches[0]) is not None


@pytest.mark.parametrize("leave_early", [True, False])
def test_a_budget_of_one_gram_takes_several_passes(leave_early):
    model = plain()
    blocks, batches = Blocks(model), hidden_before(model, 1)

    def gather(names, budget):
        linears = {n: m for n, m in linears_of(model, 1).items() if n in names}
        return collect(lambda b: blocks.visit(1, b), linears, batches, budget=budget, leave_early=leave_early)

    expected = grams(gather(NAMES, ALL))
    for budget in (0, GramAccumulator.nbytes(WIDTH)):
        waiting, found, passes = NAMES, {}, []
        while waiting:
            got = gather(waiting, budget)
            assert len(got.groups) == 1
            passes.append(got.groups[0][1])
            found |= grams(got)
            waiting = got.deferred
        assert passes == [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
        assert all(torch.equal(found[n], expected[n]) for n in NAMES)
    two = gather(NAMES, 2 * GramAccumulator.nbytes(WIDTH))
    assert [readers for _, readers in two.groups] == [("q", "k", "v"), ("o",)]
    assert two.deferred == ("gate", "up", "down")
    # what does not fit does not stop a smaller one that comes later
    widest_last = {n: linears_of(model, 1)[n] for n in ("o", "down")}
    assert gather(widest_last, 2 * GramAccumulator.nbytes(WIDTH)).deferred == ("down",)


def test_hooks_are_removed_after_an_exception():
    model = plain()

    def run(batch):
        model.layers[0].q(torch.ones(1, WIDTH))
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        collect(run, linears_of(model, 0), [(ids(1)[0], None)], budget=ALL)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_linear_that_is_never_called_is_in_no_group():
    linears = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    got = collect(lambda batch: linears["a"](batch[0]), linears, [(torch.ones(2, 4), None)], budget=ALL)
    assert [readers for _, readers in got.groups] == [("a",)] and got.deferred == ()


ONE, TWO = "one tensor for both", "two tensors"


@pytest.mark.parametrize("calls", [(ONE, TWO), (TWO, ONE), (ONE, ONE, TWO), ("a", ONE), (ONE, "a"), (ONE, "b")])
@pytest.mark.parametrize("budget", [ALL, 0])
def test_sharing_in_some_batches_only_is_an_error(calls, budget):
    if calls == (TWO, ONE) and budget == 0:
        return  # "b" waits for a pass of its own, in which what "a" reads does not matter
    linears = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}

    def run(batch):
        x = batch[0]
        what = next(script)
        if what != "b":
            linears["a"](x)
        if what != "a":
            linears["b"](x if what != TWO else x.clone())

    script = iter(calls)
    batches = [(torch.randn(3, 4), None) for _ in calls]
    with pytest.raises(NumericsError, match="shares its input with other linears in some batches only"):
        collect(run, linears, batches, budget=budget, leave_early=False)


def test_experts_that_see_some_batches_only():
    """Each expert reads a tensor of its own, in the batches in which it is chosen."""
    linears = {f"{e}.{leaf}": nn.Linear(4, 4) for e in range(2) for leaf in ("gate", "up")}
    script, chosen = iter([(0,), (0, 1), (1,), ()]), []

    def run(batch):
        for e in next(script):
            x = batch[0] * (e + 1)
            chosen.append((e, x))
            linears[f"{e}.gate"](x)
            linears[f"{e}.up"](x)

    got = collect(run, linears, [(torch.randn(3, 4), None) for _ in range(4)], budget=ALL, leave_early=False)
    assert [readers for _, readers in got.groups] == [("0.gate", "0.up"), ("1.gate", "1.up")]
    for e, (stats, _) in enumerate(got.groups):
        x = torch.cat([x for owner, x in chosen if owner == e])
        assert stats.tokens == len(x) == 6
        torch.testing.assert_close(stats.gram, x.T @ x)
