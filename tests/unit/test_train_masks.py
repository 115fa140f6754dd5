"""Zeros that stay zero: the hooks alone, without a trainer; sharded over two processes."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import bitpress.training.masks as masks_of
from bitpress.errors import NumericsError, PlanError
from bitpress.training.masks import Masks, Part


def sparse_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for i in (0, 2):
            model[i].weight.view(-1, 4)[:, :2] = 0
    return model


PARTS = [Part("first", "0.weight"), Part("last", "2.weight")]


def steps(model, masks, optimizer, count=3):
    for _ in range(count):
        for _ in range(2):
            model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
        masks.cut()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_any_optimizer(kind):
    model = sparse_model()
    masks = Masks(model, PARTS)
    assert str(masks.structures["first"]) == "2:4" and masks.shares["last"] == 0.5
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1)
    masks.attach(model, optimizer)
    before = model[0].weight.detach().clone()
    steps(model, masks, optimizer)
    assert not torch.equal(model[0].weight, before)
    parameters = dict(model.named_parameters())
    assert masks.check(lambda n: parameters[n].detach()) == {"first": 0.5, "last": 0.5}
    masks.detach()
    model(torch.randn(5, 8)).sum().backward()
    assert (model[0].weight.grad[masks.pruned["0.weight"]] != 0).any()


def test_infinite_gradients_and_moments_that_are_there_already():
    model = sparse_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(5, 8)).sum().backward()
    masks = Masks(model, PARTS)
    optimizer.step()
    masks.attach(model, optimizer)
    mask = masks.pruned["0.weight"]
    assert not (optimizer.state[model[0].weight]["exp_avg"][mask] != 0).any()
    assert not (model[0].weight[mask] != 0).any()
    optimizer.zero_grad()
    model(torch.full((5, 8), float("inf"))).sum().backward()
    assert not (model[0].weight.grad[mask] != 0).any()


class Restless(torch.optim.SGD):
    """Moves every weight, whatever its gradient."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(0.01)


def test_an_optimizer_that_moves_what_has_no_gradient():
    model = sparse_model()
    masks = Masks(model, PARTS)
    optimizer = Restless(model.parameters(), lr=0.1)
    masks.attach(model, optimizer)
    steps(model, masks, optimizer)
    parameters = dict(model.named_parameters())
    assert masks.check(lambda n: parameters[n].detach()) == {"first": 0.5, "last": 0.5}


def test_what_came_back_is_an_error():
    model = sparse_model()
    masks = Masks(model, PARTS)
    with torch.no_grad():
        model[0].weight[0, 0] = 1.0
        model[0].weight[0, 2] = 0.0
    parameters = dict(model.named_parameters())
    with pytest.raises(NumericsError, match=r"first: weights that were zero \(50.00%\) are not any more"):
        masks.check(lambda n: parameters[n].detach())
    with torch.no_grad():
        model[0].weight[0] = 1.0
    with pytest.raises(NumericsError, match="first: is not 2:4 any more"):
        masks.check(lambda n: parameters[n].detach())


def test_nothing_to_keep():
    with pytest.raises(PlanError, match="none of the 2 linears that it means is pruned"):
        Masks(nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)), PARTS)
    half = sparse_model()
    nn.init.normal_(half[2].weight)
    assert Masks(half, PARTS).dense == ["last"]


def test_shards_without_a_shape_are_refused():
    model = sparse_model()
    masks = Masks(model, PARTS)
    model[0].weight = nn.Parameter(model[0].weight.detach().flatten()[:10])
    with pytest.raises(PlanError, match=r"0\.weight: is sharded without its shape"):
        masks.attach(model, None)


def _worker(number, port, found):
    import os

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", rank=number, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    ways = {"ddp": nn.parallel.DistributedDataParallel, "fsdp2": lambda model: fully_shard(model, mesh=mesh)}
    for way, wrap in ways.items():
        weights = _trained(number, wrap)
        if number == 0:
            found.put((way, weights.tolist()))
    dist.destroy_process_group()


def _whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def _trained(number, wrap):
    model = sparse_model()
    masks = Masks(model, PARTS)
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1, weight_decay=0.1)
    masks.attach(wrapped, optimizer)
    torch.manual_seed(number)
    for _ in range(3):
        for _ in range(2):
            wrapped(torch.randn(5, 8)).square().sum().backward()
        assert float(_whole(nn.utils.clip_grad_norm_(wrapped.parameters(), 1e-3))) > 0
        for p in (model[0].weight, model[2].weight):
            grad = _whole(p.grad)
            assert int((grad.view(-1, 4)[:, :2] != 0).sum()) == 0 and (grad != 0).any()
        optimizer.step()
        masks.cut()
        optimizer.zero_grad()
    weights = {n: _whole(p) for n, p in model.named_parameters()}
    masks.check(lambda n: weights[n])
    for state in optimizer.state.values():
        moment = _whole(state["exp_avg"])
        assert moment.dim() < 2 or int((moment.view(-1, 4)[:, :2] != 0).sum()) == 0
    return weights["0.weight"]


def test_two_processes():
    """Gradients that are averaged (DDP), and weights that are sharded (FSDP2)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = mp.get_context("fork").SimpleQueue()
    mp.start_processes(_worker, (port, found), nprocs=2, start_method="fork")
    weights = dict(found.get() for _ in range(2))
    assert weights.keys() == {"ddp", "fsdp2"}
    for values in weights.values():
        weight = torch.tensor(values)
        assert not torch.equal(weight, sparse_model()[0].weight)
        assert int((weight.view(-1, 4)[:, :2] != 0).sum()) == 0
    torch.testing.assert_close(*(torch.tensor(w) for w in weights.values()))


@pytest.mark.parametrize("small", [masks_of.SMALL, 0])
def test_gradients_are_cut_together(small, monkeypatch):
    """At the end of a backward pass, by bits or one by one; also after one that failed, and beside frozen weights."""
    monkeypatch.setattr(masks_of, "SMALL", small)
    model = sparse_model()
    model[2].weight.requires_grad_(False)
    masks = Masks(model, PARTS)
    masks.attach(model, torch.optim.AdamW(model.parameters()))
    x = torch.randn(5, 8).requires_grad_()
    failing = x.register_hook(lambda gradient: 1 / 0)  # after the weights' gradients
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    failing.remove()
    for _ in range(2):
        model(x).sum().backward()
        grad = model[0].weight.grad.view(-1, 4)
        assert not (grad[:, :2] != 0).any() and (grad[:, 2:] != 0).any()
    model(torch.full((5, 8), float("nan"))).sum().backward()
    grad = model[0].weight.grad.view(-1, 4)
    assert not (grad[:, :2] != 0).any() and grad[:, 2:].isnan().any()
