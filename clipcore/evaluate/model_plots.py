"""The plots of the page of results whose marks are models: scaling and natural shift; called within ``svg.drawing``.

Source: Radford et al. 2021, the figures that the functions name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from clipcore.evaluate.axes import Point, logarithmic, logit, logit_ticks, mark, padded
from clipcore.evaluate.plots import models_text
from clipcore.evaluate.svg import CARD, INK, MUTED, Plot, model_colour, new_axes, plot_of, shortened
from clipcore.number_texts import decimal, short


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


def scaling_chart(
    points: Sequence[Point], law: Law | None, others: Law | None, unit: str, metric: str
) -> Plot:
    """Draw errors over compute, logarithmically (figure 9); the dashed law without the largest model ends at a diamond."""
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
        f"{metric} of {models_text(len({p.model for p in points}))} over {unit}, from {max(p.y for p in points):.1%} to "
        f"{min(p.y for p in points):.1%}{fit}.",
    )


def shift_chart(
    points: Sequence[ShiftPoint], baseline: tuple[float, float] | None, first: str, second: str
) -> Plot:
    """Draw accuracies with a shift over those without, as logits (figure 13); arrows show the effective robustness."""
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

    # The models of the baseline are drawn behind the others.
    for point, x, y, end in sorted(
        zip(points, xs, ys, ends, strict=True), key=lambda p: p[0].kind != "baseline"
    ):
        if point.kind == "baseline":
            axes.plot(x, y, marker="o", markersize=3.5, color=MUTED, linestyle="")
            continue
        # A shorter arrow would consist only of its head.
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
    """Return the limits of a shift plot's vertical axis, and whether the line of equal accuracies is within them."""
    low, high = padded(min(ys), max(ys), least=0.4)
    whole_low, whole_high = padded(min(*ys, *xs), max(*ys, *xs), least=0.4)
    # If a shift costs much accuracy, that line is far from the points. The plot includes it only if the points then keep a
    # third of the height, as in the paper's figure.
    if whole_high - whole_low <= 3 * (high - low):
        return whole_low, whole_high, True
    return low, high, high > min(xs) and low < max(xs)


def _shift_counts(points: Sequence[ShiftPoint], baseline: tuple[float, float] | None) -> str:
    """Return in words the number of models in a shift plot, and of points above the baseline."""
    judged = [point for point in points if point.kind != "baseline"]
    num_baseline = len(points) - len(judged)
    parts = [models_text(len({point.model for point in judged}))] if judged else []
    if num_baseline:
        parts.append(f"{num_baseline} baseline model{'s' if num_baseline > 1 else ''}")
    counts = " and ".join(parts)
    if baseline is None:
        return counts
    num_above = sum(point.out_accuracy > _expected(point, baseline) for point in judged)
    return f"{counts}; {num_above} of {len(judged)} points lie above the baseline"


def _error(law: Law, compute: float) -> float:
    return float(law.factor * compute**law.exponent)


def _expected(point: ShiftPoint, baseline: tuple[float, float]) -> float:
    """Return the accuracy under the shift for a model on the baseline."""
    odds = baseline[0] * logit(point.in_accuracy) + baseline[1]
    # Beyond this limit the exponential would overflow.
    return 1 / (1 + math.exp(-min(max(odds, -700.0), 700.0)))
