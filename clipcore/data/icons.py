"""``icons``: the second embedded data set, the icons of qtawesome's fonts with their names.

Every icon is drawn by Pillow; its caption is a sentence made from its name, its family and its style. The fonts come with
the package qtawesome, which is not imported, and neither is Qt. Nothing else is downloaded or stored.

An icon's name is the one in the font's table, split into words and without those that name its style: ``home``,
``home-outline`` and ``home-variant`` are three pictures of the class "home".

Splits are fixed, by name and by family:

- ``train``: nine tenths of the names, in the families material, phosphor and remix;
- ``unseen``: the other tenth, in the same families: zero-shot classes that were never trained on;
- ``shift``: the names of that tenth in the families awesome, codicon and elusive, which are never trained on either: the
  distribution shift;
- ``seen-shift``: the trained names in the families that are not.

Legend: N pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ImageFont

from clipcore.data import DataError, drawing
from clipcore.data.drawing import CANVAS, DrawnSource, fill, is_held_out, prompts
from clipcore.files import read_regular
from clipcore.packages import package_folder

FONT_SIZE = 32  # pixels to the em, which most icons fill: as large as the crop of an evaluation
_MAX_TABLE_BYTES = 4 << 20  # the largest table is 0.3 MB

CAPTION_TEMPLATES = ("{a_face} icon of {name}", "{name}, {face}", "{name}")
ZERO_SHOT_FACES = ("material", "outline material", "phosphor", "filled remix")
ZERO_SHOT_TEMPLATES = prompts(CAPTION_TEMPLATES, ZERO_SHOT_FACES)


@dataclass(frozen=True)
class Family:
    """The icons of one font.

    Attributes:
        name: its name in captions.
        stem: how the names of its files begin; a version follows.
        styles: words at the end of a name that name the icon's style, and the style's name in captions.
        is_shift: whether it is never trained on.
    """

    name: str
    stem: str
    styles: tuple[tuple[str, str], ...]
    is_shift: bool = False

    @property
    def path(self) -> Path:
        """The font file."""
        return _find_file(f"{self.stem}-[0-9]*.ttf")


FAMILIES = (
    Family(
        "material",
        "materialdesignicons6-webfont",
        (
            ("outline", "outline"),
            ("variant", "variant"),
            ("bold", "bold"),
            ("thick", "thick"),
            ("thin", "thin"),
        ),
    ),
    Family(
        "phosphor",
        "phosphor",
        (("fill", "filled"), ("bold", "bold"), ("light", "light"), ("thin", "thin")),
    ),
    Family("remix", "remixicon", (("fill", "filled"), ("line", "outline"))),
    Family("awesome", "fontawesome6-solid-webfont", (), is_shift=True),
    Family("codicon", "codicon", (("filled", "filled"), ("outline", "outline")), is_shift=True),
    Family("elusive", "elusiveicons-webfont", (("alt", "alternate"),), is_shift=True),
)

# A word that looks like a style but is the name: the button that makes text bold.
_NOT_STYLED = frozenset({"format-bold"})
# Icons that draw nothing.
_BLANK = frozenset({("codicon", "blank")})


class Icon(NamedTuple):
    """One picture: its family, its name and style in words, and the character that draws it."""

    family: Family
    name: str
    style: str
    character: str

    @property
    def description(self) -> str:
        """The icon's style, as captions name it."""
        return f"{self.style} {self.family.name}".strip()


def font_folder() -> Path:
    """Return the folder of qtawesome's fonts; the package itself is not imported.

    Raises:
        DataError: it is not installed.
    """
    folder = package_folder("qtawesome")
    if folder is None:
        raise DataError("the icons need qtawesome's fonts: pip install 'clipcore[icons]'")
    return folder / "fonts"


def _find_file(pattern: str) -> Path:
    """Return the newest of qtawesome's files that match a pattern; raise DataError."""
    folder = font_folder()
    if not (paths := sorted(folder.glob(pattern))):
        raise DataError(
            f"{folder} has no {pattern}, as qtawesome 1.4 has: pip install --force-reinstall 'qtawesome==1.4.*'"
        )
    return paths[-1]


def split_style(family: Family, icon: str) -> tuple[str, str]:
    """Return an icon's name and its style, in words.

    >>> split_style(FAMILIES[0], "home-variant-outline")
    ('home', 'variant outline')
    """
    words, styles = icon.split("-"), dict(family.styles)
    end = len(words)
    while end > 1 and words[end - 1] in styles and icon not in _NOT_STYLED:
        end -= 1
    return " ".join(words[:end]), " ".join(styles[word] for word in words[end:])


def is_unseen(name: str) -> bool:
    """Return whether a name belongs to the tenth that is never trained on.

    A hash of its sorted words decides: "circle arrow right" is on the same side as "arrow right circle".
    """
    return is_held_out(f"icons {' '.join(sorted(name.split()))}")


@lru_cache(maxsize=len(FAMILIES))
def family_icons(family: Family) -> tuple[Icon, ...]:
    """Return the icons of a family that draw something, in the order of their characters, without duplicates.

    An icon with several names gets the first one that a trained family has too, or else the first one.

    Raises:
        DataError: the package is not installed, or its files are damaged.
    """
    names_of: dict[str, list[tuple[str, str]]] = {}
    for icon, character in _read_table(family).items():
        if (family.name, icon) not in _BLANK:
            names_of.setdefault(character, []).append(split_style(family, icon))

    known = _trained_families_names() if family.is_shift else frozenset()
    icons = []
    for character, names in sorted(names_of.items()):
        name, style = next((names for names in names if names[0] in known), names[0])
        icons.append(Icon(family, name, style, character))
    return tuple(icons)


@lru_cache(maxsize=1)
def _trained_families_names() -> frozenset[str]:
    """Return the names of all icons in the trained families, including the held-out names."""
    return frozenset(
        icon.name for family in FAMILIES if not family.is_shift for icon in family_icons(family)
    )


def _read_table(family: Family) -> dict[str, str]:
    """Return the characters of a family's icons by name; raise DataError."""
    path = _find_file(f"{family.stem}-charmap-[0-9]*.json")
    try:
        table = json.loads(read_regular(path, _MAX_TABLE_BYTES))
        return {str(icon): chr(int(code, 16)) for icon, code in table.items()}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{path} is not a table of icons: pip install --force-reinstall 'qtawesome==1.4.*'"
        ) from error


class IconSource(DrawnSource):
    """The pictures of one split: see ``DrawnSource``.

    Args:
        split: one of ``clipcore.data.drawing.SPLITS``.

    Attributes:
        classnames: all trained names, or all unseen names, in alphabetical order and of every family: new families are
            tested among the same names as the trained ones. Some unseen names have pictures in only one of the two.
        labels_N: for each picture the index of its name in ``classnames``.

    Raises:
        DataError: see ``family_icons``.
    """

    font_size = FONT_SIZE

    def __init__(self, split: str = "train") -> None:
        super().__init__("icons", split)
        icons = [icon for family in FAMILIES for icon in family_icons(family)]
        if self.wants_unseen:
            names = {icon.name for icon in icons if is_unseen(icon.name)}
        else:
            # A name that only the new families have was not trained on, although its hash allows it.
            names = {name for name in _trained_families_names() if not is_unseen(name)}
        self.classnames = sorted(names)
        self.samples = [
            icon
            for icon in icons
            if icon.family.is_shift == self.wants_shift and icon.name in names
        ]
        position = {name: i for i, name in enumerate(self.classnames)}
        self.labels_N = np.array([position[icon.name] for icon in self.samples])

    def picture(self, index: int) -> np.ndarray:
        """Draw a picture, uint8 [CANVAS, CANVAS]."""
        icon = self.samples[index]
        return draw(icon.character, self._font(icon.family))

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of a picture."""
        icon = self.samples[index]
        return tuple(fill(template, icon.description, icon.name) for template in CAPTION_TEMPLATES)

    def style(self, index: int) -> str:
        """Return the style of a picture, in words."""
        return self.samples[index].description

    def key(self, index: int) -> str:
        """Return the name of a picture: its family and its character."""
        icon = self.samples[index]
        return f"{icon.family.name}/U+{ord(icon.character):04X}"


def draw(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Draw an icon in black on white, the font's line in the middle of the canvas: uint8 [CANVAS, CANVAS]."""
    ascent, descent = font.getmetrics()
    return drawing.draw(character, font, baseline=(CANVAS - ascent - descent) // 2 + ascent)


def training_captions() -> Sequence[str]:
    """Return the captions of all trained icons, without duplicates, to train the vocabulary on."""
    source = IconSource("train")
    return list(dict.fromkeys(c for i in range(len(source)) for c in source.captions(i)))
