"""Opens folders of parquet tables in the layout of the Hugging Face hub: ``DIR/data/test-00000-of-00002.parquet``.

The tables form one. The splits are in the files' names, perhaps with other words around them, the same in all names
(``pets-test.parquet``); or in the folders' names (``DIR/test/0000.parquet``); or in a column ``split`` of all tables. The
images of a table are opened only with the first split that has some of them, because a training split may have a hundred
times as many.

Legend: N images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipcore.data import DataError, printable
from clipcore.data.columns import ParquetColumns, ParquetImages, Row
from clipcore.data.folders import list_folder
from clipcore.data.transforms import Decoder
from clipcore.evaluate.splits import SPLIT_WORDS, SPLITS, entries_of_splits, one_each

SPLIT_COLUMN = "split"
# How many tables a message names.
_MOST_NAMED = 4
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")

# The end of the name of one of several tables of a split: ``-00000-of-00002`` with a hash.
_SHARD = re.compile(r"[-_.]\d+-of-\d+.*")
# Other numbers of tables, and hashes.
_NUMBER = re.compile(r"(?:part|shard|chunk|file)?\d*|(?=.*\d)[0-9a-f]{8,}")

# Paths of tables by split, in the order of ``SPLITS``.
Tables = dict[str, list[str]]


def parquet_splits(path: Path) -> Tables:
    """Return the tables of each split in a folder, or in its folder ``data``; none if their names contain no splits.

    Raises:
        DataError: one of several tables of a split is missing, or the folder cannot be read.
    """
    for folder in (path, path / "data"):
        if os.path.isdir(folder) and (found := _tables_in(folder)):
            return found
    return {}


def only_configuration(path: Path) -> Tables:
    """Return the tables of each split in the only subfolder that holds such tables; none if there is no such subfolder.

    Raises:
        DataError: several subfolders hold tables, or the tables' splits are unknown.
    """
    files, folders = list_folder(str(path))
    found = {name: tables for name in folders if (tables := _tables_in(path / name))}
    if len(found) > 1:
        raise DataError(
            f"{path} holds parquet tables in several folders, {', '.join(map(printable, found))}; name one of them, such as "
            f"{printable(str(path / next(iter(found))))}"
        )
    if found:
        return next(iter(found.values()))
    places = [path / name for name in files]
    if "data" in folders:
        places += [path / "data" / name for name in list_folder(str(path / "data"))[0]]
    others = [place for place in places if _is_parquet(place.name)]
    if others and all(SPLIT_COLUMN in ParquetColumns(str(place)).names for place in others):
        # Assigned to any split, because the column decides.
        return {"test": list(map(str, others))}
    if others:
        raise DataError(
            f"{path} holds parquet tables whose names say no split ({', '.join(SPLITS)}), and that have no column "
            f"{SPLIT_COLUMN}, such as {printable(str(others[0]))}; name one of them, or rename them"
        )
    return {}


def holds_tables(path: Path) -> bool:
    """Return whether parquet tables lie in a folder, or in its folder ``data``; raise DataError."""
    return any(
        any(map(_is_parquet, list_folder(str(folder))[0]))
        for folder in (path, path / "data")
        if os.path.isdir(folder)
    )


def _tables_in(folder: Path) -> Tables:
    """Return the tables of each split by their names, else by their folders' names; none if neither contains splits."""
    if found := _splits_in(folder):
        return found
    of_splits = {
        split: [inner for inner in those if os.path.isdir(inner) and _parquet_in(inner)]
        for split, those in entries_of_splits(folder).items()
    }
    return {split: _parquet_in(inner) for split, inner in one_each(of_splits).items()}


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _parquet_in(folder: Path) -> list[str]:
    """Return the paths of a folder's tables; raise DataError if one is missing by the count in their names."""
    names = list(filter(_is_parquet, list_folder(str(folder))[0]))
    _check_complete(folder, names)
    return [str(folder / name) for name in names]


class _Name(NamedTuple):
    """The parsed name of a table.

    Attributes:
        file: the name.
        splits: the words in it that mean a split.
        begins: whether it begins with such a word.
        rest: the other words, without numbers.
    """

    file: str
    splits: list[str]
    begins: bool
    rest: str


def _read_name(file: str) -> _Name:
    """Return the parsed name of a table."""
    stem = _SHARD.sub("", file.lower().removesuffix(".parquet"))
    words = re.split(r"[-_.]", stem)
    splits = [word for word in words if word in SPLIT_WORDS]
    rest = [word for word in words if word not in SPLIT_WORDS and not _NUMBER.fullmatch(word)]
    return _Name(file, splits, words[0] in SPLIT_WORDS, " ".join(rest))


def _splits_in(folder: Path) -> Tables:
    """Return the tables of a folder by split: those whose names begin with a split, else those that contain one.

    Raises:
        DataError: a name contains two splits, or the names belong to several data sets.
    """
    all_names = map(_read_name, filter(_is_parquet, list_folder(str(folder))[0]))
    names = [name for name in all_names if name.splits]
    names = [name for name in names if name.begins] or names
    for name in names:
        if len(name.splits) > 1:
            raise DataError(
                f"{folder}: the name {printable(name.file)} says {len(name.splits)} splits, "
                f"{' and '.join(name.splits)}; rename it, or move it elsewhere"
            )
    first_by_rest = {name.rest: name.file for name in reversed(names)}
    if len(first_by_rest) > 1:
        examples = ", ".join(sorted(map(printable, first_by_rest.values()))[:_MOST_NAMED])
        raise DataError(
            f"{folder} holds tables of {len(first_by_rest)} data sets by their names, such as {examples}; name one "
            "table, or move those of each set into a folder of its own"
        )

    found: Tables = {}
    for split in SPLITS:
        files = [name.file for name in names if SPLIT_WORDS[name.splits[0]] == split]
        _check_complete(folder, files)
        if files:
            found[split] = [str(folder / file) for file in files]
    return found


def unused_notes(path: Path, tables: Tables) -> tuple[str, ...]:
    """Return a note on the parquet tables in a folder or its subfolders that belong to no split."""
    used = {os.path.realpath(table) for paths in tables.values() for table in paths}
    folders = [path, *(path / name for name in list_folder(str(path))[1])]
    unused = [
        os.path.relpath(folder / name, path)
        for folder in folders
        for name in filter(_is_parquet, list_folder(str(folder))[0])
        if os.path.realpath(folder / name) not in used
    ]
    if not unused:
        return ()
    more = f" and {len(unused) - _MOST_NAMED} more" if len(unused) > _MOST_NAMED else ""
    return (f"parquet tables not used: {', '.join(map(printable, unused[:_MOST_NAMED]))}{more}",)


def _check_complete(folder: Path, names: Sequence[str]) -> None:
    """Raise DataError if a table is missing by the count in the tables' names."""
    there = set(names)
    for name in names:
        if (match := _PART.fullmatch(name)) is None:
            continue
        # The end may differ, because it is a hash of the content.
        starts = {m[2] for other in there if (m := _PART.fullmatch(other)) and m[1] == match[1]}
        missing = [part for part in range(int(match[3])) if f"{part:05d}" not in starts]
        if missing:
            wanted = f"{match[1]}-{missing[0]:05d}-of-{match[3]}"
            raise DataError(
                f"{folder} has no {printable(wanted)}.parquet, one of the {int(match[3])} tables that the others' names "
                "count; copy it"
            )
        return


class ParquetFiles(ParquetColumns):
    """The columns that several parquet tables share, with a column of splits if they have none themselves.

    Args:
        tables: the tables' paths by split.

    Attributes:
        tables: as given.
        paths: all paths, in the order of the rows.
        has_own_splits: whether the tables have a column of splits.

    Raises:
        DataError: see ``ParquetColumns``.
    """

    def __init__(self, tables: Mapping[str, Sequence[str]]) -> None:
        self.tables = tables
        self.paths = [path for paths in tables.values() for path in paths]
        self._splits = [split for split, paths in tables.items() for _ in paths]
        self._columns = [ParquetColumns(path) for path in self.paths]
        self._ends = np.cumsum([columns.num_rows for columns in self._columns])
        first, *others = self._columns
        self.names = [name for name in first.names if all(name in one.names for one in others)]
        self.has_own_splits = SPLIT_COLUMN in self.names
        if not self.has_own_splits:
            self.names.append(SPLIT_COLUMN)

    def rows(self, names: Sequence[str]) -> Iterator[Row]:
        """Yield the rows of all tables with their values in some columns; raise DataError."""
        read = [name for name in names if self.has_own_splits or name != SPLIT_COLUMN]
        for path, split, columns in zip(self.paths, self._splits, self._columns, strict=True):
            for row in columns.rows(read):
                cells = {SPLIT_COLUMN: split, **dict(zip(read, row.values, strict=False))}
                values = () if row.trouble else [cells[name] for name in names]
                yield Row(f"{os.path.basename(path)}, {row.place}", values, row.trouble)

    def class_names(self, label: str) -> list[str] | None:
        """Return the class names in Hugging Face's metadata, None without them; raise DataError if they differ."""
        found: tuple[str, list[str]] | None = None
        for path, columns in zip(self.paths, self._columns, strict=True):
            if (names := columns.class_names(label)) is None:
                continue
            if found is not None and found[1] != names:
                raise DataError(
                    f"{found[0]} and {path} name the classes of {printable(label)!r} differently; write both again with the "
                    "same classes"
                )
            found = (path, names)
        return None if found is None else found[1]

    def images(self, column: str, decoder: Decoder) -> ParquetFilesImages:
        """Return the images of all tables."""
        return ParquetFilesImages(self.paths, self._ends, column, decoder)

    def rows_by_table(self, rows_N: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the path of each table with some of these ascending rows, and their indices there, int64 [N']."""
        table_N = np.searchsorted(self._ends, rows_N, side="right")
        for number in np.unique(table_N).tolist():
            begun = int(self._ends[number]) - self._columns[number].num_rows
            yield self.paths[number], rows_N[table_N == number] - begun


class ParquetFilesImages:
    """The images of several parquet tables, by row.

    Args:
        paths: the tables.
        ends: the cumulated number of rows at the end of each table.
        column: the name of the image column.
        decoder: see ``decode_image``.
    """

    def __init__(
        self, paths: Sequence[str], ends: np.ndarray, column: str, decoder: Decoder
    ) -> None:
        self.name = os.path.basename(os.path.dirname(os.path.abspath(paths[0])))
        self.paths = list(paths)
        self._ends, self._column, self._decoder = ends, column, decoder
        self._opened = dict[int, ParquetImages]()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        """Return the name of a row: its table and its index there."""
        number, row = self._place(index)
        return f"{os.path.basename(self.paths[number])}, row {row + 1}"

    def picture(self, index: int) -> tuple[Any, str]:
        """Return the picture of a row and its key; raise BadSample."""
        number, row = self._place(index)
        return self._images(number).picture(row)

    def open(self, rows_N: np.ndarray) -> None:
        """Open the tables of some rows; raise DataError."""
        for number in np.unique(np.searchsorted(self._ends, rows_N, side="right")).tolist():
            self._images(number)

    def _images(self, number: int) -> ParquetImages:
        if number not in self._opened:
            self._opened[number] = ParquetImages(self.paths[number], self._column, self._decoder)
        return self._opened[number]

    def _place(self, index: int) -> tuple[int, int]:
        """Return the table of a row, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)
