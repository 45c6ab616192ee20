"""Blocks of logits on the CPU: sides that stay in the cache, their buffers, and what turns sums into gradients.

Legend: logits.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from clipcore.kernels import logits
from clipcore.kernels.logits import Pairs
from clipcore.kernels.normalize import normalize_bwd_ref, normalize_ref

# Columns of a block. A block is as large as the workspace, for the library's products; the passes over its elements
# walk over strips of it that stay in the cache.
CPU_COLUMNS = 8192
STRIP_BYTES = 2**20
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


def cpu_sides(num_columns: int, dtype: torch.dtype, workspace_bytes: int) -> tuple[int, int]:
    """Rows and columns of a block on the CPU, which fills the workspace."""
    columns = max(1, min(num_columns, CPU_COLUMNS))
    return max(1, workspace_bytes // (dtype.itemsize * columns)), columns


def strip_rows(num_columns: int, dtype: torch.dtype) -> int:
    """Rows of a strip."""
    return max(1, STRIP_BYTES // (dtype.itemsize * num_columns))


def strips(rows: slice, num_columns: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
    """Strips of a block with these rows: their rows among all and in the block."""
    for part in logits.blocks(rows.stop - rows.start, strip_rows(num_columns, dtype)):
        yield slice(rows.start + part.start, rows.start + part.stop), part


def scaled(x_RE: Tensor, factor: Tensor) -> Tensor:
    """The operand of logits, by a factor of two numbers: rounding it to one float32 would shift all logits alike."""
    high = factor.to(x_RE.dtype)
    return (x_RE * high).add_(x_RE, alpha=(factor - high.double()).item())


def masks(pairs: Pairs) -> tuple[Tensor | None, Tensor | None]:
    """(invalid, positive) of a block's pairs, where ids make them differ from nothing and the diagonal."""
    if pairs.image_ids is None or pairs.text_ids is None:
        return None, None
    same_RC = pairs.image_ids[:, None] == pairs.text_ids
    if pairs.same_id == "positive":
        return None, same_RC
    same_RC.diagonal(pairs.first_label).fill_(False)
    return same_RC, None


def masks_of_rows(pairs: Pairs, row_n: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(invalid, positive) of some rows, by their numbers, and a block's columns."""
    column_m = torch.arange(columns.start, columns.stop, device=row_n.device)
    own_NM = (row_n + pairs.first_label)[:, None] == column_m
    if pairs.image_ids is None or pairs.text_ids is None:
        return torch.zeros_like(own_NM), own_NM
    same_NM = pairs.image_ids[row_n, None] == pairs.text_ids[columns]
    if pairs.same_id == "positive":
        return torch.zeros_like(own_NM), same_NM
    return same_NM & ~own_NM, own_NM


def diagonal(matrix_RC: Tensor, pairs: Pairs) -> tuple[Tensor, slice, slice]:
    """A block's elements that are pairs by their place: a view of them, their rows and their columns in the block."""
    view = matrix_RC.diagonal(pairs.first_label)
    first_row, first_column = max(0, -pairs.first_label), max(0, pairs.first_label)
    return (
        view,
        slice(first_row, first_row + len(view)),
        slice(first_column, first_column + len(view)),
    )


def unit_rows_cpu(x_NE: Tensor, normalized: bool, dtype: torch.dtype) -> Tensor:
    """The CPU's operand in the dtype of both sides: float32, or float64 where one of them is."""
    wide_NE = x_NE.to(dtype)
    return wide_NE if normalized else normalize_ref(wide_NE)


def finish_cpu(x_NE: Tensor, sum_NE: Tensor, normalized: bool, scale: Tensor) -> Tensor:
    """From the gradient of unit rows to that of the embeddings, times scale, in place."""
    for rows in logits.blocks(len(x_NE), CPU_COLUMNS):
        if normalized:
            sum_NE[rows] *= scale
        else:
            sum_NE[rows] = normalize_bwd_ref(x_NE[rows].to(sum_NE.dtype), sum_NE[rows], scale)[0]
    return sum_NE


def dot(x_NE: Tensor, y_NE: Tensor) -> Tensor:
    """The float64 sum of x * y over all elements, in a fixed order and without a copy of their size."""
    total = torch.zeros((), dtype=torch.float64, device=x_NE.device)
    for rows in logits.blocks(len(x_NE), CPU_COLUMNS):
        total += (x_NE[rows] * y_NE[rows]).sum(dtype=torch.float64)
    return total
