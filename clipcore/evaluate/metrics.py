"""The metrics of evaluations, and their confidence intervals.

Legend: N images, C classes.

Sources: the metrics of Radford et al. 2021, table 9; VOC2007's mean of precisions at eleven recalls (Everingham et al.
2010); the intervals of Wilson (1927) for shares, and of Clopper and Pearson (1934) for few images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor


def chance_of(metric: str, num_classes: int) -> float | None:
    """Return the chance level of a metric; None if it depends on the images.

    Args:
        metric: its name in a zero-shot result.
    """
    if metric == "roc_auc":
        return 0.5
    if metric in ("acc1", "mean_per_class_recall") and num_classes > 0:
        return 1 / num_classes
    if metric == "acc5" and num_classes >= 5:
        return 5 / num_classes
    if metric == "mean_acc1_acc5" and num_classes >= 5:
        return (1 + 5) / 2 / num_classes
    return None


def top_k_accuracy(scores_NC: Tensor, labels_N: Tensor, k: int) -> float | None:
    """Return the share of images whose class is among the k best; None for fewer than k classes.

    The lower class index wins a tie.

    Raises:
        ValueError: a score is not a number.
    """
    if scores_NC.isnan().any():
        raise ValueError("a score is not a number; look at the model")
    if k > scores_NC.shape[1]:
        return None
    own_N = scores_NC.gather(1, labels_N[:, None])
    is_lower = torch.arange(scores_NC.shape[1], device=labels_N.device) < labels_N[:, None]
    is_better = (scores_NC > own_N) | ((scores_NC == own_N) & is_lower)
    return (is_better.sum(1) < k).double().mean().item()


def mean_per_class_recall(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Return the mean recall over the classes that occur."""
    num_classes = int(torch.stack([predicted_N, labels_N]).max()) + 1
    count_C = torch.bincount(labels_N, minlength=num_classes)
    right_C = torch.bincount(labels_N[predicted_N == labels_N], minlength=num_classes)
    occurs = count_C > 0
    return (right_C[occurs].double() / count_C[occurs]).mean().item()


def roc_auc(scores_N: Tensor, is_positive_N: Tensor) -> float:
    """Return the share of pairs of a positive and a negative image in which the positive has the higher score.

    Equal scores count as one half.

    Raises:
        ValueError: one of the two kinds is missing.
    """
    is_positive_N = is_positive_N.bool()
    num_positive = int(is_positive_N.sum())
    num_negative = len(is_positive_N) - num_positive
    if not num_positive or not num_negative:
        raise ValueError("the area under the ROC curve needs images of both classes")
    # Ranks from 1; equal scores share the mean of theirs.
    _, place_N, count = scores_N.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    rank_N = (last - (count - 1) / 2)[place_N]
    excess = rank_N[is_positive_N].sum().item() - num_positive * (num_positive + 1) / 2
    return excess / (num_positive * num_negative)


def average_precision(scores_N: Tensor, is_positive_N: Tensor) -> float:
    """Return the area under the step curve of precision over recall: the mean precision at the positive images.

    Images with equal scores are counted together, as in scikit-learn.
    """
    precision, recall = _precision_and_recall(scores_N, is_positive_N)
    gained = recall.diff(prepend=recall.new_zeros(1))
    return (precision * gained).sum().item()


def average_precision_11(scores_N: Tensor, is_positive_N: Tensor) -> float:
    """Return the mean of the best precisions at recalls of at least 0, 0.1, ..., 1, as in VOC2007."""
    precision, recall = _precision_and_recall(scores_N, is_positive_N)
    # A recall of 3 in 10 must reach 0.3, whatever the rounding of either.
    reached = [precision[recall >= tenth / 10 - 1e-9] for tenth in range(11)]
    return sum(part.max().item() for part in reached) / 11


def mean_over_classes(
    metric: Callable[[Tensor, Tensor], float],
    scores_NC: Tensor,
    is_positive_NC: Tensor,
    is_counted_NC: Tensor | None = None,
) -> float:
    """Return the mean of a metric of scores and positives over the classes that have a positive image.

    Args:
        is_counted_NC: False excludes an image from a class, such as VOC's difficult objects [all count].

    Raises:
        ValueError: no class has a positive image.
    """
    found = []
    for number in range(scores_NC.shape[1]):
        chosen = slice(None) if is_counted_NC is None else is_counted_NC[:, number]
        is_positive = is_positive_NC[chosen, number]
        if is_positive.any():
            found.append(metric(scores_NC[chosen, number], is_positive))
    if not found:
        raise ValueError("no class has a positive image")
    return sum(found) / len(found)


def _precision_and_recall(scores_N: Tensor, is_positive_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return precision and recall at each distinct score, from the highest down."""
    scores_N, order = scores_N.sort(descending=True, stable=True)
    is_positive_N = is_positive_N.bool()[order]
    if not is_positive_N.any():
        raise ValueError("precision and recall need a positive image")
    is_last = torch.ones_like(is_positive_N)
    is_last[:-1] = scores_N[1:] != scores_N[:-1]
    right = is_positive_N.cumsum(0)[is_last].double()
    taken = torch.arange(1, len(scores_N) + 1, device=scores_N.device)[is_last]
    return right / taken, right / right[-1]


def wilson_interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the confidence interval of a share from its hits, after Wilson."""
    _check_counts(hits, trials)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = hits / trials, z * z / trials
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return max(low, 0.0), min(high, 1.0)


def clopper_pearson_interval(
    hits: int, trials: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the exact (never too narrow) confidence interval of a share from its hits, after Clopper and Pearson."""
    _check_counts(hits, trials)
    outside = (1 - confidence) / 2
    low = _share_where(lambda share: binomial_tail(hits, trials, share) > outside) if hits else 0.0
    high = 1.0
    if hits < trials:
        high = 1 - _share_where(lambda share: binomial_tail(trials - hits, trials, share) > outside)
    return low, high


def binomial_tail(hits: int, trials: int, share: float) -> float:
    """Return the probability of at least this many hits, if each trial hits with a probability of ``share``."""
    _check_counts(hits, trials)
    if not 0 <= share <= 1:
        raise ValueError(f"a probability is from 0 to 1, not {share:g}")
    if hits == 0 or share == 1:
        return 1.0
    if share == 0:
        return 0.0
    # In logarithms, so that factorials do not overflow; the smaller tail is summed.
    is_upper = hits > trials * share
    k = torch.arange(hits, trials + 1) if is_upper else torch.arange(hits)
    k = k.double()
    log_ways = math.lgamma(trials + 1) - torch.lgamma(k + 1) - torch.lgamma(trials - k + 1)
    total = (log_ways + k * math.log(share) + (trials - k) * math.log1p(-share)).exp().sum().item()
    return min(total if is_upper else 1 - total, 1.0)


def _share_where(holds: Callable[[float], bool]) -> float:
    """Return the smallest share at which a condition holds, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _check_counts(hits: int, trials: int) -> None:
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} hits in {trials} trials")
