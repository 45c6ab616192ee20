"""Data: the image-caption pair, the interface of its sources, and the errors of reading.

========================  ================================================================
``sources.py``            ``open_source``: from the value of ``--train-data`` to a ``PairSource``
``tar.py``                tar shards in the WebDataset layout, through a byte index
``random_access.py``      reads local and remote files at any position
``remote.py``             reads objects by URL: states, byte ranges, whole copies, lists
``local_copies.py``       whole local copies of remote objects, within a limit of bytes
``raw.py``                images as ``.npy`` members of pixels
``tables.py``             csv and jsonl tables
``columns.py``            columns of tables, such as those of labels
``caption_lists.py``      tables of captions in text files, such as Flickr8k's
``parquet.py``            parquet tables, through a copy of their rows
``folders.py``            folders of images
``pictures.py``           pairs grouped by image, where a table has one row per caption
``plain_images.py``       images without captions
``embedded.py``           the embedded data sets, by name
``glyphs.py``             the embedded pictures of characters
``icons.py``              the embedded icons
``drawing.py``            draws both from fonts
``transforms.py``         bytes to images to crops to normalised tensors
``resample.py``           bicubic resizing
``headers.py``            the cost of decoding an image, read off its header
``order.py``              the order of an epoch and the random numbers of a sample, computed, not stored
``loader.py``             batches
``upload.py``             copies a batch to the device
``packing.py``            packs captions into rows without padding
``caption_ids.py``        hashes of captions, equal for equal captions
``shards.py``             writes tar shards
``prepare.py``            the command that converts any source into shards that load faster
``prepare_arguments.py``  its flags
``choices.py``            what flags about data offer
========================  ================================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from clipcore.files import not_utf8
from clipcore.terminal import printable

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# 77 tokens never need more. Truncation before the tokenizer bounds the time that a hostile caption can cost.
MAX_CAPTION_CHARS = 8192
# Limit for a decoded picture, checked in its header: the size of 26-megapixel cameras, whose decoding takes 256 MiB.
MAX_PIXELS = 26_000_000


class DataError(ValueError):
    """Data that cannot be used as requested; the message names the file and the remedy in one line."""


class BadSample(ValueError):
    """One sample that cannot be read; the loader replaces it, counts it and names it.

    Args:
        reason: what is wrong with it.
        key: the name of the sample; empty if only the caller knows it.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(reason, key)
        self.reason = reason
        self.key = key

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason


class LeftOut:
    """The items that a source skips, by reason: their number and the first example of each."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, example: str, number: int = 1) -> None:
        """Count one item under a reason, which is written in the singular."""
        before, first = self._found.get(reason, (0, example))
        self._found[reason] = (before + number, first)

    def update(self, other: LeftOut) -> None:
        """Add the counts of another."""
        for reason, (number, example) in other._found.items():
            self.add(reason, example, number)

    def __bool__(self) -> bool:
        return bool(self._found)

    def __str__(self) -> str:
        return "; ".join(
            f"{number:,} x {reason}, such as {printable(example)}"
            for reason, (number, example) in self._found.items()
        )

    def to_json(self) -> str:
        """Return all counts as JSON."""
        return json.dumps(self._found)

    @classmethod
    def from_json(cls, text: bytes) -> LeftOut:
        """Return the counts that ``to_json`` wrote; other content raises any error."""
        left_out = cls()
        for reason, (number, example) in json.loads(text or "{}").items():
            left_out.add(reason, example, number)
        return left_out

    def found(self) -> str:
        """Return the end of a sentence about an empty source, which lists the items that it skips."""
        return f"; found {self}" if self else ""


class WorkerLostError(RuntimeError):
    """A worker process that reads data has died; the message says how, and names the remedy."""


class Pair(NamedTuple):
    """An image with its caption, or with several captions, one of which is drawn each epoch.

    ``image`` is a PIL image or a uint8 array [H, W] or [H, W, 3]; ``key`` names the sample in messages.
    """

    image: Image.Image | np.ndarray
    caption: str | Sequence[str]
    key: str


class PairSource(Protocol):
    """Image-caption pairs by number: ``source[index]`` returns a ``Pair`` or raises ``BadSample``.

    ``captions(index)`` returns only its caption or captions, without reading the image, or raises ``BadSample``.

    Several processes read a source at once, so it must survive ``fork`` and pickling.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def captions(self, index: int) -> str | Sequence[str]: ...


def checked_captions(value: object, key: str) -> str | tuple[str, ...]:
    """Return the caption or captions of a sample, as sanitised text of bounded length.

    Args:
        value: bytes of UTF-8, a string, or a list of either.

    Raises:
        BadSample: only white space, not text, or bytes that are not UTF-8.
    """
    if isinstance(value, (list, tuple)):
        captions = tuple(text for item in value if (text := _caption(item, key)))
        if not captions:
            raise BadSample("empty caption", key)
        return captions
    if value is not None and not isinstance(value, (str, bytes)):
        raise BadSample(f"the caption is not text but {type(value).__name__}", key)
    caption = _caption(value, key)
    if not caption:
        raise BadSample("empty caption", key)
    return caption


def _caption(value: object, key: str) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample(not_utf8("the caption", error), key) from error
    if not isinstance(value, str):
        return ""
    # Some editors begin files with a byte-order mark. JSON escapes can hold lone surrogates, which no tokenizer can encode.
    text = value.removeprefix("\ufeff").replace("\0", " ").strip()[:MAX_CAPTION_CHARS]
    return text.encode("utf-8", "replace").decode("utf-8")
