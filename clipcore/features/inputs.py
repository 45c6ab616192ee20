"""Opens what is to be encoded: image files, folders of images, and all that holds image-caption pairs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from clipcore.data import BadSample, DataError, PairSource
from clipcore.data.embedded import EMBEDDED
from clipcore.data.folders import holds_image, is_image
from clipcore.data.pictures import by_picture
from clipcore.data.plain_images import ImageFiles
from clipcore.data.sources import MixtureSource, open_source
from clipcore.data.transforms import Decoder
from clipcore.evaluate.retrieval_pairs import fingerprint_of_pairs


class Inputs(NamedTuple):
    """Images or captions to encode.

    Attributes:
        source: the samples in order.
        fingerprint: a hash of their names and of their files' sizes and times, and of captions if they are to be encoded.
    """

    source: PairSource
    fingerprint: str


def open_images(data: Sequence[str], decoder: Decoder, **options: Any) -> Inputs:
    """Return images, each once even if several captions name it.

    A folder with images means all images in it and below it, with or without captions.

    Args:
        data: image files, folders, and what ``open_source`` takes.
        options: of ``open_source``.

    Raises:
        DataError: nothing has that name, or it holds no image.
    """
    parts, paths = list[PairSource](), list[str]()
    for name in data:
        is_folder = os.path.isdir(name)
        if (is_folder and holds_image(name)) or (is_image(name) and not is_folder):
            paths.append(name)
            continue
        # The rows keep the order of the arguments.
        if paths:
            parts.append(ImageFiles(paths, decoder))
            paths = []
        parts.append(_open(name, decoder, options))
    if paths:
        parts.append(ImageFiles(paths, decoder))
    return _joined(parts, [by_picture(part) for part in parts], decoder)


def open_captions(data: Sequence[str], decoder: Decoder, **options: Any) -> Inputs:
    """Return samples with captions; the arguments and the errors are those of ``open_images``."""
    for name in data:
        if is_image(name) and not os.path.isdir(name):
            raise DataError(
                f"{name} is an image without a caption; --text takes data with captions"
            )
    parts = [_open(name, decoder, options) for name in data]
    inputs = _joined(parts, parts, decoder)

    # The files of images say nothing about captions in a table, or in files beside them.
    digest = hashlib.sha256(inputs.fingerprint.encode())
    for index in range(len(inputs.source)):
        try:
            found = repr(inputs.source.captions(index))
        except BadSample as error:
            found = f"unreadable: {error.reason}"
        digest.update(found.encode("utf-8", "surrogateescape"))
    return inputs._replace(fingerprint=digest.hexdigest())


def _open(name: str, decoder: Decoder, options: dict[str, Any]) -> PairSource:
    if name in EMBEDDED:
        return EMBEDDED[name].open("train")
    return open_source(name, max_pixels=decoder.max_pixels, **options)


def _joined(parts: Sequence[PairSource], sources: Sequence[PairSource], decoder: Decoder) -> Inputs:
    """Return several sources as one; the fingerprint is that of ``parts``, which name their files."""
    source = sources[0] if len(sources) == 1 else MixtureSource(sources)
    return Inputs(source, fingerprint_of_pairs(MixtureSource(parts), "", decoder))
