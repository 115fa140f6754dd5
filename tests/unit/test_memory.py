"""The heap keeps freed memory within a run, and the process gives it back after it."""

import ctypes
import json
import os
import subprocess
import sys

import pytest

# In a fresh process, as thresholds are the process's: page faults and resident size while large blocks of memory come
# and go as those of tensors do. The module needs no torch, which would take seconds to import.
SCRIPT = """
import contextlib, json, resource, sys
from bitpress import memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def work():
    first = faults()
    for _ in range(10):
        bytearray(48 << 20)
    return faults() - first

start = resident()
with memory.kept() if sys.argv[1] == "kept" else contextlib.nullcontext():
    work()
    within, held = work(), resident() - start
after = resident() - start
try:
    with memory.kept():
        raise KeyError
except KeyError:
    pass
print(json.dumps({"within": within, "held": held, "after": after, "later": work()}))
"""


def measure(how, **environment):
    env = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout)


SIZE = 48 << 20
pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")


def test_memory_is_kept_and_given_back():
    kept, usual = measure("kept"), measure("usual")
    assert usual["within"] > 10 * SIZE // (2 << 20)  # every tensor anew, by pages of at most 2 MiB
    assert kept["within"] * 10 < usual["within"]
    assert kept["held"] > SIZE // 2 and kept["after"] < SIZE // 4
    assert kept["later"] > 10 * SIZE // (2 << 20)  # also after an exception


def test_settings_of_the_user_stay():
    assert measure("kept", MALLOC_ARENA_MAX="2")["within"] > 10 * SIZE // (2 << 20)
    assert measure("kept", GLIBC_TUNABLES="glibc.malloc.arena_max=2")["within"] > 10 * SIZE // (2 << 20)
