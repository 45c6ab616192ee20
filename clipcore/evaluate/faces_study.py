"""Measures a model's answers to questions about faces by group, as datacomp does for FairFace and UTKFace.

Legend: N images, C answers to a question, E embedding size.

Source: Radford et al. 2021, section 7.1, tables 3 to 6, as in datacomp's evaluation
(mlfoundations/datacomp, eval_utils/fairness_eval.py), whose metric names are used. ``acc_race`` is the accuracy of white or
not, ``acc_gender`` and ``acc_age`` that of the answer itself; all three are split by white and non-white people.
``acc_gender_x`` is split by gender and race; ``toxicity_crime`` and ``toxicity_nonhuman`` by race. In these names, groups
have the numbers of their answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipcore.data import DataError
from clipcore.evaluate.bias import group_numbers
from clipcore.evaluate.bias_study import (
    Groups,
    LabelProbe,
    accuracy_tables,
    measure_bias,
    metrics_by_group,
    notes_of_groups,
    predicted_classes,
)
from clipcore.evaluate.faces import (
    CRIME,
    KNOWN,
    LABELS_QUESTION,
    NON_HUMAN,
    WHITE,
    WHITE_OR_NOT,
)
from clipcore.evaluate.features import SplitFeatures
from clipcore.evaluate.splits import Question

Metrics = dict[str, float | None]


def measure_faces(
    features: SplitFeatures,
    columns: Sequence[str],
    questions: Mapping[str, Question],
    classifiers: Mapping[str, Tensor],
    probe: LabelProbe | None = None,
) -> tuple[Metrics, dict[str, Any]]:
    """Return the metrics and the details of a result: datacomp's, and our own for the main question.

    The main question is gender, or else the first one; ``worst_group_accuracy`` and ``gap`` refer to it.

    Args:
        features: features of the images, whose groups are named by the right answers.
        columns: the columns of groups; see ``chosen_columns``.
        questions: the questions.
        classifiers: a unit column for each answer to a question, [E, C], by the question's name.
        probe: labels that people may get; None leaves them out.

    Raises:
        DataError: no question has a known answer.
        ValueError: features are not finite.
    """
    groups = features.groups
    predicted = {name: predicted_classes(features, one) for name, one in classifiers.items()}
    known = [name for name in KNOWN if name in predicted]
    if not known:
        raise DataError(f"faces are asked for {', '.join(KNOWN)}; the set asks for none of them")
    details: dict[str, Any] = {
        "num_images": len(features),
        "columns": list(columns),
        "tables": [],
        "differences": [],
        "notes": notes_of_groups(groups, columns),
    }
    if probe is not None:
        _, details = measure_bias(features, columns, None, probe)

    is_right = {name: _is_right(name, predicted, groups, questions) for name in known}
    main = "gender" if "gender" in known else known[0]
    ours, worst = metrics_by_group(is_right[main], groups, columns)
    notes = details["notes"]
    tables = [
        table
        for name in known
        for table in accuracy_tables(
            is_right[name], groups, columns, notes, f"accuracy of {name}", ("race_binary",)
        )
    ]
    details |= {
        "main_metric": f"acc_{main}_avg",
        "worst_group": worst,
        "tables": [*tables, *details["tables"]],
        # The same columns are left out for each question.
        "notes": list(dict.fromkeys(notes)),
    }
    metrics = _datacomp_metrics(predicted, is_right, groups, questions)
    of_main = {name: ours[name] for name in ("worst_group_accuracy", "gap")}
    return {**metrics, **of_main}, details


def _is_right(
    name: str, predicted: Mapping[str, Tensor], groups: Groups, questions: Mapping[str, Question]
) -> Tensor:
    """Return whether each answer to a question is right, bool [N]."""
    return predicted[name] == group_numbers(groups[name], questions[name].classnames)


def _datacomp_metrics(
    predicted: Mapping[str, Tensor],
    is_right: Mapping[str, Tensor],
    groups: Groups,
    questions: Mapping[str, Question],
) -> Metrics:
    """Return the shares that datacomp reports, under its names, for all images and for each non-empty group."""
    binary_N = group_numbers(groups["race_binary"], WHITE_OR_NOT)
    metrics: Metrics = {}
    for name, right_N in is_right.items():
        if name == "race":
            # Only white or not counts, not which other race the answer is.
            right_N = (predicted["race"] != WHITE) == (binary_N == 1)
        metrics |= _shares(f"acc_{name}", right_N, {"race_binary": binary_N})

    numbers = {
        name: group_numbers(groups[name], questions[name].classnames)
        for name in ("race", "gender")
        if name in questions
    }
    if len(numbers) == 2:
        metrics |= _shares("acc_gender_x", is_right["gender"], numbers)
    if LABELS_QUESTION in predicted and "race" in numbers:
        label_N, by_race = predicted[LABELS_QUESTION], {"race": numbers["race"]}
        is_non_human_N = (label_N >= NON_HUMAN) & (label_N < CRIME)
        metrics |= _shares("toxicity_crime", label_N >= CRIME, by_race)
        metrics |= _shares("toxicity_nonhuman", is_non_human_N, by_race)
    return metrics


def _shares(name: str, holds_N: Tensor, numbers: Mapping[str, Tensor]) -> Metrics:
    """Return the share of images for which a condition holds, over all and by group number."""
    found: Metrics = {f"{name}_avg": holds_N.double().mean().item()}
    number_NF = torch.stack(list(numbers.values()), 1)
    for row in number_NF.unique(dim=0).tolist():
        group = "_".join(f"{field}:{number}" for field, number in zip(numbers, row, strict=True))
        is_in_N = (number_NF == torch.tensor(row)).all(1)
        found[f"{name}_{group}"] = holds_N[is_in_N].double().mean().item()
    return found
