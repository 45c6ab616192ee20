"""Folders of parquet tables as they lie on the Hugging Face hub: one set, whose splits are in the names of the files."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from shards import picture, write_images

from clipcore.data import DataError
from clipcore.evaluate.datasets import Split, open_set

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("cache_folder")]


def write(path: Path, rows: list[int], classes: tuple[str, ...] = (), **columns: Any) -> Path:
    """Write a table of pictures by number, with the hub's notes on the names of classes if they are given."""
    images = [{"bytes": picture(row)[0], "path": None} for row in rows]
    table = pyarrow.table({"image": images, **columns})
    if classes:
        notes = {"info": {"features": {"label": {"names": list(classes)}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(notes)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    return path


def write_hub(folder: Path, ending: str = "") -> Path:
    """Two tables of the test split, one of each other."""
    pets = ("cat", "dog")
    write(folder / f"train-00000-of-00001{ending}.parquet", [0, 1], pets, label=[0, 1])
    write(folder / f"validation-00000-of-00001{ending}.parquet", [2], pets, label=[1])
    write(folder / f"test-00001-of-00002{ending}.parquet", [5], pets, label=[0])
    write(folder / f"test-00000-of-00002{ending}.parquet", [3, 4], pets, label=[1, 1])
    return folder


def shows(split: Split, rows: list[int]) -> bool:
    """Whether the pictures of a split are those of these numbers."""
    assert split.source is not None
    for place, row in enumerate(rows):
        with Image.open(io.BytesIO(picture(row)[0])) as image:
            if split.source[place].image.tobytes() != image.convert("RGB").tobytes():
                return False
    return len(split) == len(rows)


def refuse(spec: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as found:
        open_set(str(spec)).split("test")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("inner", ["data", ".", "default"])
def test_the_names_of_the_files_say_the_splits(tmp_path, inner):
    write_hub(tmp_path / "pets" / inner, "-0123456789abcdef" if inner == "data" else "")
    (tmp_path / "pets" / "README.md").write_text("Pets")
    data = open_set(str(tmp_path / "pets"))
    assert (data.name, data.task) == ("pets", "classification")
    assert data.split_names == ("train", "val", "test")
    assert data.classnames == (("cat",), ("dog",))
    wanted = {"train": ([0, 1], [0, 1]), "val": ([2], [1]), "test": ([3, 4, 5], [1, 1, 0])}
    for name, (rows, labels) in wanted.items():
        split = data.split(name)
        assert split.labels_N is not None and split.labels_N.tolist() == labels
        assert shows(split, rows)
    test = data.split("test")
    assert len(set(test.keys())) == 3 and test.keys()[2].startswith("test-00001-of-00002")
    assert test.source is not None and len(pickle.loads(pickle.dumps(test.source))) == 3


def test_names_and_prompts_lie_in_the_folder_of_the_set(tmp_path):
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [0, 1], label=[1, 0])
    refuse(tmp_path, rf"name them in a column classname, or in {tmp_path}/classes.json, a list")
    (tmp_path / "classes.json").write_text('["cat", ["dog", "hound"]]')
    (tmp_path / "templates.json").write_text('["a photo of a {}"]')
    data = open_set(str(tmp_path))
    assert data.classnames == (("cat",), ("dog", "hound"))
    assert data.templates == ("a photo of a {}",)


def test_tables_of_other_splits_are_not_written_out(tmp_path):
    """A copy of the images of a training split may take hundreds of gigabytes."""
    write_hub(tmp_path / "data")
    open_set(str(tmp_path)).split("test")
    copied = {path.name.partition("-")[0] for path in (tmp_path / "data").glob("*.clipcore-rows")}
    assert copied == {"test"}


def test_a_fingerprint_is_of_all_tables(tmp_path):
    first = open_set(str(write_hub(tmp_path / "a"))).split("test").fingerprint()
    assert first == open_set(str(tmp_path / "a")).split("test").fingerprint()
    write(tmp_path / "a" / "test-00001-of-00002.parquet", [7], ("cat", "dog"), label=[0])
    assert first != open_set(str(tmp_path / "a")).split("test").fingerprint()


def test_captions_are_for_retrieval(tmp_path):
    write(tmp_path / "test-00000-of-00002.parquet", [0], caption=["a"])
    write(tmp_path / "test-00001-of-00002.parquet", [1], caption=["b"])
    write(tmp_path / "train-00000-of-00001.parquet", [2], caption=["c"])
    data = open_set(str(tmp_path))
    assert (data.task, data.split_names) == ("retrieval", ("train", "test"))
    test = data.split("test")
    assert shows(test, [0, 1]) and test.source is not None
    assert [test.source.captions(row) for row in range(2)] == ["a", "b"]
    assert not list(tmp_path.glob("train*.clipcore-rows"))
    assert len(data.split("train")) == 1


def test_a_column_of_splits_wins(tmp_path):
    labels = {"label": ["cat", "dog"], "split": ["train", "test"]}
    write(tmp_path / "test-00000-of-00001.parquet", [0, 1], **labels)
    data = open_set(str(tmp_path))
    assert data.split_names == ("train", "test") and shows(data.split("test"), [1])


@pytest.mark.parametrize("names", [[f"test-0000{n}-of-00003" for n in range(3)], "abc"])
def test_captions_with_a_column_of_splits(tmp_path, names):
    """As Flickr30k lies on the hub: all files are called test, and a column says which rows are."""
    first, second, third = (tmp_path / "data" / f"{name}.parquet" for name in names)
    write(first, [0, 1, 2], caption=[["a", "b"], ["c"], ["d"]], split=["train", "test", "val"])
    write(second, [3], caption=[["e"]], split=["train"])
    write(third, [4, 5, 4], caption=[["f"], ["g"], ["h"]], split=["test", None, "test"])
    data = open_set(str(tmp_path))
    assert (data.task, data.split_names) == ("retrieval", ("train", "val", "test"))
    assert data.notes == (
        f"not used of the table: 1 x row without a split, such as {names[2]}.parquet, row 2",
    )
    test = data.split("test")
    # Rows of one picture are one sample.
    assert shows(test, [1, 4]) and test.source is not None
    assert [test.source.captions(row) for row in range(2)] == [("c",), ("f", "h")]
    assert not list(second.parent.glob(f"{second.name}*.clipcore-rows"))
    assert shows(data.split("train"), [0, 3]) and shows(data.split("val"), [2])
    prints = {name: data.split(name).fingerprint() for name in data.split_names}
    assert len(set(prints.values())) == 3
    assert prints["test"] == open_set(str(tmp_path)).split("test").fingerprint()
    assert test.source[1].key.startswith(third.name)


@pytest.mark.parametrize("column", ["label", "caption"])
@pytest.mark.parametrize(
    "names",
    [
        ("test/0000", "test/0001", "train/0000"),
        ("default/test/0000", "default/test/0001", "default/train/0000"),
        ("pets-test-00000-of-00002", "pets-test-00001-of-00002", "pets_train"),
        ("data/pets.test.0", "data/pets.test.1", "data/pets.training"),
    ],
)
def test_splits_in_the_names_of_folders_or_within_those_of_files(tmp_path, names, column):
    for number, name in enumerate(names):
        write(tmp_path / f"{name}.parquet", [number], **{column: ["cat" if number else "dog"]})
    data = open_set(str(tmp_path))
    assert data.split_names == ("train", "test")
    assert shows(data.split("test"), [0, 1]) and shows(data.split("train"), [2])


def test_a_table_of_a_splits_folder_that_is_missing(tmp_path):
    write(tmp_path / "test" / "0-00000-of-00002.parquet", [0], caption=["a"])
    refuse(tmp_path, "test has no 0-00001-of-00002.parquet, one of the 2 tables")


def test_tables_that_are_no_set_are_refused(tmp_path):
    folder = write_hub(tmp_path / "a" / "data")
    (folder / "test-00000-of-00002.parquet").unlink()
    refuse(tmp_path / "a", "has no test-00000-of-00002.parquet, one of the 2 tables")

    write(tmp_path / "b" / "train.parquet", [0], ("cat", "dog"), label=[0])
    write(tmp_path / "b" / "test.parquet", [0], ("dog", "cat"), label=[0])
    refuse(tmp_path / "b", "train.parquet and .*test.parquet name the classes of 'label' different")

    write(tmp_path / "c" / "pets.parquet", [0], label=["cat"])
    refuse(tmp_path / "c", r"names say no split \(train, val, test\), and .*such as .*/pets.par")
    write(tmp_path / "d" / "data" / "pets.parquet", [0], label=["cat"])
    refuse(tmp_path / "d", r"names say no split .*, such as .*/data/pets.parquet; name one")

    write_hub(tmp_path / "e" / "small")
    write_hub(tmp_path / "e" / "large")
    refuse(tmp_path / "e", "tables in several folders, large, small; name one of them, such as .*e")

    write(tmp_path / "f" / "train.parquet", [0], label=["cat"])
    write(tmp_path / "f" / "test.parquet", [0], breed=["cat"])
    refuse(tmp_path / "f", r"f/\*.parquet has no column of labels .*its columns are image, split")


def test_images_beside_a_table_are_read_as_before(tmp_path):
    for name, _ in write_images(tmp_path, 2):
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    write(tmp_path / "notes.parquet", [0], label=["cat"])
    assert open_set(str(tmp_path)).task == "retrieval"


@pytest.mark.parametrize("inner", [".", "data"])
def test_classes_that_a_refusal_asks_for_name_the_labels_of_a_column_of_splits(tmp_path, inner):
    """The file of classes beside tables does not make the folder one of class folders."""
    columns = {"label": [0, 1], "split": ["train", "test"]}
    write(tmp_path / inner / "pets.parquet", [0, 1], **columns)
    refuse(tmp_path, rf"name them in a column classname, or in {tmp_path}/classes.json, a list")
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    data = open_set(str(tmp_path))
    assert data.classnames == (("cat",), ("dog",)) and data.split_names == ("train", "test")
    assert shows(data.split("test"), [1])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pets-test", "cars-test"], "2 data sets by their names, such as cars-test.* pets-test"),
        (["test-pets", "test_cars-0"], "2 data sets by their names, such as test-pets.* test_cars"),
        (["test", "train", "validation_matched"], "such as test.parquet, validation_matched.parq"),
        (["my_test_train_stats"], "name my_test_train_stats.parquet says 2 splits, test and train"),
        (["pets-test", "unlabeled-pre-training-2"], "such as pets-test.parquet, unlabeled-pre-tr"),
    ],
)
def test_names_of_several_sets_or_splits_are_refused(tmp_path, names, message):
    """As one set, their numbers of classes would mean different names."""
    for number, name in enumerate(names):
        write(tmp_path / f"{name}.parquet", [number], label=["cat"])
    refuse(tmp_path, message)


def test_numbers_and_hashes_do_not_make_another_set(tmp_path):
    names = ["test-0-of-2-0123abcd4567", "test-1-of-2", "Test.part7", "test_0123456789abcdef"]
    for number, name in enumerate(names):
        write(tmp_path / f"{name}.parquet", [number], label=[f"cat {number}"])
    data = open_set(str(tmp_path))
    assert len(data.split("test")) == 4 and data.notes == ()


def test_tables_that_are_not_used_are_named(tmp_path):
    write(tmp_path / "data" / "test.parquet", [0], label=["cat"])
    write(tmp_path / "data" / "train.parquet", [1], label=["dog"])
    # Beside names that begin with a split, a word within one says none.
    names = ["extra", "data/my_test_train_stats", "data/pretest", "old/test"]
    for number, name in enumerate(names):
        write(tmp_path / f"{name}.parquet", [number], label=["hen"])
    data = open_set(str(tmp_path))
    assert data.classnames == (("cat",), ("dog",))
    assert data.notes == (
        "parquet tables not used: extra.parquet, data/my_test_train_stats.parquet, data/pretest.parquet, old/test.parquet",
    )
    write(tmp_path / "old" / "train.parquet", [5], label=["hen"])
    assert (
        open_set(str(tmp_path))
        .notes[0]
        .endswith("data/pretest.parquet, old/test.parquet and 1 more")
    )
