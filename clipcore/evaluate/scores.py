"""Arranges the results of a folder by model and data set, and finds the metrics that they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from clipcore.data import DataError, LeftOut, printable
from clipcore.evaluate.results import LINEAR_PROBE, RETRIEVAL, ZERO_SHOT, Result, set_key

# The names of the tasks in a study.
TITLES = {ZERO_SHOT: "zero-shot", LINEAR_PROBE: "linear probe", RETRIEVAL: "retrieval"}
_SHOWN = 8  # number of names in a message
_SHOWN_CHARS = 60


class BadResultError(DataError):
    """A result that no study can use: its value is not a share, or its model and data set have another result."""


class Model(NamedTuple):
    """A model as results name it."""

    model: str
    pretrained: str

    def __str__(self) -> str:
        return printable(f"{self.model} {self.pretrained}".strip())

    def is_named(self, name: str) -> bool:
        """Return whether a user's name selects this model: its architecture, its weights, or both."""
        return name in (self.model, self.pretrained, " ".join(self), ",".join(self))


def scores_of(
    results: Iterable[Result], task: str, left_out: LeftOut
) -> dict[Model, dict[str, Result]]:
    """Return for each model its results of one task by data set, under the names of ``set_key``.

    Few-shot probes, such as CLIP_benchmark's with --fewshot_k, are left out.

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
    """Return a metric of a result, whose name begins with ``lp_`` for probes; None if it has none."""
    value = result.metrics.get(metric)
    return result.metrics.get(f"lp_{metric}") if value is None else value


def share(result: Result, metric: str) -> float | None:
    """Return a metric as ``score`` does; raise BadResultError unless it is a share from 0 to 1."""
    value = score(result, metric)
    if value is not None and not 0 <= value <= 1:
        raise BadResultError(
            f"{printable(metric)} of {Model(result.model, result.pretrained)} on {printable(result.dataset)} is {value:g}, "
            "not a share from 0 to 1; evaluate it again, or remove its file"
        )
    return value


def common_metric(results: Sequence[Result]) -> str | None:
    """Return the metric for comparing results on one data set: a main metric of one of them that all have.

    A metric that a result states is preferred to its task's usual one. None if they share no metric.
    """
    stated = [result.main_metric for result in results if "main_metric" in result.details]
    usual = [result.main_metric for result in results]
    for name in [*stated, *usual]:
        metric = (name or "").removeprefix("lp_")
        if metric and all(score(result, metric) is not None for result in results):
            return metric
    return None


def metrics_note(metrics: Iterable[str]) -> list[str]:
    """Return the note for a study of several metrics; nothing for one metric."""
    counts: dict[str, int] = {}
    for metric in metrics:
        counts[metric] = counts.get(metric, 0) + 1
    if len(counts) < 2:
        return []
    parts = ", ".join(f"{printable(metric)} of {number}" for metric, number in counts.items())
    return [f"the sets are measured by different metrics: {parts}"]


def listed(names: Iterable[str]) -> str:
    """Return names for a message; only the first ones if there are many."""
    shown = [printable(name)[:_SHOWN_CHARS] for name in names]
    more = f" and {len(shown) - _SHOWN} others" if len(shown) > _SHOWN else ""
    return (", ".join(shown[:_SHOWN]) or "none") + more
