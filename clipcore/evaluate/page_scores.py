"""Renders the sections of the page of results about scores: zero-shot, retrieval, prompts and probes.

Each function takes the data and returns HTML, which is empty if there is no result of its kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from clipcore.evaluate.axes import Point
from clipcore.evaluate.page_data import (
    PageData,
    Score,
    Trace,
    Variant,
    common,
    mean,
    read_prompts,
    read_recalls,
    read_score,
    read_trace,
)
from clipcore.evaluate.page_parts import (
    by_value,
    charts,
    figure,
    first_of,
    folded,
    metric_title,
    mixed,
    model_cell,
    model_entries,
    model_head,
    paragraph,
    score_table,
    section,
    sets,
    strong_best,
    with_total,
)
from clipcore.evaluate.page_values import number, positive, share
from clipcore.evaluate.plots import (
    MOST_PANELS,
    MOST_ROWS,
    difference_chart,
    scatter_chart,
    score_chart,
    trace_chart,
)
from clipcore.evaluate.results import LINEAR_PROBE, PROMPTS, RETRIEVAL, ZERO_SHOT, Result
from clipcore.evaluate.robustness import fit_line
from clipcore.evaluate.svg import INK, MODEL_COLOURS, LegendEntry
from clipcore.number_texts import decimal, percent, signed_points
from clipcore.page_style import table


def zero_shot(data: PageData) -> str:
    """Return the section on zero-shot classification."""
    scores = data.parsed(ZERO_SHOT, read_score)
    if not scores:
        return ""
    return section(
        "Zero-shot classification",
        paragraph("Class names in prompts make the classifier; intervals are of 95%."),
        score_table(data.models, scores),
        _scores_figure("Zero-shot by data set", data, scores),
    )


def _scores_figure(title: str, data: PageData, scores: dict[str, dict[int, Score]]) -> str:
    order = by_value(_values(scores))
    rows = [(name, scores[name]) for name in order[:MOST_ROWS]]
    shown = [score for _, by_model in rows for score in by_model.values()]
    entries = model_entries(data.models, (index for _, by_model in rows for index in by_model))
    if any(score.chance is not None for score in shown):
        first = entries or [LegendEntry("score", MODEL_COLOURS[0], "s")]
        entries = [*first, LegendEntry("chance", INK, "|")]
    return charts(figure(first_of(title, len(order)), score_chart(rows, len(data.models)), entries))


def _values(scores: Mapping[str, Mapping[int, Score]]) -> dict[str, dict[int, float]]:
    return {
        name: {index: score.value for index, score in by_model.items()}
        for name, by_model in scores.items()
    }


def retrieval(data: PageData) -> str:
    """Return the section on retrieval."""
    found = data.parsed(RETRIEVAL, read_recalls)
    if not found:
        return ""
    metrics = list(
        dict.fromkeys(m for by_set in found.values() for r in by_set.values() for m in r)
    )
    metrics.sort(key=lambda metric: (metric.partition("@")[0], int(_rank(metric))))
    rows: list[list[object]] = []
    for name, by_model in found.items():
        columns = [
            strong_best(
                [recalls.get(metric) for recalls in by_model.values()],
                [percent(recalls.get(metric)) for recalls in by_model.values()],
            )
            for metric in metrics
        ]
        for place, index in enumerate(by_model):
            cells = [column[place] for column in columns]
            rows.append([name, *model_cell(data.models, index), *cells])
    head = [metric.replace("_recall", "").replace("_", " ") for metric in metrics]
    return section(
        "Retrieval",
        paragraph(
            "Image retrieval looks for the image of a text, text retrieval for the texts of an image. Recall at k is how "
            "often it is among the k nearest."
        ),
        table(["data set", *model_head(data.models), *head], rows),
    )


def _rank(metric: str) -> str:
    rank = metric.partition("@")[2]
    return rank if rank.isdecimal() and rank.isascii() and len(rank) < 9 else "0"


def prompts(data: PageData) -> str:
    """Return the section on the gain of prompts over bare class names."""
    found = data.parsed(PROMPTS, read_prompts)
    if not found:
        return ""
    titles = list(
        dict.fromkeys(
            v.title for by_model in found.values() for _, vs in by_model.values() for v in vs
        )
    )
    rows: list[list[object]] = []
    gains: dict[str, list[float]] = {title: [] for title in titles}
    shared = set(common(found, len(data.models)))
    for name, by_model in found.items():
        for index, (metric, variants) in by_model.items():
            by_title = {variant.title: variant for variant in variants}
            values = [by_title[t].value if t in by_title else None for t in titles]
            cells = strong_best(values, [_gain(by_title.get(title)) for title in titles])
            rows.append([name, metric_title(metric), *model_cell(data.models, index), *cells])
            for title in titles:
                variant = by_title.get(title)
                if name in shared and variant and variant.gain is not None:
                    gains[title].append(variant.gain)

    means = [mean(values) for values in gains.values()]
    if has_mean := len(shared) > 1:
        num_rows = len(shared) * len(data.models)
        texts = [
            signed_points(value)
            + ("" if len(values) == num_rows else f" ({len(values)} of {num_rows})")
            for value, values in zip(means, gains.values(), strict=True)
        ]
        metrics = [metric for name in found for metric, _ in found[name].values() if name in shared]
        blank = [""] * len(model_head(data.models))
        rows.append([f"mean gain on {sets(len(shared))}", mixed(metrics), *blank, *texts])
    head = ("data set", "metric", *model_head(data.models), *titles)
    return section(
        "What prompts gain",
        paragraph(
            "The same image features, with prompts written in several ways; in brackets, points over bare names."
        ),
        with_total(table(head, rows), has_mean),
    )


def _gain(variant: Variant | None) -> str:
    if variant is None or variant.value is None:
        return "–"
    return f"{percent(variant.value)} ({signed_points(variant.gain)})"


def probe(data: PageData) -> str:
    """Return the section on linear probes, with the search of each one's C."""
    scores = data.parsed(LINEAR_PROBE, read_score)
    if not scores:
        return ""
    parts = [
        paragraph(
            "A linear classifier on the image features, fitted to the training images; intervals are of 95%."
        ),
        score_table(data.models, scores),
        _scores_figure("Linear probe by data set", data, scores),
    ]
    fits: list[list[object]] = []
    for name, by_model in data.results[LINEAR_PROBE].items():
        for index, result in by_model.items():
            fits.append([name, *model_cell(data.models, index), *_fit_cells(result)])
    head = ("data set", *model_head(data.models), "C", "iterations", "gradient", "training images")
    parts.append(folded("How the probes were fitted", table(head, fits)))

    traces = data.parsed(LINEAR_PROBE, read_trace)
    searched = {
        name: {index: trace for index, trace in by_model.items() if len(trace.fits) > 1}
        for name, by_model in traces.items()
    }
    panels: list[tuple[str, Mapping[int, Trace]]] = [(n, t) for n, t in searched.items() if t]
    if panels:
        plot = trace_chart(panels, len(data.models))
        entries = model_entries(data.models, (i for _, by_model in panels for i in by_model))
        title = first_of(
            "The search of C: validation score, %; a ring is the C taken", len(panels), MOST_PANELS
        )
        parts.append(charts(figure(title, plot, entries)))
    return section("Linear probe", *parts)


def _fit_cells(result: Result) -> list[str]:
    details = result.details
    return [
        decimal(positive(details.get("C"))),
        decimal(number(details.get("num_iterations")), ",.0f"),
        decimal(number(details.get("gradient_norm")), ".1e"),
        decimal(number(details.get("num_train")), ",.0f"),
    ]


class _Duel(NamedTuple):
    """A zero-shot score and the same metric of a probe."""

    zero_shot: float
    probe: float
    metric: str

    @property
    def difference(self) -> float:
        return self.zero_shot - self.probe


def versus_probe(data: PageData) -> str:
    """Return the section on zero-shot against a probe of the same features."""
    duels: dict[str, dict[int, _Duel]] = {}
    for name, by_model in data.results.get(ZERO_SHOT, {}).items():
        for index, result in by_model.items():
            other = data.results.get(LINEAR_PROBE, {}).get(name, {}).get(index)
            if other and (duel := _duel(result, other)):
                duels.setdefault(name, {})[index] = duel
    if not duels:
        return ""

    differences = {
        n: {i: d.difference for i, d in by_model.items()} for n, by_model in duels.items()
    }
    order = by_value(differences)
    rows = [(name, differences[name]) for name in order[:MOST_ROWS]]
    marks = [
        Point(duel.probe, duel.zero_shot, index, name if len(data.models) == 1 else "")
        for name in order
        for index, duel in duels[name].items()
    ]
    entries = model_entries(data.models, (mark.model for mark in marks))
    title = first_of("Zero-shot minus probe", len(order))
    bars = difference_chart(rows, len(data.models), "Zero-shot", "probe")
    line = _line(marks) if len(data.models) == 1 else None
    dots = scatter_chart(marks, "linear probe", "zero-shot", line[:2] if line else None)
    return section(
        "Zero-shot against a probe",
        paragraph(
            "Both by the same metric, on the same features. Above zero, the prompts are better than all training labels."
        ),
        _duel_totals(data, duels),
        charts(figure(title, bars, entries), figure("Zero-shot over probe", dots, entries)),
        folded("All differences", _duel_table(data, order, duels)),
    )


def _duel(zero_shot: Result, probe: Result) -> _Duel | None:
    try:
        score = read_score(zero_shot)
    except ValueError:  # counted in the section on zero-shot
        return None
    value = share(probe.metrics.get(f"lp_{score.metric}"))
    return None if value is None else _Duel(score.value, value, score.metric)


def _line(marks: Sequence[Point]) -> tuple[float, float, float] | None:
    """Return slope, intercept and Pearson's r of a line through points; None for fewer than three distinct points."""
    x, y = [mark.x for mark in marks], [mark.y for mark in marks]
    if len(set(x)) < 3:
        return None
    slope, intercept, r2 = fit_line(np.array(x), np.array(y), "scores")
    return slope, intercept, math.copysign(math.sqrt(max(r2, 0.0)), slope)


def _duel_totals(data: PageData, duels: Mapping[str, Mapping[int, _Duel]]) -> str:
    rows = []
    for index, model in enumerate(data.models):
        mine = [by_model[index] for by_model in duels.values() if index in by_model]
        if not mine:
            continue
        line = _line([Point(duel.probe, duel.zero_shot, index) for duel in mine])
        wins = sum(duel.difference > 0 for duel in mine)
        losses = sum(duel.difference < 0 for duel in mine)
        rows.append(
            (
                model.title,
                wins,
                losses,
                len(mine) - wins - losses,
                signed_points(mean(duel.difference for duel in mine)),
                decimal(line[2] if line else None, ".2f"),
                decimal(line[0] if line else None, ".2f"),
                mixed(duel.metric for duel in mine),
            )
        )
    head = ("model", "zero-shot wins", "probe wins", "ties", "mean", "Pearson r", "slope", "metric")
    return table(head, rows)


def _duel_table(
    data: PageData, order: Sequence[str], duels: Mapping[str, Mapping[int, _Duel]]
) -> str:
    rows = [
        (
            name,
            metric_title(duel.metric),
            *model_cell(data.models, index),
            percent(duel.zero_shot),
            percent(duel.probe),
            signed_points(duel.difference),
        )
        for name in order
        for index, duel in duels[name].items()
    ]
    return table(
        ("data set", "metric", *model_head(data.models), "zero-shot", "probe", "difference"), rows
    )
