"""Reads files of features, for probes without a model: ``{train,val,test}.npz`` with ``features`` and ``labels``.

CoOp's names of the arrays, ``feature_list`` and ``label_list``, are accepted too.

Legend: N images, C classes, W width of features.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.lib import format as npy

from clipcore.data import DataError
from clipcore.data.raw import MAX_HEADER_BYTES
from clipcore.evaluate.class_names import check_several
from clipcore.evaluate.splits import (
    MAX_CLASSES,
    EvaluationSet,
    Split,
    chosen,
    entries_of_splits,
    files_fingerprint,
    one_each,
    opened_once,
)
from clipcore.files import open_regular
from clipcore.terminal import first_line

FEATURES, LABELS = ("features", "feature_list"), ("labels", "label_list")
# Features hardly compress, but a hostile file of a few bytes could fill the memory.
_MAX_EXPANSION = 20
_FREE_BYTES = 1 << 24
_BLOCK_BYTES = 1 << 24
_MAX_DIRECTORY_BYTES = 1 << 16
_MAX_WIDTH = 1 << 16


def feature_splits(folder: Path) -> dict[str, Path]:
    """Return the files of features in a folder by their splits; none if there are no such files.

    Raises:
        DataError: two files mean the same split, such as val.npz and validation.npz.
    """
    return one_each(entries_of_splits(folder, ".npz"))


def open_features(name: str, paths: Mapping[str, Path]) -> EvaluationSet:
    """Open files of features, one per split, whose classes have numbers instead of names.

    Args:
        name: the name of the set.
        paths: the files by their splits.

    Raises:
        DataError: a file cannot be read, or the splits do not fit each other.
    """
    arrays = {split: read_features(path) for split, path in paths.items()}
    widths = {split: features_NW.shape[1] for split, (features_NW, _) in arrays.items()}
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{width} in {split}" for split, width in widths.items())
        raise DataError(f"{name}: features have different widths, {found}; use those of one model")

    labels = [labels_N for _, labels_N in arrays.values()]
    is_multilabel = labels[0].ndim == 2
    if any((labels_N.ndim == 2) != is_multilabel for labels_N in labels):
        raise DataError(f"{name}: labels are numbers in one split and rows of 0 and 1 in another")
    counts = [rows.shape[1] if is_multilabel else int(rows.max()) + 1 for rows in labels]
    if is_multilabel and len(set(counts)) > 1:
        raise DataError(
            f"{name}: labels have {min(counts)} classes in one split and {max(counts)} in another"
        )

    names = tuple((f"class {number}",) for number in range(max(counts)))
    if not is_multilabel:
        check_several(names, name)

    def open_split(split: str) -> Split:
        return _split(split, paths[split], *arrays[split])

    return EvaluationSet(
        name=name,
        task="multilabel" if is_multilabel else "classification",
        classnames=names,
        templates=(),
        split_names=chosen(list(paths)),
        main_metric="mean_average_precision" if is_multilabel else "acc1",
        open_split=opened_once(open_split),
        notes=("classes have no names, only numbers: features are for probes",),
    )


def _split(split: str, path: Path, features_NW: np.ndarray, labels_N: np.ndarray) -> Split:
    return Split(
        name=split,
        source=None,
        labels_N=labels_N,
        fingerprint=lambda: files_fingerprint([str(path)], path.parent),
        keys=lambda: [f"{path.name}, row {row + 1}" for row in range(len(labels_N))],
        features_NW=features_NW,
    )


def read_features(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return features, float32 [N, W], and labels, int64 [N] or uint8 [N, C], of a .npz file.

    Raises:
        DataError: the file cannot be read, or an array is missing, has a wrong dtype or shape, or is not finite.
    """
    try:
        with open_regular(path) as file:
            _check_directory(path, file)
            with zipfile.ZipFile(file) as archive:
                features_NW = _read_array(path, archive, FEATURES, "f")
                labels_N = _read_array(path, archive, LABELS, "iubf")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        struct.error,
    ) as error:
        raise DataError(
            f"{path} is not a .npz file, or is damaged ({first_line(error)}); write it again with numpy.savez"
        ) from None
    return _checked(path, features_NW, labels_N)


def _check_directory(path: Path, file: BinaryIO) -> None:
    """Raise DataError for a zip file with so many members that their list alone would fill the memory."""
    # The end record holds the directory's size in bytes. It is at the end of the file, because no comment follows it.
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 22, 0))
    end = file.read(22)
    file.seek(0)
    if not end.startswith(b"PK\5\6"):
        raise DataError(
            f"{path} is not a .npz file, or is cut off; write it again with numpy.savez"
        )
    sizes = [int.from_bytes(end[12:16], "little")]
    # In a larger file, a 64-bit end record and its position precede this one.
    file.seek(max(size - 22 - 20, 0))
    locator = file.read(20)
    if locator.startswith(b"PK\6\7"):
        for place in (int.from_bytes(locator[8:16], "little"), size - 22 - 20 - 56):
            file.seek(min(max(place, 0), size))
            sizes.append(int.from_bytes(file.read(56)[40:48], "little"))
    file.seek(0)
    if max(sizes) > _MAX_DIRECTORY_BYTES:
        raise DataError(f"{path} holds far more than features and labels; write only these two")


def _read_array(
    path: Path, archive: zipfile.ZipFile, names: tuple[str, ...], kinds: str
) -> np.ndarray:
    """Return an array of a .npz file: features as float32, other arrays in their own dtype.

    Args:
        names: accepted names; the first one present is used.
        kinds: accepted kinds of numbers, as NumPy's letters.
    """
    there = {info.filename: info for info in archive.infolist()}
    name = next((name for name in names if f"{name}.npy" in there), None)
    if name is None:
        found = ", ".join(sorted(there)[:5]) or "nothing"
        raise DataError(f"{path} has no array {' or '.join(names)}; it holds {found!r}")
    info = there[f"{name}.npy"]
    if info.file_size > _FREE_BYTES + _MAX_EXPANSION * info.compress_size:
        raise DataError(
            f"{path}: {info.file_size:,} bytes of {name} in {info.compress_size:,} compressed are not features"
        )
    size = os.stat(path).st_size
    if info.compress_size > size:
        raise DataError(f"{path} is cut off: {name} needs {info.compress_size:,} bytes")
    with archive.open(info) as stream:
        shape, dtype = _read_header(path, name, stream, kinds)
        num_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
        # The size is checked exactly, because the checksum is verified at the end of the file.
        if stream.tell() + num_bytes != info.file_size:
            raise DataError(
                f"{path}: {name} of {dtype} {list(shape)} does not fit its {info.file_size:,} bytes; write it again"
            )
        return _read_blocks(stream, shape, dtype, np.dtype(np.float32) if kinds == "f" else dtype)


def _read_header(
    path: Path, name: str, stream: IO[bytes], kinds: str
) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and dtype of an array, up to its data; raise DataError."""
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, is_fortran, dtype = read(stream, max_header_size=MAX_HEADER_BYTES)
    except zipfile.BadZipFile:
        raise
    except Exception as error:
        # Besides ValueError, the evaluation of a damaged literal may raise other errors.
        raise DataError(f"{path}: unreadable header of {name} ({first_line(error)})") from None
    if reason := _refusal(name, shape, is_fortran, dtype, kinds):
        raise DataError(f"{path}: {name} {reason}")
    return shape, dtype


def _refusal(
    name: str, shape: tuple[int, ...], is_fortran: bool, dtype: np.dtype, kinds: str
) -> str:
    """Return why an array cannot be read and the remedy; an empty text if it can."""
    if dtype.kind not in kinds and kinds == "f":
        return (
            f"are {dtype} {list(shape)}; write floating-point numbers: {name}.astype(numpy.float32)"
        )
    if dtype.kind not in kinds:
        return f"are {dtype} {list(shape)}; write the numbers of the classes: {name}.astype(int)"
    if not shape:
        return f"are one number of {dtype}; write one row per image"
    if min(shape) < 1:
        return f"of shape {list(shape)} hold no row or no column; write one row per image"
    if is_fortran:
        return f"lie column by column, in Fortran's order; write numpy.ascontiguousarray({name})"
    return ""


def _read_blocks(
    stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, kept: np.dtype
) -> np.ndarray:
    """Return an array's data, converted to ``kept`` block by block, so that the file's precision takes no memory."""
    values = np.empty(shape, kept)
    flat = values.reshape(-1)
    at_once = max(_BLOCK_BYTES // dtype.itemsize, 1)
    for start in range(0, len(flat), at_once):
        number = min(at_once, len(flat) - start)
        data = stream.read(number * dtype.itemsize)
        if len(data) != number * dtype.itemsize:
            raise EOFError("it ends early")
        with np.errstate(over="ignore"):  # infinite values are found below
            flat[start : start + number] = np.frombuffer(data, dtype)
    return values


def _checked(
    path: Path, features_NW: np.ndarray, labels_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return features and labels in their final dtypes; raise DataError if they do not fit."""
    if features_NW.ndim != 2 or features_NW.shape[1] > _MAX_WIDTH:
        raise DataError(f"{path}: features have the shape {list(features_NW.shape)}, not [N, W]")
    if len(labels_N) != len(features_NW):
        raise DataError(
            f"{path}: {len(features_NW):,} rows of features and {len(labels_N):,} labels; write one label a row"
        )
    for start in range(0, len(features_NW), 4096):
        finite_B = np.isfinite(features_NW[start : start + 4096]).all(1)
        if not finite_B.all():
            row = start + int(np.flatnonzero(~finite_B)[0])
            raise DataError(f"{path}: row {row} of features is not finite; compute it again")
    labels_N = _whole_labels(path, labels_N)
    if labels_N.ndim == 2:
        if labels_N.max() > 1 or labels_N.min() < 0:
            raise DataError(f"{path}: rows of labels hold numbers other than 0 and 1")
        return features_NW, labels_N.astype(np.uint8)
    if labels_N.ndim != 1 or labels_N.dtype.kind == "b":
        raise DataError(
            f"{path}: labels are {labels_N.dtype} {list(labels_N.shape)}, not numbers [N]; write labels.astype(int), one an "
            "image"
        )
    if labels_N.min() < 0 or labels_N.max() >= MAX_CLASSES:
        row = int(np.flatnonzero((labels_N < 0) | (labels_N >= MAX_CLASSES))[0])
        raise DataError(
            f"{path}: the label {labels_N[row]} of row {row} is of no class; classes are counted from 0"
        )
    return features_NW, labels_N.astype(np.int64)


def _whole_labels(path: Path, labels_N: np.ndarray) -> np.ndarray:
    """Return integer labels, a single column as [N]; raise DataError for a label that is not an integer, such as 0.5."""
    if labels_N.ndim == 2 and labels_N.shape[1] == 1:
        labels_N = labels_N[:, 0]
    if labels_N.dtype.kind != "f":
        return labels_N
    is_whole = labels_N == np.rint(labels_N)
    if not is_whole.all():
        found = labels_N[~is_whole].flat[0]
        raise DataError(
            f"{path}: the label {found} is not a whole number; write the numbers of the classes: labels.astype(int)"
        )
    return labels_N
