"""Data sets of one folder a class, and what is none."""

from __future__ import annotations

import io
import json
import os
import shutil

import pytest
from labelled_sets import (
    captions_of,
    labels_of,
    put,
    refuse,
    write_classes,
    write_features,
    write_table,
    write_wds,
)
from PIL import Image

from clipcore.data import DataError
from clipcore.data.transforms import was_transparent
from clipcore.evaluate.datasets import open_set

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("cache_folder")]


def test_class_folders_are_the_test_split(tmp_path):
    write_classes(tmp_path / "pets", tabby_cat=2, dog=1)
    put(tmp_path / "pets" / "stray.jpg")
    data = open_set(str(tmp_path / "pets"))
    assert (data.name, data.task, data.split_names) == ("pets", "classification", ("test",))
    assert data.classnames == (("dog",), ("tabby cat",)) and data.templates == ()
    test = data.split("test")
    assert labels_of(data) == [0, 1, 1] and test is data.split("test")
    assert test.keys() == ["dog/0.jpg", "tabby_cat/0.jpg", "tabby_cat/1.jpg"]
    assert test.notes == (
        "not used of test: 1 x image outside of class folders, such as stray.jpg",
    )
    assert captions_of(test) == ["dog", "tabby cat", "tabby cat"]


def test_classes_are_those_of_all_splits(tmp_path):
    """A class that the test has no image of keeps its number, so that a probe's classes are the test's."""
    write_classes(tmp_path / "train", ant=1, bee=1, cow=1)
    write_classes(tmp_path / "test", cow=2, dog=1)
    (tmp_path / "test" / "nothing").mkdir()
    (tmp_path / "extra").mkdir()
    data = open_set(str(tmp_path))
    assert data.split_names == ("train", "test")
    assert data.classnames == (("ant",), ("bee",), ("cow",), ("dog",))
    assert labels_of(data) == [2, 2, 3] and labels_of(data, "train") == [0, 1, 2]
    assert data.notes == ("not used: the folder 'extra', which is not a split",)
    assert data.split("test").notes == (
        "not used of test: 1 x folder without a picture, such as nothing",
        "2 of 4 classes have no image in test, such as 'ant'",
    )
    with pytest.raises(DataError, match=r"has no split 'val'; it has train, test"):
        data.split("val")


@pytest.mark.parametrize("where", ["", "test"])
def test_names_may_be_lists_and_lie_with_the_splits_or_in_one(tmp_path, where):
    write_classes(tmp_path / "train", happy=1, sad_face=1)
    write_classes(tmp_path / "test", happy=1, sad_face=1)
    names = {"happy": ["happy", "smiling "], "sad_face": "sad"}
    put(tmp_path / where / "classes.json", json.dumps(names))
    put(tmp_path / where / "templates.json", '["a photo of {}.", "{c}"]')
    data = open_set(str(tmp_path))
    assert data.classnames == (("happy", "smiling"), ("sad",))
    assert data.templates == ("a photo of {}.", "{c}")
    assert captions_of(data.split("test")) == ["happy", "sad"]


def test_linked_class_folders_count_and_transparent_images_lie_on_white(tmp_path):
    write_classes(tmp_path / "store", one=1)
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(buffer, "PNG")
    put(tmp_path / "store" / "two" / "0.png", buffer.getvalue())
    folder = tmp_path / "set" / "test"
    folder.mkdir(parents=True)
    (folder / "cat").symlink_to(tmp_path / "store" / "one")
    (folder / "dog").symlink_to("../../store/two")
    (folder / "self").symlink_to("self")
    data = open_set(str(tmp_path / "set"))
    assert data.classnames == (("cat",), ("dog",)) and labels_of(data) == [0, 1]
    source = data.split("test").source
    assert source is not None
    image = source[1].image
    assert was_transparent(image) and image.getpixel((9, 9)) == (255, 255, 255)


def test_a_class_may_be_called_train(tmp_path):
    data = open_set(str(write_classes(tmp_path, train=1, car=1)))
    assert data.split_names == ("test",) and data.classnames == (("car",), ("train",))


def test_two_classes_of_one_name_are_told(tmp_path):
    write_classes(tmp_path, a=1, b=1, c=1)
    put(tmp_path / "classes.json", '{"a": "Crane", "b": ["stork", "crane"], "c": "heron"}')
    assert open_set(str(tmp_path)).notes == (
        "classes 0 and 1 are both called 'crane': one of them always loses",
    )


def test_of_many_classes_of_one_name_a_few_are_told(tmp_path):
    write_wds(tmp_path, 0)
    put(tmp_path / "classnames.txt", "name\n" * 200_000)
    notes = open_set(str(tmp_path)).notes
    assert len(notes) == 4 and notes[3] == "199,996 more classes share a name with another"
    put(tmp_path / "classnames.txt", "name\n" * (1 << 20 | 1))
    refuse(tmp_path, "longer than|names 1,048,577 classes, more than 1,048,576")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classes.json", '{"cat": []}', "is not an object of folder names to class names, or"),
        (
            "classes.json",
            '{"cat": ["a", 3]}',
            "is not an object of folder names to class names, or",
        ),
        ("classes.json", '{"cat": " "}', "the name of class 0, counted from 0, is empty"),
        ("classes.json", "[" * 100_000, "cannot read .*classes.json"),
        ("templates.json", '["no place"]', "the prompt 'no place' has no {}"),
        ("templates.json", '{"a": 1}', "is not a list of prompts"),
    ],
)
def test_names_and_prompts_that_cannot_be_used(tmp_path, name, content, message):
    write_classes(tmp_path, cat=1, dog=1)
    put(tmp_path / name, content)
    refuse(tmp_path, message)


@pytest.mark.parametrize("name", ["classes.json", "templates.json"])
def test_pipes_links_and_large_files_are_no_names(tmp_path, name):
    write_classes(tmp_path / "test", cat=1, dog=1)
    os.mkfifo(tmp_path / name)
    refuse(tmp_path, f"{name}: Not a regular file")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)
    refuse(tmp_path, f"{name}: Too many levels of symbolic links")
    (tmp_path / name).unlink()
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 33)
    refuse(tmp_path, f"cannot read .*{name}")


def test_one_class_is_none(tmp_path):
    refuse(write_classes(tmp_path / "a" / "test", cat=2).parent, "'cat', which makes one class")
    refuse(write_classes(tmp_path / "b", cat=2), "which makes one class")
    (tmp_path / "c" / "test" / "cat").mkdir(parents=True)
    refuse(tmp_path / "c", "holds no image")


@pytest.mark.parametrize("train", ["Train", "training", "TRAIN"])
@pytest.mark.parametrize("val", ["valid", "Validation", "dev", "val"])
def test_splits_have_the_names_that_people_give_them(tmp_path, train, val):
    """Folders of classes and of shards, files of features, and cells of tables alike."""
    folders, shards, features = (tmp_path / name for name in ("folders", "shards", "features"))
    rows: list[dict[str, object]] = []
    for number, name in enumerate((train, val, "Testing")):
        write_classes(folders / name, cat=1, dog=number)
        write_wds(shards, *[1] * (number + 1), split=name)
        write_features(features / f"{name}.npz", [0, 1, 1, number])
        rows += [{"label": label, "split": name} for label in "ab"]
    for spec in (folders, shards, features, write_table(tmp_path / "table", rows, "csv")):
        data = open_set(str(spec))
        assert data.split_names == ("train", "val", "test"), spec
        assert [data.split(name).name for name in data.split_names] == ["train", "val", "test"]
        assert not any("no split" in note for note in data.notes)
    assert labels_of(open_set(str(folders)), "val") == [0, 1]
    assert labels_of(open_set(str(shards)), "val") == [1, 1]
    assert "in val, such as" in open_set(str(shards)).split("val").notes[0]
    assert labels_of(open_set(str(features)), "test") == [0, 1, 1, 2]


def test_two_folders_or_files_of_one_split(tmp_path):
    for name in ("val", "Validation"):
        write_classes(tmp_path / "folders" / name, cat=1, dog=1)
        write_wds(tmp_path / "shards", 1, split=name)
        write_features(tmp_path / "features" / f"{name}.npz", [0, 1, 1, 1])
    for name in ("folders", "shards", "features"):
        refuse(
            tmp_path / name, r"holds val(\.npz)? and Validation(\.npz)?, which both are the split v"
        )
    # A link gives the folder its usual name.
    shutil.rmtree(tmp_path / "folders" / "val")
    (tmp_path / "folders" / "val").symlink_to("Validation")
    assert open_set(str(tmp_path / "folders")).split_names == ("val",)
    # Two classes that are called so are none.
    data = open_set(str(write_classes(tmp_path / "classes", cat=1, dev=1, validation=1)))
    assert data.classnames == (("cat",), ("dev",), ("validation",))


def test_class_names_are_no_ids(tmp_path):
    """Those of a file, as those of folders: most of them, as one may be a name."""
    ids = ["n01440764", "n01443537"]
    folder = write_wds(tmp_path / "wds", 0)
    put(folder / "classnames.txt", "\n".join([*ids, "cock"]))
    refuse(folder, "classnames.txt names classes by ids, such as n01440764, which no prompt holds")
    put(folder / "classnames.txt", f"{ids[0]}\ntench\n")
    assert open_set(str(folder)).classnames == (("n01440764",), ("tench",))
    (folder / "classnames.txt").unlink()
    put(folder / "classes.json", json.dumps(ids))
    refuse(folder, "classes.json names classes by ids, such as n01440764")
