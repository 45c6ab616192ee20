"""A lock that allows one writing process per directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from clipcore.checkpoint.manifest import CheckpointError
from clipcore.files import open_own

_locked: set[Path] = set()


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Lock a directory for one writing process; the system releases it however the process ends.

    Raises:
        CheckpointError: another run holds it.
    """
    directory = Path(directory).resolve()
    path = directory / ".lock"
    busy = f"another run is writing to {directory}"
    remedy = "wait for it, stop it, or choose another folder"
    # The lock belongs to the process, not to the open file, so forked workers that outlive a killed run do not hold it.
    # Such locks do not conflict within a process, and closing any descriptor of the file releases them: hence the set.
    if directory in _locked:
        raise CheckpointError(f"{busy} (this process); {remedy}")
    try:
        descriptor = open_own(path, os.O_RDWR)
    except OSError as error:
        raise CheckpointError(f"cannot write to {path}: {error.strerror}") from error
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(f"cannot lock {path}: {error.strerror}") from error
            owner = os.read(descriptor, 200).decode(errors="replace").strip()
            raise CheckpointError(f"{busy} ({owner or 'starting'}); {remedy}") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        _locked.add(directory)
        yield
    finally:
        _locked.discard(directory)
        os.close(descriptor)
