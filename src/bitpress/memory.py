"""glibc's heap during a run: freed memory is kept within a block and given back after it.

By default glibc asks the system for every large tensor anew and gives it back at once, so each operation pays for
page faults on its output; they took a quarter of a forward.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from malloc.h
KEPT = 1 << 30  # bytes: larger tensors, and more free memory than this, go back to the system at once
# glibc cannot go back to its thresholds that follow the sizes in use; these are the highest that they reach
USUAL = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}


@contextmanager
def kept() -> Iterator[None]:
    """Within it, freed memory stays with the process until `give_back`. Settings that the user has made stay."""
    libc = ctypes.CDLL(None)
    theirs = "MALLOC_" in " ".join(os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if theirs or not hasattr(libc, "mallopt"):
        yield
        return
    for parameter in USUAL:
        libc.mallopt(parameter, KEPT)
    try:
        yield
    finally:
        for parameter, value in USUAL.items():
            libc.mallopt(parameter, value)
        give_back()


def give_back() -> None:
    """Give freed memory back to the system: glibc keeps it, in pieces that the next block does not fit into."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
