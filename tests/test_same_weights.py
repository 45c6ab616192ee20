"""One model under several names: known by a hash of its weights, and nobody's results lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation_sets import nano
from result_folders import PROBE, put

from clipcore.data import DataError, LeftOut
from clipcore.data.transforms import ImageTransform
from clipcore.evaluate.comparison import compare
from clipcore.evaluate.features import hash_of_tower
from clipcore.evaluate.page_data import read_page_data
from clipcore.evaluate.results import read_results
from clipcore.evaluate.robustness_study import robustness_study
from clipcore.evaluate.same_weights import (
    HASH_KEY,
    hash_of_model,
    identity_of,
    name_of_weights,
    one_name_each,
)
from clipcore.evaluate.scaling_study import scaling_study
from clipcore.loading import LoadedModel
from clipcore.model import CLIP
from clipcore.tokenizer import byte_tokenizer, train_tokenizer

pytestmark = pytest.mark.fast

A, B = "a" * 64, "b" * 64


def hash_of(model: CLIP, crop: int = 32, tokenizer: object = None) -> str:
    transform = ImageTransform(crop, is_train=False)
    tokenizer = tokenizer or byte_tokenizer()
    loaded = LoadedModel("nano", "nano", model, transform, tokenizer, ("{}",))  # type: ignore[arg-type]
    return hash_of_model(loaded, hash_of_tower(model))


def test_the_hash_is_of_all_that_answers_depend_on():
    first = hash_of(nano())
    assert first == hash_of(nano()) and len(first) == 64
    other = nano()
    with torch.no_grad():
        # A locked image tower leaves the texts' alone to differ.
        other.token_embedding.weight[0, 0] += 1
    words = train_tokenizer(["a red ball", "a red box"] * 4, 520)
    seen = [
        first,
        hash_of(other),
        hash_of(nano(seed=1)),
        hash_of(nano(), crop=48),
        hash_of(nano(), tokenizer=words),
    ]
    assert len(set(seen)) == 5


def put_weights(folder: Path, dataset: str, value: float, name: str, weights: str | None) -> None:
    more = {} if weights is None else {HASH_KEY: weights}
    put(folder, dataset, value, pretrained=name, **more)


def test_two_names_of_one_hash_are_one_model(tmp_path):
    put_weights(tmp_path, "pets", 0.5, "/runs/a", A)
    put_weights(tmp_path, "pets", 0.5, "a", A)
    put_weights(tmp_path, "cars", 0.25, "/runs/a", A)
    put_weights(tmp_path, "cars", 0.75, "b", B)
    left_out = LeftOut()
    found, renamed = one_name_each(read_results(tmp_path), left_out)
    assert renamed == {("ViT-B-32", "/runs/a"): "a"}
    assert sorted((one.dataset, one.pretrained) for one in found) == [
        ("cars", "a"),
        ("cars", "b"),
        ("pets", "a"),
    ]
    # What is not shown is counted, and its file stays.
    assert "1 x result of a model under a second name, such as pets_-runs-a" in str(left_out)
    assert len(read_results(tmp_path)) == 4


@pytest.mark.parametrize("weights", [None, "", "A" * 64, B])
def test_names_are_not_one_model_where_a_result_says_otherwise(tmp_path, weights):
    """Of other weights, of none, such as an older result, or of what is no hash."""
    put_weights(tmp_path, "pets", 0.5, "/runs/a", A)
    put_weights(tmp_path, "cars", 0.5, "/runs/a", weights)
    put_weights(tmp_path, "pets", 0.5, "a", A)
    results = read_results(tmp_path)
    left_out = LeftOut()
    assert one_name_each(results, left_out) == (results, {}) and not left_out
    assert name_of_weights(map(identity_of, results), "ViT-B-32", A) == "a"
    assert name_of_weights(map(identity_of, results), "ViT-B-16", A) is None
    assert name_of_weights(map(identity_of, results), "ViT-B-32", "") is None


def test_pages_and_studies_take_them_as_one(tmp_path):
    put_weights(tmp_path, "imagenet1k", 0.6, "/runs/a", A)
    put_weights(tmp_path, "imagenetv2", 0.5, "a", A)
    put(tmp_path, "imagenet1k", 0.7, pretrained="a", task=PROBE, **{HASH_KEY: A})
    (pair,) = robustness_study(tmp_path)["pairs"]
    assert [(row["pretrained"], row["in_accuracy"]) for row in pair["models"]] == [("a", 0.6)]
    data = read_page_data(tmp_path)
    assert [(one.pretrained, one.other_names) for one in data.models] == [("a", ("/runs/a",))]
    # By either name.
    for name in ("a", "/runs/a", "ViT-B-32 /runs/a"):
        assert compare(tmp_path, model_a=name)["a"] == "ViT-B-32 a, zero-shot"
    with pytest.raises(DataError, match="has no zero-shot of runs"):
        compare(tmp_path, model_a="runs")


def test_a_law_counts_a_model_once(tmp_path):
    for number, name in enumerate(("a", "b", "c", "/runs/c")):
        weights = "abcc"[number] * 64
        more = {HASH_KEY: weights, "gmacs": 4.0 ** min(number, 2)}
        put(tmp_path, "pets", 0.5 + 0.1 * min(number, 2), pretrained=name, **more)
    study = scaling_study(tmp_path)
    assert [row["pretrained"] for row in study["models"]] == ["a", "b", "c"]
    assert any("result of a model under a second name" in note for note in study["notes"])
