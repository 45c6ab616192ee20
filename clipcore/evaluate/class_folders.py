"""Opens images in one folder per class: ``DIR/CLASS/*.png``, or ``DIR/{train,val,test}/CLASS/*.png``."""

from __future__ import annotations

import os
from pathlib import Path

from clipcore.data import DataError, printable
from clipcore.data.folders import (
    CLASSES_FILE,
    TEMPLATES_FILE,
    ClassFolderSource,
    class_names,
    holds_image,
    is_image,
    list_folder,
)
from clipcore.data.transforms import Decoder
from clipcore.evaluate.class_names import (
    checked_names,
    first_file,
    templates_from_json,
    twin_notes,
)
from clipcore.evaluate.splits import (
    SPLITS,
    EvaluationSet,
    Split,
    chosen,
    empty_class_notes,
    entries_of_splits,
    files_fingerprint,
    keys_of,
    left_out_notes,
    name_of,
    one_each,
    opened_once,
)
from clipcore.evaluate.suites import zero_shot_metric


def split_folders(path: Path) -> dict[str, Path]:
    """Return the split folders in a folder, each with class folders of images; none if there are no such folders.

    A class may be called "train": a split's folder holds folders of images, but no image itself.

    Raises:
        DataError: two folders mean the same split, such as val and validation.
    """
    found = {
        split: [folder for folder in folders if os.path.isdir(folder)]
        for split, folders in entries_of_splits(path).items()
    }
    is_split = any(_holds_classes(folder) for folders in found.values() for folder in folders)
    return one_each(found) if is_split else {}


def _holds_classes(folder: Path) -> bool:
    files, folders = list_folder(str(folder))
    return not any(map(is_image, files)) and any(
        holds_image(str(folder / name)) for name in folders
    )


def read_templates(*folders: Path) -> tuple[str, ...]:
    """Return the prompts of the first ``templates.json`` in a list of folders, none if there is no such file.

    Raises:
        DataError: it is not a list of prompts.
    """
    file = first_file(TEMPLATES_FILE, folders)
    return () if file is None else templates_from_json(file)


def open_class_folders(
    path: Path, decoder: Decoder, whole: ClassFolderSource | None = None
) -> EvaluationSet:
    """Open a folder with one folder per class, or with such folders for each split.

    Classes are named by their folders, or by ``classes.json``, with a name or a list of names for each. That file and
    ``templates.json``, a list of prompts, lie in the folder or in a split's folder. The classes are those of all splits, in
    alphabetical order of their folders.

    Args:
        whole: the source of a folder without splits, if it has been opened before.

    Raises:
        DataError: there are fewer than two classes, names that identify no class, or an unreadable file.
    """
    splits = split_folders(path)
    # Test first: the evaluated split determines the names of the classes.
    inner = [splits[name] for name in reversed(SPLITS) if name in splits]
    names_by_folder, notes = None, list[str]()
    if splits:
        names_by_folder = _names_of_splits(path, splits, [path, *inner])
        used = {folder.name for folder in splits.values()}
        others = [name for name in list_folder(str(path))[1] if name not in used]
        notes += [
            f"not used: the folder {printable(name)!r}, which is not a split" for name in others
        ]
        names = tuple(names_by_folder.values())
    else:
        splits = {"test": path}
        whole = whole or ClassFolderSource(str(path), decoder)
        names = whole.names
    names = checked_names(names, str(path / CLASSES_FILE))

    def open_split(name: str) -> Split:
        folder = splits[name]
        source = whole or ClassFolderSource(str(folder), decoder, names_by_folder)
        return _split(name, source, folder, decoder)

    name = name_of(path)
    return EvaluationSet(
        name=name,
        task="classification",
        classnames=names,
        templates=read_templates(path, *inner),
        split_names=chosen(list(splits)),
        main_metric=zero_shot_metric(name, "classification"),
        open_split=opened_once(open_split),
        notes=(*notes, *twin_notes(names)),
    )


def _split(name: str, source: ClassFolderSource, folder: Path, decoder: Decoder) -> Split:
    return Split(
        name=name,
        source=source,
        labels_N=source.labels_N,
        fingerprint=lambda: files_fingerprint(source.picture_names(), folder, decoder),
        keys=lambda: keys_of(source),
        notes=(
            *left_out_notes(name, source),
            *empty_class_notes(name, source.labels_N, source.names),
        ),
    )


def _names_of_splits(
    path: Path, splits: dict[str, Path], folders: list[Path]
) -> dict[str, tuple[str, ...]]:
    """Return the names of all splits' classes by folder, in order; raise DataError for fewer than two classes."""
    tops = {
        top
        for folder in splits.values()
        for top in list_folder(str(folder))[1]
        if not top.startswith("__") and holds_image(str(folder / top))
    }
    ordered = sorted(tops)
    if len(ordered) < 2:
        raise DataError(
            f"{path}: all images of its splits lie in one folder, {printable(ordered[0])!r}, which makes one class; "
            "put those of each class into a folder of its own"
        )
    file = first_file(CLASSES_FILE, folders) or path / CLASSES_FILE
    return dict(zip(ordered, class_names(str(path), ordered, str(file)), strict=True))
