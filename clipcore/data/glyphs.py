"""``glyphs``: the embedded data set of characters, drawn and captioned with their Unicode names.

Every character of the DejaVu faces that matplotlib ships is drawn by Pillow; its caption is a sentence made from the
character's Unicode name and the face. Nothing is downloaded and nothing is stored: a picture is drawn on first access.

Splits are fixed, by character and by typeface family:

- ``train``: nine tenths of the characters, in the sans and serif families;
- ``unseen``: the other tenth, in the same families: zero-shot classes whose names and shapes were never trained on;
- ``shift``: that tenth in the monospaced family, which is never trained on either: the distribution shift;
- ``seen-shift``: the trained characters in the monospaced family.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ImageFont

from clipcore.data import drawing
from clipcore.data.drawing import DrawnSource, fill, is_held_out, prompts
from clipcore.packages import package_folder

FONT_SIZE = 26  # pixels to the em: the largest at which nearly every character fits the canvas
BASELINE = 25  # row of the baseline, so that height and depth stay visible
SHIFT_FAMILY = "monospaced"

CAPTION_TEMPLATES = (
    "{a_face} glyph of {name}",
    "the character {name} in {face} type",
    "{name}, {face}",
    "{name}",
)
ZERO_SHOT_FACES = ("sans", "bold sans", "italic serif", "bold serif")
ZERO_SHOT_TEMPLATES = prompts(CAPTION_TEMPLATES, ZERO_SHOT_FACES)


@dataclass(frozen=True)
class Face:
    """One font file, with its family and style as captions name them."""

    file: str
    family: str
    style: str

    @property
    def description(self) -> str:
        return f"{self.style} {self.family}".strip()

    @property
    def path(self) -> Path:
        return font_folder() / self.file


FACES = tuple(
    Face(f"{stem}{'-' if suffix else ''}{suffix}.ttf", family, style)
    for stem, family, slanted in (
        ("DejaVuSans", "sans", "Oblique"),
        ("DejaVuSerif", "serif", "Italic"),
        ("DejaVuSansMono", SHIFT_FAMILY, "Oblique"),
    )
    for suffix, style in (
        ("", ""),
        ("Bold", "bold"),
        (slanted, "italic"),
        (f"Bold{slanted}", "bold italic"),
    )
)


def font_folder() -> Path:
    """Return the folder of matplotlib's fonts; matplotlib itself is not imported."""
    folder = package_folder("matplotlib")
    if folder is None:
        raise ModuleNotFoundError(
            "the embedded data needs matplotlib's fonts: pip install matplotlib"
        )
    return folder / "mpl-data" / "fonts" / "ttf"


def is_unseen(character: str) -> bool:
    """Return whether the character belongs to the tenth that is never trained on, by a hash of its code point."""
    return is_held_out(f"glyphs {ord(character)}")


def character_name(character: str) -> str:
    """Return the Unicode name in lower case, or an empty string."""
    return unicodedata.name(character, "").lower()


@lru_cache(maxsize=len(FACES))
def face_characters(face: Face) -> str:
    """Return the named characters of a face that draw at least one pixel, in code-point order."""
    from matplotlib.ft2font import FT2Font

    characters = (chr(code) for code in sorted(FT2Font(str(face.path)).get_charmap()))
    return "".join(c for c in characters if character_name(c) and not _is_blank(c))


# Some characters draw nothing although their category says otherwise (U+1D3D in only one face).
_BLANK = frozenset(
    "\N{BRAILLE PATTERN BLANK}\N{COMBINING GRAPHEME JOINER}\N{OBJECT REPLACEMENT CHARACTER}\u1d3d"
)


def _is_blank(character: str) -> bool:
    return (
        unicodedata.category(character) in ("Zs", "Zl", "Zp", "Cf")
        or unicodedata.name(character).startswith("VARIATION SELECTOR")
        or character in _BLANK
    )


def draw(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Draw a character on the baseline, in black on white: see ``clipcore.data.drawing.draw``."""
    return drawing.draw(character, font, BASELINE)


class GlyphSource(DrawnSource):
    """The pictures of one split: see ``DrawnSource``.

    Args:
        split: one of ``clipcore.data.drawing.SPLITS``.

    Attributes:
        classnames: the names of all trained, or all unseen, characters in code-point order, whatever the family: the
            unseen typeface is tested among the same names as the trained ones.
        labels_N: for each picture the index of its name in ``classnames``.
    """

    font_size = FONT_SIZE

    def __init__(self, split: str = "train") -> None:
        super().__init__("glyphs", split)
        self.samples = [
            (face, character)
            for face in FACES
            if (face.family == SHIFT_FAMILY) == self.wants_shift
            for character in face_characters(face)
            if is_unseen(character) == self.wants_unseen
        ]
        characters = sorted(
            {
                c
                for face in FACES
                for c in face_characters(face)
                if is_unseen(c) == self.wants_unseen
            }
        )
        position = {character: i for i, character in enumerate(characters)}
        self.classnames = [character_name(character) for character in characters]
        self.labels_N = np.array([position[character] for _, character in self.samples])

    def picture(self, index: int) -> np.ndarray:
        """Draw a picture, uint8 [CANVAS, CANVAS]."""
        face, character = self.samples[index]
        return draw(character, self._font(face))

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of a picture."""
        face, character = self.samples[index]
        name = character_name(character)
        return tuple(fill(template, face.description, name) for template in CAPTION_TEMPLATES)

    def style(self, index: int) -> str:
        """Return the style of a picture, in words."""
        face, _ = self.samples[index]
        return face.description

    def key(self, index: int) -> str:
        """Return the name of a picture: its font file and its character."""
        face, character = self.samples[index]
        return f"{face.file}/U+{ord(character):04X}"


def training_captions() -> Sequence[str]:
    """Return one caption for each trained character and template, to train the vocabulary on."""
    source = GlyphSource("train")
    return [
        fill(template, FACES[i % 8].description, name)
        for i, name in enumerate(source.classnames)
        for template in CAPTION_TEMPLATES
    ]
