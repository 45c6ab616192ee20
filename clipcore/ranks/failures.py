"""Report a fatal error: one line for a mistake that the user can correct, a traceback for a bug in clipcore."""

from __future__ import annotations

import os
import traceback

import torch.distributed as dist

from clipcore import native
from clipcore.terminal import complain, first_line

MISTAKE_STATUS = 2
# sysexits.h's EX_SOFTWARE. Python's own status is 1, which job scripts read as "the loss is not finite".
FAULT_STATUS = 70
# A user's mistake is always raised as one of these.
_MISTAKES = (ValueError, OSError, native.WrongBuildError)
# Beginnings of torch's messages for an error of a GPU or its driver.
_DEVICE_FAILED = ("CUDA error", "NCCL error", "CUDA driver error")
# Parts of the messages of host and GPU allocators. torch has an exception class for only one of them.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed", "bad_alloc")


def end_with(program: str, error: Exception, more_memory: str) -> int:
    """Print on standard error why a program ends; return its exit status.

    If CLIPCORE_TRACEBACK is set in the environment, the traceback is printed first.

    Args:
        program: its name, such as "clipcore.train".
        error: the error that ends it; a ValueError or OSError is a mistake of the user, and its message names the remedy.
        more_memory: the remedy when memory ran out.
    """
    is_short = is_out_of_memory(error)
    is_mistake = is_short or isinstance(error, _MISTAKES)
    if not is_mistake or os.environ.get("CLIPCORE_TRACEBACK"):
        traceback.print_exception(error)

    message = str(error)
    if is_short:
        message = f"too little memory: {first_line(error).rstrip('.')}; {more_memory}"
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        message = f"{where}{error.strerror or error}"
    elif isinstance(error, dist.DistError) or message.startswith(_DEVICE_FAILED):
        message = f"a GPU or the connection to another rank failed: {first_line(error)}"
    elif not is_mistake:
        message = "this is a bug in clipcore; please report it with the lines above"
    complain(program, f"error: {message}")
    return MISTAKE_STATUS if is_mistake else FAULT_STATUS


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory of the machine or of a GPU ran out."""
    if isinstance(error, MemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in message for words in _OUT_OF_MEMORY)
