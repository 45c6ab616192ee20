"""Compares two models, or two classifiers of one model, on the data sets that both were evaluated on.

Legend: S data sets, R resamples of them.

Source: Radford et al. 2021, figures 5 and 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipcore.data import DataError, LeftOut, printable
from clipcore.evaluate.results import (
    LINEAR_PROBE,
    ZERO_SHOT,
    Result,
    read_result,
    read_results,
)
from clipcore.evaluate.robustness import fit_line
from clipcore.evaluate.same_weights import one_name_each
from clipcore.evaluate.scores import (
    TITLES,
    Model,
    common_metric,
    listed,
    metrics_note,
    scores_of,
    share,
)
from clipcore.files import is_folder

NUM_RESAMPLES = 10_000
_SEED = 0
_MAX_NUMBERS = 1 << 20  # number of resamples held at once
_FEWEST_SETS = 3  # coverage of an interval


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its results by data set."""

    model: Model
    task: str
    results: Mapping[str, Result]


def compare(
    a: Path,
    b: Path | None = None,
    task_a: str | None = None,
    task_b: str | None = None,
    model_a: str | None = None,
    model_b: str | None = None,
) -> dict[str, Any]:
    """Return the comparison of two models, or of two tasks of one, on their common data sets, as in ``compare.json``.

    Args:
        a, b: folders of results, or files of single results. Without b, zero-shot is compared with the linear probe of the
            same model, or two named models are compared.
        task_a, task_b: a task [zero-shot, else the first of linear probe and retrieval that the folder has].
        model_a, model_b: architecture, weights, or both with a space; required if there are several models.

    Raises:
        DataError: a model or task does not exist or is ambiguous, or there is no common data set.
    """
    left_out = LeftOut()
    if b is None and model_b is None:
        first = _side(a, task_a or ZERO_SHOT, model_a, "--model-a", left_out)
        second = _side(a, task_b or LINEAR_PROBE, first.model, "--model-b", left_out)
    else:
        first = _side(a, task_a, model_a, "--model-a", left_out)
        second = _side(b or a, task_b, model_b, "--model-b", left_out)

    sets = _differences(first, second, left_out)
    if not sets:
        raise DataError(
            f"no data set has both: {_title(first)} has {listed(first.results)}; {_title(second)} has "
            f"{listed(second.results)}"
        )
    x_S = np.array([row["b"] for row in sets])
    y_S = np.array([row["a"] for row in sets])
    differences = [row["difference"] for row in sets]
    notes = metrics_note(row["metric"] for row in sets)
    if left_out:
        notes.append(f"left out: {left_out}")
    return {
        "study": "compare",
        "a": _title(first),
        "b": _title(second),
        "sets": sets,
        "wins": sum(difference > 0 for difference in differences),
        "losses": sum(difference < 0 for difference in differences),
        "ties": sum(difference == 0 for difference in differences),
        "pearson": pearson(x_S, y_S),
        "slope": _slope(x_S, y_S),
        "interval": slope_interval(x_S, y_S),
        "notes": notes,
    }


def pearson(x_S: NDArray[np.float64], y_S: NDArray[np.float64]) -> float | None:
    """Return the correlation of two columns; None if one is constant."""
    if len(x_S) < 2 or np.ptp(x_S) == 0 or np.ptp(y_S) == 0:
        return None
    return float(np.corrcoef(x_S, y_S)[0, 1])


def slope_interval(
    x_S: NDArray[np.float64], y_S: NDArray[np.float64], num_resamples: int = NUM_RESAMPLES
) -> list[float] | None:
    """Return the 95% bootstrap interval of the slope of y on x; None for fewer than three sets, or a constant x.

    Each resample draws as many sets as there are, with replacement, from NumPy's generator with seed 0. The ends are the
    2.5th and 97.5th percentile of the slopes. Resamples of a single set have no slope and are ignored.
    """
    if len(x_S) < _FEWEST_SETS:
        return None
    generator = np.random.default_rng(_SEED)
    rows_at_once = max(1, _MAX_NUMBERS // len(x_S))
    slopes = []
    for start in range(0, num_resamples, rows_at_once):
        num_rows = min(rows_at_once, num_resamples - start)
        drawn_RS = generator.integers(len(x_S), size=(num_rows, len(x_S)))
        x_RS, y_RS = x_S[drawn_RS], y_S[drawn_RS]
        has_slope = np.ptp(x_RS, axis=1) > 0
        x_RS, y_RS = x_RS[has_slope], y_RS[has_slope]
        x_RS = x_RS - x_RS.mean(1, keepdims=True)
        slopes.append((x_RS * y_RS).sum(1) / np.square(x_RS).sum(1))
    slope_R = np.concatenate(slopes)
    if not len(slope_R):
        return None
    low, high = np.percentile(slope_R, [2.5, 97.5])
    return [float(low), float(high)]


def _slope(x_S: NDArray[np.float64], y_S: NDArray[np.float64]) -> float | None:
    """Return the slope of the least-squares line of y on x; None if x is constant."""
    try:
        return fit_line(x_S, y_S, "scores")[0]
    except ValueError:
        return None


def _side(
    path: Path, task: str | None, model: str | Model | None, flag: str, left_out: LeftOut
) -> Side:
    """Return the model and task that a user's arguments select; raise DataError unless it is exactly one."""
    try:
        found = read_results(path) if is_folder(path) else [read_result(path)]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    there = [name for name in TITLES if any(result.task == name for result in found)]
    chosen = task or next(iter(there), ZERO_SHOT)
    if chosen not in there:
        raise DataError(
            f"{path} has no result of {TITLES.get(chosen, printable(chosen))}; python -m clipcore.evaluate writes them"
        )

    found, renamed = one_name_each(found, left_out)
    # An architecture selects all its models, under any of their names.
    by_other_name = {
        Model(architecture, pretrained)
        for (architecture, other), pretrained in renamed.items()
        if isinstance(model, str) and Model(architecture, other).is_named(model)
    }
    scores = scores_of(found, chosen, left_out)
    models = [name for name in scores if _is_selected(name, model) or name in by_other_name]
    if not models:
        raise DataError(
            f"{path} has no {TITLES[chosen]} of {printable(str(model))}; it has that of {listed(map(str, scores))}"
        )
    if len(models) > 1:
        raise DataError(
            f"{path} has the {TITLES[chosen]} of {len(models)} models; name one with {flag}: {listed(map(str, models))}"
        )
    return Side(models[0], chosen, scores[models[0]])


def _is_selected(model: Model, name: str | Model | None) -> bool:
    """Return whether a name selects a model: its architecture, its full name, or None."""
    return name is None or name == model or (type(name) is str and model.is_named(name))


def _differences(first: Side, second: Side, left_out: LeftOut) -> list[dict[str, Any]]:
    """Return the common sets with both scores, the largest difference first; count the others."""
    found = []
    for name, result in first.results.items():
        if name not in second.results:
            left_out.add("set of the first only", result.dataset)
            continue
        other = second.results[name]
        metric = common_metric([result, other])
        if metric is None:
            left_out.add("set without a metric of both", result.dataset)
            continue
        a, b = share(result, metric), share(other, metric)
        assert a is not None and b is not None
        found.append(
            {"dataset": result.dataset, "metric": metric, "a": a, "b": b, "difference": a - b}
        )
    for name, result in second.results.items():
        if name not in first.results:
            left_out.add("set of the second only", result.dataset)
    return sorted(found, key=lambda row: (-row["difference"], row["dataset"]))


def _title(side: Side) -> str:
    return f"{side.model}, {TITLES[side.task]}"
