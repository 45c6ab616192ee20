"""What tells a result from the one whose place it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipcore.evaluate.results import Result
from clipcore.evaluate.same_weights import identity_of

# What a user chooses, by its key in a result's details.
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

    What only one of them says, as results of older versions say less, does not count.
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
    """Return in words why features differ; an empty text where they do not.

    The hash of a model's weights tells these from the rest; without it nothing does.
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
    """Return details where a number that was found, and not given, is None: it follows from the rest."""
    found = dict(details)
    if details.get("trace"):
        found["C"] = None
    if details.get("threshold_from") == "proposed":
        found["threshold"] = None
    return found
