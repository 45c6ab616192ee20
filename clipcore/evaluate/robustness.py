"""Effective robustness: a model's accuracy under a shift, beyond the accuracy that a baseline predicts.

Models that were trained on a single data set lie on a line: the logits of their accuracies under a shift grow with those
without it. The effective robustness of a model is its distance above that line. Its relative robustness is its gain under
the shift over another model, such as a probe of the same features.

Source: Radford et al. 2021, section 3.3, after Taori et al. 2020. Accuracies are shares, from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Shares = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class BaselineFit:
    """The line of models without robustness: logit(accuracy under the shift) = slope * logit(accuracy) + intercept.

    Attributes:
        r2: share of the logits' variance that the line explains.
        num_models: the number of models that it was fitted to.
    """

    slope: float
    intercept: float
    r2: float
    num_models: int

    def expected(self, in_accuracy: float) -> float:
        """Return the accuracy under the shift for a model on the line."""
        z = self.slope * _logit(np.asarray(in_accuracy, np.float64)) + self.intercept
        return float(1 / (1 + np.exp(-z)))


def fit_baseline(in_accuracies: Shares, out_accuracies: Shares) -> BaselineFit:
    """Fit the line by least squares; a model with an accuracy of 0 or 1, whose logit is infinite, is left out.

    Args:
        in_accuracies: accuracies of M models without the shift.
        out_accuracies: accuracies of the same models under the shift.

    Raises:
        ValueError: the lengths differ, a value is not a share, or fewer than two distinct models are left.
    """
    x, y = _shares(in_accuracies), _shares(out_accuracies)
    if x.shape != y.shape:
        raise ValueError(f"{len(x)} accuracies without the shift do not fit {len(y)} under it")
    is_finite = (x > 0) & (x < 1) & (y > 0) & (y < 1)
    x, y = _logit(x[is_finite]), _logit(y[is_finite])
    slope, intercept, r2 = fit_line(x, y, "models")
    return BaselineFit(slope, intercept, r2, len(x))


def effective_robustness(fit: BaselineFit, in_accuracy: float, out_accuracy: float) -> float:
    """Return a model's accuracy under the shift minus the line's, as a difference of shares."""
    _shares([in_accuracy, out_accuracy])
    return out_accuracy - fit.expected(in_accuracy)


def gap_closed(fit: BaselineFit, in_accuracy: float, out_accuracy: float) -> float:
    """Return the share of the line's loss under the shift that a model of equal accuracy avoids.

    It is 1 if the model loses nothing, 0 on the line, and negative below it; nan if the line loses nothing either.
    """
    _shares([in_accuracy, out_accuracy])
    lost_on_line = in_accuracy - fit.expected(in_accuracy)
    if lost_on_line == 0:
        return float("nan")
    return 1 - (in_accuracy - out_accuracy) / lost_on_line


def fit_line(
    x: NDArray[np.float64], y: NDArray[np.float64], what: str
) -> tuple[float, float, float]:
    """Return slope, intercept and r2 of the least-squares line through points.

    Raises:
        ValueError: there are fewer than two distinct x; ``what`` names the points in the message.
    """
    if len(x) < 2 or np.ptp(x) == 0:
        raise ValueError(
            f"a line needs at least two different {what}; there are {len(np.unique(x))}"
        )
    slope, intercept = np.polyfit(x, y, 1)
    left = np.square(y - slope * x - intercept).sum()
    total = np.square(y - y.mean()).sum()
    return float(slope), float(intercept), float(1 - left / total) if total else 1.0


def _shares(values: Shares) -> NDArray[np.float64]:
    found = np.asarray(values, np.float64)
    # Written so that nan is refused too.
    if not ((found >= 0) & (found <= 1)).all():
        wrong = found[~((found >= 0) & (found <= 1))][0]
        raise ValueError(f"an accuracy is a share from 0 to 1, not {wrong:g}")
    return found


def _logit(share: NDArray[np.float64]) -> NDArray[np.float64]:
    logit: NDArray[np.float64] = np.log(share) - np.log1p(-share)
    return logit
