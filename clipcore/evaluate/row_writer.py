"""Writes a ``.npy`` file whose number of rows is known only at the end.

Legend: B rows of a batch, W numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np


class RowWriter:
    """Writes rows of numbers one behind the other, and their number into the header at the end.

    Args:
        file: open for writing, and for reading too if it holds rows already: see ``has_rows``.
        dtype: dtype of the values in the file.

    Attributes:
        num_rows, width: of the rows so far.
    """

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._file, self._dtype = file, dtype
        self.num_rows, self.width = 0, 0

    def add(self, values_BW: np.ndarray) -> None:
        """Append rows."""
        if not self.num_rows:
            self.width = values_BW.shape[1]
            self._write_header(0)
        self._file.write(np.ascontiguousarray(values_BW).data)
        self.num_rows += len(values_BW)

    def has_rows(self, number: int, width: int, is_right: Callable[[np.ndarray], bool]) -> bool:
        """Return whether the file holds so many rows more that are right, and step over them."""
        if not number:
            return True
        if not self.num_rows:
            self.width = width
            self._write_header(0)
        content = self._file.read(number * width * self._dtype.itemsize)
        if len(content) != number * width * self._dtype.itemsize or width != self.width:
            return False
        if not is_right(np.frombuffer(content, self._dtype).reshape(number, width)):
            return False
        self.num_rows += number
        return True

    def cut(self) -> None:
        """Cut the file off behind the rows so far."""
        self._file.seek(0)
        if self.num_rows:
            self._write_header(0)
            self._file.seek(self.num_rows * self.width * self._dtype.itemsize, 1)
        self._file.truncate()

    def close(self) -> None:
        """Write the number of rows into the space that NumPy reserves in the header."""
        if self.num_rows:
            begun = self._file.tell() - self.num_rows * self.width * self._dtype.itemsize
            self._file.seek(0)
            self._write_header(self.num_rows)
            assert self._file.tell() == begun

    def _write_header(self, num_rows: int) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (num_rows, self.width)}
        np.lib.format.write_array_header_1_0(self._file, header)
