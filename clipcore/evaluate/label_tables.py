"""Opens tables of images with labels, splits and groups: csv, tsv, jsonl and parquet.

The columns are ``image`` (or another of the usual names), ``label`` or ``class`` (a name or a number), and optionally
``classname``, ``split`` (train, val or test) and ``group:...``. A table without labels but with captions is for retrieval.

Legend: R rows of the table, N images of a split, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipcore.data import DataError, PairSource, printable
from clipcore.data.columns import (
    CsvColumns,
    JsonlColumns,
    ParquetImages,
    TableImages,
    open_columns,
)
from clipcore.data.folders import CLASSES_FILE, TEMPLATES_FILE, read_json
from clipcore.data.folders import class_names as names_of_labels
from clipcore.data.parquet import ParquetSource
from clipcore.data.pictures import ChosenRows
from clipcore.data.sources import MixtureSource
from clipcore.data.tables import CsvSource, JsonlSource
from clipcore.data.transforms import Decoder
from clipcore.evaluate.class_names import (
    check_several,
    checked_names,
    first_file,
    is_there,
    names_from_json,
    templates_from_json,
    twin_notes,
    with_spaces,
)
from clipcore.evaluate.parquet_folders import ParquetFiles, ParquetFilesImages
from clipcore.evaluate.retrieval_pairs import pairs_split
from clipcore.evaluate.splits import (
    MAX_CLASSES,
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
from clipcore.evaluate.table_rows import (
    NAME_COLUMN,
    Codes,
    Columns,
    Layout,
    Rows,
    layout_of,
    whole_number,
)


def open_table(
    path: Path,
    decoder: Decoder,
    img_key: str | None = None,
    label_key: str | None = None,
    group_columns: Sequence[str] = (),
    name: str | None = None,
    files: ParquetFiles | None = None,
) -> EvaluationSet:
    """Open a table of images with labels, groups or captions; its paths are absolute or relative to its folder.

    Labels that are names are the classes, in alphabetical order. Numbers get names from a column ``classname``,
    from ``classes.json`` beside the table, a list, or from Hugging Face's metadata in a parquet file.

    Args:
        img_key, label_key: the columns of images and labels [the first of the usual names].
        group_columns: columns of groups, besides those called ``group:...``.
        name: the name of the set [the file's name without its suffix].
        files: the columns of several tables that form one; ``path`` is then a pattern in their folder.

    Raises:
        DataError: a column is missing, a label cannot be used, or the file cannot be read.
    """
    columns = open_columns(str(path)) if files is None else files
    layout = layout_of(path, columns, img_key, label_key, group_columns)
    name = path.stem if name is None else name
    if layout.label is None and not layout.groups:
        return _open_pairs(path, columns, layout, decoder, name)

    rows = Rows(path, columns, layout)
    labels_R: np.ndarray | None = None
    names: Names = ()
    if layout.label is not None:
        labels_R, names = _classes(path, columns, layout.label, rows)
    file = first_file(TEMPLATES_FILE, [path.parent])
    pictures = _pictures(path, columns, layout, rows, decoder)
    if labels_R is not None:
        check_several(names, str(path))

    def open_split(split: str) -> Split:
        return _open_split(path, split, layout, rows, pictures, labels_R, names, decoder)

    return EvaluationSet(
        name=name,
        task="classification",
        classnames=names,
        templates=() if file is None else templates_from_json(file),
        split_names=chosen(rows.splits.texts),
        main_metric=zero_shot_metric(name, "classification"),
        open_split=opened_once(open_split),
        notes=(*left_out_notes("the table", rows), *twin_notes(names)),
    )


def _classes(path: Path, columns: Columns, label: str, rows: Rows) -> tuple[np.ndarray, Names]:
    """Return the class of each row, int64 [R], -1 for unused rows, and the names of the classes.

    Raises:
        DataError: the numbers have no names, a number is below 0 or has no name, or there are too many classes.
    """
    texts = rows.labels.texts
    if len(texts) > MAX_CLASSES:
        raise DataError(f"{path} holds {len(texts):,} different labels, more than {MAX_CLASSES:,}")
    number_L = [number for text in texts if (number := whole_number(text)) is not None]
    if len(number_L) == len(texts):
        # "1", "01" and "1.0" are one class.
        rows.labels = rows.labels.renamed([str(number) for number in number_L])
        number_L = [int(text) for text in rows.labels.texts]
        place_L, names = _numbered_classes(path, columns, label, rows, number_L)
    else:
        order = sorted(texts)
        place_by_text = {text: place for place, text in enumerate(order)}
        place_L = [place_by_text[text] for text in texts]
        names = _named_classes(path, rows, order)
    # The last entry is for unused rows.
    return np.array([*place_L, -1], np.int64)[rows.labels.code_R], names


def _named_classes(path: Path, rows: Rows, order: list[str]) -> Names:
    """Return the names of classes whose labels are names; a file may replace them; raise DataError."""
    if rows.names.texts:
        name_by_label = _pairs_of(path, rows)
        return checked_names(with_spaces([name_by_label[text] for text in order]), str(path))
    file = path.parent / CLASSES_FILE
    if isinstance(read_json(str(file), None), list):
        example = next(text for text in order if whole_number(text) is None)
        raise DataError(
            f"{file} is a list, which names labels that are numbers; {path} has other labels, such as "
            f"{printable(example)!r}: correct them, or write an object of labels to class names"
        )
    names = names_of_labels(str(path), order, str(file), are_labels=True)
    return checked_names(names, str(file) if is_there(file) else str(path))


def _numbered_classes(
    path: Path, columns: Columns, label: str, rows: Rows, number_L: list[int]
) -> tuple[list[int], Names]:
    """Return the class of each label that is a number, and the names of the classes; raise DataError."""
    if min(number_L) < 0:
        raise DataError(
            f"{path}: the label {min(number_L)} is of no class; classes are counted from 0: remove such rows"
        )
    if rows.names.texts:
        name_by_label = _pairs_of(path, rows)
        order = sorted(set(number_L))
        place = {number: place for place, number in enumerate(order)}
        by_number = dict(zip(number_L, rows.labels.texts, strict=True))
        names = with_spaces([name_by_label[by_number[number]] for number in order])
        return [place[number] for number in number_L], checked_names(names, str(path))

    file = path.parent / CLASSES_FILE
    noted = columns.class_names(label)
    if is_there(file):
        found, origin = names_from_json(file), str(file)
    elif noted is not None:
        found, origin = checked_names(with_spaces(noted), str(path)), str(path)
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


def _pairs_of(path: Path, rows: Rows) -> dict[str, str]:
    """Return the class name of each label; raise DataError for a label with two names, or with none."""
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


def _pictures(
    path: Path, columns: Columns, layout: Layout, rows: Rows, decoder: Decoder
) -> Pictures:
    """Return the images of all rows."""
    if isinstance(columns, ParquetFiles):
        return columns.images(layout.image, decoder)
    if rows.has_paths:
        return TableImages(str(path), rows.paths, layout.image, decoder)
    return ParquetImages(str(path), layout.image, decoder)


def _rows_of_split(rows: Rows, split: str) -> np.ndarray:
    """Return the indices of a split's rows, int64 [N]."""
    return np.flatnonzero(rows.splits.code_R == rows.splits.texts.index(split))


def _texts(codes: Codes, rows_N: np.ndarray) -> list[str]:
    """Return the texts of some rows."""
    texts = codes.texts
    return [texts[code] for code in codes.code_R[rows_N].tolist()]


def _open_split(
    path: Path,
    split: str,
    layout: Layout,
    rows: Rows,
    pictures: Pictures,
    labels_R: np.ndarray | None,
    names: Names,
    decoder: Decoder,
) -> Split:
    rows_N = _rows_of_split(rows, split)
    if isinstance(pictures, ParquetFilesImages):
        pictures.open(rows_N)
    labels_N = None if labels_R is None else labels_R[rows_N]
    source = LabelledImages(pictures, rows_N, labels_N, names)
    notes = () if labels_N is None else empty_class_notes(split, labels_N, names)
    if isinstance(pictures, TableImages):
        notes += _repeat_notes(path, split, pictures, rows_N, labels_N, names)

    def fingerprint() -> str:
        if isinstance(pictures, TableImages):
            paths = (pictures.picture_path(row) for row in rows_N.tolist())
            return files_fingerprint(paths, path.parent, decoder)
        assert isinstance(pictures, ParquetImages | ParquetFilesImages)
        return files_fingerprint(
            pictures.paths, path.parent, layout.image, rows_N.tobytes(), decoder
        )

    return Split(
        name=split,
        source=source,
        labels_N=labels_N,
        fingerprint=fingerprint,
        keys=lambda: keys_of(source),
        groups={name: _texts(codes, rows_N) for name, codes in rows.groups.items()},
        notes=notes,
    )


def _repeat_notes(
    path: Path,
    split: str,
    pictures: TableImages,
    rows_N: np.ndarray,
    labels_N: np.ndarray | None,
    names: Names,
) -> tuple[str, ...]:
    """Return a note on rows with the image of another row; raise DataError if their labels differ."""
    places = (os.path.normpath(pictures.picture_path(row)) for row in rows_N.tolist())
    hash_N = np.fromiter((hash(place) for place in places), np.int64, len(rows_N))
    order_N = np.argsort(hash_N, kind="stable")
    repeats = np.flatnonzero(np.diff(hash_N[order_N]) == 0)
    if not len(repeats):
        return ()

    first, second = order_N[repeats], order_N[repeats + 1]
    example = pictures.key(int(rows_N[first[0]]))
    if labels_N is not None and (labels_N[first] != labels_N[second]).any():
        number = int(np.flatnonzero(labels_N[first] != labels_N[second])[0])
        both = [names[labels_N[row]][0] for row in (first[number], second[number])]
        raise DataError(
            f"{path}: images have several labels, such as {pictures.key(int(rows_N[first[number]]))!r}: "
            f"{printable(both[0])!r} and {printable(both[1])!r}; this is a multi-label set: write it as tar shards with "
            "KEY.npy, 0 or 1 of each class, or take out all rows of an image but one"
        )
    return (
        f"{len(repeats):,} rows of {split} name an image of another row, such as {example}: it counts each time",
    )


def _open_pairs(
    path: Path, columns: Columns, layout: Layout, decoder: Decoder, name: str
) -> EvaluationSet:
    """Open a table of images with captions; raise DataError."""
    if isinstance(columns, ParquetFiles):
        return _open_pairs_of_files(path, columns, layout, decoder, name)
    source = _pairs_source(str(path), columns, layout, decoder)
    splits = None if layout.split is None else Rows(path, columns, layout)
    split_names = ("test",) if splits is None else chosen(splits.splits.texts)

    def open_split(split: str) -> Split:
        chosen_rows = (
            source if splits is None else ChosenRows(source, _rows_of_split(splits, split))
        )
        return pairs_split(split, chosen_rows, path.parent, decoder)

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


def _open_pairs_of_files(
    path: Path, files: ParquetFiles, layout: Layout, decoder: Decoder, name: str
) -> EvaluationSet:
    """Open parquet tables of images with captions, with splits by name or by column; raise DataError."""
    rows = Rows(path, files, layout) if files.has_own_splits else None

    def opened(table: str) -> ParquetSource:
        return ParquetSource(table, layout.image, layout.caption, decoder)

    def open_split(split: str) -> Split:
        parts: list[PairSource]
        if rows is None:
            parts = [opened(table) for table in files.tables[split]]
        else:
            # Tables that hold only other splits are not opened.
            found = files.rows_by_table(_rows_of_split(rows, split))
            parts = [ChosenRows(opened(table), rows_N) for table, rows_N in found]
        pairs = parts[0] if len(parts) == 1 else MixtureSource(parts, name=name)
        return pairs_split(split, pairs, path.parent, decoder)

    return EvaluationSet(
        name=name,
        task="retrieval",
        classnames=(),
        templates=(),
        split_names=chosen(list(files.tables) if rows is None else rows.splits.texts),
        main_metric=zero_shot_metric(name, "retrieval"),
        open_split=opened_once(open_split),
        notes=() if rows is None else left_out_notes("the table", rows),
    )


def _pairs_source(
    path: str, columns: Columns, layout: Layout, decoder: Decoder
) -> CsvSource | JsonlSource | ParquetSource:
    if isinstance(columns, CsvColumns):
        return CsvSource(path, layout.image, layout.caption, columns.separator, decoder)
    source = JsonlSource if isinstance(columns, JsonlColumns) else ParquetSource
    return source(path, layout.image, layout.caption, decoder)
