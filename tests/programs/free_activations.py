"""Allocate and free a step's activations, and print the bytes that malloc keeps; argv[1] "keep" asks it to keep them."""

import ctypes
import sys

import torch

from clipcore.run import memory


class MallInfo2(ctypes.Structure):
    """What mallinfo2(3) returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


if sys.argv[1] == "keep":
    memory.keep_freed()
# Each is below the largest size for which malloc can be asked to keep it. Only once: freeing a large one teaches malloc to
# keep the next.
activations = [torch.ones(7 * 2**20) for _ in range(10)]
del activations

library = ctypes.CDLL(None)
library.mallinfo2.restype = MallInfo2
print(library.mallinfo2().fordblks)
