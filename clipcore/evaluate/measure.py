"""Evaluates one model on one labelled data set: zero-shot, prompt gains, linear probe and few-shot.

Legend: N images, C classes, K best classes, W width of the features, E embedding size.

Source: Radford et al. 2021, sections 3.1 and 3.2, appendix A.3.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import clipcore
from clipcore.data import DataError, PairSource
from clipcore.evaluate.compute import image_macs
from clipcore.evaluate.datasets import EvaluationSet
from clipcore.evaluate.features import (
    FeatureStore,
    SplitFeatures,
    features_of_file,
    hash_of_tower,
)
from clipcore.evaluate.few_shot import SHOTS, FewShotCurve, few_shot_curve, labels_per_class
from clipcore.evaluate.image_descriptors import TrainingStream
from clipcore.evaluate.linear_probe import (
    GRID,
    BlockMetric,
    LinearProbe,
    fit_linear_probe,
    search_C,
    split_validation,
)
from clipcore.evaluate.loading import LoadedModel
from clipcore.evaluate.metrics import (
    average_precision,
    average_precision_11,
    chance_of,
    mean_over_classes,
    roc_auc,
    wilson_interval,
)
from clipcore.evaluate.prompts import IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from clipcore.evaluate.results import FEW_SHOT, LINEAR_PROBE, PROMPTS, ZERO_SHOT, Result
from clipcore.evaluate.same_weights import HASH_KEY, hash_of_model
from clipcore.evaluate.zero_shot import accuracies, best_classes, build_zero_shot_classifier
from clipcore.progress import Progress

# Prompts that are encoded at once.
_MOST_PROMPTS = 1024
_NUM_BEST = 5
# Fits of the paper's search, including the final one to all images.
_MOST_FITS = 16
_BARE, _PHOTO = ("{}",), ("A photo of a {}.",)


@dataclass(frozen=True)
class ProbeOptions:
    """The settings for fitting probes.

    Attributes:
        C: C of all fits [found on validation images].
        val_fraction: share of the training images to set aside if a data set has no validation split.
        normalize: whether to scale features to unit length.
        after_projection: whether to use the features after the projection.
    """

    C: float | None = None
    val_fraction: float = 0.1
    normalize: bool = False
    after_projection: bool = False


class Unsuitable(DataError):
    """A data set without the inputs for a measurement; the data set itself is valid."""


@contextmanager
def progress_bar(
    title: str, unit: str, total: int | None = None
) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error; yield a function that takes the steps done."""
    with Progress(total, unit, title) as shown:
        yield shown.update


class Subject:
    """A model under evaluation, loaded once, with the features that it has computed.

    Args:
        loaded: the model; None if features come from files.
        store: the store of its features.

    Attributes:
        training: the training images that data sets were compared with, and their descriptors.
    """

    def __init__(self, loaded: LoadedModel | None, store: FeatureStore | None) -> None:
        self.loaded, self.store = loaded, store
        self.training: tuple[PairSource, TrainingStream] | None = None
        self._features: dict[tuple[str, str], SplitFeatures] = {}
        self._classifiers: dict[tuple[object, object], Tensor] = {}

    @property
    def name(self) -> str:
        """The architecture."""
        return self.loaded.name if self.loaded else "features"

    @property
    def pretrained(self) -> str:
        """The weights."""
        return self.loaded.pretrained if self.loaded else "file"

    @functools.cached_property
    def weights_hash(self) -> str:
        """A hash that identifies the model under any name; empty if features come from files."""
        if self.loaded is None:
            return ""
        store = self.store
        tower_hash = store.tower_hash if store else hash_of_tower(self.loaded.model)
        return hash_of_model(self.loaded, tower_hash)

    def model_for(self, what: str) -> LoadedModel:
        """Return the model; raise DataError if there is none."""
        if self.loaded is None:
            raise DataError(f"{what} need a model: give --checkpoint or --pretrained")
        return self.loaded

    def result(
        self,
        dataset: EvaluationSet,
        task: str,
        metrics: dict[str, float | None],
        details: dict[str, Any],
    ) -> Result:
        """Return the result on a data set; features from a file belong to no model."""
        if self.loaded is None or dataset.split("test").source is None:
            return Result(dataset.name, "features", "file", task, metrics, details)
        name, pretrained = self.loaded.name, self.loaded.pretrained
        details = {
            **details,
            "gmacs": image_macs(self.loaded.model.config) / 1e9,
            HASH_KEY: self.weights_hash,
        }
        return Result(dataset.name, name, pretrained, task, metrics, details)

    def features(self, dataset: EvaluationSet, split: str) -> SplitFeatures:
        """Return the features of a split; raise DataError if it does not exist or cannot be read."""
        if (dataset.name, split) not in self._features:
            opened = dataset.split(split)
            found = self.store.features(opened) if self.store else features_of_file(opened)
            if found is None:
                raise DataError(
                    f"{dataset.name} holds images: name a model with --checkpoint or --pretrained"
                )
            self._features[dataset.name, split] = found
        return self._features[dataset.name, split]

    def classifier(self, classnames: Sequence[Sequence[str]], templates: Sequence[str]) -> Tensor:
        """Return the classifier [E, C] of names and prompts; raise DataError without a model."""
        loaded = self.model_for("class names")
        key = (tuple(map(tuple, classnames)), tuple(templates))
        if key not in self._classifiers:
            most_names = max(len(names) for names in classnames)
            classifier_EC = build_zero_shot_classifier(
                loaded.model,
                loaded.tokenizer,
                classnames,
                list(templates),
                num_classes_per_batch=max(1, _MOST_PROMPTS // (len(templates) * most_names)),
                device=loaded.model.logit_scale.device,
            )
            if not classifier_EC.isfinite().all():
                raise DataError(
                    "the model's text features are not finite; its weights are not usable"
                )
            self._classifiers[key] = classifier_EC
        return self._classifiers[key]


def measure_zero_shot(
    subject: Subject, dataset: EvaluationSet, templates: Sequence[str] = ()
) -> Result:
    """Classify the test images of a data set by the names of its classes.

    Args:
        templates: prompts with {} for the name [the data set's own, else OpenAI's seven for ImageNet].

    Raises:
        DataError: the set has no labels or no test split, or its images cannot be read.
    """
    check_task(dataset, ("classification", "multilabel"))
    chosen = templates_of(dataset, templates)
    seconds = _Seconds()
    features = subject.features(dataset, "test")
    with seconds("texts"):
        classifier_EC = subject.classifier(dataset.classnames, chosen)
    with seconds("scores"):
        metrics = zero_shot_metrics(subject, dataset, features, classifier_EC)

    names = [name for names in dataset.classnames for name in names]
    details = {
        **details_of(dataset, [features], seconds),
        "main_metric": dataset.main_metric,
        "chance": chance_of(dataset.main_metric, len(dataset.classnames)),
        "ci95": _interval(metrics, dataset.main_metric, len(features)),
        "templates": list(chosen),
        "classnames_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "first_class": names[0],
        "last_class": names[-1],
    }
    return subject.result(dataset, ZERO_SHOT, metrics, details)


def templates_of(dataset: EvaluationSet, templates: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the requested prompts, else the data set's own, else OpenAI's seven for ImageNet."""
    return tuple(templates) or dataset.templates or SIMPLE_IMAGENET_TEMPLATES


def zero_shot_metrics(
    subject: Subject, dataset: EvaluationSet, features: SplitFeatures, classifier_EC: Tensor
) -> dict[str, float | None]:
    """Return the metrics of a zero-shot classifier, including CLIP_benchmark's.

    Memory does not grow with images times classes, except for a multi-label set, whose images are ranked for each class.
    """
    assert subject.loaded is not None
    scale = subject.loaded.model.logit_scale.detach().exp()
    if dataset.task == "multilabel":
        # Probabilities, because raw cosines of different classes' names are not comparable.
        logits = ((scale * block @ classifier_EC).float() for block in features.blocks())
        scores_NC = torch.cat([block.softmax(1).cpu() for block in logits])
        return _multilabel_metrics(scores_NC, features.labels_N)
    best_NK = predict(features, classifier_EC)
    right_NK = best_NK == features.labels_N[:, None]
    metrics = _named_metrics(features.labels_N, right_NK[:, 0], right_NK.any(1), dataset)
    if len(dataset.classnames) == 2:
        blocks = [scale * block @ classifier_EC for block in features.blocks()]
        metrics["roc_auc"] = _two_class_auc(torch.cat(blocks).cpu(), features.labels_N)
    return metrics


def predict(features: SplitFeatures, classifier_EC: Tensor) -> Tensor:
    """Return the best classes of each image, int64 [N, K], best first."""
    num_best = min(_NUM_BEST, classifier_EC.shape[1])
    blocks = features.blocks()
    return torch.cat([best_classes(block, classifier_EC, num_best).cpu() for block in blocks])


def measure_prompts(subject: Subject, dataset: EvaluationSet) -> Result:
    """Compare prompts on the same images: bare names, "A photo of a", the data set's own, and all eighty for ImageNet.

    Source: section 3.1.4 of the paper.

    Raises:
        DataError: see ``measure_zero_shot``.
    """
    check_task(dataset, ("classification", "multilabel"))
    variants: list[tuple[str, str, tuple[str, ...]]] = [
        ("name", "the name alone", _BARE),
        ("photo", "A photo of a {}.", _PHOTO),
    ]
    if dataset.templates:
        variants.append(("own", "the data set's own", dataset.templates))
    variants.append(("imagenet80", "the 80 of ImageNet", IMAGENET_TEMPLATES))

    seconds, rows = _Seconds(), []
    features = subject.features(dataset, "test")
    for name, title, templates in variants:
        with seconds("texts"):
            classifier_EC = subject.classifier(dataset.classnames, templates)
        with seconds("scores"):
            metrics = zero_shot_metrics(subject, dataset, features, classifier_EC)
        rows.append((name, title, len(templates), metrics[dataset.main_metric]))

    bare = rows[0][3]
    if bare is None:
        raise _without_metric(dataset)
    details = {
        **details_of(dataset, [features], seconds),
        "main_metric": "own" if dataset.templates else "imagenet80",
        "metric": dataset.main_metric,
        "variants": [
            {
                "name": name,
                "title": title,
                "num_templates": number,
                "value": value,
                "gain": None if value is None else value - bare,
            }
            for name, title, number, value in rows
        ],
    }
    metrics = {name: value for name, _, _, value in rows}
    return subject.result(dataset, PROMPTS, metrics, details)


def measure_linear_probe(
    subject: Subject,
    dataset: EvaluationSet,
    options: ProbeOptions,
    save_to: Path | None = None,
) -> Result:
    """Fit a linear classifier to the training images' features, and score it on the test images.

    Source: section 3.2 and appendix A.3 of the paper: C is found on validation images, and the final classifier is
    fitted to training and validation images together.

    Args:
        save_to: a file for weight, bias and class names, in numpy's ``.npz``.

    Raises:
        DataError: the set has no labels, or a split is missing.
    """
    check_task(dataset, ("classification", "multilabel"), "a linear probe")
    train, test = subject.features(dataset, "train"), subject.features(dataset, "test")
    val = subject.features(dataset, "val") if "val" in dataset.split_names else None
    parts = [train, test] if val is None else [train, test, val]
    _check_apart(dataset, parts)
    seconds = _Seconds()
    num_classes, metric = len(dataset.classnames), _probe_metric(dataset)
    X, y = _probe_features(train, options), train.labels_N.to(train.device)
    if val is not None:
        val_X, val_y = _probe_features(val, options), val.labels_N.to(val.device)

    trace: list[tuple[float, float]] = []
    validation = None
    with seconds("fits"):
        if options.C is not None:
            if val is not None:
                X, y = torch.cat([X, val_X]), torch.cat([y, val_y])
            probe = fit_linear_probe(X, y, options.C, num_classes)
        else:
            validation = "own split"
            if val is None:
                validation = f"{options.val_fraction:.0%} of train"
                # With several labels per image, no label defines the strata of images.
                kinds = y if y.dim() == 1 else y.new_zeros(len(y))
                flags = split_validation(kinds, train.keys, options.val_fraction)
                is_val = torch.tensor(flags, device=X.device)
                if not is_val.any():
                    raise DataError(
                        f"{dataset.name} has one training image a class, and none to choose C by; give --C"
                    )
                val_X, val_y, X, y = X[is_val], y[is_val], X[~is_val], y[~is_val]
            with progress_bar(f"{dataset.name}, search of C", "fits", _MOST_FITS) as progress:
                search = search_C(
                    X, y, val_X, val_y, num_classes, progress=progress, block_metric=metric
                )
            probe, trace = search.probe, search.trace

    num_train = len(train) + (0 if val is None else len(val))
    labels_N = test.labels_N
    with seconds("scores"):
        logits = (probe.logits(block) for block in _probe_blocks(test, options))
        metrics = _probe_metrics(logits, labels_N, dataset)
    prefixed = {f"lp_{name}": value for name, value in metrics.items()}
    more = {
        "weight_decay": 1 / (probe.C * num_train),
        "epochs": float(probe.num_iterations),
        "seed": 0.0,
        "fewshot_k": -1.0,
        "normalized": float(options.normalize),
    }
    details = {
        **details_of(dataset, parts, seconds),
        "main_metric": f"lp_{dataset.main_metric}",
        "chance": chance_of(dataset.main_metric, len(dataset.classnames)),
        "ci95": _interval(metrics, dataset.main_metric, len(test)),
        "C": probe.C,
        "lambda": 1 / (probe.C * num_train),
        "num_iterations": probe.num_iterations,
        "gradient_norm": probe.gradient_norm,
        "trace": [[C, score] for C, score in trace],
        "validation": validation,
        "num_train": num_train,
        "mean_labels_per_class": num_train / len(dataset.classnames),
        "after_projection": options.after_projection,
    }
    details["notes"] += _edge_notes(trace, probe.C)
    if save_to is not None:
        save_probe(save_to, probe, dataset)
        details["classifier"] = save_to.name
    return subject.result(dataset, LINEAR_PROBE, {**prefixed, **more}, details)


def _edge_notes(trace: Sequence[tuple[float, float]], C: float) -> list[str]:
    """Return a note on a C at an end of the searched range; in a tie the smallest C is used."""
    if not trace or C not in (GRID[0], GRID[-1]):
        return []
    scores = {score for _, score in trace}
    why = "all fits score alike on the validation images" if len(scores) == 1 else "the best"
    return [f"C is {C:.0e}, at the end of the range that is searched ({why}); give --C for another"]


def save_probe(path: Path, probe: LinearProbe, dataset: EvaluationSet) -> None:
    """Write a probe as numpy's ``.npz``: weight [C, W], bias [C], the classes' first names, C."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.savez(
            file,
            weight=probe.weight.cpu().numpy(),
            bias=probe.bias.cpu().numpy(),
            classnames=np.array([names[0] for names in dataset.classnames]),
            C=np.array(probe.C),
        )


def measure_few_shot(
    subject: Subject,
    dataset: EvaluationSet,
    options: ProbeOptions,
    shots: Sequence[int] | None = None,
    seeds: Sequence[int] = range(5),
    full: Result | None = None,
    templates: Sequence[str] = (),
) -> Result:
    """Fit probes to a few training images per class, and find how many match the zero-shot classifier.

    Source: section 3.1.5 and figures 6 and 7 of the paper.

    Args:
        shots: images per class [those of 1, 2, 4, 8 and 16 that half of the classes have]; a class with fewer gives all.
        full: the probe of all training images, if it has been measured.
        templates: prompts of the zero-shot classifier: see ``measure_zero_shot``.

    Raises:
        DataError: see ``measure_linear_probe``; or no class has enough images.
    """
    check_task(dataset, ("classification",), "a few-shot probe")
    train, test = subject.features(dataset, "train"), subject.features(dataset, "test")
    _check_apart(dataset, [train, test])
    labels_N, seconds = train.labels_N, _Seconds()
    count_C = torch.bincount(labels_N)
    count_C = count_C[count_C > 0]
    # Besides the fitted images, some must remain for choosing C.
    num_spare = 0 if options.C is not None else 1
    tried = tuple(shots) if shots is not None else _usual_shots(count_C, num_spare)
    if not tried or max(tried) + num_spare > int(count_C.max()):
        raise Unsuitable(
            f"no class of {dataset.name} has {(max(tried) if tried else 1) + num_spare} training images"
            f"{', one of them to choose C by' if num_spare else ''}; give fewer --shots, or --C"
        )
    num_fits = len(tried) * len(seeds)
    with seconds("fits"), progress_bar(f"{dataset.name}, few-shot", "fits", num_fits) as progress:
        curve = few_shot_curve(
            _probe_features(train, options),
            labels_N.to(train.device),
            train.keys,
            _probe_features(test, options),
            test.labels_N.to(test.device),
            tried,
            seeds,
            options.C,
            progress=progress,
            block_metric=_probe_metric(dataset),
        )
    if full is not None and not _is_of(full, [train, test], options):
        full = None
    zero_shot = None
    if subject.loaded is not None and test.split.source is not None:
        found = measure_zero_shot(subject, dataset, templates)
        zero_shot = found.metrics[dataset.main_metric]
    details = details_of(dataset, [train, test], seconds)
    means: dict[str, float | None] = {
        f"{k}shot": mean for k, mean in zip(curve.shots, curve.means, strict=True)
    }
    more = {
        "main_metric": f"{max(tried)}shot",
        "metric": dataset.main_metric,
        "seeds": list(seeds),
        "notes": [*details["notes"], *_few_notes(count_C, tried)],
        **_curve_details(curve, zero_shot, full),
    }
    return subject.result(dataset, FEW_SHOT, means, {**details, **more})


def _is_of(probe: Result, parts: Sequence[SplitFeatures], options: ProbeOptions) -> bool:
    """Return whether a probe was fitted to and tested on these features with these options."""
    keys = probe.details.get("feature_keys")
    return (
        isinstance(keys, dict)
        and all(keys.get(part.split.name) == part.key for part in parts)
        and probe.metrics.get("normalized") == float(options.normalize)
        and probe.details.get("after_projection") == options.after_projection
    )


def _usual_shots(count_C: Tensor, num_spare: int) -> tuple[int, ...]:
    """Return the paper's numbers of images that half of the classes have, besides the images for choosing C."""
    typical = int(count_C.median()) - num_spare
    return tuple(k for k in SHOTS if k <= typical)


def _few_notes(count_C: Tensor, tried: Sequence[int]) -> list[str]:
    """Return a note on classes with fewer images than requested."""
    number = int((count_C < max(tried)).sum())
    if not number:
        return []
    return [
        f"{number:,} of {len(count_C):,} classes have fewer than {max(tried)} training images, and give all of theirs"
    ]


def _curve_details(
    curve: FewShotCurve, zero_shot: float | None, full: Result | None
) -> dict[str, Any]:
    """Return a curve as JSON, and where it crosses the zero-shot score; the full probe is its last point."""
    points: list[tuple[float, float]] = list(zip(curve.shots, curve.means, strict=True))
    full_value = None if full is None else full.value
    mean_labels = None if full is None else full.details.get("mean_labels_per_class")
    if full_value is not None and mean_labels and mean_labels > curve.shots[-1]:
        points.append((mean_labels, full_value))
    reached = None
    if zero_shot is not None:
        found = labels_per_class([k for k, _ in points], [s for _, s in points], zero_shot)
        reached = {"number": found.number, "text": found.text}
    return {
        "shots": list(curve.shots),
        "scores": [list(row) for row in curve.scores],
        "Cs": [list(row) for row in curve.Cs],
        "zero_shot": zero_shot,
        "full": full_value,
        "full_labels_per_class": mean_labels,
        "labels_per_class": reached,
    }


def check_task(
    dataset: EvaluationSet, tasks: Sequence[str], what: str = "zero-shot classification"
) -> None:
    """Raise DataError for a data set that lacks the inputs of a measurement."""
    if dataset.task != "retrieval" and not dataset.classnames:
        raise Unsuitable(
            f"{what} needs classes, and {dataset.name} has none: add a column of labels, or use bias"
        )
    if dataset.task not in tasks:
        kind = {
            "retrieval": "captions, and no classes: use retrieval",
            "multilabel": "several labels an image",
            "classification": "classes, and no captions",
        }[dataset.task]
        raise Unsuitable(f"{what} does not suit {dataset.name}, which has {kind}")


def _check_apart(dataset: EvaluationSet, parts: Sequence[SplitFeatures]) -> None:
    """Raise DataError if two splits hold the same images, for example through a link."""
    seen: dict[str, str] = {}
    for part in parts:
        fingerprint = part.split.fingerprint()
        if fingerprint in seen:
            raise DataError(
                f"{seen[fingerprint]} and {part.split.name} of {dataset.name} hold the same images, and a probe would be "
                "tested on its training images; remove one of them"
            )
        seen[fingerprint] = part.split.name


def _probe_blocks(features: SplitFeatures, options: ProbeOptions) -> Iterator[Tensor]:
    return features.blocks(options.after_projection, options.normalize)


def _probe_features(features: SplitFeatures, options: ProbeOptions) -> Tensor:
    return features.whole(options.after_projection, options.normalize)


def _probe_metric(dataset: EvaluationSet) -> BlockMetric:
    """Return the data set's main metric as a block metric for ``search_C``; see ``_probe_metrics`` for its memory."""

    def score(logits: Iterable[Tensor], labels_N: Tensor) -> float:
        value = _probe_metrics(logits, labels_N, dataset)[dataset.main_metric]
        if value is None:
            raise _without_metric(dataset)
        return value

    return score


def _without_metric(dataset: EvaluationSet) -> Unsuitable:
    """Return the error about images for which a data set's main metric is undefined."""
    return Unsuitable(
        f"{dataset.main_metric} of {dataset.name} needs images of both classes in each split, and five classes or more for "
        "a top-5"
    )


def _probe_metrics(
    logits: Iterable[Tensor], labels_N: Tensor, dataset: EvaluationSet
) -> dict[str, float | None]:
    """Return the metrics of a probe, given its logits [rows, C] block by block.

    Accuracies are counts, which need a block and two flags per image. The ROC AUC of two classes needs two scores per image.
    The mean average precision of several labels needs all scores [N, C], because it ranks all images of a class.
    """
    if dataset.task == "multilabel":
        return _multilabel_metrics(torch.cat([block.cpu() for block in logits]), labels_N.cpu())
    best, among, pairs, begun = [], [], [], 0
    for block in logits:
        labels = labels_N[begun : begun + len(block)].to(block.device)
        begun += len(block)
        own = block.gather(1, labels[:, None])
        is_lower = torch.arange(block.shape[1], device=block.device) < labels[:, None]
        rank = ((block > own) | ((block == own) & is_lower)).sum(1).cpu()
        best.append(rank < 1)
        among.append(rank < _NUM_BEST)
        if block.shape[1] == 2:
            pairs.append(block.cpu())
    metrics = _named_metrics(labels_N.cpu(), torch.cat(best), torch.cat(among), dataset)
    if pairs:
        metrics["roc_auc"] = _two_class_auc(torch.cat(pairs), labels_N.cpu())
    return metrics


def _named_metrics(
    labels_N: Tensor, is_best_N: Tensor, is_among_5_N: Tensor, dataset: EvaluationSet
) -> dict[str, float | None]:
    """Return accuracies under CLIP_benchmark's names; without top-5 for fewer than five classes."""
    found = accuracies(labels_N, is_best_N, is_among_5_N)
    acc1, acc5 = found["acc1"], found["acc5"]
    metrics: dict[str, float | None] = {
        "acc1": acc1,
        "acc5": acc5 if len(dataset.classnames) >= _NUM_BEST else None,
        "mean_per_class_recall": found["mean_per_class_recall"],
    }
    if dataset.main_metric == "mean_acc1_acc5":
        metrics["mean_acc1_acc5"] = None if metrics["acc5"] is None else (acc1 + acc5) / 2
    return metrics


def _two_class_auc(logits_N2: Tensor, labels_N: Tensor) -> float | None:
    """Return the area under the ROC curve; None if all images are of one class."""
    if len(torch.unique(labels_N)) < 2:
        return None
    return roc_auc(logits_N2[:, 1] - logits_N2[:, 0], labels_N)


def _multilabel_metrics(scores_NC: Tensor, labels_NC: Tensor) -> dict[str, float | None]:
    return {
        "mean_average_precision": mean_over_classes(average_precision, scores_NC, labels_NC),
        "map11": mean_over_classes(average_precision_11, scores_NC, labels_NC),
    }


def _interval(
    metrics: dict[str, float | None], main_metric: str, num_images: int
) -> list[float] | None:
    """Return the 95% interval of an accuracy, after Wilson; None for another metric."""
    value = metrics["acc1"] if main_metric == "acc1" else None
    return None if value is None else list(wilson_interval(round(value * num_images), num_images))


class _Seconds(dict[str, float]):
    """The times of an evaluation's stages."""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self[stage] = self.get(stage, 0.0) + time.perf_counter() - begun


def details_of(
    dataset: EvaluationSet, parts: Sequence[SplitFeatures], seconds: dict[str, float]
) -> dict[str, Any]:
    """Return the details that every result has about its images; one of ``parts`` is the test split."""
    test = next(part for part in parts if part.split.name == "test")
    return {
        "num_images": len(test),
        "num_classes": len(dataset.classnames),
        "split": "test",
        "feature_key": test.key,
        "feature_keys": {part.split.name: part.key for part in parts},
        "num_unreadable": sum(part.num_unreadable for part in parts),
        "num_transparent": sum(part.num_transparent for part in parts),
        "seconds": {"encode": sum(part.seconds for part in parts), **seconds},
        "versions": {
            "clipcore": clipcore.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "notes": [*dataset.notes, *(note for part in parts for note in part.split.notes)],
    }
