"""Fits a power law of error over compute to models of several sizes.

error = factor * compute ** exponent is a line in logarithms. The claim is that it predicts the largest model from the
smaller ones, which ``leave_out_largest`` tests.

Source: Radford et al. 2021, figure 9; Cherti et al. 2023 for the fit to the best of each bin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipcore.evaluate.robustness import fit_line

Numbers = Sequence[float] | NDArray[np.float64]

# Decades between the largest model and the end of the last bin. Cherti et al. add it so that this bin contains that model,
# and their published laws include it.
_BINS_MARGIN = 0.1


@dataclass(frozen=True)
class PowerLaw:
    """error = factor * compute ** exponent.

    Attributes:
        r2: share of the logarithms' variance that it explains.
        num_models: the number of models that it was fitted to.
    """

    factor: float
    exponent: float
    r2: float
    num_models: int

    def error(self, compute: float) -> float:
        """Return the error of a model with this compute."""
        return float(self.factor * compute**self.exponent)


@dataclass(frozen=True)
class Prediction:
    """The prediction for the largest model by the law of the smaller ones.

    Attributes:
        predicted: its error by the law.
        actual: its actual error.
        law: the law of the other models.
    """

    predicted: float
    actual: float
    law: PowerLaw


def fit_power_law(compute: Numbers, error: Numbers, num_bins: int | None = None) -> PowerLaw:
    """Fit a power law by least squares of the logarithms.

    Args:
        compute: compute of M models, in any unit, such as GMACs of all training.
        error: error of the same models; 1 minus the mean of their metrics over the data sets.
        num_bins: fit to the smallest error in each of this many bins of equal width in log(compute), at the bin's middle,
            which ignores runs that were stopped or tuned badly [fit to all models]. As in Cherti et al.'s figures, the last
            bin ends a tenth of a decade beyond the largest model.

    Raises:
        ValueError: the lengths differ, a number is not positive, or fewer than two distinct models are left.
    """
    c, e = np.asarray(compute, np.float64), np.asarray(error, np.float64)
    _check_numbers(c, e)
    if num_bins is not None and num_bins < 1:
        raise ValueError(f"there is at least one bin, not {num_bins}")
    x, y = np.log10(c), np.log10(e)
    if num_bins is not None and len(x):
        x, y = _best_of_bins(x, y, num_bins)
    exponent, intercept, r2 = fit_line(x, y, "amounts of compute")
    return PowerLaw(10**intercept, exponent, r2, len(x))


def leave_out_largest(compute: Numbers, error: Numbers) -> Prediction:
    """Fit a law to all models except the one with the most compute, and predict its error.

    Raises:
        ValueError: see ``fit_power_law``.
    """
    c, e = np.asarray(compute, np.float64), np.asarray(error, np.float64)
    _check_numbers(c, e)
    order = np.argsort(c, kind="stable")
    law = fit_power_law(c[order[:-1]], e[order[:-1]])
    largest = order[-1]
    return Prediction(law.error(float(c[largest])), float(e[largest]), law)


def _check_numbers(compute: NDArray[np.float64], error: NDArray[np.float64]) -> None:
    if compute.shape != error.shape:
        raise ValueError(f"{len(compute)} models have {len(error)} errors")
    numbers = np.concatenate([compute, error])
    if not ((numbers > 0) & np.isfinite(numbers)).all():
        raise ValueError(
            "compute and error of a power law are positive; leave out a model without error"
        )


def _best_of_bins(
    x: NDArray[np.float64], y: NDArray[np.float64], num_bins: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the middles of the non-empty bins, and the smallest y in each."""
    edges = np.linspace(x.min(), x.max() + _BINS_MARGIN, num_bins + 1)
    number = np.digitize(x, edges) - 1
    filled = np.unique(number)
    middles = (edges[:-1] + edges[1:]) / 2
    return middles[filled], np.array([y[number == one].min() for one in filled])
