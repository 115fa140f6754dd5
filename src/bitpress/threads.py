"""Work in threads: a few at once, each with its share of torch's threads, or one that runs beside what comes next.

Where many small operations follow each other, one thread that runs them all on its part of the data beats several
that meet after each operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

MOST = 8  # beyond, threads wait for the interpreter; each of these then has several of torch's threads

T = TypeVar("T")


def workers() -> int:
    """Threads that `together` uses, at most."""
    return min(torch.get_num_threads(), MOST)


@torch.no_grad()
def together(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """The results of tasks that run at the same time, in the order of the tasks; gradients are off in them.

    Bits do not depend on which thread takes a task, but may depend on the number of torch's threads.
    """
    total, count = torch.get_num_threads(), min(workers(), len(tasks))
    if count <= 1:
        return [task() for task in tasks]

    def run(task: Callable[[], T]) -> T:
        with torch.no_grad():  # a setting of the thread, like the number of torch's threads
            return task()

    share = max(1, total // workers())
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            return list(pool.map(run, tasks))
    finally:
        torch.set_num_threads(total)  # what later threads start with


class Beside:
    """Runs one task at a time beside the work of the thread that starts it; on a GPU on a stream of its own.

    Args:
        urgent: on a GPU its launches go before those of other streams: small ones fit beside large ones.
    """

    def __init__(self, name: str, *, urgent: bool = False) -> None:
        self._thread = ThreadPoolExecutor(1, f"bitpress-{name}")
        self._waiting: Future[None] | None = None
        self._priority = -1 if urgent else 0
        self._stream: torch.cuda.Stream | None = None  # one for all: memory that it freed serves it again

    def start(self, device: torch.device, task: Callable[[], Any]) -> None:
        """Start a task once the one before it has ended; it sees what has been launched on the GPU so far.

        Raises:
            Exception: of the task before.
        """
        self.settle()
        ready = None
        if device.type == "cuda":
            if self._stream is None:
                self._stream = torch.cuda.Stream(device, priority=self._priority)  # type: ignore[no-untyped-call]
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(device))
        self._waiting = self._thread.submit(self._run, ready, task)

    def settle(self) -> None:
        """Wait for the task.

        Raises:
            Exception: of the task.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.result()

    def close(self) -> None:
        """Wait for the task, whatever becomes of it."""
        self._thread.shutdown()

    @torch.no_grad()
    def _run(self, ready: torch.cuda.Event | None, task: Callable[[], Any]) -> None:
        if ready is None or self._stream is None:
            task()
            return
        # a thread begins at the first GPU
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            ready.wait()
            try:
                task()
            finally:
                self._stream.synchronize()  # only then is freed what other streams have made
