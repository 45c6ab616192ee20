"""Zero-shot, prompt gains, probes and few-shot on small data sets, against plain computations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from evaluation_sets import nano, nano_subject, noise_set, split_of
from numerics import LiveStorages
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional as F

from clipcore.data import DataError
from clipcore.evaluate.compute import image_macs
from clipcore.evaluate.features import SplitFeatures
from clipcore.evaluate.few_shot import FewShotCurve
from clipcore.evaluate.linear_probe import fit_linear_probe
from clipcore.evaluate.measure import (
    ProbeOptions,
    Subject,
    _curve_details,
    _probe_metrics,
    measure_few_shot,
    measure_linear_probe,
    measure_prompts,
    measure_zero_shot,
    zero_shot_metrics,
)
from clipcore.evaluate.metrics import wilson_interval
from clipcore.evaluate.prompts import IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from clipcore.evaluate.results import Result

TEST = [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 0, 5, 5]
TRAIN = [number % 6 for number in range(60)]


def plain_scores(subject: Subject, dataset, templates) -> torch.Tensor:
    """Cosines [N, C] in float64, prompt by prompt and image by image."""
    model, tokenizer = subject.loaded.model, subject.loaded.tokenizer
    columns = []
    for names in dataset.classnames:
        texts = [t.replace("{}", name) for name in names for t in templates]
        with torch.no_grad():
            units = [F.normalize(model.encode_text(tokenizer([t])).double(), dim=-1) for t in texts]
        columns.append(F.normalize(torch.cat(units).mean(0), dim=0))
    features = subject.features(dataset, "test").whole(projected=True).double()
    return F.normalize(features, dim=-1) @ torch.stack(columns, 1)


def test_zero_shot_is_the_plain_one(tmp_path):
    subject, dataset = nano_subject(), noise_set(6, [split_of("test", TEST)])
    result = measure_zero_shot(subject, dataset)
    scores = plain_scores(subject, dataset, dataset.templates)
    order, labels = scores.argsort(1, descending=True), torch.tensor(TEST)
    is_right = order[:, 0] == labels
    recalls = [is_right[labels == c].double().mean().item() for c in range(6)]

    assert result.metrics["acc1"] == is_right.double().mean()
    assert result.metrics["acc5"] == (order[:, :5] == labels[:, None]).any(1).double().mean()
    assert result.metrics["mean_per_class_recall"] == pytest.approx(np.mean(recalls), abs=1e-15)
    details = result.details
    assert details["templates"] == ["a {}.", "{}"] and details["chance"] == 1 / 6
    assert details["ci95"] == list(wilson_interval(int(is_right.sum()), len(TEST)))
    assert (details["first_class"], details["last_class"]) == ("colour 0", "colour 5")
    assert (details["num_images"], details["num_classes"]) == (len(TEST), 6)
    assert result.value == result.metrics["acc1"]


def test_templates_come_from_the_caller_the_set_or_openai():
    subject, split = nano_subject(), split_of("test", TEST)
    own = noise_set(6, [split])
    none = dataclasses.replace(own, templates=(), name="none")
    assert measure_zero_shot(subject, own, ["b {}"]).details["templates"] == ["b {}"]
    found = measure_zero_shot(subject, none).details["templates"]
    assert found == list(SIMPLE_IMAGENET_TEMPLATES)


def test_scores_of_all_classes_are_never_held_of_all_images():
    subject, num_classes = nano_subject(), 300
    model = subject.loaded.model
    classifier_EC = F.normalize(torch.randn(model.config.embed_dim, num_classes), dim=0)

    def peak_bytes(num_images: int) -> int:
        labels = np.arange(num_images) % num_classes
        split = split_of("test", list(labels))
        pooled_NW = np.random.default_rng(0).normal(size=(num_images, model.config.vision.width))
        features = SplitFeatures(split, pooled_NW.astype(np.float32), np.arange(num_images), model)
        with LiveStorages() as storages, torch.no_grad():
            zero_shot_metrics(subject, noise_set(num_classes, [split]), features, classifier_EC)
        return storages.peak_bytes

    # Five classes of eight bytes an image, twice while they are joined; scores would have 1,200.
    assert 0 < (peak_bytes(16384) - peak_bytes(8192)) / 8192 <= 100


def test_several_names_of_a_class_are_averaged_with_all_prompts():
    subject = nano_subject()
    dataset = noise_set(3, [split_of("test", [0, 1, 2, 0])])
    names = (("colour 0", "first colour", "red"), ("colour 1",), ("colour 2", "blue"))
    dataset = dataclasses.replace(dataset, classnames=names)
    result = measure_zero_shot(subject, dataset)
    scores = plain_scores(subject, dataset, dataset.templates)
    classifier = subject.classifier(names, dataset.templates)
    features = subject.features(dataset, "test").whole(projected=True, unit=True)
    torch.testing.assert_close((features @ classifier).double(), scores, rtol=0, atol=1e-6)
    assert (
        result.metrics["acc1"] == (scores.argmax(1) == torch.tensor([0, 1, 2, 0])).double().mean()
    )


def test_three_classes_have_no_five_best():
    result = measure_zero_shot(nano_subject(), noise_set(3, [split_of("test", [0, 1, 2])]))
    assert result.metrics["acc5"] is None and "acc1" in result.metrics


def test_two_classes_have_an_area_under_the_curve():
    subject, labels = nano_subject(), [0, 1, 0, 1, 1, 0, 0]
    dataset = noise_set(2, [split_of("test", labels)], main_metric="roc_auc")
    result = measure_zero_shot(subject, dataset)
    scores = plain_scores(subject, dataset, dataset.templates)
    expected = roc_auc_score(labels, (scores[:, 1] - scores[:, 0]).numpy())
    assert result.value == result.metrics["roc_auc"] == pytest.approx(expected, abs=1e-12)
    assert result.details["ci95"] is None


def test_mean_of_top_1_and_top_5():
    dataset = noise_set(6, [split_of("test", TEST)], main_metric="mean_acc1_acc5")
    metrics = measure_zero_shot(nano_subject(), dataset).metrics
    assert metrics["mean_acc1_acc5"] == (metrics["acc1"] + metrics["acc5"]) / 2


def several_labels(name: str, classes: list[int]):
    labels_NC = np.zeros((len(classes), 6), np.uint8)
    labels_NC[np.arange(len(classes)), classes] = 1
    labels_NC[::2, 3] = 1
    return split_of(name, classes, labels_N=labels_NC), labels_NC


def test_images_of_several_labels_are_ranked_by_probability():
    subject = nano_subject()
    split, labels_NC = several_labels("test", TEST)
    dataset = noise_set(6, [split], "multilabel", "mean_average_precision")
    result = measure_zero_shot(subject, dataset)
    scale = subject.loaded.model.logit_scale.exp().item()
    probabilities = (scale * plain_scores(subject, dataset, dataset.templates)).softmax(1).numpy()
    found = [average_precision_score(labels_NC[:, c], probabilities[:, c]) for c in range(6)]
    assert result.value == pytest.approx(np.mean(found), abs=1e-12)
    assert result.details["chance"] is None


def test_prompts_are_compared_on_the_same_features():
    subject = nano_subject()
    dataset = noise_set(6, [split_of("test", TEST)])
    result = measure_prompts(subject, dataset)
    assert subject.store.num_encoded == len(TEST)
    values = {
        "name": ("{}",),
        "photo": ("A photo of a {}.",),
        "own": dataset.templates,
        "imagenet80": IMAGENET_TEMPLATES,
    }
    for name, templates in values.items():
        expected = measure_zero_shot(subject, dataset, templates).value
        assert result.metrics[name] == expected
    variants = {variant["name"]: variant for variant in result.details["variants"]}
    assert [v["num_templates"] for v in variants.values()] == [1, 1, 2, 80]
    assert variants["own"]["gain"] == result.metrics["own"] - result.metrics["name"]
    assert subject.store.num_encoded == len(TEST)


def test_probe_is_scikit_learn_s_on_features_before_the_projection():
    subject = nano_subject()
    dataset = noise_set(6, [split_of("train", TRAIN), split_of("test", TEST)])
    result = measure_linear_probe(subject, dataset, ProbeOptions(C=0.5))
    train, test = (subject.features(dataset, name).whole() for name in ("train", "test"))
    oracle = LogisticRegression(C=0.5, tol=1e-10, max_iter=10000).fit(train.double(), TRAIN)
    expected = (oracle.predict(test.double()) == np.array(TEST)).mean()
    projected = subject.features(dataset, "test").whole(projected=True, unit=False)
    assert not torch.equal(test, projected)
    assert result.metrics["lp_acc1"] == expected == result.value
    assert result.details["C"] == 0.5 and result.details["trace"] == []
    assert result.metrics["weight_decay"] == pytest.approx(1 / (0.5 * len(TRAIN)))
    assert result.metrics["fewshot_k"] == -1 and result.metrics["lp_acc5"] is not None
    assert result.details["chance"] == 1 / 6


@pytest.mark.parametrize(
    ("options", "transformed"),
    [
        (ProbeOptions(C=1.0, normalize=True), lambda f: f.whole(unit=True)),
        (
            ProbeOptions(C=1.0, after_projection=True),
            lambda f: f.whole(projected=True, unit=False),
        ),
        (
            ProbeOptions(C=1.0, normalize=True, after_projection=True),
            lambda f: f.whole(projected=True, unit=True),
        ),
    ],
)
def test_probe_of_other_features(options, transformed, tmp_path):
    subject = nano_subject()
    dataset = noise_set(6, [split_of("train", TRAIN), split_of("test", TEST)])
    result = measure_linear_probe(subject, dataset, options, tmp_path / "probe.npz")
    saved = np.load(tmp_path / "probe.npz")
    features = transformed(subject.features(dataset, "test"))
    predicted = (features.numpy() @ saved["weight"].T + saved["bias"]).argmax(1)
    assert saved["weight"].shape == (6, features.shape[1])
    assert result.value == (predicted == np.array(TEST)).mean()
    assert saved["classnames"].tolist() == [f"colour {c}" for c in range(6)]
    assert result.metrics["normalized"] == float(options.normalize)


def test_C_is_searched_on_the_val_split_or_on_a_tenth_of_train():
    subject = nano_subject()
    with_val = noise_set(
        6, [split_of("train", TRAIN), split_of("val", TEST), split_of("test", TEST)]
    )
    without = noise_set(6, [split_of("train", TRAIN), split_of("test", TEST)], name="other")
    found = measure_linear_probe(subject, with_val, ProbeOptions())
    assert found.details["validation"] == "own split" and len(found.details["trace"]) > 7
    assert found.details["num_train"] == len(TRAIN) + len(TEST)
    assert found.details["num_images"] == len(TEST)
    found = measure_linear_probe(subject, without, ProbeOptions())
    assert found.details["validation"] == "10% of train"
    assert found.details["num_train"] == len(TRAIN)
    assert found.details["C"] in [C for C, _ in found.details["trace"]]


def test_a_given_C_is_fitted_to_train_and_val_together(tmp_path):
    subject = nano_subject()
    val = [5, 5, 4, 0]
    splits = [split_of("train", TRAIN), split_of("val", val), split_of("test", TEST)]
    measure_linear_probe(subject, noise_set(6, splits), ProbeOptions(C=1.0), tmp_path / "p.npz")
    parts = [subject.features(noise_set(6, splits), name).whole() for name in ("train", "val")]
    probe = fit_linear_probe(torch.cat(parts), torch.tensor([*TRAIN, *val]), 1.0, 6)
    assert np.array_equal(np.load(tmp_path / "p.npz")["weight"], probe.weight.numpy())


def test_of_equal_logits_the_lower_class_is_the_better_one():
    dataset = noise_set(7, [split_of("test", TEST)])
    labels_N = torch.tensor([0, 1, 1, 5, 6])
    for blocks in ([torch.zeros(5, 7)], list(torch.zeros(5, 7).split(2))):
        metrics = _probe_metrics(blocks, labels_N, dataset)
        assert (metrics["acc1"], metrics["acc5"]) == (1 / 5, 3 / 5)


def test_the_probe_of_all_images_is_the_last_point_of_the_curve():
    curve = FewShotCurve((1, 2), ((0.1,), (0.2,)), ((1.0,), (1.0,)))
    full = Result("noise", "m", "p", "linear_probe", {"lp_acc1": 0.6})
    full.details.update(main_metric="lp_acc1", mean_labels_per_class=8.0)
    reached = {"number": pytest.approx(4.0), "text": "4.0"}
    assert _curve_details(curve, 0.4, full)["labels_per_class"] == reached
    assert _curve_details(curve, 0.4, None)["labels_per_class"] == {"number": None, "text": ">2"}
    # With no more images than the largest number of the curve it is no further point.
    full.details["mean_labels_per_class"] = 2.0
    assert _curve_details(curve, 0.4, full)["labels_per_class"]["text"] == ">2"


def test_results_state_the_compute_of_the_model():
    subject, dataset = nano_subject(), noise_set(6, [split_of("test", TEST)])
    stated = measure_zero_shot(subject, dataset).details["gmacs"]
    assert stated == image_macs(subject.loaded.model.config) / 1e9


def test_a_C_at_the_end_of_its_range_is_said():
    subject = nano_subject()
    labels = [0, 1] * 10
    splits = [split_of("train", labels), split_of("val", [0, 0]), split_of("test", labels)]
    eye = np.eye(2, dtype=np.float32)
    easy = [
        dataclasses.replace(split, source=None, features_NW=eye[split.labels_N]) for split in splits
    ]
    found = measure_linear_probe(subject, noise_set(2, easy), ProbeOptions())
    assert found.details["C"] == 1e-6
    (note,) = found.details["notes"]
    assert note.startswith("C is 1e-06, at the end of the range") and "all fits score alike" in note
    given = measure_linear_probe(subject, noise_set(2, easy, name="given"), ProbeOptions(C=1e-6))
    assert given.details["notes"] == []


def test_search_reads_the_set_s_main_metric():
    subject = nano_subject()
    labels = [0] * 50 + [1] * 10
    splits = [split_of("train", labels), split_of("val", labels), split_of("test", labels)]
    dataset = noise_set(2, splits, main_metric="mean_per_class_recall")
    found = measure_linear_probe(subject, dataset, ProbeOptions())
    assert found.details["main_metric"] == "lp_mean_per_class_recall"
    # The prior alone has 50/60 right, and a mean recall of one half.
    smallest = dict(map(tuple, found.details["trace"]))[1e-6]
    assert smallest == 0.5


def test_probe_of_several_labels():
    subject = nano_subject()
    train, train_labels = several_labels("train", TRAIN)
    test, test_labels = several_labels("test", TEST)
    dataset = noise_set(6, [train, test], "multilabel", "map11")
    result = measure_linear_probe(subject, dataset, ProbeOptions(C=1.0))
    X, X_test = (subject.features(dataset, n).whole().double() for n in ("train", "test"))
    found = []
    for c in range(6):
        oracle = LogisticRegression(C=1.0, tol=1e-10, max_iter=10000).fit(X, train_labels[:, c])
        scores = oracle.decision_function(X_test)
        found.append(average_precision_score(test_labels[:, c], scores))
    assert result.metrics["lp_mean_average_precision"] == pytest.approx(np.mean(found), abs=1e-9)
    assert result.details["main_metric"] == "lp_map11"
    searched = measure_linear_probe(subject, dataset, ProbeOptions())
    assert len(searched.details["trace"]) >= 9


@pytest.mark.parametrize("measure", [measure_linear_probe, measure_few_shot])
def test_a_probe_is_not_tested_on_what_it_was_fitted_to(measure):
    test = split_of("test", TEST)
    train = dataclasses.replace(split_of("train", TRAIN), fingerprint=test.fingerprint)
    dataset = noise_set(6, [train, test])
    with pytest.raises(DataError, match="train and test of noise hold the same images"):
        measure(nano_subject(), dataset, ProbeOptions(C=1.0))


def test_few_shot_names_the_labels_that_zero_shot_is_worth():
    subject = nano_subject()
    dataset = noise_set(6, [split_of("train", TRAIN), split_of("test", TEST)])
    options = ProbeOptions(C=1.0)
    full = measure_linear_probe(subject, dataset, options)
    result = measure_few_shot(subject, dataset, options, (1, 2, 4), range(2), full)
    assert list(result.metrics) == ["1shot", "2shot", "4shot"]
    scores = result.details["scores"]
    assert [len(row) for row in scores] == [2, 2, 2]
    assert result.metrics["4shot"] == np.mean(scores[2]) == result.value
    assert result.details["zero_shot"] == measure_zero_shot(subject, dataset).value
    assert result.details["full"] == full.value and result.details["labels_per_class"]["text"]
    assert result.details["full_labels_per_class"] == 10.0

    # Of other features, or fitted otherwise, it is no point of this curve.
    others = [
        (nano_subject(nano(seed=1)), options),
        (subject, ProbeOptions(C=1.0, normalize=True)),
        (subject, ProbeOptions(C=1.0, after_projection=True)),
    ]
    for other, how in others:
        found = measure_few_shot(other, dataset, how, (1,), range(1), full).details
        assert found["full"] is None and found["full_labels_per_class"] is None


def test_few_shot_takes_the_shots_that_half_of_the_classes_have():
    subject = nano_subject()
    dataset = noise_set(6, [split_of("train", TRAIN), split_of("test", TEST)])
    searched = measure_few_shot(subject, dataset, ProbeOptions(), seeds=range(1))
    assert searched.details["shots"] == [1, 2, 4, 8] and searched.details["notes"] == []

    labels = [0, 1] * 8 + [2]
    tight = noise_set(
        6, [split_of("train", labels, fingerprint="2"), split_of("test", TEST)], name="tight"
    )
    found = measure_few_shot(subject, tight, ProbeOptions(), seeds=range(1)).details
    assert found["shots"] == [1, 2, 4]
    assert found["notes"] == [
        "1 of 3 classes have fewer than 4 training images, and give all of theirs"
    ]
    given = measure_few_shot(subject, tight, ProbeOptions(C=1.0), seeds=range(1))
    assert given.details["shots"] == [1, 2, 4, 8]
    with pytest.raises(DataError, match=r"no class of tight has 9 training images, one of them to"):
        measure_few_shot(subject, tight, ProbeOptions(), (8,), range(1))


def test_features_of_files_are_probed_without_a_model():
    rng = np.random.default_rng(0)
    splits = []
    for name, labels in (("train", TRAIN), ("test", TEST)):
        X = (
            rng.normal(size=(len(labels), 6)).astype(np.float32)
            + 9 * np.eye(6, dtype=np.float32)[labels]
        )
        splits.append(dataclasses.replace(split_of(name, labels), source=None, features_NW=X))
    dataset, subject = noise_set(6, splits), Subject(None, None)
    assert measure_linear_probe(subject, dataset, ProbeOptions()).value == 1.0
    # A model beside them has no part in it.
    few = measure_few_shot(nano_subject(), dataset, ProbeOptions(), (1, 4), range(2))
    assert (few.model, few.pretrained) == ("features", "file")
    assert few.details["zero_shot"] is None and few.details["labels_per_class"] is None
    with pytest.raises(DataError, match="class names need a model"):
        measure_zero_shot(subject, dataset)


def test_text_features_that_are_not_finite_are_named():
    model = nano()
    with torch.no_grad():
        model.text_projection[0, 0] = torch.nan
    with pytest.raises(DataError, match="text features are not finite"):
        measure_zero_shot(nano_subject(model), noise_set(6, [split_of("test", TEST)]))


def test_metrics_that_say_nothing_of_the_images_are_named_where_they_decide():
    splits = [split_of("train", [0, 1] * 8), split_of("test", [1, 1, 1])]
    dataset = noise_set(2, splits, main_metric="roc_auc")
    subject = nano_subject()
    assert measure_zero_shot(subject, dataset).value is None
    with pytest.raises(DataError, match="roc_auc of noise needs images of both classes"):
        measure_prompts(subject, dataset)
    with pytest.raises(DataError, match="roc_auc of noise needs images of both classes"):
        measure_few_shot(subject, dataset, ProbeOptions(C=1.0), (1,), range(1))


def test_chance_is_that_of_the_main_metric():
    for metric, number, chance in (
        ("acc1", 6, 1 / 6),
        ("mean_acc1_acc5", 6, 0.5),
        ("mean_acc1_acc5", 3, None),
        ("roc_auc", 2, 0.5),
    ):
        labels = [0, 1, number - 1]
        dataset = noise_set(number, [split_of("test", labels)], main_metric=metric)
        result = measure_zero_shot(nano_subject(), dataset)
        assert result.details["chance"] == chance
        assert (result.value is None) == (chance is None)


def test_a_set_of_captions_has_no_classes():
    dataset = noise_set(6, [split_of("test", TEST)], "retrieval")
    with pytest.raises(DataError, match="noise, which has captions, and no classes: use retrieval"):
        measure_zero_shot(nano_subject(), dataset)
    split, _ = several_labels("test", TEST)
    many = noise_set(6, [split], "multilabel", "map11")
    with pytest.raises(DataError, match="a few-shot probe does not suit noise, which has several"):
        measure_few_shot(nano_subject(), many, ProbeOptions())


def test_the_classifier_of_names_is_made_once(monkeypatch):
    subject, dataset = nano_subject(), noise_set(6, [split_of("test", TEST)])
    calls = []
    encode = subject.loaded.model.encode_text
    monkeypatch.setattr(
        subject.loaded.model, "encode_text", lambda *a, **k: calls.append(1) or encode(*a, **k)
    )
    first = measure_zero_shot(subject, dataset)
    number = len(calls)
    assert measure_zero_shot(subject, dataset).metrics == first.metrics and len(calls) == number > 0


def test_orthogonal_class_means_are_all_right():
    model = nano()
    subject = nano_subject(model)
    dataset = noise_set(6, [split_of("test", TEST)])
    features = subject.features(dataset, "test")
    subject._classifiers[dataset.classnames, dataset.templates] = torch.eye(model.config.embed_dim)[
        :, :6
    ]
    directions = torch.eye(model.config.embed_dim)[TEST]
    features.blocks = lambda *_, **__: iter(directions.split(5))
    assert measure_zero_shot(subject, dataset).metrics["acc1"] == 1.0
