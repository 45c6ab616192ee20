"""Images as NumPy's ``.npy`` files of pixels, uint8 [H, W, 3], which need no decoding.

``numpy.lib.format`` reads the header and evaluates only literals. Objects, and so pickles, are refused by their dtype
before any of the data is read. The layout is published in NumPy's docs under NEP 1.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
from numpy.lib import format as npy

from clipcore.data import BadSample
from clipcore.data.headers import check_size

RAW_SUFFIX = "npy"
MAX_RAW_PIXELS = (1 << 28) // 3  # the size of the largest file, since nothing is decoded
MAX_HEADER_BYTES = 1024  # NumPy writes 128 for an array of three sizes
_PREAMBLE = len(npy.magic(1, 0)) + 2  # including the header's length


def encode_raw(pixels_HW3: np.ndarray) -> bytes:
    """Return the ``.npy`` file of an image, as ``numpy.save`` writes it."""
    assert pixels_HW3.dtype == np.uint8 and pixels_HW3.shape[2:] == (3,), pixels_HW3.shape
    buffer = io.BytesIO()
    npy.write_array(buffer, np.ascontiguousarray(pixels_HW3), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def is_raw(data: bytes) -> bool:
    """Return whether a file begins like a ``.npy`` file."""
    return data.startswith(npy.MAGIC_PREFIX)


def decode_raw(data: bytes) -> np.ndarray:
    """Return the image in the bytes of a ``.npy`` file, without a copy: uint8 [H, W, 3], read-only.

    Raises:
        BadSample: wrong dtype, shape or memory order, more than MAX_RAW_PIXELS pixels, or missing or extra bytes.
    """
    start = _start_of(data)
    height, width = _sides(data[:start])
    if len(data) - start != 3 * height * width:
        raise BadSample(
            f"{width} x {height} pixels need {3 * height * width} bytes, there are {len(data) - start}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(height, width, 3)


def decode_array(data: bytes) -> np.ndarray:
    """Return the array of numbers in the bytes of a ``.npy`` file, without a copy, read-only.

    Raises:
        BadSample: no numbers, wrong memory order, no elements, or missing or extra bytes.
    """
    start = _start_of(data)
    shape, is_fortran, dtype = _header(data[:start])
    if dtype.kind not in "biuf" or is_fortran or not math.prod(shape):
        raise BadSample(f"a .npy file of {dtype} {list(shape)} holds no numbers in C order")
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        size = math.prod(shape) * dtype.itemsize
        raise BadSample(f"{dtype} {list(shape)} needs {size} bytes, there are {len(data) - start}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def _start_of(data: bytes) -> int:
    """Return where the numbers of a ``.npy`` file begin; raise BadSample."""
    length = int.from_bytes(data[_PREAMBLE - 2 : _PREAMBLE], "little")
    if data[:_PREAMBLE][-4:-2] != b"\1\0" or _PREAMBLE + length > MAX_HEADER_BYTES:
        raise BadSample(
            f"not a .npy file of version 1.0 with a header of at most {MAX_HEADER_BYTES} bytes"
        )
    return _PREAMBLE + length


@lru_cache(maxsize=4096)  # a data set has few sizes, and NumPy needs 30 us per header
def _header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether the order is Fortran's, and dtype, from the bytes before the data; raise BadSample."""
    stream = io.BytesIO(head)
    try:
        npy.read_magic(stream)
        return npy.read_array_header_1_0(stream)
    except Exception as error:
        # Besides ValueError, the evaluation of a damaged literal may raise RecursionError, tokenize.TokenError, ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadSample(f"unreadable .npy header: {reason}") from None


def _sides(head: bytes) -> tuple[int, int]:
    """Return (height, width) from the bytes before the data; raise BadSample."""
    shape, is_fortran, dtype = _header(head)
    if dtype != np.uint8 or is_fortran or len(shape) != 3 or shape[2] != 3:
        order = "Fortran" if is_fortran else "C"
        raise BadSample(
            f"raw images are uint8 [H, W, 3] in C order, this .npy is {dtype} {list(shape)} in {order} order"
        )
    check_size(shape[1], shape[0], MAX_RAW_PIXELS)
    return shape[0], shape[1]
