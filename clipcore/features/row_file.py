"""A ``.npy`` file that grows batch by batch, and that a killed process leaves so that the next one goes on with it.

Until it is whole, ``X.npy`` is two files: ``X.npy.part``, the rows so far, and ``X.npy.journal``, a JSON line a batch. It
says how many samples there are up to there, and has names and a hash of its rows. The rows of a batch are on the disk
before its line is. So the whole lines of the journal whose hashes agree tell what is done; the rest is cut off.

Legend: N rows, B rows of a batch, E numbers of a row.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from clipcore.evaluate.row_writer import RowWriter
from clipcore.features.encode import Encoded
from clipcore.files import is_file, mode_of, open_own, sync_directory, write_durably, written_aside
from clipcore.terminal import printable

# What a message calls a setting that is another than before.
_CALLED = {
    "of": "of {was}, not {now}; leave --text out or in, as before",
    "model_sha256": "of another model, or with another preprocessing or vocabulary",
    "data_sha256": "of other data, or of files that have changed since",
    "batch_size": "with --batch-size {was}, and another one rounds differently",
    "dtype": "with --dtype {was}",
    "normalize": "with another choice of --normalize",
    "device": "on {was}, and {now} rounds differently; use --device {was}",
}


class RowFile:
    """A file of features that is being written; use it in a ``with`` statement, which locks it.

    Args:
        path: the ``.npy`` file.
        settings: what the rows depend on, of JSON's types; a file with others is not gone on with.

    Attributes:
        num_samples, num_rows: how many samples are done, and their rows.
        unreadable, num_transparent: of these.

    Raises:
        ValueError: there is a file of other settings, or of something else, or another process is writing it.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.names, self.record = path.with_suffix(".txt"), path.with_suffix(".json")
        self.num_samples, self.num_rows, self.num_transparent = 0, 0, 0
        self.unreadable = list[tuple[str, str]]()
        self._part = path.with_name(f"{path.name}.part")
        self._journal_path = path.with_name(f"{path.name}.journal")
        self._dtype = np.dtype(self.settings["dtype"])
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RowFile:
        if mode_of(self._journal_path) is None:
            for path in (self.names, self.record):
                if mode_of(path) is not None:
                    raise ValueError(
                        f"{path} is there without {self.path}, and would be replaced; remove it or name another --out"
                    )
        with contextlib.ExitStack() as stack:
            self._journal = stack.enter_context(
                os.fdopen(open_own(self._journal_path, os.O_RDWR), "r+b")
            )
            self._lock()
            if mode_of(self.path) is not None:
                raise ValueError(
                    f"another process has just written {self.path}; give the same command again"
                )
            self._rows: BinaryIO = stack.enter_context(
                os.fdopen(open_own(self._part, os.O_RDWR), "r+b")
            )
            self._resume()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def whole(self) -> np.ndarray | None:
        """Return the finished file's rows as a memory map [N, E]; None if it is not there.

        Raises:
            ValueError: a file of that name is of other settings, or was not written by this class.
        """
        if mode_of(self.path) is None:
            return None
        record = _read_json(self.record)
        if not isinstance(record, dict) or "settings" not in record:
            raise ValueError(
                f"{self.path} is there already, and {self.record} does not describe it; remove it or name another --out"
            )
        self._compare(self.path, record["settings"])
        rows_NE = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if list(rows_NE.shape) != record.get("shape") or rows_NE.dtype != self._dtype:
            raise ValueError(f"{self.path} has changed since it was written; remove it")
        # A process may have been killed after all else.
        self._journal_path.unlink(missing_ok=True)
        return rows_NE

    def add(self, batch: Encoded) -> None:
        """Put the rows of a batch on the disk, then its line."""
        rows_BE = batch.features_BE.astype(self._dtype, copy=False)
        if len(rows_BE):
            self._writer.add(rows_BE)
            self._rows.flush()
            os.fdatasync(self._rows.fileno())
        line = {
            "samples": batch.end,
            "rows": len(rows_BE),
            "width": rows_BE.shape[1],
            "xxh3": _hash(rows_BE),
            "names": batch.keys,
            "unreadable": batch.unreadable,
            "transparent": batch.num_transparent,
        }
        self._append(line)
        self._count(line)

    def finish(self, record: Mapping[str, Any]) -> np.ndarray:
        """Give the file its name, with its names of rows and its record beside it; return its rows as a memory map [N, E].

        Args:
            record: what the ``.json`` file says besides the settings, the shape and the unreadable samples.
        """
        self._writer.close()
        self._rows.flush()
        os.fsync(self._rows.fileno())
        shape = [self._writer.num_rows, self._writer.width]
        with written_aside(self.names) as file:
            for line, _ in self._lines():
                for name in line.get("names", ()):
                    file.write(f"{printable(name)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        content = {
            **record,
            "shape": shape,
            "num_transparent": self.num_transparent,
            "unreadable": self.unreadable,
            "settings": self.settings,
        }
        write_durably(self.record, (json.dumps(content, indent=1) + "\n").encode())
        os.replace(self._part, self.path)
        sync_directory(self.path.parent)
        # Another process that finds the file whole takes the journal away too.
        self._journal_path.unlink(missing_ok=True)
        return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def _lock(self) -> None:
        try:
            fcntl.lockf(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise ValueError(
                f"another process is writing {self.path}; wait for it, or name another --out"
            ) from None

    def _resume(self) -> None:
        """Go to the end of what is done."""
        lines = self._lines()
        first, end = next(lines, ({}, 0))
        if "settings" not in first:
            self._rows.truncate(0)
            self._journal.truncate(0)
            self._append({"settings": self.settings})
            self._writer = RowWriter(self._rows, self._dtype)
            return
        self._compare(self.path, first["settings"], "was begun")

        self._writer = RowWriter(self._rows, self._dtype)
        for line, line_end in lines:
            if not self._writer.has_rows(
                line["rows"], line["width"], functools.partial(_has_hash, line["xxh3"])
            ):
                break
            end = line_end
            self._count(line)
        self._writer.cut()
        self._journal.truncate(end)
        self._journal.seek(end)

    def _lines(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the whole lines of the journal, each with the place behind it."""
        self._journal.seek(0)
        end = 0
        while (text := self._journal.readline()).endswith(b"\n"):
            try:
                line = json.loads(text)
            except ValueError:
                return
            end += len(text)
            yield line, end

    def _append(self, line: Mapping[str, Any]) -> None:
        self._journal.seek(0, os.SEEK_END)
        self._journal.write((json.dumps(line) + "\n").encode())
        self._journal.flush()
        os.fdatasync(self._journal.fileno())

    def _count(self, line: Mapping[str, Any]) -> None:
        self.num_samples = line["samples"]
        self.num_rows += line["rows"]
        self.num_transparent += line["transparent"]
        self.unreadable += [(key, reason) for key, reason in line["unreadable"]]

    def _compare(self, path: Path, before: Mapping[str, Any], verb: str = "is") -> None:
        """Raise ValueError for settings other than those of the file."""
        for name, now in self.settings.items():
            if (was := before.get(name)) != now:
                how = _CALLED[name].format(was=was, now=now)
                raise ValueError(f"{path} {verb} {how}; remove it or name another --out")


def _hash(rows_BE: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(rows_BE).data)


def _has_hash(expected: str, rows_BE: np.ndarray) -> bool:
    return _hash(rows_BE) == expected


def _read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if there is no readable one."""
    if not is_file(path):
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None
