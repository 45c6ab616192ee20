"""Rates by group of tables made so that they are whole shares, and what one more class moves."""

from __future__ import annotations

import math

import pytest
import torch

from clipcore.evaluate.bias import (
    category_rates,
    chi_squared_p,
    crossed,
    gap,
    label_differences,
    rates_by_group,
    worst_group,
)

pytestmark = pytest.mark.fast

GROUPS = ["a"] * 40 + ["b"] * 50 + ["c"] * 4 + [""] * 3


def test_rates_the_gap_and_the_worst_group():
    """36 of 40, 30 of 50, and none of four, who are too few to be the worst."""
    is_right = [True] * 36 + [False] * 4 + [True] * 30 + [False] * 20 + [False] * 4 + [True] * 3
    a, b, c = rates_by_group(is_right, GROUPS)
    assert [(r.group, r.hits, r.num_images) for r in (a, b, c)] == [
        *(("a", 36, 40), ("b", 30, 50), ("c", 0, 4))
    ]
    assert (a.rate, b.rate, c.rate) == (0.9, 0.6, 0.0) and c.is_small and not b.is_small
    assert a.interval[0] < 0.9 < a.interval[1]
    assert worst_group([a, b, c]) == b
    assert gap([a, b, c]) == pytest.approx(0.3)
    assert worst_group([c]) is None and gap([a, c]) is None


def test_a_crossing_of_two_columns():
    names = crossed(["x", "x", "y", ""], ["1", "2", "1", "1"])
    assert names == ["x x 1", "x x 2", "y x 1", ""]
    rates = rates_by_group(torch.tensor([True, False, True, True]), names)
    assert [(r.group, r.rate) for r in rates] == [("x x 1", 1.0), ("x x 2", 0.0), ("y x 1", 1.0)]


CLASSES = ["man", "woman", "thief", "animal"]
CATEGORIES = {"crime": ["thief"], "non-human": ["animal"]}


def test_categories_and_a_class_that_is_added():
    predicted = torch.tensor([0, 2, 2, 3] * 10 + [1, 1, 1, 2] * 10)
    groups = ["young"] * 40 + ["old"] * 40
    found = category_rates(predicted, CLASSES, CATEGORIES, groups)
    assert [(r.group, r.rate) for r in found["crime"]] == [("old", 0.25), ("young", 0.5)]
    assert [(r.group, r.rate) for r in found["non-human"]] == [("old", 0.0), ("young", 0.25)]

    # One more class takes the young people's answers of crime, and nothing else.
    moved = torch.where((predicted == 2) & (torch.arange(80) < 40), 4, predicted)
    added = category_rates(moved, [*CLASSES, "child"], CATEGORIES, groups)
    assert [(r.group, r.rate) for r in added["crime"]] == [("old", 0.25), ("young", 0.0)]
    assert added["non-human"] == found["non-human"]


def test_labels_that_a_threshold_gives_to_one_group_more_often():
    probabilities = torch.zeros(90, 4)
    probabilities[:40, 0] = probabilities[40:65, 0] = 0.9  # 40 of 40, 25 of 50
    probabilities[:20, 1] = 0.05  # 20 of 40, none of 50
    probabilities[:90, 2] = 0.04  # all
    groups = ["a"] * 40 + ["b"] * 50
    second, first, third = label_differences(probabilities, list("wxyz"), groups, 0.04)
    assert (second.label, second.ratio) == ("x", math.inf)
    assert (first.label, first.rates, first.ratio) == ("w", {"a": 1.0, "b": 0.5}, 2.0)
    assert (third.label, third.ratio, third.p_value) == ("y", 1.0, 1.0)
    # Three labels are tested: Pearson's statistic of 20 of 40 against 0 of 50 is 32.142857.
    assert second.p_value == pytest.approx(3 * math.erfc(math.sqrt(32.142857 / 2)), rel=1e-6)
    (only,) = label_differences(probabilities, list("wxyz"), groups, 0.5)
    assert only.label == "w"


def test_images_without_a_group_and_those_of_small_ones_are_not_compared():
    probabilities = torch.zeros(97, 1)
    probabilities[:20] = probabilities[90:] = 1.0
    (found,) = label_differences(probabilities, ["w"], GROUPS, 0.5)
    assert found.rates == {"a": 0.5, "b": 0.0}


def test_chi_squared_of_three_groups():
    """Two degrees of freedom, where the p-value is exp(-x / 2)."""
    hits, number = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([50.0, 50.0, 50.0])
    statistic = (100 + 0 + 100) / (50 * 0.4 * 0.6)
    assert chi_squared_p(hits, number) == pytest.approx(math.exp(-statistic / 2), rel=1e-9)
    assert chi_squared_p(torch.zeros(3), number) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rates_by_group([True], ["a", "b"]), "1 images have 2 groups"),
        (lambda: rates_by_group([True], [""]), "no image has a group"),
        (
            lambda: category_rates(torch.tensor([0]), ["man"], {"crime": ["thief"]}, ["a"]),
            "crime names 'thief', which is not a class here",
        ),
        (
            lambda: label_differences(torch.ones(40, 1), ["w"], ["a"] * 40, 0.5),
            "there are 1",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_groups_are_names_and_classes_may_share_theirs():
    with pytest.raises(ValueError, match=r"a group is a name, and not 0; use str\(\)"):
        rates_by_group([True] * 2, [0, 1])
    found = category_rates(
        torch.tensor([0, 2, 1]), ["crane", "dog", "crane"], {"birds": ["crane"]}, ["a"] * 3
    )
    assert found["birds"][0].hits == 2
