"""Renders the page about a run: report.html, one self-contained file.

Curves are inline SVG and pictures are data URIs. Nothing is fetched and no script runs, so the page can be mailed,
archived and opened anywhere. Every string from the data is escaped, because captions are not trusted.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipcore.files import write_durably
from clipcore.number_texts import decimal, short
from clipcore.page_style import document, table

# Okabe and Ito's colours, which colour-blind readers can distinguish; CSS variables, so that dark pages can lighten them.
COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")
# A phone shows a chart a quarter smaller, including its text of 12 units.
CHART_WIDTH, CHART_HEIGHT = 440, 220
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 52, 20, 10, 40
MAX_POINTS = 600


@dataclass(frozen=True)
class ZeroShotExample:
    """An image uint8 [H, W, 3], its true name, and the most probable names with their probabilities."""

    image: np.ndarray
    label: str
    predictions: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class RetrievalExample:
    """A pair, the texts nearest to its image, and the images nearest to its text."""

    image: np.ndarray
    caption: str
    retrieved_captions: tuple[str, ...]
    retrieved_images: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class PairMatrix:
    """Pairs and the cosine of every image (row) with every text (column)."""

    images: tuple[np.ndarray, ...]
    captions: tuple[str, ...]
    similarity: np.ndarray


@dataclass(frozen=True)
class ReportData:
    """The content of the page; an empty part is left out.

    Attributes:
        summary: headline facts in order.
        steps: rows with step, loss, lr, logit_scale, pairs_per_s, time_s.
        evaluations: rows with step, task, acc1, acc5, chance (fractions), num_classes, num_images, num_unreadable.
        retrieval: rows with step, task, num_pairs, num_texts, num_unreadable, image_to_text_R@1 and the like.
        timings: seconds by part of the run.
        profile: the page about a step, as plain text.
        warnings: problems of the run, a sentence or two each.
    """

    title: str
    summary: dict[str, str]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    retrieval: list[dict[str, Any]]
    examples: tuple[ZeroShotExample, ...]
    retrieval_examples: tuple[RetrievalExample, ...]
    pairs: PairMatrix | None
    config: dict[str, Any]
    versions: dict[str, str]
    timings: dict[str, float]
    profile: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A curve of a chart; a dashed one is a reference, a faint one lies behind its own mean."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    faint: bool = False


def write_report(path: Path, data: ReportData) -> None:
    """Write the page atomically."""
    write_durably(path, render(data).encode())


def render(data: ReportData) -> str:
    """Return the page as HTML."""
    sections = [
        _warnings(data.warnings),
        _summary(data.summary),
        _curves(data.steps),
        _zero_shot(data.evaluations),
        _examples(data.examples),
        _retrieval(data.retrieval, data.retrieval_examples),
        _matrix(data.pairs),
        _details(data),
    ]
    return document("clipcore run", data.title, sections)


def _warnings(warnings: Sequence[str]) -> str:
    return "".join(
        f'<section class="warning"><p>{html.escape(text)}</p></section>' for text in warnings
    )


def _summary(facts: dict[str, str]) -> str:
    tiles = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<section><dl class="tiles">{tiles}</dl></section>' if tiles else ""


def _curves(steps: list[dict[str, Any]]) -> str:
    if not steps:
        return "<section><h2>Training</h2><p>No step was made yet.</p></section>"
    loss = _points(steps, "loss")
    charts = [
        ("Loss", [Line("each step", loss, faint=True), Line("running mean", smooth(loss))], "loss"),
        ("Learning rate", [Line("learning rate", _points(steps, "lr"))], "rate"),
        ("Scale of the cosine", [Line("logit scale", _points(steps, "logit_scale"))], "scale"),
    ]
    figures = "".join(_figure(title, lines, "step", unit) for title, lines, unit in charts)
    return f'<section><h2>Training</h2><div class="charts">{figures}</div></section>'


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return the finite values of a column against the step."""
    return [
        (row["step"], row[key])
        for row in rows
        if row.get(key) is not None and math.isfinite(row[key])
    ]


def smooth(points: Sequence[tuple[float, float]], share: float = 0.02) -> list[tuple[float, float]]:
    """Return an exponential mean over about ``share`` of the points, corrected for the bias of its start."""
    decay = 1 - 1 / max(1.0, share * len(points))
    mean, weight, result = 0.0, 0.0, []
    for x, y in points:
        mean, weight = decay * mean + (1 - decay) * y, decay * weight + (1 - decay)
        result.append((x, mean / weight))
    return result


def _zero_shot(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figures = []
    for key, title in (("acc1", "Top-1 accuracy"), ("acc5", "Top-5 accuracy")):
        lines = []
        for task in tasks:
            mine = [row for row in rows if row["task"] == task]
            lines.append(Line(task, [(row["step"], 100 * row[key]) for row in mine]))
        chance = [(row["step"], 100 * row["chance"] * (1 if key == "acc1" else 5)) for row in rows]
        lines.append(Line("chance", [chance[0], chance[-1]], dashed=True))
        figures.append(_figure(title, lines, "step", "%", floor=0.0))
    last = [next(row for row in reversed(rows) if row["task"] == task) for task in tasks]
    last_values = table(
        ("task", "images", "classes", "top-1", "top-5", "chance"),
        [
            (
                row["task"],
                f"{int(row['num_images']):,}{_without(row)}",
                f"{int(row['num_classes']):,}",
                f"{row['acc1']:.1%}",
                f"{row['acc5']:.1%}",
                f"{row['chance']:.2%}",
            )
            for row in last
        ],
    )
    return (
        "<section><h2>Zero-shot classification</h2><p>Class names in prompts make the classifier; none of these classes "
        f'needs an example.</p>{last_values}<div class="charts">{"".join(figures)}</div></section>'
    )


def _examples(examples: tuple[ZeroShotExample, ...]) -> str:
    if not examples:
        return ""
    cards = []
    for example in examples:
        rows = []
        for name, probability in example.predictions:
            right = name == example.label
            mark = "<b>✓</b> " if right else ""
            rows.append(
                f'<li class="{"right" if right else ""}"><span>{mark}{html.escape(name)}</span>'
                f'<meter min="0" max="1" value="{probability:.4f}"></meter><i>{probability:.0%}</i></li>'
            )
        found = any(name == example.label for name, _ in example.predictions)
        verdict = "" if found else "<small>not among the five</small>"
        cards.append(
            f"<article><header>{_picture(example.image, example.label, 72)}<h3>{html.escape(example.label)}{verdict}</h3>"
            f"</header><ol>{''.join(rows)}</ol></article>"
        )
    return (
        "<section><h2>Examples</h2><p>The true name above, the five most probable names below; ✓ marks the true one.</p>"
        f'<div class="cards">{"".join(cards)}</div></section>'
    )


def _gallery(row: dict[str, Any]) -> str:
    """Return in words the gallery that a retrieval searched."""
    num_pictures = int(row["num_pairs"])
    num_texts = int(row.get("num_texts", num_pictures))
    if num_texts == num_pictures:
        return f"{num_pictures:,} pairs{_without(row)}"
    return f"{num_pictures:,} pictures{_without(row)} with {num_texts:,} captions"


def _without(row: dict[str, Any]) -> str:
    """Return the number of unreadable samples of an evaluation, as a suffix in parentheses."""
    number = int(row.get("num_unreadable", 0))
    return f" ({number:,} more unreadable)" if number else ""


def _retrieval(rows: list[dict[str, Any]], examples: tuple[RetrievalExample, ...]) -> str:
    if not rows and not examples:
        return ""
    parts = []
    if rows:
        last = rows[-1]
        # With fewer pictures than captions, one direction may lack the larger values of K.
        names = [key for key in last if "_to_" in key and "_R@" in key]
        ranks = sorted({int(key.partition("@")[2]) for key in names})
        body = []
        for direction in ("image_to_text", "text_to_image"):
            recalls = [last.get(f"{direction}_R@{k}") for k in ranks]
            shown = ("–" if recall is None else f"{recall:.1%}" for recall in recalls)
            body.append((direction.replace("_", " "), *shown))
        parts.append(f"<p>{html.escape(last['task'])}, among {_gallery(last)}.</p>")
        parts.append(table(("direction", *(f"recall at {k}" for k in ranks)), body))
    if examples:
        items = []
        for example in examples:
            texts = "".join(
                f'<li class="{"right" if text == example.caption else ""}">{"<b>✓</b> " if text == example.caption else ""}'
                f"{html.escape(text)}</li>"
                for text in example.retrieved_captions
            )
            pictures = "".join(
                _picture(image, "retrieved image", 56) for image in example.retrieved_images
            )
            items.append(
                f'<article class="pair"><div>{_picture(example.image, example.caption, 72)}<ol>{texts}</ol></div>'
                f"<div><q>{html.escape(example.caption)}</q><span>{pictures}</span></div></article>"
            )
        parts.append(
            "<p>Each image with its three nearest texts, then its text with the three nearest images.</p>"
            f'<div class="cards wide">{"".join(items)}</div>'
        )
    return f"<section><h2>Retrieval</h2>{''.join(parts)}</section>"


def _matrix(pairs: PairMatrix | None) -> str:
    if pairs is None:
        return ""
    low, high = float(pairs.similarity.min()), float(pairs.similarity.max())
    span = max(high - low, 1e-6)
    head = "".join(
        f'<th scope="col" title="{html.escape(c)}">{i + 1}</th>'
        for i, c in enumerate(pairs.captions)
    )
    rows = []
    for i, (image, values) in enumerate(zip(pairs.images, pairs.similarity.tolist(), strict=True)):
        cells = "".join(
            f'<td class="{"own" if i == j else ""}" style="--v:{(value - low) / span:.2f}">'
            f"{decimal(100 * value, '.0f')}</td>"
            for j, value in enumerate(values)
        )
        rows.append(
            f'<tr><th scope="row">{i + 1} {_picture(image, pairs.captions[i], 28)}</th>{cells}</tr>'
        )
    captions = "".join(f"<li>{html.escape(caption)}</li>" for caption in pairs.captions)
    return (
        "<section><h2>Similarity of sixteen pairs</h2><p>Cosine times 100 of each image (row) with each text (column); "
        "outlined: the pairs that belong together.</p>"
        f'<div class="scroll"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><ol class="captions">{captions}</ol></section>'
    )


def _details(data: ReportData) -> str:
    total = sum(data.timings.values()) or 1.0
    timings = [
        (part, f"{seconds:,.1f} s", f"{seconds / total:.0%}")
        for part, seconds in data.timings.items()
    ]
    parts = []
    if timings:
        parts.append("<h2>Where the time went</h2>" + table(("part", "seconds", "share"), timings))
    if data.versions:
        parts.append("<h2>Versions</h2>" + table(("part", "version"), list(data.versions.items())))
    if data.profile:
        parts.append(
            f'<details><summary>Profile of a step</summary><pre class="scroll">{html.escape(data.profile)}</pre></details>'
        )
    if data.config:
        settings = [(name, json.dumps(value)) for name, value in data.config.items()]
        parts.append(
            f"<details><summary>Configuration</summary>{table(('setting', 'value'), settings)}</details>"
        )
    return f"<section>{''.join(parts)}</section>"


def _picture(image: np.ndarray, description: str, size: int) -> str:
    """Return an image as a data URI; small pictures are shown with sharp pixels, not blurred."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    picture.thumbnail((160, 160))
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(description)}" width="{size}" height="{size}">'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round values, 1, 2 or 5 times a power of ten apart, from below ``low`` to above ``high``."""
    # The curve is constant up to the rounding of its mean, or its powers of ten would underflow to 0.
    if not high - low > max(1e-9 * max(abs(low), abs(high)), 1e-300):
        high = low + max(abs(low), 1.0 if abs(low) < 1e-300 else 0.0)
    raw = (high - low) / count
    exponent = math.floor(math.log10(raw))
    power = 10.0**exponent
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, max(12, 3 - exponent)) for i in range(first, last + 1)]


def _figure(
    title: str, lines: Sequence[Line], x_label: str, unit: str, floor: float | None = None
) -> str:
    chart = line_chart(lines, x_label, unit, floor)
    legend = ""
    if len(lines) > 1:
        items = (
            f'<li><svg width="18" height="8" aria-hidden="true"><path d="M0 4h18" class="{"dashed" if line.dashed else ""}" '
            f'style="stroke:{_colour(i, line)}"/></svg>{html.escape(line.name)}</li>'
            for i, line in enumerate(lines)
        )
        legend = f'<ul class="legend">{"".join(items)}</ul>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{chart}{legend}</figure>"


def _colour(i: int, line: Line) -> str:
    return "var(--muted)" if line.dashed or line.faint else COLOURS[i % len(COLOURS)]


def line_chart(lines: Sequence[Line], x_label: str, unit: str, floor: float | None = None) -> str:
    """Return the curves as an SVG that scales with the page; a short message if there are no points."""
    points = [point for line in lines for point in line.points]
    if not points:
        return "<p>No finite value.</p>"
    xs = ticks(min(p[0] for p in points), max(p[0] for p in points))
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    ys = ticks(low if floor is None else min(floor, low), high)
    width = CHART_WIDTH - MARGIN_LEFT - MARGIN_RIGHT
    height = CHART_HEIGHT - MARGIN_TOP - MARGIN_BOTTOM
    x_low, x_high = (
        min(p[0] for p in points),
        max(max(p[0] for p in points), min(p[0] for p in points) + 1),
    )

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            MARGIN_LEFT + width * (x - x_low) / (x_high - x_low),
            MARGIN_TOP + height * (1 - (y - ys[0]) / (ys[-1] - ys[0])),
        )

    parts = []
    for y in ys:
        _, v = at(x_low, y)
        parts.append(
            f'<path class="grid" d="M{MARGIN_LEFT} {v:.1f}H{CHART_WIDTH - MARGIN_RIGHT}"/>'
        )
        parts.append(
            f'<text x="{MARGIN_LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{_number(y)}</text>'
        )
    for x in (x for x in xs if x_low <= x <= x_high):
        h, _ = at(x, ys[0])
        parts.append(
            f'<text x="{h:.1f}" y="{CHART_HEIGHT - 22}" text-anchor="middle">{_number(x)}</text>'
        )
    axis = f"{x_label} (across), {unit} (up)"
    parts.append(
        f'<text x="{CHART_WIDTH - MARGIN_RIGHT}" y="{CHART_HEIGHT - 5}" text-anchor="end">{html.escape(axis)}</text>'
    )
    for i, line in enumerate(lines):
        shown = line.points[:: max(1, len(line.points) // MAX_POINTS)]
        path = " ".join(f"{h:.1f},{v:.1f}" for h, v in (at(*point) for point in shown))
        kind = "dashed" if line.dashed else "raw" if line.faint else "line"
        parts.append(
            f'<polyline class="{kind}" style="stroke:{_colour(i, line)}" points="{path}"/>'
        )
        if len(shown) <= 12 and not line.dashed:
            parts += [
                f'<circle cx="{h:.1f}" cy="{v:.1f}" r="3" style="fill:{_colour(i, line)}"/>'
                for h, v in (at(*point) for point in shown)
            ]
    description = html.escape(", ".join(line.name for line in lines))
    return f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{description}">{"".join(parts)}</svg>'


def _number(value: float) -> str:
    """Return a tick's short label."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return short(value)
    return decimal(value, ",.4g" if abs(value) < 1000 else ",.0f")
