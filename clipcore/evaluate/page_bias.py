"""Renders the section of the page of results about differences between groups of people."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from clipcore.evaluate.bias import SMALL_GROUP
from clipcore.evaluate.page_data import (
    Bias,
    Counted,
    Difference,
    PageData,
    Rate,
    read_bias,
)
from clipcore.evaluate.page_parts import (
    folded,
    model_cell,
    paragraph,
    section,
)
from clipcore.evaluate.results import BIAS
from clipcore.number_texts import decimal, percent
from clipcore.page_style import escaped

_MOST_LABELS = 40


def bias(data: PageData) -> str:
    """Return the section on differences between groups of people."""
    found = data.parsed(BIAS, read_bias)
    if not found:
        return ""
    parts = [
        paragraph(
            "The user chose the classes, and that choice decides much of this. Outlined: the worst of the groups of "
            f"{SMALL_GROUP} images or more. Smaller ones, in grey, are not compared."
        )
    ]
    for name, by_model in found.items():
        for index, one in by_model.items():
            title = ", ".join((name, *model_cell(data.models, index)))
            parts.append(f"<h3>{html.escape(title)}</h3>")
            parts += [_heat_map(column, counted) for column, counted in one.tables.items()]
            parts += _differences(one)
            parts.append(_labels(one))
    return section("Groups of people", *parts)


def _labels(found: Bias) -> str:
    """Return the labels of the probe, and the labels of each category."""
    if not found.labels:
        return ""
    categories = (f"{name}: {', '.join(those)}." for name, those in found.categories.items())
    lines = (f"{', '.join(found.labels)}.", *categories)
    return folded("The labels", "".join(map(paragraph, lines)))


def _heat_map(column: str, counted: Mapping[str, Counted]) -> str:
    """Return the rates as a table of shaded cells, with a row per group and a column per counted quantity."""
    groups = list(dict.fromkeys(group for what in counted.values() for group in what.rates))
    highest = max(
        (rate.rate for what in counted.values() for rate in what.rates.values()), default=0.0
    )
    worst = {title: _worst(what) for title, what in counted.items()}
    rows = []
    for group in groups:
        known = [what.rates[group] for what in counted.values() if group in what.rates]
        cells = "".join(
            _cell(what.rates.get(group), highest, group == worst[title])
            for title, what in counted.items()
        )
        few = "few" if known[0].is_small else ""
        rows.append(
            f'<tr class="{few}"><th scope="row">{escaped(group)}</th><td>{known[0].num_images:,}</td>{cells}</tr>'
        )
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in (column, "images", *counted))
    return (
        f'<div class="scroll"><table class="matrix heat"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _worst(what: Counted) -> str | None:
    """Return the group with the lowest accuracy, or with the highest rate of a category; None if all are equal."""
    large = {group: rate.rate for group, rate in what.rates.items() if not rate.is_small}
    if len(set(large.values())) < 2:
        return None
    return (min if what.is_accuracy else max)(large, key=large.__getitem__)


def _cell(rate: Rate | None, highest: float, is_worst: bool) -> str:
    if rate is None:
        return "<td>–</td>"
    title = ""
    if rate.interval:
        low, high = rate.interval
        title = f' title="95%: {100 * low:.1f} to {100 * high:.1f}%"'
    shade = rate.rate / highest if highest else 0.0
    return f'<td class="{"own" if is_worst else ""}" style="--v:{shade:.2f}"{title}>{percent(rate.rate)}</td>'


def _differences(found: Bias) -> list[str]:
    """Return the unevenly assigned labels, as heat maps of labels by groups."""
    tables: dict[tuple[str, float | None], list[Difference]] = {}
    for one in found.differences:
        tables.setdefault((one.column, one.threshold), []).append(one)
    return [_label_map(column, threshold, ones) for (column, threshold), ones in tables.items()]


def _label_map(column: str, threshold: float | None, ones: Sequence[Difference]) -> str:
    groups = list(dict.fromkeys(group for one in ones for group in one.rates))
    rows = []
    for one in ones[:_MOST_LABELS]:
        highest = max(one.rates.values(), default=0.0)
        cells = "".join(
            _cell(
                Rate(one.rates[group], 0, None, False) if group in one.rates else None,
                highest,
                one.rates.get(group) == highest > min(one.rates.values()),
            )
            for group in groups
        )
        ratio = "∞" if one.ratio is None else decimal(one.ratio)
        cells += f"<td>{ratio}</td><td>{decimal(one.p_value, '.2g')}</td>"
        rows.append(f'<tr><th scope="row">{escaped(one.label)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{escaped(n)}</th>' for n in ("label", *groups, "ratio", "p"))
    more = len(ones) - len(rows)
    rest = paragraph(f"{more:,} more labels are in the result's file.") if more > 0 else ""
    return (
        paragraph(f"Labels of at least {percent(threshold)} probability, by {column}:")
        + f'<div class="scroll"><table class="matrix heat"><thead><tr>{head}</tr></thead>'
        + f"<tbody>{''.join(rows)}</tbody></table></div>{rest}"
    )
