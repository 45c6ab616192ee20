"""Reads labels in tar shards and their images' positions, once, and keeps them beside the shard.

``KEY.cls`` holds the number of a class, ``KEY.npy`` 0 or 1 for each class. The index is that of images and captions
(``clipcore.data.tar``) with the labels instead of captions: ``<shard>.clipcore-labels-cls`` or ``-npy``, in the user's
cache folder if the shard's is not writable. It is valid for one size and modification time of the shard.

Legend: N images, C classes.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from clipcore.data import BadSample, DataError, LeftOut, printable
from clipcore.data.random_access import open_at, state_of
from clipcore.data.raw import MAX_HEADER_BYTES, decode_array
from clipcore.data.remote import BLOCK_BYTES
from clipcore.data.tar import (
    IMAGE_SUFFIXES,
    OTHER_IMAGE_SUFFIXES,
    LabelIndex,
    Member,
    ShardIndex,
    load_index,
    made_index,
    scan_members,
    split_name,
)

NAMES_FILE = "classnames.txt"
CLASS_SUFFIX, ROW_SUFFIX = "cls", "npy"
MAX_WORD_BYTES = 64  # limit of a file that holds a number or a word
_MAX_LABEL_BYTES = 1 << 28  # limit of all labels of a multi-label split


def members_of(path: str, left_out: LeftOut | None = None) -> Iterator[Member]:
    """Yield the members of a shard; raise DataError."""
    try:
        yield from scan_members(path, left_out)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from None


def load_labels(
    paths: Sequence[str], label_suffix: str, num_classes: int
) -> tuple[list[ShardIndex], np.ndarray]:
    """Return the positions of shards' images, and their labels: classes, int64 [N], or 0 and 1, uint8 [N, C].

    Args:
        label_suffix: ``CLASS_SUFFIX`` or ``ROW_SUFFIX``.
        num_classes: C.

    Raises:
        DataError: a shard cannot be read, holds a member twice or an invalid label, or the labels take too much memory.
    """
    is_row = label_suffix == ROW_SUFFIX
    kind = LabelIndex(
        suffix=f".clipcore-labels-{label_suffix}",
        bytes_a_label=num_classes if is_row else 8,
        build=lambda path: _index_labels(path, label_suffix, num_classes),
    )
    shards, content, num_images = list[ShardIndex](), bytearray(), 0
    for path in paths:
        shard = load_index(path, kind)
        num_images += len(shard)
        if is_row:
            _check_memory(path, num_images, num_classes)
        else:
            _check_classes(shard, num_classes)
        content += shard.labels
        # All labels are one array.
        shards.append(replace(shard, labels=b""))

    if not is_row:
        return shards, np.frombuffer(content, np.int64)
    labels_NC = np.frombuffer(content, np.uint8).reshape(num_images, num_classes)
    # A saved index may lie in a shared folder: numbers other than 0 and 1 would change scores silently.
    return shards, np.minimum(labels_NC, 1, out=labels_NC)


def load_numbers(paths: Sequence[str], num_columns: int) -> tuple[list[ShardIndex], np.ndarray]:
    """Return the positions of shards' images, and the integers in each image's ``KEY.npy``, int64 [N, M].

    Args:
        num_columns: M, the number of integers per image.

    Raises:
        DataError: see ``load_labels``; or a member does not hold M integers.
    """

    def numbers_of(data: bytes, shown: str, _: int) -> bytes:
        return _numbers_of(data, shown, num_columns)

    # Each number takes as much memory as eight classes of a row.
    num_bytes = np.dtype(np.int64).itemsize * num_columns
    kind = LabelIndex(
        suffix=".clipcore-labels-numbers",
        bytes_a_label=num_bytes,
        build=lambda path: _index_labels(path, ROW_SUFFIX, num_bytes, numbers_of),
    )
    shards, content = list[ShardIndex](), bytearray()
    for path in paths:
        shard = load_index(path, kind)
        # A saved index may lie in a shared folder: a negative number would index names from the end.
        wrong = np.flatnonzero(np.frombuffer(shard.labels, np.int64) < 0)
        if len(wrong):
            shown = _shown(path, shard.key(int(wrong[0]) // num_columns))
            raise DataError(
                f"{shown}: its kept numbers are damaged; remove the files that end in {kind.suffix}"
            )
        content += shard.labels
        _check_memory(path, len(content) // num_bytes, num_bytes)
        shards.append(replace(shard, labels=b""))
    return shards, np.frombuffer(content, np.int64).reshape(-1, num_columns)


def _check_memory(path: str, num_images: int, num_classes: int) -> None:
    if num_images * num_classes > _MAX_LABEL_BYTES:
        raise DataError(
            f"{path}: labels of {num_images:,} images in {num_classes:,} classes take too much memory; write fewer"
        )


def _check_classes(shard: ShardIndex, num_classes: int) -> None:
    """Raise DataError for a class without a name."""
    labels_N = np.frombuffer(shard.labels, np.int64)
    wrong = np.flatnonzero((labels_N < 0) | (labels_N >= num_classes))
    if len(wrong):
        raise DataError(
            f"{_shown(shard.path, shard.key(int(wrong[0])))}: its class is {labels_N[wrong[0]]}, and {NAMES_FILE} names "
            f"{num_classes}, 0 to {num_classes - 1}; write the name of each class, or correct the label"
        )


def _index_labels(
    path: str,
    label_suffix: str,
    num_classes: int,
    read_row: Callable[[bytes, str, int], bytes] | None = None,
) -> ShardIndex:
    """Return the positions of a shard's images and labels, and the labels; raise as ``load_labels`` does.

    Args:
        read_row: turns the bytes of a ``.npy`` into one byte per class [0 or 1 for each].
    """
    state = state_of(path)
    left_out = LeftOut()
    samples = _samples_of(path, label_suffix, left_out)
    pairs = list[tuple[str, Member, Member]]()
    for key, members in samples.items():
        label = members.pop(label_suffix, None)
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if image is None and label is not None:
            left_out.add("label without an image", label.name)
        elif image is not None and label is None:
            left_out.add(f"image without a label in .{label_suffix}", image.name)
        elif image is not None and label is not None:
            pairs.append((key, image, label))
            if len(members) > 1:
                left_out.add("further picture of a sample", key)

    is_row = label_suffix == ROW_SUFFIX
    if is_row:
        _check_memory(path, len(pairs), num_classes)
    limit = MAX_HEADER_BYTES + 8 * num_classes if is_row else MAX_WORD_BYTES
    columns, keys, labels, checksums = array("q"), bytearray(), bytearray(), array("q")
    with open_at(path, ahead=BLOCK_BYTES) as file:
        for key, image, label in pairs:
            if label.size > limit:
                raise DataError(
                    f"{_shown(path, key)}: a label of {label.size:,} bytes is too long; write the shard again"
                )
            data, shown = file.read_at(label.size, label.offset), _shown(path, key)
            row_of = read_row or _row_of
            labels += row_of(data, shown, num_classes) if is_row else _class_of(data, shown)
            keys += printable(key).encode("utf-8", "replace")
            columns.extend((image.offset, image.size, label.offset, label.size, 0, len(keys)))
            checksums.extend((image.checksum, label.checksum))
    return made_index(path, state, columns, keys, left_out, checksums, bytes(labels))


def _samples_of(path: str, label_suffix: str, left_out: LeftOut) -> dict[str, dict[str, Member]]:
    """Return the images and labels of each sample of a shard by their suffixes; raise DataError."""
    samples = dict[str, dict[str, Member]]()
    for member in members_of(path, left_out):
        if (parts := split_name(member.name)) is None:
            continue
        # "shot 1.5 mm.jpg" is an image too, whose key has a dot.
        stem, _, suffix = parts[1].rpartition(".")
        key, suffix = f"{parts[0]}.{stem}" if stem else parts[0], suffix.lower()
        if suffix in OTHER_IMAGE_SUFFIXES:
            left_out.add("picture of another kind", member.name)
        elif suffix == label_suffix or suffix in IMAGE_SUFFIXES:
            members = samples.setdefault(key, {})
            if suffix in members:
                shown = printable(member.name)
                raise DataError(f"{path} holds {shown!r} twice; write the shard again")
            members[suffix] = member
    return samples


def _shown(path: str, key: str) -> str:
    """Return a sample's name for messages, the same as for its features."""
    return f"{os.path.basename(path)}/{printable(key)}"


def _class_of(data: bytes, shown: str) -> bytes:
    """Return the number of a class as the bytes of an int64; raise DataError for another content."""
    match = re.fullmatch(rb"\s*(-?[0-9]{1,18})\s*", data)
    if match is None:
        text = printable(data.decode("utf-8", "replace"))
        raise DataError(
            f"{shown}: its class is {text!r}, and KEY.cls holds a number; write the shard again"
        )
    return np.int64(int(match[1])).tobytes()


def _row_of(data: bytes, shown: str, num_classes: int) -> bytes:
    """Return a 0 or 1 for each class, uint8 [C]; raise DataError for another content."""
    try:
        row = decode_array(data)
    except BadSample as error:
        raise DataError(f"{shown}: its label is {error.reason}") from None
    if row.shape != (num_classes,):
        raise DataError(
            f"{shown}: its label has the shape {list(row.shape)}, and {NAMES_FILE} names {num_classes} classes; write a 0 "
            "or 1 for each"
        )
    if not np.isin(row, (0, 1)).all():
        raise DataError(
            f"{shown}: its label holds numbers other than 0 and 1; write the shard again"
        )
    return row.astype(np.uint8).tobytes()


def _numbers_of(data: bytes, shown: str, num_columns: int) -> bytes:
    """Return M integers from 0 on, int64 [M]; raise DataError for another content."""
    try:
        row = decode_array(data)
    except BadSample as error:
        raise DataError(f"{shown}: its numbers are {error.reason}") from None
    if row.shape != (num_columns,):
        raise DataError(
            f"{shown}: its numbers have the shape {list(row.shape)}, and {num_columns} are read; write the shard again"
        )
    with np.errstate(invalid="ignore"):
        numbers = row.astype(np.int64)
    if not (numbers == row).all() or numbers.min() < 0:
        raise DataError(
            f"{shown}: its numbers are {printable(str(row.tolist()))}, and must be whole numbers from 0; write it again"
        )
    return numbers.tobytes()
