"""A linear probe: multinomial logistic regression on features, solved to its optimum.

Legend: N images, D features, K classes, R directions in which the features vary.

Source: Radford et al. 2021, section 3.2 and appendix A.3: L-BFGS on features before the projection, without augmentation,
and a search over the strength of the penalty. The objective is scikit-learn's, C times the sum of the cross-entropies plus
half the squared weights, with a bias that is not penalised.

If images may have several labels or none, each class has its own logistic regression.

The features are rotated into their principal directions, and each direction is scaled so that the objective has a similar
curvature along all of them. This is a change of variables: the optimum is the same, and L-BFGS needs far fewer steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# The search over C: appendix A.3's 97 points.
GRID = tuple(10.0 ** (-6 + exponent / 8) for exponent in range(97))
_COARSE_STEP = 16
# Rows whose logits are held at once.
_BLOCK_ROWS = 1 << 14
_MAX_ITERATIONS = 1000
# A fit ends when the gradient is this small, relative to the gradient without weights.
_STEEPNESS = 1e-3

# Rows whose logits are scored at once.
_SCORED_ROWS = 4096

# Takes logits [N, K] and labels.
Metric = Callable[[Tensor, Tensor], float]
# Takes logits [rows, K] block by block, and the labels of all rows.
BlockMetric = Callable[[Iterable[Tensor], Tensor], float]


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier on features.

    Attributes:
        weight: [K, D].
        bias: [K]; -inf for a class without training images, which is never predicted, and inf for one that all images have.
        C: the inverse strength of the penalty in the fit.
        num_iterations: iterations of L-BFGS.
        gradient_norm: largest element of the final gradient of the mean objective, in the solver's coordinates.
    """

    weight: Tensor
    bias: Tensor
    C: float
    num_iterations: int
    gradient_norm: float

    def logits(self, features_ND: Tensor) -> Tensor:
        """Return the unnormalised log-probabilities of the classes, [N, K]."""
        return torch.addmm(self.bias, features_ND, self.weight.T)

    def logit_blocks(self, features_ND: Tensor) -> Iterator[Tensor]:
        """Yield ``logits`` in blocks of some thousand images, [rows, K], so that they are never all held."""
        return map(self.logits, features_ND.split(_SCORED_ROWS))


@dataclass(frozen=True)
class CSearch:
    """The result of a search over C.

    Attributes:
        C: the best on the validation images; the smallest in a tie.
        trace: (C, score on the validation images) in the order of the fits.
        probe: fitted with the best C, to training and validation images together unless ``fit_all`` is False.
    """

    C: float
    trace: list[tuple[float, float]]
    probe: LinearProbe


def fit_linear_probe(
    features_ND: Tensor,
    labels_N: Tensor,
    C: float = 1.0,
    num_classes: int | None = None,
    tolerance: float = 1e-5,
) -> LinearProbe:
    """Fit a linear classifier to features, on their device and in their dtype with sums in float64.

    The objective and the meaning of C are those of scikit-learn's ``LogisticRegression``, even for two classes, for which
    scikit-learn has a single row of weights.

    Args:
        features_ND: [N, D], float32 or float64.
        labels_N: [N], class indices; or [N, K], 1 if an image has a class, else 0.
        num_classes: K [the largest label plus one].
        tolerance: the solver ends when no element of its gradient is larger, or when rounding prevents further progress;
            in float32 that may be a few times above the default.

    Raises:
        ValueError: the arguments do not fit, or a feature is not finite.
    """
    problem = _problem(features_ND, labels_N, num_classes)
    return problem.probe(problem.solve(C, tolerance))


def search_C(
    train_features_ND: Tensor,
    train_labels_N: Tensor,
    val_features_ND: Tensor,
    val_labels_N: Tensor,
    num_classes: int | None = None,
    metric: Metric | None = None,
    tolerance: float = 1e-5,
    fit_all: bool = True,
    progress: Callable[[int], None] | None = None,
    block_metric: BlockMetric | None = None,
) -> CSearch:
    """Find the C whose probe is best on validation images, and fit it to all images (appendix A.3).

    The search tries every sixteenth point of ``GRID``, then the points 8, 4, 2 and 1 steps beside the best one so far. These
    are at most 15 fits, each started from the nearest earlier one.

    Args:
        metric: takes the validation images' (logits [N, K], labels [N]); larger is better [top-1 accuracy].
        fit_all: whether the returned probe is fitted to the validation images too.
        progress: is called with 1 after each fit.
        block_metric: replaces ``metric``. It takes the logits block by block, [rows, K], and all labels, so that the logits
            of all images are never held.

    Raises:
        ValueError: see ``fit_linear_probe``; or there are no validation images, or both metrics are given.
    """
    if not len(val_labels_N):
        raise ValueError("the search over C needs at least one validation image")
    for features_ND, labels_N in (
        (train_features_ND, train_labels_N),
        (val_features_ND, val_labels_N),
    ):
        _check(features_ND, labels_N, None)
    kinds = [(f.shape[1], f.dtype, f.device) for f in (train_features_ND, val_features_ND)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            "training and validation features differ in width, dtype or device: "
            f"{' and '.join(' '.join(map(str, kind)) for kind in kinds)}"
        )

    if num_classes is None and train_labels_N.dim() == 1:
        num_classes = int(max(train_labels_N.max(), val_labels_N.max())) + 1
    train, val = (train_features_ND, train_labels_N), (val_features_ND, val_labels_N)
    tell, measure = progress or (lambda _: None), by_blocks(metric, block_metric)
    C, trace, probe = _search(train, val, num_classes, measure, tolerance, tell)
    if fit_all:
        features_ND = torch.cat([train_features_ND, val_features_ND])
        labels_N = torch.cat([train_labels_N, val_labels_N])
        probe = fit_linear_probe(features_ND, labels_N, C, num_classes, tolerance)
        tell(1)
    return CSearch(C, trace, probe)


def _search(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    num_classes: int | None,
    measure: BlockMetric,
    tolerance: float,
    tell: Callable[[int], None],
) -> tuple[float, list[tuple[float, float]], LinearProbe]:
    """Return the best C, the scores in the order of the fits, and the best probe of the training images."""
    problem = _problem(train[0], train[1], num_classes)
    solutions: dict[int, _Solution] = {}
    scores: dict[int, float] = {}

    def attempt(index: int) -> None:
        nearest = min(solutions, key=lambda other: abs(other - index), default=None)
        start = None if nearest is None else solutions[nearest]
        solutions[index] = problem.solve(GRID[index], tolerance, start)
        scores[index] = measure(problem.probe(solutions[index]).logit_blocks(val[0]), val[1])
        tell(1)

    def best() -> int:
        return min(scores, key=lambda index: (-scores[index], index))

    for index in range(0, len(GRID), _COARSE_STEP):
        attempt(index)
    step = _COARSE_STEP // 2
    while step:
        centre = best()
        for index in (centre - step, centre + step):
            if 0 <= index < len(GRID) and index not in scores:
                attempt(index)
        step //= 2

    found = best()
    trace = [(GRID[index], score) for index, score in scores.items()]
    return GRID[found], trace, problem.probe(solutions[found])


def by_blocks(metric: Metric | None, block_metric: BlockMetric | None) -> BlockMetric:
    """Return a function that scores logits block by block: from either metric, or top-1 without one.

    Raises:
        ValueError: both metrics are given.
    """
    if metric is None:
        return block_metric or top1_of_blocks
    if block_metric is not None:
        raise ValueError("metric and block_metric are both given; give one of them")
    whole = metric
    return lambda blocks, labels_N: whole(torch.cat(list(blocks)), labels_N)


def top1(logits_NK: Tensor, labels_N: Tensor) -> float:
    """Return the share of images whose class has the largest logit; the first class wins a tie."""
    return top1_of_blocks([logits_NK], labels_N)


def top1_of_blocks(blocks: Iterable[Tensor], labels_N: Tensor) -> float:
    """Return ``top1``, given logits [rows, K] block by block."""
    hits = begun = 0
    for block_BK in blocks:
        labels_B = labels_N[begun : begun + len(block_BK)]
        hits += int((block_BK.argmax(1) == labels_B).sum())
        begun += len(block_BK)
    return hits / len(labels_N)


def split_validation(
    labels: Sequence[int] | Tensor, keys: Sequence[str], fraction: float = 0.1
) -> list[bool]:
    """Return for each training image whether it is set aside for validation: always the same ones, some of each class.

    A hash of the keys selects them, so neither their order nor a random generator matters. A class with two or more images
    gives at least one, and keeps at least one.

    Args:
        labels: the classes of N images.
        keys: the names of the images.

    Returns:
        N flags.
    """
    by_class = members_by_class(labels, keys)
    is_set_aside = [False] * len(keys)
    for members in by_class.values():
        members.sort(key=lambda index: hashlib.sha256(keys[index].encode()).digest())
        number = min(max(round(fraction * len(members)), 1), len(members) - 1)
        for index in members[:number]:
            is_set_aside[index] = True
    return is_set_aside


def members_by_class(labels: Sequence[int] | Tensor, keys: Sequence[str]) -> dict[int, list[int]]:
    """Return the indices of each class's images, in order; raise ValueError unless each image has a key."""
    numbers = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if len(numbers) != len(keys):
        raise ValueError(f"{len(numbers)} labels have {len(keys)} keys")
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(numbers):
        by_class.setdefault(label, []).append(index)
    return by_class


@dataclass(frozen=True)
class _Solution:
    """A fit in the rotated, unscaled coordinates, for the classes with images: weight [K, R], bias [K]."""

    C: float
    weight: Tensor
    bias: Tensor
    num_iterations: int
    gradient_norm: float


def _problem(features_ND: Tensor, labels_N: Tensor, num_classes: int | None) -> _Problem:
    """Return the problem for labels with one class per image, or with several."""
    _check(features_ND, labels_N, num_classes)
    kind = _OneOfClasses if labels_N.dim() == 1 else _AnyOfClasses
    return kind(features_ND, labels_N, num_classes)


class _Problem:
    """The features in their principal directions, and the values that the fit of any C needs.

    Attributes:
        present: the classes that are fitted.
        bias_K: the initial bias of all classes; infinite, as in the optimum, for classes that are not fitted.
        labels: the labels of the fitted classes.
        prior_K: the bias of each fitted class without features.
        curvature: largest second derivative of the mean loss by a logit of a fitted class.
        penalty_factor: the factor of the squared weights, times 2 C.
    """

    present: Tensor
    bias_K: Tensor
    labels: Tensor
    prior_K: Tensor
    curvature: float
    penalty_factor: float

    def __init__(self, features_ND: Tensor) -> None:
        self._dtype = features_ND.dtype
        features_ND = features_ND.detach()
        self._mean_D = features_ND.mean(0, dtype=torch.float64)
        variances, directions = torch.linalg.eigh(self._covariance(features_ND))
        # Smaller values are rounding errors of zero.
        eps = torch.finfo(self._dtype).eps
        is_real = variances > variances.max() * max(len(variances) * eps**2, 1e-13)
        self._variance_R, self._directions_DR = variances[is_real], directions[:, is_real]
        centred_to = self._directions_DR.to(self._dtype)
        shift = (self._mean_D @ self._directions_DR).to(self._dtype)
        self._rotated_NR = torch.addmm(shift, features_ND, centred_to, beta=-1)

        # The gradient without features, where each class has its prior share.
        zeros = self._variance_R.new_zeros(len(self.present), len(self._variance_R))
        _, self._steepness_KR, _ = self._cross_entropy(zeros, self.prior_K)

    def _covariance(self, features_ND: Tensor) -> Tensor:
        total = features_ND.new_zeros((features_ND.shape[1],) * 2, dtype=torch.float64)
        for block in features_ND.split(_BLOCK_ROWS):
            centred = block.double() - self._mean_D
            total.addmm_(centred.T, centred)
        return total / len(features_ND)

    def solve(self, C: float, tolerance: float, start: _Solution | None = None) -> _Solution:
        """Minimise the mean objective, starting from another solution of this problem if one is given."""
        if not C > 0:
            raise ValueError(f"C is {C}, and must be positive")
        num_classes, num_rows = len(self.present), len(self.labels)
        zeros = self._variance_R.new_zeros(num_classes, len(self._variance_R))
        if not self.curvature:
            return _Solution(C, zeros, zeros.new_zeros(num_classes), 0, 0.0)

        penalty = self.penalty_factor / (C * num_rows)
        scale_R = (self.curvature * self._variance_R + penalty).rsqrt()
        bias_scale = self.curvature**-0.5
        begun = (
            (zeros, zeros.new_zeros(num_classes)) if start is None else (start.weight, start.bias)
        )
        weight_KR = (begun[0] / scale_R).requires_grad_()
        bias_K = (begun[1] / bias_scale).requires_grad_()

        # Many classes or a strong penalty make all gradients small, including the one without weights.
        steepness_KR = (self._steepness_KR * scale_R).abs()
        steepest = steepness_KR.max().item() if steepness_KR.numel() else 0.0
        limit = min(tolerance, _STEEPNESS * steepest) or tolerance
        solver = torch.optim.LBFGS(
            [weight_KR, bias_K],
            max_iter=_MAX_ITERATIONS,
            max_eval=2 * _MAX_ITERATIONS,
            tolerance_grad=limit,
            # The objective's excess over the optimum is about the square of the gradient.
            tolerance_change=10 * limit**2,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        @torch.no_grad()
        def evaluate() -> float:
            rotated_KR = weight_KR * scale_R
            loss, weight_grad, bias_grad = self._cross_entropy(rotated_KR, bias_K * bias_scale)
            weight_KR.grad = (weight_grad + penalty * rotated_KR) * scale_R
            bias_K.grad = bias_grad * bias_scale
            return loss + penalty / 2 * rotated_KR.square().sum().item()

        solver.step(evaluate)
        evaluate()
        gradients = [p.grad.abs().max().item() for p in (weight_KR, bias_K) if p.numel()]
        num_iterations = solver.state[weight_KR]["n_iter"]
        weight, bias = weight_KR.detach() * scale_R, bias_K.detach() * bias_scale
        return _Solution(C, weight, bias, num_iterations, max(gradients))

    def _cross_entropy(self, weight_KR: Tensor, bias_K: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the mean cross-entropy and its gradients by weight and bias; blocks of rows are summed in order."""
        weight, bias = weight_KR.to(self._dtype), bias_K.to(self._dtype)
        loss = bias_K.new_zeros(())
        weight_grad, bias_grad = torch.zeros_like(weight_KR), torch.zeros_like(bias_K)
        for rows_BR, labels in zip(
            self._rotated_NR.split(_BLOCK_ROWS), self.labels.split(_BLOCK_ROWS), strict=True
        ):
            logits_BK = torch.addmm(bias, rows_BR, weight.T)
            block_loss, residual_BK = self._loss_and_residual(logits_BK, labels)
            loss += block_loss
            weight_grad += residual_BK.T @ rows_BR
            bias_grad += residual_BK.sum(0, dtype=torch.float64)
        num_rows = len(self.labels)
        return loss.item() / num_rows, weight_grad / num_rows, bias_grad / num_rows

    def _loss_and_residual(self, logits_BK: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of rows in float64, and its gradient by their logits, [B, K]."""
        raise NotImplementedError

    def probe(self, solution: _Solution) -> LinearProbe:
        """Return a solution in the features' own coordinates, with all classes."""
        weight = solution.weight @ self._directions_DR.T
        bias = solution.bias - weight @ self._mean_D
        weight_KD = weight.new_zeros(len(self.bias_K), weight.shape[1])
        bias_K = self.bias_K.to(bias)
        weight_KD[self.present], bias_K[self.present] = weight, bias
        return LinearProbe(
            weight_KD.to(self._dtype),
            bias_K.to(self._dtype),
            solution.C,
            solution.num_iterations,
            solution.gradient_norm,
        )


class _OneOfClasses(_Problem):
    """Each image has one class: a softmax over all of them."""

    def __init__(self, features_ND: Tensor, labels_N: Tensor, num_classes: int | None) -> None:
        labels_N = labels_N.to(features_ND.device, torch.long)
        number = int(labels_N.max()) + 1 if num_classes is None else num_classes
        # For a class without images, the optimum is a bias of minus infinity.
        self.bias_K = torch.full((number,), -torch.inf)
        self.present, self.labels = labels_N.unique(return_inverse=True)
        self.prior_K = (self.labels.bincount().double() / len(labels_N)).log()
        num_present = len(self.present)
        self.curvature = (1 - 1 / num_present) / num_present
        # For two classes, scikit-learn's single row is the difference of the two rows, whose squares sum to half its square.
        self.penalty_factor = 2.0 if num_present == 2 else 1.0
        super().__init__(features_ND)

    def _loss_and_residual(self, logits_BK: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_probability_BK = logits_BK.log_softmax(1)
        loss = -log_probability_BK.gather(1, labels[:, None]).sum(dtype=torch.float64)
        residual_BK = log_probability_BK.exp_()
        residual_BK[torch.arange(len(labels), device=labels.device), labels] -= 1
        return loss, residual_BK


class _AnyOfClasses(_Problem):
    """Each image has any number of classes: a sigmoid of each."""

    def __init__(self, features_ND: Tensor, labels_NK: Tensor, _: int | None) -> None:
        labels_NK = labels_NK.to(features_ND.device, features_ND.dtype)
        share_K = labels_NK.mean(0, dtype=torch.float64)
        # For a class that all images have, or none has, the optimum is an infinite bias.
        self.bias_K = (share_K == 1).double().logit()
        self.present = ((share_K > 0) & (share_K < 1)).nonzero().flatten()
        self.labels = labels_NK[:, self.present]
        self.prior_K = share_K[self.present].logit()
        self.curvature = 0.25 if len(self.present) else 0.0
        self.penalty_factor = 1.0
        super().__init__(features_ND)

    def _loss_and_residual(self, logits_BK: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # log(1 + exp(z)) - y z, without overflow.
        losses = F.binary_cross_entropy_with_logits(logits_BK, labels, reduction="none")
        return losses.sum(dtype=torch.float64), logits_BK.sigmoid().sub_(labels)


def _check(features_ND: Tensor, labels_N: Tensor, num_classes: int | None) -> None:
    """Raise ValueError unless there are features with matching labels."""
    if not isinstance(features_ND, Tensor) or not isinstance(labels_N, Tensor):
        kinds = f"{type(features_ND).__name__} and {type(labels_N).__name__}"
        raise ValueError(f"features and labels are tensors, not {kinds}; use torch.as_tensor()")
    if features_ND.dim() != 2 or features_ND.dtype not in (torch.float32, torch.float64):
        kind = f"{features_ND.dtype} {list(features_ND.shape)}"
        raise ValueError(f"features are [N, D] in float32 or float64, not {kind}; use .float()")
    if labels_N.dim() == 2 and len(labels_N) == len(features_ND) and labels_N.numel():
        if not ((labels_N == 0) | (labels_N == 1)).all():
            raise ValueError("labels [N, K] are 1 where an image has a class, and 0 where not")
        if num_classes not in (None, labels_N.shape[1]):
            raise ValueError(f"labels of {labels_N.shape[1]} classes are not of {num_classes}")
    elif labels_N.shape != features_ND.shape[:1] or not len(labels_N):
        shape = "x".join(map(str, labels_N.shape)) or "1"
        raise ValueError(f"{len(features_ND)} rows of features have {shape} labels")
    elif (
        labels_N.is_floating_point()
        or labels_N.is_complex()
        or labels_N.dtype == torch.bool
        or int(labels_N.min()) < 0
    ):
        raise ValueError("labels are class indices from 0, whole numbers")
    elif num_classes is not None and int(labels_N.max()) >= num_classes:
        raise ValueError(f"label {int(labels_N.max())} is not one of {num_classes} classes")
    if not features_ND.isfinite().all():
        row = int((~features_ND.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"features of row {row} are not finite; look at the image or the model")
