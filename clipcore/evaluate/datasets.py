"""Labelled data sets as people have them, in the one form in which evaluations take them.

Legend: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from clipcore.data import DataError, PairSource

Task = Literal["classification", "multilabel", "retrieval"]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        name: one of ``SPLITS``.
        source: the images, as pairs; the captions matter for retrieval alone. None of a file of features.
        labels_N: class indices, int64 [N]; 0 and 1 of each class, uint8 [N, C], of a multi-label set; None for retrieval.
        fingerprint: returns a hash of what the images are: another one when one is added, removed, renamed or rewritten.
        keys: the images' names, which say which of them a seed takes; not their order.
        groups: groups of the images by the column that says them; empty where an image is in none.
        features_NW: of a file of features; None of images.
    """

    name: str
    source: PairSource | None
    labels_N: np.ndarray | None
    fingerprint: Callable[[], str]
    keys: Callable[[], list[str]]
    groups: Mapping[str, list[str]] = field(default_factory=dict)
    features_NW: np.ndarray | None = None


@dataclass(frozen=True)
class EvaluationSet:
    """A data set with its classes and its splits, which are opened when asked for.

    Attributes:
        name: as results call it: the folder's or file's name.
        task: what can be evaluated on it.
        classnames: the names of each class, one or several; all of them times all templates are averaged.
        templates: prompts with {} or {c} where a class's name goes; empty where the set has none of its own.
        split_names: those that are there.
        main_metric: a key of a zero-shot result's metrics.
        notes: what the user should know of it, such as "split: datacomp".
    """

    name: str
    task: Task
    classnames: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]
    split_names: tuple[str, ...]
    main_metric: str
    open_split: Callable[[str], Split]
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> Split:
        """Return a split; raise DataError where the set has none of that name."""
        if name not in self.split_names:
            raise DataError(f"{self.name} has no {name} split")
        return self.open_split(name)


def open_set(spec: str, **options: Any) -> EvaluationSet:
    """Open a data set; raise DataError."""
    raise NotImplementedError
