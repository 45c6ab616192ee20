"""Fits the law of error and compute to the models in a folder of results.

Source: Radford et al. 2021, figure 9. The maths is in ``scaling.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipcore.data import DataError, LeftOut, printable
from clipcore.evaluate.compute import image_macs
from clipcore.evaluate.model_tables import compute_of, read_compute
from clipcore.evaluate.results import ZERO_SHOT, Result, read_results
from clipcore.evaluate.same_weights import one_name_each
from clipcore.evaluate.scaling import PowerLaw, Prediction, fit_power_law, leave_out_largest
from clipcore.evaluate.scores import Model, common_metric, listed, metrics_note, scores_of, share
from clipcore.towers.architectures import UnknownModelError, find_model, is_finite_number

_FEWEST_MODELS = 3
_SHAPES_NOTE = (
    "compute is that of one image through the image tower, computed from the model's shape; training on more images counts "
    "only with --gmacs FILE, a table with the columns model, gmacs and samples"
)


def scaling_study(
    results: Path, gmacs: Path | None = None, num_bins: int | None = None, task: str = ZERO_SHOT
) -> dict[str, Any]:
    """Return the power law of error and compute of the models in a folder, in the format of ``scaling.json``.

    A model's error is 1 minus the mean of its main metrics over the data sets that all models have.

    Args:
        results: a folder with results of three or more models.
        gmacs: a csv table or JSON object of the models' compute, see ``read_compute`` [computed from their shapes].
        num_bins: fit to the best model in each of this many bins of compute [fit to all models].
        task: the task of the results.

    Raises:
        DataError: fewer than three models have results on one set and known compute, or no line fits them.
    """
    left_out = LeftOut()
    found, _ = one_name_each(read_results(results), left_out)
    scores = scores_of(found, task, left_out)
    compute = _compute_of_models(scores, gmacs, left_out)
    _check_enough(len(compute), results, task, left_out)
    notes = [_SHAPES_NOTE] if gmacs is None else []

    metrics = _shared_metrics({model: scores[model] for model in compute}, results)
    num_sets = len({name for model in compute for name in scores[model]})
    if num_sets > len(metrics):
        notes.append(
            f"{num_sets - len(metrics)} of {num_sets} sets are left out, which not all models have"
        )
    notes += metrics_note(metrics.values())

    errors = {model: _mean_error(scores[model], metrics) for model in compute}
    for model in [model for model, error in errors.items() if error == 0]:
        left_out.add("model without an error, which has no logarithm", str(model))
        del errors[model]
    _check_enough(len(errors), results, task, left_out)
    models = sorted(errors, key=lambda model: compute[model])
    law, prediction = _laws(
        [compute[model] for model in models], [errors[model] for model in models], num_bins
    )
    if left_out:
        notes.append(f"left out: {left_out}")
    plural = "" if len(metrics) == 1 else "s"
    return {
        "study": "scaling",
        "metric": f"mean error of {len(metrics)} set{plural}",
        "unit": "GMACs",
        "models": [
            {
                "model": model.model,
                "pretrained": model.pretrained,
                "compute": compute[model],
                "error": errors[model],
            }
            for model in models
        ],
        "law": _law_record(law),
        "prediction": _prediction_record(prediction, models[-1]),
        "notes": notes,
    }


def _check_enough(number: int, folder: Path, task: str, left_out: LeftOut) -> None:
    """Raise DataError for fewer models than a law needs."""
    if number < _FEWEST_MODELS:
        rest = f"; left out: {left_out}" if left_out else ""
        raise DataError(
            f"a law needs at least {_FEWEST_MODELS} models with results of {printable(task)} and known compute; {folder} "
            f"has {number}{rest}"
        )


def _compute_of_models(
    scores: dict[Model, dict[str, Result]], gmacs: Path | None, left_out: LeftOut
) -> dict[Model, float]:
    """Return the GMACs of the models with known ones; count the others."""
    table, unknown = None, "model of an unknown shape, which needs --gmacs FILE"
    if gmacs is not None:
        table, unknown = read_compute(gmacs), f"model that {printable(gmacs.name)} does not have"
    found = {}
    for model, results in scores.items():
        value = _stated_gmacs(results) or _computed_gmacs(model.model)
        if table is not None:
            value = compute_of(table, model)
        if value is None:
            left_out.add(unknown, str(model))
        else:
            found[model] = value
    return found


def _stated_gmacs(results: dict[str, Result]) -> float | None:
    """Return the GMACs that a model's results state; None if they state none."""
    stated: list[Any] = [result.details.get("gmacs") for result in results.values()]
    return next((value for value in stated if is_finite_number(value) and value > 0), None)


def _computed_gmacs(name: str) -> float | None:
    """Return the GMACs of one image by a model's name; None for an unknown model."""
    try:
        return image_macs(find_model(name)) / 1e9
    except UnknownModelError:
        return None


def _shared_metrics(scores: dict[Model, dict[str, Result]], folder: Path) -> dict[str, str]:
    """Return the common metric of each data set that all models have; raise DataError if there is none."""
    found = {}
    first = next(iter(scores.values()))
    for name in first:
        if all(name in results for results in scores.values()):
            metric = common_metric([results[name] for results in scores.values()])
            if metric is not None:
                found[name] = metric
    if not found:
        fewest = min(scores, key=lambda model: len(scores[model]))
        raise DataError(
            f"{folder} has no data set that all {len(scores)} models have; the fewest has {fewest}: {listed(scores[fewest])}"
        )
    return found


def _mean_error(results: dict[str, Result], metrics: dict[str, str]) -> float:
    values = [share(results[name], metric) for name, metric in metrics.items()]
    # These metrics exist for all models.
    return 1 - sum(value for value in values if value is not None) / len(values)


def _laws(
    compute: list[float], error: list[float], num_bins: int | None
) -> tuple[PowerLaw, Prediction | None]:
    """Return the law of all models, and the prediction for the largest by the others; None for too few models.

    Raises:
        DataError: there is no line through the models.
    """
    try:
        law = fit_power_law(compute, error, num_bins)
    except OverflowError:
        raise DataError(
            "the models' compute is too similar for a law; use models of more sizes"
        ) from None
    except ValueError as reason:
        raise DataError(
            f"{reason}; --gmacs FILE with the columns model, pretrained, gmacs and samples tells models of one shape apart"
        ) from None
    try:
        return law, leave_out_largest(compute, error)
    except (ValueError, OverflowError):
        return law, None


def _law_record(law: PowerLaw) -> dict[str, float]:
    return {
        "factor": law.factor,
        "exponent": law.exponent,
        "r2": law.r2,
        "num_models": law.num_models,
    }


def _prediction_record(prediction: Prediction | None, largest: Model) -> dict[str, Any] | None:
    if prediction is None:
        return None
    return {
        "predicted": prediction.predicted,
        "actual": prediction.actual,
        "law": _law_record(prediction.law),
        "model": str(largest),
    }
