"""The plots of the page of results, one function each; all are called within ``svg.drawing``.

A row is a data set. A plot of rows shows bars for one model, and a mark for each of several models. Shares are from 0 to 1,
and drawn as percentages.

Source: Radford et al. 2021, the figures that the functions name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from clipcore.evaluate.axes import (
    SMALL,
    Point,
    mark,
    name_points,
    offset,
    padded,
    percentages,
    round_ticks,
    row_axes,
    write_beside,
)
from clipcore.evaluate.page_data import FewShot, Overlap, Score, Trace
from clipcore.evaluate.svg import (
    CARD,
    INK,
    MODEL_COLOURS,
    MUTED,
    WIDTH,
    Plot,
    model_colour,
    model_marker,
    new_axes,
    new_figure,
    plot_of,
    shortened,
)
from clipcore.number_texts import percent, short, signed_points

# Largest number of rows in a plot; a table has all of them.
MOST_ROWS = 100
MOST_PANELS = 48
_PANELS_PER_ROW = 3
_LOWER_COLOUR = MODEL_COLOURS[1]


class Curve(NamedTuple):
    """A model's few-shot scores as means over data sets; ``sets`` are the data sets' own curves."""

    model: int
    shots: tuple[int, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...] | None
    zero_shot: float | None
    sets: tuple[tuple[float, ...], ...]


def score_chart(rows: Sequence[tuple[str, Mapping[int, Score]]], num_models: int) -> Plot:
    """Draw scores with their intervals, and the chance level as a tick."""
    axes, places = row_axes([name for name, _ in rows], num_models, bottom=24)
    highest = 0.0
    for y, (_, scores) in zip(places, rows, strict=True):
        for model, score in scores.items():
            low, high = score.interval or (score.value, score.value)
            highest = max(highest, high, score.chance or 0.0)
            at = y + offset(model, num_models)
            if num_models == 1:
                axes.barh(at, score.value, height=0.62, color=model_colour(0))
                write_beside(axes, high, at, percent(score.value))
            else:
                axes.plot(score.value, at, **mark(model))
            if score.interval:
                colour = INK if num_models == 1 else model_colour(model)
                axes.plot([low, high], [at, at], color=colour, linewidth=1)
            if score.chance is not None:
                half = 0.4 / num_models if num_models > 1 else 0.4
                axes.plot([score.chance] * 2, [at - half, at + half], color=INK, linewidth=1.8)
    axes.set_xlim(0, max(highest, 0.01) * (1.16 if num_models == 1 else 1.04))
    percentages(axes.xaxis)

    best = [(max(score.value for score in scores.values()), name) for name, scores in rows]
    (top, top_name), (bottom, bottom_name) = max(best), min(best)
    least = f"from {bottom:.1%} on {bottom_name} to " if len(rows) > 1 else ""
    return plot_of(
        axes,
        f"Scores of {_models_in(rows)} on {_sets(len(rows))}, {least}{top:.1%} on {top_name}.",
    )


def difference_chart(
    rows: Sequence[tuple[str, Mapping[int, float]]], num_models: int, first: str, second: str
) -> Plot:
    """Draw differences of two scores by data set (figures 5 and 8); they are positive if the first one is higher."""
    axes, places = row_axes([name for name, _ in rows], num_models)
    axes.axvline(0, color=MUTED, linewidth=1)
    values = [value for _, by_model in rows for value in by_model.values()]
    for y, (_, by_model) in zip(places, rows, strict=True):
        for model, value in by_model.items():
            at = y + offset(model, num_models)
            if num_models > 1:
                axes.plot(value, at, **mark(model))
                continue
            colour = model_colour(0) if value >= 0 else _LOWER_COLOUR
            axes.barh(at, value, height=0.62, color=colour)
            write_beside(axes, value, at, signed_points(value), is_left=value < 0)
    low, high = min(0.0, *values), max(0.0, *values)
    pad = max(high - low, 0.01) * (0.22 if num_models == 1 else 0.05)
    axes.set_xlim(low - pad, high + pad)
    axes.xaxis.set_major_locator(round_ticks(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: signed_points(value, "g")))
    axes.set_xlabel("points")

    wins = sum(value > 0 for value in values)
    return plot_of(
        axes,
        f"{first} minus {second}: {wins} of {len(values)} differences on {_sets(len(rows))} are "
        f"above zero; they go from {signed_points(min(values))} to {signed_points(max(values))} points.",
    )


def few_shot_chart(curves: Sequence[Curve], num_sets: int) -> Plot:
    """Draw few-shot curves over the logarithm of the number of images, with zero-shot as a star at 0 (figure 6)."""
    axes = new_axes(260)
    shots = curves[0].shots
    places = [math.log2(number / shots[0]) + 1 for number in shots]
    for curve in curves:
        colour = model_colour(curve.model)
        if len(curves) == 1 and num_sets > 1:
            for scores in curve.sets[:MOST_ROWS]:
                axes.plot(places, scores, color=MUTED, linewidth=0.7, alpha=0.45)
        if curve.deviations:
            pairs = list(zip(curve.means, curve.deviations, strict=True))
            axes.fill_between(
                places,
                [value - deviation for value, deviation in pairs],
                [value + deviation for value, deviation in pairs],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
        axes.plot(
            places,
            curve.means,
            color=colour,
            linewidth=1.8,
            marker=model_marker(curve.model),
            markersize=5,
        )
        if curve.zero_shot is not None:
            axes.plot(0, curve.zero_shot, marker="*", markersize=12, color=colour, clip_on=False)
            axes.axhline(curve.zero_shot, color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(-0.25, places[-1] + 0.25)
    axes.set_xticks([0, *places], labels=["0", *map(str, shots)])
    axes.set_xlabel("labelled images a class")
    percentages(axes.yaxis)

    found = (
        f"from {100 * curve.means[0]:.1f} to {100 * curve.means[-1]:.1f}%"
        + ("" if curve.zero_shot is None else f" (zero-shot {curve.zero_shot:.1%})")
        for curve in curves[:3]
    )
    return plot_of(
        axes,
        f"Mean score over {_sets(num_sets)} of probes of {shots[0]} to {shots[-1]} images a class, "
        f"{models_text(len(curves))}: {'; '.join(found)}.",
    )


def labels_chart(rows: Sequence[tuple[str, Mapping[int, FewShot]]], num_models: int) -> Plot:
    """Draw the images per class that reach the zero-shot score (figure 7); a triangle means more than were tried."""
    axes, places = row_axes([name for name, _ in rows], num_models)
    numbers = [found.labels for _, by_model in rows for found in by_model.values() if found.labels]
    tried = max(found.shots[-1] for _, by_model in rows for found in by_model.values())
    left = min(0.5, *numbers) / 1.2 if numbers else 0.4
    right = max(2.0 * tried, *numbers) if numbers else 2.0 * tried
    for y, (_, by_model) in zip(places, rows, strict=True):
        for model, found in by_model.items():
            at, colour = y + offset(model, num_models), model_colour(model)
            end = found.labels or (right if found.labels_text.startswith(">") else left * 1.1)
            if num_models == 1:
                axes.barh(at, end - left, left=left, height=0.62, color=colour)
                write_beside(axes, end, at, found.labels_text)
            elif found.labels or not found.labels_text.startswith(">"):
                axes.plot(end, at, **mark(model))
            else:
                axes.plot(end, at, marker=">", markersize=6, color=colour, linestyle="")
    axes.set_xscale("log", base=2)
    axes.set_xlim(left, right * (right / left) ** (0.22 if num_models == 1 else 0.04))
    ticks = [2.0**i for i in range(math.ceil(math.log2(left)), math.floor(math.log2(right)) + 1)]
    ticks = ticks[:: 1 + len(ticks) // 7]
    axes.set_xticks(ticks, labels=[f"{tick:,.4g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("labelled images a class")

    spread = f", from {min(numbers):.1f} to {max(numbers):.1f}" if numbers else ""
    return plot_of(
        axes,
        f"Labelled images a class with which a probe reaches the zero-shot score of {_models_in(rows)}, "
        f"on {_sets(len(rows))}{spread}.",
    )


def scatter_chart(
    points: Sequence[Point], first: str, second: str, line: tuple[float, float] | None = None
) -> Plot:
    """Draw one score of each data set over another (figure 8), with y = x dashed and a fitted line."""
    axes = new_axes(330, left=60)
    values = [value for point in points for value in (point.x, point.y)]
    low, high = padded(min(values), max(values))
    axes.plot([low, high], [low, high], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    if line:
        ends = [line[0] * x + line[1] for x in (low, high)]
        axes.plot([low, high], ends, color=INK, linewidth=1)
    for point in points:
        axes.plot(point.x, point.y, **mark(point.model))
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    percentages(axes.xaxis)
    percentages(axes.yaxis)
    axes.set_xlabel(shortened(first, 50))
    axes.set_ylabel(shortened(second, 40))
    name_points(axes, points)

    above = sum(point.y > point.x for point in points)
    return plot_of(
        axes,
        f"{second} over {first}: {above} of {len(points)} points lie above the line of equal scores.",
    )


def overlap_chart(rows: Sequence[tuple[str, int, Overlap]], num_sets: int, num_tests: int) -> Plot:
    """Draw the gain by overlap over the share of overlapping pictures (figure 17); filled marks are significant."""
    axes = new_axes(280, left=60)
    axes.axhline(0, color=MUTED, linewidth=1)
    points = []
    for name, model, overlap in rows:
        gain = overlap.gain
        if gain is None:
            continue
        if overlap.gain_interval:
            ends = list(overlap.gain_interval)
            axes.plot([overlap.contamination] * 2, ends, color=model_colour(model), linewidth=1)
        p_value = overlap.p_value
        is_sure = p_value is not None and p_value * num_tests < 0.05
        axes.plot(overlap.contamination, gain, **mark(model, is_hollow=not is_sure))
        points.append(Point(overlap.contamination, gain, model, name))
    axes.set_xlim(0, max(max(point.x for point in points), 0.005) * 1.15)
    axes.margins(y=0.12)
    percentages(axes.xaxis)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: signed_points(value, "g")))
    axes.set_xlabel("overlapping pictures")
    axes.set_ylabel("all minus clean, points")
    name_points(axes, points)

    most = max(points, key=lambda point: point.x)
    return plot_of(
        axes,
        f"Share of overlapping pictures on {_sets(num_sets)}, at most {most.x:.1%} on {most.name}, and what they raise "
        f"the score by, at most {signed_points(max(point.y for point in points))} points.",
    )


def trace_chart(panels: Sequence[tuple[str, Mapping[int, Trace]]], num_models: int) -> Plot:
    """Draw the scores of all C in a probe's search, with a panel per data set; a ring marks the chosen C."""
    shown = panels[:MOST_PANELS]
    per_row = min(len(shown), _PANELS_PER_ROW)
    num_lines = math.ceil(len(shown) / per_row)
    across, up, gap = WIDTH / per_row, 112.0, 8.0
    height = up * num_lines
    figure = new_figure(height)
    for place, (name, traces) in enumerate(shown):
        line, column = divmod(place, per_row)
        left, bottom = across * column + 30, height - up * (line + 1) + 22
        box = (left / WIDTH, bottom / height, (across - 30 - gap) / WIDTH, (up - 22 - 20) / height)
        axes = figure.add_axes(box)
        axes.set_title(shortened(name, 19), fontsize=SMALL, loc="left", pad=3)
        for model, trace in traces.items():
            fits = sorted(trace.fits)
            Cs, scores = [C for C, _ in fits], [score for _, score in fits]
            axes.plot(Cs, scores, color=model_colour(model), linewidth=1, marker=".", markersize=4)
            if trace.C in Cs:
                axes.plot(
                    trace.C,
                    scores[Cs.index(trace.C)],
                    marker="o",
                    markersize=6,
                    color=model_colour(model),
                    markerfacecolor=CARD,
                )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(round_ticks(3))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
        axes.tick_params(labelsize=SMALL - 1)
    return Plot(
        figure,
        f"Validation score in percent over C, of each fit of the search, {_models_in(shown)} on {_sets(len(shown))}.",
    )


def models_text(number: int) -> str:
    return "one model" if number == 1 else f"{number} models"


def _models_in(rows: Iterable[tuple[str, Mapping[int, object]]]) -> str:
    """Return in words how many of the page's models rows or panels show."""
    return models_text(len({model for _, by_model in rows for model in by_model}))


def _sets(number: int) -> str:
    return "one data set" if number == 1 else f"{number} data sets"
