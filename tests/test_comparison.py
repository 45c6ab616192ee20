"""Two models on the sets that both have: the paper's 16 of 27, and folders that have nothing in common."""

from __future__ import annotations

import math

import numpy as np
import pytest
from result_folders import (
    PROBE,
    ZERO_SHOT,
    note_of,
    put,
)

from clipcore.data import DataError
from clipcore.evaluate.comparison import compare, pearson, slope_interval
from clipcore.evaluate.results import Result, write_result

pytestmark = pytest.mark.fast


# Figure 5: how far the paper's zero-shot classifier is above a supervised probe, in points.
FIGURE_5 = {
    "cars": 28.9,
    "country211": 23.2,
    "food101": 22.5,
    "k700": 14.5,
    "sst2": 12.4,
    "sun397": 7.8,
    "ucf101": 7.7,
    "memes": 6.7,
    "cifar10": 3.9,
    "cifar100": 3.0,
    "stl10": 3.0,
    "fer2013": 2.8,
    "caltech101": 2.0,
    "imagenet1k": 1.9,
    "pets": 1.1,
    "voc2007": 0.5,
    "birdsnap": -3.2,
    "mnist": -10.0,
    "aircraft": -11.3,
    "resisc45": -11.9,
    "flowers": -12.5,
    "dtd": -16.6,
    "clevr": -18.2,
    "gtsrb": -18.4,
    "pcam": -19.5,
    "kitti": -34.0,
    "eurosat": -37.1,
}


def test_the_papers_zero_shot_classifier_wins_16_of_27_sets(tmp_path):
    for number, (name, points) in enumerate(FIGURE_5.items()):
        probe = 0.4 + number / 100
        put(tmp_path, name, probe + points / 100)
        put(tmp_path, name, probe, task=PROBE)
    study = compare(tmp_path)
    assert (study["wins"], study["losses"], study["ties"]) == (16, 11, 0)
    assert study["a"] == "ViT-B-32 openai, zero-shot"
    assert study["b"] == "ViT-B-32 openai, linear probe"
    assert [row["dataset"] for row in study["sets"]][::26] == ["cars", "eurosat"]
    found = [100 * row["difference"] for row in study["sets"]]
    assert found == pytest.approx(sorted(FIGURE_5.values(), reverse=True))


def test_two_folders_of_different_spellings_and_sets_that_one_lacks(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, prefix in ((a, ""), (b, "wds_")):
        put(folder, f"{prefix}pets", 0.5, f"RN{folder.name}", metric="mean_per_class_recall")
        put(folder, f"{prefix}cars", 0.6 if folder == a else 0.3, f"RN{folder.name}")
    put(a, "only-a", 0.5, "RNa")
    put(b, "only-b", 0.5, "RNb")
    put(b, "cars-b", 0.5, "RNb", task=PROBE)
    put(a, "memes", 0.5, "RNa", metric="roc_auc")
    put(b, "memes", 0.5, "RNb")
    study = compare(a, b)
    assert (study["wins"], study["losses"], study["ties"]) == (1, 0, 1)
    assert [row["metric"] for row in study["sets"]] == ["acc1", "mean_per_class_recall"]
    assert study["sets"][0]["difference"] == 0.6 - 0.3
    left_out = note_of(study, "left out")
    assert "1 x set without a metric of both, such as memes" in left_out
    assert "1 x set of the first only, such as only-a" in left_out
    assert "1 x set of the second only, such as only-b" in left_out
    # Two sets have a slope, but no interval of it.
    assert study["slope"] == pytest.approx(-0.5) and study["interval"] is None


def test_files_of_single_results_are_compared(tmp_path):
    put(tmp_path / "a", "wds_pets", 0.5)
    put(tmp_path / "b", "pets", 0.75, task=PROBE)
    (a,), (b,) = (sorted((tmp_path / side).glob("*.json")) for side in "ab")
    study = compare(a, b)
    assert study["sets"] == [
        {"dataset": "wds_pets", "metric": "acc1", "a": 0.5, "b": 0.75, "difference": -0.25}
    ]
    assert (study["pearson"], study["slope"], study["interval"]) == (None, None, None)


def test_models_of_one_folder_are_named(tmp_path):
    for pretrained, value in (("openai", 0.5), ("runs/mine", 0.75)):
        put(tmp_path, "pets", value, pretrained=pretrained)
    put(tmp_path, "pets", 0.9, task=PROBE)
    with pytest.raises(
        DataError, match="zero-shot of 2 models; name one with --model-a: ViT-B-32 op"
    ):
        compare(tmp_path)
    study = compare(tmp_path, model_a="openai")
    assert study["sets"][0]["b"] == 0.9
    study = compare(tmp_path, model_a="runs/mine", model_b="ViT-B-32 openai")
    assert study["sets"][0]["difference"] == 0.25
    # The probe of another model is not taken for it.
    with pytest.raises(
        DataError, match="no linear probe of ViT-B-32 runs/mine; it has that of ViT-B"
    ):
        compare(tmp_path, model_a="runs/mine")
    with pytest.raises(DataError, match="has no zero-shot of RN50; it has that of"):
        compare(tmp_path, tmp_path, model_a="RN50")


def test_comparisons_that_have_nothing_in_common(tmp_path):
    put(tmp_path / "a", "pets", 0.5)
    put(tmp_path / "b", "cars", 0.5)
    with pytest.raises(DataError, match=r"no data set has both: .* has pets; .* has cars"):
        compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(DataError, match="has no result of linear probe"):
        compare(tmp_path / "a")
    with pytest.raises(DataError, match=r"cannot read .*none.json: No such file"):
        compare(tmp_path / "a", tmp_path / "none.json")


def test_results_of_one_set_under_two_spellings_are_refused(tmp_path):
    put(tmp_path, "pets", 0.5)
    put(tmp_path, "wds_pets", 0.6)
    put(tmp_path, "pets", 0.6, task=PROBE)
    message = "two results of ViT-B-32 openai on pets .zero-shot., of 'pets' and 'wds_pets'; remove"
    with pytest.raises(DataError, match=message):
        compare(tmp_path)


def test_probes_of_few_images_and_other_languages_are_told_apart(tmp_path):
    put(tmp_path, "pets", 0.5)
    for shots, value in ((-1, 0.9), (4, 0.6)):
        metrics = {"lp_acc1": value, "fewshot_k": shots}
        result = Result(f"{'wds_' * (shots > 0)}pets", "ViT-B-32", "openai", PROBE, metrics)
        write_result(tmp_path, result)
    write_result(
        tmp_path, Result("pets", "ViT-B-32", "openai", ZERO_SHOT, {"acc1": 0.1}, language="de")
    )
    study = compare(tmp_path)
    assert [row["b"] for row in study["sets"]] == [0.9]
    note = note_of(study, "left out")
    assert "1 x probe of a few images a class, such as wds_pets" in note
    assert "1 x set of the first only, such as pets" in note


def test_slope_and_correlation_are_those_of_numpy_and_a_line_is_certain():
    x = np.array([0.2, 0.4, 0.5, 0.9, 0.7])
    y = np.array([0.3, 0.35, 0.6, 0.8, 0.9])
    assert pearson(x, y) == pytest.approx(np.cov(x, y)[0, 1] / x.std(ddof=1) / y.std(ddof=1))
    assert pearson(x, np.full(5, 0.5)) is None and pearson(x[:1], y[:1]) is None
    assert slope_interval(x, 0.25 + 0.5 * x) == pytest.approx([0.5, 0.5])
    assert slope_interval(x[:2], y[:2]) is None and slope_interval(np.full(5, 0.5), y) is None

    # The same draws, one after another.
    drawn = np.random.default_rng(0).integers(5, size=(400, 5))
    slopes = [np.polyfit(x[rows], y[rows], 1)[0] for rows in drawn if np.ptp(x[rows]) > 0]
    expected = np.quantile(slopes, [0.025, 0.975])
    assert slope_interval(x, y, num_resamples=400) == pytest.approx(list(expected))
    low, high = slope_interval(x, y) or (math.nan, math.nan)
    assert low < np.polyfit(x, y, 1)[0] < high
