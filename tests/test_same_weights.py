"""One model under several names: known by a hash of its weights, and nobody's results lost."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from evaluation_sets import nano
from result_folders import PROBE, put

from clipcore.data import DataError, LeftOut
from clipcore.data.transforms import ImageTransform
from clipcore.evaluate.comparison import compare
from clipcore.evaluate.features import hash_of_tower
from clipcore.evaluate.loading import LoadedModel
from clipcore.evaluate.page_data import read_page_data
from clipcore.evaluate.results import read_results, write_result
from clipcore.evaluate.robustness_study import robustness_study
from clipcore.evaluate.same_weights import (
    HASH_KEY,
    Identity,
    hash_of_model,
    name_of_weights,
    one_name_each,
)
from clipcore.evaluate.scaling_study import scaling_study
from clipcore.tokenizer import byte_tokenizer, train_tokenizer
from clipcore.towers.model import CLIP

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
    assert "1 x older result of a model under another name, such as pets_-runs-a" in str(left_out)
    assert len(read_results(tmp_path)) == 4


@pytest.mark.parametrize("weights", [None, "", "A" * 64])
def test_names_are_not_one_model_where_a_result_says_otherwise(tmp_path, weights):
    """Of none, such as an older result, or of what is no hash."""
    put_weights(tmp_path, "pets", 0.5, "/runs/a", A)
    put_weights(tmp_path, "cars", 0.5, "/runs/a", weights)
    put_weights(tmp_path, "pets", 0.5, "a", A)
    results = read_results(tmp_path)
    left_out = LeftOut()
    assert one_name_each(results, left_out) == (results, {}) and not left_out


def test_results_are_written_under_the_name_that_a_model_has():
    known = [Identity("m", "/runs/a", A), Identity("m", "a", A), Identity("m", "old", "")]
    assert name_of_weights(known, Identity("m", "new", A)) == "a"
    assert name_of_weights(known, Identity("m", "/runs/a", A)) == "a"
    for other in (Identity("k", "new", A), Identity("m", "new", B), Identity("m", "new", "")):
        assert name_of_weights(known, other) == "new"
    # A run that was trained on: what it had is replaced, not kept beside the new.
    known += [Identity("m", "a/step_2", B)]
    assert name_of_weights(known, Identity("m", "a", B)) == "a"
    assert name_of_weights(known, Identity("m", "old", B)) == "old"


def write_in_order(folder: Path, *results: tuple[str, float, str, str]) -> None:
    """Write results of data set, value, name and weights, each a second after the one before."""
    seen = set[Path]()
    for second, (dataset, value, name, weights) in enumerate(results, 1):
        put_weights(folder, dataset, value, name, weights)
        (path,) = set(folder.glob("*.json")) - seen
        os.utime(path, (second, second))
        seen.add(path)


@pytest.mark.parametrize("last", ["pets", "cars"])
def test_a_name_stands_for_its_newest_weights(tmp_path, last):
    """A run that is evaluated, trained on, and evaluated again on fewer sets is not averaged with what it was."""
    older = "cars" if last == "pets" else "pets"
    write_in_order(tmp_path, (older, 0.25, "a", A), ("food", 0.5, "a", ""), (last, 0.75, "a", B))
    left_out = LeftOut()
    found, renamed = one_name_each(read_results(tmp_path), left_out)
    assert {one.dataset: one.value for one in found} == {"food": 0.5, last: 0.75} and not renamed
    assert str(
        left_out
    ) == f"1 x result of a model's earlier weights, such as {older}_a_ViT-B-32_" + (
        "en_zeroshot_classification.json"
    )
    data = read_page_data(tmp_path)
    assert set(data.results["zeroshot_classification"]) == {"food", last}
    assert "earlier weights" in str(data.left_out)


def test_a_name_joins_the_others_of_its_newest_weights(tmp_path):
    write_in_order(
        tmp_path, ("pets", 0.25, "a", A), ("pets", 0.5, "a/step_2", B), ("cars", 0.75, "a", B)
    )
    found, renamed = one_name_each(read_results(tmp_path), LeftOut())
    assert renamed == {("ViT-B-32", "a/step_2"): "a"}
    assert {one.dataset: one.value for one in found} == {"pets": 0.5, "cars": 0.75}


@pytest.mark.parametrize("names", [("a", "/runs/a"), ("/runs/a", "a")])
@pytest.mark.parametrize("spelling", ["cars", "wds_cars"])
def test_of_two_results_of_one_model_the_newest_stays(tmp_path, names, spelling):
    """Under the shortest name or not, and by either spelling of the data set."""
    write_in_order(tmp_path, ("cars", 0.25, names[0], A), (spelling, 0.75, names[1], A))
    left_out = LeftOut()
    (found,), _ = one_name_each(read_results(tmp_path), left_out)
    assert (found.pretrained, found.value) == ("a", 0.75) and "older result" in str(left_out)


def test_a_result_that_is_written_again_keeps_its_time(tmp_path):
    """As overlaps are, whose p-values take account of later results."""
    write_in_order(tmp_path, ("pets", 0.25, "a", A))
    (one,) = read_results(tmp_path)
    path = write_result(tmp_path, dataclasses.replace(one, details={**one.details, "more": 1}))
    (again,) = read_results(tmp_path)
    assert path.stat().st_mtime_ns == again.written_ns == 10**9 and again.details["more"] == 1


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


def test_an_architecture_of_several_models_names_none(tmp_path):
    """Although one of them has a further name."""
    for dataset, name, weights in (("pets", "a", A), ("cars", "/runs/a", A), ("pets", "b", B)):
        put_weights(tmp_path, dataset, 0.5, name, weights)
        put(tmp_path, dataset, 0.75, pretrained=name, task=PROBE, **{HASH_KEY: weights})
    with pytest.raises(DataError, match="of 2 models; name one with --model-a: ViT-B-32 a, ViT-B"):
        compare(tmp_path, model_a="ViT-B-32")
    for name in ("/runs/a", "ViT-B-32 /runs/a", "ViT-B-32,/runs/a", "a"):
        study = compare(tmp_path, model_a=name)
        assert study["a"] == "ViT-B-32 a, zero-shot" and len(study["sets"]) == 2


def test_a_law_counts_a_model_once(tmp_path):
    for number, name in enumerate(("a", "b", "c", "/runs/c")):
        weights = "abcc"[number] * 64
        more = {HASH_KEY: weights, "gmacs": 4.0 ** min(number, 2)}
        put(tmp_path, "pets", 0.5 + 0.1 * min(number, 2), pretrained=name, **more)
    study = scaling_study(tmp_path)
    assert [row["pretrained"] for row in study["models"]] == ["a", "b", "c"]
    assert any("older result of a model under another name" in note for note in study["notes"])
