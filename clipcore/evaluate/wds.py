"""Opens folders of tar shards with labels, in the layout of CLIP_benchmark's exports and of the hub.

``DIR/{train,val,test}/{0,1,...}.tar`` hold ``KEY.webp`` (or png, jpg, jpeg) with ``KEY.cls``, a number; with ``KEY.npy``, 0
or 1 for each class; or with ``KEY.txt``, one caption per line. ``nshards.txt`` beside the shards holds their number. ``DIR``
holds ``classnames.txt`` and ``zeroshot_classification_templates.txt``, one per line, and ``dataset_type.txt``
(classification, multilabel or retrieval). Nothing is extracted.

Legend: N images, C classes.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from clipcore.data import DataError, Pair, PairSource, printable
from clipcore.data.folders import CLASSES_FILE, list_folder
from clipcore.data.tar import TarImages, TarSource, split_name
from clipcore.data.transforms import Decoder
from clipcore.evaluate.class_names import (
    check_several,
    is_there,
    names_from_json,
    names_from_lines,
    read_text,
    templates_from_lines,
    twin_notes,
)
from clipcore.evaluate.label_shards import (
    CLASS_SUFFIX,
    MAX_WORD_BYTES,
    NAMES_FILE,
    ROW_SUFFIX,
    load_labels,
    members_of,
)
from clipcore.evaluate.splits import (
    EvaluationSet,
    LabelledImages,
    Names,
    Split,
    Task,
    empty_class_notes,
    entries_of_splits,
    files_fingerprint,
    keys_of,
    left_out_notes,
    members_hash,
    name_of,
    one_each,
    opened_once,
)
from clipcore.evaluate.suites import size_notes, suite_notes, zero_shot_metric

COUNT_FILE, TYPE_FILE = "nshards.txt", "dataset_type.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
_SUFFIXES: dict[Task, str] = {
    "classification": CLASS_SUFFIX,
    "multilabel": ROW_SUFFIX,
    "retrieval": "txt",
}
_MAX_SHARDS = 100_000
_PROBED_MEMBERS = 64


def wds_splits(path: Path) -> dict[str, Path]:
    """Return the split folders that hold shards; none for another folder. Raise DataError if two mean the same split."""
    found = entries_of_splits(path).items()
    return one_each({split: list(filter(_is_split, folders)) for split, folders in found})


def _is_split(folder: Path) -> bool:
    if not os.path.isdir(folder):
        return False
    files, _ = list_folder(str(folder))
    return COUNT_FILE in files or any(name.endswith(".tar") for name in files)


def open_wds(path: Path, decoder: Decoder) -> EvaluationSet:
    """Open a folder of labelled shards.

    Raises:
        DataError: one of its files is missing, damaged, or does not fit the others.
    """
    splits = wds_splits(path)
    name = name_of(path)
    task = _task_of(path, list(splits.values())[-1])
    names = _names(path, task)
    if task == "classification":
        check_several(names, str(path))
    has_templates = task != "retrieval" and is_there(path / TEMPLATES_FILE)
    templates = templates_from_lines(path / TEMPLATES_FILE) if has_templates else ()

    def open_split(split: str) -> Split:
        if task == "retrieval":
            return _open_pairs(split, splits[split], decoder)
        opened = _open_labelled(split, splits[split], decoder, task, names)
        notes = size_notes(name, task, len(opened)) if split == "test" else ()
        return replace(opened, notes=(*notes, *opened.notes))

    return EvaluationSet(
        name=name,
        task=task,
        classnames=names,
        templates=templates,
        split_names=tuple(splits),
        main_metric=zero_shot_metric(name, task),
        open_split=opened_once(open_split),
        notes=(*suite_notes(name, task), *twin_notes(names)),
    )


def _task_of(path: Path, folder: Path) -> Task:
    """Return the task that a set's file names, or the one inferred from a split's first shard."""
    if is_there(path / TYPE_FILE):
        word = read_text(path / TYPE_FILE, MAX_WORD_BYTES).strip().lower()
        for task in _SUFFIXES:
            if word == task:
                return task
        raise DataError(
            f"{path / TYPE_FILE} says {printable(word)!r}; the types are {', '.join(_SUFFIXES)}"
        )
    shard = find_shards(folder)[0][0]
    suffixes = {
        parts[1].lower().rpartition(".")[2]
        for member in itertools.islice(members_of(shard), _PROBED_MEMBERS)
        if (parts := split_name(member.name)) is not None
    }
    found = next((task for task, suffix in _SUFFIXES.items() if suffix in suffixes), None)
    if found is None:
        raise DataError(
            f"{shard} holds no labels: beside each image lies its class in KEY.cls, its classes in KEY.npy, or its captions "
            "in KEY.txt"
        )
    return found


def _names(path: Path, task: Task) -> Names:
    """Return the names of the classes; raise DataError if there is no file of names."""
    if task == "retrieval":
        return ()
    if is_there(path / NAMES_FILE):
        return names_from_lines(path / NAMES_FILE)
    if is_there(path / CLASSES_FILE):
        return names_from_json(path / CLASSES_FILE)
    raise DataError(
        f"{path} has no {NAMES_FILE}; write the name of each class into it, one a line, in the order of the labels"
    )


def find_shards(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """Return the paths of a split's shards in order, and notes about others.

    Raises:
        DataError: there are no shards, or one is missing by the count in ``nshards.txt``.
    """
    files = set(list_folder(str(folder))[0])
    tars = [name for name in files if name.endswith(".tar")]
    if COUNT_FILE not in files:
        if not tars:
            raise DataError(f"{folder} holds no shards; copy 0.tar, 1.tar, ... into it")
        ordered = sorted(tars, key=lambda name: (_number(name), name))
        numbers = set(map(_number, ordered))
        missing = [n for n in range(len(ordered)) if n not in numbers] if 0 in numbers else []
        notes = (f"{folder} has no {missing[0]}.tar, but later ones",) if missing else ()
        return [str(folder / name) for name in ordered], notes

    text = read_text(folder / COUNT_FILE, MAX_WORD_BYTES).strip()
    if not re.fullmatch(r"[0-9]{1,6}", text) or not 0 < int(text) <= _MAX_SHARDS:
        raise DataError(
            f"{folder / COUNT_FILE} says {printable(text)!r}, which is not a number of shards; write it, or remove the file"
        )
    wanted = [f"{number}.tar" for number in range(int(text))]
    if missing_names := [name for name in wanted if name not in files]:
        raise DataError(
            f"{folder} has no {missing_names[0]}, one of the {len(wanted)} shards that {COUNT_FILE} counts; copy it"
        )
    others = len(set(tars) - set(wanted))
    notes = (f"{others} shards in {folder} are not used: {COUNT_FILE} counts {len(wanted)}",)
    return [str(folder / name) for name in wanted], notes if others else ()


def _number(name: str) -> int:
    """Return the number in a shard's name; a large one for another name."""
    stem = name.removesuffix(".tar")
    return int(stem) if re.fullmatch(r"[0-9]{1,9}", stem) else 1 << 62


def _open_labelled(split: str, folder: Path, decoder: Decoder, task: Task, names: Names) -> Split:
    """Open a split of images with labels; raise DataError."""
    shards, notes = find_shards(folder)
    indices, labels_N = load_labels(shards, _SUFFIXES[task], len(names))
    images = TarImages(indices, decoder, folder.name)
    if not len(images):
        raise DataError(
            f"{folder} holds no image with a label in a member of the same name that ends in .{_SUFFIXES[task]}"
            f"{images.left_out.found()}"
        )
    source = LabelledImages(images, np.arange(len(images)), labels_N, names)
    return Split(
        name=split,
        source=source,
        labels_N=labels_N,
        fingerprint=lambda: files_fingerprint(
            shards, folder, task, members_hash(images.shards), decoder
        ),
        keys=lambda: keys_of(source),
        notes=(
            *notes,
            *left_out_notes(split, images),
            *empty_class_notes(split, labels_N, names),
        ),
    )


class CaptionLines:
    """Images with one caption per line: see ``clipcore.data.PairSource``.

    Args:
        source: a source whose captions hold several lines.

    Attributes:
        left_out: see ``source``.
    """

    def __init__(self, source: TarSource) -> None:
        self.name = source.name
        self.left_out = source.left_out
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Pair:
        captions = self.captions(index)
        image, key = self._source.picture(index)
        return Pair(image, captions, key)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of an image; raise BadSample."""
        found = self._source.captions(index)
        texts = (found,) if isinstance(found, str) else found
        return tuple(line.strip() for text in texts for line in text.splitlines() if line.strip())

    def key(self, index: int) -> str:
        """Return the name of an image."""
        return self._source.key(index)


def _open_pairs(split: str, folder: Path, decoder: Decoder) -> Split:
    """Open a split of images with captions; raise DataError."""
    shards, notes = find_shards(folder)
    pairs = TarSource(shards, decoder=decoder, name=folder.name)
    source: PairSource = CaptionLines(pairs)
    return Split(
        name=split,
        source=source,
        labels_N=None,
        fingerprint=lambda: files_fingerprint(
            shards, folder, "retrieval", members_hash(pairs.shards), decoder
        ),
        keys=lambda: keys_of(source),
        notes=(*notes, *left_out_notes(split, source)),
    )
