"""Renders matplotlib drawings as reproducible SVG for a page, with the page's fonts and its light and dark colours.

A colour is drawn as on the light page, and written as the style sheet's variable. Names from data are plain text: they are
never interpreted as formulas or tags.
"""

from __future__ import annotations

import contextlib
import html
import io
import itertools
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Width of a drawing in its own units; a phone shows it a fifth smaller, a screen 1.5 times as large.
WIDTH = 400
FONT_SIZE = 10.5
_UNITS_PER_INCH = 72
# Mean width of a letter in the page's fonts, in units; a wide letter, such as a Chinese one, takes twice that.
_LETTER = 6.4

INK, MUTED, RULE, CARD = "#1f2328", "#686e77", "#e4e2dd", "#fefefe"
MODEL_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#aa4499",
    "#b08900",
    "#4c9fe0",
    "#7a5230",
    "#5b4bb5",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    CARD: "var(--card)",
    **{colour: f"var(--{name})" for colour, name in zip(MODEL_COLOURS, "abcdefgh", strict=True)},
}
# An attribute that refers to an element by its name.
_REFERENCE = re.compile(r"^(#|url\(#)(\w+)(?=\)?$)")
# The first four model colours are in the style sheet of all pages.
STYLE = """
:root{--e:#b08900;--f:#4c9fe0;--g:#7a5230;--h:#5b4bb5}@media(prefers-color-scheme:dark){
:root{--e:#e0c04a;--f:#8ab8ff;--g:#c9a07a;--h:#a99bf5}}
.plot{max-width:38rem}.plot svg{stroke-linejoin:round;stroke-linecap:butt}
.legend .mark{width:12px;height:12px}
"""
_MARK_PATHS = {
    "o": "M1 5a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M1.5 1.5h7v7h-7z",
    "^": "M5 1l4 8h-8z",
    "D": "M5 0l5 5l-5 5l-5-5z",
    "v": "M5 9l4-8h-8z",
    "P": "M3.5 1h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",
    "X": "M3 1l2 2l2-2l2 2l-2 2l2 2l-2 2l-2-2l-2 2l-2-2l2-2l-2-2z",
    "p": "M5 .5l4.5 3.3l-1.7 5.2h-5.6l-1.7-5.2z",
    "*": "M5 0l1.2 3.5h3.8l-3 2.3l1.1 3.7l-3.1-2.2l-3.1 2.2l1.1-3.7l-3-2.3h3.8z",
    "-": "M0 4h10v2h-10z",
    "|": "M4 0h2v10h-2z",
}


@dataclass(frozen=True)
class Plot:
    """A drawing, and one sentence that describes it."""

    figure: Figure
    description: str


@dataclass(frozen=True)
class LegendEntry:
    """The meaning of a colour and a marker."""

    name: str
    colour: str
    marker: str = "o"


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Set matplotlib's settings for the page, whatever the user's are; create and write figures in the enclosed code."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The reader's browser has fonts for letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "clipcore",
                "text.parse_math": False,
                "font.size": FONT_SIZE,
                "axes.edgecolor": RULE,
                "axes.labelcolor": INK,
                "axes.facecolor": "none",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.grid": True,
                "grid.color": RULE,
                "text.color": INK,
                "xtick.color": RULE,
                "xtick.labelcolor": INK,
                "ytick.color": RULE,
                "ytick.labelcolor": INK,
            }
        )
        yield


def new_figure(height: float) -> Figure:
    """Return a figure; its height is in units of the drawing."""
    return Figure(
        figsize=(WIDTH / _UNITS_PER_INCH, height / _UNITS_PER_INCH),
        dpi=_UNITS_PER_INCH,
        facecolor="none",
    )


def new_axes(
    height: float, left: float = 48, right: float = 18, top: float = 10, bottom: float = 40
) -> Axes:
    """Return the axes of a new figure; its height and its margins are in units of the drawing."""
    width = WIDTH - left - right
    place = (left / WIDTH, bottom / height, width / WIDTH, (height - top - bottom) / height)
    return new_figure(height).add_axes(place)


def plot_of(axes: Axes, description: str) -> Plot:
    """Return the drawing of an axes object."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    return Plot(figure, description)


def model_colour(index: int) -> str:
    """Return the colour of the model with that index."""
    return MODEL_COLOURS[index % len(MODEL_COLOURS)]


def model_marker(index: int) -> str:
    """Return the marker of the model with that index; with its colour it is one of 64 combinations."""
    return MARKERS[(index + index // len(MODEL_COLOURS)) % len(MARKERS)]


def shortened(text: str, most: int) -> str:
    """Return a text of at most this many letters; a longer one keeps its beginning and end."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"


def width_of(text: str) -> float:
    """Return the approximate width of a text in a drawing, in units."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return _LETTER * (len(text) + wide)


def to_svg(plot: Plot) -> str:
    """Return a drawing as an element of the page; call it within ``drawing``."""
    buffer = io.BytesIO()
    FigureCanvasSVG(plot.figure).print_svg(buffer, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _strip(root)

    # Drawings of one page must not use the same name for different elements.
    prefix = f"p{zlib.crc32(ElementTree.tostring(root)):08x}"
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, prefix + value)
            else:
                element.set(key, _REFERENCE.sub(rf"\g<1>{prefix}\g<2>", value))

    content = ElementTree.tostring(root, encoding="unicode")
    inside = content[content.index(">") + 1 :]
    height = round(plot.figure.get_size_inches()[1] * _UNITS_PER_INCH)
    label = html.escape(plot.description)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{inside}'


def _strip(root: ElementTree.Element) -> None:
    """Remove the parts that a page does not need, and replace the colours by the page's."""
    for child in [child for child in root if child.tag.endswith("metadata")]:
        root.remove(child)
    for parent in list(root.iter()):
        # It would apply to the whole page.
        for child in [child for child in parent if child.tag.endswith("}style")]:
            parent.remove(child)

    values = itertools.chain.from_iterable(element.attrib.values() for element in root.iter())
    names = {match[2] for value in values if (match := _REFERENCE.match(value))}

    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        if element.tag != "text":
            element.text = None
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            key = key.rpartition("}")[2]
            if key == "id" and value not in names:
                continue
            element.set(key, _style(value) if key == "style" else _round(key, value))


def _style(value: str) -> str:
    value = re.sub(r"font-family: [^;]*;? ?", "", value)
    return re.sub(r"#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), value)


def _round(key: str, value: str) -> str:
    if key not in ("d", "x", "y", "width", "height", "transform", "points"):
        return value
    # A hundredth of a unit is too small to see.
    rounded = re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", value)
    return re.sub(r"\s+", " ", rounded).strip()


def legend(entries: Sequence[LegendEntry]) -> str:
    """Return the legend of colours and markers; empty for a single entry."""
    if len(entries) < 2:
        return ""
    items = "".join(
        f'<li><svg class="mark" viewBox="0 0 10 10" aria-hidden="true"><path d="{_MARK_PATHS[entry.marker]}" '
        f'style="{_mark_style(entry.colour)}"/></svg>{html.escape(entry.name)}</li>'
        for entry in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _mark_style(colour: str) -> str:
    # A hollow mark is filled with the colour of the card.
    line = "stroke:var(--ink);stroke-width:1" if colour == CARD else "stroke:none"
    return f"{line};fill:{_VARIABLES.get(colour, colour)}"
