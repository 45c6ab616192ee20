"""What is freed and what is kept of a process's memory."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def free_bytes_of_malloc(how: str) -> int:
    """Return what glibc's allocator keeps after a step's activations were freed, in a process of its own."""
    command = [sys.executable, str(ROOT / "tests/programs/free_activations.py"), how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_freed_memory_stays_for_the_next_step() -> None:
    activations = 10 * 7 * 2**22
    assert free_bytes_of_malloc("keep") >= activations > free_bytes_of_malloc("give back")
