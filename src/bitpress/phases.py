"""Time and memory of a run by phase, also over the attempts of one that was killed and went on.

A phase's peak is exact where the process reached its highest size so far in it; elsewhere it is the size at its ends,
because the system keeps only one high-water mark, and resetting it would hide the peak of the whole run.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch

Found = Mapping[str, Mapping[str, float]]


class Phases:
    """Gathers both, phase by phase.

    Attributes:
        seconds: by phase.
        host, device: peaks in bytes, by phase.
        earlier: seconds of attempts before this one.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.host: dict[str, int] = {}
        self.device: dict[str, int] = {}
        self.earlier = 0.0
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._lap: dict[str, dict[str, float]] = {}
        self._before = self._sizes()
        self._lock = threading.Lock()  # blocks may be finished in a thread

    def add(self, phase: str, start: float) -> float:
        """A phase that began at `start` (`time.perf_counter`) and ends now; returns now."""
        now, before, after = time.perf_counter(), self._before, self._sizes()
        peaks = [high if high > was else max(a, b) for (a, was), (b, high) in zip(before, after, strict=True)]
        self._before = after
        with self._lock:
            self._take(self._lap, phase, now - start, *peaks)
        self._keep(phase, now - start, *peaks)
        return now

    def lap(self) -> dict[str, dict[str, float]]:
        """What was added since the last call, as plain data for a journal."""
        with self._lock:
            lap, self._lap = self._lap, {}
        return {p: {k: round(v, 3) for k, v in found.items()} for p, found in lap.items()}

    def went_before(self, lap: Found) -> None:
        """Count what an earlier attempt has noted."""
        for phase, found in lap.items():
            self._keep(phase, found["seconds"], int(found["host"]), int(found["device"]))
            self.earlier += found["seconds"]

    def to_dict(self) -> dict[str, Any]:
        """For the report's totals, in seconds and bytes."""
        return {
            "seconds_by_phase": {p: round(s, 2) for p, s in self.seconds.items()},
            "peak_bytes_by_phase": {p: {"host": self.host[p], "device": self.device[p]} for p in self.seconds},
        }

    def _keep(self, phase: str, seconds: float, host: int, device: int) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.host[phase] = max(self.host.get(phase, 0), host)
        self.device[phase] = max(self.device.get(phase, 0), device)

    @staticmethod
    def _take(lap: dict[str, dict[str, float]], phase: str, seconds: float, host: int, device: int) -> None:
        was = lap.get(phase, {"seconds": 0.0, "host": 0, "device": 0})
        lap[phase] = {
            "seconds": was["seconds"] + seconds,
            "host": max(was["host"], host),
            "device": max(was["device"], device),
        }

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Bytes now and at most so far, of the host and of the device."""
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        host = now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self._cuda is None:
            return host, (0, 0)
        return host, (torch.cuda.memory_allocated(self._cuda), torch.cuda.max_memory_allocated(self._cuda))
