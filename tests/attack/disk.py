"""A disk that fails at a chosen call of the process: it dies there, is cut off, is refused, or gets a signal."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from pathlib import Path

# Numbers as of faulty_disk.c, and what else the call gets.
FAULTS: dict[str, tuple[int, int]] = {
    "kill before": (1, 0),
    "kill after": (2, 0),
    "torn": (3, 0),  # a write of the first half, then the end of the process
    "power": (4, 0),  # the end, with a third of what was not synced
    "short": (5, 0),  # a write of the first half, as the system may make it
    "EIO": (6, errno.EIO),  # once
    "EACCES": (6, errno.EACCES),
    "ENOSPC": (7, errno.ENOSPC),  # from there on, for all that takes room
    "EDQUOT": (7, errno.EDQUOT),
}
_SIGNAL = 8
# What only a write can be.
OF_WRITES = {"torn", "short"}
KILLS = {"kill before", "kill after", "torn", "power"}


def build(folder: Path) -> Path:
    """Compile the library that is to be preloaded."""
    library = folder / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


def begin(folder: Path, fault: str | int | None, at: int, calls: Path | None = None) -> None:
    """Begin to count the calls of this process on files below a folder, links resolved; one of them goes wrong.

    Args:
        fault: a name of ``FAULTS``, a signal's number, or None for none.
        at: the number of the call that gets it, from 0.
        calls: a file for the names and paths of all calls.
    """
    kind, value = (0, 0) if fault is None else (_SIGNAL, fault)
    if isinstance(fault, str):
        kind, value = FAULTS[fault]
    listed = None if calls is None else os.fsencode(calls)
    path = os.fsencode(folder.resolve())
    _library().faulty_disk_begin(path, kind, value, ctypes.c_long(at), listed)


def end() -> int:
    """Return the number of calls since ``begin``, and count no more."""
    count: int = _library().faulty_disk_end()
    return count


def _library() -> ctypes.CDLL:
    # What is preloaded is a part of the program.
    return ctypes.CDLL(None)


def numbers(calls: Path, fault: str | int) -> list[int]:
    """Return the calls of a list that a fault is for."""
    names = [line.partition(" ")[0] for line in calls.read_text().splitlines()]
    return [n for n, name in enumerate(names) if fault not in OF_WRITES or name == "write"]
