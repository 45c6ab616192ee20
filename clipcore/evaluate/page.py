"""Writes the page of results: report.html, one file with everything in a folder of results.

Plots are inline SVG and pictures are data URIs; nothing is fetched and no script runs. Every string from the data is
escaped. The same results give the same bytes. An evaluation without results has no section; a line at the end tells how to
run it.

Source: the plots of Radford et al. 2021; the functions of ``plots.py`` name the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from clipcore.data import DataError
from clipcore.evaluate import page_bias, page_few_shot, page_parts, page_scores, page_studies, svg
from clipcore.evaluate.page_data import (
    PageData,
    common,
    mean,
    read_page_data,
    read_score,
)
from clipcore.evaluate.page_parts import (
    folded,
    metric_title,
    paragraph,
    section,
    sets,
)
from clipcore.evaluate.page_values import count, shown
from clipcore.evaluate.results import ZERO_SHOT, Result
from clipcore.files import write_durably
from clipcore.number_texts import percent
from clipcore.page_style import document, escaped, table

PAGE_FILE = "report.html"
_MOST_NOTES = 20
_MOST_TILES = 8
_MOST_TEMPLATES = 100


class _Section(NamedTuple):
    """A part of the page, and the arguments of ``python -m clipcore.evaluate`` that produce its results."""

    name: str
    render: Callable[[PageData], str]
    arguments: str


_SECTIONS = (
    _Section("zero-shot classification", page_scores.zero_shot, "zero-shot --data DIR"),
    _Section("retrieval", page_scores.retrieval, "retrieval --data DIR"),
    _Section("prompt gains", page_scores.prompts, "prompts --data DIR"),
    _Section("linear probe", page_scores.probe, "linear-probe --data DIR"),
    _Section(
        "zero-shot against a probe",
        page_scores.versus_probe,
        "linear-probe --data DIR of a set that zero-shot has",
    ),
    _Section("few-shot", page_few_shot.few_shot, "few-shot --data DIR"),
    _Section("comparison", page_studies.compare, "compare A B"),
    _Section("natural shift", page_studies.robustness, "robustness RESULTS"),
    _Section("scaling", page_studies.scaling, "scaling RESULTS"),
    _Section("overlap", page_studies.overlap, "overlap --data DIR --train-data SPEC"),
    _Section("bias", page_bias.bias, "bias --data CSV --groups COLUMN,COLUMN"),
)


def write_page(results: Path, path: Path | None = None) -> Path:
    """Write the page of a folder of results; return its path.

    Args:
        results: the folder of results, and of studies if there are any.
        path: path of the page [report.html in the folder].

    Raises:
        DataError: the folder holds no results, one cannot be read, or the page cannot be written.
    """
    content = render_page(read_page_data(results)).encode()
    path = path or results / PAGE_FILE
    try:
        write_durably(path, content)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; give another path") from None
    return path


def render_page(data: PageData) -> str:
    """Return the page as HTML."""
    with svg.drawing():
        parts = [(part, part.render(data)) for part in _SECTIONS]
    missing = [part for part, content in parts if not content]
    sections = [_summary(data), *(content for _, content in parts)]
    sections += [_details(data), _left_out(data), _missing_sections(missing)]
    style = svg.STYLE + page_parts.STYLE
    return document("clipcore evaluation", _title(data), sections, style)


def _title(data: PageData) -> str:
    if len(data.models) == 1:
        return data.models[0].title
    return f"{len(data.models)} models on {sets(len(_names(data)))}"


def _names(data: PageData) -> list[str]:
    """Return the data sets that have results."""
    names = {name for by_set in data.results.values() for name in by_set}
    return sorted(names, key=lambda name: (name.lower(), name))


def _summary(data: PageData) -> str:
    """Return the headline facts: the models and data sets, and the mean zero-shot score of each model."""
    tiles = [("data sets", f"{len(_names(data)):,}"), ("models", f"{len(data.models):,}")]
    # The section on zero-shot has counted the skipped results.
    scores = PageData(data.page_models, data.results, {}).parsed(ZERO_SHOT, read_score)
    shared = common(scores, len(data.models))
    metrics = {score.metric for name in shared for score in scores[name].values()}
    kind = metric_title(metrics.pop()) if len(metrics) == 1 else "metrics mixed"
    for index, model in enumerate(data.models[:_MOST_TILES] if shared else []):
        value = mean(scores[name][index].value for name in shared)
        of_model = f" of {model.title}" if len(data.models) > 1 else ""
        over = f"{sets(len(shared))}, {kind}"
        tiles.append((f"zero-shot{of_model}: mean of {over}", percent(value)))
    content = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in tiles
    )
    return f'<section><dl class="tiles">{content}</dl></section>'


def _details(data: PageData) -> str:
    """Return the list of evaluated data sets, models and versions."""
    by_name: dict[str, list[Result]] = {}
    for by_set in data.results.values():
        for name, by_model in by_set.items():
            by_name.setdefault(name, []).extend(by_model.values())
    rows = [(name, *_set_cells([r.details for r in by_name[name]])) for name in _names(data)]
    head = ("data set", "images", "classes", "first and last class", "left out", "notes")
    prompts = [(name, text) for name in _names(data) if (text := _prompts(by_name[name]))]
    models = [
        (model.title, model.architecture, ", also ".join((model.pretrained, *model.other_names)))
        for model in data.models
    ]
    versions = sorted(
        {
            f"{shown(name)} {shown(version)}"
            for found in by_name.values()
            for result in found
            for name, version in _items(result.details.get("versions"))
        }
    )
    return section(
        "What was evaluated",
        table(head, rows),
        table(("model", "architecture", "weights"), models),
        folded("Prompts", table(("data set", "templates"), prompts)) if prompts else "",
        paragraph(f"Versions: {', '.join(versions)}.") if versions else "",
    )


def _prompts(results: list[Result]) -> str:
    """Return the templates of the first zero-shot result that has any."""
    for result in results:
        templates = result.details.get("templates")
        if result.task == ZERO_SHOT and isinstance(templates, list) and templates:
            found = " | ".join(map(shown, templates[:_MOST_TEMPLATES]))
            more = len(templates) - _MOST_TEMPLATES
            return f"{found} and {more:,} more" if more > 0 else found
    return ""


def _items(value: object) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _set_cells(details: list[dict[str, Any]]) -> list[str]:
    """Return the results' details of their data set; if they differ, the largest values."""
    num_images = max(count(one.get("num_images")) for one in details)
    num_classes = max(count(one.get("num_classes")) for one in details)
    ends = next(
        (
            f"{shown(one['first_class'])} … {shown(one['last_class'])}"
            for one in details
            if isinstance(one.get("first_class"), str) and isinstance(one.get("last_class"), str)
        ),
        "–",
    )
    reasons = (("num_unreadable", "unreadable"), ("num_transparent", "transparent, over white"))
    left_out = []
    for key, reason in reasons:
        if number := max(count(one.get(key)) for one in details):
            left_out.append(f"{number:,} {reason}")
    notes: dict[str, None] = {}
    for one in details:
        found = one.get("notes")
        notes.update(dict.fromkeys(map(shown, found if isinstance(found, list) else [])))
    return [
        f"{num_images:,}" if num_images else "–",
        f"{num_classes:,}" if num_classes else "–",
        ends,
        "; ".join(left_out) or "–",
        "; ".join(list(notes)[:_MOST_NOTES]) or "–",
    ]


def _left_out(data: PageData) -> str:
    """Return the results that could not be shown, and the reasons."""
    return section("Left out", paragraph(f"{data.left_out}.")) if data.left_out else ""


def _missing_sections(missing: list[_Section]) -> str:
    """Return the list of evaluations without results, with their commands."""
    if not missing:
        return ""
    items = "".join(
        f"<li>{part.name} (<code>python -m clipcore.evaluate {escaped(part.arguments)}</code>)</li>"
        for part in missing
    )
    return section("Not here", f"<ul>{items}</ul>")
