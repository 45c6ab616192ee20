"""Reads columns of csv, jsonl and parquet tables row by row, such as columns of labels.

The images of a table are read separately, by row number. Rows keep the table's order, including unreadable ones.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from clipcore.data import BadSample, DataError, printable
from clipcore.data.parquet import ParquetSource, Table, check_groups, import_pyarrow, unreadable
from clipcore.data.parquet import value_of as parquet_value
from clipcore.data.tables import (
    TextColumn,
    check_images_exist,
    csv_rows,
    read_image_file,
)
from clipcore.data.tar import MAX_CAPTION_BYTES
from clipcore.data.transforms import Decoder
from clipcore.files import open_regular

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_SEPARATORS = ("\t", ",", ";")
# The key of Hugging Face's metadata in a parquet file.
_MAX_NOTES_BYTES = 1 << 22


class Row(NamedTuple):
    """A row of a table: its place, the values of the requested columns, and why it cannot be read, if it cannot."""

    place: str
    values: Sequence[object]
    trouble: str = ""


def is_table(path: str) -> bool:
    """Return whether a file's name has the suffix of a table."""
    return path.lower().endswith(TABLE_SUFFIXES)


def open_columns(path: str) -> CsvColumns | JsonlColumns | ParquetColumns:
    """Open a table by its suffix; raise DataError if it cannot be read or has no rows."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".parquet":
        return ParquetColumns(path)
    return CsvColumns(path) if suffix in (".csv", ".tsv") else JsonlColumns(path)


class CsvColumns:
    """The columns of a csv table; of tab, comma and semicolon, its separator is the one that yields the most columns.

    Attributes:
        names: the names in its header.
        separator: the character between its fields.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        headers, refused = dict[str, list[str]](), None
        for separator in _SEPARATORS:
            try:
                headers[separator] = next(csv_rows(path, separator), (1, []))[1]
            except DataError as error:
                # With the wrong separator, quotation marks may not match.
                refused = error
        if not headers and refused is not None:
            raise refused
        self.separator = max(headers, key=lambda separator: len(headers[separator]))
        self.names = headers[self.separator]
        if twice := [name for name, number in Counter(self.names).items() if name and number > 1]:
            raise DataError(
                f"{path} has more than one column {printable(twice[0])!r}; rename or remove one"
            )

    def rows(self, names: Sequence[str]) -> Iterator[Row]:
        """Yield the rows with their fields in some columns; raise DataError."""
        places = [self.names.index(name) for name in names]
        rows = csv_rows(self._path, self.separator)
        next(rows, None)
        for line, row in rows:
            place = f"line {line}"
            # A separator at the end of a line only makes an empty field.
            is_cut = any(row[len(self.names) :])
            if is_cut or (row and max(places) >= len(row)):
                kind = "more" if is_cut else "fewer"
                trouble = f"row of {kind} fields than the header's {len(self.names)}"
                yield Row(place, (), trouble)
            elif row:
                yield Row(place, [row[number] for number in places])

    def class_names(self, label: str) -> list[str] | None:
        """Return the class names that the table gives for a column of numbers: always None."""
        return None


class JsonlColumns:
    """The fields of the objects of a jsonl file; the first object defines them.

    Attributes:
        names: the names of the fields.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        first = next(self._records(), None)
        if first is None:
            raise DataError(f"{path} has no lines")
        place, record, trouble = first
        if record is None:
            raise DataError(f"{path}, {place}: {trouble}")
        self.names = list(record)

    def rows(self, names: Sequence[str]) -> Iterator[Row]:
        """Yield the rows with their values in some fields, None where one is missing; raise DataError."""
        for place, record, trouble in self._records():
            values = () if record is None else [record.get(name) for name in names]
            yield Row(place, values, trouble)

    def class_names(self, label: str) -> list[str] | None:
        """Return the class names that the table gives for a column of numbers: always None."""
        return None

    def _records(self) -> Iterator[tuple[str, dict[str, Any] | None, str]]:
        """Yield for each non-empty line its place, its object, and the reason if it has none."""
        try:
            with open_regular(self._path) as file:
                number = 0
                while line := file.readline(MAX_CAPTION_BYTES + 1):
                    if line.isspace():
                        continue
                    number += 1
                    if len(line) > MAX_CAPTION_BYTES:
                        raise DataError(
                            f"{self._path}, record {number}: a line of more than {MAX_CAPTION_BYTES} bytes is not a row; "
                            "remove it"
                        )
                    yield (f"record {number}", *_parsed(line))
        except OSError as error:
            raise DataError(f"cannot read the table {self._path}: {error.strerror}") from None


def _parsed(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return the object in a line, and the reason if it has none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, "line that is not JSON"
    return (record, "") if isinstance(record, dict) else (None, "line that is not a JSON object")


class ParquetColumns:
    """The columns of a parquet file.

    Attributes:
        names: the names of the columns.
        num_rows: the number of rows in the file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        pyarrow = import_pyarrow(path)
        try:
            with open_regular(path) as content, pyarrow.parquet.ParquetFile(content) as file:
                self.names: list[str] = file.schema_arrow.names
                self._notes = (file.schema_arrow.metadata or {}).get(b"huggingface", b"")
                self.num_rows: int = file.metadata.num_rows
                if not self.num_rows:
                    raise DataError(f"{path} has no rows")
        # A name in it may not be UTF-8.
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise unreadable(path, error) from None

    def rows(self, names: Sequence[str]) -> Iterator[Row]:
        """Yield the rows with their values in some columns; raise DataError."""
        pyarrow = import_pyarrow(self._path)
        if twice := [name for name in names if self.names.count(name) > 1]:
            raise DataError(f"{self._path} has several columns {twice[0]!r}; rename them")
        number = 0
        try:
            with open_regular(self._path) as content, pyarrow.parquet.ParquetFile(content) as file:
                table = Table(self._path, os.fstat(content.fileno()), file, names)
                at_once = check_groups(table)
                for batch in file.iter_batches(batch_size=at_once, columns=list(names)):
                    columns = [batch.column(name) for name in names]
                    for cells in zip(*columns, strict=True):
                        number += 1
                        yield _parquet_row(f"row {number}", cells)
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise unreadable(self._path, error) from None

    def class_names(self, label: str) -> list[str] | None:
        """Return the class names in Hugging Face's metadata for a column of numbers; None without them."""
        try:
            if len(self._notes) > _MAX_NOTES_BYTES:
                return None
            names = json.loads(self._notes)["info"]["features"][label]["names"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return names if is_list else None


def _parquet_row(place: str, cells: Sequence[Any]) -> Row:
    try:
        return Row(place, [parquet_value(cell) for cell in cells])
    except BadSample as error:
        return Row(place, (), error.reason)


class TableImages:
    """The images of a csv or jsonl table, by the paths in its rows.

    Args:
        path: the table.
        cells: the values of its image column, one per row; empty for an unused row.
        column: the name of that column.
        decoder: see ``decode_image``.

    Raises:
        DataError: none of the first images exists.
    """

    def __init__(self, path: str, cells: TextColumn, column: str, decoder: Decoder) -> None:
        self.name = os.path.basename(path)
        self._folder = os.path.dirname(path)
        self._cells = cells
        self._decoder = decoder
        first = (self.picture_path(row) for row in range(len(cells)) if self._cells[row])
        check_images_exist(path, column, [path for path, _ in zip(first, range(16), strict=False)])

    def __len__(self) -> int:
        return len(self._cells)

    def key(self, index: int) -> str:
        """Return the name of a row's image, as written in the table."""
        return printable(self._cells[index])

    def picture(self, index: int) -> tuple[Any, str]:
        """Return the picture of a row and its key; raise BadSample."""
        key = self.key(index)
        return read_image_file(self.picture_path(index), key, self._decoder), key

    def picture_path(self, index: int) -> str:
        """Return the path of a row's image."""
        return os.path.join(self._folder, self._cells[index])


class ParquetImages:
    """The images of a parquet table, by row; arguments and errors are those of ``ParquetSource``."""

    def __init__(self, path: str, column: str, decoder: Decoder) -> None:
        self.paths = [path]
        self._source = ParquetSource(path, column, decoder=decoder, has_captions=False)
        self.name = self._source.name

    def __len__(self) -> int:
        return len(self._source)

    def key(self, index: int) -> str:
        """Return the name of a row."""
        return f"{self.name}, row {index + 1}"

    def picture(self, index: int) -> tuple[Any, str]:
        """Return the picture of a row and its key; raise BadSample."""
        return self._source.picture(index)
