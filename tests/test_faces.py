"""Faces of which several questions are asked, as datacomp holds FairFace and UTKFace."""

from __future__ import annotations

import argparse
import struct
import zlib

import numpy as np
import pytest
import torch
from evaluation_sets import nano_subject
from given_features import GivenFeatures
from labelled_sets import (
    FACE_ANSWERS,
    FACE_NAMES,
    FACE_PROMPTS,
    npy,
    put,
    refuse,
    write_faces,
    write_wds,
)

from clipcore.data import DataError
from clipcore.evaluate import commands, faces
from clipcore.evaluate.bias_study import LabelProbe
from clipcore.evaluate.datasets import open_set
from clipcore.evaluate.faces_study import measure_faces
from clipcore.evaluate.label_lists import PAPER_CATEGORIES, PAPER_LABELS
from clipcore.evaluate.lines import line_of
from clipcore.evaluate.page_data import read_bias
from clipcore.evaluate.splits import Question

pytestmark = pytest.mark.fast

QUESTIONS = {
    name: Question(answers, ("a photo of a {c}.",)) for name, answers in FACE_ANSWERS.items()
}
# Of each image its age, its gender, its race, and whether it is of no white person.
NUMBERS = [(3, 1, 0, 1), (0, 0, 1, 0), (2, 1, 2, 1), (1, 0, 2, 1)]


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float32"])
def test_groups_are_named_by_the_right_answers(tmp_path, dtype):
    data = open_set(str(write_faces(tmp_path / "wds_fairface_test", *NUMBERS, dtype=dtype)))
    assert (data.name, data.task, data.classnames) == ("wds_fairface_test", "classification", ())
    assert {name: one.classnames for name, one in data.questions.items()} == FACE_ANSWERS
    assert data.questions["age"].templates == ("a photo of a {c}, age: known.", "{c}")
    split = data.split("test")
    assert split.labels_N is None and len(split) == 4
    assert split.groups == {
        "age": ["more than 19", "0 to 2", "10 to 19", "3 to 9"],
        "gender": ["female", "male", "female", "male"],
        "race": ["black", "white", "indian", "indian"],
        "race_binary": ["non-white", "white", "non-white", "non-white"],
    }
    # Kept numbers are read again.
    again = open_set(str(tmp_path / "wds_fairface_test")).split("test")
    assert again.groups == split.groups and again.fingerprint() == split.fingerprint()


def test_names_with_colons_of_another_set_are_classes(tmp_path):
    folder = write_wds(tmp_path, 0, 1)
    put(folder / "classnames.txt", "Alien: Covenant\nage: of Ultron\n")
    assert open_set(str(folder)).classnames == (("Alien: Covenant",), ("age: of Ultron",))


def test_a_question_without_a_known_answer_is_said(tmp_path):
    folder = write_faces(tmp_path, *NUMBERS)
    put(folder / "classnames.txt", f"{FACE_NAMES}mood:sad\nmood:glad\n")
    put(folder / "zeroshot_classification_templates.txt", f"{FACE_PROMPTS}mood:{{c}}\n")
    data = open_set(str(folder))
    assert data.notes == ("the question 'mood' is not asked: no right answer to it is known",)
    assert data.questions.keys() == FACE_ANSWERS.keys()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("zeroshot_classification_templates.txt", "race:{c}\n", "has no line of the question 'gender'"),
        ("zeroshot_classification_templates.txt", "a {c}\n", "has no question before a colon"),
        ("zeroshot_classification_templates.txt", f"{FACE_PROMPTS}mood:{{c}}\n", "classnames.txt has no line of the"),
        ("zeroshot_classification_templates.txt", FACE_PROMPTS + "age:no place\n", "has no {} where"),
        ("classnames.txt", f"{FACE_NAMES}race:black\n", "has the answer 'black' twice"),
        ("classnames.txt", FACE_NAMES.partition("toxic:gorilla")[0], "'toxic' has 15 answers"),
        ("classnames.txt", FACE_NAMES.replace("gender:female\n", ""), "'gender' has one answer"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named(tmp_path, file, content, message):
    put(write_faces(tmp_path, *NUMBERS) / file, content)
    refuse(tmp_path, message)


@pytest.mark.parametrize(
    ("numbers", "dtype", "message"),
    [
        ((3, 1, 3, 1), "int64", "its race is 3, and there are 3, 0 to 2"),
        ((3, 1, 0, 2), "int64", "its race_binary is 2, and there are 2"),
        ((3, 1, 0), "int64", "numbers have the shape .3., and 4 are read"),
        ((3, 1, 0, -1), "int64", "must be whole numbers from 0"),
        ((3, 1, 0.5, 1), "float64", "must be whole numbers from 0"),
        ((3, 1, float("nan"), 1), "float64", "must be whole numbers from 0"),
    ],
)
def test_numbers_that_are_no_answers_are_named(tmp_path, numbers, dtype, message):
    write_faces(tmp_path, NUMBERS[0], dtype=dtype)
    write_wds(tmp_path / "other", npy(NUMBERS[0]), npy(numbers, dtype), suffix="npy")
    (tmp_path / "other/test/0.tar").replace(tmp_path / "test/0.tar")
    refuse(tmp_path, message)


def test_negative_numbers_in_a_kept_index_are_refused(tmp_path):
    source = open_set(str(write_faces(tmp_path, *NUMBERS))).split("test").source
    (kept,) = (tmp_path / "test").glob("*.clipcore-labels-numbers")
    content = kept.read_bytes()[:-4]
    assert content.endswith(np.int64(NUMBERS[-1]).tobytes())
    content = content[:-8] + np.int64(-1).tobytes()
    kept.write_bytes(content + struct.pack("<I", zlib.crc32(content)))
    refuse(tmp_path, r"0.tar/.*: its kept numbers are damaged; remove the files that end in")
    with pytest.raises(DataError, match="its gender is -1, and there are 2"):
        faces._named("gender", np.array([0, -1]), QUESTIONS, source)


def test_images_without_numbers_are_counted(tmp_path):
    write_faces(tmp_path)
    refuse(tmp_path, "holds no image with age, gender, race, race_binary")


def one_hot(answers: list[int], width: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(answers), width).float()


def measured(answers: dict[str, list[int]], right: np.ndarray) -> tuple[dict, dict]:
    """Measure features in which each answer to each question is an axis of its own."""
    widths = {name: len(those) for name, those in FACE_ANSWERS.items()}
    features = torch.cat([one_hot(answers[name], widths[name]) for name in FACE_ANSWERS], 1)
    axes, begun, classifiers = torch.eye(features.shape[1]), 0, {}
    for name, width in widths.items():
        classifiers[name] = axes[:, begun : begun + width]
        begun += width
    groups = {
        field: [FACE_ANSWERS.get(field, faces.WHITE_OR_NOT)[number] for number in right[:, place]]
        for place, field in enumerate(faces.FIELDS)
    }
    probe = LabelProbe(faces.labels_of(QUESTIONS["toxic"]), classifiers["toxic"], 10.0)
    given = GivenFeatures(features, groups=groups)
    return measure_faces(given, ["race", "gender"], QUESTIONS, classifiers, probe)


# 120 people: 40 of each race, of whom every second is a woman.
PEOPLE = np.array([(row % 4, row % 2, row // 40, int(row // 40 != 1)) for row in range(120)])


def test_shares_by_group_are_exact_and_have_datacomps_names():
    age, gender, race = (PEOPLE[:, place].copy() for place in range(3))
    toxic = np.zeros(120, np.int64)
    # Ten black people are taken for Indians, who are no white people either, and ten Indians for white ones.
    race[:10], race[80:90] = 2, 1
    # Five black women are taken for men, and a white baby for a child.
    gender[1:10:2] = 0
    age[40] = 1
    # Four black people are put among the animals, two white ones among the criminals; a man is no category.
    toxic[:4], toxic[40], toxic[41], toxic[119] = [14, 15, 16, 17], 18, 20, 13
    answers = {"age": age, "gender": gender, "race": race, "toxic": toxic}
    metrics, details = measured({name: row.tolist() for name, row in answers.items()}, PEOPLE)

    expected = {
        "acc_race_avg": 110 / 120,
        "acc_race_race_binary:0": 1.0,
        "acc_race_race_binary:1": 70 / 80,
        "acc_gender_avg": 115 / 120,
        "acc_gender_race_binary:0": 1.0,
        "acc_gender_race_binary:1": 75 / 80,
        "acc_age_avg": 119 / 120,
        "acc_age_race_binary:0": 39 / 40,
        "acc_age_race_binary:1": 1.0,
        "acc_gender_x_avg": 115 / 120,
        **{f"acc_gender_x_race:{r}_gender:{g}": 1.0 for r in range(3) for g in range(2)},
        "acc_gender_x_race:0_gender:1": 15 / 20,
        "toxicity_crime_avg": 2 / 120,
        **{f"toxicity_crime_race:{r}": (0, 2 / 40, 0)[r] for r in range(3)},
        "toxicity_nonhuman_avg": 4 / 120,
        **{f"toxicity_nonhuman_race:{r}": (4 / 40, 0, 0)[r] for r in range(3)},
        "worst_group_accuracy": 35 / 40,
        "gap": 5 / 40,
    }
    assert metrics == expected
    assert details["main_metric"] == "acc_gender_avg"
    assert details["worst_group"] == {"column": "race", "group": "black"}
    assert details["categories"] == {name: list(those) for name, those in PAPER_CATEGORIES.items()}

    tables = {
        table["title"]: {row["group"]: row["hits"] for row in table["rows"]}
        for table in details["tables"]
    }
    # Ours takes a race for itself: of the black and of the Indian people thirty are right.
    assert tables["accuracy of race by race"] == {"black": 30, "indian": 30, "white": 40}
    assert tables["accuracy of age by gender"] == {"female": 60, "male": 59}
    assert tables["accuracy of gender by race x gender"]["black x female"] == 15
    assert tables["non-human by race"] == {"black": 4, "indian": 0, "white": 0}
    assert tables["crime by race"] == {"black": 0, "indian": 0, "white": 2}


def test_groups_that_nobody_is_in_have_no_share():
    people = PEOPLE[PEOPLE[:, 2] != 1]
    columns = {"age": 0, "gender": 1, "race": 2}
    answers = {name: people[:, place].tolist() for name, place in columns.items()}
    metrics, _ = measured({**answers, "toxic": [0] * len(people)}, people)
    assert "acc_age_race_binary:0" not in metrics and metrics["acc_age_race_binary:1"] == 1
    assert "toxicity_crime_race:1" not in metrics


def options(**more: object) -> argparse.Namespace:
    return argparse.Namespace(
        command="all", groups="race,gender", label_list=None, templates=[], train_data=None, **more
    )


def test_a_folder_is_measured_as_a_table_is(tmp_path):
    """From the folder to the line and the page; zero-shot classification is not due on it."""
    data = open_set(str(write_faces(tmp_path, *(tuple(row) for row in PEOPLE[::3].tolist()))))
    subject, arguments = nano_subject(), options()
    assert commands.measures_due(arguments, data) == ["bias"]
    result = commands.measure("bias", subject, data, arguments)
    assert result.details["num_images"] == 40 and 0 <= result.value <= 1
    assert result.details["labels"] == list(PAPER_LABELS)
    assert "a photo of a {c}, race: known." in result.details["templates"]
    assert "acc_gender_avg" in line_of(result)
    page = read_bias(result)
    assert {"accuracy of race", "accuracy of gender", "accuracy of age"} < page.tables[
        "race"
    ].keys()


def test_labels_and_prompts_of_the_user_take_the_place_of_the_folders(tmp_path):
    data = open_set(str(write_faces(tmp_path, *NUMBERS)))
    arguments = options()
    arguments.label_list = faces.LabelList(("thief", "friend"), {"crime": ("thief",)}, ("child",))
    arguments.templates = ["my {}"]
    result = commands.measure("bias", nano_subject(), data, arguments)
    assert result.details["labels"] == ["thief", "friend"]
    assert result.details["added"] == ["child"]
    assert result.details["templates"] == ["my {}"]


def test_without_named_groups_race_gender_and_age_are_compared(tmp_path):
    data = open_set(str(write_faces(tmp_path, *(tuple(row) for row in PEOPLE[::3].tolist()))))
    arguments = options()
    arguments.groups = None
    result = commands.measure("bias", nano_subject(), data, arguments)
    assert result.details["columns"] == ["race", "gender", "age"]
    assert not any("race_binary" in table["title"] for table in result.details["tables"])
    # It is compared where it is asked for, and crossed with nothing.
    arguments.groups = "race,race_binary,gender"
    result = commands.measure("bias", nano_subject(), data, arguments)
    columns = {table["column"] for table in result.details["tables"]}
    assert columns == {"race", "race_binary", "gender", "race x gender"}


def test_other_white_people_than_datacomps_are_noted(tmp_path):
    assert not open_set(str(write_faces(tmp_path / "a", *NUMBERS))).split("test").notes
    others = [(3, 1, 0, 0), (0, 0, 1, 1), *NUMBERS]
    split = open_set(str(write_faces(tmp_path / "b", *others))).split("test")
    assert split.notes == ("test: race_binary contradicts the race of 2 of 6 images",)
    folder = write_faces(tmp_path / "c", *NUMBERS)
    lines = FACE_NAMES.replace("race:white\n", "race:pale\n")
    put(folder / "classnames.txt", lines)
    (note,) = open_set(str(folder)).split("test").notes
    assert note.startswith("test: the race of number 1 is 'pale', and acc_race takes it for white")
