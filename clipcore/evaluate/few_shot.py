"""Few-shot probes: how many labelled images a class are worth a model's zero-shot classifier.

Legend: N images, W width of the features, K classes.

Source: Radford et al. 2021, section 3.1.5, figures 6 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipcore.evaluate.linear_probe import (
    BlockMetric,
    Metric,
    by_blocks,
    fit_linear_probe,
    members_by_class,
    search_C,
)

SHOTS = (1, 2, 4, 8, 16)
# Images a class on which C is chosen, beside those that are fitted.
_MOST_VALIDATION = 4


@dataclass(frozen=True)
class FewShotCurve:
    """Scores of probes that were fitted to a few images a class.

    Attributes:
        shots: images a class, ascending.
        scores: of each of these, a score on the test images for each seed.
        Cs: the C of each of these fits.
    """

    shots: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    Cs: tuple[tuple[float, ...], ...]

    @property
    def means(self) -> list[float]:
        """The mean score over seeds, for each number of images."""
        return [float(np.mean(row)) for row in self.scores]

    @property
    def deviations(self) -> list[float]:
        """The standard deviation over seeds, of the seeds as a sample; 0 of one seed."""
        return [float(np.std(row, ddof=1)) if len(row) > 1 else 0.0 for row in self.scores]


@dataclass(frozen=True)
class LabelsPerClass:
    """How many labelled images a class give a probe the score of a zero-shot classifier.

    Attributes:
        number: interpolated between the numbers that were tried; below the first it is where the line of the first two
            scores points; None where no number that was tried reaches the score.
        text: to be shown, "5.4", "<1" or ">16".
    """

    number: float | None
    text: str


def few_shot_curve(
    train_features_NW: Tensor,
    train_labels_N: Tensor,
    train_keys: Sequence[str],
    test_features_NW: Tensor,
    test_labels_N: Tensor,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = range(5),
    C: float | None = None,
    metric: Metric | None = None,
    progress: Callable[[int], None] | None = None,
    block_metric: BlockMetric | None = None,
) -> FewShotCurve:
    """Fit probes to a few training images a class, and score each on all test images.

    Which images a seed takes depends on the keys alone. More images of the same seed hold the fewer ones. A class with
    fewer images than asked for gives all that it has.

    Args:
        train_keys: names of the training images.
        shots: images a class, ascending.
        C: of all fits [the best on up to four other training images a class].
        metric: see ``search_C`` [the share of images whose class is the best].
        progress: is called with 1 after each fit, or each search of C.
        block_metric: in place of ``metric``; see ``search_C``.

    Raises:
        ValueError: no class has as many images as are asked for, none is left to choose C by, or both metrics are given.
    """
    num_classes = int(max(train_labels_N.max(), test_labels_N.max())) + 1
    measure = by_blocks(metric, block_metric)
    scores: list[tuple[float, ...]] = []
    found_Cs: list[tuple[float, ...]] = []
    orders = [_order(train_labels_N.tolist(), train_keys, max(shots), seed) for seed in seeds]

    for number in shots:
        row, Cs = [], []
        for order in orders:
            fitted = torch.tensor([index for members in order for index in members[:number]])
            X, y = train_features_NW[fitted], train_labels_N[fitted]
            if C is None:
                end = number + min(number, _MOST_VALIDATION)
                others = [index for members in order for index in members[number:end]]
                if not others:
                    raise ValueError(
                        f"no image is left beside {number} a class to choose C by; give C, or fewer shots"
                    )
                val_X, val_y = train_features_NW[others], train_labels_N[others]
                search = search_C(
                    X, y, val_X, val_y, num_classes, fit_all=False, block_metric=measure
                )
                probe = search.probe
            else:
                probe = fit_linear_probe(X, y, C, num_classes)
            row.append(measure(probe.logit_blocks(test_features_NW), test_labels_N))
            Cs.append(probe.C)
            if progress is not None:
                progress(1)
        scores.append(tuple(row))
        found_Cs.append(tuple(Cs))
    return FewShotCurve(tuple(shots), tuple(scores), tuple(found_Cs))


def _order(
    labels: Sequence[int], keys: Sequence[str], num_needed: int, seed: int
) -> list[list[int]]:
    """Return the images of each class in the order in which a seed takes them."""
    by_class = members_by_class(labels, keys)
    draw, orders = np.random.default_rng(seed), []
    for label in sorted(by_class):
        members = sorted(by_class[label], key=lambda index: keys[index])
        orders.append([members[place] for place in draw.permutation(len(members))])
    if (most := max(map(len, orders))) < num_needed:
        raise ValueError(
            f"no class has the {num_needed} training images asked for, and the largest has {most}; give fewer shots"
        )
    return orders


def labels_per_class(
    shots: Sequence[float], scores: Sequence[float], zero_shot: float
) -> LabelsPerClass:
    """Return how many images a class reach the score of a zero-shot classifier.

    Between two numbers the score is taken to rise evenly with the logarithm of the number; the first two between which it
    passes count.

    Args:
        shots: images a class, ascending; the last may be the mean of the whole training set.
        scores: of the probes fitted to these.
    """
    if len(shots) != len(scores) or not shots:
        raise ValueError(f"{len(shots)} numbers of images have {len(scores)} scores")
    places = [math.log2(number) for number in shots]
    if zero_shot == scores[0]:
        return LabelsPerClass(shots[0], f"{shots[0]:.1f}")
    if zero_shot < scores[0]:
        number = shots[0]
        if len(shots) > 1 and scores[1] > scores[0]:
            slope = (places[1] - places[0]) / (scores[1] - scores[0])
            number = 2 ** (places[0] + slope * (zero_shot - scores[0]))
        return LabelsPerClass(number, f"<{shots[0]:g}")
    for i in range(len(shots) - 1):
        if scores[i] <= zero_shot <= scores[i + 1]:
            rise = scores[i + 1] - scores[i]
            part = (zero_shot - scores[i]) / rise if rise else 0.0
            number = 2 ** (places[i] + part * (places[i + 1] - places[i]))
            return LabelsPerClass(number, f"{number:.1f}")
    if zero_shot == scores[-1]:
        return LabelsPerClass(shots[-1], f"{shots[-1]:.1f}")
    return LabelsPerClass(None, f">{shots[-1]:g}")
