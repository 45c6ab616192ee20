"""Pairs listed in a table (csv, tsv, jsonl), held in parquet files, or lying in a folder."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcore.data.pairs import BadSample, DataError, Pair, StringTable, clean_caption
from clipcore.data.transforms import decode_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Columns that other tools' tables have, tried where the column asked for is missing.
IMAGE_COLUMNS = ("filepath", "file_name", "image", "path", "jpg")
CAPTION_COLUMNS = ("title", "caption", "text")


def pick_column(wanted: str, defaults: Sequence[str], columns: Sequence[str], where: str) -> str:
    """The column of a table: the one asked for, else, if that was a default, another usual name.

    Raises:
        DataError: with the columns that there are.
    """
    candidates = [wanted, *defaults] if wanted == defaults[0] else [wanted]
    found = next((name for name in candidates if name in columns), None)
    if found is None:
        raise DataError(
            f"{where} has no column {wanted!r}; it has {', '.join(map(repr, columns))}: set --csv-img-key and "
            "--csv-caption-key"
        )
    return found


class FileListSource:
    """Pairs whose images are files: paths and captions are kept as two blocks of bytes.

    Args:
        folder: what relative paths start from; paths that are not there are taken from the working folder.
    """

    def __init__(
        self, name: str, folder: Path, rows: Sequence[tuple[str, str]], decoder: str = "pillow"
    ) -> None:
        if not rows:
            raise DataError(f"{name} holds no pairs of an image and a caption")
        self.name, self.decoder = name, decoder
        first = rows[0][0]
        self.folder = folder if (folder / first).exists() or not Path(first).exists() else Path()
        self._paths = StringTable([path for path, _ in rows])
        self._captions = StringTable([caption for _, caption in rows])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Pair:
        path = self._paths[index]
        caption = clean_caption(self._captions[index], path)
        try:
            data = (self.folder / path).read_bytes()
        except OSError as error:
            raise BadSample(f"{path}: {error.strerror}") from error
        try:
            return Pair(decode_image(data, self.decoder), caption, path)
        except BadSample as error:
            raise BadSample(f"{path}: {error}") from error


def csv_source(
    path: Path, img_key: str, caption_key: str, separator: str, decoder: str = "pillow"
) -> FileListSource:
    """The pairs of a csv table with a header; the separator is open_clip's tab unless set.

    Raises:
        DataError: an unreadable table, or one without the columns.
    """
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=separator)
            columns = next(reader, [])
            if len(columns) == 1:
                other = next((mark for mark in (",", "\t", ";") if mark in columns[0]), None)
                if other is not None:
                    raise DataError(
                        f"{path} has the one column {columns[0]!r}; its separator seems to be {other!r}: set "
                        f"--csv-separator {other!r}"
                    )
            image = columns.index(pick_column(img_key, IMAGE_COLUMNS, columns, str(path)))
            caption = columns.index(pick_column(caption_key, CAPTION_COLUMNS, columns, str(path)))
            rows = list(_csv_rows(reader, path, image, caption))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the table {path}: {error}") from error
    return FileListSource(f"table {path.name}", path.parent, rows, decoder)


def _csv_rows(
    reader: Any, path: Path, image: int, caption: int
) -> Iterator[tuple[str, str]]:
    for row in reader:
        if not row:
            continue
        if len(row) <= max(image, caption):
            raise DataError(f"{path}, line {reader.line_num}: {len(row)} fields are too few")
        yield row[image], row[caption]


def jsonl_source(path: Path, img_key: str, caption_key: str, decoder: str = "pillow") -> FileListSource:
    """The pairs of a table of one JSON object a line.

    Raises:
        DataError: a line that is no object, or lacks the columns.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the table {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is no JSON object")
        image = pick_column(img_key, IMAGE_COLUMNS, list(record), where)
        caption = pick_column(caption_key, CAPTION_COLUMNS, list(record), where)
        rows.append((str(record[image]), str(record[caption])))
    return FileListSource(f"table {path.name}", path.parent, rows, decoder)


def folder_source(folder: Path, decoder: str = "pillow") -> FileListSource:
    """The pairs of a folder: captions in metadata.jsonl or metadata.csv (as Hugging Face's image folders), else in a
    .txt or .json file beside each image, else the name of the image's folder, as a class name.

    Raises:
        DataError: no images, or none with a caption.
    """
    for name, make in (("metadata.jsonl", jsonl_source), ("metadata.csv", None)):
        if (table := folder / name).is_file():
            if make is not None:
                return make(table, "file_name", CAPTION_COLUMNS[0], decoder)
            return csv_source(table, "file_name", CAPTION_COLUMNS[0], ",", decoder)
    images = list_images(folder)
    captions = [_caption_beside(path) for path in images]
    rows = [
        (str(path.relative_to(folder)), caption)
        for path, caption in zip(images, captions, strict=True)
        if caption is not None
    ]
    if not rows:
        rows = [
            (str(path.relative_to(folder)), path.parent.name.replace("_", " "))
            for path in images
            if path.parent != folder
        ]
    if not rows:
        raise DataError(f"the {len(images)} images in {folder} have no captions: put NAME.txt beside NAME.jpg")
    return FileListSource(f"folder {folder.name}", folder, rows, decoder)


def class_folder(folder: Path) -> tuple[FileListSource, np.ndarray, list[str]]:
    """Labelled images in one folder a class, as ImageNet's validation set is laid out.

    ``classes.json`` in the folder may map folder names to class names; ``_`` in a folder's name reads as a space.

    Returns:
        (source, labels [N], class names in the order of the folders).

    Raises:
        DataError: no class folders with images.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; --imagenet-val wants one folder a class in it")
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    names: dict[str, str] = {}
    if (table := folder / "classes.json").is_file():
        try:
            names = dict(json.loads(table.read_text()))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {table}: {error}") from error
    rows, labels = [], []
    for label, path in enumerate(folders):
        for image in list_images(path):
            rows.append((str(image.relative_to(folder)), path.name))
            labels.append(label)
    if not rows:
        raise DataError(f"{folder} holds no class folders with images")
    classnames = [names.get(path.name, path.name.replace("_", " ")) for path in folders]
    return FileListSource(f"classes {folder.name}", folder, rows), np.array(labels), classnames


def list_images(folder: Path) -> list[Path]:
    """All images below a folder, sorted by path."""
    return sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES)
    )


def _caption_beside(image: Path) -> str | None:
    for suffix in (".txt", ".json"):
        try:
            text = image.with_suffix(suffix).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if suffix == ".txt":
            return text.strip()
        try:
            record = json.loads(text)
        except ValueError:
            return ""
        return str(record.get("caption") or record.get("text") or "")
    return None


class ParquetSource:
    """Pairs in parquet files, images as bytes (or as Hugging Face's {bytes, path}); the files are held in memory.

    Raises:
        DataError: pyarrow is missing, an unreadable file, or one without the columns.
    """

    def __init__(
        self, paths: Sequence[Path], img_key: str, caption_key: str, decoder: str = "pillow"
    ) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise DataError('parquet needs pyarrow: pip install "clipcore[parquet]"') from error
        self.name, self.decoder = f"parquet {paths[0].name}", decoder
        tables = []
        for path in paths:
            try:
                columns = pyarrow.parquet.read_schema(path).names
                image = pick_column(img_key, IMAGE_COLUMNS, columns, str(path))
                caption = pick_column(caption_key, CAPTION_COLUMNS, columns, str(path))
                table = pyarrow.parquet.read_table(path, columns=[image, caption])
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"cannot read the parquet file {path}: {error}") from error
            tables.append(table.rename_columns(["image", "caption"]))
        whole = pyarrow.concat_tables(tables)
        self._images, self._captions = whole.column("image"), whole.column("caption")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Pair:
        key = f"{self.name}[{index}]"
        data, caption = self._images[index].as_py(), self._captions[index].as_py()
        if isinstance(data, dict):
            data = data.get("bytes")
        if not isinstance(data, bytes):
            raise BadSample(f"{key}: the image column holds no bytes")
        if isinstance(caption, list) and caption:
            caption = tuple(clean_caption(str(item), key) for item in caption)
        else:
            caption = clean_caption(str(caption or ""), key)
        try:
            return Pair(decode_image(data, self.decoder), caption, key)
        except BadSample as error:
            raise BadSample(f"{key}: {error}") from error
