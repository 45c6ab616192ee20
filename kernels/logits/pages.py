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
    """An uninitialised tensor; a large one in huge pages that stay with the process for the next call's.

    The first touch of memory costs more than a pass over it, in a virtual machine ten times as much.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < 4 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    pages = _take_pages(size)
    # The tensor holds the array, and with its end the pages are idle again.
    array = (ctypes.c_byte * size).from_buffer(pages)
    weakref.finalize(array, _idle_pages.append, pages).atexit = False
    out = torch.frombuffer(array, dtype=dtype).view(shape)
    poisoned = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if poisoned and torch.are_deterministic_algorithms_enabled():  # as torch.empty
        out.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max)
    return out


_idle_pages: list[mmap.mmap] = []
_taking = threading.Lock()


def _take_pages(size: int) -> mmap.mmap:
    """Idle pages of about this size. Where there are none all idle ones are given back: they were another problem's."""
    with _taking:
        fitting = [pages for pages in _idle_pages if size <= len(pages) <= 2 * size]
        if fitting:
            smallest = min(fitting, key=len)
            _idle_pages.remove(smallest)
            return smallest
        _idle_pages.clear()
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages has others
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def give_back_idle_pages() -> None:
    """Frees the pages that no buffer uses."""
    with _taking:
        _idle_pages.clear()
