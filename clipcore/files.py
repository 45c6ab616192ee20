"""Reads and writes files safely despite crashes, full disks, and untrusted links and pipes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_PIECE_BYTES = 1 << 20
# How long a wait for a lock sleeps.
_LOOK_AGAIN_S = 0.1


class NotRegularError(OSError):
    """A path that should be a file is a folder, a pipe, a device or a socket."""


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file under a temporary name, and rename it to its own name once it is complete.

    A link of that name is replaced, not followed. A killed process leaves a file that ends in ``.tmp``.

    Raises:
        OSError: the file cannot be written; the old one is untouched.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(aside, flags, 0o644), "wb") as file:
            try:
                yield file
                file.flush()
                aside.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    aside.unlink()
                raise
    except OSError as error:
        # Errors of writing name no file, and the temporary name means nothing to the user.
        if error.errno is None or error.filename not in (None, os.fspath(aside)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_durably(path: Path, content: bytes) -> None:
    """Write a file's whole content atomically, and fsync it: after a crash there is the old content or the new one.

    A link of that name is replaced, not followed.

    Raises:
        OSError: the content cannot be written; the old one is untouched.
    """
    with written_aside(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes.

    Raises:
        NotRegularError: it is something else, such as a pipe or a device, whose reading may never end.
        OSError: it does not exist, or cannot be opened.
    """
    # Opening a pipe without a writer would block.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(descriptor, path)
        # With O_NONBLOCK, some file systems would report that no data are available yet.
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def _check_regular(descriptor: int, path: str | Path) -> None:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        raise NotRegularError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        reason = "Not a regular file; write what it holds to one"
        raise NotRegularError(errno.EINVAL, reason, os.fspath(path))


def read_regular(path: str | Path, limit: int | None = None) -> bytes:
    """Return the bytes of a regular file, at most ``limit`` of them; see ``open_regular`` for errors."""
    with open_regular(path) as file:
        if limit is None:
            return file.read()
        # A read allocates as many bytes as requested. Some file systems report a size of 0, so read until the end.
        pieces, left = [], limit
        size = os.fstat(file.fileno()).st_size + 1
        while left and (piece := file.read(min(left, size))):
            pieces.append(piece)
            left -= len(piece)
            size = _PIECE_BYTES
        return b"".join(pieces)


def not_utf8(origin: str, error: UnicodeDecodeError) -> str:
    """Return a message about a text file in another encoding, with the remedy."""
    return f"{origin} is not UTF-8 (byte {error.object[error.start]:#x}); convert it with iconv"


def open_own(path: Path, flags: int) -> int:
    """Open a file that a run writes to, and create it if it is missing; return its descriptor.

    Raises:
        OSError: it cannot be opened; or it is not a regular file, such as a link, which in another user's folder may lead
            to any file of this user.
    """
    try:
        flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        reason = "is a symbolic link, which is not followed; replace it by what it leads to"
        raise OSError(errno.ELOOP, reason, os.fspath(path)) from None
    try:
        _check_regular(descriptor, path)
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def locked(path: Path, check_stopped: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of a name, a file that exists as long as one holds it; wait while another process or thread does.

    On file systems without locks several may hold it, each of which has to write under a temporary name.

    Args:
        check_stopped: called now and then while another holds the lock; an exception that it raises ends the wait.

    Raises:
        OSError: the file cannot be created.
    """
    descriptor = _open_locked(path, check_stopped)
    # Who held the lock before has removed the file, and somebody else may hold that of a new one.
    while not _is_open_at(path, descriptor):
        os.close(descriptor)
        descriptor = _open_locked(path, check_stopped)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_locked(path: Path, check_stopped: Callable[[], None] | None) -> int:
    descriptor = open_own(path, os.O_RDWR)
    if check_stopped is None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    try:
        while not _has_lock(descriptor):
            check_stopped()
            time.sleep(_LOOK_AGAIN_S)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _has_lock(descriptor: int) -> bool:
    """Lock an open file if nobody else has; a file system without locks lets everybody."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _is_open_at(path: Path, descriptor: int) -> bool:
    """Return whether an open file is the one that has a name now."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def lock_taken(descriptor: int) -> bool:
    """Lock an open file until the last process that shares its descriptor ends; return whether no other holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def cache_folder() -> Path:
    """Return the folder of clipcore in the user's cache, which may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipcore"


def mode_of(path: Path) -> int | None:
    """Return ``st_mode`` of a file or folder; None if there is nothing of that name.

    Raises:
        OSError: the system cannot tell, for example if the disk fails; pathlib's ``exists`` would report absence.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_file(path: Path) -> bool:
    """Return whether there is a file of that name; see ``mode_of`` for errors."""
    return stat.S_ISREG(mode_of(path) or 0)


def is_folder(path: Path) -> bool:
    """Return whether there is a folder of that name; see ``mode_of`` for errors."""
    return stat.S_ISDIR(mode_of(path) or 0)


def make_directory(directory: Path) -> None:
    """Create a directory and its missing parents, then fsync the directories that hold them."""
    missing = [path for path in (directory, *directory.parents) if mode_of(path) is None]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Fsync a directory, so that the names in it are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not support it; their renames have their own guarantees.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, os.fspath(directory)) from error
    finally:
        os.close(descriptor)
