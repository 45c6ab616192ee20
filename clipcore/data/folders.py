"""Folders of images, with captions in a file beside each image, in a table, or as the names of class folders."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from clipcore.data import BadSample, DataError, LeftOut, Pair, checked_captions, printable
from clipcore.data.caption_lists import CAPTION_LIST_SUFFIXES, NamedColumnsError, open_caption_list
from clipcore.data.tables import (
    CAPTION_COLUMNS,
    ColumnError,
    CsvSource,
    JsonlSource,
    MissingImagesError,
    TextColumn,
    caption_columns,
    read_image_file,
)
from clipcore.data.tar import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    OTHER_IMAGE_SUFFIXES,
)
from clipcore.data.transforms import Decoder
from clipcore.files import read_regular

CLASSES_FILE, TEMPLATES_FILE = "classes.json", "templates.json"
_MAX_JSON_BYTES = 1 << 22  # of class names or prompts
_OF_FILE_SYSTEMS = {"lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"}
_TABLE = re.compile(r".*\.(?:csv|tsv|jsonl|ndjson|token|token\.txt)|captions\.txt", re.IGNORECASE)
# Files that may contain several images.
_OF_IMAGES = re.compile(r".*\.(?:parquet|arrow|zip|tgz|tar(?:\.\w+)?)", re.IGNORECASE)
# Largest number of table rows that are compared with the folder's files; more would take minutes.
_MOST_COUNTED = 1_000_000
_METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class NoCaptionsError(DataError):
    """A folder of images without captions, and without folder names that can serve as captions."""


class FolderSource:
    """Images in a folder and its subfolders, each with its caption in a file of the same stem.

    The caption is in ``<stem>.txt``, or in ``<stem>.json`` as an object's ``caption``. Names that begin with a dot are
    ignored. Links to folders are followed.

    Args:
        path: the folder.
        caption_keys: fields of a JSON file that may hold the caption; the first one present is used.
        decoder: see ``decode_image``.

    Attributes:
        left_out: images without a caption, captions without an image, pictures of other kinds.

    Raises:
        DataError: the folder does not exist, or has no image with a caption.
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
        self.left_out = LeftOut()
        self._cells = TextColumn(
            cell
            for folder, names in walk(path, self.left_out)
            for image, caption in _stem_pairs(folder, names, self.left_out)
            for cell in (os.path.join(folder, image), os.path.join(folder, caption))
        )
        if not len(self):
            raise DataError(
                f"{path} holds no image (.{', .'.join(IMAGE_SUFFIXES)}) with a caption in a .txt or .json file of the "
                f"same name{self.left_out.found()}"
            )

    def __len__(self) -> int:
        return len(self._cells) // 2

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        captions, key = self.captions(index), self.key(index)
        path = os.path.join(self._folder, self._cells[2 * index])
        return Pair(read_image_file(path, key, self._decoder), captions, key)

    def captions(self, index: int) -> str | tuple[str, ...]:
        """Return the caption or captions of an image; raise BadSample."""
        key = self.key(index)
        return checked_captions(self._caption(self._cells[2 * index + 1], key), key)

    def key(self, index: int) -> str:
        """Return the name of an image, within the folder."""
        return printable(self._cells[2 * index])

    def picture_names(self) -> Iterator[str]:
        """Yield the full path of each image."""
        return (os.path.join(self._folder, self._cells[2 * row]) for row in range(len(self)))

    def _caption(self, name: str, key: str) -> object:
        try:
            data = read_regular(os.path.join(self._folder, name), MAX_CAPTION_BYTES + 1)
        except OSError as error:
            raise BadSample(f"{printable(name)}: {error.strerror}", key) from None
        if len(data) > MAX_CAPTION_BYTES:
            raise BadSample(f"{printable(name)} is longer than {MAX_CAPTION_BYTES:,} bytes", key)
        if not name.lower().endswith(".json"):
            return data
        try:
            record = json.loads(data)
        except (ValueError, RecursionError):
            raise BadSample(f"{printable(name)} is not JSON", key) from None
        fields = record if isinstance(record, dict) else {}
        return next((fields[k] for k in self._caption_keys if k in fields), None)


class ClassFolderSource:
    """Images in one folder per class; the caption is the class's name.

    A class's name is its folder's name with spaces for underscores, or its entry in ``classes.json`` in the outer folder:
    an object from folder names to class names or to lists of them. Folders whose names begin with a dot or with ``__`` are
    ignored.

    Args:
        path: the folder of the class folders. They are read in alphabetical order, with all their subfolders. Links to
            folders are followed.
        decoder: see ``decode_image``.
        names: the names of each class by its folder, in class order, for a data set of several such folders; this folder
            may hold only some of the classes.

    Attributes:
        names: the names of each class, in the order of the folders.
        classnames: the captions, the first name of each class.
        labels_N: for each image the index of its folder, int64 [N].
        left_out: images outside of class folders, pictures of other kinds.

    Raises:
        DataError: the folder does not exist, or the file of names is unreadable.
        NoCaptionsError: no class folder holds an image, only one does, or the folder names are numbers or ids.
    """

    def __init__(
        self,
        path: str,
        decoder: Decoder | str = "pillow",
        names: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.name = os.path.basename(os.path.abspath(path))
        self._folder = path
        self._decoder = decoder
        self.left_out = LeftOut()
        labels, folders = array("q"), {folder: place for place, folder in enumerate(names or ())}
        tops = dict[str, None]()

        def images() -> Iterator[str]:
            for folder, names in walk(path, self.left_out):
                top = folder.split(os.sep, 1)[0]
                if top and not top.startswith("__"):
                    tops[top] = None
                for name in names:
                    where = os.path.join(folder, name)
                    if _is_other_image(name):
                        self.left_out.add("picture of another kind", where)
                    elif is_image(name) and (not top or top.startswith("__")):
                        self.left_out.add("image outside of class folders", where)
                    elif is_image(name):
                        labels.append(folders.setdefault(top, len(folders)))
                        yield where

        self._paths = TextColumn(images())
        self.labels_N = np.array(labels, np.int64)
        if not len(self):
            raise NoCaptionsError(
                f"{path} holds no image (.{', .'.join(IMAGE_SUFFIXES)}) in a folder of its class, and none with a "
                f"caption in a .txt or .json file of the same name{self.left_out.found()}"
            )
        if len(folders) == 1 and names is None:
            raise NoCaptionsError(
                f"{path} holds no captions, and all of its images lie in one folder, {printable(next(iter(folders)))}, "
                "which makes one class: put each caption into a .txt file of the image's name, or write a metadata.csv with "
                "the columns file_name and text"
            )
        for top in tops:
            if top not in folders:
                self.left_out.add("folder without a picture", top)
        if names is None:
            file = os.path.join(path, CLASSES_FILE)
            names = dict(zip(folders, class_names(path, list(folders), file), strict=True))
        self.names = tuple(names.values())
        self.classnames = [those[0] for those in self.names]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        captions, path = self.captions(index), self._paths[index]
        key = printable(path)
        image = read_image_file(os.path.join(self._folder, path), key, self._decoder)
        return Pair(image, captions, key)

    def captions(self, index: int) -> str | tuple[str, ...]:
        """Return the name of an image's class; raise BadSample where it is empty."""
        return checked_captions(self.classnames[self.labels_N[index]], self.key(index))

    def key(self, index: int) -> str:
        """Return the name of an image, within the outer folder."""
        return printable(self._paths[index])

    def picture_names(self) -> Iterator[str]:
        """Yield the full path of each image."""
        return (os.path.join(self._folder, self._paths[row]) for row in range(len(self)))


# Folder names of ImageNet, and of data sets that number their classes, perhaps before their names.
_ID = re.compile(
    r"n\d{8}\b.*|\d+(?:\.\d+)?(?:[.-][a-z].*)?|0x[0-9a-f]+|\d[0-9a-f]{3,}|(?:id|cls|class|category|label)[ _-]?\d+",
    re.IGNORECASE,
)
# Names of the parts of a data set, or general names of image folders.
_NO_CLASS = re.compile(
    r"(?:train|training|val|valid|validation|dev|test|testing|eval|split|fold|part|shard|batch|data|dataset|images?|imgs?|"
    r"pictures?|pics?|photos?|jpegs?|jpgs?|pngs?)(?:[ _-]?\d+|[ _-](?:set|split|data|images?|imgs?))?",
    re.IGNORECASE,
)


def class_names(
    path: str, folders: Sequence[str], file: str, are_labels: bool = False
) -> list[tuple[str, ...]]:
    """Return the names of each class, given the class folders: one name, or all that the file gives.

    Args:
        path: the outer folder, for messages.
        file: a JSON file that may give the names.
        are_labels: whether these are labels of the table ``path`` instead of folders, for messages.

    Raises:
        DataError: the file is unreadable.
        NoCaptionsError: folders that are not in the file are named by numbers or ids, or as parts of a data set.
    """
    given = read_json(file, {})
    shape = f"an object of {'labels' if are_labels else 'folder names'} to class names"
    if not isinstance(given, dict):
        raise DataError(f"{file} is not {shape}")
    # Its keys may be written with spaces, as the names are shown.
    by_shown = dict[str, tuple[str, ...]]()
    for key, value in given.items():
        names = (value,) if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not names:
            raise DataError(f"{file} is not {shape}, or to lists of them")
        if not all(isinstance(name, str) for name in names):
            raise DataError(f"{file} is not {shape}, or to lists of them")
        by_shown[key.replace("_", " ")] = tuple(name.strip() for name in names)
    shown = [folder.replace("_", " ") for folder in folders]
    if not given and not are_labels and all(map(_NO_CLASS.fullmatch, shown)):
        first = printable(os.path.join(path, folders[0]))
        raise NoCaptionsError(
            f"the folders of {path} are named as parts of a data set, not as classes; name one of them, such as {first}, "
            f"or, if they are classes, give their names in {file}, {shape}"
        )
    if given and not set(shown) & by_shown.keys():
        what = f"labels of {path}" if are_labels else "folders beside it"
        raise DataError(f"{file} names none of the {what}, such as {printable(shown[0])}")
    ids = [name for name in shown if name not in by_shown and _ID.fullmatch(name)]
    # A single number among names may be a name itself.
    is_most = len(ids) > 1 and 2 * len(ids) >= len(folders)
    if is_most or any(name[0] in "nN" or given for name in ids):
        what = f"labels of {path} are" if are_labels else f"class folders of {path} are named by"
        raise NoCaptionsError(
            f"{what} ids or numbers, such as {printable(ids[0])}, which no caption holds; name them in "
            f'{file}, {shape}: {{"{printable(ids[0])}": "tench", ...}}'
        )
    return [by_shown.get(name, (name.strip(),)) for name in shown]


def read_json(path: str, default: object) -> object:
    """Return the content of a JSON file, or the default if there is no file; raise DataError."""
    try:
        return json.loads(read_regular(path, _MAX_JSON_BYTES))
    except FileNotFoundError:
        return default
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def open_folder(
    path: str,
    img_key: str | None,
    caption_key: str | None,
    decoder: Decoder | str,
    quotes: bool = True,
) -> Any:
    """Return the pairs of a folder, whose layout is recognised from its content.

    The first layout that fits is used: a table ``metadata.jsonl`` or ``metadata.csv`` of images and captions (Hugging Face's
    imagefolder), in the folder or in its only subfolder with images; images with a .txt or .json file each; and, if there
    are no captions, class folders.

    Args:
        img_key, caption_key, decoder, quotes: as of ``CsvSource``.

    Raises:
        DataError: the folder does not exist, or its captions cannot be identified.
    """
    if not os.path.isdir(path):
        raise DataError(f"there is no folder {path}")
    name = os.path.basename(os.path.abspath(path))
    tables, folders, beside = _scan_folder(path)
    if not tables:
        looks = [_scan_folder(folder) for folder in folders]
        inner = [table for look in looks for table in look.tables]
        named = [table for look in looks for table in look.others if _is_named_table(table)]
        beside = sorted([*beside, *named])
        tables = [table for table in inner if not _is_elsewhere(path, os.path.dirname(table))]
        if inner and not tables:
            raise DataError(
                f"{path}: {inner[0]} is a table of captions, but images lie outside of its folder too; name the folders to "
                f"use, such as {os.path.dirname(inner[0])}"
            )

    without_columns: ColumnError | None = None
    for table in tables:
        try:
            source = _open_metadata(table, img_key, caption_key, decoder, quotes)
            source.name = name
            _count_unnamed(path, source)
            return source
        except ColumnError as error:
            # For example a table of patients and their ages.
            without_columns = error

    ignored = LeftOut()
    if any(True for folder, names in walk(path) for _ in _stem_pairs(folder, names, ignored)):
        pairs = FolderSource(path, caption_columns(caption_key), decoder)
        if without_columns is not None:
            pairs.left_out.add("table without columns that are read", tables[0])
        return pairs
    if without_columns is not None:
        raise without_columns
    for table in beside:
        if _has_captions(table, img_key, caption_key, decoder, quotes):
            raise DataError(
                f"{path} holds no image with a caption beside it, but the table {printable(table)}: name that as the data, "
                "or one of the folders"
            )
    return ClassFolderSource(path, decoder)


def _is_named_table(path: str) -> bool:
    """Return whether a table in a subfolder has a usual name of caption tables."""
    return os.path.basename(path).lower().startswith(("metadata.", "captions."))


def _has_captions(
    table: str, img_key: str | None, caption_key: str | None, decoder: Decoder | str, quotes: bool
) -> bool:
    """Return whether a table holds images and captions; raise DataError for one that is used wrongly."""
    try:
        _open_metadata(table, img_key, caption_key, decoder, quotes)
    except (MissingImagesError, NamedColumnsError):
        # It is a table of captions. If it were skipped, folders such as Images and Thumbs would be read as classes.
        raise
    except DataError:
        return False
    return True


def _count_unnamed(path: str, source: CsvSource | JsonlSource) -> None:
    """Count the images of a folder that its table does not name, if the table is short enough to check."""
    if len(source) > _MOST_COUNTED:
        return
    named = {hash(name) for name in source.picture_names()}
    for folder, names in walk(path, source.left_out):
        for name in names:
            where = os.path.join(folder, name)
            if is_image(name) and hash(os.path.abspath(os.path.join(path, where))) not in named:
                source.left_out.add("image that the table does not name", where)


class _FolderContent(NamedTuple):
    """The caption tables of a folder, preferred ones first; its subfolders; and all of its tables."""

    tables: list[str]
    folders: list[str]
    others: list[str]


def _scan_folder(path: str) -> _FolderContent:
    """Return the tables and subfolders of a folder; raise DataError."""
    tables, folders, others = list[str](), list[str](), list[str]()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if _TABLE.fullmatch(entry.name):
                    others.append(entry.path)
                if entry.name.lower() in _METADATA_FILES:
                    tables.append(entry.path)
                elif _is_folder(entry) and _is_data(entry.name):
                    folders.append(entry.path)
    except OSError as error:
        raise DataError(f"cannot read the folder {printable(path)}: {error.strerror}") from None
    order = _METADATA_FILES.index
    tables.sort(key=lambda table: order(os.path.basename(table).lower()))
    return _FolderContent(tables, sorted(folders), sorted(others))


def list_folder(path: str) -> tuple[list[str], list[str]]:
    """Return the sorted names of a folder's files and of its subfolders, without hidden ones; raise DataError."""
    files, folders = list[str](), list[str]()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if _is_data(entry.name):
                    (folders if _is_folder(entry) else files).append(entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {printable(path)}: {error.strerror}") from None
    return sorted(files), sorted(folders)


def _is_elsewhere(path: str, folder: str) -> bool:
    """Return whether an image of a folder lies outside a given subfolder."""
    inside = os.path.relpath(folder, path)
    return any(
        is_image(name) and relative.split(os.sep, 1)[0] != inside
        for relative, names in walk(path)
        for name in names
    )


def _open_metadata(
    table: str,
    img_key: str | None,
    caption_key: str | None,
    decoder: Decoder | str,
    quotes: bool,
) -> CsvSource | JsonlSource:
    if table.lower().endswith(".parquet"):
        raise ColumnError(
            f"{table} names images by their paths, which is not read from parquet; write it as metadata.csv"
        )
    if table.lower().endswith(CAPTION_LIST_SUFFIXES):
        return open_caption_list(table, img_key, caption_key, None, decoder, quotes)
    if not table.lower().endswith((".csv", ".tsv")):
        return JsonlSource(table, img_key, caption_key, decoder)
    # The layout prescribes commas, but spreadsheets write other separators.
    errors = []
    for separator in (",", "\t", ";"):
        try:
            return CsvSource(table, img_key, caption_key, separator, decoder, quotes)
        except ColumnError as error:
            errors.append(error)
    raise errors[0]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_data(name: str) -> bool:
    """Return whether a name may belong to the data: it is neither hidden nor a file system's own folder."""
    return not name.startswith(".") and name not in _OF_FILE_SYSTEMS


def walk(path: str, left_out: LeftOut | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder relative to ``path``, sorted names of its files) in order; names that begin with a dot are skipped.

    Links to folders are followed, because data sets use them. Links into ``path`` itself are not: those files are found
    under their own names.

    Args:
        left_out: counts the links that are not followed.

    Raises:
        DataError: a folder cannot be read.
    """
    return _walk(path, "", frozenset(), LeftOut() if left_out is None else left_out)


def images_below(path: str, left_out: LeftOut, are_shards_read: bool = False) -> Iterator[str]:
    """Yield the images below a folder, relative to it, in the order of ``walk``.

    Args:
        left_out: counts pictures of other kinds, files of many images, and links as ``walk`` does.
        are_shards_read: whether the caller itself reads the ``.tar`` files in the folder, so that they are not counted.

    Raises:
        DataError: a folder cannot be read.
    """
    for folder, names in walk(path, left_out):
        for name in names:
            if is_image(name):
                yield os.path.join(folder, name)
            elif _is_other_image(name):
                left_out.add("picture of another kind", os.path.join(folder, name))
            elif are_shards_read and not folder and name.endswith(".tar"):
                continue
            elif _OF_IMAGES.fullmatch(name):
                left_out.add("file of many images, which is not read", os.path.join(folder, name))


def _walk(
    path: str, relative: str, above: frozenset[tuple[int, int]], left_out: LeftOut
) -> Iterator[tuple[str, list[str]]]:
    """Yield as ``walk`` does, from one folder down; ``above`` holds (device, inode) of the folders above it."""
    folder = os.path.join(path, relative) if relative else path
    try:
        stat = os.stat(folder)
        own = (stat.st_dev, stat.st_ino)
        # Following a link back to one of them would never end.
        if own in above:
            return
        with os.scandir(folder) as entries:
            there = sorted(
                (e.name, _is_folder(e), e.is_symlink()) for e in entries if _is_data(e.name)
            )
    except OSError as error:
        raise DataError(f"cannot read the folder {printable(folder)}: {error.strerror}") from None

    yield relative, [name for name, is_folder, _ in there if not is_folder]
    for name, is_folder, is_link in there:
        where = os.path.join(relative, name)
        if is_link and not is_folder and not os.path.exists(os.path.join(folder, name)):
            left_out.add("link that leads nowhere", where)
        elif is_link and is_folder and _is_within(os.path.join(folder, name), path):
            left_out.add("link to a folder that comes under its own name", where)
        elif is_folder:
            yield from _walk(path, where, above | {own}, left_out)


def _is_within(link: str, path: str) -> bool:
    """Return whether a link leads to a folder or into it."""
    target, root = os.path.realpath(link), os.path.realpath(path)
    return os.path.commonpath([target, root]) == root


def is_image(name: str) -> bool:
    """Return whether a file's name has the suffix of a supported image."""
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def holds_image(path: str) -> bool:
    """Return whether an image lies in a folder or below it, and stop at the first one; raise DataError."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if is_image(entry.name) and _is_data(entry.name) and not _is_folder(entry):
                    return True
    except OSError as error:
        raise DataError(f"cannot read the folder {printable(path)}: {error.strerror}") from None
    return any(any(map(is_image, names)) for _, names in walk(path))


def _is_other_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in OTHER_IMAGE_SUFFIXES


def _stem_pairs(folder: str, names: list[str], left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """Yield (image, caption file) from the names in one folder; count the files without a partner."""
    captions = dict[str, str]()
    for suffix in CAPTION_SUFFIXES:
        for name in names:
            stem, _, kind = name.rpartition(".")
            if kind.lower() == suffix:
                captions.setdefault(stem, name)

    used = set[str]()
    for name in names:
        stem = name.rpartition(".")[0]
        if _is_other_image(name):
            left_out.add("picture of another kind", os.path.join(folder, name))
        elif is_image(name) and (caption := captions.get(stem)) is not None:
            used.add(stem)
            yield name, caption
        elif is_image(name):
            left_out.add("image without a caption", os.path.join(folder, name))
    for stem, name in captions.items():
        if stem not in used:
            left_out.add("caption without an image", os.path.join(folder, name))
