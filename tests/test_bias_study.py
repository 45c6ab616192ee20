"""Bias probes on tables made so that rates are whole shares, and on label lists that are wrong in every way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from given_features import GivenFeatures

from clipcore.data import DataError
from clipcore.evaluate import bias_study, label_lists
from clipcore.evaluate.arguments import add_bias_arguments
from clipcore.evaluate.bias import label_differences
from clipcore.evaluate.bias_study import LabelProbe, chosen_columns, measure_bias
from clipcore.evaluate.label_lists import PAPER_LABELS, LabelList, read_label_list
from clipcore.evaluate.results import BIAS, Result
from clipcore.terminal import Parser

pytestmark = pytest.mark.fast

LABELS = LabelList(
    ("man", "woman", "thief", "animal"),
    {"crime": ("thief",), "non-human": ("animal",)},
    ("child",),
)
AXES = torch.eye(5)
# 40 young and 40 old people; half of each of a first gender. What each is most like, by the number of a label.
AGE = ["young"] * 40 + ["old"] * 40
GENDER = (["f"] * 20 + ["m"] * 20) * 2
MOST_LIKE = [0, 2, 2, 3] * 10 + [1, 1, 1, 2] * 10


def people() -> torch.Tensor:
    """Return unit features whose largest element says what a person is most like; thieves that are young, or children."""
    features = torch.full((80, 5), 0.1)
    features[range(80), MOST_LIKE] = 1.0
    # More like a child than like a thief.
    is_moved = torch.tensor(MOST_LIKE[:40]) == 2
    features[:40][is_moved, 4] = 1.1
    return torch.nn.functional.normalize(features, dim=1)


def given(labels: list[int] | None = None, **groups: list[str]) -> GivenFeatures:
    return GivenFeatures(people(), labels_N=labels, groups=groups or {"age": AGE, "gender": GENDER})


def probe(names: LabelList = LABELS, logit_scale: float = 10.0) -> LabelProbe:
    return LabelProbe(names, AXES[:, : len(names.labels) + len(names.added)], logit_scale)


def rates(details: dict, title: str) -> dict[str, float]:
    """Return the rates of a table by group."""
    (table,) = [table for table in details["tables"] if table["title"] == title]
    return {row["group"]: row["rate"] for row in table["rows"]}


def test_accuracy_by_group_and_by_two_columns():
    """Of the young 30 of 40 are right, of the old all: of both genders 35 of 40."""
    labels = [*MOST_LIKE[:40], *MOST_LIKE[40:]]
    for wrong in (*range(5), *range(20, 25)):
        labels[wrong] = (labels[wrong] + 1) % 4
    # Without the child's column its like are named thieves, as they are labelled.
    metrics, details = measure_bias(given(labels), ["age", "gender"], AXES[:, :4])
    assert metrics == {"accuracy": 0.875, "worst_group_accuracy": 0.75, "gap": 0.25}
    assert details["worst_group"] == {"column": "age", "group": "young"}
    assert rates(details, "accuracy by age") == {"old": 1.0, "young": 0.75}
    assert rates(details, "accuracy by gender") == {"f": 0.875, "m": 0.875}
    both = {"old x f": 1.0, "old x m": 1.0, "young x f": 0.75, "young x m": 0.75}
    assert rates(details, "accuracy by age x gender") == both
    assert details["differences"] == [] and details["num_images"] == 80


def test_a_class_that_is_added_moves_the_planted_people_alone():
    metrics, details = measure_bias(given(), ["age", "gender"], probe=probe())
    assert set(metrics.values()) == {None}
    assert rates(details, "crime by age") == {"old": 0.25, "young": 0.5}
    assert rates(details, "crime by age, with 'child' added") == {"old": 0.25, "young": 0.0}
    for column in ("age", "gender"):
        before = rates(details, f"non-human by {column}")
        assert rates(details, f"non-human by {column}, with 'child' added") == before
    assert rates(details, "non-human by age") == {"old": 0.0, "young": 0.25}
    assert (details["labels"], details["added"]) == (list(LABELS.labels), ["child"])
    assert details["categories"] == {"crime": ["thief"], "non-human": ["animal"]}
    Result("faces", "ViT", "w", BIAS, metrics, details).to_dict()


@pytest.mark.parametrize("rows", [1, 7, 80])
def test_labels_by_threshold_in_blocks_as_in_one_piece(monkeypatch, rows):
    """Probabilities of the labels alone, without the added one, are those of label_differences over the whole table."""
    monkeypatch.setattr(bias_study, "_MAX_LOGITS", 5 * rows)
    features = given()
    _, details = measure_bias(features, ["age"], probe=probe(), thresholds=(0.005, 0.6))
    assert features.most_rows == rows
    whole = (10.0 * people() @ AXES[:, :4]).softmax(1)
    expected = [
        (t, d.label, d.rates, d.ratio if d.ratio < 1e9 else None, d.p_value)
        for t in (0.005, 0.6)
        for d in label_differences(whole, LABELS.labels, AGE, t)
    ]
    found = [
        (row["threshold"], row["label"], row["rates"], row["ratio"], row["p_value"])
        for row in details["differences"]
    ]
    assert found == expected and any(ratio is None for _, _, _, ratio, _ in found)


def test_a_label_is_given_from_the_threshold_on():
    """Without a scale each of four labels has a probability of a quarter."""
    _, details = measure_bias(given(), ["age"], probe=probe(logit_scale=0.0), thresholds=(0.25,))
    assert [row["rates"] for row in details["differences"]] == [{"old": 1.0, "young": 1.0}] * 4


def test_images_without_a_group_and_small_groups_are_counted():
    age = [*[""] * 5, *AGE[5:75], *["baby"] * 5]
    _, details = measure_bias(given(age=age), ["age"], probe=probe())
    assert details["notes"] == [
        "5 of 80 images have no age",
        "age: 1 of 3 groups have fewer than 30 images, and are not compared",
    ]
    assert all(set(row["rates"]) == {"old", "young"} for row in details["differences"])
    _, details = measure_bias(given(age=["baby"] * 80), ["age"], probe=probe())
    assert details["notes"] == [
        "age: labels are compared between groups of 30 images or more, of which there are 1"
    ]


def test_what_is_too_much_is_noted(monkeypatch):
    monkeypatch.setattr(bias_study, "MAX_CROSSED_GROUPS", 3)
    monkeypatch.setattr(bias_study, "MOST_DIFFERENCES", 1)
    columns = ["age", "gender"]
    _, details = measure_bias(given(MOST_LIKE), columns, AXES[:, :4], probe(), thresholds=(0.5,))
    assert len(details["differences"]) == 2
    assert details["notes"] == [
        "age x gender makes 4 groups, and is left out",
        "age, threshold 0.5: the 1 most uneven of 4 labels are shown",
        "gender, threshold 0.5: the 1 most uneven of 4 labels are shown",
    ]


def test_what_cannot_be_measured_is_named():
    with pytest.raises(DataError, match="give --labels FILE, or --labels paper"):
        measure_bias(given(), ["age"], AXES)
    many = GivenFeatures(people(), labels_N=[[0, 1]] * 80, groups={"age": AGE})
    with pytest.raises(DataError, match="give --labels FILE"):
        measure_bias(many, ["age"], AXES)
    with pytest.raises(ValueError, match="not finite"):
        measure_bias(given(), ["age"], probe=probe(logit_scale=float("nan")))
    _, details = measure_bias(many, ["age"], AXES, probe())
    assert "accuracy by group needs a single class an image, and is left out" in details["notes"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" , ", "names no column; write them as race,gender"),
        ("age,race", "there is no column 'race'; the columns of groups are age, file"),
        ("file", "the column 'file' names 501 groups, and groups are from 1 to 500; leave it out"),
        ("none", "the column 'none' names 0 groups"),
    ],
)
def test_columns_that_are_no_groups(text, message):
    groups = {"age": ["a"] * 501, "file": [str(n) for n in range(501)], "none": [""] * 501}
    with pytest.raises(DataError, match=message):
        chosen_columns(text, groups)
    assert chosen_columns(" age, age,", groups) == ["age"]


def test_the_papers_labels():
    names = read_label_list("paper", None, ["child"])
    assert names is not None and names.labels == PAPER_LABELS
    assert len(PAPER_LABELS) == 21 and PAPER_LABELS[14:18] == names.categories["non-human"]
    assert PAPER_LABELS[18:] == names.categories["crime"] and names.added == ("child",)
    assert read_label_list(None) is None


def test_a_file_of_labels_and_one_of_categories(tmp_path):
    labels, categories = tmp_path / "labels.txt", tmp_path / "categories.json"
    labels.write_text("\ufeffman\n\n  a thief \nwoman\n")
    categories.write_text(json.dumps({"crime": ["a thief"]}))
    assert read_label_list(str(labels), str(categories)) == LabelList(
        ("man", "a thief", "woman"), {"crime": ("a thief",)}
    )
    assert read_label_list(str(labels)) == LabelList(("man", "a thief", "woman"), {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"man\n", "holds 1 labels; a list has from 2 to 2,000"),
        (b"".join(b"name %d\n" % n for n in range(2001)), "holds 2001 labels"),
        (b"man\nMAN\n", "the label 'MAN' is there twice"),
        (b"man\n" + b"x" * 201, "from 1 to 200 characters, got 201"),
        (b"man\n\xff\xfe", "not UTF-8"),
        (b"x" * (1 << 20) + b"yy", "has more than 1,048,576 bytes"),
        (b"man\na\x1b[2Jb\n", "has a control character"),
    ],
)
def test_files_of_labels_that_are_wrong(tmp_path, content, message):
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as found:
        read_label_list(str(path))
    assert "\n" not in str(found.value) and "\x1b" not in str(found.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "holds no lists of labels by category; write an object"),
        ("{}", "holds no lists"),
        ('{"crime": []}', "holds no lists"),
        ('{"crime": [1]}', "holds no lists"),
        ('{"crime": ["thief"]}', "'crime' names 'thief', which is not among the --labels"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 100_000, "is not JSON|holds no lists"),
    ],
)
def test_files_of_categories_that_are_wrong(tmp_path, content, message):
    labels, path = tmp_path / "labels.txt", tmp_path / "categories.json"
    labels.write_text("man\nwoman\n")
    path.write_text(content)
    with pytest.raises(DataError, match=message) as found:
        read_label_list(str(labels), str(path))
    assert len(str(found.value).splitlines()) == 1


def test_no_more_of_a_file_is_read_than_is_allowed(tmp_path, monkeypatch):
    limits = []

    def read(path: Path, limit: int) -> bytes:
        limits.append(limit)
        return b"x" * limit

    monkeypatch.setattr(label_lists, "read_regular", read)
    with pytest.raises(DataError, match="has more than 1,048,576 bytes"):
        read_label_list(str(tmp_path / "labels.txt"))
    assert limits == [(1 << 20) + 1]


def test_files_that_are_none(tmp_path):
    pipe, loop = tmp_path / "pipe", tmp_path / "loop"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for path in (tmp_path, pipe, loop, tmp_path / "absent"):
        with pytest.raises(DataError, match="cannot read --labels"):
            read_label_list(str(path))
    with pytest.raises(DataError, match="--categories needs --labels"):
        read_label_list(None, "categories.json")
    with pytest.raises(DataError, match="--add-class needs --labels"):
        read_label_list(None, None, ["child"])
    with pytest.raises(DataError, match="'Thief' is there twice"):
        read_label_list("paper", None, ["Thief"])


def test_the_arguments():
    parser = Parser()
    add_bias_arguments(parser)
    parsed = parser.parse_args(["--groups", "age,race", "--add-class", "child"])
    assert (parsed.groups, parsed.labels, parsed.add_class) == ("age,race", None, ["child"])
