"""The linear probe: scikit-learn's optimum, what must not change it, and the paper's search over C."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import pytest
import torch
from numerics import LiveStorages
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from clipcore.evaluate import linear_probe
from clipcore.evaluate.linear_probe import (
    GRID,
    LinearProbe,
    fit_linear_probe,
    search_C,
    split_validation,
)

pytestmark = pytest.mark.fast


def drawn(
    num_images: int, width: int, num_classes: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return overlapping clouds of features, one a class, far from the origin, with their labels."""
    generator = torch.Generator().manual_seed(num_images)
    centres = torch.randn(num_classes, width, generator=generator, dtype=dtype)
    labels = torch.arange(num_images) % num_classes
    noise = torch.randn(num_images, width, generator=generator, dtype=dtype)
    return 0.7 * centres[labels] + noise + 3, labels


def objective(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, C: float) -> float:
    logits = features.double() @ weight.double().T + bias.double()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return (C * loss + weight.double().square().sum() / 2).item()


def theirs(features: Tensor, labels: Tensor, C: float, tol: float = 1e-10) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # its line search ends where rounding leaves nothing to gain
        model = LogisticRegression(C=C, tol=tol, max_iter=100_000)
        return model.fit(features.numpy(), labels.numpy())


def unbalanced() -> tuple[Tensor, Tensor]:
    features, labels = drawn(120, 6, 4)
    is_kept = (labels != 3) | (torch.arange(120) < 40)
    return features[is_kept], labels[is_kept]


def one_of_a_class() -> tuple[Tensor, Tensor]:
    features, labels = drawn(60, 5, 3)
    labels = torch.where(labels == 2, 0, labels)
    labels[0] = 2
    return features, labels


def doubled_columns() -> tuple[Tensor, Tensor]:
    features, labels = drawn(80, 6, 3)
    return torch.cat([features, features[:, :3]], 1), labels


def constant_column() -> tuple[Tensor, Tensor]:
    features, labels = drawn(80, 6, 3)
    features[:, 2] = 5.0
    return features, labels


CASES = {
    "more images than features": lambda: drawn(150, 8, 5),
    "fewer images than features": lambda: drawn(30, 50, 4),
    "classes of different sizes": unbalanced,
    "one image of a class": one_of_a_class,
    "equal columns": doubled_columns,
    "a constant column": constant_column,
}


@pytest.mark.parametrize("C", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("case", CASES)
def test_the_optimum_is_scikit_learns(case, C):
    features, labels = CASES[case]()
    probe = fit_linear_probe(features, labels, C, tolerance=1e-9)
    # The objective tells two places apart to 1e-16 of itself, and so the gradient to about the root of that.
    assert probe.gradient_norm < 3e-8
    sklearn = theirs(features, labels, C)
    coef, intercept = torch.from_numpy(sklearn.coef_), torch.from_numpy(sklearn.intercept_)
    ours = objective(probe.weight, probe.bias, features, labels, C)
    assert ours <= objective(coef, intercept, features, labels, C) * (1 + 1e-10)
    torch.testing.assert_close(probe.weight, coef, rtol=0, atol=1e-4 * coef.abs().max().item())


def test_the_gradient_at_the_optimum_is_zero():
    """Autograd's, of the objective as it is written, in the features' own coordinates."""
    features, labels = drawn(90, 7, 4)
    probe = fit_linear_probe(features, labels, 2.0, tolerance=1e-11)
    weight, bias = probe.weight.requires_grad_(), probe.bias.requires_grad_()
    loss = F.cross_entropy(features @ weight.T + bias, labels, reduction="sum")
    (2.0 * loss + weight.square().sum() / 2).backward()
    assert weight.grad.abs().max() < 1e-6 and bias.grad.abs().max() < 1e-6


def test_c_of_two_classes_is_scikit_learns():
    features, labels = drawn(100, 6, 2)
    probe = fit_linear_probe(features, labels, 0.3, tolerance=1e-10)
    sklearn = theirs(features, labels, 0.3)
    row = torch.from_numpy(sklearn.coef_[0])
    torch.testing.assert_close(probe.weight[1] - probe.weight[0], row, rtol=1e-5, atol=1e-6)
    probability = torch.from_numpy(sklearn.predict_proba(features.numpy()))
    torch.testing.assert_close(probe.logits(features).softmax(1), probability, rtol=0, atol=1e-6)


def test_float32_comes_as_close_as_its_products():
    features, labels = drawn(200, 12, 5, torch.float32)
    exact = fit_linear_probe(features.double(), labels, 10.0, tolerance=1e-10)
    probe = fit_linear_probe(features, labels, 10.0)
    assert probe.weight.dtype == torch.float32
    least = objective(exact.weight, exact.bias, features, labels, 10.0)
    assert objective(probe.weight, probe.bias, features, labels, 10.0) < least * (1 + 1e-6)


def test_blocks_of_rows_are_one_problem(monkeypatch):
    features, labels = drawn(100, 6, 3)
    whole = fit_linear_probe(features, labels, tolerance=1e-10)
    monkeypatch.setattr(linear_probe, "_BLOCK_ROWS", 7)
    parts = fit_linear_probe(features, labels, tolerance=1e-10)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=1e-8)


def test_moved_and_turned_features_give_the_same_predictions():
    features, labels = drawn(100, 6, 3)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    expected = fit_linear_probe(features, labels, tolerance=1e-10).logits(features).softmax(1)
    for changed in (features + 100.0, features @ turn):
        probe = fit_linear_probe(changed, labels, tolerance=1e-10)
        found = probe.logits(changed).softmax(1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_an_endless_penalty_leaves_the_shares_of_the_classes():
    features, labels = unbalanced()
    probe = fit_linear_probe(features, labels, 1e-12, tolerance=1e-12)
    shares = labels.bincount().double() / len(labels)
    found = probe.logits(features).softmax(1)
    torch.testing.assert_close(found, shares.expand_as(found), rtol=0, atol=1e-9)


def test_features_without_variance_leave_the_shares_too():
    labels = torch.tensor([0, 0, 1, 2])
    probe = fit_linear_probe(torch.full((4, 3), 2.0, dtype=torch.float64), labels, tolerance=1e-12)
    assert not probe.weight.any()
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    torch.testing.assert_close(probe.bias.softmax(0), shares, rtol=0, atol=1e-9)


def test_a_class_without_images_is_never_predicted():
    features, labels = drawn(60, 5, 3)
    labels = torch.where(labels == 1, 3, labels)  # 0, 2, 3
    probe = fit_linear_probe(features, labels, num_classes=5)
    assert probe.weight.shape == (5, 5) and probe.bias.isneginf().tolist() == [0, 1, 0, 0, 1]
    found = probe.logits(features)
    assert set(found.argmax(1).tolist()) <= {0, 2, 3} and not found.isnan().any()


def test_one_class_alone_needs_no_weights():
    probe = fit_linear_probe(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    assert not probe.weight.any() and not probe.bias.any() and probe.num_iterations == 0


def test_two_clouds_are_told_apart_as_often_as_theory_says():
    """Normal clouds of equal covariance at a distance of 2: Phi(1) of the images, within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40_000) % 2
    features = torch.randn(40_000, 3, generator=generator)
    features[:, 0] += 2.0 * labels
    probe = fit_linear_probe(features[:20_000], labels[:20_000])
    right = probe.logits(features[20_000:]).argmax(1) == labels[20_000:]
    expected = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    error = math.sqrt(expected * (1 - expected) / 20_000)
    assert abs(right.double().mean().item() - expected) < 4 * error


def visited(best: int) -> tuple[list[int], float]:
    """Search with scores that fall away from one point of the grid; return the points tried, and the C found."""
    features, labels = drawn(12, 2, 3)
    tried: list[int] = []
    solve = linear_probe._Problem.solve

    def noted(problem: object, C: float, tolerance: float, start: object = None) -> object:
        tried.append(GRID.index(C))
        return solve(problem, C, tolerance, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probe._Problem, "solve", noted)
        found = search_C(
            *(features, labels, features, labels), metric=lambda *_: -abs(tried[-1] - best)
        )
    assert found.trace == [(GRID[index], -abs(index - best)) for index in tried[:-1]]
    assert GRID.index(found.C) == tried[-1]  # the fit to all images
    return tried[:-1], found.C


@pytest.mark.parametrize(
    ("best", "beside"),
    [
        (37, [24, 40, 36, 44, 34, 38, 35, 37]),
        (48, [40, 56, 44, 52, 46, 50, 47, 49]),
        (0, [8, 4, 2, 1]),
        (95, [88, 92, 94, 93, 95]),
    ],
)
def test_the_search_visits_the_papers_points(best, beside):
    tried, found = visited(best)
    assert tried[:7] == [0, 16, 32, 48, 64, 80, 96]
    assert sorted(tried[7:]) == sorted(beside)
    assert found == GRID[best]
    assert len(tried) <= 15
    assert (GRID[0], GRID[48], GRID[96]) == (1e-6, 1.0, 1e6)


def test_of_equally_good_points_the_smallest_is_taken():
    features, labels = drawn(12, 2, 3)
    found = search_C(features, labels, features, labels, metric=lambda *_: 0.5)
    assert GRID[0] == found.C


def test_the_search_fits_training_and_validation_images_together():
    features, labels = drawn(90, 5, 3)
    found = search_C(features[:60], labels[:60], features[60:], labels[60:], tolerance=1e-10)
    whole = fit_linear_probe(features, labels, found.C, tolerance=1e-10)
    torch.testing.assert_close(found.probe.weight, whole.weight, rtol=0, atol=1e-9)
    # A search's own score is that of a fit to the training images alone, whatever it began from.
    for C, score in found.trace:
        alone = fit_linear_probe(features[:60], labels[:60], C, tolerance=1e-10)
        assert score == linear_probe.top1(alone.logits(features[60:]), labels[60:])


def test_a_class_of_the_validation_images_alone_is_counted():
    features, labels = drawn(30, 4, 3)
    is_train = labels != 2
    found = search_C(features[is_train], labels[is_train], features, labels)
    assert found.probe.weight.shape == (3, 4) and found.probe.bias.isfinite().all()


def test_the_split_is_of_every_class_and_depends_on_keys_alone():
    labels = [0] * 40 + [1] * 12 + [2] * 2 + [3]
    keys = [f"{index:03d}.jpg" for index in range(len(labels))]
    flags = split_validation(labels, keys)
    by_class = [[f for f, label in zip(flags, labels, strict=True) if label == c] for c in range(4)]
    assert [sum(part) for part in by_class] == [4, 1, 1, 0]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = split_validation([labels[i] for i in order], [keys[i] for i in order])
    assert shuffled == [flags[i] for i in order]
    assert flags != split_validation(labels, [f"other {key}" for key in keys])


FEATURES, LABELS = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("features", "labels", "more", "message"),
    [
        (FEATURES.half(), LABELS, {}, r"use \.float\(\)"),
        (FEATURES[0], LABELS, {}, r"are \[N, D\]"),
        (FEATURES, LABELS[:3], {}, "4 rows of features have 3 labels"),
        (FEATURES[:0], LABELS[:0], {}, "0 rows of features have 0 labels"),
        (FEATURES, LABELS - 1, {}, "class indices from 0"),
        (FEATURES, LABELS.float(), {}, "class indices from 0, whole numbers"),
        (FEATURES, LABELS.bool(), {}, "class indices from 0, whole numbers"),
        (FEATURES, F.one_hot(LABELS)[:3], {}, "4 rows of features have 3x2 labels"),
        (FEATURES.numpy(), LABELS, {}, r"not ndarray and Tensor; use torch.as_tensor\(\)"),
        (FEATURES, LABELS.tolist(), {}, "not Tensor and list"),
        (FEATURES, LABELS, {"num_classes": 1}, "label 1 is not one of 1 classes"),
        (FEATURES, LABELS, {"C": 0.0}, "C is 0.0"),
        (FEATURES, LABELS, {"C": float("nan")}, "C is nan"),
        (FEATURES.index_fill(0, torch.tensor(2), math.inf), LABELS, {}, "row 2 are not finite"),
    ],
)
def test_what_does_not_fit_is_named(features, labels, more, message):
    with pytest.raises(ValueError, match=message):
        fit_linear_probe(features, labels, **more)


def test_a_search_needs_validation_images():
    with pytest.raises(ValueError, match="at least one validation image"):
        search_C(FEATURES, LABELS, FEATURES[:0], LABELS[:0])


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (FEATURES[:, :2], LABELS, "differ in width, dtype or device: 3 torch.float32 cpu and 2"),
        (FEATURES.double(), LABELS, "differ in width, dtype or device"),
        (FEATURES, LABELS[:2], "4 rows of features have 2 labels"),
    ],
)
def test_validation_images_that_do_not_fit_are_named_before_a_fit(features, labels, message):
    with pytest.raises(ValueError, match=message):
        search_C(FEATURES, LABELS, features, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_may_be_of_any_whole_numbers(dtype):
    features, labels = drawn(60, 5, 3)
    found = fit_linear_probe(features, labels.to(dtype), num_classes=4)
    assert torch.equal(found.weight, fit_linear_probe(features, labels, num_classes=4).weight)


def test_a_probe_is_made_of_plain_tensors():
    probe = LinearProbe(torch.eye(2), torch.zeros(2), 1.0, 0, 0.0)
    assert probe.logits(torch.tensor([[3.0, 1.0]])).tolist() == [[3.0, 1.0]]


def test_a_strong_penalty_on_unit_features_of_many_classes_leaves_directions():
    """There the gradient without weights is below any fixed limit, and the optimum is no zero."""
    features = F.normalize(
        torch.randn(300, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1
    )
    labels = torch.arange(300)
    probe = fit_linear_probe(features, labels, 1e-8)
    exact = fit_linear_probe(features, labels, 1e-8, tolerance=1e-13)
    assert probe.num_iterations > 0
    assert (probe.weight - exact.weight).abs().max() < 0.01 * exact.weight.abs().max()
    assert linear_probe.top1(probe.logits(features), labels) > 0.99


def test_features_with_a_graph_are_numbers():
    features, labels = drawn(60, 5, 3)
    probe = fit_linear_probe(features.clone().requires_grad_() * 1.0, labels)
    expected = fit_linear_probe(features, labels)
    assert torch.equal(probe.weight, expected.weight) and not probe.weight.requires_grad


def test_labels_of_a_split_may_be_a_tensor():
    labels, keys = torch.tensor([0] * 20 + [1] * 20), [str(index) for index in range(40)]
    assert split_validation(labels, keys) == split_validation(labels.tolist(), keys)
    with pytest.raises(ValueError, match="40 labels have 39 keys"):
        split_validation(labels, keys[1:])


def several_labels(num_images: int = 300, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    """Features [N, 12] in float64, and 0 or 1 of each class."""
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(num_images, 12, generator=generator, dtype=torch.float64)
    directions = torch.randn(12, num_classes, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_images, num_classes, generator=generator, dtype=torch.float64)
    return X, (X @ directions + 2 * noise > 1).to(torch.uint8)


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_probe_of_several_labels_is_a_regression_of_each_class(C: float) -> None:
    X, labels_NK = several_labels()
    probe = fit_linear_probe(X, labels_NK, C, tolerance=1e-9)
    for k in range(labels_NK.shape[1]):
        oracle = LogisticRegression(C=C, tol=1e-12, max_iter=10000)
        oracle.fit(X.numpy(), labels_NK[:, k].numpy())
        ours = _objective_of_one(probe.weight[k], probe.bias[k], X, labels_NK[:, k], C)
        theirs = _objective_of_one(
            torch.from_numpy(oracle.coef_[0]),
            torch.from_numpy(oracle.intercept_)[0],
            X,
            labels_NK[:, k],
            C,
        )
        assert ours <= theirs * (1 + 1e-9)
        torch.testing.assert_close(
            probe.weight[k], torch.from_numpy(oracle.coef_[0]), rtol=1e-5, atol=1e-6
        )


def _objective_of_one(weight: Tensor, bias: Tensor, X: Tensor, y: Tensor, C: float) -> float:
    logits = X @ weight + bias
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.to(X), reduction="sum")
    return (C * loss + weight.square().sum() / 2).item()


def test_label_that_all_or_no_images_have_is_certain() -> None:
    X, labels_NK = several_labels()
    labels_NK[:, 1], labels_NK[:, 3] = 1, 0
    probe = fit_linear_probe(X, labels_NK)
    assert probe.bias[1] == torch.inf and probe.bias[3] == -torch.inf
    assert not probe.weight[[1, 3]].any() and probe.weight[[0, 2, 4]].all()
    assert probe.logits(X)[:, [1, 3]].sigmoid().unique().tolist() == [0, 1]


def test_search_over_C_of_several_labels_uses_its_metric() -> None:
    X, labels_NK = several_labels()
    seen = []

    def metric(logits_NK: Tensor, labels: Tensor) -> float:
        seen.append(logits_NK.shape)
        return -((logits_NK > 0) != labels.bool()).double().mean().item()

    found = search_C(X[:200], labels_NK[:200], X[200:], labels_NK[200:], metric=metric)
    assert len(seen) == 15 and set(seen) == {torch.Size([100, 5])}

    def by_blocks(blocks: Iterable[Tensor], labels: Tensor) -> float:
        return metric(torch.cat(list(blocks)), labels)

    parts = (X[:200], labels_NK[:200], X[200:], labels_NK[200:])
    assert search_C(*parts, block_metric=by_blocks).trace == found.trace
    with pytest.raises(ValueError, match="both given"):
        search_C(*parts, metric=metric, block_metric=by_blocks)
    again = fit_linear_probe(X, labels_NK, found.C)
    torch.testing.assert_close(found.probe.weight, again.weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.full((300, 5), 2), "1 where an image has a class"),
        (torch.zeros(300, 5) - 1, "1 where an image has a class"),
        (torch.zeros(299, 5, dtype=torch.long), "299"),
    ],
)
def test_labels_of_several_classes_that_do_not_fit_are_refused(labels: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit_linear_probe(several_labels()[0], labels)


@pytest.mark.parametrize("num_images", [4096, 4097, 10_000])
@pytest.mark.parametrize("num_classes", [2, 30])
def test_blocks_of_logits_score_as_all_of_them_do(num_images: int, num_classes: int) -> None:
    X, labels_N = drawn(num_images, 24, num_classes)
    probe = fit_linear_probe(X[:200], labels_N[:200], 1.0, num_classes)
    blocks = list(probe.logit_blocks(X))
    assert max(map(len, blocks)) <= 4096 and sum(map(len, blocks)) == num_images
    whole_NK = probe.logits(X)
    expected = (whole_NK.argmax(1) == labels_N).double().mean().item()
    assert linear_probe.top1(whole_NK, labels_N) == expected
    assert linear_probe.top1_of_blocks(probe.logit_blocks(X), labels_N) == expected


def test_a_search_never_holds_the_logits_of_all_validation_images() -> None:
    num_images, num_classes = 40_000, 200
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(num_images, 4, generator=generator)
    labels_N = torch.arange(num_images) % num_classes
    with LiveStorages() as seen:
        search_C(X[:50], labels_N[:50] % 3, X, labels_N, num_classes, fit_all=False)
    all_logits = 4 * num_images * num_classes
    # A block is a tenth of them.
    assert all_logits / 10 <= seen.peak_bytes < all_logits / 4
