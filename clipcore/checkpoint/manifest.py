"""The names and manifests of checkpoints: which ones a directory holds, which one is newest, and which are damaged.

The newest checkpoint is the one committed last, by the sequence number in its manifest. A run that went back to step 10
continues from there, not from the abandoned step 40.

A checkpoint is damaged when its content is missing or differs from its manifest; it is then skipped with a warning. A
checkpoint that cannot be read (disk error, no permission) may be intact. That is an error: otherwise a run would
continue from an older one, or a save would replace it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from clipcore.files import NotRegularError, open_regular

FORMAT = "clipcore checkpoint"
# 1: every group is one file. 2: a group may be several files.
FORMAT_VERSION = 2
MANIFEST, STATE = "manifest.json", "state.json"

COMMITTED = re.compile(r"(?:\.displaced_)?(step_\d{8,})")
MAX_JSON_BYTES = 1 << 24  # of the manifest and of the state
CHUNK_BYTES = 1 << 24  # read, or written, at once

# The errors of opening a file that is missing or is something else.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO}


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the file and the remedy."""


class UnreadableError(CheckpointError):
    """The system refuses to read a checkpoint, which may be intact."""


def step_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step_{step:08d}"


def committed_names(directory: Path) -> list[str]:
    """Return the names of the checkpoints in a directory, intact or damaged, in order; none for a missing directory.

    Raises:
        UnreadableError: the path cannot be read, or is not a directory.
    """
    try:
        return sorted(name for name in os.listdir(directory) if COMMITTED.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableError(f"cannot read {directory}: {error.strerror}") from error


def committed(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory that have a readable manifest, newest first.

    Raises:
        UnreadableError: the directory or a manifest exists but cannot be read.
    """
    return scan(directory)[0]


def scan(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the checkpoints with a readable manifest, newest first, and the damaged ones."""
    manifests, damaged = manifests_in(directory)

    def order(path: Path) -> tuple[int, int]:
        return manifests[path]["sequence"], manifests[path]["step"]

    return sorted(manifests, key=order, reverse=True), damaged


def manifests_in(directory: Path) -> tuple[dict[Path, dict[str, Any]], list[Path]]:
    """Return the manifests in a directory by checkpoint, and the checkpoints without a valid one."""
    while True:
        manifests: dict[Path, dict[str, Any]] = {}
        damaged: list[Path] = []
        for path in (Path(directory) / name for name in committed_names(directory)):
            try:
                manifests[path] = read_manifest(path)
            except UnreadableError:
                raise
            except CheckpointError:
                damaged.append(path)
        # A writing run may have removed a checkpoint since the names were read, and committed a newer one.
        if all(os.path.lexists(path) for path in damaged):
            return manifests, damaged


def next_sequence(directory: Path) -> int:
    manifests, _ = manifests_in(directory)
    return 1 + max((fields["sequence"] for fields in manifests.values()), default=0)


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the folder of the checkpoint committed last, by its manifest only; None if there is none."""
    return next(iter(committed(Path(directory))), None)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer clipcore; UnreadableError if it cannot be read.
    """
    try:
        with opened(folder / MANIFEST) as file:
            content = file.read(MAX_JSON_BYTES)
    except UnreadableError:
        raise
    except CheckpointError as error:
        what = "holds no checkpoint" if os.path.lexists(folder) else "does not exist"
        raise CheckpointError(f"{folder} {what}: {error}") from error
    try:
        fields = json.loads(content)
        fields.pop("sha256")
        is_intact = manifest_text(fields) == content and fields["format"] == FORMAT
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        is_intact = False
    if is_intact and type(fields.get("version")) is int and fields["version"] > FORMAT_VERSION:
        raise UnreadableError(f"{folder} was written by a newer clipcore; update to read it")
    named = COMMITTED.fullmatch(folder.name)
    is_intact = is_intact and _is_complete(fields)
    if not is_intact or (named is not None and named[1] != step_name(fields["step"])):
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged; use another checkpoint of this run, and remove this one"
        )
    return dict(fields)


def _is_complete(fields: Mapping[str, Any]) -> bool:
    """Return whether a manifest has every field that is read, with the right type."""
    files = fields.get("files")
    if not isinstance(files, dict) or STATE not in files:
        return False
    counts = [fields.get(key) for key in ("version", "step", "sequence")]
    for name, record in files.items():
        if Path(name).name != name or not isinstance(record, dict):
            return False
        counts.append(record.get("bytes"))
        if not isinstance(record.get("sha256"), str):
            return False
    return all(type(count) is int and count >= 0 for count in counts)


def manifest_text(fields: Mapping[str, Any]) -> bytes:
    """Return the manifest's text, including its own hash, so that any changed byte is detected."""
    body = json.dumps(fields, sort_keys=True).encode()
    signed = {**fields, "sha256": hashlib.sha256(body).hexdigest()}
    return (json.dumps(signed, indent=2, sort_keys=True) + "\n").encode()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file of a checkpoint; never read from anything but a regular file, such as a pipe.

    Raises:
        CheckpointError: it is not a file; UnreadableError if the system refuses to open or read it.
    """
    try:
        with open_regular(path) as file:
            yield file
    except NotRegularError as error:
        raise CheckpointError(f"{path.parent} is damaged: {path.name} is not a file") from error
    except OSError as error:
        raise refusal(path, error) from error


def refusal(path: Path, error: OSError) -> CheckpointError:
    """Return the error to raise if a file of a checkpoint cannot be opened or read."""
    if error.errno in _ABSENT:
        return CheckpointError(f"{path.parent} is damaged: {path.name}: {error.strerror}")
    return UnreadableError(
        f"cannot read {path}: {error.strerror}; it may be intact: try again, or move {path.parent.name} out of the folder "
        "to continue without it"
    )
