"""Tables of images with labels, splits and groups: csv, tsv, jsonl and parquet.

Columns: ``image`` (or another of the usual names), ``label`` or ``class`` (a name or a number), and where they are there
``classname``, ``split`` (train, val or test) and ``group:...``. A table without labels but with captions is for retrieval.

Legend: R rows of the table, N images of a split, C classes.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipcore.data import DataError, LeftOut, printable
from clipcore.data.columns import (
    CsvColumns,
    JsonlColumns,
    ParquetColumns,
    ParquetImages,
    Row,
    TableImages,
    open_columns,
)
from clipcore.data.folders import CLASSES_FILE, TEMPLATES_FILE, read_json
from clipcore.data.folders import class_names as names_of_labels
from clipcore.data.parquet import ParquetSource
from clipcore.data.pictures import ChosenRows
from clipcore.data.tables import (
    CAPTION_COLUMNS,
    ColumnError,
    CsvSource,
    JsonlSource,
    TextColumn,
    find_column,
    image_columns,
)
from clipcore.data.transforms import Decoder
from clipcore.evaluate.class_names import (
    checked_names,
    first_file,
    is_there,
    names_from_json,
    templates_from_json,
    twin_notes,
)
from clipcore.evaluate.retrieval_pairs import pairs_split
from clipcore.evaluate.splits import (
    MAX_CLASSES,
    SPLITS,
    EvaluationSet,
    LabelledImages,
    Names,
    Pictures,
    Split,
    chosen,
    empty_class_notes,
    files_fingerprint,
    keys_of,
    left_out_notes,
    opened_once,
)
from clipcore.evaluate.suites import zero_shot_metric

Columns = CsvColumns | JsonlColumns | ParquetColumns
LABEL_COLUMNS = ("label", "class")
NAME_COLUMN, SPLIT_COLUMN, GROUP_PREFIX = "classname", "split", "group:"
_SPLIT_WORDS = {"validation": "val", "valid": "val", "dev": "val", "testing": "test"}
_MAX_CHARS = 1000  # of a label or a group
_NO_SPLIT = len(SPLITS)


@dataclass(frozen=True)
class _Layout:
    """Which columns of a table are what; None and empty where there is none."""

    image: str
    label: str | None
    name: str | None
    split: str | None
    groups: dict[str, str]
    caption: str | None

    @property
    def columns(self) -> list[str]:
        """Those that are read at once, each once: all but captions, and but the bytes of images."""
        found = [self.label, self.name, self.split, *self.groups.values()]
        return list(dict.fromkeys(name for name in found if name is not None))


def open_table(
    path: Path,
    decoder: Decoder,
    img_key: str | None = None,
    label_key: str | None = None,
    group_columns: Sequence[str] = (),
    name: str | None = None,
) -> EvaluationSet:
    """Open a table of images with labels, groups or captions; its paths are absolute or relative to its folder.

    Labels that are names are the classes in alphabetical order. Labels that are numbers are named by a column ``classname``,
    by ``classes.json`` beside the table, a list, or by Hugging Face's notes in a parquet file.

    Args:
        img_key, label_key: the columns of images and labels; the first of the usual names when left out.
        group_columns: columns of groups, beside those called ``group:...``.
        name: of the set; the file's without its ending when left out.

    Raises:
        DataError: a column is missing, a label cannot be used, or the file cannot be read.
    """
    columns = open_columns(str(path))
    layout = _layout_of(path, columns, img_key, label_key, group_columns)
    name = path.stem if name is None else name
    if layout.label is None and not layout.groups:
        return _open_pairs(path, columns, layout, decoder, name)

    rows = _Rows(path, columns, layout)
    labels_R: np.ndarray | None = None
    names: Names = ()
    if layout.label is not None:
        labels_R, names = _classes(path, columns, layout.label, rows)
    file = first_file(TEMPLATES_FILE, [path.parent])
    pictures = _pictures(path, layout, rows, decoder)

    def open_split(split: str) -> Split:
        return _open_split(path, split, rows, pictures, labels_R, names)

    return EvaluationSet(
        name=name,
        task="classification",
        classnames=names,
        templates=() if file is None else templates_from_json(file),
        split_names=_splits_in(rows),
        main_metric=zero_shot_metric(name, "classification"),
        open_split=opened_once(open_split),
        notes=(*left_out_notes("the table", rows), *twin_notes(names)),
    )


def _layout_of(
    path: Path,
    columns: Columns,
    img_key: str | None,
    label_key: str | None,
    group_columns: Sequence[str],
) -> _Layout:
    """Return which columns are what; raise ColumnError for one that is missing."""
    there = columns.names
    image = find_column(str(path), there, image_columns(img_key))
    groups = {
        column.removeprefix(GROUP_PREFIX): column
        for column in there
        if column.startswith(GROUP_PREFIX)
    }
    groups |= {column: find_column(str(path), there, [column]) for column in group_columns}

    name = NAME_COLUMN if NAME_COLUMN in there else None
    if label_key is not None:
        label: str | None = find_column(str(path), there, [label_key])
    else:
        label = next((column for column in LABEL_COLUMNS if column in there), name)
    caption = next((column for column in CAPTION_COLUMNS if column in there), None)
    if label is None and caption is None and not groups:
        raise ColumnError(
            f"{path} has no column of labels ({', '.join(LABEL_COLUMNS)}) or captions ({', '.join(CAPTION_COLUMNS)}); its "
            f"columns are {', '.join(map(printable, there[:20]))}; name that of labels with --label-key"
        )
    split = SPLIT_COLUMN if SPLIT_COLUMN in there else None
    return _Layout(image, label, name, split, groups, caption)


class _Codes:
    """A column of few different texts, as the numbers in which they first come; -1 of a row that is not used."""

    def __init__(self) -> None:
        self._numbers = dict[str, int]()
        self._codes = array("q")

    def add(self, text: str | None) -> None:
        """Append a row's text, None of a row that is not used."""
        known = self._numbers
        self._codes.append(-1 if text is None else known.setdefault(text, len(known)))

    @property
    def texts(self) -> list[str]:
        """The different texts, by number."""
        return list(self._numbers)

    @property
    def code_R(self) -> np.ndarray:
        """The number of each row's text, int64 [R]."""
        return np.frombuffer(self._codes, np.int64)


class _Rows:
    """What the rows of a table hold beside the bytes of images.

    Args:
        path: the table.
        layout: which columns are read.
        has_paths: whether its images are paths.

    Attributes:
        paths: of the images, empty of rows that are not used.
        labels, names, splits, groups: the texts in these columns.
        left_out: rows that are not used, by reason.
    """

    def __init__(self, path: Path, columns: Columns, layout: _Layout) -> None:
        self.has_paths = not isinstance(columns, ParquetColumns)
        self.labels, self.names, self.splits = _Codes(), _Codes(), _Codes()
        self.groups = {name: _Codes() for name in layout.groups}
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
        split = "test" if layout.split is None else texts.get(layout.split, "").lower()
        split = _SPLIT_WORDS.get(split, split)
        trouble = row.trouble or self._trouble(texts)
        if trouble:
            self.left_out.add(trouble, row.place)
        elif split not in SPLITS:
            raise DataError(
                f"{self._path}, {row.place}: the split {printable(split)!r} is none of {', '.join(SPLITS)}; correct it"
            )

        def used(column: str | None) -> str | None:
            return None if trouble or column is None else texts[column]

        self.splits.add(None if trouble else split)
        self.labels.add(used(layout.label))
        self.names.add(used(layout.name))
        for name, column in layout.groups.items():
            self.groups[name].add(used(column))
        return (used(layout.image) or "") if self.has_paths else ""

    def _trouble(self, texts: dict[str, str]) -> str:
        """Return why a row cannot be used, nothing where it can."""
        layout = self._layout
        if self.has_paths and not texts[layout.image]:
            return "row without an image"
        if layout.label is not None and not texts[layout.label]:
            return "row without a label"
        return "row without a split" if layout.split and not texts[layout.split] else ""

    def _text(self, value: object, column: str, place: str) -> str:
        """Return a cell as text, empty where there is nothing; raise DataError for another kind of value."""
        if value is None or value != value:  # no number
            return ""
        if isinstance(value, float) and value.is_integer():
            # A column of whole numbers of which some are missing.
            value = int(value)
        is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
        if not is_number and not isinstance(value, str):
            kind = type(value).__name__
            raise DataError(
                f"{self._path}, {place}: the column {printable(column)!r} holds no text or whole number but {kind}"
            )
        # A lone surrogate comes from a JSON escape; no file's name and no tokenizer has it.
        text = str(value).strip().encode("utf-8", "replace").decode("utf-8")
        if column != self._layout.image and len(text) > _MAX_CHARS:
            raise DataError(
                f"{self._path}, {place}: {len(text):,} characters in the column {printable(column)!r} are no name; "
                "shorten it"
            )
        return text


def _splits_in(rows: _Rows) -> tuple[str, ...]:
    return chosen(rows.splits.texts)


def _classes(path: Path, columns: Columns, label: str, rows: _Rows) -> tuple[np.ndarray, Names]:
    """Return the class of each row, int64 [R], -1 of rows that are not used, and the names of the classes.

    Raises:
        DataError: numbers without names, a number below 0 or without a name, or too many classes.
    """
    texts = rows.labels.texts
    if len(texts) > MAX_CLASSES:
        raise DataError(f"{path} holds {len(texts):,} different labels, more than {MAX_CLASSES:,}")
    if all(re.fullmatch(r"-?[0-9]{1,18}", text) for text in texts):
        number_L = [int(text) for text in texts]
        place_L, names = _numbered_classes(path, columns, label, rows, number_L)
    else:
        order = sorted(texts)
        place_by_text = {text: place for place, text in enumerate(order)}
        place_L = [place_by_text[text] for text in texts]
        names = _named_classes(path, rows, order)
    # The last place is that of rows that are not used.
    return np.array([*place_L, -1], np.int64)[rows.labels.code_R], names


def _named_classes(path: Path, rows: _Rows, order: list[str]) -> Names:
    """Return the names of classes whose labels are names, which other ones may stand for."""
    if rows.names.texts:
        name_by_label = _pairs_of(path, rows)
        return checked_names([(name_by_label[text],) for text in order], str(path))
    file = path.parent / CLASSES_FILE
    if isinstance(read_json(str(file), None), dict):
        return checked_names(names_of_labels(str(path.parent), order, str(file)), str(file))
    return checked_names([(text,) for text in order], str(path))


def _numbered_classes(
    path: Path, columns: Columns, label: str, rows: _Rows, number_L: list[int]
) -> tuple[list[int], Names]:
    """Return the class of each label that is a number, and the names of the classes; raise DataError."""
    if min(number_L) < 0:
        raise DataError(
            f"{path}: the label {min(number_L)} is of no class; classes are counted from 0: take such rows out"
        )
    if rows.names.texts:
        name_by_label = _pairs_of(path, rows)
        order = sorted(set(number_L))
        place = {number: place for place, number in enumerate(order)}
        by_number = dict(zip(number_L, rows.labels.texts, strict=True))
        names = [(name_by_label[by_number[number]],) for number in order]
        return [place[number] for number in number_L], checked_names(names, str(path))

    file = path.parent / CLASSES_FILE
    noted = columns.class_names(label)
    if is_there(file):
        found, origin = names_from_json(file), str(file)
    elif noted is not None:
        found, origin = checked_names([(name.strip(),) for name in noted], str(path)), str(path)
    else:
        raise DataError(
            f"{path}: the labels are numbers, such as {number_L[0]}, which no prompt holds; name them in a column "
            f'{NAME_COLUMN}, or in {file}, a list: ["cat", "dog", ...]'
        )
    if max(number_L) >= len(found):
        raise DataError(
            f"{path}: the label {max(number_L)} is of no class: {origin} names {len(found)}, 0 to {len(found) - 1}; "
            "write the name of each class, or correct the label"
        )
    return number_L, found


def _pairs_of(path: Path, rows: _Rows) -> dict[str, str]:
    """Return the class name of each label; raise DataError for a label of two names, or of none."""
    labels, names = rows.labels.texts, rows.names.texts
    pairs = np.unique(np.stack([rows.labels.code_R, rows.names.code_R]), axis=1).T.tolist()
    found = dict[str, str]()
    for label, name in pairs:
        if label < 0:
            continue
        if not names[name] or labels[label] in found:
            raise DataError(
                f"{path}: the label {printable(labels[label])!r} has an empty {NAME_COLUMN} or several, such as "
                f"{printable(names[name])!r}; give it one"
            )
        found[labels[label]] = names[name]
    return found


def _pictures(path: Path, layout: _Layout, rows: _Rows, decoder: Decoder) -> Pictures:
    """Return the images of all rows."""
    if rows.has_paths:
        return TableImages(str(path), rows.paths, layout.image, decoder)
    return ParquetImages(str(path), layout.image, decoder)


def _rows_of_split(rows: _Rows, split: str) -> np.ndarray:
    """Return the numbers of a split's rows, int64 [N]."""
    return np.flatnonzero(rows.splits.code_R == rows.splits.texts.index(split))


def _texts(codes: _Codes, rows_N: np.ndarray) -> list[str]:
    """Return the texts of some rows."""
    texts = codes.texts
    return [texts[code] for code in codes.code_R[rows_N].tolist()]


def _open_split(
    path: Path,
    split: str,
    rows: _Rows,
    pictures: Pictures,
    labels_R: np.ndarray | None,
    names: Names,
) -> Split:
    rows_N = _rows_of_split(rows, split)
    labels_N = None if labels_R is None else labels_R[rows_N]
    source = LabelledImages(pictures, rows_N, labels_N, names)

    def fingerprint() -> str:
        if isinstance(pictures, TableImages):
            paths = (pictures.picture_path(row) for row in rows_N.tolist())
            return files_fingerprint(paths, path.parent)
        return files_fingerprint([str(path)], path.parent, rows_N.tobytes())

    return Split(
        name=split,
        source=source,
        labels_N=labels_N,
        fingerprint=fingerprint,
        keys=lambda: keys_of(source),
        groups={name: _texts(codes, rows_N) for name, codes in rows.groups.items()},
        notes=() if labels_N is None else empty_class_notes(split, labels_N, names),
    )


def _open_pairs(
    path: Path, columns: Columns, layout: _Layout, decoder: Decoder, name: str
) -> EvaluationSet:
    """Open a table of images with captions; raise DataError."""
    source = _pairs_source(str(path), columns, layout, decoder)
    splits = None if layout.split is None else _Rows(path, columns, layout)
    split_names = ("test",) if splits is None else _splits_in(splits)

    def open_split(split: str) -> Split:
        chosen_rows = (
            source if splits is None else ChosenRows(source, _rows_of_split(splits, split))
        )
        return pairs_split(split, chosen_rows, path.parent)

    return EvaluationSet(
        name=name,
        task="retrieval",
        classnames=(),
        templates=(),
        split_names=split_names,
        main_metric=zero_shot_metric(name, "retrieval"),
        open_split=opened_once(open_split),
        notes=() if splits is None else left_out_notes("the table", splits),
    )


def _pairs_source(
    path: str, columns: Columns, layout: _Layout, decoder: Decoder
) -> CsvSource | JsonlSource | ParquetSource:
    if isinstance(columns, CsvColumns):
        return CsvSource(path, layout.image, layout.caption, columns.separator, decoder)
    source = JsonlSource if isinstance(columns, JsonlColumns) else ParquetSource
    return source(path, layout.image, layout.caption, decoder)
