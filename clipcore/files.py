"""Files of a run that a crash, a full disk or a link of a stranger must not bend."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Put a file's whole content on the disk under its name: after a crash there is the old content or the new one.

    A link of that name is replaced, not followed.

    Raises:
        OSError: the content cannot be written; the old one is untouched.
    """
    # A name of this process's own: the directory may have several writers.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o644)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def mode_of(path: Path) -> int | None:
    """Return ``st_mode`` of a file or folder, None where there is nothing of that name.

    Raises:
        OSError: it cannot be told, as where the disk fails; pathlib's ``exists`` and its kin would take that for absence.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_file(path: Path) -> bool:
    """Return whether there is a file of that name; errors as of ``mode_of``."""
    return stat.S_ISREG(mode_of(path) or 0)


def is_folder(path: Path) -> bool:
    """Return whether there is a folder of that name; errors as of ``mode_of``."""
    return stat.S_ISDIR(mode_of(path) or 0)


def make_directory(directory: Path) -> None:
    """Make a directory and its parents where they are missing, and put their names on the disk."""
    missing = [path for path in (directory, *directory.parents) if mode_of(path) is None]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Put the names in a directory on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot; their renames are durable on their own terms.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
