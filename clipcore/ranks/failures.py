"""How a command ends that cannot go on: one line for what its user can mend, a traceback for a fault of clipcore's own."""

from __future__ import annotations

import os
import traceback

import torch.distributed as dist

from clipcore import native
from clipcore.terminal import complain, first_line

MISTAKE_STATUS = 2
# sysexits.h's EX_SOFTWARE. Python's own status is 1, which a job script takes for a loss that is not finite.
FAULT_STATUS = 70
# Every mistake of a user is one of these.
_MISTAKES = (ValueError, OSError, native.WrongBuildError)
# How torch's messages begin where a GPU or its driver reports an error.
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
    is_short = is_out_of_memory(error)
    is_mistake = is_short or isinstance(error, _MISTAKES)
    if not is_mistake or os.environ.get("CLIPCORE_TRACEBACK"):
        traceback.print_exception(error)

    said = str(error)
    if is_short:
        said = f"too little memory: {first_line(error).rstrip('.')}; {more_memory}"
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        said = f"{where}{error.strerror or error}"
    elif isinstance(error, dist.DistError) or said.startswith(_DEVICE_FAILED):
        said = f"a GPU or the connection to another rank failed: {first_line(error)}"
    elif not is_mistake:
        said = "this is a fault of clipcore; please report it with the lines above"
    complain(program, f"error: {said}")
    return MISTAKE_STATUS if is_mistake else FAULT_STATUS


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory of the machine or of a GPU ran out."""
    if isinstance(error, MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _OUT_OF_MEMORY)
