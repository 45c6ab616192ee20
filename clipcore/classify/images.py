"""Finds the images to classify in files and folders, and reads them one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from clipcore.classify.labels import as_compared
from clipcore.data import BadSample, LeftOut
from clipcore.data.folders import images_below
from clipcore.data.tables import decode_bytes
from clipcore.data.tar import MAX_IMAGE_BYTES
from clipcore.data.transforms import MAX_PIXELS, Decoder, ImageTransform, was_transparent
from clipcore.files import is_folder, read_regular


def read_image(path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the decoded image of a file.

    Raises:
        ValueError: the file cannot be read, is no image, or has more than ``max_pixels``.
    """
    try:
        data = read_regular(path, MAX_IMAGE_BYTES + 1)
        return decode_bytes(data, "", Decoder(max_pixels=max_pixels))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except BadSample as error:
        raise ValueError(f"{path} is no readable image: {error}") from error


class Input(NamedTuple):
    """An image to classify.

    Attributes:
        inner: the image's place below the folder that was given, None where the image itself was.
        own: index of the label that its folder is named as, -1 where none is.
    """

    path: str
    inner: str | None
    own: int


def find_images(
    given: Sequence[str], index_of: Mapping[str, int], left_out: LeftOut
) -> Iterator[Input]:
    """Yield the images at the given paths, and those below the given folders, in order.

    Args:
        index_of: index of each label, by its name as ``as_compared`` returns it.
        left_out: counts the files in the folders that are not yielded.
    """
    for path in given:
        where = os.path.abspath(path)
        if not is_folder(Path(path)):
            yield Input(path, None, _own_label(where, 1, index_of))
            continue
        for inner in images_below(path, left_out):
            # The folder itself may be a class, or one between it and the image.
            num_folders = inner.count(os.sep) + 1
            own = _own_label(os.path.join(where, inner), num_folders, index_of)
            yield Input(os.path.join(path, inner), inner, own)


def _own_label(path: str, num_folders: int, index_of: Mapping[str, int]) -> int:
    """Return the index of the label that an image's nearest folder is named as, among the innermost; -1 for none."""
    for _ in range(num_folders):
        path = os.path.dirname(path)
        name = as_compared(os.path.basename(path).replace("_", " "))
        if name in index_of:
            return index_of[name]
    return -1


class Readable(NamedTuple):
    """An image that could be read; ``picture`` is what the model takes."""

    path: str
    own: int
    picture: Tensor
    is_transparent: bool


def read_all(
    images: Iterable[Input],
    transform: ImageTransform,
    max_pixels: int,
    left_out: LeftOut,
    progress: Callable[[int], None],
) -> Iterator[Readable]:
    """Yield the readable images, transformed; raise ValueError for an unreadable one that was named.

    Args:
        left_out: counts the images of folders that cannot be read.
        progress: is called with 1 before each image.
    """
    for path, inner, own in images:
        progress(1)
        try:
            picture = read_image(path, max_pixels)
            try:
                prepared = transform(picture)
            except BadSample as error:
                raise ValueError(f"{path} is no usable image: {error}") from error
        except ValueError as error:
            if inner is None:
                raise
            left_out.add("image that cannot be read", str(error))
            continue
        yield Readable(path, own, prepared, was_transparent(picture))
