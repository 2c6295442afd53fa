"""Freed buffers stay in the process, in glibc's heap, instead of being unmapped."""

import subprocess
import sys

# A process of its own: the setting cannot be undone.
PROGRAM = """
import mmap, platform, sys
import torch
from pdserve.workers.models.host_memory import retain_freed_memory

def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE

retained = retain_freed_memory() if sys.argv[1] == "retain" else False
assert retained == (sys.argv[1] == "retain" and platform.libc_ver()[0] == "glibc")
buffer = torch.ones(128 << 20, dtype=torch.uint8)
full = resident_bytes()
del buffer
print(full - resident_bytes())
"""


def released_bytes(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_retained_only_when_asked_for() -> None:
    assert released_bytes("default") > 100 << 20
    assert released_bytes("retain") < 10 << 20
