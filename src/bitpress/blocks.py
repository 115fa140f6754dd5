"""The decoder blocks of a model: find them, run one with the model's own forward, collect statistics in it.

The model's forward drives. All blocks before the one at work hand their input through unchanged; the one at work is
given its stored hidden states in place of what arrives, so it gets exactly the masks, position embeddings and
per-layer arguments of its architecture; then the forward is left. The only hooks of the project are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitpress.attention import sliced
from bitpress.errors import NumericsError, PlanError
from bitpress.fused import fused
from bitpress.math.activations import OutputRange
from bitpress.math.products import forward_products
from bitpress.math.stats import InputStats, StatsAccumulator

Batch = tuple[Tensor, Tensor | None]  # token ids (B, L); hidden states (B, L, C), None before the first block


class _Left(Exception):  # noqa: N818  a way out of the model's forward, not an error
    """Leaves the model's forward once the block at work is done."""


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Name and modules of the model's list of decoder blocks.

    Raises:
        PlanError: the model has no list of blocks.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    outer = [(n, m) for n, m in lists if not any(n.startswith(o + ".") for o, _ in lists)]
    if not outer:
        raise PlanError(f"{type(model).__name__}: no list of decoder blocks found; is it a decoder language model?")
    name, found = max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return name, list(found)


class Blocks:
    """The blocks of one model and how to run them.

    Args:
        model: a causal language model of transformers; its parameters may be on the meta device but for what is run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.path, self.modules = find_blocks(model)
        self._returns_tuple = False

    def __len__(self) -> int:
        return len(self.modules)

    def prefix(self, index: int) -> str:
        """Module name of block `index`, with the dot."""
        return f"{self.path}.{index}."

    def run(self, index: int, batch: Batch) -> Tensor:
        """The hidden states after block `index`, (B, L, C), given those before it."""
        out = self.visit(index, batch)
        assert out is not None
        return out

    def run_with(self, index: int, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
        """As `run`, with other tensors in place of the parameters of these names, and with their gradients."""
        out = self.visit(index, batch, weights)
        assert out is not None
        return out

    def visit(self, index: int, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Tensor | None:
        """As `run`, but a hook may leave the block before its end; then there is no output."""
        result: list[Tensor] = []
        original = self.modules[index].forward

        def at_work(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _with_hidden(args, kwargs, batch[1])
            out = original(*args, **kwargs)
            self._returns_tuple = isinstance(out, tuple)
            result.append(out[0] if isinstance(out, tuple) else out)
            raise _Left

        self._drive(batch[0], index, at_work, weights)
        return result[0] if result else None

    def visit_tail(self, batch: Batch) -> None:
        """Runs what follows the last block (norm, head), given the hidden states after it; for the hooks in it."""

        def at_work(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _with_hidden(args, kwargs, batch[1])
            return self._through(*args, **kwargs)

        self._drive(batch[0], len(self) - 1, at_work)

    def logits(self, batch: Batch, gradients: bool = False) -> Tensor:
        """The model's logits (B, L, V) in float32, given the hidden states after the last block; on request with their
        gradients."""

        def at_work(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _with_hidden(args, kwargs, batch[1])
            return self._through(*args, **kwargs)

        found: Tensor = self._drive(batch[0], len(self) - 1, at_work, {} if gradients else None).logits
        return found.float()

    def _drive(
        self, ids: Tensor, index: int, at_work: Callable[..., Any], weights: Mapping[str, Tensor] | None = None
    ) -> Any:
        with (
            sliced(),
            forward_products(),
            fused(self.modules[index]) if weights is None else nullcontext(),
            _forwards(self.modules[:index], self._through),
            _forwards(self.modules[index : index + 1], at_work),
        ):
            try:
                if weights is None:
                    with torch.no_grad():
                        return self.model(input_ids=ids, use_cache=False)
                inputs = {"input_ids": ids, "use_cache": False}
                return functional_call(self.model, dict(weights), (), inputs, tie_weights=False)
            except _Left:
                return None

    def _through(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self._returns_tuple else hidden


def _with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor | None) -> tuple[Any, dict[str, Any]]:
    """The block's arguments with the stored hidden states in place of the ones that arrived."""
    if hidden is None:
        return args, kwargs
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


@contextmanager
def _forwards(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, the modules' forward is another function; attributes and hooks stay."""
    before = [m.__dict__.get("forward") for m in modules]
    for m in modules:
        m.__dict__["forward"] = forward
    try:
        yield
    finally:
        for m, old in zip(modules, before, strict=True):
            if old is None:
                del m.__dict__["forward"]
            else:
                m.__dict__["forward"] = old


@dataclass
class _Shared:
    """One distinct input: its sums, the tensors added to them, and how many of these each of its linears read."""

    sums: StatsAccumulator
    added: int = 0
    reads: dict[str, int] = field(default_factory=dict)

    def add(self, x: Tensor, full: Tensor | None = None, lack: Tensor | None = None) -> None:
        self.sums.add(x, full, lack)
        self.added += 1

    def read_by(self, name: str) -> None:
        self.reads[name] = self.reads.get(name, 0) + 1


@dataclass(frozen=True)
class Collected:
    """Statistics of one pass: per distinct input, and the linears left for another pass by the memory limit."""

    groups: list[tuple[InputStats, tuple[str, ...]]]
    deferred: tuple[str, ...]


def collect(
    run: Callable[[Batch], Tensor | None],
    linears: dict[str, nn.Module],
    batches: Iterable[Batch],
    *,
    budget: int,
    needs: frozenset[str] = frozenset({"gram"}),
    leave_early: bool = True,
    beside: Callable[[int], Batch | None] | None = None,
    keep: Callable[[int, Tensor], None] | None = None,
    unpaired: frozenset[str] = frozenset(),
    adds: str | None = None,
    out: Callable[[int, Tensor], None] | None = None,
) -> Collected:
    """Run all batches and sum the statistics of every distinct input of the given linears.

    Linears that receive the very same tensor share one sum. It is found by the tensor's identity, not by names.

    Args:
        run: runs the block (or the tail) on a batch.
        linears: by name.
        batches: ids and hidden states.
        budget: bytes that statistics may take; at least one is always made, the rest is deferred.
        needs: which statistics, see `Modifier.needs`.
        leave_early: leave the block when its last linear has its input (its output is not needed). Not for blocks
            in which linears are called depending on the data.
        beside: the batch of a number in the uncompressed model's stream, None if it is not there; it is run first,
            and its inputs are the `full` ones of `StatsAccumulator.add`.
        keep: what to do with the outputs of those batches.
        unpaired: linears whose tokens differ from one stream to the other, such as experts.
        adds: the linear whose output is added to the block's (`bitpress.residual`): of batches in both streams, what
            the block's output lacks is summed with its input, in place of the input's drift.
        out: what to do with the output of each batch of a number; then the block is not left early.

    Raises:
        NumericsError: linears that shared an input in one batch did not in another.
    """
    shared: dict[str, _Shared] = {}  # reader -> its input
    deferred: set[str] = set()
    current: dict[int, tuple[Tensor, str | None]] = {}  # tensors seen in this batch, kept so that ids stay theirs
    order: list[str] = []
    last: list[str] = []
    full: dict[str, Tensor] = {}
    waiting: list[tuple[_Shared, Tensor]] = []  # the input of `adds`, until the block's output is there
    recording = False
    used = 0

    def take(name: str, entry: _Shared, x: Tensor) -> None:
        other = None if name in unpaired else full.get(name)
        if name == adds and other is not None:
            waiting.append((entry, x))
        else:
            entry.add(x, other)
        current[id(x)] = (x, name)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal used
            x: Tensor = args[0]
            if recording:
                full[name] = x
                return
            order.append(name)
            seen = current.get(id(x))
            if name in deferred:
                current.setdefault(id(x), (x, None))
            elif name in shared:
                entry = shared[name]
                if seen is None:
                    take(name, entry, x)
                elif seen[1] is None or shared[seen[1]] is not entry:
                    raise _shared_at_times(name)
                entry.read_by(name)
            elif seen is not None and seen[1] is not None:
                entry = shared[name] = shared[seen[1]]
                entry.read_by(name)
            else:
                size = StatsAccumulator.nbytes(x.shape[-1], needs)
                if shared and used + size > budget:
                    deferred.add(name)
                    current[id(x)] = (x, None)
                else:
                    used += size
                    outputs = _rows(module) if name == adds else None
                    entry = shared[name] = _Shared(StatsAccumulator(x.shape[-1], x.device, needs, outputs))
                    take(name, entry, x)
                    entry.read_by(name)
            if last and name == last[0] and not waiting:
                raise _Left

        return before

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    try:
        for number, batch in enumerate(batches):
            current.clear()
            full.clear()
            if beside is not None and (other := beside(number)) is not None:
                recording = True
                uncompressed = run(other)
                recording = False
                if keep is not None and uncompressed is not None:
                    keep(number, uncompressed)
            found = run(batch)
            while waiting:
                entry, x = waiting.pop()
                assert uncompressed is not None and found is not None
                entry.add(x, lack=uncompressed.float() - found.float())
            if out is not None and found is not None:
                out(number, found)
            if leave_early and out is None and not last and order:
                last.append(order[-1])
            order.clear()
    finally:
        current.clear()
        full.clear()
        for handle in handles:
            handle.remove()
    distinct = list({id(entry): entry for entry in shared.values()}.values())
    for entry in distinct:
        for name, reads in entry.reads.items():
            if reads != entry.added:
                raise _shared_at_times(name)
    groups = [(entry.sums.finish(), tuple(entry.reads)) for entry in distinct]
    return Collected(groups, tuple(n for n in linears if n in deferred))


def _rows(linear: nn.Module) -> int:
    assert isinstance(linear.weight, Tensor)
    return linear.weight.shape[0]


def _shared_at_times(name: str) -> NumericsError:
    return NumericsError(f"{name}: shares its input with other linears in some batches only")


class _Recorder:
    """Stands in for a cache: hands keys and values back as they come, and keeps their range by head."""

    def __init__(self) -> None:
        self.keys: OutputRange | None = None
        self.values: OutputRange | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, L, D) of one call of an attention."""
        self.keys, self.values = _wider(self.keys, keys), _wider(self.values, values)
        return keys, values


def _wider(before: OutputRange | None, x: Tensor) -> OutputRange:
    now = OutputRange(x.amin((0, 2, 3)).float(), x.amax((0, 2, 3)).float())
    return now if before is None else before.merge(now)


@contextmanager
def recorded_caches(
    attentions: dict[str, nn.Module], argument_of: Callable[[nn.Module], str]
) -> Iterator[dict[str, _Recorder]]:
    """Within it, what these attention modules put into their caches is recorded, by their names.

    Args:
        argument_of: name of the argument by which a module takes its cache.
    """
    recorders = {name: _Recorder() for name in attentions}

    def before(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, argument_of(module): recorders[name]}

        return hook

    handles = [m.register_forward_pre_hook(before(n), with_kwargs=True) for n, m in attentions.items()]
    try:
        yield recorders
    finally:
        for handle in handles:
            handle.remove()
