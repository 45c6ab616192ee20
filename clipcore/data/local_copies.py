"""Keeps whole local copies of remote objects, within a limit of bytes, for all processes of a user on one machine.

A copy lies in the user's cache folder, in ``copies/<hash of URL and version>/<name>``. It is written under another name and
renamed, so a copy is whole or absent. One process makes it, while the others wait for its lock. Where a copy does not fit,
the least recently used ones make room, unless a living process has taken them: each process has a lease, a file with the
names of the copies that it has taken, which it keeps locked for as long as it lives. A copy that still does not fit is not
made, and the object is read by byte ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from clipcore.data import DataError, printable
from clipcore.data.remote import RemoteState, copy_object, go_on, without_query
from clipcore.files import cache_folder, lock_taken, locked, make_directory, written_aside

BYTES_A_GB = 10**9
# The limit of commands without --data-cache-gb.
LIMIT_VARIABLE = "CLIPCORE_DATA_CACHE_GB"

_NAME_CHARS = 100
# The lease of this process for each folder of copies: (descriptor, path). Forked processes share it.
_leases: dict[Path, tuple[int, Path]] = {}
_leases_lock = threading.Lock()


class LocalCopies(NamedTuple):
    """The local copies of remote objects.

    Args:
        limit_gb: how many GB all copies of this user may take together [that of the environment variable
            CLIPCORE_DATA_CACHE_GB, else half of what the disk has free for them].
        check_stopped: called between the blocks of a copy; an exception that it raises ends the copy.
    """

    limit_gb: float | None = None
    check_stopped: Callable[[], None] = go_on

    def take(self, url: str, state: RemoteState) -> Path | None:
        """Return the copy of an object, which is made if it is missing, and stays for as long as this process lives.

        Args:
            state: of the object.

        Returns:
            None if the copy does not fit, or cannot be written.

        Raises:
            DataError: the environment variable is not a number of GB.
            RemoteError: the object cannot be read.
        """
        place = place_of(url, state.size, state.version)
        entry, root = place.parent, place.parent.parent
        try:
            make_directory(root)
            with locked(root / f"{entry.name}.lock", self.check_stopped):
                with locked(root / "copies.lock"):
                    _lease(root, entry.name)
                    if is_whole(place, state.size):
                        os.utime(entry)
                        return place
                    if not _make_room(root, entry.name, state.size, self._limit_bytes(root)):
                        return None
                    # A killed process may have left a part of it.
                    shutil.rmtree(entry, ignore_errors=True)
                    entry.mkdir()
                    # Counted by other processes from here on, though its bytes are still to come.
                    reserved = entry / ".reserved"
                    _write_hole(reserved, state.size)
                try:
                    with written_aside(place) as file:
                        # From here on the copy itself grows.
                        copy_object(url, state, file, self.check_stopped)
                finally:
                    reserved.unlink(missing_ok=True)
                # Whoever notes a file's time finds it unchanged in a later copy of the same object.
                os.utime(place, ns=(state.version % 2**60, state.version % 2**60))
        except OSError:
            return None  # no room or no right to write there; the object is read by ranges
        return place

    def described(self) -> str:
        """Return the limit in words."""
        limit_gb = self._limit_gb()
        return "half of the free disk" if limit_gb is None else f"{limit_gb:g} GB"

    def _limit_gb(self) -> float | None:
        given = os.environ.get(LIMIT_VARIABLE)
        if self.limit_gb is not None or not given:
            return self.limit_gb
        try:
            limit_gb = float(given)
        except ValueError:
            limit_gb = math.nan
        if not 0 <= limit_gb < math.inf:
            raise DataError(
                f"{LIMIT_VARIABLE}={printable(given)} is not a number of GB; set it to 0 or more"
            )
        return limit_gb

    def _limit_bytes(self, root: Path) -> int:
        limit_gb = self._limit_gb()
        if limit_gb is not None:
            return int(limit_gb * BYTES_A_GB)
        used = sum(size for _, size, _ in _entries(root))
        return (shutil.disk_usage(root).free + used) // 2


def place_of(url: str, size: int, version: int) -> Path:
    """Return the path of an object's copy, whether it is there or not."""
    text = f"{url}\0{size}\0{version}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    # A name with a dot in front is a folder's, or one of those that ``take`` uses.
    name = os.path.basename(without_query(url))[-_NAME_CHARS:].lstrip(".")
    return cache_folder() / "copies" / digest[:32] / (name or "object")


def is_whole(place: Path, size: int) -> bool:
    """Return whether there is a copy of the right size."""
    try:
        return place.stat().st_size == size
    except OSError:
        return False


def _write_hole(path: Path, size: int) -> None:
    """Write a file of zeros that takes no room on the disk."""
    with open(path, "wb") as file:
        file.truncate(size)


def _entries(root: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield the time of the last use, the bytes and the folder of every copy; its tables' rows count too."""
    for entry in root.iterdir():
        with contextlib.suppress(OSError):
            if entry.is_dir() and entry.name != "leases":
                # What is being written is counted by its reservation.
                files = [path for path in entry.iterdir() if not _is_being_written(path)]
                size = sum(path.stat().st_size for path in files)
                yield entry.stat().st_mtime, size, entry


def _is_being_written(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".tmp"


def _make_room(root: Path, name: str, size: int, limit: int) -> bool:
    """Remove the least recently used copies that no living process has taken until ``size`` bytes fit."""
    entries = sorted(entry for entry in _entries(root) if entry[2].name != name)
    used, held = sum(bytes_ for _, bytes_, _ in entries), _held_copies(root)
    removable = [entry for entry in entries if entry[2].name not in held]
    if size > limit - used + sum(bytes_ for _, bytes_, _ in removable):
        return False
    for _, bytes_, entry in removable:
        if used + size <= limit:
            break
        shutil.rmtree(entry)
        used -= bytes_
    return True


def _lease(root: Path, name: str) -> None:
    """Note that this process uses a copy."""
    with _leases_lock:
        if root not in _leases:
            folder = root / "leases"
            folder.mkdir(exist_ok=True)
            path = folder / f"{os.getpid()}-{secrets.token_hex(4)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o644)
            lock_taken(descriptor)
            _leases[root] = descriptor, path
        os.write(_leases[root][0], f"{name}\n".encode())


def _held_copies(root: Path) -> set[str]:
    """Return the names of the copies that living processes have taken, and remove the leases of dead ones."""
    held = set[str]()
    own = _leases[root][1]
    for path in (root / "leases").iterdir():
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if path != own and lock_taken(descriptor):
                    path.unlink()
                else:
                    held.update(path.read_text().split())
            finally:
                os.close(descriptor)
    return held
