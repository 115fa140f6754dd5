"""Experts as Linears against transformers' own fused modules."""

import pytest
import torch

from bitpress.experts import LEAVES, UnfusedExperts, can_unfuse, fused_left, is_fused, refuse, unfuse
from conftest import VOCAB, build

FAMILIES = ["mixtral", "qwen3_moe"]


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param)


def ids():
    return torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids(), use_cache=False).logits


def call(experts, tokens=9, count=4, width=32):
    """Experts called as a block calls them: each token chooses two of them."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(tokens, width, generator=generator)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator)
    with torch.no_grad():
        return experts(hidden, chosen, weights), hidden, chosen


def test_outputs_equal_the_fused_module(model):
    before = logits(model)
    fused = {n: m for n, m in model.named_modules() if is_fused(m)}
    assert len(fused) == 2 and all(can_unfuse(m) for m in fused.values())
    replaced = unfuse(model)
    assert replaced.keys() == fused.keys()
    for name, experts in replaced.items():
        assert model.get_submodule(name) is experts and isinstance(experts, UnfusedExperts) and len(experts) == 4
        expected, found = call(fused[name])[0], call(experts)[0]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_every_projection_is_a_linear_that_shares_the_weight(model):
    before = sum(p.numel() for p in model.parameters())
    replaced = unfuse(model)
    assert list(fused_left(model)) == []
    assert sum(p.numel() for p in model.parameters()) == before
    for path, experts in replaced.items():
        fused = experts.fused[0]
        middle = fused.down_proj.shape[2]
        for e in range(4):
            gate, up, down = (model.get_submodule(f"{path}.{e}.{leaf}") for leaf in LEAVES)
            assert all(type(m) is torch.nn.Linear and m.bias is None for m in (gate, up, down))
            assert torch.equal(gate.weight, fused.gate_up_proj[e, :middle])
            assert torch.equal(up.weight, fused.gate_up_proj[e, middle:])
            assert torch.equal(down.weight, fused.down_proj[e])
            assert gate.weight.untyped_storage().data_ptr() == fused.gate_up_proj.untyped_storage().data_ptr()


def test_hooks_see_the_tokens_of_an_expert(model):
    experts = next(iter(unfuse(model).values()))
    seen = {}
    for e, expert in enumerate(experts):
        expert.gate_proj.register_forward_pre_hook(lambda m, args, e=e: seen.setdefault(e, []).append(args[0]))
    _, hidden, chosen = call(experts)
    for e in range(4):
        assert torch.equal(torch.cat(seen[e]), hidden[(chosen == e).any(1)])
    seen.clear()
    experts.on_all_tokens = frozenset({2})
    call(experts)
    assert torch.equal(torch.cat(seen[2]), hidden)
    assert torch.equal(torch.cat(seen[1]), hidden[(chosen == 1).any(1)])


def test_an_expert_that_nobody_chose_is_not_run(model):
    experts = next(iter(unfuse(model).values()))
    experts[3].gate_proj.register_forward_pre_hook(lambda m, args: pytest.fail("was run"))
    hidden = torch.randn(5, 32)
    chosen, weights = torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    with torch.no_grad():
        expected = experts.fused[0](hidden, chosen, weights)
        torch.testing.assert_close(experts(hidden, chosen, weights), expected, rtol=1e-5, atol=1e-5)


def test_the_fused_module_comes_back_with_the_changes(model):
    before = logits(model)
    fused = {n: m for n, m in model.named_modules() if is_fused(m)}
    names = set(model.state_dict())
    replaced = unfuse(model)
    path = next(iter(replaced))
    gate, down = model.get_submodule(f"{path}.1.gate_proj"), model.get_submodule(f"{path}.2.down_proj")
    with torch.no_grad():
        gate.weight.mul_(3)
        down.weight.zero_()
    changed = logits(model)
    refuse(model, replaced)
    assert all(model.get_submodule(n) is m for n, m in fused.items())
    assert set(model.state_dict()) == names
    assert torch.equal(fused[path].gate_up_proj[1, : gate.weight.shape[0]], gate.weight)
    assert bool((fused[path].down_proj[2] == 0).all())
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(logits(model), changed, rtol=1e-5, atol=1e-5)


def test_dense_models_have_none():
    model = build("llama")
    assert unfuse(model) == {} and list(fused_left(model)) == []


class Fused(torch.nn.Module):
    act_fn = torch.nn.SiLU()

    def __init__(self, gate_up, down, bias=False, is_transposed=False):
        super().__init__()
        self.gate_up_proj, self.down_proj = (torch.nn.Parameter(torch.zeros(s)) for s in (gate_up, down))
        if bias:
            self.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(gate_up[0], gate_up[1]))
        self.is_transposed = is_transposed


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (Fused((4, 6, 8), (4, 8, 3)), True),
        (Fused((4, 8, 6), (4, 3, 8)), False),
        (Fused((4, 6, 8), (4, 8, 3), bias=True), False),
        (Fused((4, 8, 8), (4, 8, 4), is_transposed=True), False),
        (Fused((4, 6, 8), (5, 8, 3)), False),
    ],
    ids=["common", "transposed", "bias", "flag", "count"],
)
def test_other_layouts_are_left_alone(module, known):
    model = torch.nn.ModuleDict({"experts": module})
    assert is_fused(module) and can_unfuse(module) is known
    replaced = unfuse(model)
    assert list(replaced) == (["experts"] if known else [])
    assert list(fused_left(model)) == ([] if known else ["experts"])
