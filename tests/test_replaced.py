"""What is said of a result that takes another's place."""

from __future__ import annotations

import pytest

from clipcore.evaluate.replaced import changes
from clipcore.evaluate.results import Result

pytestmark = pytest.mark.fast

DETAILS = {"weights_sha256": "a" * 64, "feature_keys": {"test": "1"}, "trace": [], "C": 1.0}
DETAILS |= {"templates": ["{}"], "training": "t.csv", "descriptor": "pixels", "threshold": 0.5}
DETAILS |= {"threshold_from": "given", "shots": [1, 2], "seeds": [0], "columns": ["age"]}
DETAILS |= {"labels": ["thief"], "seconds": {"encode": 1.0}}
OTHER_KEYS = {"feature_keys": {"test": "2"}}


def result(**more: object) -> Result:
    return Result("pets", "ViT-B-32", "a", "linear_probe", {"lp_acc1": 0.5}, {**DETAILS, **more})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"seconds": {"encode": 2.0}}, []),
        (OTHER_KEYS, ["images or precision"]),
        ({**OTHER_KEYS, "weights_sha256": "b" * 64}, ["weights or preprocessing"]),
        # A locked image tower gives the same features.
        ({"weights_sha256": "b" * 64}, ["weights or preprocessing"]),
        ({**OTHER_KEYS, "weights_sha256": ""}, ["images, precision, preprocessing or weights"]),
        ({"templates": ["a {}"], "C": 2.0}, ["prompts", "C"]),
        ({"training": "u.csv", "descriptor": "model"}, ["training data", "descriptor"]),
        ({"threshold": 0.25}, ["threshold"]),
        ({"threshold": 0.5, "threshold_from": "proposed"}, ["threshold"]),
        ({"C": 1.0, "trace": [[1.0, 0.5]]}, ["C"]),
        ({"shots": [1], "seeds": [0, 1]}, ["shots", "seeds"]),
        ({"columns": ["gender"], "labels": ["ape"]}, ["groups", "labels"]),
    ],
)
def test_what_differs_is_named(more, words):
    assert changes(result(), result(**more)) == changes(result(**more), result()) == words


def test_what_was_found_or_is_not_said_does_not_count():
    """A C of a search and a proposed threshold follow from what is named; older versions say less."""
    searched = {"trace": [[1.0, 0.5]], "threshold_from": "proposed"}
    assert not changes(result(**searched), result(**searched, C=2.0, threshold=0.25))
    older = Result("pets", "ViT-B-32", "a", "linear_probe", {}, {})
    assert not changes(older, result()) and not changes(result(), older)
