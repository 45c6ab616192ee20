"""Renders the section of the page of results about few-shot probes and labels per class."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from clipcore.evaluate.page_data import (
    FewShot,
    PageData,
    common,
    read_few_shot,
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
    section,
    sets,
)
from clipcore.evaluate.plots import (
    MOST_ROWS,
    Curve,
    few_shot_chart,
    labels_chart,
)
from clipcore.evaluate.results import FEW_SHOT
from clipcore.evaluate.svg import MODEL_COLOURS, LegendEntry
from clipcore.number_texts import percent
from clipcore.page_style import table


def few_shot(data: PageData) -> str:
    """Return the section on few-shot probes and on labels per class."""
    found = data.parsed(FEW_SHOT, read_few_shot)
    if not found:
        return ""
    shared = common(found, len(data.models))
    entries = model_entries(data.models, (i for by_model in found.values() for i in by_model))
    figures = []
    if curves := _curves(found, shared, len(data.models)):
        star = [LegendEntry("zero-shot", MODEL_COLOURS[0], "*")] if len(data.models) == 1 else []
        probes = entries or [LegendEntry("mean of probes", MODEL_COLOURS[0])]
        title = f"Few-shot: mean of {sets(len(shared))}"
        figures.append(figure(title, few_shot_chart(curves, len(shared)), [*probes, *star]))
    labelled = {
        name: {i: few for i, few in by_model.items() if few.labels or few.labels_text[:1] in "<>"}
        for name, by_model in found.items()
    }
    rows = [(name, labelled[name]) for name in _by_labels(labelled)]
    if rows:
        plot = labels_chart(rows[:MOST_ROWS], len(data.models))
        figures.append(
            figure(first_of("Labels per class that match zero-shot", len(rows)), plot, entries)
        )

    never = any(
        few.labels_text.startswith(">") for _, by_model in rows for few in by_model.values()
    )
    beyond = "A label count at the right edge is more than were tried." if never else ""
    metrics = mixed(found[name][0].metric for name in shared)
    what = f"The curve is the mean of {sets(len(shared))} ({metrics}); its band, one deviation over seeds. "
    return section(
        "Few-shot",
        paragraph((what if curves else "") + "Zero-shot stands at no image. " + beyond),
        charts(*figures),
        _labels_totals(data, found),
        folded("All few-shot scores", _few_shot_table(data, found)),
    )


def _curves(
    found: Mapping[str, Mapping[int, FewShot]], shared: Sequence[str], num_models: int
) -> list[Curve]:
    """Return each model's curve over the data sets and the numbers of images that all models have."""
    if not shared:
        return []
    tried = [set(found[name][index].shots) for name in shared for index in range(num_models)]
    shots = tuple(sorted(set.intersection(*tried)))
    return (
        [
            _curve(index, [found[name][index] for name in shared], shots)
            for index in range(num_models)
        ]
        if shots
        else []
    )


def _curve(index: int, probes: Sequence[FewShot], shots: tuple[int, ...]) -> Curve:
    # For each number of images, the scores of its seeds on each data set.
    rows = [[probe.scores[probe.shots.index(number)] for probe in probes] for number in shots]
    num_seeds = min(len(scores) for row in rows for scores in row)
    deviations = None
    if num_seeds > 1:
        deviations = tuple(
            statistics.stdev(
                statistics.fmean(scores[seed] for scores in row) for seed in range(num_seeds)
            )
            for row in rows
        )
    by_shot = [[statistics.fmean(scores) for scores in row] for row in rows]
    zero_shots = [probe.zero_shot for probe in probes if probe.zero_shot is not None]
    return Curve(
        model=index,
        shots=shots,
        means=tuple(statistics.fmean(row) for row in by_shot),
        deviations=deviations,
        zero_shot=statistics.fmean(zero_shots) if len(zero_shots) == len(probes) else None,
        sets=tuple(zip(*by_shot, strict=True)),
    )


def _by_labels(labelled: Mapping[str, Mapping[int, FewShot]]) -> list[str]:
    """Return the data sets with labels per class, the one with the most first."""
    numbers = {
        # As in the plot: by their logarithms, with infinite ones at the edge.
        name: {i: math.log2(1 + min(_number_of_labels(few), 1e4)) for i, few in by_model.items()}
        for name, by_model in labelled.items()
        if by_model
    }
    return by_value(numbers)


def _number_of_labels(few: FewShot) -> float:
    """Return the number of labels per class; infinity if more are needed than were tried."""
    return few.labels or (math.inf if few.labels_text.startswith(">") else 0.0)


def _labels_totals(data: PageData, found: Mapping[str, Mapping[int, FewShot]]) -> str:
    rows = []
    for index, model in enumerate(data.models):
        mine = [by_model[index] for by_model in found.values() if index in by_model]
        numbers = [_number_of_labels(few) for few in mine if few.labels_text != "–"]
        if not numbers:
            continue
        never = sum(map(math.isinf, numbers))
        rows.append(
            (
                model.title,
                f"{len(numbers):,}",
                _labels_text(statistics.median(numbers)),
                _labels_text(statistics.fmean(numbers)),
                _labels_text(max(numbers)),
                f"{never:,}",
            )
        )
    head = ("model", "data sets", "median labels a class", "mean", "most", "more than were tried")
    return table(head, rows) if rows else ""


def _labels_text(value: float) -> str:
    return "more than were tried" if math.isinf(value) else f"{value:,.1f}"


def _few_shot_table(data: PageData, found: Mapping[str, Mapping[int, FewShot]]) -> str:
    shots = sorted(
        {n for by_model in found.values() for few in by_model.values() for n in few.shots}
    )
    rows = []
    for name, by_model in found.items():
        for index, few in by_model.items():
            means = dict(zip(few.shots, few.means, strict=True))
            rows.append(
                (
                    name,
                    metric_title(few.metric),
                    *model_cell(data.models, index),
                    percent(few.zero_shot),
                    *(percent(means.get(number)) for number in shots),
                    percent(few.full),
                    few.labels_text,
                )
            )
    columns = ("zero-shot", *(f"{n} a class" for n in shots), "all", "labels a class")
    return table(("data set", "metric", *model_head(data.models), *columns), rows)
