"""Metrics against hand-made rankings and scikit-learn, intervals against published figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from clipcore.evaluate.metrics import (
    average_precision,
    average_precision_11,
    binomial_tail,
    clopper_pearson_interval,
    mean_over_classes,
    mean_per_class_recall,
    roc_auc,
    top_k_accuracy,
    wilson_interval,
)

pytestmark = pytest.mark.fast


def test_the_best_classes_and_ties():
    scores = torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    labels = torch.tensor([1, 1, 2])
    assert top_k_accuracy(scores, labels, 1) == pytest.approx(1 / 3)
    assert top_k_accuracy(scores, labels, 2) == pytest.approx(2 / 3)
    assert top_k_accuracy(scores, labels, 3) == 1.0
    assert top_k_accuracy(scores, labels, 5) is None


def drawn(num_images: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_images)
    scores = torch.randn(num_images, num_classes, generator=generator, dtype=torch.float64)
    return scores, torch.randint(num_classes, (num_images,), generator=generator)


def test_accuracies_are_scikit_learns():
    scores, labels = drawn(500, 7)
    for k in (1, 2, 5):
        theirs = top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k)
        assert top_k_accuracy(scores, labels, k) == pytest.approx(theirs, abs=1e-12)
    predicted = scores.argmax(1)
    theirs = recall_score(labels.numpy(), predicted.numpy(), average="macro")
    assert mean_per_class_recall(predicted, labels) == pytest.approx(theirs, abs=1e-12)


def test_recall_is_of_the_classes_that_occur():
    predicted, labels = torch.tensor([0, 0, 5, 3]), torch.tensor([0, 0, 0, 3])
    assert mean_per_class_recall(predicted, labels) == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("num_values", [3, 1000])
def test_rankings_are_scikit_learns_with_ties_and_without(num_values):
    draw = np.random.default_rng(num_values)
    for share in (0.1, 0.5, 0.9):
        scores = torch.from_numpy(draw.integers(num_values, size=200) / num_values)
        is_positive = torch.from_numpy(draw.random(200) < share)
        y, s = is_positive.numpy(), scores.numpy()
        assert roc_auc(scores, is_positive) == pytest.approx(roc_auc_score(y, s), abs=1e-12)
        theirs = average_precision_score(y, s)
        assert average_precision(scores, is_positive) == pytest.approx(theirs, abs=1e-12)


def test_rankings_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.8, 0.3])
    is_positive = torch.tensor([True, False, True, False])
    # Three of four pairs are right, one is a tie.
    assert roc_auc(scores, is_positive) == 3.5 / 4
    # Precision 1 up to half of the recall, then 2/3.
    assert average_precision(scores, is_positive) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert average_precision_11(scores, is_positive) == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_eleven_points_take_a_recall_of_three_tenths_for_one():
    scores = torch.arange(20, 0, -1).double()
    is_positive = torch.zeros(20, dtype=torch.bool)
    is_positive[[0, 1, 2, 5, 6, 7, 8, 9, 10, 11]] = True
    # 3 of 10 with precision 1, then 10 of 12 at best.
    expected = (4 * 1.0 + 7 * 10 / 12) / 11
    assert average_precision_11(scores, is_positive) == pytest.approx(expected)


def test_the_mean_over_classes_leaves_out_what_it_is_told_to():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.5, 0.9, 0.4], [0.1, 0.2, 0.3]])
    is_positive = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    # The third class has no positive image.
    of_first, of_second = 0.5 + 0.5 * 2 / 3, 1 / 2
    found = mean_over_classes(average_precision, scores, is_positive)
    assert found == pytest.approx((of_first + of_second) / 2)
    is_counted = torch.ones_like(is_positive)
    is_counted[1] = False  # difficult
    assert mean_over_classes(average_precision, scores, is_positive, is_counted) == 1.0


@pytest.mark.parametrize("metric", [average_precision, average_precision_11, roc_auc])
def test_a_ranking_without_a_positive_image_is_refused(metric):
    with pytest.raises(ValueError, match=r"positive image|both classes"):
        metric(torch.zeros(3), torch.zeros(3, dtype=torch.bool))


def test_a_mean_over_no_class_is_refused():
    with pytest.raises(ValueError, match="no class"):
        mean_over_classes(average_precision, torch.zeros(2, 2), torch.zeros(2, 2))


def test_probabilities_of_hits():
    """18 of 20 against 0.7: the sum of the three last terms."""
    assert binomial_tail(18, 20, 0.7) == pytest.approx(0.035483, abs=5e-7)
    terms = [math.comb(20, k) * 0.7**k * 0.3 ** (20 - k) for k in range(21)]
    for hits in range(21):
        assert binomial_tail(hits, 20, 0.7) == pytest.approx(math.fsum(terms[hits:]), abs=1e-12)
    assert binomial_tail(0, 5, 0.0) == 1.0 and binomial_tail(1, 5, 0.0) == 0.0
    assert binomial_tail(5, 5, 1.0) == 1.0
    # Where the factorials are beyond all floating-point numbers.
    assert 0.45 < binomial_tail(50_000, 100_000, 0.5) < 0.55


def test_intervals_of_few_images():
    """Figures of the beta distribution's quantiles."""
    assert clopper_pearson_interval(0, 10, 0.995)[0] == 0.0
    assert clopper_pearson_interval(0, 10, 0.995)[1] == pytest.approx(0.450720, abs=5e-7)
    found = clopper_pearson_interval(12, 20, 0.995)
    assert found == pytest.approx((0.277318, 0.869092), abs=5e-7)
    assert clopper_pearson_interval(10, 10, 0.995)[1] == 1.0


def test_wilsons_interval():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=5e-7)
    low, high = wilson_interval(8, 10)
    # The shares at which 8 of 10 are 1.96 standard errors away.
    for share in (low, high):
        error = math.sqrt(share * (1 - share) / 10)
        assert abs(0.8 - share) / error == pytest.approx(1.959964, abs=1e-6)
    assert wilson_interval(10, 10)[1] == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(1, 0),
        lambda: clopper_pearson_interval(3, 2),
        lambda: binomial_tail(-1, 5, 0.5),
        lambda: binomial_tail(1, 5, 1.5),
    ],
)
def test_counts_that_cannot_be_are_refused(call):
    with pytest.raises(ValueError, match=r"hits in|from 0 to 1"):
        call()


def test_scores_that_are_no_numbers_are_no_right_answers():
    with pytest.raises(ValueError, match="a score is not a number"):
        top_k_accuracy(torch.full((4, 5), math.nan), torch.arange(4), 1)
    lowest = torch.tensor([[0.0, -math.inf]])
    assert top_k_accuracy(lowest, torch.tensor([1]), 1) == 0.0
