"""Building blocks of the page of results: figures, and tables of data sets by models."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from clipcore.evaluate.page_data import Score, common, mean
from clipcore.evaluate.page_models import Model
from clipcore.evaluate.plots import MOST_ROWS
from clipcore.evaluate.svg import LegendEntry, Plot, legend, model_colour, model_marker, to_svg
from clipcore.number_texts import percent
from clipcore.page_style import Markup, escaped, table

STYLE = """
td small{color:var(--muted);white-space:nowrap}
.total td{font-weight:600;border-top:2px solid var(--rule)}.total .text{min-width:9rem;max-width:12rem}
.neighbours{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));margin-top:.75rem}
.neighbours div{font-size:.78rem;overflow-wrap:anywhere}.neighbours img{margin-right:.25rem}
.neighbours .over{border-left:3px solid var(--b);padding-left:.5rem}
section>h3{margin-top:1.25rem}
.heat th{text-align:left}.heat .few{opacity:.55}details summary{font-size:1rem}details{margin-top:.75rem}
"""
METRICS = {
    "acc1": "top-1",
    "acc5": "top-5",
    "mean_per_class_recall": "mean per class",
    "map11": "11-point mAP",
    "mean_average_precision": "mAP",
    "roc_auc": "ROC AUC",
    "mean_recall@1": "mean recall at 1",
}


def metric_title(metric: str) -> str:
    """Return the title of a metric; a probe's is the same as for zero-shot."""
    name = metric.removeprefix("lp_")
    return METRICS.get(name, name.replace("_", " "))


def mixed(metrics: Iterable[str]) -> str:
    """Return in words the metrics that a mean is over."""
    titles = list(dict.fromkeys(map(metric_title, metrics)))
    if len(titles) < 2:
        return "".join(titles)
    return f"{', '.join(titles[:-1])} and {titles[-1]} mixed"


def sets(number: int) -> str:
    """Return a number of data sets in words."""
    return f"{number:,} data set{'s' if number != 1 else ''}"


def section(title: str, *parts: str) -> str:
    """Return a section of the page; parts are HTML."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str) -> str:
    """Return a paragraph of a text."""
    return f"<p>{html.escape(text)}</p>"


def charts(*figures: str) -> str:
    """Return figures side by side, if there is room."""
    return f'<div class="charts">{"".join(figures)}</div>'


def figure(title: str, plot: Plot, entries: Sequence[LegendEntry] = ()) -> str:
    """Return a plot with its title and its legend."""
    return (
        f'<figure class="plot"><figcaption>{html.escape(title)}</figcaption>{to_svg(plot)}'
        f"{legend(entries)}</figure>"
    )


def folded(title: str, content: str) -> str:
    """Return content that is folded until the reader opens it."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def model_entries(models: Sequence[Model], indices: Iterable[int]) -> list[LegendEntry]:
    """Return the legend entries of some models; none for a single model."""
    found = [
        LegendEntry(models[index].title, model_colour(index), model_marker(index))
        for index in sorted(set(indices))
    ]
    return found if len(models) > 1 else []


def first_of(title: str, num_rows: int, most: int = MOST_ROWS) -> str:
    """Return a title, which tells if a plot does not show all rows."""
    return title if num_rows <= most else f"{title}: the first {most} of {num_rows:,}"


def model_head(models: Sequence[Model]) -> list[str]:
    """Return the head of the model column, or nothing for a single model."""
    return ["model"] if len(models) > 1 else []


def model_cell(models: Sequence[Model], index: int) -> list[str]:
    """Return the cell under ``model_head``."""
    return [models[index].title] if len(models) > 1 else []


def strong_best(values: Sequence[float | None], texts: Sequence[str]) -> list[Markup]:
    """Return texts as cells, with the largest value in bold if there are several."""
    known = [value for value in values if value is not None]
    best = max(known) if len(known) > 1 else None
    return [
        Markup(f"<b>{escaped(text)}</b>" if value is not None and value == best else escaped(text))
        for value, text in zip(values, texts, strict=True)
    ]


def score_table(models: Sequence[Model], by_set: Mapping[str, Mapping[int, Score]]) -> str:
    """Return the table of scores, with a row per data set, a column per model, and the mean over common data sets.

    Models with different metrics on one data set are in different rows.
    """
    by_row: dict[tuple[str, str], dict[int, Score]] = {}
    for name, scores in by_set.items():
        for index, score in scores.items():
            by_row.setdefault((name, score.metric), {})[index] = score

    rows: list[list[object]] = []
    for (name, metric), scores in by_row.items():
        chance = next((s.chance for s in scores.values() if s.chance is not None), None)
        values = [scores[i].value if i in scores else None for i in range(len(models))]
        cells = strong_best(values, [_cell(scores.get(i)) for i in range(len(models))])
        rows.append([name, metric_title(metric), percent(chance), *cells])

    shared = common(by_row, len(models))
    if len(shared) > 1:
        means = [mean(by_row[key][i].value for key in shared) for i in range(len(models))]
        cells = strong_best(means, [percent(value) for value in means])
        label = f"mean of {sets(len(shared))}" + (
            " that all models have" if len(models) > 1 else ""
        )
        rows.append([label, mixed(metric for _, metric in shared), "", *cells])
    head = ("data set", "metric", "chance")
    titles = [model.title for model in models] if len(models) > 1 else ["score"]
    return with_total(table((*head, *titles), rows), len(shared) > 1)


def _cell(score: Score | None) -> Markup | str:
    if score is None:
        return "–"
    if score.interval is None:
        return percent(score.value)
    low, high = score.interval
    return Markup(f"{percent(score.value)} <small>{100 * low:.1f}–{100 * high:.1f}</small>")


def with_total(content: str, has_total: bool) -> str:
    """Return a table whose last row is marked as a total."""
    if not has_total:
        return content
    head, _, last = content.rpartition("<tr>")
    return f'{head}<tr class="total">{last}'


def by_value(by_set: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Return the data sets, the one with the highest mean over models first."""
    return sorted(by_set, key=lambda name: -(mean(by_set[name].values()) or 0.0))
