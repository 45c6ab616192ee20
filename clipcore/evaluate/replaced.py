"""Describes how a result differs from the one that it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipcore.evaluate.results import Result
from clipcore.evaluate.same_weights import identity_of

# A user's choices, by their keys in a result's details.
_CHOICES = {
    "templates": "prompts",
    "training": "training data",
    "descriptor": "descriptor",
    "threshold": "threshold",
    "C": "C",
    "shots": "shots",
    "seeds": "seeds",
    "columns": "groups",
    "labels": "labels",
}


def changes(before: Result, after: Result) -> list[str]:
    """Return in words what differs between two results of one name, data set and task.

    Details that only one of them has are ignored, because results of older versions have fewer.
    """
    old, new = _chosen(before.details), _chosen(after.details)
    words = [
        title
        for key, title in _CHOICES.items()
        if key in old and key in new and old[key] != new[key]
    ]
    features = _features_word(before, after)
    return [features, *words] if features else words


def _features_word(before: Result, after: Result) -> str:
    """Return in words why features differ; an empty text if they do not.

    The hash of a model's weights separates changed weights from other changes; without it they cannot be separated.
    """
    old_hash, new_hash = identity_of(before).weights, identity_of(after).weights
    if old_hash and new_hash and old_hash != new_hash:
        return "weights or preprocessing"
    old, new = (one.details.get("feature_keys") for one in (before, after))
    if old is None or new is None or old == new:
        return ""
    if old_hash and new_hash:
        return "images or precision"
    return "images, precision, preprocessing or weights"


def _chosen(details: Mapping[str, Any]) -> dict[str, Any]:
    """Return details with None for each number that was computed, not given: it follows from the rest."""
    found = dict(details)
    if details.get("trace"):
        found["C"] = None
    if details.get("threshold_from") == "proposed":
        found["threshold"] = None
    return found
