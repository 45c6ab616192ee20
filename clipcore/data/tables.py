"""Tables that name images: csv and jsonl.

Every row is a sample. Text and offsets are kept in arrays, not in Python objects, so ten million rows take only their own
bytes, and worker processes share them.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Literal, TextIO

import numpy as np

from clipcore.data import (
    BadSample,
    DataError,
    LeftOut,
    Pair,
    checked_captions,
    printable,
)
from clipcore.data.choices import DEFAULT_CAPTION_KEY, DEFAULT_IMAGE_KEY
from clipcore.data.remote import (
    IMAGE_TRIES,
    MissingObjectError,
    RefusedObjectError,
    RemoteError,
    exists,
    is_remote,
    read_object,
    shown,
)
from clipcore.data.tar import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
)
from clipcore.data.transforms import Decoder, decode_image
from clipcore.files import not_utf8, open_regular, read_regular

# Tried in this order if the user names no column and the format prescribes none.
IMAGE_COLUMNS = ("image", "jpg", "filepath", "image_path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "txt", "title")
PROBED_ROWS, _PROBED_ENTRIES = 16, 1000
_SEPARATORS = "\t,;|"  # for csv tables, which may come from any program
_SHOWN_COLUMNS, _SHOWN_CHARS = 20, 40  # in a message
# Prefix of the text that replaces the caption of a row whose fields do not fit the header.
MISCOUNTED = "\0\0"


class TextColumn:
    """Strings stored as one array of bytes and one of offsets, which processes share."""

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
    """Return the decoded picture of a file or a URL.

    Raises:
        BadSample: there is none, or it cannot be decoded, or its web server fails.
        RemoteError: an object store failed repeatedly, which says nothing about the sample.
    """
    is_on_the_web = path.startswith(("http://", "https://"))
    try:
        if is_on_the_web:
            data = read_object(path, MAX_IMAGE_BYTES + 1, IMAGE_TRIES)
        else:
            read = read_object if is_remote(path) else read_regular
            data = read(path, MAX_IMAGE_BYTES + 1)
    except (MissingObjectError, RefusedObjectError) as error:
        raise BadSample(str(error), key) from None
    except RemoteError as error:
        # A list of images on the web names many servers, of which some are gone for good.
        if is_on_the_web:
            raise BadSample(str(error), key) from None
        raise
    except (OSError, ValueError) as error:
        raise BadSample(getattr(error, "strerror", None) or str(error), key) from None
    return decode_bytes(data, key, decoder)


def decode_bytes(data: bytes, key: str, decoder: Decoder | str) -> Any:
    """Return the picture in ``data``; raise BadSample with the key."""
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSample(f"more than {MAX_IMAGE_BYTES} bytes are too large", key)
    try:
        return decode_image(data, decoder)
    except BadSample as error:
        raise BadSample(error.reason, key) from None


class MissingImagesError(DataError):
    """A table of captions whose image paths do not exist."""


def image_path(folder: str, cell: str) -> str:
    """Return the path of the image that a table in a folder, a local or a remote one, names."""
    return cell if is_remote(cell) else os.path.join(folder, cell)


def identity_of_image(path: str) -> str:
    """Return the full path of an image, or its URL."""
    return path if is_remote(path) else os.path.abspath(path)


def _is_there(path: str) -> bool:
    return exists(path) if is_remote(path) else os.path.exists(path)


def check_images_exist(table: str, column: str, paths: Sequence[str]) -> None:
    """Raise MissingImagesError if none of the first rows' images exists: then the paths are relative to another folder."""
    probed = [path for path in paths[:PROBED_ROWS] if path]
    if probed and not any(map(_is_there, probed)):
        if is_remote(probed[0]):
            raise MissingImagesError(
                f"{table}: none of the first {len(probed)} images of the column {column!r} is there, such as "
                f"{shown(probed[0])}; paths are URLs or relative to the table's folder"
            )
        raise MissingImagesError(
            f"{table}: none of the first {len(probed)} images of the column {column!r} is there, such as "
            f"{printable(probed[0])}; paths are absolute or relative to the table's folder: "
            f"{_remedy_for_images(os.path.dirname(table), probed[0])}"
        )


def _remedy_for_images(folder: str, path: str) -> str:
    """Return advice on where to move a table of this folder, given the path of one of its images."""
    inside = folder and path.startswith(os.path.join(folder, ""))
    name = path[len(os.path.join(folder, "")) :] if inside else path
    if not os.path.isabs(name):
        if os.path.exists(name):
            return "they are there from the current folder, so that the table belongs there"
        # For example results.csv, which lies beside flickr30k_images and holds only file names.
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            for entry in itertools.islice(entries, _PROBED_ENTRIES):
                if os.path.exists(os.path.join(entry.path, name)):
                    return f"they lie in {printable(entry.path)}, so that the table belongs there"
    return "move the table into the folder of its images"


class ColumnError(DataError):
    """A table lacks a column."""


def find_column(path: str, columns: Sequence[str], names: Sequence[str]) -> str:
    """Return the first of ``names`` that is a column of the table; raise ColumnError, which lists the columns."""
    for name in names:
        if name in columns:
            return name
    # A file that is not a table has a single column, whose name is its first line.
    shown = [printable(name)[:_SHOWN_CHARS] for name in columns[:_SHOWN_COLUMNS]]
    there = ", ".join(shown) + ", ..." * (len(columns) > len(shown))
    found = "it has one column" if len(columns) == 1 else f"its columns are {there or 'none'}"
    raise ColumnError(f"{path} has no column {' or '.join(map(repr, names))}; {found}")


def image_columns(name: str | None) -> Sequence[str]:
    """Return the candidate image columns: the one that the user names, else the usual ones, open_clip's default first."""
    return _columns(name, DEFAULT_IMAGE_KEY, IMAGE_COLUMNS)


def caption_columns(name: str | None) -> Sequence[str]:
    """Return the candidate caption columns: as ``image_columns`` does."""
    return _columns(name, DEFAULT_CAPTION_KEY, CAPTION_COLUMNS)


def _columns(name: str | None, default: str, usual: Sequence[str]) -> Sequence[str]:
    if name is None:
        return usual
    # A flag that is left out is its default, which no more names a column than None does.
    return tuple(dict.fromkeys((name, *usual))) if name == default else (name,)


class CsvSource:
    """A table of image paths and captions with a header line: see ``clipcore.data.PairSource``.

    A row with more fields than the header is a bad sample, because a separator may have cut its caption. So is a row that
    ends before the two columns.

    Args:
        path: the table, UTF-8.
        img_key, caption_key: its columns, as in open_clip's --csv-img-key and --csv-caption-key. Where there is no column of
            the default name, the first of the usual names is used; None uses the usual names alone.
        separator: one character, as in --csv-separator; None uses a tab, or the separator that the header line shows.
        decoder: see ``decode_image``.
        quotes: whether quotation marks enclose fields, which then may hold separators and line ends; else they are text.
        folder: where relative paths of images begin, which may be a URL [the table's folder].

    Attributes:
        left_out: rows that are bad samples because of their number of fields.
        noted: the separator, if it was inferred from the header line.

    Raises:
        DataError: the file or a column is missing, there are no rows, or a quotation mark is not closed.
    """

    def __init__(
        self,
        path: str,
        img_key: str | None = DEFAULT_IMAGE_KEY,
        caption_key: str | None = DEFAULT_CAPTION_KEY,
        separator: str | None = None,
        decoder: Decoder | str = "pillow",
        quotes: bool = True,
        folder: str | None = None,
    ) -> None:
        self.name = os.path.basename(path)
        self._folder = os.path.dirname(path) if folder is None else folder
        self._decoder = decoder
        self.left_out, self.noted = LeftOut(), LeftOut()
        image_names, caption_names = self._column_candidates(img_key, caption_key)
        if separator is None:
            columns = image_names, caption_names
            separator = _shown_separator(path, quotes, columns, self._header)
            if separator != "\t":
                reason = f"table with {separator!r} between its columns, by its header (else --csv-separator)"
                self.noted.add(reason, self.name)
        separator = {"\\t": "\t", "tab": "\t"}.get(separator, separator)
        if len(separator) != 1:
            raise DataError(f"--csv-separator is one character or `tab`, got {separator!r}")
        self._table, self._separator = path, separator
        rows = csv_rows(path, separator, quotes)
        # Some tables have lines without words before the header.
        header = self._header(next((row for _, row in rows if any(map(str.strip, row))), []))
        try:
            image_column = header.index(find_column(path, header, image_names))
            caption_column = header.index(find_column(path, header, caption_names))
        except ColumnError as error:
            others = [other for other in _SEPARATORS if other in "".join(header)]
            is_other = len(header) == 1 and others
            hint = f"; they look separated by {others[0]!r}: --csv-separator" if is_other else ""
            raise ColumnError(f"{error}{hint}") from None
        for name in (header[image_column], header[caption_column]):
            if header.count(name) > 1:
                raise DataError(
                    f"{path} has more than one column {printable(name)!r}; rename or remove one"
                )
        # If a row has the wrong number of fields, a message about it replaces the caption.
        self._cells = TextColumn(
            cell
            for line, row in rows
            if row
            for cell in self._row(row, line, len(header), image_column, caption_column)
        )
        if not len(self):
            raise DataError(f"{path} has a header line but no rows")
        self._check_images(header[image_column])

    def _column_candidates(
        self, img_key: str | None, caption_key: str | None
    ) -> tuple[Sequence[str], Sequence[str]]:
        """Return the accepted names of the image and caption columns."""
        return image_columns(img_key), caption_columns(caption_key)

    def _header(self, cells: list[str]) -> list[str]:
        """Return the names of the columns, given the cells of the header line."""
        return cells

    def _check_images(self, column: str) -> None:
        """Raise DataError if none of the first rows' images exists."""
        paths = [self._path(row) for row in range(min(len(self), PROBED_ROWS))]
        check_images_exist(self._table, column, paths)

    def _row(
        self, row: list[str], line: int, num_columns: int, image_column: int, caption_column: int
    ) -> tuple[str, str]:
        """Return image and caption of a row.

        Raises:
            DataError: an unclosed quotation mark makes one field of several rows.
        """
        for field in row:
            if "\n" in field and self._holds_row(field, num_columns, image_column):
                raise DataError(
                    f"{self._table}, in the row that begins in line {line}: other rows lie between two quotation marks; "
                    "close the first one, or, if quotation marks are text, --csv-no-quotes"
                )
        image = row[image_column] if image_column < len(row) else ""
        # A separator at the end of a line makes an empty field, but cuts no caption.
        is_cut = any(row[num_columns:])
        if max(image_column, caption_column) < len(row) and not is_cut:
            return image, row[caption_column]
        kind = "more" if len(row) > num_columns else "fewer"
        self.left_out.add(f"row of {kind} fields than the header's {num_columns}", f"line {line}")
        return image, f"{MISCOUNTED}{len(row)} fields in a table of {num_columns} (line {line})"

    def _holds_row(self, field: str, num_columns: int, image_column: int) -> bool:
        """Return whether a line inside a field looks like a row: as many columns, and an image's name in the right one."""
        # The first line belongs to the field's own row.
        for text in field.splitlines()[1:]:
            cells = text.split(self._separator)
            if len(cells) == num_columns > 1 and names_image(cells[image_column]):
                return True
        return False

    def __len__(self) -> int:
        return len(self._cells) // 2

    def __getitem__(self, index: int) -> Pair:
        captions = self.captions(index)
        image, key = self.picture(index)
        return Pair(image, captions, key)

    def captions(self, index: int) -> str | tuple[str, ...]:
        """Return the caption of a row; raise BadSample."""
        key, caption = self._key(index), self._cells[2 * index + 1]
        if caption.startswith(MISCOUNTED):
            raise BadSample(printable(caption.removeprefix(MISCOUNTED)), key)
        if not self._path(index):
            raise BadSample("no image path", key)
        return checked_captions(caption, key)

    def picture(self, index: int) -> tuple[Any, str]:
        """Return the picture of a row and its key; raise BadSample."""
        path, key = self._path(index), self._key(index)
        if not path:
            raise BadSample("no image path", key)
        return read_image_file(path, key, self._decoder), key

    def picture_names(self) -> Iterator[str]:
        """Yield the full path of each row's picture, "" if it has none; several rows may share one."""
        paths = (self._path(row) for row in range(len(self)))
        return (identity_of_image(path) if path else "" for path in paths)

    def _key(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return printable(self._cells[2 * index]) or f"{self.name}, row {index + 1}"

    def _path(self, index: int) -> str:
        cell = self._cells[2 * index]
        return image_path(self._folder, cell) if cell else ""


def names_image(cell: str) -> bool:
    """Return whether a field ends with the suffix of a supported image."""
    stem, _, suffix = cell.strip().rpartition(".")
    return bool(stem) and suffix.lower() in IMAGE_SUFFIXES


def _short_lines(file: TextIO, path: str) -> Iterator[str]:
    """Yield the lines of a table; raise DataError for a line that is too long for an image and its captions."""
    number = 0
    while line := file.readline(MAX_CAPTION_BYTES + 1):
        number += 1
        if len(line) > MAX_CAPTION_BYTES:
            raise DataError(
                f"{path}, line {number}: more than {MAX_CAPTION_BYTES} characters are not a row of an image and its "
                "captions; remove it"
            )
        yield line


def _shown_separator(
    path: str,
    quotes: bool,
    columns: Sequence[Sequence[str]],
    header_of: Callable[[list[str]], list[str]],
) -> str:
    """Return the separator that a header line shows: a tab if it holds one, or unless exactly one other fits.

    Args:
        columns: the accepted names of each required column.
        header_of: returns the names of the columns, given the cells of the line.
    """
    header = first_line(path)
    if "\t" in header:
        return "\t"
    fitting = []
    for separator in _SEPARATORS[1:]:
        with contextlib.suppress(csv.Error):
            fields = header_of(next(_csv_reader([header], separator, quotes)))
            if all(set(names) & set(fields) for names in columns):
                fitting.append(separator)
    return fitting[0] if len(fitting) == 1 else "\t"


def first_line(path: str) -> str:
    """Return the first non-empty line of a table; raise DataError."""
    with contextlib.closing(text_lines(path)) as lines:
        return next((line for line in lines if not line.isspace()), "")


def text_lines(path: str) -> Generator[str, None, None]:
    """Yield the lines of a table of text; raise DataError."""
    try:
        # utf-8-sig, because spreadsheets begin their files with a byte-order mark.
        with io.TextIOWrapper(open_regular(path), "utf-8-sig", newline="") as file:
            yield from _short_lines(file, path)
    except OSError as error:
        raise DataError(f"cannot read the table {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(path, error)) from None


def _csv_reader(lines: Iterable[str], separator: str, quotes: bool) -> Any:
    """Return the standard library's reader of lines, which raises csv.Error for a misplaced quotation mark."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)


def csv_rows(path: str, separator: str, quotes: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, fields) of the rows of a table; raise DataError."""
    try:
        # utf-8-sig, because spreadsheets begin their files with a byte-order mark.
        with io.TextIOWrapper(open_regular(path), "utf-8-sig", newline="") as file:
            rows = _csv_reader(_short_lines(file, path), separator, quotes)
            line = 1
            try:
                for row in rows:
                    yield line, row
                    line = rows.line_num + 1
            except csv.Error as error:
                hint = "; if its quotation marks are text, --csv-no-quotes" if quotes else ""
                raise DataError(
                    f"{path}, in the row that begins in line {line}: {error}{hint}"
                ) from None
    except OSError as error:
        raise DataError(f"cannot read the table {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(path, error)) from None


class JsonlSource:
    """One JSON object per line, with an image path and a caption or a list of captions.

    Only the offsets of the lines are kept in memory; empty lines are ignored. The first line defines the columns. The
    arguments are those of ``CsvSource``; a column that is not named is found by the usual names.

    Attributes:
        left_out: images of the folder that the table does not name, if it is the table of a folder.
    """

    def __init__(
        self,
        path: str,
        img_key: str | None = None,
        caption_key: str | None = None,
        decoder: Decoder | str = "pillow",
        folder: str | None = None,
    ) -> None:
        self.name = os.path.basename(path)
        self._path = path
        self._folder = os.path.dirname(path) if folder is None else folder
        self._decoder = decoder
        self.left_out = LeftOut()
        try:
            with open_regular(path) as file:
                self._state = _state_of(file)
                self._starts_N1 = _line_offsets(file)
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
        paths = list(self._image_paths(min(len(self), PROBED_ROWS)))
        check_images_exist(path, self._img_key, paths)

    def __len__(self) -> int:
        return len(self._starts_N1) - 1

    def __getitem__(self, index: int) -> Pair:
        record, key = self._named(index)
        captions = checked_captions(record.get(self._caption_key), key)
        return Pair(self._picture(record, key), captions, key)

    def captions(self, index: int) -> str | tuple[str, ...]:
        """Return the caption or captions of a record; raise BadSample."""
        record, key = self._named(index)
        return checked_captions(record.get(self._caption_key), key)

    def picture(self, index: int) -> tuple[Any, str]:
        """Return the picture of a record and its key; raise BadSample."""
        record, key = self._named(index)
        return self._picture(record, key), key

    def picture_names(self) -> Iterator[str]:
        """Yield the full path of each record's picture, "" if it has none; several records may share one."""
        for path in self._image_paths(len(self)):
            yield identity_of_image(path) if path else ""

    def _picture(self, record: dict[str, Any], key: str) -> Any:
        path = image_path(self._folder, record[self._img_key])
        return read_image_file(path, key, self._decoder)

    def _named(self, index: int) -> tuple[dict[str, Any], str]:
        """Return a record with an image path, and its key; raise BadSample."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        key = f"{self.name}, record {index + 1}"
        record = self._record(index, key)
        path = record.get(self._img_key)
        if not isinstance(path, str) or not path:
            raise BadSample(f"no image path in {self._img_key!r}", key)
        return record, printable(path)

    def _record(self, index: int, key: str, file: BinaryIO | None = None) -> dict[str, Any]:
        """Return a record, read from the open table; raise BadSample."""
        start, end = self._starts_N1[index : index + 2].tolist()
        if end - start > MAX_CAPTION_BYTES:
            raise BadSample(f"a line of {end - start} bytes is too long", key)
        try:
            with (
                open_regular(self._path) if file is None else contextlib.nullcontext(file) as opened
            ):
                state = _state_of(opened)
                line = os.pread(opened.fileno(), end - start, start)
        except OSError as error:
            raise DataError(f"cannot read the table {self._path}: {error.strerror}") from None
        if state != self._state:
            raise DataError(f"{self._path} was changed after the run began; start the run again")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise BadSample("the line is not JSON", key) from None
        if not isinstance(record, dict):
            raise BadSample("the line is not a JSON object", key)
        return record

    def _image_paths(self, num_rows: int) -> Iterator[str]:
        """Yield the image path of each of the first rows, "" if it has none."""
        try:
            file = open_regular(self._path)
        except OSError as error:
            raise DataError(f"cannot read the table {self._path}: {error.strerror}") from None
        with file:
            for row in range(num_rows):
                try:
                    path = self._record(row, "", file).get(self._img_key)
                except BadSample:
                    path = None
                is_path = isinstance(path, str) and path
                yield image_path(self._folder, str(path)) if is_path else ""


def _state_of(file: BinaryIO) -> tuple[int, int]:
    """Return size and modification time."""
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


def _line_offsets(file: BinaryIO) -> np.ndarray:
    """Return the offsets of a file's non-empty lines, and of its end: int64 [N + 1]."""
    starts, offset = array("q"), 0
    is_begun = is_inside = False
    # Read in blocks, because a hostile file may have lines of any length.
    while piece := file.readline(MAX_CAPTION_BYTES):
        if not is_inside:
            start, is_begun = offset, False
        if not is_begun and not piece.isspace():
            starts.append(start)
            is_begun = True
        offset += len(piece)
        is_inside = not piece.endswith(b"\n")
    starts.append(offset)
    return np.array(starts, np.int64)
