"""The page about a run: well formed, self-contained, safe against what captions say, whole or absent."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from clipcore.report.page import (
    Line,
    PairMatrix,
    ReportData,
    RetrievalExample,
    ZeroShotExample,
    line_chart,
    render,
    smooth,
    ticks,
    write_report,
)

pytestmark = pytest.mark.fast

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'&amp;"
VOID = {"meta", "img", "path", "circle", "polyline", "br", "hr", "link", "input"}


class Balance(HTMLParser):
    """Fails on tags that do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def full_data(caption: str = "a bold sans glyph of plus sign") -> ReportData:
    image = np.full((32, 32, 3), 200, np.uint8)
    steps = [
        {
            "step": i,
            "loss": 5 / i,
            "lr": 1e-3,
            "logit_scale": 14.3,
            "pairs_per_s": 900.0,
            "time_s": float(i),
        }
        for i in range(1, 2000)
    ]
    evaluations = [
        {
            "step": s,
            "task": "unseen",
            "acc1": 0.2,
            "acc5": 0.5,
            "chance": 0.0015,
            "num_classes": 679.0,
            "num_images": 3500.0,
        }
        for s in (500, 1000)
    ]
    recalls = {f"{d}_R@{k}": 0.3 for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    return ReportData(
        title=caption,
        summary={caption: caption},
        steps=steps,
        evaluations=evaluations,
        retrieval=[{"step": 1000, "task": caption, "num_pairs": 100.0, **recalls}],
        examples=(ZeroShotExample(image, caption, ((caption, 0.7), ("minus sign", 0.2))),),
        retrieval_examples=(
            RetrievalExample(image, caption, (caption, "x", "y"), (image, image, image)),
        ),
        pairs=PairMatrix((image,) * 16, (caption,) * 16, np.eye(16, dtype=np.float32)),
        config={"name": caption},
        versions={"torch": caption},
        timings={"data": 1.0, "forward": 3.0},
    )


def parse(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_every_section_is_there_and_well_formed():
    page = render(full_data())
    parse(page)
    for heading in (
        "Training",
        "Zero-shot",
        "Examples",
        "Retrieval",
        "Similarity",
        "Where the time went",
        "Versions",
    ):
        assert f">{heading}" in page
    assert "75%" in page and "recall at 10" in page and "✓" in page


def test_a_recall_that_one_direction_lacks_is_a_dash():
    """Fewer pictures than captions: the fifth nearest picture is not there."""
    recalls = {"image_to_text_R@1": 0.25, "text_to_image_R@1": 0.5, "image_to_text_R@5": 0.75}
    row = {"step": 1, "task": "few", "num_pairs": 4.0, "num_texts": 12.0, **recalls}
    page = render(dataclasses.replace(full_data(), retrieval=[row]))
    parse(page)
    assert "recall at 5" in page and "75.0%" in page and "<td>–</td>" in page


def test_hostile_captions_stay_text():
    parsed = parse(render(full_data(HOSTILE)))
    assert "script" not in parsed.seen
    assert not any(name.startswith("on") for name, _ in parsed.attributes)


def test_nothing_is_fetched():
    page = render(full_data())
    assert not re.search(r"https?://|@import|url\(", page)
    assert all(
        value.startswith("data:")
        for name, value in parse(page).attributes
        if name == "src" and value
    )


@pytest.mark.parametrize(
    "part", [f.name for f in dataclasses.fields(ReportData) if f.name not in ("title", "pairs")]
)
def test_any_part_may_be_empty(part):
    data = full_data()
    empty = type(getattr(data, part))()
    parse(render(dataclasses.replace(data, **{part: empty})))
    parse(render(dataclasses.replace(data, pairs=None)))


def test_a_run_of_one_step_or_of_broken_values_has_a_page():
    data = full_data()
    one = [data.steps[0]]
    broken = [{**data.steps[0], "loss": None, "lr": math.inf}]
    for steps in (one, broken):
        page = render(dataclasses.replace(data, steps=steps))
        parse(page)
        assert "nan" not in page.lower().replace("finance", "") and "inf," not in page


def test_size_is_bounded_for_a_long_run(tmp_path):
    data = full_data()
    rows = [dict(data.steps[0], step=i) for i in range(1, 200_001)]
    write_report(tmp_path / "report.html", dataclasses.replace(data, steps=rows))
    assert (tmp_path / "report.html").stat().st_size < 1_500_000
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.13, 5.7), (1e-6, 3e-5), (-3, 3), (7, 7), (0, 0), (1, 240_000), (100, 100 + 1e-11)],
)
def test_ticks_are_round_and_cover(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 12
    steps = {round(b - a, 12) for a, b in itertools.pairwise(found)}
    mantissa = min(steps) / 10 ** math.floor(math.log10(min(steps)) + 1e-9)
    assert round(mantissa, 6) in (1, 2, 5, 10)


@pytest.mark.parametrize(
    ("low", "high"), [(1e-20, 3e-19), (0, 1e-15), (0, 1e-320), (1e-320, 1e-310), (5e-324, 5e-324)]
)
def test_ticks_of_tiny_numbers_are_not_one_place(low, high):
    """As of the learning rates of a run that cannot learn."""
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and found[-1] > found[0]
    assert len(set(found)) == len(found) <= 12


def test_a_chart_puts_its_ends_at_its_edges():
    svg = line_chart([Line("x", [(0, 0.0), (10, 1.0)])], "step", "loss")
    first, last = re.search(r'points="([^"]*)"', svg).group(1).split(" ")
    assert first == "52.0,180.0" and last == "420.0,10.0"


def test_smoothing_keeps_a_constant_and_ends_near_the_recent():
    assert smooth([(i, 3.0) for i in range(50)])[0][1] == pytest.approx(3.0)
    step = smooth([(i, 0.0 if i < 500 else 1.0) for i in range(1000)])
    assert step[-1][1] > 0.99 and step[499][1] < 0.01
