"""What is freed and what is kept of a process's memory."""

from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource
import sys
import torch
from clipcore import memory

if sys.argv[1] == "keep":
    memory.keep_freed()

def steps() -> None:
    for _ in range(20):
        # A step's activations: megabytes each, of different sizes, freed together.
        kept = [torch.ones(2**20 + 4096 * i) for i in range(10)]

steps()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
with memory.watch(torch.device("cpu")) as watched:
    numbers = torch.ones(2**22)
assert 2**24 <= watched.peak <= 1.2 * 2**24, watched
"""


def page_faults(how: str) -> int:
    """Pages that twenty steps had to ask the kernel for."""
    command = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_stays_for_the_next_step() -> None:
    assert page_faults("keep") < 500 < page_faults("give back")
