"""Memory of a device: what is in use, what is free, and the peak of a piece of work.

On a GPU torch's allocator counts; on the CPU the process's resident set, whose high-water mark Linux lets a process set
back.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Of mallopt(3), which Python does not name.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MEMORY, _LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


@dataclass
class Watched:
    """What a piece of work took beyond what was in use before it, bytes; valid after its end."""

    peak: int = 0
    held: int = 0  # still in use at its end


@contextlib.contextmanager
def watch(device: torch.device) -> Iterator[Watched]:
    """Measure the memory that is taken within the context.

    Linux lets a process reset its peak RSS; where it does not, the peak is what is held at the end.

    >>> with watch(torch.device("cpu")) as watched:
    ...     numbers = torch.ones(2**22)
    >>> watched.peak >= watched.held > 2**23
    True
    """
    gc.collect()
    watched, is_reset = Watched(), device.type == "cuda"
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            _RESET.write_text("5")
            is_reset = True
    before = in_use(device)
    yield watched
    watched.held = in_use(device) - before
    most = _highest_mark(device) if is_reset else 0
    watched.peak = max(0, watched.held, most - before)


def keep_freed() -> None:
    """Let up to a gigabyte of freed memory stay with this process, for the next step's tensors.

    Otherwise glibc hands the end of its heap back after every backward pass, and the next step gets it again page by
    page: a tenth of a small model's step (docs/log.md). `watch` and its figures are not changed.
    """
    with contextlib.suppress(AttributeError):  # another C library does as it likes
        mallopt = ctypes.CDLL(None).mallopt
        # The most that it takes. Setting one of the two ends the other's adjustment, too.
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def _highest_mark(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _of_process("VmHWM")


def in_use(device: torch.device) -> int:
    """Return the bytes that this process has in use on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return _of_process("VmRSS")


def available(device: torch.device) -> int:
    """Return the bytes that this process could still take on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds for itself but does not use.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    kib = re.search(r"MemAvailable:\s+(\d+)", _MEMORY.read_text())
    assert kib is not None
    free = 1024 * int(kib[1])
    if _LIMIT.exists() and (limit := _LIMIT.read_text().strip()).isdigit():
        free = min(free, int(limit) - in_use(device))
    return free


def _of_process(field: str) -> int:
    kib = re.search(rf"{field}:\s+(\d+)", _STATUS.read_text())
    assert kib is not None
    return 1024 * int(kib[1])
