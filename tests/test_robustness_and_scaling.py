"""Fits over many models: the digits that published tables give, and what cannot be fitted."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from clipcore.evaluate.robustness import (
    BaselineFit,
    effective_robustness,
    fit_baseline,
    gap_closed,
)
from clipcore.evaluate.scaling import fit_power_law, leave_out_largest

pytestmark = pytest.mark.fast

FIGURES = Path(__file__).parent / "figures"


def columns(file: str, *names: str) -> list[list[float]]:
    """Return columns of a table of figures, without the rows in which one of them is empty."""
    with open(FIGURES / file, newline="") as table:
        rows = [[row[name] for name in names] for row in csv.DictReader(table)]
    kept = [[float(value) for value in row] for row in rows if all(row)]
    return [list(column) for column in zip(*kept, strict=True)]


# Of the 85 models of the ImageNet testbed (Taori et al. 2020) that were trained on ImageNet alone and reach 55%.
# The lines of Sketch and R are also those of an independent public script.
LINES = {
    ("val", "v2"): (0.923229, -0.497690, 0.996),
    ("val", "sketch"): (1.070915, -2.370073, 0.869),
    ("val", "r"): (0.911591, -1.599915, 0.877),
    ("val", "objectnet"): (1.199267, -2.024250, 0.941),
    ("val_on_objectnet", "objectnet"): (0.980910, -1.928289, 0.953),
    ("val_on_r", "r"): (0.636844, -2.107716, 0.889),
    ("val_on_vid", "vid_pm0"): (0.533558, -1.461723, 0.949),
}


@pytest.mark.parametrize(("x", "y"), LINES)
def test_the_line_of_models_without_robustness(x, y):
    slope, intercept, r2 = LINES[x, y]
    percent = columns("shift_standard_models.csv", x, y)
    fit = fit_baseline(*([value / 100 for value in column] for column in percent))
    assert fit.num_models == (80 if y == "r" else 85)
    assert abs(fit.slope - slope) < 5e-6 and abs(fit.intercept - intercept) < 5e-6
    assert abs(fit.r2 - r2) < 6e-4


@pytest.mark.parametrize(
    ("out", "zero_shot", "probe"),
    [
        ("v2", (0.701, 6.07), (0.759, 0.26)),
        ("sketch", (0.602, 35.67), (0.574, 19.14)),
        ("r", (0.889, 52.06), (0.842, 33.94)),
        ("objectnet", (0.723, 37.52), (0.662, 13.85)),
    ],
)
def test_effective_robustness_of_the_papers_model(out, zero_shot, probe):
    """Its accuracies are those of the paper's table 16: 76.2% zero-shot and 85.4% with a probe on ImageNet."""
    slope, intercept, r2 = LINES["val", out]
    fit = BaselineFit(slope, intercept, r2, 85)
    for in_accuracy, (out_accuracy, points) in ((0.762, zero_shot), (0.854, probe)):
        found = 100 * effective_robustness(fit, in_accuracy, out_accuracy)
        assert abs(found - points) < 0.006
    assert abs(effective_robustness(fit, 0.6, fit.expected(0.6))) < 1e-12


def test_the_gap_that_a_model_closes():
    fit = BaselineFit(1.0, -1.0, 1.0, 2)
    on_line = fit.expected(0.8)
    assert abs(gap_closed(fit, 0.8, on_line)) < 1e-12
    assert gap_closed(fit, 0.8, 0.8) == 1.0
    assert gap_closed(fit, 0.8, (0.8 + on_line) / 2) == pytest.approx(0.5, abs=1e-12)
    assert gap_closed(fit, 0.8, on_line - 0.1) < 0
    assert math.isnan(gap_closed(BaselineFit(1.0, 0.0, 1.0, 2), 0.5, 0.4))


def test_a_line_is_found_again_and_infinite_logits_are_left_out():
    line = BaselineFit(0.8, -1.2, 1.0, 5)
    x = [0.3, 0.5, 0.7, 0.9, 0.95]
    fit = fit_baseline([*x, 1.0, 0.5], [*map(line.expected, x), 0.5, 0.0])
    assert fit.num_models == 5 and fit.r2 == pytest.approx(1.0)
    assert (fit.slope, fit.intercept) == pytest.approx((0.8, -1.2))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([0.5, 0.6], [0.5], "2 accuracies .* do not fit 1"),
        ([0.5, 76.2], [0.5, 0.6], "a share from 0 to 1, not 76.2"),
        ([0.5, math.nan], [0.5, 0.6], "not nan"),
        ([0.5, 0.5], [0.4, 0.6], "two different models; there are 1"),
        ([0.5, 1.0], [0.4, 0.6], "two different models; there are 1"),
        ([], [], "there are 0"),
    ],
)
def test_accuracies_that_make_no_line_are_named(x, y, message):
    with pytest.raises(ValueError, match=message):
        fit_baseline(x, y)


# Figures of Cherti et al. 2023: the factor and the exponent of three CLIP models, of 29 of open_clip, and of the best of
# these in each of five bins.
LAWS = {
    "imagenet1k": ((23.1836, -0.16377), (4.9565, -0.10125), (5.8581, -0.11139)),
    "imagenet_robustness": ((211.66, -0.23784), (7.6898, -0.10660), (11.6087, -0.12554)),
    "vtab+": ((5.5572, -0.09079), (1.5701, -0.04174), (1.5619, -0.04360)),
    "mscoco_captions": ((1.5886, -0.05076), (2.4321, -0.07125), (2.7497, -0.07943)),
    "flickr30k": ((2.2084, -0.10285), (12.0547, -0.17220), (15.5060, -0.18916)),
}


@pytest.mark.parametrize("task", LAWS)
def test_laws_of_published_models(task):
    with open(FIGURES / "scaling_runs.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    fits = ((True, None, 3), (False, None, 29), (False, 5, 5))
    for (is_theirs, num_bins, num_models), (factor, exponent) in zip(fits, LAWS[task], strict=True):
        chosen = [row for row in rows if (row["data"] == "CLIP-WIT") == is_theirs]
        compute, error = (
            [float(row["gmacs"]) for row in chosen],
            [1 - float(row[task]) for row in chosen],
        )
        law = fit_power_law(compute, error, num_bins)
        assert law.num_models == num_models
        assert abs(law.exponent - exponent) < 5.1e-6
        assert law.factor == pytest.approx(factor, rel=5e-5 / factor if factor < 100 else 5e-5)


# open_clip's measurements of OpenAI's five ResNets: GFLOPs of an image, mean error of 38 data sets and ImageNet's.
RESNETS = [12.22, 19.54, 42.56, 149.39, 529.11]
MEAN_ERRORS = [0.5190, 0.4967, 0.4812, 0.4330, 0.3939]


def test_the_papers_law_and_what_it_says_of_the_largest_model():
    law = fit_power_law(RESNETS, MEAN_ERRORS)
    assert (law.factor, law.exponent) == pytest.approx((0.62245, -0.07244), abs=5e-6)
    assert abs(law.r2 - 0.9935) < 5e-5
    # In any order of the models.
    found = leave_out_largest(RESNETS[::-1], MEAN_ERRORS[::-1])
    assert found.actual == 0.3939 and found.law.num_models == 4
    assert found.law == fit_power_law(RESNETS[:4], MEAN_ERRORS[:4])
    assert found.predicted == pytest.approx(0.39820, abs=5e-6)


def test_a_law_is_found_again_and_the_best_of_each_bin():
    compute = [10.0**k for k in range(1, 7)]
    exact = [2.0 * c**-0.1 for c in compute]
    law = fit_power_law(compute, exact)
    assert (law.factor, law.exponent, law.r2) == pytest.approx((2.0, -0.1, 1.0))
    assert law.error(1e9) == pytest.approx(2.0 * 1e9**-0.1)
    # Runs that are worse than others of like compute do not matter to it: edges at 10^1, 10^3.55 and 10^6.1.
    binned = fit_power_law(compute, exact, num_bins=2)
    slope = math.log10(exact[5] / exact[2]) / 2.55
    assert binned.num_models == 2 and binned.exponent == pytest.approx(slope)
    worse = fit_power_law([*compute, 1e2, 1e5], [*exact, 1.9, 1.9], num_bins=2)
    assert worse == binned


@pytest.mark.parametrize(
    ("compute", "error", "message"),
    [
        ([1.0, 2.0], [0.5], "2 models have 1 errors"),
        ([1.0, 2.0], [0.5, 0.0], "leave out a model without error"),
        ([1.0, math.inf], [0.5, 0.4], "are positive"),
        ([1.0, -1.0], [0.5, 0.4], "are positive"),
        ([2.0, 2.0], [0.5, 0.4], "two different amounts of compute; there are 1"),
    ],
)
def test_models_that_make_no_law_are_named(compute, error, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(compute, error)


def test_errors_that_are_not_the_models_are_no_prediction():
    with pytest.raises(ValueError, match="3 models have 5 errors"):
        leave_out_largest([1.0, 10.0, 100.0], [0.5, 0.4, 0.3, 0.2, 0.1])
    with pytest.raises(ValueError, match="4 models have 2 errors"):
        leave_out_largest([1.0, 10.0, 100.0, 1000.0], [0.5, 0.4])


def test_a_fit_to_no_bin_is_refused():
    with pytest.raises(ValueError, match="at least one bin, not 0"):
        fit_power_law([1.0, 2.0], [0.5, 0.4], num_bins=0)
