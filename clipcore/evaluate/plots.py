"""The plots of the page of results, one function each; all are called within ``svg.drawing``.

A row is a data set. A plot of rows has bars where there is one model, and a mark for each where there are several. Shares
are from 0 to 1, and drawn as percentages.

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
    logarithmic,
    logit,
    logit_ticks,
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
from clipcore.number_texts import decimal, percent, short, signed_points

# Rows of one plot; a table has all of them.
MOST_ROWS = 100
MOST_PANELS = 48
_PANELS_PER_ROW = 3
_LOWER_COLOUR = MODEL_COLOURS[1]


class Curve(NamedTuple):
    """A model's few-shot scores as means over data sets; ``sets`` are the curves that they are the means of."""

    model: int
    shots: tuple[int, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...] | None
    zero_shot: float | None
    sets: tuple[tuple[float, ...], ...]


class ShiftPoint(NamedTuple):
    """A model's accuracy without and with a shift; ``kind`` is "zero-shot", "probe" or "baseline"."""

    in_accuracy: float
    out_accuracy: float
    model: int
    kind: str


class Law(NamedTuple):
    """error = factor * compute ** exponent."""

    factor: float
    exponent: float


def score_chart(rows: Sequence[tuple[str, Mapping[int, Score]]], num_models: int) -> Plot:
    """Draw scores with their intervals, and chance as a tick."""
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
    """Draw differences of two scores by data set (figures 5 and 8), which are positive where the first one is higher."""
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
        f"{_models(len(curves))}: {'; '.join(found)}.",
    )


def labels_chart(rows: Sequence[tuple[str, Mapping[int, FewShot]]], num_models: int) -> Plot:
    """Draw how many images a class reach the zero-shot score (figure 7); a triangle says more than were tried."""
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
    """Draw one score of each data set over another (figure 8), with y = x dashed, and a line of slope and intercept."""
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


def scaling_chart(
    points: Sequence[Point], law: Law | None, others: Law | None, unit: str, metric: str
) -> Plot:
    """Draw errors over compute, both as logarithms (figure 9); the dashed law of all but the largest ends at a diamond."""
    axes = new_axes(270, left=60)
    xs, errors = [point.x for point in points], [point.y for point in points]
    largest = max(xs)
    for each, style in ((law, "-"), (others, (0, (4, 3)))):
        if each:
            line = [_error(each, x) for x in (min(xs), largest)]
            colour = INK if each is law else MUTED
            axes.plot([min(xs), largest], line, color=colour, linewidth=1.1, linestyle=style)
            errors += line
    if others:
        predicted = _error(others, largest)
        axes.plot(largest, predicted, marker="D", markersize=8, color=CARD, markeredgecolor=INK)
    for point in points:
        axes.plot(point.x, point.y, **mark(point.model))
    axes.set_xscale("log")
    axes.set_yscale("log")
    logarithmic(axes.xaxis, min(xs), largest, short)
    logarithmic(axes.yaxis, min(errors), max(errors), lambda value: f"{100 * value:g}%")
    axes.set_xlim(min(xs) / 1.3, largest * 1.3)
    axes.set_ylim(min(errors) / 1.06, max(errors) * 1.06)
    axes.set_xlabel(shortened(unit, 50))
    axes.set_ylabel(shortened(metric, 36))

    fit = f"; the law falls with compute to the power {decimal(law.exponent, '.3f')}" if law else ""
    return plot_of(
        axes,
        f"{metric} of {_models(len(points))} over {unit}, from {max(p.y for p in points):.1%} to "
        f"{min(p.y for p in points):.1%}{fit}.",
    )


def shift_chart(
    points: Sequence[ShiftPoint], baseline: tuple[float, float] | None, first: str, second: str
) -> Plot:
    """Draw accuracies under a shift over those without it, as logits (figure 13); arrows are the effective robustness."""
    axes = new_axes(340, left=60)
    xs, ys = [logit(p.in_accuracy) for p in points], [logit(p.out_accuracy) for p in points]
    ends = [
        logit(_expected(p, baseline)) if baseline else y for p, y in zip(points, ys, strict=True)
    ]
    x_low, x_high = padded(min(xs), max(xs), least=0.4)
    y_low, y_high, has_diagonal = _shift_limits(xs, [*ys, *ends])
    axes.plot([x_low, x_high], [x_low, x_high], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    if baseline:
        line = [baseline[0] * x + baseline[1] for x in (x_low, x_high)]
        axes.plot([x_low, x_high], line, color=INK, linewidth=1)

    # What the line is fitted to lies behind.
    for point, x, y, end in sorted(
        zip(points, xs, ys, ends, strict=True), key=lambda p: p[0].kind != "baseline"
    ):
        if point.kind == "baseline":
            axes.plot(x, y, marker="o", markersize=3.5, color=MUTED, linestyle="")
            continue
        # A shorter arrow would be all head.
        if abs(y - end) > 0.03 * (y_high - y_low):
            arrow = {"arrowstyle": "->", "color": model_colour(point.model), "linewidth": 0.9}
            axes.annotate("", (x, y), (x, end), arrowprops=arrow)
        axes.plot(x, y, **mark(point.model, is_hollow=point.kind == "probe"))
    axes.set_xlim(x_low, x_high)
    axes.set_ylim(y_low, y_high)
    for axis, low, high in ((axes.xaxis, x_low, x_high), (axes.yaxis, y_low, y_high)):
        ticks = logit_ticks(low, high)
        axis.set_ticks([logit(tick) for tick in ticks], labels=[f"{100 * t:g}%" for t in ticks])
    axes.set_xlabel(shortened(first, 50))
    axes.set_ylabel(shortened(second, 40))

    return plot_of(
        axes,
        f"Accuracy on {second} over that on {first}, {_shift_counts(points, baseline)}"
        + ("" if has_diagonal else "; the line of equal accuracies is outside of the plot")
        + ".",
    )


def _shift_limits(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, bool]:
    """Return the limits of the upright axis of a shift, and whether the line of equal accuracies is within them."""
    low, high = padded(min(ys), max(ys), least=0.4)
    whole_low, whole_high = padded(min(*ys, *xs), max(*ys, *xs), least=0.4)
    # A shift that costs much puts that line far away. The plot is about the points: it has the line where they keep a third
    # of the height, as in the paper's figure, and not where they would lie in a corner.
    if whole_high - whole_low <= 3 * (high - low):
        return whole_low, whole_high, True
    return low, high, high > min(xs) and low < max(xs)


def _shift_counts(points: Sequence[ShiftPoint], baseline: tuple[float, float] | None) -> str:
    """Return in words how many models a plot of a shift shows, and how many points lie above the baseline."""
    judged = [point for point in points if point.kind != "baseline"]
    num_baseline = len(points) - len(judged)
    parts = [_models(len({point.model for point in judged}))] if judged else []
    if num_baseline:
        parts.append(f"{num_baseline} baseline model{'s' if num_baseline > 1 else ''}")
    counts = " and ".join(parts)
    if baseline is None:
        return counts
    num_above = sum(point.out_accuracy > _expected(point, baseline) for point in judged)
    return f"{counts}; {num_above} of {len(judged)} points lie above the baseline"


def overlap_chart(rows: Sequence[tuple[str, int, Overlap]], num_sets: int, num_tests: int) -> Plot:
    """Draw what overlap raises scores by, over the share of overlapping pictures (figure 17); filled is significant."""
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
    """Draw the scores of all C that a probe's search fitted, a panel a data set; a ring is the C that was taken."""
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


def _models(number: int) -> str:
    return "one model" if number == 1 else f"{number} models"


def _models_in(rows: Iterable[tuple[str, Mapping[int, object]]]) -> str:
    """Return how many models rows or panels show, of all that the page has."""
    return _models(len({model for _, by_model in rows for model in by_model}))


def _sets(number: int) -> str:
    return "one data set" if number == 1 else f"{number} data sets"


def _error(law: Law, compute: float) -> float:
    return float(law.factor * compute**law.exponent)


def _expected(point: ShiftPoint, baseline: tuple[float, float]) -> float:
    """Return the accuracy under the shift of a model on the baseline."""
    odds = baseline[0] * logit(point.in_accuracy) + baseline[1]
    # Beyond, the exponential would overflow.
    return 1 / (1 + math.exp(-min(max(odds, -700.0), 700.0)))
