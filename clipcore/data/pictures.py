"""Groups pairs by picture, for tables with one row per caption, such as Flickr30k's and COCO's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from clipcore.data import BadSample, LeftOut, Pair, PairSource
from clipcore.data.parquet import ParquetSource
from clipcore.data.sources import MixtureSource, left_out_of, noted_of
from clipcore.data.tables import CsvSource, JsonlSource


def num_pictures(source: PairSource) -> int | None:
    """Return how many pictures the rows of a table name; None for a source that does not identify its pictures."""
    if not isinstance(source, _TABLES):
        return None
    return len(np.unique(_hashes(source)))


def _hashes(source: _Rows) -> np.ndarray:
    """Return a number for each row, int64 [N], equal for rows with the same picture."""
    # Hashes, because millions of names would take gigabytes. A row without a name is a bad sample of its own.
    names = (hash(name or ("", row)) for row, name in enumerate(source.picture_names()))
    return np.fromiter(names, np.int64, len(source))


class _Rows(Protocol):
    """Rows that name their pictures; pictures and captions can be read separately."""

    name: str

    def __len__(self) -> int: ...

    def captions(self, index: int) -> str | tuple[str, ...]: ...

    def picture(self, index: int) -> tuple[Any, str]: ...

    def picture_names(self) -> Iterator[str]: ...


def by_picture(source: PairSource) -> PairSource:
    """Return a source that holds each picture once, with the captions of all its rows.

    A source that does not identify its pictures, or holds each once, is returned as it is. A mixture becomes a mixture of
    its parts grouped by picture, without factors.
    """
    if isinstance(source, MixtureSource):
        # A picture may have its captions in several tables.
        tables = [part for part in source.parts if isinstance(part, _TABLES)]
        rest: list[PairSource] = [part for part in source.parts if not isinstance(part, _TABLES)]
        if len(tables) > 1 and all(isinstance(part, CsvSource | JsonlSource) for part in tables):
            rest = [by_picture(JoinedRows(tables, source.name)), *rest]
        else:
            rest = [by_picture(part) for part in source.parts]
        return rest[0] if len(rest) == 1 else MixtureSource(rest, name=source.name)
    if not isinstance(source, _TABLES):
        return source
    hash_N = _hashes(source)
    _, first_P, picture_N = np.unique(hash_N, return_index=True, return_inverse=True)
    if len(first_P) == len(source):
        return source

    # Numbered by their first rows instead of their hashes.
    place_P = np.empty_like(first_P)
    place_P[np.argsort(first_P)] = np.arange(len(first_P))
    picture_N = place_P[picture_N]
    rows_N = np.argsort(picture_N, kind="stable")
    return PictureSource(source, rows_N, np.cumsum(np.bincount(picture_N)))


class JoinedRows:
    """The rows of several tables, one table after another: see ``clipcore.data.PairSource``.

    Args:
        tables: tables whose rows name their pictures by full paths.

    Attributes:
        left_out: the items that the tables skip.
    """

    def __init__(self, tables: Sequence[Any], name: str) -> None:
        self.name = name
        self.left_out, self.noted = LeftOut(), LeftOut()
        for table in tables:
            self.left_out.update(table.left_out)
            self.noted.update(noted_of(table))
        self._tables = list(tables)
        self._ends = np.cumsum([len(table) for table in tables])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Pair:
        table, row = self._place(index)
        pair: Pair = table[row]
        return pair

    def captions(self, index: int) -> str | tuple[str, ...]:
        """Return the caption or captions of a row; raise BadSample."""
        table, row = self._place(index)
        found: str | tuple[str, ...] = table.captions(row)
        return found

    def picture(self, index: int) -> tuple[Any, str]:
        """Return the picture of a row and its key; raise BadSample."""
        table, row = self._place(index)
        found: tuple[Any, str] = table.picture(row)
        return found

    def picture_names(self) -> Iterator[str]:
        """Yield the full path of each row's picture."""
        for table in self._tables:
            yield from table.picture_names()

    def _place(self, index: int) -> tuple[Any, int]:
        """Return the table of a row, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._tables[number], index - (int(self._ends[number - 1]) if number else 0)


class ChosenRows:
    """Some rows of a table, such as those of one split: see ``clipcore.data.PairSource``.

    Args:
        table: a table whose rows name their pictures.
        rows_N: indices of the rows in it, int64 [N].

    Attributes:
        left_out: the items that the table skips, in all of its rows.
    """

    def __init__(self, table: _Rows, rows_N: np.ndarray) -> None:
        self.name = table.name
        self.left_out = left_out_of(table)  # type: ignore[arg-type]
        self.table = table
        self.rows_N = rows_N

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, index: int) -> Pair:
        captions = self.captions(index)
        image, key = self.picture(index)
        return Pair(image, captions, key)

    def captions(self, index: int) -> str | tuple[str, ...]:
        """Return the caption or captions of a row; raise BadSample."""
        return self.table.captions(int(self.rows_N[index]))

    def picture(self, index: int) -> tuple[Any, str]:
        """Return the picture of a row and its key; raise BadSample."""
        return self.table.picture(int(self.rows_N[index]))

    def picture_names(self) -> Iterator[str]:
        """Yield the full path of each row's picture."""
        is_chosen = np.zeros(len(self.table), bool)
        is_chosen[self.rows_N] = True
        for name, chosen in zip(self.table.picture_names(), is_chosen, strict=True):
            if chosen:
                yield name


# Sources whose rows may name a picture several times.
_TABLES = (CsvSource, JsonlSource, ParquetSource, JoinedRows, ChosenRows)


class PictureSource:
    """The pictures of a table, in the order of their first rows: see ``clipcore.data.PairSource``.

    Args:
        rows: the table.
        rows_N: the indices of its rows, grouped by picture, int64 [N].
        ends_P: the end of each picture's rows in ``rows_N``, int64 [P].

    Attributes:
        left_out: unreadable captions of pictures that have other captions.
    """

    def __init__(self, rows: _Rows, rows_N: np.ndarray, ends_P: np.ndarray) -> None:
        self.name = rows.name
        self.num_rows = len(rows_N)
        self.left_out = LeftOut()
        self.left_out.update(left_out_of(rows))  # type: ignore[arg-type]
        self.noted = noted_of(rows)  # type: ignore[arg-type]
        self._rows = rows
        starts_P = np.concatenate([[0], ends_P[:-1]])
        kept = [
            self._readable(rows_N[start:end].tolist())
            for start, end in zip(starts_P, ends_P, strict=True)
        ]
        self._members = np.array([row for those in kept for row in those], np.int64)
        self._ends = np.cumsum([len(those) for those in kept])

    def describe(self) -> str:
        """Return one line with the numbers of pictures and rows."""
        return f"{self.name}: {len(self):,} pictures in {self.num_rows:,} rows, with all their captions"

    def _readable(self, members: list[int]) -> list[int]:
        """Return the rows of a picture that have a caption; if none has, the first row, which is a bad sample."""
        found, errors = [], []
        for row in members:
            try:
                self._rows.captions(row)
                found.append(row)
            except BadSample as error:
                errors.append(error)
        for unread in errors if found else ():
            self.left_out.add(f"caption of a picture ({unread.reason})", unread.key)
        return found or members[:1]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        captions = self.captions(index)
        image, key = self._rows.picture(self._rows_of(index)[0])
        return Pair(image, captions, key)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of all rows of a picture; raise BadSample."""
        captions = list[str]()
        for row in self._rows_of(index):
            found = self._rows.captions(row)
            captions += [found] if isinstance(found, str) else found
        return tuple(captions)

    def _rows_of(self, index: int) -> list[int]:
        start = int(self._ends[index - 1]) if index else 0
        rows: list[int] = self._members[start : self._ends[index]].tolist()
        return rows
