"""Pictures drawn from the characters of fonts: code that the embedded data sets share.

Legend: N pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clipcore.data import Pair

CANVAS = 36  # pixels: the size of a picture before the random crop
SPLITS = ("train", "unseen", "shift", "seen-shift")


class FontFile(Protocol):
    """An object with a font file."""

    @property
    def path(self) -> Path: ...


def fill(template: str, face: str, name: str) -> str:
    """Return a caption; the face has its article if the template contains ``{a_face}``."""
    article = "an" if face[0] in "aeiou" else "a"
    return template.format(a_face=f"{article} {face}", face=face, name=name)


def prompts(templates: Sequence[str], faces: Sequence[str]) -> tuple[str, ...]:
    """Return the zero-shot prompts, with {} for the name: each template with each face, without duplicates."""
    return tuple(
        dict.fromkeys(fill(template, face, "{}") for template in templates for face in faces)
    )


def is_held_out(text: str) -> bool:
    """Return whether a hash of the text puts it into the tenth that is never trained on."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def draw(character: str, font: ImageFont.FreeTypeFont, baseline: int) -> np.ndarray:
    """Draw a character in black on a white canvas, shrunk if it is too large.

    Args:
        baseline: the row of the baseline, so that height and depth stay visible; a character that would be cut off is moved.

    Returns:
        uint8 [CANVAS, CANVAS].
    """
    image = Image.new("L", (CANVAS, CANVAS), 255)
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = pen.textbbox((0, 0), character, font=font, anchor="ls")
    room = CANVAS - 2
    if (size := max(right - left, bottom - top)) > room:
        font = font.font_variant(size=int(font.size * room / size))
        left, top, right, bottom = pen.textbbox((0, 0), character, font=font, anchor="ls")
    x = (CANVAS - left - right) // 2
    y = min(max(baseline, 1 - top), CANVAS - 1 - bottom)
    pen.text((x, y), character, fill=0, font=font, anchor="ls")
    return np.asarray(image)


class SomePictures:
    """Some pictures of a split, map-style: see ``clipcore.data.PairSource``.

    Args:
        source: the whole split.
        rows_N: the indices of the pictures in the split, int64 [N].
    """

    def __init__(self, source: DrawnSource, rows_N: np.ndarray) -> None:
        self.name, self.source, self.rows_N = source.name, source, rows_N

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, index: int) -> Pair:
        return self.source[int(self.rows_N[index])]

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions of a picture."""
        return self.source.captions(int(self.rows_N[index]))

    def key(self, index: int) -> str:
        """Return the name of a picture."""
        return self.source.key(int(self.rows_N[index]))


class DrawnSource:
    """The pictures of one split, map-style and drawn on first access: see ``clipcore.data.PairSource``.

    A subclass sets ``classnames`` and ``labels_N``, and defines the number of pictures and the drawing, captions, style and
    key of each.

    Args:
        dataset: name of the data set.
        split: one of ``SPLITS``.

    Attributes:
        wants_unseen: whether the split holds names that are never trained on.
        wants_shift: whether it holds families that are never trained on.
        classnames: the names of the classes.
        labels_N: for each picture the index of its name in ``classnames``.
    """

    font_size: int  # pixels to the em
    classnames: list[str]
    labels_N: np.ndarray

    def __init__(self, dataset: str, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"the splits of {dataset} are {', '.join(SPLITS)}; got {split!r}")
        self.name = f"{dataset}/{split}"
        self.wants_unseen, self.wants_shift = split in ("unseen", "shift"), split.endswith("shift")
        self._fonts: dict[FontFile, ImageFont.FreeTypeFont] = {}
        self._pairs: dict[int, Pair] = {}

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> Pair:
        if (pair := self._pairs.get(index)) is None:
            pair = Pair(self.picture(index), self.captions(index), self.key(index))
            self._pairs[index] = pair
        return pair

    def picture(self, index: int) -> np.ndarray:
        """Draw a picture, uint8 [CANVAS, CANVAS]."""
        raise NotImplementedError

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions of a picture."""
        raise NotImplementedError

    def style(self, index: int) -> str:
        """Return how a picture is drawn, in words, such as "bold sans"."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """Return the name of a picture: its font file and its character."""
        raise NotImplementedError

    def _font(self, file: FontFile) -> ImageFont.FreeTypeFont:
        if file not in self._fonts:
            self._fonts[file] = ImageFont.truetype(
                str(file.path), self.font_size, layout_engine=ImageFont.Layout.BASIC
            )
        return self._fonts[file]
