"""The common form of data sets in evaluations: classes and splits, independent of the layout on disk.

Legend: N images, C classes, W width of features.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from clipcore.data import DataError, Pair, PairSource, printable
from clipcore.data.remote import is_remote
from clipcore.data.sources import left_out_of
from clipcore.data.tar import ShardIndex

Task = Literal["classification", "multilabel", "retrieval"]
SPLITS = ("train", "val", "test")
# Common names of the splits.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Each image has a row of them in memory.
MAX_CLASSES = 1 << 20
# The names of each class.
Names = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        name: one of ``SPLITS``.
        source: the images, as pairs; the captions matter only for retrieval. None for a file of features.
        labels_N: class indices, int64 [N]; 0 or 1 for each class, uint8 [N, C], for a multi-label set; None for retrieval,
            and for images with groups but no labels.
        fingerprint: returns a hash of the images, which changes when one is added, removed, renamed or rewritten.
        keys: returns the images' names; they, not the order, determine which images a seed selects. Do not modify them.
        groups: groups of the images by column; empty for an image without a group.
        features_NW: float32, from a file of features; None for images.
        notes: notes for the user, such as on skipped images.
    """

    name: str
    source: PairSource | None
    labels_N: np.ndarray | None
    fingerprint: Callable[[], str]
    keys: Callable[[], list[str]]
    groups: Mapping[str, list[str]] = field(default_factory=dict)
    features_NW: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of images, N."""
        if self.features_NW is not None:
            return len(self.features_NW)
        return 0 if self.source is None else len(self.source)


class Question(NamedTuple):
    """One of several questions of a data set about each image, such as the gender of a face.

    Attributes:
        classnames: the answers, in the order of their numbers.
        templates: prompts with {} or {c} for the answer.
    """

    classnames: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationSet:
    """A data set with its classes and its splits, which are opened on demand.

    Attributes:
        name: its name in results: the folder's or file's name.
        task: the task that it supports.
        classnames: one or several names of each class; prompts from all names and all templates are averaged. Empty for
            retrieval, and for images with groups but no labels.
        templates: prompts with {} or {c} for a class's name; empty if the set has none.
        split_names: the existing splits, in the order of ``SPLITS``.
        main_metric: a key of a zero-shot result's metrics.
        open_split: opens a split by its name; see ``split``.
        notes: notes for the user, such as "split: datacomp".
        questions: the questions of a set of faces, by name; the right answers are groups of the images.
    """

    name: str
    task: Task
    classnames: Names
    templates: tuple[str, ...]
    split_names: tuple[str, ...]
    main_metric: str
    open_split: Callable[[str], Split]
    notes: tuple[str, ...] = ()
    questions: Mapping[str, Question] = field(default_factory=dict)

    def split(self, name: str) -> Split:
        """Return a split, the same object each time; raise DataError if the set has none of that name."""
        if name not in self.split_names:
            raise DataError(
                f"{printable(self.name)} has no split {name!r}; it has {', '.join(self.split_names)}: "
                f"give it a {name} split of images that no other has, or rename one"
            )
        return self.open_split(name)


@contextlib.contextmanager
def data_errors() -> Iterator[None]:
    """Re-raise an OSError as a DataError, for example for a link to itself."""
    try:
        yield
    except OSError as error:
        where = printable(os.fspath(error.filename or "a file"))
        raise DataError(f"cannot read {where}: {error.strerror or error}") from None


def opened_once(open_split: Callable[[str], Split]) -> Callable[[str], Split]:
    """Return an opener that opens each split once, then returns the same object; it raises only DataError.

    The fingerprint and the keys of a split are also computed once, for any number of models.
    """

    @cache
    def open_it(name: str) -> Split:
        with data_errors():
            split = open_split(name)
        return replace(split, fingerprint=cache(split.fingerprint), keys=cache(split.keys))

    return open_it


class Pictures(Protocol):
    """Images by index, without captions."""

    name: str

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def picture(self, index: int) -> tuple[Any, str]: ...


class LabelledImages:
    """Images whose captions are the names of their classes: see ``clipcore.data.PairSource``.

    Args:
        pictures: images that include these.
        rows_N: the indices of these images in it, int64 [N].
        labels_N: see ``Split``; None for images without labels.
        names: the names of each class; captions use the first one.
    """

    def __init__(
        self, pictures: Pictures, rows_N: np.ndarray, labels_N: np.ndarray | None, names: Names
    ) -> None:
        self.name = pictures.name
        self._pictures = pictures
        self._rows_N = rows_N
        self._labels_N = labels_N
        self._names = names

    def __len__(self) -> int:
        return len(self._rows_N)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        image, key = self._pictures.picture(int(self._rows_N[index]))
        return Pair(image, self.captions(index), key)

    def captions(self, index: int) -> str:
        """Return the names of an image's classes; a placeholder if it has no class."""
        if self._labels_N is None:
            return "an image"
        label = self._labels_N[index]
        classes = [int(label)] if label.ndim == 0 else np.flatnonzero(label).tolist()
        return ", ".join(self._names[number][0] for number in classes) or "nothing"

    def key(self, index: int) -> str:
        """Return the name of an image."""
        return self._pictures.key(int(self._rows_N[index]))


def keys_of(source: PairSource) -> list[str]:
    """Return a name for each image of a source: its own if it has one, else its row number."""
    key = getattr(source, "key", None)
    if key is None:
        return [f"{source.name}, row {row + 1}" for row in range(len(source))]
    return [key(row) for row in range(len(source))]


def name_of(path: str | Path) -> str:
    """Return the name of a file or folder as the user gave it, without following links."""
    return os.path.basename(os.path.abspath(path))


def files_fingerprint(paths: Iterable[str], folder: str | Path, *others: object) -> str:
    """Return a hash of the names, sizes and modification times of files in their order, and of other values.

    A missing file is hashed as missing. So is an image that is a URL: each state would be a request to its server.

    Args:
        folder: the data set's folder. Names are relative to it, so a copy with the same times has the same hash.
    """
    digest = hashlib.sha256(repr(others).encode("utf-8", "surrogateescape"))
    whole, given = os.path.join(os.path.abspath(folder), ""), os.path.join(folder, "")
    for path in paths:
        try:
            stat = os.stat(path)
            state = (stat.st_size, stat.st_mtime_ns)
        except (OSError, ValueError):
            state = (-1, -1)
        name = path.removeprefix(whole).removeprefix(given)
        digest.update(repr((name, *state)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def members_hash(shards: Iterable[ShardIndex]) -> str:
    """Return a hash of the positions, sizes and names of the images and labels in shards.

    The size of a shard is not specific, because it is rounded up, and all shards of a program may have the same time.
    """
    digest = hashlib.sha256()
    for shard in shards:
        # A URL has no time that `files_fingerprint` could read.
        state = f"{tuple(shard.state)} " if is_remote(shard.path) else ""
        digest.update(f"{len(shard)} {len(shard.keys)} {state}".encode())
        digest.update(np.ascontiguousarray(shard.columns_6N).data)
        digest.update(np.ascontiguousarray(shard.keys).data)
    return digest.hexdigest()


def left_out_notes(split: str, source: object) -> tuple[str, ...]:
    """Return a note on the items of a split that a source skips; none if it skips nothing."""
    left_out = left_out_of(source)  # type: ignore[arg-type]
    return (f"not used of {split}: {left_out}",) if left_out else ()


def empty_class_notes(split: str, labels_N: np.ndarray, names: Names) -> tuple[str, ...]:
    """Return a note on the classes without images in a split; none if each has one."""
    count_C = np.bincount(labels_N, minlength=len(names)) if labels_N.ndim == 1 else labels_N.sum(0)
    empty = np.flatnonzero(count_C == 0)
    if not len(empty):
        return ()
    example = printable(names[empty[0]][0])
    return (f"{len(empty)} of {len(names)} classes have no image in {split}, such as {example!r}",)


def split_called(word: str) -> str | None:
    """Return which of ``SPLITS`` a word means, ignoring case; None if it means none."""
    return SPLIT_WORDS.get(word.lower())


def entries_of_splits(folder: Path, suffix: str = "") -> dict[str, list[Path]]:
    """Return the entries of a folder with the names of each split, the usual name first; raise OSError.

    Args:
        suffix: the suffix of the names.
    """
    found = dict[str, list[Path]]()
    # One by one, because a folder of pictures may hold millions.
    with os.scandir(folder) as entries:
        for name in (entry.name for entry in entries):
            split = split_called(name.removesuffix(suffix)) if name.endswith(suffix) else None
            if split is not None:
                found.setdefault(split, []).append(folder / name)
    # Others may be links to the entry with the usual name.
    return {
        split: sorted(found[split], key=lambda path: (path.name != split + suffix, path.name))
        for split in chosen(list(found))
    }


def one_each(entries: Mapping[str, Sequence[Path]]) -> dict[str, Path]:
    """Return the only folder or file of each split that has any; raise DataError for two."""
    for split, (first, *others) in ((s, paths) for s, paths in entries.items() if paths):
        for other in others:
            if os.path.realpath(other) != os.path.realpath(first):
                raise DataError(
                    f"{first.parent} holds {first.name} and {other.name}, which both are the split {split}; "
                    "rename or remove one of them"
                )
    return {split: paths[0] for split, paths in entries.items() if paths}


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of splits in their usual order."""
    return tuple(name for name in SPLITS if name in names)
