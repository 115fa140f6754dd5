"""Where to compute: the device that a name means, and work that goes to it alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bitpress import ranks
from bitpress.errors import ConfigError, counted

if TYPE_CHECKING:
    import torch


def pick_device(name: str | torch.device) -> torch.device:
    """The device of a name: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: it is not there, or cannot be for several processes.
    """
    import torch

    name = str(name) if isinstance(name, torch.device) else name
    several, known = ranks.world_size() > 1, "use auto, cpu, cuda or cuda:N"
    if not isinstance(name, str):
        raise ConfigError(f"device: expected a name, got {name!r}; {known}")
    if several and name.startswith("cuda:"):
        raise ConfigError(
            f"device: '{name}' cannot be for {ranks.world_size()} processes; use cuda: each takes its own"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if several and name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{ranks.gpu()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: '{name}' is unknown; {known}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: '{name}' is not supported; {known}")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"device: '{name}' was asked for, but torch sees no GPU; use cpu or auto")
    if device.index is not None and device.index >= (count := torch.cuda.device_count()):
        raise ConfigError(f"device: '{name}' was asked for, but torch sees {counted(count, 'GPU')}, from cuda:0 on")
    return device


@contextmanager
def working_on(device: torch.device) -> Iterator[None]:
    """Kernels, streams and events that name no device go to this one; they would go to the first GPU."""
    import torch

    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


def is_slow() -> bool:
    """Whether a forward takes long here: no GPU, and a processor that multiplies bfloat16 as float32."""
    import torch

    from bitpress.math.products import without_instructions

    return not torch.cuda.is_available() and without_instructions(torch.bfloat16)
