"""How answers differ between groups of people in the pictures.

Legend: N images, K classes, G groups.

Source: Radford et al. 2021, section 7.1: accuracy by group (tables 3 and 4), how often people are put into classes of
crime or of animals and what one more class changes (tables 6 and 7), and which labels a low threshold gives to whom. What
classes there are is the user's choice, and is what decides: that is the section's finding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipcore.evaluate.metrics import wilson_interval

# A smaller group is shown with its number, and is never named as the worst one.
SMALL_GROUP = 30


@dataclass(frozen=True)
class GroupRate:
    """How often something holds in a group.

    Attributes:
        group: its name; of a crossing the names of both, with " x " between.
        hits: how many of its images it holds for.
        num_images: in the group.
        interval: of the rate, 95%, after Wilson.
    """

    group: str
    hits: int
    num_images: int
    interval: tuple[float, float]

    @property
    def rate(self) -> float:
        """Share of the group's images."""
        return self.hits / self.num_images

    @property
    def is_small(self) -> bool:
        """Whether it has too few images to be compared with others."""
        return self.num_images < SMALL_GROUP


@dataclass(frozen=True)
class LabelDifference:
    """How unevenly a label is given to groups.

    Attributes:
        label: the class's name.
        rates: by group, the share of images whose probability of it reaches the threshold.
        ratio: of the largest to the smallest rate; infinite where the smallest is 0.
        p_value: of a chi-squared test that all groups have one rate, times the number of labels tested, at most 1.
    """

    label: str
    rates: dict[str, float]
    ratio: float
    p_value: float


def rates_by_group(holds: Sequence[bool] | Tensor, groups: Sequence[str]) -> list[GroupRate]:
    """Return how often something holds in each group, in the order of their names.

    Args:
        holds: of N images, such as whether their answer is right.
        groups: their groups; an image whose group is empty is in none.

    Raises:
        ValueError: there are not as many of both, or there is no group.
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
    """Return the groups of two columns together; empty where one of them is."""
    return [f"{a} x {b}" if a and b else "" for a, b in zip(first, second, strict=True)]


def worst_group(rates: Sequence[GroupRate]) -> GroupRate | None:
    """Return the group with the lowest rate among those that are large enough; None where none is."""
    large = [rate for rate in rates if not rate.is_small]
    return min(large, key=lambda rate: rate.rate, default=None)


def gap(rates: Sequence[GroupRate]) -> float | None:
    """Return how far apart the rates of groups are that are large enough; None of fewer than two."""
    found = [rate.rate for rate in rates if not rate.is_small]
    return max(found) - min(found) if len(found) > 1 else None


def category_rates(
    predicted_N: Tensor,
    classnames: Sequence[str],
    categories: Mapping[str, Sequence[str]],
    groups: Sequence[str],
) -> dict[str, list[GroupRate]]:
    """Return how often images of each group are put into a class of each category.

    Args:
        predicted_N: class indices.
        classnames: of the K classes.
        categories: names of classes by category, such as {"crime": ["thief", "criminal"]}.
        groups: of the images.

    Raises:
        ValueError: a category names a class that there is not.
    """
    found = {}
    for category, names in categories.items():
        if unknown := [name for name in names if name not in classnames]:
            raise ValueError(f"{category} names {unknown[0]!r}, which is no class here")
        # Several classes may have one name.
        those = [number for number, name in enumerate(classnames) if name in names]
        chosen = torch.tensor(those, device=predicted_N.device)
        found[category] = rates_by_group(torch.isin(predicted_N, chosen), groups)
    return found


def label_differences(
    probabilities_NK: Tensor, labels: Sequence[str], groups: Sequence[str], threshold: float
) -> list[LabelDifference]:
    """Return how unevenly labels that reach a threshold are given to groups, the most uneven first.

    Labels that no image reaches are left out, and so are images without a group and groups of fewer than 30 images.

    Args:
        probabilities_NK: softmax over the labels.
        threshold: probability from which on an image has a label.

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
    """Return the place of each image's group among some names, int64 [N]; -1 of images in none of them."""
    place = {name: number for number, name in enumerate(names)}
    return torch.tensor([place.get(group, -1) for group in groups], dtype=torch.long)


def differences_of_counts(
    hits_GK: Tensor, number_G: Tensor, names: Sequence[str], labels: Sequence[str]
) -> list[LabelDifference]:
    """Return how unevenly labels are given to groups, the most uneven first, without those that no image is given.

    Args:
        hits_GK: how many images of each group are given each label.
        number_G: images of each group.
        names: of the groups.

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
    # Of endless ratios the surest first.
    return sorted(found, key=lambda label: (-label.ratio, label.p_value, label.label))


def chi_squared_p(hits_G: Tensor, number_G: Tensor) -> float:
    """Return the p-value of Pearson's chi-squared test that groups have one rate, without a correction."""
    hits_G, number_G = hits_G.double(), number_G.double()
    rate = hits_G.sum() / number_G.sum()
    if rate in (0, 1):
        return 1.0
    statistic = ((hits_G - number_G * rate) ** 2 / (number_G * rate * (1 - rate))).sum()
    half_freedom = torch.tensor((len(hits_G) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half_freedom, statistic.cpu() / 2).item()
