"""Reads objects by URL through fsspec: their state, byte ranges, whole copies, and lists of names.

This is the one place that speaks to a network. A dropped connection, a slow server, a fault of the server (HTTP 5xx) and an
answer of the wrong length are tried again with growing pauses, for about a minute. What the server refuses (403, 404) is an
error at once. Credentials come from where each service's own tools find them (AWS_PROFILE, HF_TOKEN, ~/.netrc, ...), never
from the URL, since a run records and prints its URLs.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, TypeVar

from clipcore.data import DataError, printable

# The package that fsspec reads a kind of URL with.
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "https": "aiohttp",
    "http": "aiohttp",
}
# The pauses double: half a second, one, ..., 32; then the error.
TRIES = 8
FIRST_WAIT_S = 0.5
# A pause is made of pieces no longer than this, so that what stops a copy need not wait for its end.
_PIECE_S = 0.2
# Of a single image on the web.
IMAGE_TRIES = 3
CONNECT_TIMEOUT_S = 30.0
# How long a server may send nothing.
READ_TIMEOUT_S = 60.0
# Bytes of a request when a whole object is read. Larger ones cost memory, and more after a dropped connection.
BLOCK_BYTES = 1 << 23

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL | re.IGNORECASE)
# In a query. A plain "key" names an object more often than it opens one.
_CREDENTIAL = re.compile(
    r"[?&]([\w.-]*(token|secret|passw(or)?d|signature|credential|(access|api|account|private)[_-]?key(id)?)|sig)=",
    re.IGNORECASE,
)
# What fsspec's file systems call the version of an object, the most exact one first.
_VERSIONS = (
    *("VersionId", "generation", "blob_id", "ETag", "etag", "Content-MD5", "md5Hash"),
    *("LastModified", "Last-Modified", "mtime", "updated", "last_modified"),
)
_PASSING_STATUSES = (408, 425, 429)
_SHOWN_CHARS = 200
_T = TypeVar("_T")


class RemoteError(DataError):
    """An object that cannot be read, although it was tried several times; the message names the remedy."""


class MissingObjectError(RemoteError):
    """There is no such object."""


class RefusedObjectError(RemoteError):
    """The server refuses the object, for example because of missing credentials."""


class ShortAnswerError(OSError):
    """A server sent another number of bytes than it was asked for."""


class RemoteState(NamedTuple):
    """The state of an object.

    Attributes:
        size: bytes.
        version: 63 bits of a hash of the object's version, ETag or time of modification, whichever the server tells.
        has_ranges: whether the server gives byte ranges.
    """

    size: int
    version: int
    has_ranges: bool


def is_remote(path: str) -> bool:
    """Return whether a path is a URL."""
    return _URL.match(path) is not None


def without_query(url: str) -> str:
    """Return a URL of http up to its query, other paths as they are."""
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def check_url(url: str) -> None:
    """Raise DataError for a URL that cannot be used: of an unknown kind, or with a credential in it."""
    match = _URL.match(url)
    assert match is not None
    if match[1] not in PACKAGES and match[1].lower() in PACKAGES:
        raise DataError(f"{shown(url)}: write {match[1].lower()}:// in small letters")
    if match[1] not in PACKAGES:
        raise DataError(
            f"{shown(url)}: data is read from {', '.join(f'{kind}://' for kind in PACKAGES)} and local paths; copy or mount "
            "it there"
        )
    if "@" in match[2].partition("/")[0] or _CREDENTIAL.search(url):
        raise DataError(
            f"{shown(url)}: the URL holds a credential, which the run would record; give it as the service's own tools take "
            "it (~/.aws, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ~/.netrc)"
        )


def shown(url: str) -> str:
    """Return a URL for a message, without what could be a credential; another path as it is."""
    if not is_remote(url):
        return url
    url = re.sub(r"(://)[^/]*@", r"\1", url)
    return printable(without_query(url))


def state_of(url: str, tries: int = TRIES) -> RemoteState:
    """Return the state of an object.

    Raises:
        RemoteError: see the module; or the server does not tell the size.
    """
    info = _tried(url, lambda system: system.info(url), tries)
    if info.get("type") == "directory":
        raise MissingObjectError(f"{shown(url)} is a folder; name the files in it")
    size = info.get("size")
    if size is None:
        raise RefusedObjectError(
            f"{shown(url)}: the server does not tell the file's size; copy the file first"
        )
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    digest = hashlib.sha256(version.encode("utf-8", "surrogateescape")).digest()
    return RemoteState(size, int.from_bytes(digest[:8], "big") >> 1, _has_ranges(url, size))


def _has_ranges(url: str, size: int) -> bool:
    """Return whether the server of an object gives byte ranges; object stores always do."""
    if not url.startswith("http") or size < 2:
        return True

    def probe(system: Any) -> bool:
        with system.open(url, size=size, block_size=1, cache_type="none") as file:
            try:
                # A server that ignores ranges sends the first byte, which fsspec notices without reading the rest.
                file.seek(1)
                return len(file.read(1)) == 1
            except ValueError:
                return False

    return _tried(url, probe)


def exists(url: str) -> bool:
    """Return whether there is an object of this URL; raise RemoteError if that cannot be found out."""
    try:
        _tried(url, lambda system: system.info(url))
    except (MissingObjectError, RefusedObjectError):
        return False
    return True


def go_on() -> None:
    """Stop nothing: the ``check_stopped`` of callers that have none."""


def read_range(
    url: str,
    start: int,
    stop: int,
    tries: int = TRIES,
    check_stopped: Callable[[], None] = go_on,
) -> bytes:
    """Return the bytes of an object from ``start`` to before ``stop``, exactly as many.

    Args:
        check_stopped: called in the pauses between tries; an exception that it raises ends them.

    Raises:
        RemoteError: see the module.
    """
    if start == stop:
        return b""

    def read(system: Any) -> bytes:
        content = system.cat_file(url, start=start, end=stop)
        _check_length(len(content), stop - start)
        return content

    return _tried(url, read, tries, check_stopped)


def read_object(url: str, limit: int, tries: int = TRIES) -> bytes:
    """Return the bytes of a whole object, of an object store at most ``limit`` of them.

    Of a web server it is one request: an answer that ends before its Content-Length is tried again.

    Raises:
        RemoteError: see the module; or a web server sends more than ``limit`` bytes.
    """
    if not url.startswith("http"):
        return read_range(url, 0, min(state_of(url, tries).size, limit), tries)

    def check_size() -> None:
        if content.tell() > limit:
            raise RefusedObjectError(f"{shown(url)}: more than {limit:,} bytes are too many")

    content = io.BytesIO()
    _fetch(url, content, None, check_size, tries)
    # The size is checked before each block, so the last one is still to be counted.
    check_size()
    return content.getvalue()


def copy_object(
    url: str, state: RemoteState, file: BinaryIO, check_stopped: Callable[[], None]
) -> None:
    """Write a whole object to a file.

    Args:
        state: of the object; another one afterwards is an error.
        check_stopped: called between blocks and in the pauses between tries; an exception that it raises ends the copy.

    Raises:
        RemoteError: see the module; or the object changed meanwhile.
        OSError: the file cannot be written.
    """
    if state.has_ranges:
        for start in range(0, state.size, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, state.size)
            file.write(read_range(url, start, stop, check_stopped=check_stopped))
            check_stopped()
    else:
        _fetch(url, file, state.size, check_stopped)
    if state_of(url) != state:
        raise RemoteError(f"{shown(url)} was changed while it was read; start again")


def _fetch(
    url: str,
    file: BinaryIO,
    size: int | None,
    check: Callable[[], None],
    tries: int = TRIES,
) -> None:
    """Write a whole object to a file by one request.

    Args:
        size: how many bytes it has to have; None for as many as the server announces.
        check: called before each block and in the pauses between tries; an exception that it raises ends the tries.

    Raises:
        RemoteError: see the module.
        OSError: the file cannot be written.
    """

    def read(system: Any) -> None:
        file.seek(0)
        file.truncate()
        system.get_file(url, _CheckedFile(file, check))
        if size is not None:
            _check_length(file.tell(), size)

    try:
        _tried(url, read, tries, check)
    except _AbortedError as error:
        assert error.__cause__ is not None
        raise error.__cause__ from None


class _AbortedError(Exception):
    """Carries an error that is not the network's out of the tries."""


class _CheckedFile:
    """A file that fsspec writes to: its errors end the tries, and so does what ``check_stopped`` raises."""

    def __init__(self, file: BinaryIO, check_stopped: Callable[[], None]) -> None:
        self._file, self._check_stopped = file, check_stopped

    def write(self, content: bytes) -> int:
        try:
            self._check_stopped()
            return self._file.write(content)
        except Exception as error:
            raise _AbortedError from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def list_objects(pattern: str) -> list[str]:
    """Return the sorted URLs that match a pattern with ``*`` (and ``?``, except in a URL of http); raise RemoteError."""

    def find(system: Any) -> list[str]:
        return sorted(system.unstrip_protocol(name) for name in system.glob(pattern))

    return _tried(pattern, find)


def _check_length(received: int, expected: int) -> None:
    if received != expected:
        raise ShortAnswerError(f"{received:,} bytes came instead of {expected:,}")


def _tried(
    url: str,
    action: Callable[[Any], _T],
    tries: int = TRIES,
    check_stopped: Callable[[], None] = go_on,
) -> _T:
    """Return what an action on the file system of a URL returns; try again after a passing fault."""
    check_url(url)
    system = _file_system(url)
    for number in range(tries):
        try:
            return action(system)
        except _AbortedError:
            raise
        except Exception as error:  # each service's package has errors of its own
            # fsspec turns every error of an HTTP server into a missing file.
            is_hidden = url.startswith("http") and isinstance(error, FileNotFoundError)
            fault = error.__cause__ if is_hidden and error.__cause__ is not None else error
            status = _status_of(fault)
            if status in (404, 410) or (isinstance(fault, FileNotFoundError) and status is None):
                raise MissingObjectError(f"there is no {shown(url)}") from None
            is_refusal = isinstance(fault, PermissionError) or "Credentials" in type(fault).__name__
            if is_refusal or (status and 400 <= status < 500 and status not in _PASSING_STATUSES):
                raise RefusedObjectError(
                    f"{shown(url)} is refused ({_reason(fault, status)}); check the credentials that the service's own "
                    "tools use"
                ) from None
            last = _reason(fault, status)
        if number + 1 < tries:
            _pause(FIRST_WAIT_S * 2**number, check_stopped)
    raise RemoteError(
        f"{shown(url)}: reading failed {tries} times, at last with {last}; check the network and the server, then run the "
        "same command again"
    )


def _pause(seconds: float, check_stopped: Callable[[], None]) -> None:
    """Sleep, unless ``check_stopped`` raises."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check_stopped()
        time.sleep(min(left, _PIECE_S))


def _file_system(url: str) -> Any:
    """Return fsspec's file system for a URL, of this process; raise DataError if a package is missing."""
    kind = url.partition("://")[0]
    # A listing that is kept would hide a changed object.
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        import fsspec

        if kind in ("http", "https"):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
            # Ranges are of the file's own bytes, and trust_env reads ~/.netrc and the proxies.
            options["headers"] = {"Accept-Encoding": "identity"}
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        return fsspec.filesystem(kind, **options)
    except ImportError:
        raise DataError(
            f"{shown(url)}: {kind}:// needs the package {PACKAGES[kind]}: pip install 'clipcore[remote]'"
        ) from None


def _status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error, None for one without."""
    # aiohttp's name, gcsfs's, and that of huggingface_hub, whose errors hold the whole answer.
    holder = getattr(error, "response", error)
    for name in ("status", "code", "status_code"):
        status = getattr(holder, name, None)
        if status is not None:
            return status if isinstance(status, int) else None
    return None


def _reason(error: BaseException | None, status: int | None) -> str:
    """Return an error in a few words, without the queries of URLs, which may hold credentials."""
    if status is not None:
        return f"HTTP status {status}"
    text = re.sub(r"\?\S+", "", printable(str(error)).partition("\n")[0])
    return f"{type(error).__name__}: {text}"[:_SHOWN_CHARS]
