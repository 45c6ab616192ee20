"""Opens labelled data sets in all common layouts, as the one form that evaluations use.

======================  ================================================================
``splits.py``           ``EvaluationSet`` and ``Split``, the common form
``wds.py``              tar shards with labels, as CLIP_benchmark exports them
``label_shards.py``     the labels in such shards, read once
``faces.py``            such shards of faces with several questions: datacomp's FairFace and UTKFace
``class_folders.py``    one folder of images per class
``label_tables.py``     csv, tsv, jsonl and parquet tables
``parquet_folders.py``  several parquet tables, one or more per split
``feature_files.py``    features in .npz files, for probes without a model
``retrieval_pairs.py``  images with captions, in the layouts of training data
======================  ================================================================
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipcore.data import DataError, printable
from clipcore.data.choices import DEFAULT_IMAGE_KEY
from clipcore.data.columns import is_table
from clipcore.data.drawing import DrawnSource, SomePictures
from clipcore.data.embedded import EMBEDDED as EMBEDDED_DATA
from clipcore.data.embedded import EmbeddedData
from clipcore.data.folders import CLASSES_FILE, ClassFolderSource, list_folder
from clipcore.data.remote import is_remote
from clipcore.data.sources import open_source
from clipcore.data.tables import ColumnError
from clipcore.data.transforms import MAX_PIXELS, Decoder
from clipcore.evaluate.class_folders import open_class_folders, split_folders
from clipcore.evaluate.faces import are_faces, open_faces
from clipcore.evaluate.feature_files import feature_splits, open_features
from clipcore.evaluate.label_tables import open_table
from clipcore.evaluate.parquet_folders import (
    ParquetFiles,
    Tables,
    holds_tables,
    only_configuration,
    parquet_splits,
    unused_notes,
)
from clipcore.evaluate.retrieval_pairs import pairs_set
from clipcore.evaluate.splits import (
    SPLITS,
    EvaluationSet,
    Names,
    Split,
    Task,
    data_errors,
    keys_of,
    name_of,
    opened_once,
)
from clipcore.evaluate.wds import open_wds, wds_splits

__all__ = ["EMBEDDED", "SPLITS", "EvaluationSet", "Names", "Split", "Task", "open_set"]

# The number of trained pictures, evenly spread, from which a probe learns the styles.
_MOST_OF_STYLES = 4000
_TABLE_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def embedded_sets(name: str, data: EmbeddedData) -> dict[str, Callable[[], EvaluationSet]]:
    """Return functions that open the data sets of embedded pictures, by name.

    ``NAME`` tests the unseen names; ``NAME/shift`` tests them in unseen styles, and ``NAME/seen-shift`` tests the trained
    names there. The classes of ``NAME/style`` are the styles of trained and unseen pictures: few classes of many images,
    for probes.
    """

    def opener(key: str, split: str) -> Callable[[], EvaluationSet]:
        return lambda: _open_names(key, data, split)

    of_names = {name: "unseen", f"{name}/shift": "shift", f"{name}/seen-shift": "seen-shift"}
    openers = {key: opener(key, split) for key, split in of_names.items()}
    return {**openers, f"{name}/style": lambda: _open_styles(f"{name}/style", data)}


def _open_names(name: str, data: EmbeddedData, split: str) -> EvaluationSet:
    """Return the set whose classes are the names of drawn pictures."""
    open_once = opened_once(lambda _: _drawn_split("test", data.open(split)))
    source: Any = open_once("test").source
    return EvaluationSet(
        name=name,
        task="classification",
        classnames=tuple((classname,) for classname in source.classnames),
        templates=data.templates,
        split_names=("test",),
        main_metric="acc1",
        open_split=open_once,
    )


def _open_styles(name: str, data: EmbeddedData) -> EvaluationSet:
    """Return the set whose classes are the styles of drawn pictures."""
    whole = {"train": data.open("train"), "test": data.open("unseen")}
    styles = sorted({whole["test"].style(row) for row in range(len(whole["test"]))})
    number = {style: index for index, style in enumerate(styles)}

    def open_split(split: str) -> Split:
        source = whole[split]
        step = max(1, len(source) // _MOST_OF_STYLES)
        rows = [row for row in range(0, len(source), step) if source.style(row) in number]
        labels_N = np.array([number[source.style(row)] for row in rows], np.int64)
        return _drawn_split(split, SomePictures(source, np.array(rows)), labels_N)

    return EvaluationSet(
        name=name,
        task="classification",
        classnames=tuple((style,) for style in styles),
        templates=data.style_templates,
        split_names=("train", "test"),
        main_metric="acc1",
        open_split=opened_once(open_split),
    )


def _drawn_split(
    name: str, source: DrawnSource | SomePictures, labels_N: np.ndarray | None = None
) -> Split:
    """Return a split of drawn pictures.

    Args:
        labels_N: class indices [the indices of the names].
    """

    def fingerprint() -> str:
        # They are drawn in 0.2 s; the fonts, their size, Pillow and FreeType determine them.
        digest = hashlib.sha256("\0".join((source.name, *keys_of(source))).encode())
        for row in range(len(source)):
            digest.update(np.ascontiguousarray(source[row].image).data)
        return digest.hexdigest()

    if labels_N is None:
        assert isinstance(source, DrawnSource)
        labels_N = source.labels_N
    return Split(name, source, labels_N, fingerprint, lambda: keys_of(source))


# The functions that open the data sets of clipcore itself.
EMBEDDED: dict[str, Callable[[], EvaluationSet]] = {
    key: opener
    for name, data in EMBEDDED_DATA.items()
    for key, opener in embedded_sets(name, data).items()
}


def open_set(
    spec: str,
    *,
    max_pixels: int = MAX_PIXELS,
    img_key: str | None = None,
    label_key: str | None = None,
    group_columns: Sequence[str] = (),
) -> EvaluationSet:
    """Open a data set, whose layout is recognised from its files.

    Args:
        spec: one of ``EMBEDDED``; a folder of labelled shards, of class folders, of ``{train,val,test}.npz``, of
            ``{train,val,test}-*.parquet`` or other parquet tables of splits, or of images with captions; a table; a
            ``.npz`` file, which is the test split; or any other pairs that ``open_source`` reads.
        max_pixels: limit of a picture's pixels; larger pictures are not read.
        img_key, label_key: a table's columns of images and labels [the first of the usual names].
        group_columns: a table's columns of groups, besides those called ``group:...``.

    Raises:
        DataError: nothing has that name, the layout is unknown, or a file is missing, damaged or does not fit.

    Example:
        >>> glyphs = open_set("glyphs/style")
        >>> glyphs.split_names, glyphs.classnames[0]
        (('train', 'test'), ('bold italic sans',))
    """
    if spec in EMBEDDED:
        return EMBEDDED[spec]()
    decoder = Decoder(max_pixels=max_pixels)
    path = Path(spec)
    with data_errors():
        if os.path.isdir(spec):
            return _open_folder(path, decoder, img_key, label_key, group_columns)
        if os.path.exists(spec) and is_table(spec):
            return open_table(path, decoder, img_key, label_key, group_columns)
        if os.path.exists(spec) and path.suffix.lower() == ".npz":
            return open_features(path.stem, {"test": path})
        is_named = is_remote(spec) or any(sign in spec for sign in "*?{")
        if not spec or not (os.path.exists(spec) or is_named):
            raise DataError(
                f"there is no data set {printable(spec)!r}: name a folder, a table, a .npz file of features, or one of "
                f"{', '.join(EMBEDDED)}"
            )
        image_key = DEFAULT_IMAGE_KEY if img_key is None else img_key
        source = open_source(spec, img_key=image_key, max_pixels=max_pixels)
        return pairs_set(name_of(path), source, path.parent, decoder)


def _open_folder(
    path: Path,
    decoder: Decoder,
    img_key: str | None,
    label_key: str | None,
    group_columns: Sequence[str],
) -> EvaluationSet:
    name = name_of(path)
    if wds_splits(path):
        return open_faces(path, decoder) if are_faces(path) else open_wds(path, decoder)
    if paths := feature_splits(path):
        return open_features(name, paths)
    files, _ = list_folder(str(path))
    if split_folders(path):
        return open_class_folders(path, decoder)
    if tables := parquet_splits(path):
        return _open_tables(path, tables, decoder, img_key, label_key, group_columns, name)
    if CLASSES_FILE in files and not holds_tables(path):
        return open_class_folders(path, decoder)

    for table in _TABLE_FILES:
        if table in files:
            try:
                return open_table(path / table, decoder, img_key, label_key, group_columns, name)
            except ColumnError:
                # For example a table of patients and their ages.
                if label_key is not None or group_columns:
                    raise

    image_key = DEFAULT_IMAGE_KEY if img_key is None else img_key
    try:
        source = open_source(str(path), img_key=image_key, max_pixels=decoder.max_pixels)
    except DataError:
        if tables := only_configuration(path):
            return _open_tables(path, tables, decoder, img_key, label_key, group_columns, name)
        raise
    if isinstance(source, ClassFolderSource):
        return open_class_folders(path, decoder, source)
    return pairs_set(name, source, path, decoder)


def _open_tables(
    path: Path,
    tables: Tables,
    decoder: Decoder,
    img_key: str | None,
    label_key: str | None,
    group_columns: Sequence[str],
    name: str,
) -> EvaluationSet:
    """Open the parquet tables of a folder as one; the names of classes and the prompts are in the folder itself."""
    pattern, files = path / "*.parquet", ParquetFiles(tables)
    opened = open_table(pattern, decoder, img_key, label_key, group_columns, name, files)
    return replace(opened, notes=(*opened.notes, *unused_notes(path, tables)))
