"""Renders the sections of the page of results about studies, and about overlap with the training data.

Each function takes the data and returns HTML, which is empty if there is no result of its kind.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from clipcore.evaluate.axes import Point
from clipcore.evaluate.model_plots import Law, ShiftPoint, scaling_chart, shift_chart
from clipcore.evaluate.page_data import (
    Neighbour,
    Overlap,
    PageData,
    read_overlap,
)
from clipcore.evaluate.page_models import Model
from clipcore.evaluate.page_parts import (
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
    section,
    sets,
)
from clipcore.evaluate.page_values import count, difference, number, objects, positive, share, shown
from clipcore.evaluate.plots import MOST_ROWS, difference_chart, overlap_chart, scatter_chart
from clipcore.evaluate.results import OVERLAP
from clipcore.evaluate.svg import (
    CARD,
    INK,
    MUTED,
    LegendEntry,
    model_colour,
    model_marker,
    shortened,
)
from clipcore.number_texts import decimal, percent, signed_points
from clipcore.page_style import table

# Limit of all pictures of the page together; the rest are counted.
_MOST_PICTURE_CHARS = 12_000_000
_SIGNIFICANT = 0.05


def compare(data: PageData) -> str:
    """Return the section on the comparison of two folders of results."""
    study = data.studies.get("compare", {})
    first, second = (data.page_models.retitled(shown(study.get(side))) for side in "ab")
    rows = []
    for row in objects(study.get("sets")):
        a, b = share(row.get("a")), share(row.get("b"))
        if a is None or b is None:
            data.left_out.add("comparison without two scores", shown(row.get("dataset")))
        else:
            rows.append((shown(row.get("dataset")), shown(row.get("metric")), a, b))
    if not rows:
        return ""

    rows.sort(key=lambda row: row[3] - row[2])
    a_title, b_title = shortened(first, 40), shortened(second, 40)
    bars = difference_chart(
        [(n, {0: a - b}) for n, _, a, b in rows[:MOST_ROWS]], 1, a_title, b_title
    )
    dots = scatter_chart([Point(b, a, 0, name) for name, _, a, b in rows], second, first)
    interval = study.get("interval")
    ends = [number(end) for end in interval] if isinstance(interval, list) else []
    facts = [f"{key} {count(study.get(key.lower())):,}" for key in ("Wins", "losses", "ties")]
    if (r := number(study.get("pearson"))) is not None:
        facts.append(f"Pearson r {decimal(r, '.2f')}")
    if (slope := number(study.get("slope"))) is not None:
        known = len(ends) == 2 and None not in ends
        within = f" (95%: {decimal(ends[0], '.2f')} to {decimal(ends[1], '.2f')})" if known else ""
        facts.append(f"slope {decimal(slope, '.2f')}{within}")
    cells = [
        (n, metric_title(m), percent(a), percent(b), signed_points(a - b)) for n, m, a, b in rows
    ]
    return section(
        "Comparison",
        paragraph(
            f"{first} against {second}, on {sets(len(rows))} ({mixed(m for _, m, _, _ in rows)})."
        ),
        paragraph("; ".join(facts) + "."),
        charts(
            figure(first_of(f"{a_title} minus {b_title}", len(rows)), bars),
            figure(f"{a_title} over {b_title}", dots),
        ),
        folded("All scores", table(("data set", "metric", a_title, b_title, "difference"), cells)),
    )


def robustness(data: PageData) -> str:
    """Return the section on accuracies under a natural shift."""
    figures, rows = [], []
    models = data.page_models.all
    for pair in objects(data.studies.get("robustness", {}).get("pairs")):
        first, second = shown(pair.get("in")), shown(pair.get("out"))
        marks: list[ShiftPoint] = []
        for row in objects(pair.get("models")):
            x, y, kind = (
                share(row.get("in_accuracy")),
                share(row.get("out_accuracy")),
                row.get("kind"),
            )
            if x is None or y is None:
                data.left_out.add("shift without two accuracies", shown(row.get("model")))
                continue
            if kind == "baseline":
                marks.append(ShiftPoint(x, y, 0, "baseline"))
                continue
            index = data.page_models.place_of(row)
            if index is None:
                data.left_out.add("shift of an unknown model", shown(row.get("model")))
                continue
            marks.append(ShiftPoint(x, y, index, "probe" if kind == "probe" else "zero-shot"))
            rows.append(
                (
                    f"{first} → {second}",
                    models[index].title,
                    marks[-1].kind,
                    percent(x),
                    percent(y),
                    signed_points(difference(row.get("effective"))),
                    percent(number(row.get("gap_closed")), 0),
                    signed_points(difference(row.get("relative"))),
                )
            )
        if marks:
            line = _baseline(pair.get("baseline"))
            plot = shift_chart(marks, line, first, second)
            title = f"{shortened(second, 40)}{_baseline_text(pair.get('baseline'))}"
            figures.append(figure(title, plot, _shift_entries(models, marks, line is not None)))
    if not figures:
        return ""
    head = (
        "shift",
        "model",
        "kind",
        "without",
        "under it",
        "effective robustness",
        "gap closed",
        "relative robustness",
    )
    return section(
        "Natural shift",
        paragraph(
            "Accuracies as logits. Dashed, where it is near the points: equal accuracies; the line is that of the baseline "
            "models. How far a model lies above it is its effective robustness, in points."
        ),
        charts(*figures),
        table(head, rows) if rows else "",
    )


def _baseline(value: object) -> tuple[float, float] | None:
    if not isinstance(value, dict):
        return None
    slope, intercept = number(value.get("slope")), number(value.get("intercept"))
    if slope is None or intercept is None or max(abs(slope), abs(intercept)) > 100:
        return None
    return slope, intercept


def _baseline_text(value: object) -> str:
    line = _baseline(value)
    if line is None or not isinstance(value, dict):
        return ""
    return f": baseline of {count(value.get('num_models')):,} models, r² {decimal(number(value.get('r2')), '.2f')}"


def _shift_entries(
    models: Sequence[Model], marks: Sequence[ShiftPoint], has_line: bool
) -> list[LegendEntry]:
    judged = [mark.model for mark in marks if mark.kind != "baseline"]
    entries = model_entries(models, judged)
    if not entries and judged:
        first = judged[0]
        title = models[first].title
        entries = [LegendEntry(title, model_colour(first), model_marker(first))]
    kinds = {mark.kind for mark in marks}
    if "probe" in kinds:
        entries.append(LegendEntry("hollow: a probe", CARD))
    if "baseline" in kinds:
        entries.append(LegendEntry("baseline models", MUTED))
    if has_line:
        entries.append(LegendEntry("baseline", INK, "-"))
    return entries


def scaling(data: PageData) -> str:
    """Return the section on errors over compute."""
    study = data.studies.get("scaling", {})
    models, marks = data.page_models.all, []
    for row in objects(study.get("models")):
        compute, error = positive(row.get("compute")), positive(row.get("error"))
        if compute is None or error is None or error > 1:
            data.left_out.add("scaling without compute and error", shown(row.get("model")))
        elif (index := data.page_models.place_of(row)) is None:
            data.left_out.add("scaling of an unknown model", shown(row.get("model")))
        else:
            marks.append(Point(compute, error, index))
    if not marks:
        return ""

    metric, unit = shown(study.get("metric")), shown(study.get("unit"))
    prediction = study.get("prediction")
    prediction = prediction if isinstance(prediction, dict) else {}
    law, others = _law(study.get("law")), _law(prediction.get("law"))
    plot = scaling_chart(marks, law, others, unit, metric)
    texts = []
    if law:
        texts.append(f"{_law_text(law, study['law'])}.")
    predicted, actual = share(prediction.get("predicted")), share(prediction.get("actual"))
    if predicted is not None and actual is not None:
        largest = data.page_models.retitled(shown(prediction.get("model")))
        texts.append(
            f"From the others the law predicts {percent(predicted)} of {largest}, which has "
            f"{percent(actual)}."
        )
    marks.sort()
    rows = [(models[mark.model].title, decimal(mark.x, ",.5g"), percent(mark.y)) for mark in marks]
    entries = model_entries(models, (mark.model for mark in marks))
    if law:
        entries.append(LegendEntry("law of all", INK, "-"))
    if others:
        entries.append(LegendEntry("predicted from the others", CARD, "D"))
    return section(
        "Scaling",
        paragraph(" ".join(texts) or f"The {metric} over {unit}."),
        table(("model", unit, metric), rows),
        charts(figure("Error over compute", plot, entries)),
    )


def _law(value: object) -> Law | None:
    if not isinstance(value, dict):
        return None
    factor, exponent = positive(value.get("factor")), number(value.get("exponent"))
    if factor is None or exponent is None or abs(exponent) > 2 or not 1e-9 < factor < 1e9:
        return None
    return Law(factor, exponent)


def _law_text(law: Law, value: Mapping[str, Any]) -> str:
    return (
        f"error = {decimal(law.factor, '.5g')} × compute to the power {decimal(law.exponent, '.4f')}, "
        f"r² {decimal(number(value.get('r2')), '.3f')}, of {count(value.get('num_models')):,} models"
    )


def overlap(data: PageData) -> str:
    """Return the section on evaluation pictures that are among the training pictures."""
    found = data.parsed(OVERLAP, read_overlap)
    if not found:
        return ""
    every = [(name, i, one) for name, by_model in found.items() for i, one in by_model.items()]
    every.sort(key=lambda entry: (-entry[2].contamination, entry[0], entry[1]))
    num_tests = sum(one.p_value is not None for _, _, one in every)
    rows = [
        (
            name,
            *model_cell(data.models, index),
            f"{one.num_overlap:,} of {one.num_images:,}",
            percent(one.contamination),
            f"{decimal(one.threshold, '.4g')} {one.threshold_from}",
            percent(one.score),
            percent(one.clean_score),
            percent(one.overlap_score),
            signed_points(one.gain),
            decimal(None if one.p_value is None else min(1.0, one.p_value * num_tests), ".2g"),
        )
        for name, index, one in every
    ]
    head = ("overlapping", "share", "threshold", "all", "clean", "overlap", "all minus clean", "p")
    parts = [
        paragraph(
            "A picture overlaps where its nearest training picture is nearer than the threshold. Filled marks are "
            f"significant: p, times the number of tests ({num_tests:,}), is below {_SIGNIFICANT:g}. Bars are of 99.5%."
        ),
        table(("data set", *model_head(data.models), *head), rows),
    ]
    if origins := sorted({one.training for _, _, one in every if one.training}):
        parts.append(paragraph(f"Compared with {'; '.join(origins)}."))
    drawn = [entry for entry in every if entry[2].gain is not None]
    if drawn:
        num_sets = len({name for name, _, _ in drawn})
        plot = overlap_chart(drawn, num_sets, num_tests)
        entries = model_entries(data.models, (index for _, index, _ in drawn))
        parts.append(charts(figure("What overlap raises scores by", plot, entries)))
    return section("Overlap with the training data", *parts, *_neighbours(data, every))


def _neighbours(data: PageData, every: Sequence[tuple[str, int, Overlap]]) -> list[str]:
    """Return the pictures of each overlap, up to the page's limit."""
    parts, room, num_missing = [], _MOST_PICTURE_CHARS, 0
    for name, index, one in every:
        cards = []
        for neighbour in sorted(one.neighbours, key=lambda neighbour: -neighbour.cosine):
            size = len(neighbour.picture) + len(neighbour.training_picture)
            if not neighbour.picture or not neighbour.training_picture or size > room:
                num_missing += 1
                continue
            room -= size
            cards.append(_card(neighbour, one.threshold))
        if cards:
            title = ", ".join((f"Nearest pairs of {name}", *model_cell(data.models, index)))
            parts.append(folded(title, f'<div class="neighbours">{"".join(cards)}</div>'))
    if num_missing:
        parts.append(paragraph(f"{num_missing:,} more pairs have no picture here."))
    return parts


def _card(neighbour: Neighbour, threshold: float | None) -> str:
    is_over = threshold is not None and neighbour.cosine >= threshold
    pictures = "".join(
        f'<img src="{uri}" alt="{html.escape(key)}" width="64" height="64">'
        for uri, key in (
            (neighbour.picture, neighbour.key),
            (neighbour.training_picture, neighbour.training_key),
        )
    )
    verdict = ", overlaps" if is_over else ""
    return (
        f'<div class="{"over" if is_over else ""}">{pictures}<br>{neighbour.cosine:.4f}{verdict}<br>'
        f"{html.escape(neighbour.key)}<br>{html.escape(neighbour.training_key)}</div>"
    )
