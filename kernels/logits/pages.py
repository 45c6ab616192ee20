"""Large buffers on the CPU, in huge pages that stay with the process."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import weakref

import torch
from torch import Tensor

HUGE_PAGE = 2**21


def buffer(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor; a large one lies in huge pages that the process keeps for the next call.

    The first touch of new memory costs more than a pass over it: ten times as much in a virtual machine.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < 4 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    pages = _take_pages(size)
    # The tensor holds the array. When the array is freed, its pages become idle again.
    array = (ctypes.c_byte * size).from_buffer(pages)
    weakref.finalize(array, _idle_pages.append, pages).atexit = False
    out = torch.frombuffer(array, dtype=dtype).view(shape)
    poisoned = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if poisoned and torch.are_deterministic_algorithms_enabled():  # as torch.empty does
        out.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max)
    return out


_idle_pages: list[mmap.mmap] = []
_taking = threading.Lock()


def _take_pages(size: int) -> mmap.mmap:
    """Take idle pages of about this size, or free all idle ones, which are another problem's, and map new ones."""
    with _taking:
        fitting = [pages for pages in _idle_pages if size <= len(pages) <= 2 * size]
        if fitting:
            smallest = min(fitting, key=len)
            _idle_pages.remove(smallest)
            return smallest
        _idle_pages.clear()
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages uses small ones
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def give_back_idle_pages() -> None:
    """Free the pages that no buffer uses."""
    with _taking:
        _idle_pages.clear()
