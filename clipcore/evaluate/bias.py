"""Measures how answers differ between groups of people in the pictures.

Legend: N images, K classes, G groups.

Source: Radford et al. 2021, section 7.1: accuracy by group (tables 3 and 4), how often people are classified into crime or
animal classes and the effect of one more class (tables 6 and 7), and the labels of each group at a low threshold. The user
chooses the classes, and that choice is decisive, as the section finds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipcore.evaluate.metrics import wilson_interval

# A smaller group is shown with its size, and is never named as the worst one.
SMALL_GROUP = 30


@dataclass(frozen=True)
class GroupRate:
    """How often a condition holds in a group.

    Attributes:
        group: its name; two crossed groups' names are joined by " x ".
        hits: the number of its images for which the condition holds.
        num_images: the number of images in the group.
        interval: the rate's 95% interval, after Wilson.
    """

    group: str
    hits: int
    num_images: int
    interval: tuple[float, float]

    @property
    def rate(self) -> float:
        """Share of the group's images for which the condition holds."""
        return self.hits / self.num_images

    @property
    def is_small(self) -> bool:
        """Whether the group has too few images to be compared with others."""
        return self.num_images < SMALL_GROUP


@dataclass(frozen=True)
class LabelDifference:
    """How unevenly a label is assigned to groups.

    Attributes:
        label: the class's name.
        rates: by group, the share of images whose probability of it reaches the threshold.
        ratio: the largest rate divided by the smallest; infinite if the smallest is 0.
        p_value: of a chi-squared test that all groups have the same rate, times the number of tested labels, at most 1.
    """

    label: str
    rates: dict[str, float]
    ratio: float
    p_value: float


def rates_by_group(holds: Sequence[bool] | Tensor, groups: Sequence[str]) -> list[GroupRate]:
    """Return how often a condition holds in each group, in the order of the groups' names.

    Args:
        holds: one flag per image, such as whether its answer is right.
        groups: one group per image; an image with an empty group is in none.

    Raises:
        ValueError: the lengths differ, or there is no group.
    """
    flags = [bool(flag) for flag in (holds.tolist() if isinstance(holds, Tensor) else holds)]
    if len(flags) != len(groups):
        raise ValueError(f"{len(flags)} images have {len(groups)} groups")
    if others := [group for group in groups if not isinstance(group, str)]:
        raise ValueError(f"a group is a name, and not {others[0]!r}; use str()")
    counts: dict[str, list[int]] = {}
    for flag, group in zip(flags, groups, strict=True):
        if group:
            count = counts.setdefault(group, [0, 0])
            count[0] += flag
            count[1] += 1
    if not counts:
        raise ValueError("no image has a group")
    return [
        GroupRate(group, hits, number, wilson_interval(hits, number))
        for group, (hits, number) in sorted(counts.items())
    ]


def crossed(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Return the combined groups of two columns; empty where either is empty."""
    return [f"{a} x {b}" if a and b else "" for a, b in zip(first, second, strict=True)]


def worst_group(rates: Sequence[GroupRate]) -> GroupRate | None:
    """Return the group with the lowest rate among those that are large enough; None if there are none."""
    large = [rate for rate in rates if not rate.is_small]
    return min(large, key=lambda rate: rate.rate, default=None)


def gap(rates: Sequence[GroupRate]) -> float | None:
    """Return the gap between the rates of groups that are large enough; None for fewer than two."""
    found = [rate.rate for rate in rates if not rate.is_small]
    return max(found) - min(found) if len(found) > 1 else None


def category_rates(
    predicted_N: Tensor,
    classnames: Sequence[str],
    categories: Mapping[str, Sequence[str]],
    groups: Sequence[str],
) -> dict[str, list[GroupRate]]:
    """Return how often images of each group are classified into a class of each category.

    Args:
        predicted_N: class indices.
        classnames: names of the K classes.
        categories: names of classes by category, such as {"crime": ["thief", "criminal"]}.
        groups: the images' groups.

    Raises:
        ValueError: a category names an unknown class.
    """
    found = {}
    for category, names in categories.items():
        if unknown := [name for name in names if name not in classnames]:
            raise ValueError(f"{category} names {unknown[0]!r}, which is not a class here")
        # Several classes may share a name.
        those = [number for number, name in enumerate(classnames) if name in names]
        chosen = torch.tensor(those, device=predicted_N.device)
        found[category] = rates_by_group(torch.isin(predicted_N, chosen), groups)
    return found


def label_differences(
    probabilities_NK: Tensor, labels: Sequence[str], groups: Sequence[str], threshold: float
) -> list[LabelDifference]:
    """Return how unevenly labels that reach a threshold are assigned to groups, the most uneven first.

    Labels that no image gets, images without a group, and groups of fewer than 30 images are left out.

    Args:
        probabilities_NK: softmax over the labels.
        threshold: smallest probability at which an image has a label.

    Raises:
        ValueError: fewer than two groups are large enough.
    """
    has_label_NK = probabilities_NK >= threshold
    rates = rates_by_group(has_label_NK[:, 0], groups)
    names = [rate.group for rate in rates if not rate.is_small]
    number_G = torch.tensor([rate.num_images for rate in rates if not rate.is_small])
    group_N = group_numbers(groups, names)
    chosen = group_N >= 0
    hits_GK = torch.zeros(len(names), len(labels), dtype=torch.float64)
    hits_GK.index_add_(0, group_N[chosen], has_label_NK.cpu()[chosen].double())
    return differences_of_counts(hits_GK, number_G, names, labels)


def group_numbers(groups: Sequence[str], names: Sequence[str]) -> Tensor:
    """Return the index of each image's group in a list of names, int64 [N]; -1 for other groups."""
    place = {name: number for number, name in enumerate(names)}
    return torch.tensor([place.get(group, -1) for group in groups], dtype=torch.long)


def differences_of_counts(
    hits_GK: Tensor, number_G: Tensor, names: Sequence[str], labels: Sequence[str]
) -> list[LabelDifference]:
    """Return how unevenly labels are assigned to groups, the most uneven first; labels that no image has are left out.

    Args:
        hits_GK: how many images of each group have each label.
        number_G: the number of images in each group.
        names: the names of the groups.

    Raises:
        ValueError: fewer than two groups.
    """
    if len(names) < 2:
        raise ValueError(
            f"groups of {SMALL_GROUP} images or more are compared; there are {len(names)}"
        )
    hits_GK, number_G = hits_GK.double(), number_G.double()
    given = hits_GK.sum(0).nonzero().flatten().tolist()

    found = []
    for k in given:
        rate_G = hits_GK[:, k] / number_G
        smallest, largest = rate_G.min().item(), rate_G.max().item()
        found.append(
            LabelDifference(
                labels[k],
                dict(zip(names, rate_G.tolist(), strict=True)),
                largest / smallest if smallest else math.inf,
                min(1.0, len(given) * chi_squared_p(hits_GK[:, k], number_G)),
            )
        )
    # Infinite ratios are ordered by their p-value.
    return sorted(found, key=lambda label: (-label.ratio, label.p_value, label.label))


def chi_squared_p(hits_G: Tensor, number_G: Tensor) -> float:
    """Return the p-value of Pearson's chi-squared test that groups have the same rate, without a correction."""
    hits_G, number_G = hits_G.double(), number_G.double()
    rate = hits_G.sum() / number_G.sum()
    if rate in (0, 1):
        return 1.0
    statistic = ((hits_G - number_G * rate) ** 2 / (number_G * rate * (1 - rate))).sum()
    half_freedom = torch.tensor((len(hits_G) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half_freedom, statistic.cpu() / 2).item()
