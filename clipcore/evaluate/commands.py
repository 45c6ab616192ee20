"""The commands' measurements: turn command-line arguments into one result of one model on one data set."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clipcore.evaluate.bias_study import LabelProbe, chosen_columns, measure_bias
from clipcore.evaluate.datasets import EvaluationSet
from clipcore.evaluate.faces import KNOWN, LABELS_QUESTION, labels_of
from clipcore.evaluate.faces_study import measure_faces
from clipcore.evaluate.image_descriptors import (
    Reading,
    TrainingStream,
    model_descriptor,
    pixel_descriptor,
)
from clipcore.evaluate.label_lists import LabelList
from clipcore.evaluate.loading import LoadedModel
from clipcore.evaluate.measure import (
    ProbeOptions,
    Subject,
    check_task,
    details_of,
    measure_few_shot,
    measure_linear_probe,
    measure_prompts,
    measure_zero_shot,
    predict,
    progress_bar,
    templates_of,
)
from clipcore.evaluate.overlap_study import measure_overlap, open_training
from clipcore.evaluate.results import (
    BIAS,
    LINEAR_PROBE,
    OVERLAP,
    RETRIEVAL,
    Result,
    find_result,
)
from clipcore.evaluate.retrieval_study import measure_retrieval, text_encoder
from clipcore.evaluate.splits import Question

Measure = Callable[[Subject, EvaluationSet, argparse.Namespace], Result]


def measures_due(arguments: argparse.Namespace, dataset: EvaluationSet) -> list[str]:
    """Return the measurements of a command on a data set; ``all`` means those that the set has the inputs for.

    Raises:
        DataError: the set has no test split, or it cannot be opened.
    """
    if arguments.command != "all":
        return [arguments.command]
    if dataset.task == "retrieval":
        return ["retrieval"]
    has_images = dataset.split("test").source is not None
    names = []
    if has_images and dataset.classnames:
        names += ["zero-shot", "prompts"]
    if dataset.classnames and "train" in dataset.split_names:
        # The probe comes first, because it is the last point of the few-shot curve.
        names.append("linear-probe")
        if dataset.task == "classification":
            names.append("few-shot")
    if has_images and dataset.split("test").groups:
        names.append("bias")
    if has_images and arguments.train_data and dataset.task == "classification":
        names.append("overlap")
    return names


def measure(
    name: str, subject: Subject, dataset: EvaluationSet, arguments: argparse.Namespace
) -> Result:
    """Run one measurement, by the name of its command; raise DataError, ValueError or OSError."""
    return _MEASURES[name](subject, dataset, arguments)


def _zero_shot(subject: Subject, dataset: EvaluationSet, arguments: argparse.Namespace) -> Result:
    return measure_zero_shot(subject, dataset, arguments.templates)


def _prompts(subject: Subject, dataset: EvaluationSet, _: argparse.Namespace) -> Result:
    return measure_prompts(subject, dataset)


def _linear_probe(
    subject: Subject, dataset: EvaluationSet, arguments: argparse.Namespace
) -> Result:
    named = subject.result(dataset, LINEAR_PROBE, {}, {})
    classifier = Path(arguments.output) / f"{named.file_name.removesuffix('.json')}.npz"
    save_to = classifier if arguments.save_classifier else None
    return measure_linear_probe(subject, dataset, _probe_options(arguments), save_to)


def _few_shot(subject: Subject, dataset: EvaluationSet, arguments: argparse.Namespace) -> Result:
    named = subject.result(dataset, LINEAR_PROBE, {}, {})
    return measure_few_shot(
        subject,
        dataset,
        _probe_options(arguments),
        arguments.shots,
        range(arguments.seeds),
        find_result(Path(arguments.output), named),
        arguments.templates,
    )


def _probe_options(arguments: argparse.Namespace) -> ProbeOptions:
    return ProbeOptions(
        arguments.C, arguments.val_fraction, arguments.normalize, arguments.after_projection
    )


def _retrieval(subject: Subject, dataset: EvaluationSet, arguments: argparse.Namespace) -> Result:
    check_task(dataset, ("retrieval",), "retrieval")
    features = subject.features(dataset, "test")
    loaded = subject.model_for("captions")
    encode = text_encoder(loaded.model, loaded.tokenizer, features.device)
    with progress_bar(f"{dataset.name}, captions", "captions") as progress:
        found = measure_retrieval(features, encode, arguments.recall_k, progress)
    return _result(subject, dataset, RETRIEVAL, found)


def _bias(subject: Subject, dataset: EvaluationSet, arguments: argparse.Namespace) -> Result:
    groups = dataset.split("test").groups
    # The column of white or not follows from the race.
    usual = KNOWN if dataset.questions else groups
    columns = chosen_columns(arguments.groups or ",".join(usual), groups)
    features = subject.features(dataset, "test")
    if dataset.questions:
        return _result(subject, dataset, BIAS, _faces(subject, dataset, columns, arguments))
    loaded, labels = subject.model_for("groups"), arguments.label_list
    templates = templates_of(dataset, arguments.templates)

    classifier_EC = probe = None
    if dataset.classnames:
        classifier_EC = subject.classifier(dataset.classnames, templates)
    if labels is not None:
        probe = _label_probe(subject, loaded, labels, templates)
    metrics, details = measure_bias(features, columns, classifier_EC, probe)
    details["templates"] = list(templates)
    return _result(subject, dataset, BIAS, (metrics, details))


def _label_probe(
    subject: Subject, loaded: LoadedModel, labels: LabelList, templates: Sequence[str]
) -> LabelProbe:
    """Return a list of labels with the classifier that assigns them."""
    names = [(name,) for name in (*labels.labels, *labels.added)]
    classifier_EK = subject.classifier(names, templates)
    return LabelProbe(labels, classifier_EK, loaded.model.logit_scale.exp().item())


def _faces(
    subject: Subject,
    dataset: EvaluationSet,
    columns: Sequence[str],
    arguments: argparse.Namespace,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Measure a set of faces with several questions per image; the user's labels replace its own."""
    loaded, features = subject.model_for("groups"), subject.features(dataset, "test")

    def templates(question: Question) -> tuple[str, ...]:
        return tuple(arguments.templates) or question.templates

    classifiers = {
        name: subject.classifier([(answer,) for answer in question.classnames], templates(question))
        for name, question in dataset.questions.items()
    }
    labels, asked = arguments.label_list, dataset.questions.get(LABELS_QUESTION)
    chosen = templates_of(dataset, arguments.templates) if asked is None else templates(asked)
    if labels is None and asked is not None:
        labels = labels_of(asked)
    probe = None if labels is None else _label_probe(subject, loaded, labels, chosen)

    metrics, details = measure_faces(features, columns, dataset.questions, classifiers, probe)
    prompts = [text for question in dataset.questions.values() for text in templates(question)]
    details["templates"] = list(dict.fromkeys(prompts))
    return metrics, details


def _overlap(subject: Subject, dataset: EvaluationSet, arguments: argparse.Namespace) -> Result:
    check_task(dataset, ("classification",), "overlap")
    features, loaded = subject.features(dataset, "test"), subject.model_for("zero-shot answers")
    classifier_EC = subject.classifier(
        dataset.classnames, templates_of(dataset, arguments.templates)
    )
    is_right_N = predict(features, classifier_EC)[:, 0] == features.labels_N
    descriptor = pixel_descriptor(features.device)
    if arguments.descriptor == "model":
        descriptor = model_descriptor(loaded.model, loaded.transform, features.device)

    reading = Reading(arguments.batch_size, arguments.workers)
    if subject.training is None:
        training = open_training(
            arguments.train_data,
            dataset_type=arguments.dataset_type,
            img_key=arguments.csv_img_key,
            caption_key=arguments.csv_caption_key,
            separator=arguments.csv_separator,
        )
        # A single data set needs its descriptors once.
        has_more = len(arguments.data) > 1 or arguments.suite is not None
        folder = subject.store.folder if has_more and subject.store is not None else None
        stream = TrainingStream(training, descriptor, reading, features.device, None, folder)
        subject.training = (training, stream)
    training, stream = subject.training
    title = f"{dataset.name}, training images"
    with progress_bar(title, "images", len(training)) as stream.progress:
        found = measure_overlap(
            features,
            is_right_N,
            training,
            arguments.train_data,
            descriptor,
            arguments.threshold,
            reading,
            stream=stream,
        )
    return _result(subject, dataset, OVERLAP, found)


def _result(
    subject: Subject,
    dataset: EvaluationSet,
    task: str,
    found: tuple[dict[str, float | None], dict[str, Any]],
) -> Result:
    """Return metrics and details as a result, with the usual details about its images."""
    metrics, details = found
    features = subject.features(dataset, "test")
    common = details_of(dataset, [features], details.get("seconds", {}))
    notes = [*common["notes"], *details.get("notes", [])]
    merged = {**common, **details, "seconds": common["seconds"], "notes": notes}
    return subject.result(dataset, task, metrics, merged)


_MEASURES: dict[str, Measure] = {
    "zero-shot": _zero_shot,
    "prompts": _prompts,
    "linear-probe": _linear_probe,
    "few-shot": _few_shot,
    "retrieval": _retrieval,
    "bias": _bias,
    "overlap": _overlap,
}
