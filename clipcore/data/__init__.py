"""Data: what a pair is, and the two ways in which reading one can fail. The readers are in the files beside this one.

====================  ================================================================
``sources.py``        ``open_source``: from what ``--train-data`` says to a ``PairSource``
``tar.py``            tar shards in the WebDataset layout, through a byte index
``raw.py``            images as ``.npy`` members of pixels
``tables.py``         csv and jsonl tables
``columns.py``        columns of tables, such as those of labels
``caption_lists.py``  tables of captions in text files, Flickr8k's
``parquet.py``        parquet tables, through a copy of their rows
``folders.py``        folders of images
``pictures.py``       pairs by picture, where a table has a row for each caption
``plain_images.py``   images without captions
``embedded.py``       the embedded data sets, by name
``glyphs.py``         the embedded pictures of writing
``icons.py``          the embedded icons
``drawing.py``        drawing both from fonts
``transforms.py``     bytes to images to crops to normalised tensors
``resample.py``       bicubic resizing
``headers.py``        what an image will cost, before a decoder sees it
``order.py``          the order of an epoch and the random numbers of a sample, computed, not stored
``loader.py``         batches
``upload.py``         a batch on its way to the device
``packing.py``        captions in rows without padding
``caption_ids.py``    numbers that tell captions apart
``shards.py``         writing tar shards
``prepare.py``        the command that turns any source into shards that train faster
====================  ================================================================
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

# 77 tokens never need more; cutting before the tokenizer keeps a hostile caption from costing time.
MAX_CAPTION_CHARS = 8192


class DataError(ValueError):
    """Data that cannot be used as asked; the message names the file and the remedy in one line."""


class BadSample(ValueError):
    """One sample that cannot be read; the loader replaces it, counts it and names it.

    Args:
        reason: what is wrong with it.
        key: which sample it is; empty where only the caller knows.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(reason, key)
        self.reason = reason
        self.key = key

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason


class LeftOut:
    """What a source does not hand out, by reason: how often, and the first case of each."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, example: str, number: int = 1) -> None:
        """Count a case of a reason, which is written in the singular."""
        before, first = self._found.get(reason, (0, example))
        self._found[reason] = (before + number, first)

    def update(self, other: LeftOut) -> None:
        """Count all cases of another."""
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
        """Return what ``to_json`` wrote; raise whatever other content raises."""
        left_out = cls()
        for reason, (number, example) in json.loads(text or "{}").items():
            left_out.add(reason, example, number)
        return left_out

    def found(self) -> str:
        """Return the end of a sentence about a source that holds nothing: what is there instead."""
        return f"; found {self}" if self else ""


class WorkerLostError(RuntimeError):
    """A process that reads data is gone; the message says how it ended, and the remedy."""


class Pair(NamedTuple):
    """An image with its caption, or with several of which one is drawn each epoch.

    ``image`` is a PIL image or a uint8 array [H, W] or [H, W, 3]; ``key`` names the sample in messages.
    """

    image: Image.Image | np.ndarray
    caption: str | Sequence[str]
    key: str


class PairSource(Protocol):
    """Image-caption pairs by number: ``source[index]`` returns a ``Pair`` or raises ``BadSample``.

    ``captions(index)`` returns its caption or captions alone, without a look at the image, or raises the same.

    A source is read from several processes at once, so that it must survive ``fork`` and pickling.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def captions(self, index: int) -> str | Sequence[str]: ...


def checked_captions(value: object, key: str) -> str | tuple[str, ...]:
    """The caption or captions of a sample, as text without control characters' harm and of bounded length.

    Args:
        value: bytes of UTF-8, a string, or a list of either.

    Raises:
        BadSample: nothing but white space, no text at all, or bytes of another encoding.
    """
    if isinstance(value, (list, tuple)):
        captions = tuple(text for item in value if (text := _caption(item, key)))
        if not captions:
            raise BadSample("empty caption", key)
        return captions
    if value is not None and not isinstance(value, (str, bytes)):
        raise BadSample(f"the caption is no text but {type(value).__name__}", key)
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
    # Editors begin some files with a byte-order mark. Lone surrogates come from JSON escapes; no tokenizer can encode them.
    text = value.removeprefix("\ufeff").replace("\0", " ").strip()[:MAX_CAPTION_CHARS]
    return text.encode("utf-8", "replace").decode("utf-8")
