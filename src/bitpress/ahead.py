"""A block's weights, read from the disk and copied to a GPU while the block before it is at work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Read = tuple[dict[str, Tensor], torch.cuda.Event | None]  # tensors, and when their copies have arrived


class Ahead:
    """Reads one block after another in a thread, into page-locked memory, and copies it on a stream of its own.

    Args:
        read: the tensors of a block by key, in the dtypes that the model has, given the prefix of its keys.
    """

    def __init__(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, "bitpress-reader")
        self._stream: torch.cuda.Stream | None = None
        self._coming: dict[str, Future[Read]] = {}

    def start(self, prefix: str, onto: torch.device | None) -> None:
        """Begin to read a block, and to copy it to a GPU if one is named."""
        if prefix not in self._coming:
            self._coming[prefix] = self._thread.submit(self._fetch, prefix, onto)

    def _fetch(self, prefix: str, onto: torch.device | None) -> Read:
        pinned = {key: tensor.pin_memory() for key, tensor in self._read(prefix).items()}
        if onto is None:
            return pinned, None
        if self._stream is None:
            self._stream = torch.cuda.Stream(onto)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            copies = {key: tensor.to(onto, non_blocking=True) for key, tensor in pinned.items()}
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        return copies, arrived

    def take(self, prefix: str | None, device: torch.device) -> dict[str, Tensor] | None:
        """The tensors of a block, ready for the device's current stream; None if it was not begun."""
        coming = None if prefix is None else self._coming.pop(prefix, None)
        if coming is None:
            return None
        tensors, arrived = coming.result()
        if arrived is not None:
            here = torch.cuda.current_stream(device)
            here.wait_event(arrived)
            for tensor in tensors.values():
                tensor.record_stream(here)
        return tensors

    def close(self) -> None:
        """Give up what was begun, once it is read."""
        self._thread.submit(self._coming.clear).result()
