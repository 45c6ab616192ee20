"""The results of a folder as a table, each model's on each data set, and the metric that several of them share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from clipcore.data import DataError, LeftOut, printable
from clipcore.evaluate.results import LINEAR_PROBE, RETRIEVAL, ZERO_SHOT, Result, set_key

# What a study calls the tasks that it compares.
TITLES = {ZERO_SHOT: "zero-shot", LINEAR_PROBE: "linear probe", RETRIEVAL: "retrieval"}
_SHOWN = 8  # names in a message
_SHOWN_CHARS = 60


class BadResultError(DataError):
    """A result that no study can take: its number is no share, or another is of the same model and data set."""


class Model(NamedTuple):
    """A model as results name it."""

    model: str
    pretrained: str

    def __str__(self) -> str:
        return printable(f"{self.model} {self.pretrained}".strip())

    def is_called(self, name: str) -> bool:
        """Return whether a user's name means this model: its architecture, its weights, or both."""
        return name in (self.model, self.pretrained, " ".join(self), ",".join(self))


def scores_of(
    results: Iterable[Result], task: str, left_out: LeftOut
) -> dict[Model, dict[str, Result]]:
    """Return for each model its results of one task by data set, under the names of ``set_key``.

    Probes of a few images a class, as CLIP_benchmark's are where --fewshot_k is given, are left out.

    Raises:
        BadResultError: there are two results of one model on one data set.
    """
    found: dict[Model, dict[str, Result]] = {}
    for result in results:
        if result.task != task:
            continue
        if result.metrics.get("fewshot_k") not in (None, -1):
            left_out.add("probe of a few images a class", result.dataset)
            continue
        key = set_key(result.dataset)
        if result.language != "en":
            key = f"{key} [{result.language}]"
        model = Model(result.model, result.pretrained)
        other = found.setdefault(model, {}).setdefault(key, result)
        if other is not result:
            raise BadResultError(
                f"there are two results of {model} on {printable(key)} ({TITLES.get(task, task)}), of "
                f"{printable(other.dataset)!r} and {printable(result.dataset)!r}; remove the file of one"
            )
    return found


def score(result: Result, metric: str) -> float | None:
    """Return a metric of a result under its name there, which for probes begins with ``lp_``; None where it has none."""
    value = result.metrics.get(metric)
    return result.metrics.get(f"lp_{metric}") if value is None else value


def share(result: Result, metric: str) -> float | None:
    """Return a metric as ``score`` does; raise BadResultError where it is no share from 0 to 1."""
    value = score(result, metric)
    if value is not None and not 0 <= value <= 1:
        raise BadResultError(
            f"{printable(metric)} of {Model(result.model, result.pretrained)} on {printable(result.dataset)} is {value:g}, "
            "no share from 0 to 1; evaluate it anew, or remove its file"
        )
    return value


def common_metric(results: Sequence[Result]) -> str | None:
    """Return the metric by which results on one data set are compared: a main metric of one of them that all have.

    One that a result states comes before the usual one of its task. None where they share none.
    """
    stated = [result.main_metric for result in results if "main_metric" in result.details]
    usual = [result.main_metric for result in results]
    for name in [*stated, *usual]:
        metric = (name or "").removeprefix("lp_")
        if metric and all(score(result, metric) is not None for result in results):
            return metric
    return None


def metrics_note(metrics: Iterable[str]) -> list[str]:
    """Return the note that a study of several metrics needs; nothing of one metric."""
    counts: dict[str, int] = {}
    for metric in metrics:
        counts[metric] = counts.get(metric, 0) + 1
    if len(counts) < 2:
        return []
    parts = ", ".join(f"{printable(metric)} of {number}" for metric, number in counts.items())
    return [f"the sets are measured by different metrics: {parts}"]


def listed(names: Iterable[str]) -> str:
    """Return names for a message, the first of many."""
    shown = [printable(name)[:_SHOWN_CHARS] for name in names]
    more = f" and {len(shown) - _SHOWN} others" if len(shown) > _SHOWN else ""
    return (", ".join(shown[:_SHOWN]) or "none") + more
