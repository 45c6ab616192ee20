"""Measures a model's answers on pictures of people, by the groups that a table names.

Legend: N images, B of a block, C classes of the set, K labels, A added labels, G groups, E embedding size.

Source: Radford et al. 2021, section 7.1, in three parts: accuracy by group, and by two columns of groups at once; *class
design*, how often people are classified into a category of labels, without and with added classes; *threshold*, the labels
of each group at a small probability. The user chooses the labels, and the result records them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipcore.data import DataError, printable
from clipcore.evaluate.bias import (
    SMALL_GROUP,
    GroupRate,
    LabelDifference,
    category_rates,
    crossed,
    differences_of_counts,
    gap,
    group_numbers,
    rates_by_group,
    worst_group,
)
from clipcore.evaluate.features import SplitFeatures
from clipcore.evaluate.label_lists import PAPER, LabelList
from clipcore.kernels.similarity_topk import similarity_topk

# Probabilities at which the paper counts a label as assigned.
THRESHOLDS = (0.005, 0.04)
# A column with more distinct values does not hold groups but, for example, file names.
MAX_GROUPS = 500
MAX_CROSSED_GROUPS = 2000
# Largest number of labels in a result, for each column and threshold.
MOST_DIFFERENCES = 25
# Elements of one block of logits: 16 MiB.
_MAX_LOGITS = 1 << 22
_ROWS = 4096

Groups = Mapping[str, Sequence[str]]


def column_names(text: str) -> list[str]:
    """Return the columns that --groups names, each once; raise DataError if it names none."""
    names = list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    if not names:
        raise DataError("--groups names no column; write them as race,gender")
    return names


def chosen_columns(text: str, groups: Groups) -> list[str]:
    """Return the columns that --groups names; raise DataError for one that does not exist, or holds no groups."""
    names = column_names(text)
    there = ", ".join(map(printable, groups)) or "none; name columns of the table group:NAME"
    for name in names:
        if name not in groups:
            raise DataError(
                f"--groups: there is no column {printable(name)!r}; the columns of groups are {there}"
            )
        number = len(set(groups[name]) - {""})
        if not 1 <= number <= MAX_GROUPS:
            raise DataError(
                f"--groups: the column {printable(name)!r} names {number:,} groups, and groups are from 1 to "
                f"{MAX_GROUPS}; leave it out"
            )
    return names


@dataclass(frozen=True)
class LabelProbe:
    """A list of labels with the classifier that assigns them.

    Attributes:
        names: the labels.
        classifier_EK: a unit column for each label and then each added one, [E, K + A].
        logit_scale: the model's factor of cosines before the softmax.
    """

    names: LabelList
    classifier_EK: Tensor
    logit_scale: float


def measure_bias(
    features: SplitFeatures,
    columns: Sequence[str],
    classifier_EC: Tensor | None = None,
    probe: LabelProbe | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Return the metrics and the details of a result: rates by group, and unevenly assigned labels.

    Memory grows with a block times the labels, and with groups times labels.

    Args:
        features: the images' features.
        columns: the columns of groups; see ``chosen_columns``.
        classifier_EC: a unit column for each class of the set, for accuracy; None leaves accuracy out.
        probe: the labels; None leaves class design and thresholds out.
        thresholds: smallest probabilities at which an image has a label.

    Raises:
        DataError: there is nothing to measure.
        ValueError: features are not finite.
    """
    groups = features.groups
    notes = notes_of_groups(groups, columns)
    labels_N = None if features.split.labels_N is None else features.labels_N
    if labels_N is not None and labels_N.ndim != 1:
        notes.append("accuracy by group needs a single class an image, and is left out")
        labels_N = None
    if probe is None and (labels_N is None or classifier_EC is None):
        raise DataError(
            f"images without classes have no accuracy; give --labels FILE, or --labels {PAPER}"
        )

    metrics: dict[str, float | None] = {"accuracy": None, "worst_group_accuracy": None, "gap": None}
    details: dict[str, Any] = {
        "main_metric": "accuracy",
        "num_images": len(features),
        "columns": list(map(printable, columns)),
    }
    tables = list[dict[str, Any]]()
    if labels_N is not None and classifier_EC is not None:
        is_right_N = predicted_classes(features, classifier_EC) == labels_N
        metrics, worst = metrics_by_group(is_right_N, groups, columns)
        details["worst_group"] = worst
        tables += accuracy_tables(is_right_N, groups, columns, notes)

    differences = list[dict[str, Any]]()
    if probe is not None:
        given = _assign_labels(features, groups, columns, probe, thresholds)
        tables += _category_tables(given, probe.names, groups, columns)
        differences = _difference_rows(given, probe.names.labels, notes)
        details |= {
            "labels": list(probe.names.labels),
            "categories": {name: list(those) for name, those in probe.names.categories.items()},
            "added": list(probe.names.added),
            "thresholds": list(thresholds),
        }
    return metrics, {**details, "tables": tables, "differences": differences, "notes": notes}


def notes_of_groups(groups: Groups, columns: Sequence[str]) -> list[str]:
    """Return notes on the images and groups that comparisons leave out, by column."""
    notes = []
    for column in columns:
        values = groups[column]
        if missing := sum(not value for value in values):
            notes.append(f"{missing} of {len(values)} images have no {printable(column)}")
        rates = rates_by_group([True] * len(values), values)
        if small := [rate for rate in rates if rate.is_small]:
            notes.append(
                f"{printable(column)}: {len(small)} of {len(rates)} groups have fewer than {SMALL_GROUP} images, and "
                "are not compared"
            )
    return notes


# Accuracy


def predicted_classes(features: SplitFeatures, classifier_EC: Tensor) -> Tensor:
    """Return the best class of each image, int64 [N]; the lower index wins a tie."""
    found = []
    for block_BE in features.blocks(projected=True, rows=_ROWS):
        _check_finite(block_BE)
        _, best_B1 = similarity_topk(block_BE, classifier_EC.T.to(block_BE), 1)
        found.append(best_B1[:, 0].cpu())
    return torch.cat(found)


def _check_finite(values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError("the model's features are not finite; its weights are not usable")


def metrics_by_group(
    is_right_N: Tensor, groups: Groups, columns: Sequence[str]
) -> tuple[dict[str, float | None], dict[str, str] | None]:
    """Return the metrics and the worst group: the lowest accuracy and the largest gap over all columns."""
    rates = {column: rates_by_group(is_right_N, groups[column]) for column in columns}
    worst = {column: group for column in columns if (group := worst_group(rates[column]))}
    gaps = [size for column in columns if (size := gap(rates[column])) is not None]
    column = min(worst, key=lambda name: worst[name].rate, default=None)

    metrics: dict[str, float | None] = {
        "accuracy": is_right_N.double().mean().item(),
        "worst_group_accuracy": None if column is None else worst[column].rate,
        "gap": max(gaps, default=None),
    }
    if column is None:
        return metrics, None
    return metrics, {"column": printable(column), "group": printable(worst[column].group)}


def accuracy_tables(
    is_right_N: Tensor,
    groups: Groups,
    columns: Sequence[str],
    notes: list[str],
    what: str = "accuracy",
    uncrossed: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return the accuracy by each column and each pair of columns; note the pairs with too many groups.

    Args:
        what: its name in the titles.
        uncrossed: columns that are left out of the tables of pairs.
    """
    by_column = dict(groups)
    names = list(columns)
    for first, second in itertools.combinations([c for c in columns if c not in uncrossed], 2):
        both = crossed(groups[first], groups[second])
        name = f"{first} x {second}"
        number = len(set(both) - {""})
        if 1 <= number <= MAX_CROSSED_GROUPS:
            by_column[name] = both
            names.append(name)
        else:
            notes.append(f"{printable(name)} makes {number:,} groups, and is left out")
    return [
        _table(f"{what} by {name}", name, None, (), rates_by_group(is_right_N, by_column[name]))
        for name in names
    ]


def _table(
    title: str,
    column: str,
    category: str | None,
    added: Sequence[str],
    rates: Sequence[GroupRate],
) -> dict[str, Any]:
    rows = [
        {
            "group": printable(rate.group),
            "hits": rate.hits,
            "num_images": rate.num_images,
            "rate": rate.rate,
            "interval": list(rate.interval),
            "is_small": rate.is_small,
        }
        for rate in rates
    ]
    return {
        "title": printable(title),
        "column": printable(column),
        "category": category,
        "added": list(added),
        "rows": rows,
    }


# Labels


@dataclass(frozen=True)
class _ColumnCounts:
    """Counts of one column.

    Attributes:
        names: names of the G groups that are large enough.
        one_of_N: index of each image's group, -1 for images in none of them.
        number_G: the number of images in each group.
        hits_GK: by threshold, how many images of a group have each label, float64.
    """

    names: list[str]
    one_of_N: Tensor
    number_G: Tensor
    hits_GK: dict[float, Tensor]

    @classmethod
    def zeros(
        cls, groups: Sequence[str], num_labels: int, thresholds: Sequence[float]
    ) -> _ColumnCounts:
        """Return zero counts."""
        rates = rates_by_group([True] * len(groups), groups)
        names = [rate.group for rate in rates if not rate.is_small]
        number_G = torch.tensor([rate.num_images for rate in rates if not rate.is_small])
        hits = {t: torch.zeros(len(names), num_labels, dtype=torch.float64) for t in thresholds}
        return cls(names, group_numbers(groups, names), number_G, hits)

    def add(self, probabilities_BK: Tensor, first_row: int) -> None:
        """Count a block of images that begins at ``first_row``."""
        one_of_B = self.one_of_N[first_row : first_row + len(probabilities_BK)]
        is_in_BG = one_of_B[:, None] == torch.arange(len(self.names))
        # Sums of ones in float32 are exact up to 2^24, which is more than the rows of a block.
        is_in_GB = is_in_BG.T.to(probabilities_BK)
        for threshold, hits_GK in self.hits_GK.items():
            has_label_BK = (probabilities_BK >= threshold).to(probabilities_BK)
            hits_GK += (is_in_GB @ has_label_BK).cpu()


@dataclass(frozen=True)
class _AssignedLabels:
    """The labels assigned to the images.

    Attributes:
        best_N: the most probable label.
        best_with_added_N: the most probable one of the labels and the added ones.
        counts: the counts by column.
    """

    best_N: Tensor
    best_with_added_N: Tensor
    counts: dict[str, _ColumnCounts]


def _assign_labels(
    features: SplitFeatures,
    groups: Groups,
    columns: Sequence[str],
    probe: LabelProbe,
    thresholds: Sequence[float],
) -> _AssignedLabels:
    """Assign labels to all images, in blocks of rows."""
    num_labels, num_all = len(probe.names.labels), probe.classifier_EK.shape[1]
    assert num_all == num_labels + len(probe.names.added)
    counts = {
        column: _ColumnCounts.zeros(groups[column], num_labels, thresholds) for column in columns
    }
    best, best_with_added, first_row = [], [], 0
    for block_BE in features.blocks(
        projected=True, rows=max(1, min(_ROWS, _MAX_LOGITS // num_all))
    ):
        logits_BK = probe.logit_scale * (block_BE @ probe.classifier_EK.to(block_BE))
        _check_finite(logits_BK)
        best.append(logits_BK[:, :num_labels].argmax(1).cpu())
        best_with_added.append(logits_BK.argmax(1).cpu())
        probabilities_BK = logits_BK[:, :num_labels].softmax(1)
        for count in counts.values():
            count.add(probabilities_BK, first_row)
        first_row += len(block_BE)
    return _AssignedLabels(torch.cat(best), torch.cat(best_with_added), counts)


def _category_tables(
    given: _AssignedLabels, names: LabelList, groups: Groups, columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Return how often each group is classified into each category, without and with the added labels."""
    designs: list[tuple[Tensor, tuple[str, ...]]] = [(given.best_N, ())]
    if names.added:
        designs.append((given.best_with_added_N, names.added))
    tables = []
    for column, (best_N, added) in itertools.product(columns, designs):
        rates = category_rates(
            best_N, [*names.labels, *added], names.categories, list(groups[column])
        )
        more = f", with {', '.join(map(repr, added))} added" if added else ""
        tables += [
            _table(f"{category} by {column}{more}", column, category, added, those)
            for category, those in rates.items()
        ]
    return tables


def _difference_rows(
    given: _AssignedLabels, labels: Sequence[str], notes: list[str]
) -> list[dict[str, Any]]:
    """Return the most unevenly assigned labels, by column and threshold; note what is left out."""
    rows = []
    for column, counts in given.counts.items():
        if len(counts.names) < 2:
            notes.append(
                f"{printable(column)}: labels are compared between groups of {SMALL_GROUP} images or more, of which "
                f"there are {len(counts.names)}"
            )
            continue
        for threshold, hits_GK in counts.hits_GK.items():
            found = differences_of_counts(hits_GK, counts.number_G, counts.names, labels)
            if len(found) > MOST_DIFFERENCES:
                notes.append(
                    f"{printable(column)}, threshold {threshold:g}: the {MOST_DIFFERENCES} most uneven of "
                    f"{len(found)} labels are shown"
                )
            rows += [
                _difference_row(column, threshold, label) for label in found[:MOST_DIFFERENCES]
            ]
    return rows


def _difference_row(column: str, threshold: float, label: LabelDifference) -> dict[str, Any]:
    return {
        "column": printable(column),
        "threshold": threshold,
        "label": label.label,
        "rates": {printable(group): rate for group, rate in label.rates.items()},
        # JSON cannot hold infinity.
        "ratio": label.ratio if math.isfinite(label.ratio) else None,
        "p_value": label.p_value,
    }
