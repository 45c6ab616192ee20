"""Reads and checks the data of the page of results; the results are not trusted.

A result that lacks the values for its plot is left out and counted. Shares are from 0 to 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from clipcore.data import DataError, LeftOut, printable
from clipcore.evaluate.metrics import chance_of
from clipcore.evaluate.page_models import Model, PageModels, page_models
from clipcore.evaluate.page_values import (
    count,
    difference,
    entries,
    interval,
    number,
    objects,
    positive,
    share,
    shown,
    text,
)
from clipcore.evaluate.results import (
    LINEAR_PROBE,
    RETRIEVAL,
    ZERO_SHOT,
    Result,
    models_of,
    read_results,
)
from clipcore.evaluate.same_weights import one_name_each
from clipcore.files import is_file, read_regular

K = TypeVar("K")
T = TypeVar("T")

STUDIES = ("robustness", "scaling", "compare")
# Main metrics of CLIP_benchmark's own results, which name none: the first one present is used.
_FALLBACKS = {
    ZERO_SHOT: ("acc1", "mean_average_precision"),
    LINEAR_PROBE: ("lp_acc1", "lp_mean_average_precision"),
    RETRIEVAL: ("mean_recall@1", "image_retrieval_recall@5"),
}
_MAX_STUDY_BYTES = 1 << 26
_MAX_PICTURE_CHARS = 1 << 16
_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")


class Score(NamedTuple):
    """The main metric of a result, with its 95% interval and chance level if they are known."""

    value: float
    metric: str
    interval: tuple[float, float] | None = None
    chance: float | None = None


class Variant(NamedTuple):
    """A set of prompts: its score, and its gain over bare names."""

    title: str
    value: float | None
    gain: float | None


class FewShot(NamedTuple):
    """Scores of few-shot probes, with one row per number of images and one column per seed."""

    shots: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    zero_shot: float | None
    full: float | None
    labels: float | None
    labels_text: str
    metric: str

    @property
    def means(self) -> list[float]:
        """The mean score for each number of images."""
        return [sum(row) / len(row) for row in self.scores]


class Neighbour(NamedTuple):
    """An evaluation picture and its nearest training picture; the pictures are data URIs, or empty."""

    cosine: float
    key: str
    training_key: str
    picture: str
    training_picture: str


class Overlap(NamedTuple):
    """How many evaluation pictures are among the training pictures, and how much they raise the score."""

    num_images: int
    num_overlap: int
    contamination: float
    threshold: float | None
    score: float | None
    clean_score: float | None
    overlap_score: float | None
    gain: float | None
    gain_interval: tuple[float, float] | None
    p_value: float | None
    neighbours: tuple[Neighbour, ...]
    training: str
    threshold_from: str


class Rate(NamedTuple):
    """How often a condition holds in a group."""

    rate: float
    num_images: int
    interval: tuple[float, float] | None
    is_small: bool


class Counted(NamedTuple):
    """A quantity counted in a column of groups: accuracy, or how often an image is classified into a category."""

    rates: dict[str, Rate]
    is_accuracy: bool


class Difference(NamedTuple):
    """How unevenly a label is assigned to the groups of a column; a ratio of None is infinite."""

    column: str
    threshold: float | None
    label: str
    rates: dict[str, float]
    ratio: float | None
    p_value: float | None


class Bias(NamedTuple):
    """Rates by group, for each column of groups and each counted quantity, and unevenly assigned labels."""

    tables: dict[str, dict[str, Counted]]
    differences: tuple[Difference, ...]
    labels: tuple[str, ...]
    categories: dict[str, tuple[str, ...]]


class Trace(NamedTuple):
    """The search of a probe's C: C and score of each fit, and the chosen C."""

    fits: tuple[tuple[float, float], ...]
    C: float | None


@dataclass
class PageData:
    """All results of a folder.

    Attributes:
        page_models: the models with results, and the models of studies.
        results: by task, data set and index of the model.
        studies: the objects in the existing files of ``STUDIES``.
        left_out: results that cannot be shown, by reason.
    """

    page_models: PageModels
    results: dict[str, dict[str, dict[int, Result]]]
    studies: dict[str, dict[str, Any]]
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def models(self) -> list[Model]:
        """The models with results, in the order of their colours."""
        return self.page_models.evaluated

    def parsed(self, task: str, read: Callable[[Result], T]) -> dict[str, dict[int, T]]:
        """Return ``read``'s value for each result of a task; count results for which it raises ValueError."""
        found: dict[str, dict[int, T]] = {}
        for name, by_model in self.results.get(task, {}).items():
            for index, result in by_model.items():
                try:
                    found.setdefault(name, {})[index] = read(result)
                except ValueError as error:
                    self.left_out.add(str(error), result.file_name)
        return {name: by_model for name, by_model in found.items() if by_model}


def read_page_data(folder: Path) -> PageData:
    """Return the content of a folder of results.

    Raises:
        DataError: it holds no results, or a file that cannot be read.
    """
    left_out = LeftOut()
    results, renamed = one_name_each(read_results(folder), left_out)
    studies = _read_studies(folder)
    pairs = sorted(models_of(results))
    index = {pair: number for number, pair in enumerate(pairs)}
    data = PageData(page_models(pairs, renamed, studies), {}, studies, left_out)

    def order(result: Result) -> tuple[str, str, int]:
        return result.dataset.lower(), result.dataset, index[result.model, result.pretrained]

    for result in sorted(results, key=order):
        name = shown(result.dataset)
        if result.language != "en":
            name = f"{name} ({shown(result.language)})"
        by_model = data.results.setdefault(result.task, {}).setdefault(name, {})
        place = index[result.model, result.pretrained]
        if place in by_model:
            reason = "second result of one model, data set and task"
            data.left_out.add(reason, result.file_name)
        by_model.setdefault(place, result)

    return data


def _read_studies(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the objects in the existing files of studies; ``read_results`` has checked that they are JSON."""
    studies = {}
    for study in STUDIES:
        path = folder / f"{study}.json"
        try:
            if not is_file(path):
                continue
            record = json.loads(read_regular(path, _MAX_STUDY_BYTES))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {printable(str(error))}; remove it") from None
        if isinstance(record, dict) and record.get("study") == study:
            studies[study] = record
    return studies


def read_score(result: Result) -> Score:
    """Return the main metric of a result; raise ValueError if it has none."""
    metric = result.details.get("main_metric")
    if metric is None:
        candidates = _FALLBACKS.get(result.task, ())
        metric = next((name for name in candidates if name in result.metrics), None)
    value = share(result.metrics.get(metric)) if isinstance(metric, str) else None
    if value is None or not isinstance(metric, str):
        raise ValueError("result without a main metric from 0 to 1")
    return Score(
        value, shown(metric), interval(result.details.get("ci95")), _chance(result, metric)
    )


def _chance(result: Result, metric: str) -> float | None:
    """Return the chance level that a result states, else the one of its number of classes."""
    stated = share(result.details.get("chance"))
    if stated is not None:
        return stated
    return chance_of(metric.removeprefix("lp_"), count(result.details.get("num_classes")))


def read_recalls(result: Result) -> dict[str, float | None]:
    """Return the recalls of a retrieval by the metrics' names."""
    recalls = {name: share(value) for name, value in result.metrics.items() if "recall@" in name}
    if not any(value is not None for value in recalls.values()):
        raise ValueError("retrieval without a recall from 0 to 1")
    return recalls


def read_prompts(result: Result) -> tuple[str, tuple[Variant, ...]]:
    """Return the metric and the sets of prompts."""
    variants = tuple(
        Variant(shown(row.get("title")), share(row.get("value")), difference(row.get("gain")))
        for row in objects(result.details.get("variants"))
    )
    if not variants:
        raise ValueError("prompt gains without variants")
    return shown(result.details.get("metric")), variants


def read_few_shot(result: Result) -> FewShot:
    """Return a few-shot curve; raise ValueError if numbers of images and scores do not match."""
    details = result.details
    shots, rows = entries(details.get("shots")), entries(details.get("scores"))
    if not shots or len(shots) != len(rows):
        raise ValueError("few-shot result whose scores do not fit its shots")
    scores = []
    for row in rows:
        values = [share(value) for value in entries(row)]
        if not values or None in values:
            raise ValueError("few-shot result whose scores are not from 0 to 1")
        scores.append(tuple(value for value in values if value is not None))
    places = [count(value) for value in shots]
    if 0 in places or sorted(set(places)) != places or places[-1] > 1 << 30:
        raise ValueError("few-shot result whose shots do not grow")

    labels = details.get("labels_per_class")
    labels = labels if isinstance(labels, dict) else {}
    return FewShot(
        shots=tuple(places),
        scores=tuple(scores),
        zero_shot=share(details.get("zero_shot")),
        full=share(details.get("full")),
        labels=positive(labels.get("number")),
        labels_text=_labels_text(labels.get("text")),
        metric=shown(details.get("metric")),
    )


def _labels_text(value: object) -> str:
    """Return labels per class such as "5.4" or ">16" in few digits; "–" for any other value."""
    parts = (
        re.fullmatch(r"([<>]?)(\d{1,9}(?:\.\d{1,9})?)", value) if isinstance(value, str) else None
    )
    if parts is None:
        return "–"
    found = float(parts[2])
    return parts[1] + (f"{found:,.0f}" if found >= 100 else f"{found:.3g}")


def read_overlap(result: Result) -> Overlap:
    """Return an overlap; raise ValueError if the share of overlapping pictures is missing."""
    metrics, details = result.metrics, result.details
    contamination = share(metrics.get("contamination"))
    if contamination is None:
        raise ValueError("overlap without a contamination from 0 to 1")
    clean_score = share(metrics.get("clean_score"))
    found = interval(details.get("overlap_interval"))
    gain_interval = None
    if found is not None and clean_score is not None:
        # The score of all is the clean score plus this share of the difference.
        low, high = (contamination * (end - clean_score) for end in found)
        gain_interval = (low, high)
    neighbours = tuple(
        Neighbour(
            cosine,
            shown(row.get("image_key")),
            shown(row.get("training_key")),
            _picture(row.get("image")),
            _picture(row.get("training_image")),
        )
        for row in objects(details.get("nearest"))
        if (cosine := number(row.get("cosine"))) is not None
    )
    return Overlap(
        num_images=count(details.get("num_images")),
        num_overlap=count(details.get("num_overlap")),
        contamination=contamination,
        threshold=number(details.get("threshold")),
        score=share(metrics.get("score")),
        clean_score=clean_score,
        overlap_score=share(metrics.get("overlap_score")),
        gain=difference(metrics.get("gain")),
        gain_interval=gain_interval,
        p_value=share(metrics.get("p_value")),
        neighbours=neighbours,
        training=_training(details),
        threshold_from=text(details.get("threshold_from")),
    )


def _training(details: dict[str, Any]) -> str:
    """Return the training pictures of a comparison, and the descriptor; an empty text if they are not stated."""
    name, descriptor = text(details.get("training")), text(details.get("descriptor"))
    by = f", by {descriptor}" if descriptor else ""
    return f"{name} ({count(details.get('num_training')):,} pictures{by})" if name else ""


def _picture(value: object) -> str:
    """Return a data URI of a PNG picture; an empty text for any other value."""
    if not isinstance(value, str) or len(value) > _MAX_PICTURE_CHARS:
        return ""
    return value if _PICTURE.fullmatch(value) else ""


def read_bias(result: Result) -> Bias:
    """Return rates by group; raise ValueError if there are none."""
    tables: dict[str, dict[str, Counted]] = {}
    for table in objects(result.details.get("tables")):
        # A column of groups is one table of the page, and each counted quantity is a column of it.
        column = shown(table.get("column"))
        title = shown(table.get("title")).replace(f" by {column}", "")
        tables.setdefault(column, {})[title] = Counted(
            {
                shown(row.get("group")): Rate(
                    rate,
                    count(row.get("num_images")),
                    interval(row.get("interval")),
                    row.get("is_small") is True,
                )
                for row in objects(table.get("rows"))
                if (rate := share(row.get("rate"))) is not None
            },
            is_accuracy=table.get("category") is None,
        )
    differences = tuple(
        Difference(
            shown(row.get("column")),
            share(row.get("threshold")),
            shown(row.get("label")),
            _rates(row.get("rates")),
            positive(row.get("ratio")),
            share(row.get("p_value")),
        )
        for row in objects(result.details.get("differences"))
    )
    if not tables and not differences:
        raise ValueError("bias result without rates")
    details = result.details
    categories = details.get("categories")
    return Bias(
        tables,
        differences,
        labels=tuple(map(shown, entries(details.get("labels")))),
        categories={
            shown(name): tuple(map(shown, entries(those)))
            for name, those in (categories if isinstance(categories, dict) else {}).items()
        },
    )


def _rates(value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        return {}
    rates = {shown(group): share(rate) for group, rate in value.items()}
    return {group: rate for group, rate in rates.items() if rate is not None}


def read_trace(result: Result) -> Trace:
    """Return the search of a probe's C, without fits if its C was given; raise ValueError for too many fits."""
    fits = []
    for row in entries(result.details.get("trace")):
        if isinstance(row, list) and len(row) == 2:
            C, score = positive(row[0]), share(row[1])
            if C is not None and score is not None:
                fits.append((C, score))
    return Trace(tuple(fits), positive(result.details.get("C")))


def common(by_set: Mapping[K, Mapping[int, T]], num_models: int) -> list[K]:
    """Return the data sets that all models have."""
    return [name for name, by_model in by_set.items() if len(by_model) == num_models]


def mean(values: Iterable[float]) -> float | None:
    """Return the mean; None for no values."""
    found = list(values)
    return sum(found) / len(found) if found else None
