"""How a command ends that cannot go on: one line for what its user can mend, a traceback for a fault of clipcore's own."""

from __future__ import annotations

import os
import traceback

import torch.distributed as dist

from clipcore import native
from clipcore.terminal import complain, printable

MISTAKE_STATUS = 2
# sysexits.h's EX_SOFTWARE. Python's own status is 1, which a job script takes for a loss that is not finite.
FAULT_STATUS = 70
# Every mistake of a user is one of these.
_MISTAKES = (ValueError, OSError, native.WrongBuildError)
# What torch begins an error with that a GPU or its driver reports.
_DEVICE_FAILED = ("CUDA error", "NCCL error", "CUDA driver error")
# What allocators of the machine, of a GPU and of its libraries say; torch has a class of its own for one of them.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed", "bad_alloc")


def end_with(program: str, error: Exception, more_memory: str) -> int:
    """Say on standard error what ended a program; return its exit status.

    With CLIPCORE_TRACEBACK in the environment its trace comes first.

    Args:
        program: its name, such as "clipcore.train".
        error: a mistake in what the program was given is a ValueError or OSError, whose message names the remedy.
        more_memory: what to do where memory is short.
    """
    is_mistake = is_out_of_memory(error) or isinstance(error, _MISTAKES)
    if not is_mistake or os.environ.get("CLIPCORE_TRACEBACK"):
        traceback.print_exception(error)

    if is_out_of_memory(error):
        first_line = (str(error).splitlines() or ["nothing is left"])[0].rstrip(".")
        complain(program, f"error: too little memory: {printable(first_line)}; {more_memory}")
        return MISTAKE_STATUS

    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        complain(program, f"error: {where}{error.strerror or error}")
        return MISTAKE_STATUS

    if is_mistake:
        complain(program, f"error: {error}")
        return MISTAKE_STATUS

    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, dist.DistError) or first_line.startswith(_DEVICE_FAILED):
        complain(program, f"error: a GPU or the connection to another rank failed: {first_line}")
    else:
        complain(
            program, "error: this is a fault of clipcore; please report it with the lines above"
        )
    return FAULT_STATUS


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory of the machine or of a GPU ran out."""
    if isinstance(error, MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _OUT_OF_MEMORY)
