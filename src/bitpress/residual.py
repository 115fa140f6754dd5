"""Which linear of a block writes into the block's output: what it returns is added to it, and nothing else reads it.

Of a block of x + attention(norm(x)) and x + mlp(norm(x)) that is the last linear of the mlp. What the block's output
lacks of the uncompressed model's can then be taken up by that linear: see `bitpress.math.correct`. Found by trying,
not by names; where a norm, a gate or a router comes after it (Gemma, experts) there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from bitpress.blocks import Batch

TOKENS = 64  # that are enough to see it
SAME = 0.02  # of a channel's size: what rounding to 16 bits may change


def writer(run: Callable[[Batch], Tensor], linears: Mapping[str, nn.Module], batch: Batch) -> str | None:
    """The name of the linear that a block calls last, if what it returns is added to the block's output as it is.

    None too if others read its input, or if it has more rows than columns: the statistics that it would need in place
    of its input's drift would be larger.

    Args:
        run: runs the block.
        linears: those that may be the one, by name.
        batch: token ids (1, L) and hidden states (1, L, C).
    """
    inputs: list[tuple[str, Tensor]] = []

    def seen(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.append((name, args[0]))

    handles = [m.register_forward_pre_hook(seen(n)) for n, m in linears.items()]
    try:
        before = run(batch).float()
    finally:
        for handle in handles:
            handle.remove()
    if not inputs:
        return None
    last, x = inputs.pop()
    rows, columns = linears[last].weight.shape  # type: ignore[misc]
    if rows > columns or any(name == last or other is x for name, other in inputs):
        return None
    push = before.roll(1, dims=1)  # as large as what it is added to, channel by channel

    def pushed(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out + push.to(out.dtype).reshape(out.shape) if out.numel() == push.numel() else out

    moving = linears[last].register_forward_hook(pushed)
    try:
        moved = run(batch).float() - before
    finally:
        moving.remove()
    wrong, size = (moved - push).norm(dim=(0, 1)), before.norm(dim=(0, 1))
    return last if bool((wrong <= SAME * size).all()) else None
