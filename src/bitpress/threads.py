"""Work in a few threads, each with its share of torch's threads.

Where many small operations follow each other, one thread that runs them all on its part of the data beats several
that meet after each operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
