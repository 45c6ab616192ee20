"""Tables of images with labels, splits, groups or captions, and what is none."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from labelled_sets import captions_of, labels_of, npy, put, refuse, write_table, write_wds
from PIL import Image
from shards import picture

from clipcore.evaluate.datasets import open_set

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("cache_folder")]


KINDS = ["csv", "tsv", "ssv", "jsonl", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_names_splits_and_groups(tmp_path, kind):
    rows: list[dict[str, object]] = [
        {"label": "dog", "split": "train", "group:sex": "f", "age": "old"},
        {"label": "cat", "split": "Validation", "group:sex": "m", "age": "young"},
        {"label": "cat", "split": "test", "group:sex": "m", "age": "old"},
        {"label": "eel", "split": "test", "group:sex": "", "age": "young"},
    ]
    path = write_table(tmp_path, rows, kind)
    data = open_set(str(path), group_columns=["age"])
    assert (data.name, data.task) == ("labels", "classification")
    assert data.split_names == ("train", "val", "test")
    assert data.classnames == (("cat",), ("dog",), ("eel",))
    assert labels_of(data) == [0, 2] and labels_of(data, "train") == [1]
    test = data.split("test")
    assert test.groups == {"sex": ["m", ""], "age": ["old", "young"]}
    assert captions_of(test) == ["cat", "eel"]
    assert test.source is not None
    with Image.open(io.BytesIO(picture(3)[0])) as image:
        assert np.array_equal(np.asarray(test.source[1].image), np.asarray(image))
    key = "labels.parquet, row 4" if kind == "parquet" else "images/0003.jpg"
    assert test.keys()[1] == key


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_numbers_need_names(tmp_path, kind):
    rows: list[dict[str, object]] = [{"label": 2}, {"label": 0}]
    path = write_table(tmp_path / "a", rows, kind)
    refuse(path, "the labels are numbers, such as 2, which no prompt holds; name them in a column")
    put(tmp_path / "a" / "classes.json", '["zero", "one", ["two", "zwei"]]')
    data = open_set(str(path))
    assert data.classnames == (("zero",), ("one",), ("two", "zwei")) and labels_of(data) == [2, 0]
    put(tmp_path / "a" / "classes.json", '["zero", "one"]')
    refuse(path, "the label 2 is of no class: .*classes.json names 2, 0 to 1")

    rows = [{"label": 20, "classname": "b"}, {"label": 3, "classname": "z"}]
    data = open_set(str(write_table(tmp_path / "b", rows, kind)))
    assert data.classnames == (("z",), ("b",)) and labels_of(data) == [1, 0]
    rows = [{"label": 1, "classname": "b"}, {"label": 1, "classname": "z"}]
    refuse(
        write_table(tmp_path / "c", rows, kind), "the label '1' has an empty classname or several"
    )
    refuse(write_table(tmp_path / "d", [{"label": -1}], kind), "the label -1 is of no class")


def test_hugging_face_notes_name_the_numbers_of_a_parquet_table(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "musk_ox"])}
    )
    rows = [{"image": {"bytes": picture(i)[0], "path": None}, "label": i} for i in (1, 0)]
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(str(tmp_path / "insects.parquet"))
    data = open_set(str(tmp_path / "insects.parquet"))
    assert data.classnames == (("ant",), ("bee",), ("musk ox",)) and labels_of(data) == [1, 0]
    assert captions_of(data.split("test")) == ["bee", "ant"]


def test_labels_may_stand_for_names(tmp_path):
    path = write_table(tmp_path, [{"label": "b_1"}, {"label": "a"}], "csv")
    put(tmp_path / "classes.json", '{"b_1": ["bee", "wasp"]}')
    data = open_set(str(path))
    assert data.classnames == (("a",), ("bee", "wasp")) and labels_of(data) == [1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_of_a_table_are_labels_as_pandas_writes_them(tmp_path, kind):
    rows: list[dict[str, object]] = [{"label": "1.0"}, {"label": "0.0"}, {"label": "01"}]
    path = write_table(tmp_path / "a", rows, kind)
    put(tmp_path / "a" / "classes.json", '["cat", "dog"]')
    data = open_set(str(path))
    assert data.classnames == (("cat",), ("dog",)) and labels_of(data) == [1, 0, 1]

    rows.append({"label": "unknown"})
    path = write_table(tmp_path / "b", rows, kind)
    put(tmp_path / "b" / "classes.json", '["cat", "dog"]')
    refuse(
        path, "classes.json is a list, which names labels that are numbers; .* as 'unknown': corr"
    )
    (tmp_path / "b" / "classes.json").unlink()
    refuse(
        path, "labels of .* are ids or numbers, such as 0.0, which no caption holds; name them in"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_two_spellings_of_a_number_have_one_name(tmp_path, kind):
    rows: list[dict[str, object]] = [
        {"label": label, "classname": name} for label, name in (("1", "a"), ("01", "b"), ("2", "c"))
    ]
    refuse(
        write_table(tmp_path / "a", rows, kind), "the label '1' has an empty classname or several"
    )
    rows[1]["classname"] = "a"
    data = open_set(str(write_table(tmp_path / "b", rows, kind)))
    assert data.classnames == (("a",), ("c",)) and labels_of(data) == [0, 0, 1]


def test_labels_of_a_table_are_read_as_folders_are(tmp_path):
    """Underscores are spaces; ids are no names, whether labels or in the column of names."""
    rows: list[dict[str, object]] = [{"label": "tabby_cat"}, {"label": "dog"}]
    assert open_set(str(write_table(tmp_path / "c", rows, "csv"))).classnames == (
        ("dog",),
        ("tabby cat",),
    )
    named: list[dict[str, object]] = [
        {"label": number, "classname": row["label"]} for number, row in enumerate(rows)
    ]
    assert open_set(str(write_table(tmp_path / "d", named, "csv"))).classnames == (
        ("tabby cat",),
        ("dog",),
    )
    rows = [{"label": "n01440764"}, {"label": "n01443537"}]
    path = write_table(tmp_path / "e", rows, "csv")
    refuse(path, "labels of .* are ids or numbers, such as n01440764")
    put(path.parent / "classes.json", '{"n01440764": "tench", "n01443537": "goldfish"}')
    assert open_set(str(path)).classnames == (("tench",), ("goldfish",))
    put(path.parent / "classes.json", '{"cat": "cat"}')
    refuse(path, "names none of the labels of .*labels.csv, such as n01440764")
    (path.parent / "classes.json").unlink()
    rows = [{"label": number, "classname": f"n0144076{number}"} for number in range(2)]
    refuse(
        write_table(tmp_path / "f", rows, "csv"),
        "labels.csv names classes by ids, such as n01440760",
    )
    # Digits are names where a column says so.
    rows = [{"label": number, "classname": str(number)} for number in range(2)]
    assert open_set(str(write_table(tmp_path, rows, "csv"))).classnames == (("0",), ("1",))


def test_one_class_of_a_table_or_of_shards_is_none(tmp_path):
    table = write_table(tmp_path / "table", [{"label": "cat"}] * 2, "csv")
    refuse(table, "labels.csv has one class, 'cat', for all images; .* needs two or more")
    folder = write_wds(tmp_path / "wds", 0)
    put(folder / "classnames.txt", "cat\n")
    refuse(folder, "wds has one class, 'cat', for all images")
    # Each of its images may be of the class or not.
    folder = write_wds(tmp_path / "several", npy([1]), npy([0]), suffix="npy")
    put(folder / "classnames.txt", "cat\n")
    assert open_set(str(folder)).task == "multilabel"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_that_name_an_image_again(tmp_path, kind):
    """With other labels they are no classification; with the same, or in another split, they count and are told."""
    rows: list[dict[str, object]] = [{"label": label, "split": "test"} for label in "abaac"]
    for row in rows[2:4]:
        row["image"] = "images/0000.jpg"
    rows[3]["image"] = "./images/../images/0000.jpg"
    rows[4] |= {"image": "images/0001.jpg", "split": "train"}
    data = open_set(str(write_table(tmp_path / "a", rows, kind)))
    assert labels_of(data) == [0, 1, 0, 0] and labels_of(data, "train") == [2]
    assert data.split("test").notes[1] == (
        "2 rows of test name an image of another row, such as images/0000.jpg: it counts each time"
    )
    rows[3]["label"] = "b"
    refuse(
        write_table(tmp_path / "b", rows, kind),
        "images have several labels, such as .*0000.jpg': 'a' and 'b'; this is a multi-label set: write it",
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_that_cannot_be_used_are_counted(tmp_path, kind):
    rows: list[dict[str, object]] = [{"label": name} for name in ("cat", "", "dog", "dog")]
    rows[3]["image"] = ""
    path = write_table(tmp_path, rows, kind)
    with open(path, "a") as file:
        file.write("a.jpg,cat,more\nb.jpg\n" if kind == "csv" else '{"image"\n[]\n')
    data = open_set(str(path))
    assert labels_of(data) == [0, 1]
    first, second = (
        ("row of more fields than the header's 2", "row of fewer fields than the header's 2")
        if kind == "csv"
        else ("line that is not JSON", "line that is not a JSON object")
    )
    places = (("line 3", "line 5", "line 6", "line 7") if kind == "csv" else
              ("record 2", "record 4", "record 5", "record 6"))  # fmt: skip
    reasons = ("row without a label", "row without an image", first, second)
    cases = "; ".join(f"1 x {r}, such as {p}" for r, p in zip(reasons, places, strict=True))
    assert data.notes == (f"not used of the table: {cases}",)


def test_lone_surrogates_of_json_are_replaced(tmp_path):
    path = write_table(tmp_path, [{"label": "a"}, {"label": "b"}], "jsonl")
    with open(path, "a") as file:
        file.write('{"image": "\\ud800.jpg", "label": "\\udfff", "group:\\ud800": "x"}\n')
    data = open_set(str(path))
    assert data.classnames == (("?",), ("a",), ("b",))
    assert data.split("test").keys()[2] == "?.jpg"
    assert len(data.split("test").fingerprint()) == 64


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": [1, 0]}, "the column 'label' holds no text or whole number but list"),
        ({"label": True}, "holds no text or whole number but bool"),
        ({"label": 0.5}, "holds no text or whole number but float"),
        ({"label": 1 << 64}, "holds no text or whole number but int"),
        ({"label": "x" * 1001}, "1,001 characters in the column 'label' are not a name"),
        ({"label": "a", "split": "holdout"}, "the split 'holdout' is none of train, val, test"),
        ({"label": None}, "has no row with an image and a label; found 1 x row without a label"),
        (
            {"name": "a"},
            "has no column of labels .*its columns are image, name; name that of labels",
        ),
        ({"image": "no/such.jpg", "label": "a"}, "none of the first 1 images .* is there"),
        (
            {"image": 3, "group:a": {}},
            "the column 'group:a' holds no text or whole number but dict",
        ),
    ],
)
def test_rows_that_are_refused(tmp_path, row, message):
    refuse(write_table(tmp_path, [row], "jsonl"), message)


def test_tables_of_a_great_many_columns(tmp_path):
    """One line, without comparing each column with each other."""
    path = put(tmp_path / "a.csv", "image,label" + ",x" * 400_000 + "\n")
    refuse(path, "has more than one column 'x'")
    put(path, "image,label" + "".join(f",group:{number}" for number in range(101)) + "\n")
    refuse(path, "has 101 columns of groups, more than 100")
    put(path, "image" + "".join(f",{number}" for number in range(100_000)) + "\n")
    refuse(path, "has no column of labels .* 17, 18; name that")


def test_the_columns_of_a_table_may_be_named(tmp_path):
    rows: list[dict[str, object]] = [{"label": "a", "species": "b"}, {"label": "a", "species": "c"}]
    path = write_table(tmp_path, rows, "csv")
    assert open_set(str(path), label_key="species").classnames == (("b",), ("c",))
    refuse(path, "has no column 'kind'; its columns are image, label, species", label_key="kind")
    refuse(path, "has no column 'picture'", img_key="picture")
    groups_only = open_set(str(write_table(tmp_path / "g", [{"group:x": "1"}] * 2, "csv")))
    assert groups_only.classnames == () and groups_only.split("test").labels_N is None
    assert groups_only.split("test").groups == {"x": ["1", "1"]}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_captions_have_each_picture_once(tmp_path, kind):
    rows: list[dict[str, object]] = [
        {"caption": f"text {number}", "split": "train" if number == 1 else "test"}
        for number in range(4)
    ]
    path = write_table(tmp_path, rows, kind)
    if kind != "parquet":
        path.write_text(path.read_text().replace("0003.jpg", "0000.jpg"))
    data = open_set(str(path))
    assert (data.task, data.split_names) == ("retrieval", ("train", "test"))
    found = captions_of(data.split("test"))
    assert found == (
        ["text 0", "text 2", "text 3"] if kind == "parquet" else [("text 0", "text 3"), ("text 2",)]
    )
    assert captions_of(data.split("train")) == ["text 1"]
    for split, row, index in (("train", 0, 1), ("test", 1, 2)):
        source = data.split(split).source
        assert source is not None
        with Image.open(io.BytesIO(picture(index)[0])) as image:
            assert np.array_equal(np.asarray(source[row].image), np.asarray(image))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables_that_are_none(tmp_path, suffix):
    path = tmp_path / f"labels.{suffix}"
    os.mkfifo(path)
    refuse(path, "Not a regular file")
    path.unlink()
    path.mkdir()
    refuse(path, "holds no image")
    path.rmdir()
    put(path, "")
    refuse(path, "no column|has no lines|cannot read the table")
    put(path, b"\xff\xfe\0" * 10)
    refuse(path, "not UTF-8|not JSON|cannot read the table")
    with open(path, "wb") as file:
        file.truncate(1 << 34)
    refuse(path, "more than 1048576|cannot read the table")
