"""Reads the rows of a table of images: the roles of its columns, and labels, splits and groups as numbers.

Legend: R rows of the table.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipcore.data import DataError, LeftOut, printable
from clipcore.data.columns import CsvColumns, JsonlColumns, ParquetColumns, Row
from clipcore.data.tables import (
    CAPTION_COLUMNS,
    ColumnError,
    TextColumn,
    find_column,
    image_columns,
)
from clipcore.evaluate.splits import SPLITS, split_called

Columns = CsvColumns | JsonlColumns | ParquetColumns
LABEL_COLUMNS = ("label", "class")
NAME_COLUMN, SPLIT_COLUMN, GROUP_PREFIX = "classname", "split", "group:"
_MAX_CHARS = 1000  # limit of a label or a group
_MAX_GROUPS = 100
# Also the form in which pandas writes a column with missing values.
_WHOLE_NUMBER = re.compile(r"(-?[0-9]{1,18})(?:\.0*)?")


@dataclass(frozen=True)
class Layout:
    """The roles of a table's columns; None or empty for a role without a column."""

    image: str
    label: str | None
    name: str | None
    split: str | None
    groups: dict[str, str]
    caption: str | None

    @property
    def columns(self) -> list[str]:
        """The columns to read together, each once: all except captions and the bytes of images."""
        found = [self.label, self.name, self.split, *self.groups.values()]
        return list(dict.fromkeys(name for name in found if name is not None))


def layout_of(
    path: Path,
    columns: Columns,
    img_key: str | None,
    label_key: str | None,
    group_columns: Sequence[str],
) -> Layout:
    """Return the roles of the columns; raise ColumnError for a missing one."""
    there = columns.names
    image = find_column(str(path), there, image_columns(img_key))
    groups = {
        column.removeprefix(GROUP_PREFIX): column
        for column in there
        if column.startswith(GROUP_PREFIX)
    }
    if len(groups) > _MAX_GROUPS:
        raise DataError(
            f"{path} has {len(groups):,} columns of groups, more than {_MAX_GROUPS}; remove some"
        )
    groups |= {
        column: find_column(str(path), there, [column])
        for column in group_columns
        if column not in groups
    }

    name = NAME_COLUMN if NAME_COLUMN in there else None
    if label_key is not None:
        label: str | None = find_column(str(path), there, [label_key])
    else:
        label = next((column for column in LABEL_COLUMNS if column in there), name)
    caption = next((column for column in CAPTION_COLUMNS if column in there), None)
    if label is None and caption is None and not groups:
        raise ColumnError(
            f"{path} has no column of labels ({', '.join(LABEL_COLUMNS)}) or captions ({', '.join(CAPTION_COLUMNS)}); its "
            f"columns are {', '.join(printable(name[:40]) for name in there[:20])}; name that of labels with --label-key"
        )
    split = SPLIT_COLUMN if SPLIT_COLUMN in there else None
    return Layout(image, label, name, split, groups, caption)


def whole_number(text: str) -> int | None:
    """Return a label's number, None if the label is a name."""
    match = _WHOLE_NUMBER.fullmatch(text)
    return None if match is None else int(match[1])


class Codes:
    """A column of few distinct texts, numbered in the order of their first occurrence; -1 for an unused row."""

    def __init__(self) -> None:
        self._numbers = dict[str, int]()
        self._codes = array("q")

    def add(self, text: str | None) -> None:
        """Append a row's text, None for an unused row."""
        known = self._numbers
        self._codes.append(-1 if text is None else known.setdefault(text, len(known)))

    def renamed(self, texts: Sequence[str]) -> Codes:
        """Return the column with replaced texts; texts that become equal share a number."""
        found = Codes()
        codes = [found._numbers.setdefault(text, len(found._numbers)) for text in texts]
        # The last entry is for unused rows.
        found._codes = array("q", np.array([*codes, -1], np.int64)[self.code_R].tobytes())
        return found

    @property
    def texts(self) -> list[str]:
        """The distinct texts, by number."""
        return list(self._numbers)

    @property
    def code_R(self) -> np.ndarray:
        """The number of each row's text, int64 [R]."""
        return np.frombuffer(self._codes, np.int64)


class Rows:
    """The content of a table's rows, without the bytes of images.

    Args:
        path: the table.
        columns: the open columns.
        layout: the roles of the columns that are read.

    Attributes:
        has_paths: whether its images are paths, as in all formats except parquet.
        paths: paths of the images, empty for unused rows.
        labels, names, splits, groups: the texts in these columns.
        left_out: unused rows, by reason.

    Raises:
        DataError: no row can be used, or a row holds an invalid label, split or group.
    """

    def __init__(self, path: Path, columns: Columns, layout: Layout) -> None:
        self.has_paths = not isinstance(columns, ParquetColumns)
        self.labels, self.names, self.splits = Codes(), Codes(), Codes()
        self.groups = {name: Codes() for name in layout.groups}
        self.left_out = LeftOut()
        self._path, self._layout = path, layout
        wanted = [layout.image, *layout.columns] if self.has_paths else layout.columns
        self.paths = TextColumn(self._add(row, wanted) for row in columns.rows(wanted))
        if not self.splits.texts:
            what = "a label" if layout.label is not None else "a group"
            raise DataError(f"{path} has no row with an image and {what}{self.left_out.found()}")

    def _add(self, row: Row, wanted: Sequence[str]) -> str:
        """Append a row to all columns, and return the path of its image."""
        cells = {} if row.trouble else dict(zip(wanted, row.values, strict=True))
        texts = {name: self._text(value, name, row.place) for name, value in cells.items()}
        layout = self._layout
        word = "test" if layout.split is None else texts.get(layout.split, "")
        split = split_called(word)
        trouble = row.trouble or self._reason_unused(texts)
        if trouble:
            self.left_out.add(trouble, row.place)
        elif split is None:
            raise DataError(
                f"{self._path}, {row.place}: the split {printable(word)!r} is none of {', '.join(SPLITS)}; correct it"
            )

        def used(column: str | None) -> str | None:
            return None if trouble or column is None else texts[column]

        self.splits.add(None if trouble else split)
        self.labels.add(used(layout.label))
        self.names.add(used(layout.name))
        for name, column in layout.groups.items():
            self.groups[name].add(used(column))
        return (used(layout.image) or "") if self.has_paths else ""

    def _reason_unused(self, texts: dict[str, str]) -> str:
        """Return why a row cannot be used, nothing if it can."""
        layout = self._layout
        if self.has_paths and not texts[layout.image]:
            return "row without an image"
        if layout.label is not None and not texts[layout.label]:
            return "row without a label"
        return "row without a split" if layout.split and not texts[layout.split] else ""

    def _text(self, value: object, column: str, place: str) -> str:
        """Return a cell as text, empty if there is no value; raise DataError for another kind of value."""
        if value is None or value != value:  # not a number
            return ""
        if isinstance(value, float) and value.is_integer():
            # A column of whole numbers with missing values.
            value = int(value)
        is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
        if not is_number and not isinstance(value, str):
            kind = type(value).__name__
            raise DataError(
                f"{self._path}, {place}: the column {printable(column)!r} holds no text or whole number but {kind}"
            )
        # JSON escapes can hold lone surrogates, which neither file names nor tokenizers accept.
        text = str(value).strip().encode("utf-8", "replace").decode("utf-8")
        if column != self._layout.image and len(text) > _MAX_CHARS:
            raise DataError(
                f"{self._path}, {place}: {len(text):,} characters in the column {printable(column)!r} are not a name; "
                "shorten it"
            )
        return text
