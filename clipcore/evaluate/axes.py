"""Axes and marks that the plots of results share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from clipcore.evaluate.svg import (
    CARD,
    FONT_SIZE,
    RULE,
    WIDTH,
    model_colour,
    model_marker,
    new_axes,
    shortened,
    width_of,
)
from clipcore.number_texts import decimal

# The font size of text inside a plot.
SMALL = FONT_SIZE - 1.5
_MOST_LETTERS = 26
_MOST_NAMES = 100
_ROW, _TOP = 17.0, 8.0
_LOGIT_TICKS = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    0.95,
    0.98,
    0.99,
    0.995,
    0.998,
    0.999,
)


class Point(NamedTuple):
    """A model's point in a plot; its name is shown if there is room."""

    x: float
    y: float
    model: int
    name: str = ""


def row_axes(names: Sequence[str], num_models: int, bottom: float = 40.0) -> tuple[Axes, list[int]]:
    """Return axes with a name at each row, and the rows' positions, the first on top.

    Args:
        names: the names of the rows.
        num_models: the number of models with marks in a row.
        bottom: the margin for ticks and the axis label, in units of the drawing.
    """
    labels = [shortened(name, _MOST_LETTERS) for name in names]
    left = 8 + min(max(map(width_of, labels)), 0.42 * WIDTH)
    row = max(_ROW, 8 + 7.0 * num_models)
    axes = new_axes(_TOP + bottom + row * len(names), left, 18, _TOP, bottom)
    places = list(range(len(names)))[::-1]
    axes.set_yticks(places, labels=labels)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    if num_models > 1:
        # Lines between the rows, so that their marks are not confused.
        for place in places[:-1]:
            axes.axhline(place - 0.5, color=RULE, linewidth=0.8)
    return axes, places


def offset(model: int, num_models: int) -> float:
    """Return a model's offset above the middle of its row; the first model is on top."""
    return 0.35 - 0.7 * (model + 0.5) / num_models if num_models > 1 else 0.0


def mark(model: int, is_hollow: bool = False) -> dict[str, Any]:
    """Return the arguments of ``plot`` for a model's mark."""
    colour = model_colour(model)
    return {
        "marker": model_marker(model),
        "markersize": 6.5 if is_hollow else 5.5,
        "color": colour,
        "markerfacecolor": CARD if is_hollow else colour,
        "linestyle": "",
    }


def name_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's name beside it, the outermost first, if it covers no other name and no point."""
    places = [axes.transData.transform((point.x, point.y)) for point in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    frame = axes.bbox
    named: set[str] = set()
    order = sorted(range(len(points)), key=lambda i: -abs(points[i].y - points[i].x))
    for i in order[:_MOST_NAMES]:
        name, (x, y) = shortened(points[i].name, 22), places[i]
        width, half = width_of(name) * SMALL / FONT_SIZE, SMALL * 0.6
        for side, left in (("left", x + 6), ("right", x - 6 - width)):
            box = (left, y - half, left + width, y + half)
            is_inside = box[0] > frame.x0 and box[2] < frame.x1
            if name and name not in named and is_inside and not any(_meet(box, t) for t in taken):
                write_beside(axes, points[i].x, points[i].y, name, side == "right", gap=6)
                taken.append(box)
                named.add(name)


def write_beside(
    axes: Axes, x: float, y: float, text: str, is_left: bool = False, gap: float = 4
) -> None:
    """Write a text to the right or left of a position, at a distance in units."""
    axes.annotate(
        text,
        (x, y),
        (-gap if is_left else gap, 0),
        textcoords="offset points",
        ha="right" if is_left else "left",
        va="center",
        fontsize=SMALL,
    )


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def round_ticks(most: int) -> MaxNLocator:
    """Return a locator of about this many ticks, at 1, 2 or 5 times a power of ten."""
    return MaxNLocator(most, steps=[1, 2, 5, 10])


def percentages(axis: Axis) -> None:
    """Write shares as percentages."""
    axis.set_major_locator(round_ticks(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{decimal(100 * value, 'g')}%"))


def logarithmic(axis: Axis, low: float, high: float, text: Callable[[float], str]) -> None:
    """Set the ticks of a logarithmic axis from low to high, at 1, 2 and 5 if few powers of ten fit."""
    decades = math.log10(high / low)
    if decades < 1:
        axis.set_major_locator(round_ticks(5))
    else:
        subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())


def logit(accuracy: float) -> float:
    """Return the logarithm of the odds; 0 and 1 are moved to the nearest value that can be drawn."""
    kept = min(max(accuracy, _LOGIT_TICKS[0] / 2), 1 - _LOGIT_TICKS[0] / 2)
    return math.log(kept / (1 - kept))


def logit_ticks(low: float, high: float) -> list[float]:
    """Return two or more accuracies whose logits lie between two limits, not too near each other."""
    ticks: list[float] = []
    for tick in _LOGIT_TICKS:
        is_apart = not ticks or logit(tick) - logit(ticks[-1]) > (high - low) / 12
        if low <= logit(tick) <= high and is_apart:
            ticks.append(tick)
    if len(ticks) > 1:
        return ticks
    # A short axis is nearly linear, so it gets round numbers between its ends.
    first, last = (1 / (1 + math.exp(-end)) for end in (low, high))
    return [tick for tick in round_ticks(4).tick_values(first, last) if first <= tick <= last]


def padded(low: float, high: float, least: float = 0.02) -> tuple[float, float]:
    """Return limits a little outside two values."""
    pad = max(0.06 * (high - low), least / 2)
    return low - pad, high + pad
