"""Robustness of the models in a folder of results: the paper's figures through files, and input that makes no study."""

from __future__ import annotations

import json
import os
import warnings

import pytest
from result_folders import (
    PROBE,
    note_of,
    put,
    put_papers_model,
    write_baseline,
)

from clipcore.data import DataError
from clipcore.evaluate.robustness import fit_baseline
from clipcore.evaluate.robustness_study import robustness_study

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("unit", [1.0, 100.0])
def test_robustness_of_the_papers_model_beside_85_standard_models(tmp_path, unit):
    put_papers_model(tmp_path / "results")
    table = write_baseline(tmp_path / "standard.csv", unit)
    study = robustness_study(tmp_path / "results", str(table))
    assert [(pair["in"], pair["out"]) for pair in study["pairs"]] == [
        ("wds_imagenet1k", "wds_imagenetv2"),
        ("wds_imagenet1k", "wds_imagenet_sketch"),
    ]
    v2, sketch = study["pairs"]
    assert abs(v2["baseline"]["slope"] - 0.923229) < 5e-6
    assert abs(v2["baseline"]["intercept"] + 0.497690) < 5e-6
    assert abs(sketch["baseline"]["slope"] - 1.070915) < 5e-6
    assert (v2["baseline"]["num_models"], v2["baseline"]["from"]) == (85, "standard.csv")

    # Differences of the paper's accuracies to the line, in points.
    for pair, zero_shot, probe, relative in (
        (v2, 6.07, 0.26, 0.701 - 0.759),
        (sketch, 35.67, 19.14, 0.602 - 0.574),
    ):
        by_kind = {model["kind"]: model for model in pair["models"]}
        assert abs(100 * by_kind["zero-shot"]["effective"] - zero_shot) < 0.006
        assert abs(100 * by_kind["probe"]["effective"] - probe) < 0.006
        assert by_kind["zero-shot"]["relative"] == relative
        assert by_kind["probe"]["relative"] is None
        kinds = [model["kind"] for model in pair["models"]]
        assert kinds == ["zero-shot", "probe", *["baseline"] * 85]
    closed = v2["models"][0]["gap_closed"]
    lost = 0.762 - (0.701 - v2["models"][0]["effective"])
    assert closed == pytest.approx(1 - (0.762 - 0.701) / lost)
    is_said = any("read in %" in note for note in study["notes"])
    assert is_said == (unit == 1.0)


def test_a_line_through_the_folders_own_probes_says_what_it_is(tmp_path):
    for number, (inside, outside) in enumerate(((0.5, 0.4), (0.6, 0.5), (0.8, 0.7))):
        put(tmp_path, "glyphs", inside, pretrained=f"step-{number}", task=PROBE)
        put(tmp_path, "glyphs/shift", outside, pretrained=f"step-{number}", task=PROBE)
    put(tmp_path, "glyphs", 0.7, pretrained="step-2")
    put(tmp_path, "glyphs/shift", 0.69, pretrained="step-2")
    study = robustness_study(tmp_path, "fit")
    (pair,) = study["pairs"]
    assert (pair["in"], pair["out"]) == ("glyphs", "glyphs/shift")
    assert pair["baseline"]["num_models"] == 3 and pair["baseline"]["from"] == "fit"
    assert pair["models"][0]["relative"] == 0.69 - 0.7
    # The zero-shot classifier lies above the line, and has no part in it.
    assert pair["models"][0]["effective"] > 0.05
    assert "not models trained on one data set alone" in note_of(study, "probes of this folder")


def test_checkpoints_of_a_run_make_a_line_where_no_probe_has_both_accuracies(tmp_path):
    points = ((0.3, 0.2), (0.5, 0.4), (0.6, 0.5))
    for number, (inside, outside) in enumerate(points):
        put(tmp_path, "icons", inside, pretrained=f"step-{number}")
        put(tmp_path, "icons/shift", outside, pretrained=f"step-{number}")
        put(tmp_path, "icons", 0.9, pretrained=f"step-{number}", task=PROBE)
    study = robustness_study(tmp_path, "fit")
    (pair,) = study["pairs"]
    line = fit_baseline([x for x, _ in points], [y for _, y in points])
    assert pair["baseline"]["slope"] == line.slope and pair["baseline"]["num_models"] == 3
    assert "checkpoints of one run" in note_of(study, "the line goes through")


def test_without_a_baseline_and_without_a_probe_nothing_is_made_up(tmp_path):
    put(tmp_path, "icons", 0.5)
    put(tmp_path, "icons/shift", 0.3)
    # A probe under the shift alone is enough to compare with.
    put(tmp_path, "icons", 0.6, pretrained="run")
    put(tmp_path, "icons/shift", 0.4, pretrained="run")
    put(tmp_path, "icons/shift", 0.5, pretrained="run", task=PROBE)
    study = robustness_study(tmp_path)
    (pair,) = study["pairs"]
    assert pair["baseline"] is None
    first, second = pair["models"]
    assert (first["effective"], first["gap_closed"], first["relative"]) == (None, None, None)
    assert second["relative"] == 0.4 - 0.5
    assert "1 x probe without accuracy on icons, such as ViT-B-32 run" in note_of(study, "left out")


def test_a_model_that_loses_nothing_where_the_line_does_not_either(tmp_path):
    put(tmp_path / "results", "imagenet1k", 0.5)
    put(tmp_path / "results", "imagenetv2", 0.4)
    table = tmp_path / "line.csv"
    table.write_text("model,imagenet1k,imagenetv2\na,0.25,0.25\nb,0.5,0.5\nc,0.75,0.75\nd,0.5,\n")
    study = robustness_study(tmp_path / "results", str(table))
    baseline = study["pairs"][0]["baseline"]
    assert (baseline["slope"], baseline["num_models"]) == (pytest.approx(1.0), 3)
    assert "1 x baseline without accuracy on imagenetv2, such as d" in note_of(study, "left out")
    json.dumps(study, allow_nan=False)


def test_sets_are_named_and_their_classes_compared(tmp_path):
    put(tmp_path, "pets", 0.8, num_classes=37)
    put(tmp_path, "pets-drawn", 0.6, num_classes=12)
    put(tmp_path, "pets_blurred", 0.7, num_classes=37)
    study = robustness_study(tmp_path, None, "pets", ["pets-drawn", "pets-blurred"])
    assert [pair["out"] for pair in study["pairs"]] == ["pets-drawn", "pets_blurred"]
    assert "pets-drawn has 12 classes and pets 37" in note_of(study, "classes")


def test_accuracies_without_a_logit_are_counted_and_have_no_robustness(tmp_path):
    put(tmp_path / "results", "imagenet1k", 1.0)
    put(tmp_path / "results", "imagenetv2", 0.5)
    table = tmp_path / "line.csv"
    table.write_text("model,imagenet1k,imagenetv2\na,0.25,0.2\nb,0.5,0.4\nc,1,0.75\nd,0.5,0\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = robustness_study(tmp_path / "results", str(table))
    (pair,) = study["pairs"]
    assert pair["baseline"]["num_models"] == 2
    assert (pair["models"][0]["effective"], pair["models"][0]["gap_closed"]) == (None, None)
    assert "2 x model of the baseline with an accuracy of 0 or 1" in note_of(study, "left out")


ROBUSTNESS_MISTAKES = {
    "no pair": (
        None,
        None,
        [],
        "no data set with a shifted form of it, but glyphs, pets; name them",
    ),
    "unknown in": (None, "dogs", ["pets"], "has no accuracy on dogs; it has glyphs, pets"),
    "unknown out": (None, "pets", ["dogs"], "has no accuracy on dogs"),
    "out of the same": (None, "pets", ["pets"], "no data set with a shifted form"),
    "one model": ("fit", "pets", ["glyphs"], "no baseline of pets and glyphs .* there are 1; give"),
    "no table": ("none.csv", "pets", ["glyphs"], "cannot read none.csv: No such file"),
}


@pytest.mark.parametrize("mistake", ROBUSTNESS_MISTAKES)
def test_mistakes_of_robustness_get_one_line(tmp_path, mistake):
    baseline, in_name, out_names, message = ROBUSTNESS_MISTAKES[mistake]
    put(tmp_path, "pets", 0.8)
    put(tmp_path, "glyphs", 0.6)
    with pytest.raises(DataError, match=message) as raised:
        robustness_study(tmp_path, baseline, in_name, out_names)
    assert len(str(raised.value).splitlines()) == 1


def test_out_without_in_is_refused_where_it_is_not_clear(tmp_path):
    for dataset in ("imagenet1k", "glyphs", "mine"):
        put(tmp_path, dataset, 0.5)
    with pytest.raises(DataError, match="--out needs --in"):
        robustness_study(tmp_path, out_names=["mine"])
    (tmp_path / "glyphs_openai_ViT-B-32_en_zeroshot_classification.json").unlink()
    assert robustness_study(tmp_path, out_names=["mine"])["pairs"][0]["in"] == "imagenet1k"


def test_models_on_one_side_alone_make_no_study(tmp_path):
    put(tmp_path, "glyphs", 0.5, pretrained="a")
    put(tmp_path, "glyphs/shift", 0.4, pretrained="b")
    table = tmp_path / "line.csv"
    table.write_text("model,glyphs,glyphs/shift\na,0.5,0.4\nb,0.6,0.5\n")
    message = "no model with accuracies on both .* 1 x zero-shot without accuracy on glyphs/shift"
    for baseline in (None, str(table)):
        with pytest.raises(DataError, match=message):
            robustness_study(tmp_path, baseline)


def test_accuracies_of_strangers_are_no_shares(tmp_path):
    put(tmp_path, "glyphs", 0.5)
    put(tmp_path, "glyphs/shift", 76.2)
    with pytest.raises(
        DataError, match=r"acc1 of ViT-B-32 openai on glyphs/shift is 76.2, not a share"
    ):
        robustness_study(tmp_path)


TABLES = {
    "no model": (
        "name,glyphs\na,0.5\n",
        "a table with a column model, .* first line has name, glyphs",
    ),
    "a column twice": ("model,glyphs,glyphs\n", "each column once"),
    "nothing": ("", "its first line has none"),
    "a set missing": ("model,glyphs\na,0.5\n", "has no column glyphs-shift; its columns are model"),
    "a short row": ("model,glyphs,glyphs/shift\na,0.5\n", "line 2: 2 fields under 3 columns"),
    "a word": ("model,glyphs,glyphs/shift\na,high,0.5\n", "line 2: glyphs is 'high', not a number"),
    "nan": ("model,glyphs,glyphs/shift\na,nan,0.5\n", "line 2: glyphs is 'nan', not a number"),
    "more than all": (
        "model,glyphs,glyphs/shift\na,50,120\n",
        "is 120, not an accuracy from 0 to 100",
    ),
    "negative": (
        "model,glyphs,glyphs/shift\na,-0.5,0.2\n",
        "is -0.5, not an accuracy from 0 to 1;",
    ),
    "one model": ("model,glyphs,glyphs/shift\na,0.5,0.2\n", "there are 1; give a table of models"),
    "a quote": ('model,glyphs,glyphs/shift\n"a,0.5,0.2\n', "is not a csv table: unexpected end"),
    "a long field": (
        "model,glyphs,glyphs/shift\n" + "a" * 200_000 + "\n",
        "is not a csv table: field",
    ),
    "many rows": ("model,glyphs,glyphs/shift\n" + "a,,\n" * 10_001, "more than 10,000 rows"),
    "too long": ("\n" * (1 << 20) + "\n", "more than 1 MB, which no table of models has"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_that_are_no_baseline_get_one_line(tmp_path, kind):
    content, message = TABLES[kind]
    put(tmp_path / "results", "glyphs", 0.5)
    put(tmp_path / "results", "glyphs/shift", 0.4)
    table = tmp_path / "baseline.csv"
    table.write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        robustness_study(tmp_path / "results", str(table))
    assert "baseline.csv" in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_a_pipe_or_another_encoding_is_no_table(tmp_path):
    put(tmp_path / "results", "glyphs", 0.5)
    put(tmp_path / "results", "glyphs/shift", 0.4)
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "latin.csv").write_bytes(b"model,glyphs\ncaf\xe9,0.5\n")
    for name, message in (("pipe.csv", "Not a regular file"), ("latin.csv", "is not UTF-8")):
        with pytest.raises(DataError, match=message):
            robustness_study(tmp_path / "results", str(tmp_path / name))
