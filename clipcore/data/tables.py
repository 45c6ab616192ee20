"""Tables that name or hold images, and folders of images: csv, jsonl, parquet, folders.

Every row is a sample; nothing but offsets is held in Python objects, so that ten million rows cost their own bytes
and worker processes share them.
"""

from __future__ import annotations

import csv
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from clipcore.data import BadSample, DataError, Pair, checked_captions, printable
from clipcore.data.tar import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
)
from clipcore.data.transforms import Decoder, decode_image

# Tried in this order in formats without a convention of their own, where the user names no column.
IMAGE_COLUMNS = ("image", "jpg", "filepath", "image_path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "txt", "title")
_PROBED_ROWS = 16


class TextColumn:
    """Strings in one array of bytes and one of offsets, which processes share."""

    def __init__(self, values: Iterable[str]) -> None:
        content, ends = bytearray(), array("q", [0])
        for value in values:
            content += value.encode("utf-8", "surrogateescape")
            ends.append(len(content))
        self.bytes_K = np.frombuffer(bytes(content), np.uint8)
        self.ends_N1 = np.frombuffer(ends, np.int64).copy()

    def __len__(self) -> int:
        return len(self.ends_N1) - 1

    def __getitem__(self, row: int) -> str:
        start, end = self.ends_N1[row : row + 2].tolist()
        return self.bytes_K[start:end].tobytes().decode("utf-8", "surrogateescape")


def read_image_file(path: str, key: str, decoder: Decoder | str) -> Any:
    """The decoded picture of a file; raises BadSample."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise BadSample(getattr(error, "strerror", None) or str(error), key) from None
    return decode_bytes(data, key, decoder)


def decode_bytes(data: bytes, key: str, decoder: Decoder | str) -> Any:
    """The picture in ``data``; raises BadSample with the key."""
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSample(f"more than {MAX_IMAGE_BYTES} bytes are too large", key)
    try:
        return decode_image(data, decoder)
    except BadSample as error:
        raise BadSample(error.reason, key) from None


def check_images_exist(table: str, column: str, paths: Sequence[str]) -> None:
    """Raises DataError where none of the first rows' images is there: then all of them were meant elsewhere."""
    probed = [path for path in paths[:_PROBED_ROWS] if path]
    if probed and not any(os.path.exists(path) for path in probed):
        raise DataError(
            f"{table}: none of the first {len(probed)} images of the column {column!r} is there, such as "
            f"{printable(probed[0])}; paths are absolute or relative to the table's folder"
        )


def find_column(path: str, columns: Sequence[str], names: Sequence[str]) -> str:
    """The first of ``names`` that the table has as a column; raises DataError with the columns that there are."""
    for name in names:
        if name in columns:
            return name
    there = ", ".join(printable(name) for name in columns) or "none"
    raise DataError(
        f"{path} has no column {' or '.join(map(repr, names))}; its columns are {there}"
    )


def image_columns(name: str | None) -> Sequence[str]:
    """Where an image may be: in the column that the user named, else in the first of the usual ones."""
    return IMAGE_COLUMNS if name is None else (name,)


def caption_columns(name: str | None) -> Sequence[str]:
    """Where a caption may be: in the column that the user named, else in the first of the usual ones."""
    return CAPTION_COLUMNS if name is None else (name,)


class CsvSource:
    """A table of image paths and captions with a header line: see ``clipcore.data.PairSource``.

    Args:
        path: the table, UTF-8.
        img_key, caption_key: its columns, as open_clip's --csv-img-key and --csv-caption-key.
        separator: one character, as --csv-separator.
        decoder: see ``decode_image``.

    Raises:
        DataError: the file or a column is missing, or there are no rows.
    """

    def __init__(
        self,
        path: str,
        img_key: str = "filepath",
        caption_key: str = "title",
        separator: str = "\t",
        decoder: Decoder | str = "pillow",
    ) -> None:
        self.name = os.path.basename(path)
        self._folder = os.path.dirname(path)
        self._decoder = decoder
        if len(separator) != 1:
            raise DataError(f"--csv-separator is one character, got {separator!r}")
        columns = _csv_rows(path, separator)
        header = next(columns, [])
        try:
            image_column = header.index(find_column(path, header, [img_key]))
            caption_column = header.index(find_column(path, header, [caption_key]))
        except DataError as error:
            other = "," if separator == "\t" else "\t"
            is_other = len(header) == 1 and other in header[0]
            hint = f"; they look separated by {other!r}: --csv-separator" if is_other else ""
            raise DataError(f"{error}{hint}") from None
        # A row that is too short gets empty fields, so that it is a bad sample and counted as one.
        interleaved = TextColumn(
            row[column] if column < len(row) else ""
            for row in columns
            if row
            for column in (image_column, caption_column)
        )
        self._cells = interleaved
        if not len(self):
            raise DataError(f"{path} has a header line but no rows")
        check_images_exist(
            path, img_key, [self._path(row) for row in range(min(len(self), _PROBED_ROWS))]
        )

    def __len__(self) -> int:
        return len(self._cells) // 2

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        path = self._path(index)
        key = printable(self._cells[2 * index]) or f"{self.name}, row {index + 1}"
        if not path:
            raise BadSample("no image path", key)
        captions = checked_captions(self._cells[2 * index + 1], key)
        return Pair(read_image_file(path, key, self._decoder), captions, key)

    def _path(self, index: int) -> str:
        cell = self._cells[2 * index]
        return os.path.join(self._folder, cell) if cell else ""


def _csv_rows(path: str, separator: str) -> Iterator[list[str]]:
    """The rows of a table; raises DataError."""
    try:
        # utf-8-sig: spreadsheets begin their files with a byte-order mark.
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, delimiter=separator)
            try:
                yield from rows
            except csv.Error as error:
                raise DataError(f"{path}, line {rows.line_num}: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read the table {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.object[error.start]:#x}); convert it with iconv"
        ) from None


class JsonlSource:
    """One JSON object a line, with an image path and a caption or a list of captions.

    Only the offsets of the lines are held; empty lines do not count. The first line says which columns there are.
    Arguments as of ``CsvSource``; a column that is not named is the first of the usual names.
    """

    def __init__(
        self,
        path: str,
        img_key: str | None = None,
        caption_key: str | None = None,
        decoder: Decoder | str = "pillow",
    ) -> None:
        self.name = os.path.basename(path)
        self._path = path
        self._folder = os.path.dirname(path)
        self._decoder = decoder
        try:
            self._starts_N1 = _line_offsets(path)
        except OSError as error:
            raise DataError(f"cannot read the table {path}: {error.strerror}") from None
        if not len(self):
            raise DataError(f"{path} has no lines")
        try:
            first = self._record(0, "record 1")
        except BadSample as error:
            raise DataError(f"{path}, {error}") from None
        self._img_key = find_column(path, list(first), image_columns(img_key))
        self._caption_key = find_column(path, list(first), caption_columns(caption_key))
        paths = [self._image_path(row) for row in range(min(len(self), _PROBED_ROWS))]
        check_images_exist(path, self._img_key, paths)

    def __len__(self) -> int:
        return len(self._starts_N1) - 1

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        key = f"{self.name}, record {index + 1}"
        record = self._record(index, key)
        path = record.get(self._img_key)
        if not isinstance(path, str) or not path:
            raise BadSample(f"no image path in {self._img_key!r}", key)
        key = printable(path)
        captions = checked_captions(record.get(self._caption_key), key)
        return Pair(
            read_image_file(os.path.join(self._folder, path), key, self._decoder), captions, key
        )

    def _record(self, index: int, key: str) -> dict[str, Any]:
        start, end = self._starts_N1[index : index + 2].tolist()
        if end - start > MAX_CAPTION_BYTES:
            raise BadSample(f"a line of {end - start} bytes is too long", key)
        with open(self._path, "rb") as file:
            line = os.pread(file.fileno(), end - start, start)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise BadSample("the line is no JSON", key) from None
        if not isinstance(record, dict):
            raise BadSample("the line is no JSON object", key)
        return record

    def _image_path(self, index: int) -> str:
        try:
            path = self._record(index, "").get(self._img_key)
        except BadSample:
            return ""
        return os.path.join(self._folder, path) if isinstance(path, str) and path else ""


def _line_offsets(path: str) -> np.ndarray:
    """Where the lines of a file that are not empty begin, and where the file ends: int64 [N + 1]."""
    starts, offset = array("q"), 0
    with open(path, "rb") as file:
        for line in file:
            if not line.isspace():
                starts.append(offset)
            offset += len(line)
    starts.append(offset)
    return np.array(starts, np.int64)


class ParquetSource:
    """Images as bytes in a parquet file: a column of bytes or of {bytes, path}, and one of captions.

    Parquet is compressed by groups of many rows, so that a single row cannot be read; on first use the two columns are
    therefore written out to an Arrow file beside the table (``<table>.clipcore-arrow``, about as large as the table; in
    the user's cache folder where the table's cannot be written), which is then mapped into memory. Arguments as of
    ``JsonlSource``.

    Raises:
        DataError: pyarrow is missing, or the file, a column, a row, or a place for the Arrow file is.
    """

    def __init__(
        self,
        path: str,
        img_key: str | None = None,
        caption_key: str | None = None,
        decoder: Decoder | str = "pillow",
    ) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError(
                f"{path}: parquet needs pyarrow: pip install 'clipcore[parquet]'"
            ) from None
        self.name = os.path.basename(path)
        self._decoder = decoder
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                columns = file.schema_arrow.names
                self._img_key = find_column(path, columns, image_columns(img_key))
                self._caption_key = find_column(path, columns, caption_columns(caption_key))
                self._num_rows = file.metadata.num_rows
                if not self._num_rows:
                    raise DataError(f"{path} has no rows")
                self._arrow_path = _arrow_copy(path, file, [self._img_key, self._caption_key])
        except (OSError, pyarrow.ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise DataError(f"cannot read the table {path}: {reason}") from None
        self._batches: list[Any] = []
        self._ends: np.ndarray = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if not self._batches:
            self._map()
        key = f"{self.name}, row {index + 1}"
        number = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[number]
        row = index - (int(self._ends[number]) - batch.num_rows)
        image = batch.column(0)[row].as_py()
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes):
            raise BadSample(f"no bytes in the column {self._img_key!r}", key)
        captions = checked_captions(batch.column(1)[row].as_py(), key)
        return Pair(decode_bytes(image, key, self._decoder), captions, key)

    def _map(self) -> None:
        import pyarrow

        reader = pyarrow.ipc.open_file(pyarrow.memory_map(self._arrow_path))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])

    def __getstate__(self) -> dict[str, object]:
        # The mapping cannot travel to another process; it maps the file itself.
        return {**self.__dict__, "_batches": []}


def _arrow_copy(path: str, file: Any, columns: list[str]) -> str:
    """The Arrow file with the columns of an open parquet file; written unless there is one of this very table."""
    import pyarrow

    from clipcore.data.tar import sidecar_paths

    stat = os.stat(path)
    state = f"{stat.st_size} {stat.st_mtime_ns} {' '.join(columns)}".encode()
    places = [place.with_suffix(".clipcore-arrow") for place in sidecar_paths(path)]
    for place in places:
        try:
            with pyarrow.memory_map(str(place)) as source:
                if (pyarrow.ipc.open_file(source).schema.metadata or {}).get(b"clipcore") == state:
                    return str(place)
        except (OSError, pyarrow.ArrowException):
            continue
    fields = [file.schema_arrow.field(name) for name in columns]
    schema = pyarrow.schema(fields, metadata={b"clipcore": state})
    for place in places:
        aside = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with (
                pyarrow.OSFile(str(aside), "wb") as sink,
                pyarrow.ipc.new_file(sink, schema) as out,
            ):
                for batch in file.iter_batches(batch_size=256, columns=columns):
                    arrays = [batch.column(name) for name in columns]
                    out.write_batch(pyarrow.record_batch(arrays, schema=schema))
            os.replace(aside, place)
            return str(place)
        except OSError:
            aside.unlink(missing_ok=True)
    raise DataError(
        f"{path}: the images must be written out once, but neither {places[0]} nor {places[1]} can be written; "
        "make room or set XDG_CACHE_HOME"
    )


class FolderSource:
    """Images in a folder and its subfolders, each with its caption in a file of the same stem.

    The caption is in ``<stem>.txt``, or in ``<stem>.json`` as an object's ``caption``; images without are left out.

    Args:
        path: the folder.
        caption_keys: fields of a JSON file that may hold the caption, the first that is there counts.
        decoder: see ``decode_image``.

    Raises:
        DataError: no folder, or no image with a caption in it.
    """

    def __init__(
        self,
        path: str,
        caption_keys: Sequence[str] = CAPTION_COLUMNS,
        decoder: Decoder | str = "pillow",
    ) -> None:
        self.name = os.path.basename(os.path.abspath(path))
        self._folder = path
        self._caption_keys = tuple(caption_keys)
        self._decoder = decoder
        self._cells = TextColumn(
            cell
            for folder, names in _walk(path)
            for image, caption in _stem_pairs(names)
            for cell in (os.path.join(folder, image), os.path.join(folder, caption))
        )
        if not len(self):
            raise DataError(
                f"{path} holds no image (.{', .'.join(IMAGE_SUFFIXES)}) with a caption in a .txt or .json file of the "
                "same name"
            )

    def __len__(self) -> int:
        return len(self._cells) // 2

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        image, caption = self._cells[2 * index], self._cells[2 * index + 1]
        key = printable(image)
        captions = checked_captions(self._caption(caption, key), key)
        path = os.path.join(self._folder, image)
        return Pair(read_image_file(path, key, self._decoder), captions, key)

    def _caption(self, name: str, key: str) -> object:
        try:
            with open(os.path.join(self._folder, name), "rb") as file:
                data = file.read(MAX_CAPTION_BYTES)
        except OSError as error:
            raise BadSample(f"{printable(name)}: {error.strerror}", key) from None
        if not name.lower().endswith(".json"):
            return data
        try:
            record = json.loads(data)
        except (ValueError, RecursionError):
            raise BadSample(f"{printable(name)} is no JSON", key) from None
        fields = record if isinstance(record, dict) else {}
        return next((fields[k] for k in self._caption_keys if k in fields), None)


class ClassFolderSource:
    """Images in one folder a class; the caption is the folder's name with spaces for underscores.

    Args:
        path: the folder of the class folders, which are taken in alphabetical order, whatever is below them included.
        decoder: see ``decode_image``.

    Attributes:
        classnames: the captions, one a folder.
        labels_N: for each image the index of its folder, int64 [N].

    Raises:
        DataError: no folder, or no image in a folder of its own.
    """

    def __init__(self, path: str, decoder: Decoder | str = "pillow") -> None:
        self.name = os.path.basename(os.path.abspath(path))
        self._folder = path
        self._decoder = decoder
        labels, folders = array("q"), dict[str, int]()

        def images() -> Iterator[str]:
            for folder, names in _walk(path):
                if folder:
                    for name in filter(_is_image, names):
                        top = folder.split(os.sep, 1)[0]
                        labels.append(folders.setdefault(top, len(folders)))
                        yield os.path.join(folder, name)

        self._paths = TextColumn(images())
        self.classnames = [folder.replace("_", " ") for folder in folders]
        self.labels_N = np.array(labels, np.int64)
        if not len(self):
            raise DataError(
                f"{path} holds no image (.{', .'.join(IMAGE_SUFFIXES)}) in a folder of its class, and none with a "
                "caption in a .txt or .json file of the same name"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        path = self._paths[index]
        key = printable(path)
        captions = checked_captions(self.classnames[self.labels_N[index]], key)
        image = read_image_file(os.path.join(self._folder, path), key, self._decoder)
        return Pair(image, captions, key)


def open_folder(
    path: str, img_key: str | None, caption_key: str | None, decoder: Decoder | str
) -> Any:
    """The pairs of a folder, by what it holds.

    ``metadata.jsonl`` (the layout of Hugging Face's imagefolder) wins; then images with a .txt or .json file each;
    then, with no caption anywhere, class folders.
    """
    if not os.path.isdir(path):
        raise DataError(f"there is no folder {path}")
    metadata = os.path.join(path, "metadata.jsonl")
    if os.path.exists(metadata):
        source = JsonlSource(metadata, img_key, caption_key, decoder)
        source.name = os.path.basename(os.path.abspath(path))
        return source
    if any(True for _, names in _walk(path) for _ in _stem_pairs(names)):
        return FolderSource(path, caption_columns(caption_key), decoder)
    return ClassFolderSource(path, decoder)


def _walk(path: str) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to ``path``, sorted names of its files) in order; links to folders are not followed."""
    for folder, folders, names in os.walk(path):
        folders.sort()
        yield os.path.relpath(folder, path) if folder != path else "", sorted(names)


def _is_image(name: str) -> bool:
    return re.fullmatch(rf".*\.({'|'.join(IMAGE_SUFFIXES)})", name, re.I | re.S) is not None


def _stem_pairs(names: list[str]) -> Iterator[tuple[str, str]]:
    """(image, caption file) of the names of one folder."""
    captions = dict[str, str]()
    for suffix in CAPTION_SUFFIXES:
        for name in names:
            stem, _, kind = name.rpartition(".")
            if kind.lower() == suffix:
                captions.setdefault(stem, name)
    for name in filter(_is_image, names):
        if (caption := captions.get(name.rpartition(".")[0])) is not None:
            yield name, caption
