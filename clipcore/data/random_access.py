"""Reads files at any position, local ones and remote ones alike.

A remote file is read from its local copy if there is one, else by byte ranges. Both give the same bytes.
"""

from __future__ import annotations

import os
import time
from typing import BinaryIO, NamedTuple

from clipcore.data import DataError, remote
from clipcore.data.local_copies import place_of
from clipcore.data.remote import is_remote, read_range, shown
from clipcore.files import open_regular

# How often an object that is read by ranges is compared with the one that was opened: each comparison is a request or two.
CHECK_EVERY_S = 30.0


class FileState(NamedTuple):
    """The state of a file: its bytes, and its modification time in ns, or of a URL what ``RemoteState`` calls version."""

    size: int
    version: int


def state_of(path: str) -> FileState:
    """Return the state of a file or of a URL.

    Raises:
        OSError: the file cannot be found.
        RemoteError: the URL cannot be read.
    """
    if is_remote(path):
        return FileState(*remote.state_of(path)[:2])
    stat = os.stat(path)
    return FileState(stat.st_size, stat.st_mtime_ns)


class LocalFile:
    """An open local file, read at any position.

    Args:
        file: the open file, which is closed with this object.
        path: its path.

    Attributes:
        state: as of ``state_of``.
    """

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.path = path
        self._file = file
        stat = os.fstat(file.fileno())
        self.state = FileState(stat.st_size, stat.st_mtime_ns)

    def read_at(self, size: int, offset: int) -> bytes:
        """Return the bytes at a position, fewer where the file ends before; raise OSError."""
        return os.pread(self._file.fileno(), size, offset)

    def prefetch(self, start: int, stop: int) -> None:
        """Do nothing: a local file is read where it is needed."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RemoteFile:
    """A remote file, read by byte ranges; twice a minute it is asked whether it is still the same object.

    Args:
        url: its URL.
        state: as of ``state_of``.
        ahead: bytes to read at once where the file is read from its beginning to its end.
    """

    def __init__(self, url: str, state: FileState, ahead: int = 0) -> None:
        self.path, self.state = url, state
        self._ahead = ahead
        self._checked_at = time.monotonic()
        # The bytes that were read last, and where they begin.
        self._start, self._content = 0, b""

    def read_at(self, size: int, offset: int) -> bytes:
        """Return the bytes at a position, fewer where the file ends before; raise RemoteError."""
        stop = min(offset + size, self.state.size)
        if offset >= stop:
            return b""
        if not self._start <= offset <= stop <= self._start + len(self._content):
            self.prefetch(offset, max(stop, min(offset + self._ahead, self.state.size)))
        return self._content[offset - self._start : stop - self._start]

    def prefetch(self, start: int, stop: int) -> None:
        """Read the bytes from ``start`` to before ``stop`` by one request, for the next calls; raise DataError."""
        if time.monotonic() - self._checked_at >= CHECK_EVERY_S:
            if FileState(*remote.state_of(self.path)[:2]) != self.state:
                raise _changed(self.path)
            self._checked_at = time.monotonic()
        self._start, self._content = start, read_range(self.path, start, stop)

    def close(self) -> None:
        """Forget the bytes that were read."""
        self._content = b""

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_at(path: str, state: FileState | None = None, ahead: int = 0) -> LocalFile | RemoteFile:
    """Open a file or a URL to read it at any position.

    Args:
        state: what the file has to be like; None takes it as it is.
        ahead: as of ``RemoteFile``.

    Raises:
        DataError: the file is not in that state any more; or a URL cannot be read, as of ``remote.py``.
        OSError: a local file cannot be opened.
    """
    if is_remote(path):
        return _open_remote(path, state, ahead)
    file = LocalFile(open_regular(path), path)
    if state not in (None, file.state):
        file.close()
        raise _changed(path)
    return file


def _open_remote(url: str, state: FileState | None, ahead: int) -> LocalFile | RemoteFile:
    if state is None:
        state = state_of(url)
    # Found by the state that it was made for, so the server need not be asked.
    copy = place_of(url, *state)
    try:
        file = LocalFile(open_regular(copy), url)
        if file.state.size == state.size:
            return file
        file.close()
    except OSError:
        pass  # it was never made, or made room for others
    now = remote.state_of(url)
    if state != (now.size, now.version):
        raise _changed(url)
    if not now.has_ranges:
        raise DataError(
            f"{shown(url)}: the server gives no byte ranges, and there is no room for a local copy; raise --data-cache-gb "
            "or CLIPCORE_DATA_CACHE_GB, or make room in the user's cache folder"
        )
    return RemoteFile(url, state, ahead)


def _changed(path: str) -> DataError:
    return DataError(f"{shown(path)} was changed after the run began; start the run again")
