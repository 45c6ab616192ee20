"""What the page of results says of its models and numbers: short titles, what plots show, limits, ticks, signs, chance."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from test_evaluation_page import (
    MODELS,
    SETS,
    ZERO_SHOT,
    drawings,
    make_results,
    page_of,
    put,
    put_score,
    rows_of,
)

from clipcore.evaluate import model_plots, svg
from clipcore.evaluate.axes import logit, logit_ticks
from clipcore.evaluate.lines import line_of
from clipcore.evaluate.metrics import chance_of
from clipcore.evaluate.model_plots import ShiftPoint
from clipcore.evaluate.page_data import read_page_data
from clipcore.evaluate.page_models import page_models
from clipcore.evaluate.page_studies import robustness, scaling
from clipcore.evaluate.results import FEW_SHOT, LINEAR_PROBE, PROMPTS, Result, write_result
from clipcore.number_texts import decimal, percent, short, signed_points
from clipcore.page_style import Markup, table

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (["/tmp/r/checkpoints/step_1", "/tmp/r/checkpoints/step_2"], ["step_1", "step_2"]),
        (["logs/a/checkpoints/step_1", "logs/b"], ["a/step_1", "b"]),
        (["checkpoints/a", "checkpoints/b"], ["a", "b"]),
        (["logs/a", "logs/b"], ["a", "b"]),
        (["logs/a/last", "logs/b/last"], ["a/last", "b/last"]),
        (["logs", "logs/a"], ["logs", "logs/a"]),
        (["/runs/a", "/runs/a/b"], ["a", "a/b"]),
        # Folders, not letters.
        (["logs/run_1", "logs/run_2"], ["run_1", "run_2"]),
        (["/x/logs/a", "/x/logs/b", "openai"], ["a", "b", "openai"]),
        (["/x/logs/a/step_1", "openai"], ["a/step_1", "openai"]),
        (["/x/a", "y/a"], ["/x/a", "y/a"]),
        (["logs/a", "logs/a/"], ["a", "a #2"]),
        (["logs/a", "a"], ["logs/a", "a"]),
    ],
)
def test_titles_drop_the_folders_that_all_share(names, titles):
    found = page_models([("ViT-B-32", name) for name in names], {}, {}).evaluated
    assert [model.title for model in found] == titles
    assert [model.pretrained for model in found] == names


def test_titles_of_one_model_and_of_several_architectures():
    (one,) = page_models([("ViT-B-32", "/x/logs/a/checkpoints/step_1")], {}, {}).evaluated
    assert one.title == "ViT-B-32 a/step_1"
    (one,) = page_models([("ViT-B-32", "openai")], {}, {}).evaluated
    assert one.title == "ViT-B-32 openai"
    pairs = [("ViT-B-32", "/x/logs/a"), ("ViT-L-14", "/x/logs/a"), ("ViT-L-14", "/x/logs/b")]
    found = page_models(pairs, {}, {}).evaluated
    assert [model.title for model in found] == ["ViT-B-32 a", "ViT-L-14 a", "ViT-L-14 b"]


def test_a_studys_model_that_the_page_does_not_have_is_counted(tmp_path):
    """Nothing in files that may be anybody's ends a page."""
    models = (("ViT-B-32", "a"), ("ViT-B-32", "b"))
    data = read_page_data(make_results(tmp_path, SETS[:2], models, (ZERO_SHOT,)))
    data.page_models = page_models([], {}, {})
    assert data.page_models.place_of({"model": "ViT-B-32", "pretrained": "a"}) is None
    assert "Natural shift" in robustness(data) and scaling(data) == ""
    assert "shift of an unknown model" in str(data.left_out)
    assert "scaling of an unknown model" in str(data.left_out)


def test_no_two_titles_are_one():
    names = [f"/x/{'long' * 12}{i}{'er' * 20}" for i in range(3)] + ["/x/a", "/x/a/"]
    titles = [one.title for one in page_models([("m", name) for name in names], {}, {}).evaluated]
    assert len(set(titles)) == 5 and max(map(len, titles)) < 46


def test_studies_use_the_titles_of_results(tmp_path):
    models = tuple(("ViT-B-32", f"runs/logs/{name}") for name in ("a", "b", "c"))
    folder = make_results(tmp_path / "results", SETS[:2], models, (ZERO_SHOT,))
    for name in ("scaling", "compare"):
        study = json.loads((folder / f"{name}.json").read_text())
        if name == "compare":
            study |= {"a": "ViT-B-32 runs/logs/a, zero-shot", "b": "ViT-B-32 runs/logs/b"}
        else:
            study["prediction"]["model"] = "ViT-B-32 runs/logs/c"
            # Of a model that there is no result of.
            study["models"][0]["pretrained"] = "runs/logs/d"
        (folder / f"{name}.json").write_text(json.dumps(study))
    page = page_of(folder)
    assert rows_of(page, "Zero-shot classification")[0][3:] == ["a", "b", "c"]
    assert {row[1] for row in rows_of(page, "Natural shift")[1:]} == {"a", "b", "c"}
    assert [row[0] for row in rows_of(page, "Scaling")[1:]] == ["d", "b", "c"]
    assert "<p>a, zero-shot against b, on 2 data sets" in page and "predicts 50.0% of c," in page
    # The whole path is there once: where it says what was evaluated.
    assert page.count("runs/logs/a") == page.count("runs/logs/b") == 1


def test_alternative_texts_count_what_is_drawn(tmp_path):
    for model, value in enumerate((0.3, 0.4, 0.5)):
        put_score(tmp_path, "a", model, value)
    for model in (0, 1):
        trace = [[1.0, 0.4], [2.0, 0.5]]
        metrics = {"lp_acc1": 0.5}
        put(tmp_path, "b", model, LINEAR_PROBE, metrics, main_metric="lp_acc1", C=1.0, trace=trace)
    few = {"shots": [1, 2], "scores": [[0.1], [0.4]], "labels_per_class": {"number": 2.0}}
    few["labels_per_class"]["text"] = "2.0"
    put(tmp_path, "c", 0, FEW_SHOT, {}, **few)
    labels = [drawing.get("aria-label") for drawing in drawings(page_of(tmp_path))]
    assert labels[0].startswith("Scores of 3 models on one data set")
    assert labels[1].startswith("Scores of 2 models on one data set")
    assert "of each fit of the search, 2 models on one data set" in labels[2]
    assert "reaches the zero-shot score of one model, on one data set" in labels[3]


@pytest.mark.parametrize("width", [0.4, 0.5, 1.0, 3.0, 15.0])
def test_each_logit_axis_has_two_labelled_ticks(width):
    for low in np.arange(-7.8, 7.8 - width, 0.05).tolist():
        ticks = logit_ticks(low, low + width)
        assert len(ticks) >= 2, (low, width)
        assert all(
            low - 1e-9 <= math.log(tick / (1 - tick)) <= low + width + 1e-9 for tick in ticks
        )
        assert len({f"{100 * tick:g}" for tick in ticks}) == len(ticks)


def shifted(points, baseline):
    with svg.drawing():
        plot = model_plots.shift_chart(points, baseline, "icons", "icons/shift")
        svg.to_svg(plot)
    return plot


def test_a_shift_s_points_take_a_third_of_its_height():
    """The line of equal accuracies is in the plot where it leaves them that, and else said to be outside."""
    near = [ShiftPoint(0.74, 0.62, 0, "zero-shot"), ShiftPoint(0.72, 0.60, 1, "zero-shot")]
    far = [ShiftPoint(0.229, 0.0215, 0, "zero-shot"), ShiftPoint(0.227, 0.0258, 1, "zero-shot")]
    for points, is_inside in ((near, True), (far, False)):
        plot = shifted(points, None)
        (axes,) = plot.figure.axes
        low, high = axes.get_ylim()
        ys = [logit(point.out_accuracy) for point in points]
        assert low < min(ys) and max(ys) < high
        assert max(0.4, max(ys) - min(ys)) >= (high - low) / 3.2
        x_low, x_high = axes.get_xlim()
        assert (x_low < high and x_high > low) == is_inside
        assert ("the line of equal accuracies is outside" in plot.description) != is_inside
        for axis in (axes.xaxis, axes.yaxis):
            assert len(axis.get_ticklocs()) >= 2


def test_a_shift_counts_models_and_points():
    points = [
        ShiftPoint(0.7, 0.6, 0, "zero-shot"),
        ShiftPoint(0.75, 0.5, 0, "probe"),
        ShiftPoint(0.6, 0.5, 0, "baseline"),
        ShiftPoint(0.8, 0.6, 0, "baseline"),
    ]
    text = shifted(points, (1.0, -0.5)).description
    assert "one model and 2 baseline models; 1 of 2 points lie above the baseline" in text
    # A line as steep as a page allows is no overflow.
    shifted([ShiftPoint(0.9999, 0.5, 0, "zero-shot")], (100.0, 100.0))
    shifted([ShiftPoint(0.0, 0.5, 0, "zero-shot")], (100.0, -100.0))


def test_zero_has_no_sign_and_minus_is_the_true_one(tmp_path):
    assert [percent(x, 0) for x in (-0.003, -0.012, 0.0, 0.5)] == ["0%", "−1%", "0%", "50%"]
    assert [signed_points(x) for x in (-0.0004, -0.012, 0.0004, 0.5)] == ["0", "−1.2", "0", "+50.0"]
    assert [decimal(x, ".2f") for x in (-0.001, -1.5)] == ["0.00", "−1.50"]
    assert [decimal(x, ".1e") for x in (-0.0, 8e-6)] == ["0.0e+00", "8.0e−06"]
    assert (short(1e-6), short(2e7), short(-20.0)) == ("1e−6", "2e7", "−20")
    assert (short(0.0), short(-0.0)) == ("0", "0")
    for value in (math.nan, math.inf, -math.inf):
        texts = [form(value) for form in (decimal, percent, signed_points, short)]
        assert texts == ["–"] * 4

    variants = [
        {"name": name, "title": name, "value": 0.5, "gain": gain}
        for name, gain in (("name", 0.0), ("photo", -0.0004), ("own", -0.012))
    ]
    line = line_of(Result("a", "m", "p", PROMPTS, {}, {"variants": variants}))
    assert line.endswith("name 50.0%; photo 50.0% (0); own 50.0% (−1.2)")

    put_score(tmp_path, "a", 0, 0.5)
    row = {"model": "ViT-B-32", "pretrained": "a", "kind": "zero-shot"}
    rows = [
        {**row, "in_accuracy": 0.5, "out_accuracy": 0.4, "effective": x, "gap_closed": x}
        for x in (-0.0003, -0.012)
    ]
    study = {"study": "robustness", "pairs": [{"in": "a", "out": "b", "models": rows}]}
    (tmp_path / "robustness.json").write_text(json.dumps(study))
    page = page_of(tmp_path)
    cells = [row[5:7] for row in rows_of(page, "Natural shift")[1:]]
    assert cells == [["0", "0%"], ["−1.2", "−1%"]]
    assert not re.search(r">-\d", page)


@pytest.mark.parametrize(
    ("metric", "number", "chance"),
    [
        ("acc1", 14, 1 / 14),
        ("mean_per_class_recall", 14, 1 / 14),
        ("acc5", 20, 0.25),
        ("acc5", 4, None),
        ("mean_acc1_acc5", 6, 0.5),
        ("roc_auc", 2, 0.5),
        ("map11", 20, None),
        ("acc1", 0, None),
    ],
)
def test_chance_of_a_probe_is_that_of_its_metric_and_classes(tmp_path, metric, number, chance):
    """Also of a result that does not say it, as those of older versions."""
    assert chance_of(metric, number) == chance
    details = {"main_metric": f"lp_{metric}", "num_classes": number}
    put(tmp_path, "a", 0, LINEAR_PROBE, {f"lp_{metric}": 0.75}, **details)
    row = rows_of(page_of(tmp_path), "Linear probe")[1]
    assert row[2:] == [percent(chance), "75.0%"]


def test_running_text_has_a_column_that_is_not_squeezed(tmp_path):
    cells = ("short", "x" * 33, Markup("<b>" + "y" * 40 + "</b>"), 5)
    row = table(("a", "b", "c", "d"), [cells]).partition("<tbody>")[2]
    assert re.findall(r"<td([^>]*)>", row) == ["", ' class="text"', "", ""]
    page = page_of(make_results(tmp_path / "results", SETS[:2], MODELS[:2]))
    assert page.count("<table") == page.count('<div class="scroll"><table')
    assert re.search(r"\.text\{[^}]*min-width:\d+rem", page)
    assert re.search(r"\.charts\{[^}]*align-items:start", page)


def test_a_second_name_of_a_model_is_said(tmp_path):
    for name in ("logs/a", "runs/logs/a"):
        details = {"main_metric": "acc1", "weights_sha256": "c" * 64}
        result = Result("pets", "ViT-B-32", name, ZERO_SHOT, {"acc1": 0.5}, details)
        write_result(tmp_path, result)
    page = page_of(tmp_path)
    assert "<h1>ViT-B-32 logs/a</h1>" in page and "logs/a, also runs/logs/a" in page
    assert "1 x older result of a model under another name" in page
    assert len(rows_of(page, "Zero-shot")) == 2
    assert len(list(Path(tmp_path).glob("*.json"))) == 2
