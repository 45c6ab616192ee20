"""Parquet tables that hold images, read through a copy that gives access to single rows.

Parquet compresses groups of many rows, so a single row cannot be read. On first use, the images and captions are therefore
written to a file beside the table (``<table>.clipcore-rows``, about as large as the table), or to the user's cache folder if
the table's folder is not writable. Nearby rows with the same picture share one copy of it. Other columns than the usual ones
of images and captions have a separate copy, ``<table>.<hash of their names>.clipcore-rows``: an evaluation of the table's
labels must not replace the copy that a training run reads.

The copy holds the images and captions (as JSON), an index of int64 [6, N] (offset, size and CRC-32 of a row's image, then of
its caption), the state of the table, and a trailer with the CRC-32 of both. It may lie in a shared folder or be part of a
downloaded data set, so nothing in it is used before its checksum is verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from clipcore.data import BadSample, DataError, Pair, checked_captions, printable
from clipcore.data.tables import (
    caption_columns,
    decode_bytes,
    find_column,
    image_columns,
)
from clipcore.data.tar import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, sidecar_paths
from clipcore.data.transforms import Decoder
from clipcore.files import locked, open_regular, written_aside

SUFFIX = ".clipcore-rows"
# Limit of a copy's size as a multiple of the table's, and a size that is always allowed. Images hardly compress, but a
# hostile table of a few bytes could fill a disk.
MAX_EXPANSION = 20
MAX_SMALL_COPY_BYTES = 1 << 28

_ROWS_AT_ONCE = 64
# How many earlier pictures a row is compared with, to share one of them.
_REMEMBERED = 4096
# Magic, rows, bytes of the state, CRC-32 of index and state.
_TRAILER = struct.Struct("<8sQQI")
_MAGIC = b"CLIPROW1"
# Every row takes memory, even an empty one; this many rows are always allowed.
_FREE_ROWS, _BYTES_A_ROW = 100_000, 8


class ParquetSource:
    """Images as bytes in a parquet file, a column of bytes or of {bytes, path}, and one of captions: see ``PairSource``.

    Args:
        path: the table.
        img_key, caption_key: its columns; a column that is not named is found by the usual names.
        decoder: see ``decode_image``.
        has_captions: whether captions are read; otherwise each is empty.

    Attributes:
        image_column: the name of the image column.

    Raises:
        DataError: pyarrow, the file, a column, all rows, or a writable place for the copy is missing.
    """

    def __init__(
        self,
        path: str,
        img_key: str | None = None,
        caption_key: str | None = None,
        decoder: Decoder | str = "pillow",
        has_captions: bool = True,
    ) -> None:
        pyarrow = import_pyarrow(path)
        self.name = os.path.basename(path)
        self.path = path
        self._decoder = decoder
        try:
            with (
                open_regular(path) as content,
                pyarrow.parquet.ParquetFile(content, page_checksum_verification=True) as file,
            ):
                columns = file.schema_arrow.names
                names = [find_column(path, columns, image_columns(img_key))]
                if has_captions:
                    names.append(find_column(path, columns, caption_columns(caption_key)))
                if twice := [name for name in names if columns.count(name) > 1]:
                    raise DataError(f"{path} has several columns {twice[0]!r}; rename them")
                self.image_column = names[0]
                kind = file.schema_arrow.field(names[0]).type
                if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
                    raise DataError(
                        f"{path} holds texts in {printable(names[0])!r}, and a parquet table has to hold the bytes of its "
                        "images; write paths as a csv, and fetch the images of addresses, with img2dataset, first"
                    )
                if not file.metadata.num_rows:
                    raise DataError(f"{path} has no rows")
                table = Table(path, os.fstat(content.fileno()), file, names)
                self._rows = _copy_of(table)
        # A name in it may not be UTF-8.
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise unreadable(path, error) from None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Pair:
        captions = self.captions(index)
        image, key = self.picture(index)
        return Pair(image, captions, key)

    def captions(self, index: int) -> str | tuple[str, ...]:
        """Return the caption or captions of a row; raise BadSample."""
        key = self._key(index)
        record = json.loads(self._rows.read_caption(index, key))
        if isinstance(record, dict):
            raise BadSample(record["reason"], key)
        return record if isinstance(record, str) else tuple(record)

    def picture(self, index: int) -> tuple[Any, str]:
        """Return the picture of a row and its key; raise BadSample."""
        key = self._key(index)
        return decode_bytes(self._rows.read_image(index, key), key, self._decoder), key

    def picture_names(self) -> Iterator[str]:
        """Yield for each row a key that identifies its picture, "" if it has none."""
        for offset, size in self._rows.columns_6N[:2].T.tolist():
            yield f"{offset}" if size else ""

    def _key(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return f"{self.name}, row {index + 1}"


class _Copy:
    """The rows of a copy: their bytes, checked as they are read.

    Args:
        place: the path of the copy.
        start: where its index begins.
        tail: CRC-32 of the index and the state.
        columns_6N: the index.
    """

    def __init__(self, place: Path, start: int, tail: int, columns_6N: np.ndarray) -> None:
        self.columns_6N = columns_6N
        self._place = place
        self._start = start
        self._tail = tail
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return self.columns_6N.shape[1]

    def read_image(self, row: int, key: str) -> bytes:
        """Return the bytes of a row's image; raise BadSample."""
        return self._read(self.columns_6N[:3, row], key)

    def read_caption(self, row: int, key: str) -> bytes:
        """Return the JSON of a row's captions; raise BadSample."""
        return self._read(self.columns_6N[3:, row], key)

    def _read(self, entry_3: np.ndarray, key: str) -> bytes:
        offset, size, checksum = entry_3.tolist()
        try:
            if self._file is None:
                self._file = self._open()
            content = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise BadSample(f"reading failed: {error.strerror}", key) from None
        if len(content) != size or zlib.crc32(content) != checksum:
            raise BadSample(
                f"damaged in {self._place}; delete that file, and it is made again", key
            )
        return content

    def _open(self) -> BinaryIO:
        """Open the copy; another process may have rewritten it from the same table, with the same bytes."""
        file = open_regular(self._place)
        file.seek(self._start)
        content = file.read(48 * len(self) + MAX_CAPTION_BYTES)
        if zlib.crc32(content[: -_TRAILER.size]) != self._tail:
            file.close()
            raise DataError(f"{self._place} was changed after the run began; start the run again")
        return file

    def __getstate__(self) -> dict[str, object]:
        # An open file cannot be pickled; the other process opens its own.
        return {**self.__dict__, "_file": None}


def import_pyarrow(path: str) -> Any:
    """Return the package pyarrow, with its parquet reader; raise DataError if it is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: parquet needs pyarrow: pip install 'clipcore[parquet]'") from None
    return pyarrow


class Table(NamedTuple):
    """An open parquet file, its path and state, and the names of the columns to read, the image column first."""

    path: str
    stat: os.stat_result
    file: Any
    names: Sequence[str]


def unreadable(path: str, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return DataError(f"cannot read the table {path}: {reason}")


def _copy_of(table: Table) -> _Copy:
    """Return the copy of a table's columns; it is made unless a current one exists."""
    num_rows = table.file.metadata.num_rows
    state = json.dumps([table.stat.st_size, table.stat.st_mtime_ns, *table.names]).encode()
    suffix = _suffix_of(table)
    places = [place.with_suffix(suffix) for place in sidecar_paths(table.path)]
    for place in places:
        if (copy := _read_index(place, state, num_rows)) is not None:
            return copy

    rows_at_once = check_groups(table)
    limit = max(MAX_SMALL_COPY_BYTES, MAX_EXPANSION * table.stat.st_size)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with locked(place.with_name(f"{place.name}.lock")):
                # Another rank may have made it in the meantime.
                if (copy := _read_index(place, state, num_rows)) is not None:
                    return copy
                with written_aside(place) as file:
                    _write_copy(file, _rows_of(table, rows_at_once), state, limit, table.path)
        except OSError:
            continue  # the next place may be writable
        if (copy := _read_index(place, state, num_rows)) is not None:
            return copy
    raise DataError(
        f"{table.path}: the images must be written out once, but neither {places[0]} nor {places[1]} can be written; "
        "make room or set XDG_CACHE_HOME"
    )


def _suffix_of(table: Table) -> str:
    """Return the suffix of a copy's name, which identifies its columns unless they are the usual two."""
    there = table.file.schema_arrow.names
    usual = [
        next((name for name in names if name in there), None)
        for names in (image_columns(None), caption_columns(None))
    ]
    if list(table.names) == usual:
        return SUFFIX
    digest = hashlib.sha256(json.dumps(list(table.names)).encode()).hexdigest()
    return f".{digest[:8]}{SUFFIX}"


def check_groups(table: Table) -> int:
    """Return how many rows to read at once; raise DataError if a part would take more memory than images can."""
    largest = 1
    metadata = table.file.metadata
    if metadata.num_rows > _FREE_ROWS + table.stat.st_size // _BYTES_A_ROW:
        raise DataError(
            f"{table.path}: {metadata.num_rows:,} rows in {table.stat.st_size:,} bytes are not images and captions; write "
            "the table without the empty and equal ones"
        )
    for group in range(metadata.num_row_groups):
        parts = metadata.row_group(group)
        for number in range(parts.num_columns if parts.num_rows else 0):
            part = parts.column(number)
            column = part.path_in_schema
            if not any(column == name or column.startswith(f"{name}.") for name in table.names):
                continue
            size = part.total_uncompressed_size
            is_bomb = size > MAX_IMAGE_BYTES and size > MAX_EXPANSION * part.total_compressed_size
            if is_bomb or size > MAX_IMAGE_BYTES * parts.num_rows:
                raise DataError(
                    f"{table.path}: {size:,} bytes of {column!r} in {parts.num_rows:,} rows, which take "
                    f"{part.total_compressed_size:,} compressed, are not images and captions; write the table without them"
                )
            largest = max(largest, size)
    # Every row may be the same dictionary value, which may be as large as the whole part.
    return min(max(MAX_IMAGE_BYTES // largest, 1), _ROWS_AT_ONCE)


def _rows_of(table: Table, rows_at_once: int) -> Iterator[tuple[bytes, object]]:
    """Yield each row's image and captions, or no image and {"reason": ...}; raise DataError."""
    import pyarrow

    batches = table.file.iter_batches(batch_size=rows_at_once, columns=list(table.names))
    while True:
        try:
            batch = next(batches, None)
        except (OSError, pyarrow.ArrowException) as error:
            raise unreadable(table.path, error) from None
        if batch is None:
            return
        images, *captions = (batch.column(name) for name in table.names)
        for image, *cells in zip(images, *captions, strict=True):
            try:
                image_bytes = _image_of(image, table.names[0])
                yield image_bytes, checked_captions(value_of(cells[0]), "") if cells else ""
            except BadSample as error:
                yield b"", {"reason": error.reason}


def _image_of(cell: Any, name: str) -> bytes:
    image = value_of(cell)
    if isinstance(image, dict):
        image = image.get("bytes")
    if not isinstance(image, bytes) or not image:
        raise BadSample(f"no bytes in the column {name!r}")
    if len(image) > MAX_IMAGE_BYTES:
        raise BadSample(f"{len(image)} bytes are too large")
    return image


def value_of(cell: Any) -> Any:
    """Return a cell as a Python value; raise BadSample, for example for text that is not UTF-8."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as error:
        raise BadSample(f"an unreadable cell: {printable(str(error))}") from None


def _write_copy(
    file: BinaryIO,
    rows: Iterator[tuple[bytes, object]],
    state: bytes,
    limit: int,
    path: str,
) -> None:
    """Write a copy of rows; raise DataError if they have more than ``limit`` bytes, OSError from writing."""
    index, end, total = array("q"), 0, 0

    def add(content: bytes) -> tuple[int, int, int]:
        nonlocal end
        file.write(content)
        end += len(content)
        return end - len(content), len(content), zlib.crc32(content)

    written = OrderedDict[bytes, tuple[int, int, int]]()
    for image, captions in rows:
        record = json.dumps(captions).encode()
        if len(record) > MAX_CAPTION_BYTES:
            record = b'{"reason": "captions of %d bytes are too long"}' % len(record)

        # Counts shared pictures too, although they are not written again.
        total += len(image) + len(record)
        if total > limit:
            raise DataError(
                f"{path}: more than {limit:,} bytes come out of a table that compresses them {MAX_EXPANSION} times; they "
                "are not images; write it without them"
            )

        digest = hashlib.sha256(image).digest()
        if digest not in written:
            written[digest] = add(image)
        if len(written) > _REMEMBERED:
            written.popitem(last=False)
        index.extend((*written[digest], *add(record)))

    tail = np.frombuffer(index, np.int64).reshape(-1, 6).T.astype("<i8").tobytes() + state
    file.write(tail + _TRAILER.pack(_MAGIC, len(index) // 6, len(state), zlib.crc32(tail)))


def _read_index(place: Path, state: bytes, num_rows: int) -> _Copy | None:
    """Return the content of a copy; None if it is missing, damaged, or made from another table or state."""
    tail_bytes = 48 * num_rows + len(state)
    try:
        with open_regular(place) as file:
            stat = os.fstat(file.fileno())
            start = stat.st_size - tail_bytes - _TRAILER.size
            if start < 0:
                return None
            file.seek(start)
            content = file.read(tail_bytes + _TRAILER.size)
    except OSError:
        return None
    tail, trailer = content[:tail_bytes], content[tail_bytes:]
    if trailer != _TRAILER.pack(_MAGIC, num_rows, len(state), zlib.crc32(tail)):
        return None
    if tail[48 * num_rows :] != state:
        return None
    columns_6N = np.frombuffer(tail, "<i8", 6 * num_rows).reshape(6, num_rows)
    offsets, sizes = columns_6N[[0, 3]], columns_6N[[1, 4]]
    # A checksum is not a signature, so offsets and sizes are checked against the bounds of the file.
    if columns_6N.min() < 0 or (offsets > start - sizes).any() or sizes.max() > MAX_IMAGE_BYTES:
        return None
    return _Copy(place, start, zlib.crc32(tail), columns_6N)
