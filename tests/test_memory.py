"""What is freed and what is kept of a process's memory."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipcore.run import memory

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


def test_a_watch_reads_the_resident_set_and_its_reset_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, reset = tmp_path / "status", tmp_path / "clear_refs"
    reset.touch()
    monkeypatch.setattr(memory, "_STATUS", status)
    monkeypatch.setattr(memory, "_RESET", reset)
    status.write_text("VmHWM:\t  900 kB\nVmRSS:\t  100 kB\n")
    with memory.watch(torch.device("cpu")) as watched:
        assert reset.read_text() == "5"  # proc(5): the peak is what is resident from now on
        status.write_text("VmHWM:\t  170 kB\nVmRSS:\t  130 kB\n")
    assert (watched.held, watched.peak) == (30 * 1024, 70 * 1024)
