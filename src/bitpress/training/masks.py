"""Zeros that stay zero while a model is trained: weights, gradients and moments, sharded or not.

A gradient is cut in its backward pass, so clipping and the optimizer never see it; moments then stay zero by
themselves, and weight decay has nothing to shrink. After each step the weights are cut too, unless the optimizer is
known to leave alone what has neither gradient nor moments. One byte a weight is held, and of small matrices one more
number in the gradient's width.

| wrapped by                 | how gradients are cut                                                  |
|----------------------------|------------------------------------------------------------------------|
| nothing                    | in place, all together, at the end of the backward pass                |
| DDP, ZeRO-1 and 2          | before they are added up, since what sends them waits there too        |
| FSDP2 (`fully_shard`)      | in place on the shard, after they are reduced                          |
| FSDP1, ZeRO-3              | refused: their shards have no shape                                    |

An optimizer that is not known may take gradients as they arrive, so there they are cut as with DDP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitpress import ranks
from bitpress.errors import NumericsError, PlanError
from bitpress.experts import LEAVES
from bitpress.math.masks import Structure, find_structure, holds, pruned
from bitpress.sites import Site

# numbers of a matrix for which a launch of its own costs a GPU more than reading a wider mask
SMALL = 1 << 21
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

# what wrappers put into the names of parameters
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")

# each weight is moved by its own gradient and moments alone: zeros stay
ELEMENTWISE = (
    torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.RMSprop, torch.optim.SGD,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A linear's weight in the model: a parameter, or a slice of one that holds all experts of a block.

    Attributes:
        name: the linear's name on disk.
        parameter: name of the parameter.
        index: of the expert in it; None: the parameter is the weight.
        rows: of the expert's matrix, first and after the last.
    """

    name: str
    parameter: str
    index: int | None = None
    rows: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Its (R, C) view of the whole parameter."""
        if self.index is None:
            return tensor
        matrix = tensor[self.index]
        return matrix if self.rows is None else matrix[slice(*self.rows)]


def parts_of(sites: Sequence[Site], model: nn.Module) -> list[Part]:
    """Where the weights of linears lie in the model, whose experts are fused."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    parts = []
    for site in sites:
        if site.key in shapes:
            parts.append(Part(site.name, site.key))
        elif site.expert is None:  # tied: its weight has another name
            parameter = model.get_submodule(site.module).weight
            parts.append(Part(site.name, next(n for n, p in model.named_parameters() if p is parameter)))
        else:
            experts, _, leaf = site.module.rpartition(f".{site.expert}.")
            if leaf == LEAVES[2]:
                parts.append(Part(site.name, f"{experts}.down_proj", site.expert))
                continue
            middle = shapes[f"{experts}.gate_up_proj"][1] // 2
            first = LEAVES.index(leaf) * middle
            parts.append(Part(site.name, f"{experts}.gate_up_proj", site.expert, (first, first + middle)))
    return parts


@dataclass
class Masks:
    """The zeros of a model's linears, as they are when it is made.

    Args:
        model: not wrapped yet.
        parts: the linears that are meant.

    Attributes:
        pruned: by parameter, true where a weight is to stay zero.
        structures: by linear, the N:M pattern that its weight has.
        shares: by linear, its share of zeros.
        dense: linears that have no zeros to keep.

    Raises:
        PlanError: none of the linears is pruned, or the weights are not there yet.
    """

    model: nn.Module
    parts: Sequence[Part]
    pruned: dict[str, Tensor] = field(default_factory=dict)
    structures: dict[str, Structure | None] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    moves_zeros: bool = True
    handles: list[Any] = field(default_factory=list)
    held: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)  # of the wrapped model, while it is attached
    cuts: dict[Tensor, Tensor] = field(default_factory=dict)  # by parameter: true where it is cut, or the integer 0
    arrived: list[Tensor] = field(default_factory=list)  # with gradients that are still to be cut
    backward: int = -1  # the backward pass that will cut them

    def __post_init__(self) -> None:
        parameters = dict(self.model.named_parameters())
        for part in self.parts:
            whole = parameters[part.parameter].detach()
            if whole.is_meta or (whole.dim() < 2 and hasattr(whole, "ds_shape")):
                raise PlanError(
                    f"{part.name}: its weight is not in this process; ZeRO-3 is not supported, use FSDP2 or ZeRO-2"
                )
            weight = part.of(whole)
            keep = pruned(weight)
            if keep is None:
                self.dense.append(part.name)
                continue
            mask = self.pruned.setdefault(part.parameter, torch.zeros_like(whole, dtype=torch.bool))
            part.of(mask).copy_(~keep)
            self.structures[part.name] = find_structure(weight)
            self.shares[part.name] = float((~keep).float().mean())
        if self.parts and not self.pruned:
            raise PlanError(
                f"ConstantPruningModifier: none of the {len(self.parts)} linears that it means is pruned, so there are "
                "no zeros to keep: prune first (SparseGPTModifier in a stage before), or drop it"
            )

    def attach(self, model: nn.Module, optimizer: Any) -> None:
        """Cut gradients from now on, and what the optimizer holds already; after the model has been wrapped.

        Raises:
            PlanError: the weights are sharded in a way that leaves no shape.
        """
        self.detach()
        self.model = model
        inner = getattr(optimizer, "optimizer", optimizer)
        self.moves_zeros = type(inner) not in ELEMENTWISE
        states = getattr(inner, "state", {})
        self.backward = -1
        for name, parameter in self._parameters().items():
            mask = self.pruned[name] = _like(self.pruned[name], parameter, name)
            self.held.append((parameter, mask))
            if parameter.requires_grad:
                self.handles.append(self._hook(parameter, mask))
            with torch.no_grad():
                _local(parameter).masked_fill_(mask, 0)
                moments = states.get(parameter, {}) if isinstance(states, Mapping) else {}
                for state in moments.values():
                    if isinstance(state, Tensor) and state.shape == parameter.shape:
                        _local(state).masked_fill_(mask, 0)

    @torch.no_grad()
    def cut(self) -> None:
        """Set the weights to zero where they are to be, after a step."""
        if not self.moves_zeros:
            return
        for parameter, mask in self.held:
            _local(parameter).masked_fill_(mask, 0)

    def detach(self) -> None:
        """Let gradients be as they are again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.held.clear()
        self.cuts.clear()
        self.arrived.clear()

    def _hook(self, parameter: Any, mask: Tensor) -> Any:
        """Set gradients to zero where they are masked; not a number times zero would not do."""
        if hasattr(parameter, "to_local"):

            def in_place(p: Tensor) -> None:
                if p.grad is not None:
                    _local(p.grad).masked_fill_(mask, 0)

            return parameter.register_post_accumulate_grad_hook(in_place)
        if ranks.started() > 1 or self.moves_zeros:
            return parameter.register_hook(lambda gradient: gradient.masked_fill(mask, 0))
        small = parameter.numel() <= SMALL and parameter.itemsize in INTEGERS
        self.cuts[parameter] = (~mask).to(INTEGERS[parameter.itemsize]) if small else mask
        return parameter.register_post_accumulate_grad_hook(self._arrives)

    def _arrives(self, parameter: Tensor) -> None:
        """A gradient has been added up; at the end of its backward pass it is cut."""
        self.arrived.append(parameter)
        number = torch._C._current_graph_task_id()
        if number != self.backward:  # by number: a pass that failed halfway never comes to its end
            self.backward = number
            torch.autograd.Variable._execution_engine.queue_callback(self._cut_arrived)

    @torch.no_grad()
    def _cut_arrived(self) -> None:
        """Cut the gradients that have arrived, those of small matrices in few launches: their bits times 1 or 0."""
        bits, kept = [], []
        for parameter in self.arrived:
            gradient, mask = parameter.grad, self.cuts[parameter]
            if gradient is None:
                continue
            if mask.dtype == torch.bool:
                gradient.masked_fill_(mask, 0)
            else:
                bits.append(gradient.view(mask.dtype))
                kept.append(mask)
        self.arrived.clear()
        if bits:
            torch._foreach_mul_(bits, kept)

    def whole(self, name: str) -> Tensor:
        """A parameter that has zeros, put together from its shards; all processes take part."""
        parameter: Any = self._parameters()[name].detach()
        return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # type: ignore[no-any-return]

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that have zeros, by the name that they had before they were wrapped."""
        found = {}
        for name, parameter in self.model.named_parameters():
            for wrapper in WRAPPERS:
                name = name.replace(wrapper, "")
            if (name := name.removeprefix("module.")) in self.pruned:
                found[name] = parameter
        if missing := self.pruned.keys() - found.keys():
            raise PlanError(f"{min(missing)}: is no parameter of the model any more; its zeros cannot be kept")
        return found

    def check(self, weights: Callable[[str], Tensor]) -> dict[str, float]:
        """Whether every zero and every pattern is still there.

        Args:
            weights: gives a parameter by its name, whole.

        Returns:
            The share of zeros of every linear that had some.

        Raises:
            NumericsError: a weight came back.
        """
        faults, shares = [], {}
        for part in self.parts:
            if part.name in self.dense:
                continue
            whole, pattern, share = weights(part.parameter), self.structures[part.name], self.shares[part.name]
            weight, mask = part.of(whole), self.pruned[part.parameter]
            shares[part.name] = float((weight == 0).float().mean())
            # of a shard only this process's part is known: there the pattern and the number of zeros are compared
            back = mask.shape == whole.shape and bool((weight[part.of(mask).to(weight.device)] != 0).any())
            if not weight.isfinite().all():
                faults.append(f"{part.name}: has NaN or infinity after training; lower the learning rate, or warm up")
            elif pattern is not None and not holds(weight, pattern):
                faults.append(f"{part.name}: is not {pattern} any more after training")
            elif back or shares[part.name] < share:
                faults.append(f"{part.name}: weights that were zero ({share:.2%}) are not any more after training")
        if faults:
            raise NumericsError(faults)
        return shares


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    whole: Any = tensor.detach()
    local: Tensor = whole.to_local() if hasattr(whole, "to_local") else whole
    return local


def _like(mask: Tensor, parameter: nn.Parameter, name: str) -> Tensor:
    """A mask laid out as the parameter is: on its device, or this process's shard of it."""
    if hasattr(parameter, "to_local"):  # a DTensor: its shard says itself where it is zero
        return _local(parameter) == 0 if mask.shape == parameter.shape else mask
    if mask.shape != parameter.shape:
        raise PlanError(
            f"{name}: is sharded without its shape (FSDP version 1 or ZeRO-3), so its zeros cannot be kept: use "
            "fsdp_version 2, DDP or ZeRO-2"
        )
    return mask.to(parameter.device)
