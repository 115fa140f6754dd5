"""Hidden states between two blocks, one tensor a batch: on the device, in host memory, or on disk."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """The hidden states of all batches.

    Args:
        where: "device", "host" or "disk". On the host of a GPU they are in pinned memory, and copied beside the work.
        device: where they are used.
        folder: for "disk": where their files go; they are deleted at the end.
    """

    def __init__(self, where: str, device: torch.device, folder: Path | None = None) -> None:
        self.where, self.device = where, device
        self._tensors: dict[int, Tensor] = {}
        self._files: set[int] = set()
        self._copies = _Copies(device) if where == "host" and device.type == "cuda" else None
        if where == "disk":
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="states-", dir=folder))

    def __getitem__(self, batch: int) -> Tensor | None:
        """The states of a batch (B, L, C) on the device; None before the first block."""
        if self.where == "disk":
            if batch not in self._files:
                return None
            loaded: Tensor = torch.load(self._file(batch), weights_only=True)
            return loaded.to(self.device)
        held = self._tensors.get(batch)
        if held is None or self._copies is None:
            return held
        return self._copies.take(batch, held)

    def prefetch(self, batch: int) -> None:
        """Start to bring a batch to the device, which will be asked for next."""
        if self._copies is not None and (held := self._tensors.get(batch)) is not None:
            self._copies.start(batch, held)

    def __setitem__(self, batch: int, states: Tensor) -> None:
        if self.where == "disk":
            torch.save(states.cpu(), self._file(batch))
            self._files.add(batch)
        elif self._copies is not None:
            held = self._tensors.get(batch)
            if held is None:
                held = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
            self._tensors[batch] = held
            self._copies.store(batch, held, states)
        else:
            self._tensors[batch] = states

    def sequence(self, batch: int, row: int) -> Tensor | None:
        """The states of one sequence of a batch (1, L, C) on the device; nothing else is moved or read."""
        if self.where == "disk":
            if batch not in self._files:
                return None
            whole: Tensor = torch.load(self._file(batch), weights_only=True, mmap=True)
            return whole[row : row + 1].to(self.device, copy=True)
        held = self._tensors.get(batch)
        if held is None or self._copies is None:
            return None if held is None else held[row : row + 1]
        self._copies.wait(batch)
        return held[row : row + 1].to(self.device, non_blocking=True)

    def _file(self, batch: int) -> Path:
        return self._folder / f"{batch}.pt"

    def close(self) -> None:
        """Free memory and files."""
        if self._copies is not None:
            torch.cuda.synchronize(self.device)  # pinned memory is not freed under a copy
        self._tensors.clear()
        if self.where == "disk":
            shutil.rmtree(self._folder, ignore_errors=True)


class _Copies:
    """Copies between a GPU and pinned memory on streams of their own, one each way, beside the work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._up = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._down = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._stored: dict[int, torch.cuda.Event] = {}

    def start(self, batch: int, held: Tensor) -> None:
        if batch in self._coming:
            return
        if batch in self._stored:
            self._up.wait_event(self._stored[batch])
        with torch.cuda.stream(self._up):
            copy = held.to(self.device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._up)
        self._coming[batch] = copy, event

    def take(self, batch: int, held: Tensor) -> Tensor:
        self.start(batch, held)
        copy, event = self._coming.pop(batch)
        now = torch.cuda.current_stream(self.device)
        now.wait_event(event)
        copy.record_stream(now)
        return copy

    def store(self, batch: int, held: Tensor, states: Tensor) -> None:
        self._coming.pop(batch, None)
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            held.copy_(states, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._down)
        states.record_stream(self._down)
        self._stored[batch] = event

    def wait(self, batch: int) -> None:
        """What is queued from now on sees the batch in host memory as it was stored last."""
        if batch in self._stored:
            torch.cuda.current_stream(self.device).wait_event(self._stored[batch])


class FullStream:
    """Hidden states of the uncompressed model, of every n-th batch, beside those of the compressed one.

    Args:
        every: which batches: those whose number it divides.
        first: number of the first batch here, where other processes have those before it.
    """

    def __init__(
        self, every: int, where: str, device: torch.device, folder: Path | None = None, *, first: int = 0
    ) -> None:
        self.every, self.first = every, first
        self._now, self._next = HiddenStates(where, device, folder), HiddenStates(where, device, folder)

    def has(self, batch: int) -> bool:
        """Whether a batch is in it."""
        return (self.first + batch) % self.every == 0

    def __getitem__(self, batch: int) -> Tensor | None:
        """The states of a batch before the block at work; None before the first block."""
        return self._now[batch]

    def keep(self, batch: int, states: Tensor) -> None:
        """The states of a batch after the block at work."""
        self._next[batch] = states

    def after(self, batch: int) -> Tensor:
        """What was kept: the output that the block at work should have."""
        found = self._next[batch]
        assert found is not None
        return found

    def sequence_after(self, batch: int, row: int) -> Tensor:
        """The same of one sequence, (1, L, C)."""
        found = self._next.sequence(batch, row)
        assert found is not None
        return found

    def advance(self) -> None:
        """Go on to the next block."""
        self._now, self._next = self._next, self._now

    def close(self) -> None:
        """Free memory and files."""
        self._now.close()
        self._next.close()
