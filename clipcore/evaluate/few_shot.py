"""Few-shot probes: how many labelled images per class match a model's zero-shot classifier.

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
# Images per class for choosing C, besides those that are fitted.
_MOST_VALIDATION = 4


@dataclass(frozen=True)
class FewShotCurve:
    """Scores of probes that were fitted to a few images per class.

    Attributes:
        shots: images per class, ascending.
        scores: for each number of images, one score on the test images per seed.
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
        """The sample standard deviation over seeds; 0 for one seed."""
        return [float(np.std(row, ddof=1)) if len(row) > 1 else 0.0 for row in self.scores]


@dataclass(frozen=True)
class LabelsPerClass:
    """The number of labelled images per class with which a probe matches a zero-shot classifier.

    Attributes:
        number: interpolated between the numbers that were tried. Below the first one it is extrapolated from the first two
            scores; None if no number that was tried reaches the score.
        text: the number for display, such as "5.4", "<1" or ">16".
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
    """Fit probes to a few training images per class, and score each on all test images.

    The images of a seed depend only on the keys. A larger selection of the same seed contains the smaller ones. A class
    with too few images contributes all that it has.

    Args:
        train_keys: names of the training images.
        shots: images per class, ascending.
        C: C of all fits [the best on up to four other training images per class].
        metric: see ``search_C`` [top-1 accuracy].
        progress: is called with 1 after each fit, or each search of C.
        block_metric: replaces ``metric``; see ``search_C``.

    Raises:
        ValueError: no class has enough images, none is left to choose C by, or both metrics are given.
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
    """Return the images of each class in a seed's order."""
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
    """Return the number of images per class that reaches the score of a zero-shot classifier.

    The score is interpolated linearly in the logarithm of the number, between the first two numbers whose scores enclose
    the zero-shot score.

    Args:
        shots: images per class, ascending; the last may be the mean of the whole training set.
        scores: scores of the probes fitted to these.
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
