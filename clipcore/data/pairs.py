"""What every source of data gives: pairs of an image and a caption, by index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

MAX_CAPTION_BYTES = 64 * 1024


class DataError(ValueError):
    """Data that a run cannot use; one line that names the file and the remedy."""


class BadSample(ValueError):
    """One sample that cannot be read; the run replaces and counts it."""


@dataclass(frozen=True)
class Pair:
    """An image with its caption.

    Attributes:
        image: a Pillow image, or uint8 [H, W] or [H, W, 3].
        caption: a sentence, or several of which training picks one.
        key: names the sample in messages.
    """

    image: Image.Image | np.ndarray
    caption: str | tuple[str, ...]
    key: str


class PairSource(Protocol):
    """Pairs by index: the length is known, any pair can be read on its own, and reading again gives the same."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair:
        """Raises BadSample when the pair cannot be read."""


def clean_caption(data: bytes | str, key: str) -> str:
    """A caption as text; raises BadSample when it is empty or no UTF-8."""
    try:
        text = data[:MAX_CAPTION_BYTES].decode() if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise BadSample(f"{key}: the caption is not UTF-8") from error
    if not text.strip():
        raise BadSample(f"{key}: empty caption")
    return text


class StringTable:
    """Many strings as one array of bytes and their ends: no Python objects that workers would copy."""

    def __init__(self, strings: list[str]) -> None:
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._ends[index], self._ends[index + 1]
        return self._bytes[start:end].decode("utf-8", "surrogatepass")
