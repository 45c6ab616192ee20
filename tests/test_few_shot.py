"""Few-shot curves: nested images that depend on keys and seed alone, and how many labels match a zero-shot score."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from clipcore.evaluate import few_shot, linear_probe
from clipcore.evaluate.few_shot import FewShotCurve, few_shot_curve, labels_per_class
from clipcore.evaluate.linear_probe import fit_linear_probe, search_C

pytestmark = pytest.mark.fast


def drawn(num_a_class: int, num_classes: int = 3) -> tuple[Tensor, Tensor, list[str]]:
    generator = torch.Generator().manual_seed(num_a_class)
    labels = torch.arange(num_a_class * num_classes) % num_classes
    centres = torch.randn(num_classes, 6, generator=generator)
    features = centres[labels] + torch.randn(len(labels), 6, generator=generator)
    return features, labels, [f"{index:04d}.jpg" for index in range(len(labels))]


def fitted_images(*arguments: object, **more: object) -> tuple[FewShotCurve, list[set[int]]]:
    """Make a curve whose features are their own numbers; return it and the images of each fit."""
    fits: list[set[int]] = []

    def noted(features: Tensor, labels: Tensor, *rest: object) -> object:
        fits.append(set(features[:, 0].long().tolist()))
        return fit_linear_probe(features, labels, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_shot, "fit_linear_probe", noted)
        return few_shot_curve(*arguments, **more), fits


def test_more_shots_hold_the_fewer_ones_and_seeds_differ():
    _, labels, keys = drawn(20)
    numbered = torch.arange(len(labels)).float()[:, None]
    curve, fits = fitted_images(
        *(numbered, labels, keys, numbered, labels), shots=(1, 2, 4), seeds=(0, 1), C=1.0
    )
    assert curve.shots == (1, 2, 4) and [len(row) for row in curve.scores] == [2, 2, 2]
    first, second = fits[0::2], fits[1::2]
    for images in (first, second):
        assert [len(fit) for fit in images] == [3, 6, 12]
        assert images[0] < images[1] < images[2]
        assert all(torch.bincount(labels[list(fit)]).unique().numel() == 1 for fit in images)
    assert first != second


def test_the_order_of_the_files_does_not_matter():
    features, labels, keys = drawn(8)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    shuffled = (features[order], labels[order], [keys[i] for i in order.tolist()])
    more = {"shots": (1, 2), "seeds": (0, 1, 2)}
    curve = few_shot_curve(*drawn(8), *drawn(30)[:2], **more)
    assert few_shot_curve(*shuffled, *drawn(30)[:2], **more).scores == curve.scores


def test_c_is_chosen_on_other_images_and_these_are_not_fitted(monkeypatch):
    features, labels, keys = drawn(20)
    seen: list[tuple[int, int, bool]] = []

    def noted(
        X: Tensor,
        y: Tensor,
        val_X: Tensor,
        val_y: Tensor,
        *rest: object,
        fit_all: bool,
        **more: object,
    ):
        both = torch.cat([X, val_X])
        assert len(both.unique(dim=0)) == len(both)
        seen.append((len(X), len(val_X), fit_all))
        return search_C(X, y, val_X, val_y, *rest, fit_all=fit_all, **more)

    monkeypatch.setattr(few_shot, "search_C", noted)
    curve = few_shot_curve(features, labels, keys, features, labels, seeds=(0,))
    assert seen == [(3 * k, 3 * min(k, 4), False) for k in few_shot.SHOTS]
    assert curve.deviations == [0.0] * 5
    assert curve.means == [row[0] for row in curve.scores]


def test_the_probe_is_that_of_the_few_images():
    features, labels, keys = drawn(8)
    curve = few_shot_curve(features, labels, keys, features, labels, (2,), (0,), C=0.5)
    assert curve.Cs == ((0.5,),)
    chosen = few_shot._order(labels.tolist(), keys, 2, 0)
    rows = torch.tensor([index for members in chosen for index in members[:2]])
    probe = fit_linear_probe(features[rows], labels[rows], 0.5)
    right = (probe.logits(features).argmax(1) == labels).double().mean().item()
    assert curve.scores == ((right,),)


def test_means_and_deviations_are_over_seeds():
    curve = FewShotCurve((1, 2), ((0.1, 0.3), (0.5, 0.5)), ((1.0, 1.0), (1.0, 1.0)))
    assert curve.means == pytest.approx([0.2, 0.5])
    assert curve.deviations == pytest.approx([0.02**0.5, 0.0])


def test_too_few_images_are_named():
    features, labels, keys = drawn(5)
    with pytest.raises(
        ValueError, match="no class has the 16 training images asked for, and the largest has 5"
    ):
        few_shot_curve(features, labels, keys, features, labels)
    with pytest.raises(ValueError, match="no image is left beside 5 a class to choose C by"):
        few_shot_curve(features, labels, keys, features, labels, shots=(5,))


def test_a_class_with_fewer_images_gives_all_of_them():
    features, labels, keys = drawn(8)
    kept = [row for row in range(len(labels)) if labels[row] != 1 or row in (1, 4)]
    X, y = features[kept], labels[kept]
    assert y.bincount().tolist() == [8, 2, 8]
    names = [keys[row] for row in kept]
    told = []
    curve = few_shot_curve(X, y, names, features, labels, (1, 4), (0,), 0.5, progress=told.append)
    chosen = few_shot._order(y.tolist(), names, 4, 0)
    rows = torch.tensor([index for members in chosen for index in members[:4]])
    assert len(rows) == 10 and told == [1, 1]
    probe = fit_linear_probe(X[rows], y[rows], 0.5)
    right = (probe.logits(features).argmax(1) == labels).double().mean().item()
    assert curve.scores[1] == (right,)


TRIED, SCORES = (1, 2, 4, 8, 16), (40.0, 50.0, 60.0, 65.0, 70.0)


@pytest.mark.parametrize(
    ("zero_shot", "number", "text"),
    [
        (62.5, 5.657, "5.7"),
        (45.0, 1.414, "1.4"),
        (67.5, 11.314, "11.3"),
        (39.0, 2**-0.1, "<1"),
        (40.0, 1.0, "1.0"),
        (50.0, 2.0, "2.0"),
        (70.0, 16.0, "16.0"),
        (70.1, None, ">16"),
    ],
)
def test_labels_that_a_zero_shot_score_is_worth(zero_shot, number, text):
    found = labels_per_class(TRIED, SCORES, zero_shot)
    assert found.text == text
    assert found.number == (None if number is None else pytest.approx(number, abs=5e-4))


def test_a_score_of_one_image_is_worth_one_where_the_curve_falls():
    assert labels_per_class((1, 2, 4), (0.5, 0.4, 0.45), 0.5).text == "1.0"


def test_a_curve_that_falls_is_passed_where_it_rises_first():
    assert labels_per_class((1, 2, 4), (0.4, 0.3, 0.5), 0.35).text == "<1"
    assert labels_per_class((1, 2, 4), (0.4, 0.3, 0.5), 0.35).number == 1
    assert labels_per_class((1, 2, 4), (0.4, 0.3, 0.5), 0.45).number == pytest.approx(2**1.75)
    assert labels_per_class((1, 2, 4), (0.4, 0.4, 0.5), 0.4).number == 1.0
    assert labels_per_class((2,), (0.4,), 0.4).text == "2.0"
    with pytest.raises(ValueError, match="2 numbers of images have 1 scores"):
        labels_per_class((1, 2), (0.4,), 0.4)


def test_a_metric_takes_all_logits_and_a_block_metric_some_of_them(monkeypatch):
    monkeypatch.setattr(linear_probe, "_SCORED_ROWS", 7)
    features, labels, keys = drawn(8)
    seen = set()

    def whole(logits_NK: Tensor, labels_N: Tensor) -> float:
        seen.add(tuple(logits_NK.shape))
        return (logits_NK.argmax(1) == labels_N).double().mean().item()

    def by_blocks(blocks: Iterable[Tensor], labels_N: Tensor) -> float:
        sizes = list(map(len, blocks))
        assert sum(sizes) == len(labels_N) and max(sizes) <= 7
        return -1.0

    arguments = (features, labels, keys, features, labels, (2,), (0,))
    curve = few_shot_curve(*arguments, metric=whole)
    # Six images to choose C by, and all to test.
    assert seen == {(6, 3), (24, 3)}
    assert curve == few_shot_curve(*arguments)
    assert few_shot_curve(*arguments, block_metric=by_blocks).scores == ((-1.0,),)
    with pytest.raises(ValueError, match="both given"):
        few_shot_curve(*arguments, metric=whole, block_metric=by_blocks)
