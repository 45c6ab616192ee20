"""Labelled data sets in every layout that people have, and in the forms that are none, each refused in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shards import picture, write_csv, write_folder, write_images, write_shards, write_tar

from clipcore.data import BadSample, DataError, raw
from clipcore.data.embedded import EMBEDDED as EMBEDDED_DATA
from clipcore.data.glyphs import ZERO_SHOT_TEMPLATES, GlyphSource
from clipcore.data.transforms import was_transparent
from clipcore.evaluate.datasets import EMBEDDED, EvaluationSet, Split, open_set
from clipcore.evaluate.splits import opened_once

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(path: Path, content: bytes | str | None = None) -> Path:
    """A file, a picture where no content is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = picture(0)[0] if content is None else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_classes(folder: Path, **numbers: int) -> Path:
    """So many pictures in each class folder."""
    for name, number in numbers.items():
        for index in range(number):
            put(folder / name / f"{index}.jpg", picture(index)[0])
    return folder


def npy(values: object, dtype: str = "uint8") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype))
    return buffer.getvalue()


def write_wds(folder: Path, *labels: object, suffix: str = "cls", split: str = "test") -> Path:
    """One shard of a picture for each label, as CLIP_benchmark writes it, with names for ten classes."""
    members = []
    for index, label in enumerate(labels):
        content = label if isinstance(label, bytes) else str(label).encode()
        members += [(f"s{index:07d}.jpg", picture(index)[0]), (f"s{index:07d}.{suffix}", content)]
    (folder / split).mkdir(parents=True)
    write_tar(folder / split / "0.tar", members)
    (folder / split / "nshards.txt").write_text("1\n")
    put(folder / "classnames.txt", "".join(f"name {number}\n" for number in range(10)))
    put(folder / "zeroshot_classification_templates.txt", "a photo of {c}.\n{c}\n")
    return folder


def labels_of(data: EvaluationSet, split: str = "test") -> list[int]:
    labels_N = data.split(split).labels_N
    assert labels_N is not None and labels_N.dtype == np.int64
    return labels_N.tolist()


def captions_of(split: Split) -> list[object]:
    assert split.source is not None
    return [split.source[index].caption for index in range(len(split))]


def refuse(spec: Path, message: str, split: str = "test", **options: str) -> None:
    """What is wrong comes in one line, at once or with the split."""
    with pytest.raises(DataError, match=message) as found:
        open_set(str(spec), **options).split(split)
    assert "\n" not in str(found.value)


# Class folders


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
    assert data.notes == ("not used: the folder 'extra', which is no split",)
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


# Labelled shards


def test_shards_with_classes(tmp_path):
    data = open_set(str(write_wds(tmp_path / "wds_mnist", 3, "7\n", 0)))
    assert (data.name, data.task, data.split_names) == ("wds_mnist", "classification", ("test",))
    assert data.classnames[3] == ("name 3",) and len(data.classnames) == 10
    assert data.templates == ("a photo of {c}.", "{c}")
    assert labels_of(data) == [3, 7, 0]
    test = data.split("test")
    assert test.keys() == [f"0.tar/s{index:07d}" for index in range(3)]
    assert captions_of(test) == ["name 3", "name 7", "name 0"]
    assert test.notes == ("7 of 10 classes have no image in test, such as 'name 1'",)
    copied = pickle.loads(pickle.dumps(test.source))
    with Image.open(io.BytesIO(picture(2)[0])) as image:
        assert np.array_equal(np.asarray(copied[2].image), np.asarray(image))
    with pytest.raises(IndexError):
        copied[3]


def test_shards_are_taken_in_the_order_of_their_numbers(tmp_path):
    """With nshards.txt, and without it, as 10.tar comes before 2.tar in the alphabet."""
    folder = write_wds(tmp_path, 0)
    for number in range(1, 11):
        member = [
            (f"{number}.png", picture(number)[0]),
            (f"{number}.cls", str(number % 10).encode()),
        ]
        write_tar(folder / "test" / f"{number}.tar", member)
    data = open_set(str(folder))
    assert labels_of(data) == [0]
    assert "10 shards in" in data.split("test").notes[0]
    (folder / "test" / "nshards.txt").write_text("11")
    wanted = [*range(10), 0]
    assert labels_of(open_set(str(folder))) == wanted
    (folder / "test" / "nshards.txt").unlink()
    assert labels_of(open_set(str(folder))) == wanted
    (folder / "test" / "3.tar").unlink()
    assert "has no 3.tar, but later ones" in open_set(str(folder)).split("test").notes[0]


def test_shards_of_several_labels(tmp_path):
    rows = np.eye(10, dtype=np.uint8)[[1, 4]] + np.eye(10, dtype=np.uint8)[[2, 2]]
    labels = [npy(rows[0]), npy(rows[1], "float32"), npy(np.zeros(10))]
    data = open_set(str(write_wds(tmp_path / "wds_voc2007_multilabel", *labels, suffix="npy")))
    assert (data.task, data.main_metric) == ("multilabel", "map11")
    labels_N = data.split("test").labels_N
    assert labels_N is not None and labels_N.dtype == np.uint8
    assert np.array_equal(labels_N, [*rows, [0] * 10])
    assert captions_of(data.split("test")) == ["name 1, name 2", "name 2, name 4", "nothing"]


@pytest.mark.parametrize("has_type", [False, True])
def test_shards_of_captions(tmp_path, has_type):
    write_wds(tmp_path, "a cat\n\n a dog \n", "a bird", suffix="txt")
    if has_type:
        put(tmp_path / "dataset_type.txt", "Retrieval\n")
    data = open_set(str(tmp_path))
    assert (data.task, data.main_metric, data.classnames) == ("retrieval", "mean_recall@1", ())
    test = data.split("test")
    assert test.labels_N is None and captions_of(test) == [("a cat", "a dog"), ("a bird",)]


def test_what_belongs_to_no_sample_of_a_shard_is_counted(tmp_path):
    write_wds(tmp_path, 1)
    image = picture(0)[0]
    members = [
        ("a.jpg", image),
        ("b.cls", b"1"),
        ("c.gif", image),
        ("c.cls", b"2"),
        ("d.png", image),
    ]
    members += [("d.jpg", image), ("d.cls", b"4"), ("shot 1.5 mm.jpg", image)]
    members += [("shot 1.5 mm.cls", b"5"), ("__meta__/x.jpg", image)]
    write_tar(tmp_path / "test" / "0.tar", members)
    data = open_set(str(tmp_path))
    assert labels_of(data) == [4, 5]
    assert data.split("test").keys() == ["0.tar/d", "0.tar/shot 1.5 mm"]
    assert data.split("test").notes[0] == (
        "not used of test: 1 x picture of another kind, such as c.gif; 1 x image without a label in .cls, such as a.jpg; "
        "2 x label without an image, such as b.cls; 1 x further picture of a sample, such as d"
    )


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (10, "0.tar/s0000001: its class is 10, and classnames.txt names 10, 0 to 9; write"),
        (-1, "s0000001: its class is -1"),
        ("cat", "s0000001: its class is 'cat', and KEY.cls holds a number"),
        ("1.0", "its class is '1.0'"),
        ("", "its class is ''"),
        ("\u0663", "its class is '\u0663'"),  # a digit elsewhere
        ("9" * 64, "and KEY.cls holds a number"),
        ("1" * 65, "a label of 65 bytes is too long"),
    ],
)
def test_labels_that_are_of_no_class(tmp_path, label, message):
    refuse(write_wds(tmp_path, 0, label), message)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (npy([0] * 9), r"its label has the shape \[9\], and classnames.txt names 10 classes"),
        (npy([[0] * 10]), r"its label has the shape \[1, 10\]"),
        (npy([0] * 9 + [2]), "other numbers than 0 and 1"),
        (npy([-1] * 10, "int8"), "other numbers than 0 and 1"),
        (npy([0.0] * 9 + [float("nan")], "float64"), "other numbers than 0 and 1"),
        (npy([0] * 10, "complex64"), "holds no numbers in C order"),
        (npy(["a"] * 10, "U1"), "holds no numbers in C order"),
        (npy([0] * 10)[:-1], r"uint8 \[10\] needs 10 bytes, there are 9"),
        (npy([0] * 10) + b"x", r"uint8 \[10\] needs 10 bytes, there are 11"),
        (npy([0] * 2000), "a label of 2,128 bytes is too long"),
        (b"\x93NUMPY\x01\x00\x10\x00((((((((((((((((", "unreadable .npy header"),
        (pickle.dumps([0] * 10), "no .npy file of version 1.0"),
        (b"", "no .npy file of version 1.0"),
    ],
)
def test_rows_of_labels_that_are_none(tmp_path, label, message):
    refuse(write_wds(tmp_path, npy([0] * 10), label, suffix="npy"), message)


def test_an_array_of_objects_is_never_unpickled():
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], object), allow_pickle=True)
    with pytest.raises(BadSample, match="holds no numbers"):
        raw.decode_array(buffer.getvalue())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test/nshards.txt", "two", "says 'two', which is no number of shards"),
        ("test/nshards.txt", "0", "says '0'"),
        ("test/nshards.txt", "-1", "says '-1'"),
        ("test/nshards.txt", "999999", "says '999999'"),
        ("test/nshards.txt", "1" * 65, "is longer than 64 bytes"),
        ("test/nshards.txt", "2", "has no 1.tar, one of the 2 shards that nshards.txt counts"),
        ("test/0.tar", b"x" * 1024, "is no tar file"),
        ("test/0.tar", b"", "is empty"),
        (
            "dataset_type.txt",
            "video",
            "says 'video'; the types are classification, multilabel, retr",
        ),
        ("dataset_type.txt", "multilabel", "holds no image with a label in .* that ends in .npy"),
        ("classnames.txt", "", "names no class"),
        ("classnames.txt", "a\n\nb\n", "the name of class 1, counted from 0, is empty"),
        ("classnames.txt", b"caf\xe9\n", r"is not UTF-8 \(byte 0xe9\)"),
        ("zeroshot_classification_templates.txt", "a photo\n", "the prompt 'a photo' has no {}"),
        ("zeroshot_classification_templates.txt", "\n", "holds no prompt"),
    ],
)
def test_files_of_a_wds_folder_that_do_not_fit(tmp_path, name, content, message):
    put(write_wds(tmp_path, 0) / name, content)
    refuse(tmp_path, message)


@pytest.mark.parametrize("name", ["classnames.txt", "dataset_type.txt", "test/0.tar"])
def test_pipes_and_links_in_a_wds_folder(tmp_path, name):
    path = write_wds(tmp_path, 0) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    refuse(tmp_path, "Not a regular file")
    path.unlink()
    path.symlink_to(path.name)
    refuse(tmp_path, "Too many levels of symbolic links")


def test_missing_names_and_splits_of_a_wds_folder(tmp_path):
    write_wds(tmp_path, 0, split="train")
    refuse(tmp_path, "has no split 'test'; it has train")
    (tmp_path / "classnames.txt").unlink()
    refuse(tmp_path, "has no classnames.txt; write the name of each class into it", "train")
    put(tmp_path / "classes.json", '["zero", ["one", "uno"]]')
    assert open_set(str(tmp_path)).classnames == (("zero",), ("one", "uno"))
    put(tmp_path / "classes.json", '{"0": "zero", "2": "two"}')
    refuse(tmp_path, "an object of labels to names from 0 to 1")
    (tmp_path / "empty" / "test").mkdir(parents=True)
    (tmp_path / "empty" / "test" / "nshards.txt").write_text("1")
    refuse(tmp_path / "empty", "has no 0.tar")


def test_the_hub_has_other_splits_than_the_paper(tmp_path):
    data = open_set(str(write_wds(tmp_path / "wds_vtab-resisc45_test", 0)))
    assert data.notes == ()
    assert data.split("test").notes[0] == (
        "split: 1 images; datacomp's has 6,300, the paper's 25,200"
    )
    fmow = open_set(str(write_wds(tmp_path / "wds_wilds-fmow_test", 0)))
    assert fmow.main_metric == "acc1"
    assert fmow.notes == (
        "datacomp judges this set by acc_worst_region, which is not computed; acc1 is",
    )


# Tables


def write_table(folder: Path, rows: list[dict[str, object]], kind: str) -> Path:
    """A table of these rows; those without an image are given one."""
    images = write_images(folder, len(rows))
    rows = [{"image": image, **row} for (image, _), row in zip(images, rows, strict=True)]
    path = folder / f"labels.{kind}"
    if kind == "jsonl":
        put(path, "".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        for row in rows:
            row["image"] = {"bytes": (folder / str(row["image"])).read_bytes(), "path": None}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        sign = {"tsv": "\t", "csv": ","}.get(kind, ";")
        path = path.with_suffix(".csv")
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        put(path, "".join(sign.join(map(str, line)) + "\n" for line in lines))
    return path


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
    refuse(table, "labels.csv has one class, 'cat', which each image is of; .* needs two or more")
    folder = write_wds(tmp_path / "wds", 0)
    put(folder / "classnames.txt", "cat\n")
    refuse(folder, "wds has one class, 'cat', which each image is of")
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
        else ("line that is no JSON", "line that is no JSON object")
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
        ({"label": "x" * 1001}, "1,001 characters in the column 'label' are no name"),
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
    refuse(path, "not UTF-8|no JSON|cannot read the table")
    with open(path, "wb") as file:
        file.truncate(1 << 34)
    refuse(path, "more than 1048576|cannot read the table")


# Features


def write_features(path: Path, labels: object, **options: object) -> Path:
    """Four rows of three features with these labels."""
    features = np.arange(12, dtype=np.float32).reshape(4, 3)
    arrays = {"features": features, "labels": np.array(labels), **options}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def test_features_of_splits_and_of_one_file(tmp_path):
    write_features(tmp_path / "train.npz", [0, 1, 2, 4])
    test = {"feature_list": np.ones((2, 3), np.float16), "label_list": np.array([1, 0], np.int32)}
    np.savez_compressed(tmp_path / "test.npz", **test)
    data = open_set(str(tmp_path))
    assert data.split_names == ("train", "test") and len(data.classnames) == 5
    train = data.split("train")
    assert train.source is None and len(train) == 4 and labels_of(data) == [1, 0]
    assert train.features_NW is not None and train.features_NW.dtype == np.float32
    assert np.array_equal(train.features_NW, np.arange(12).reshape(4, 3))
    assert train.keys()[3] == "train.npz, row 4"
    alone = open_set(str(tmp_path / "train.npz"))
    assert (alone.name, alone.split_names) == ("train", ("test",))


def test_features_of_several_labels(tmp_path):
    rows = [[0, 1], [1, 1], [0, 0], [1, 0]]
    data = open_set(str(write_features(tmp_path / "a.npz", rows)))
    assert data.task == "multilabel"
    labels_N = data.split("test").labels_N
    assert labels_N is not None and labels_N.dtype == np.uint8 and labels_N.tolist() == rows


@pytest.mark.parametrize(
    "labels", [[[0], [1], [1], [0]], [0.0, 1.0, 1.0, 0.0], [[0.0], [1.0], [1.0], [0.0]]]
)
def test_labels_of_one_column_and_whole_floats_are_classes(tmp_path, labels):
    data = open_set(str(write_features(tmp_path / "a.npz", labels)))
    assert data.task == "classification" and len(data.classnames) == 2
    assert labels_of(data) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": [0, 1, 2]}, "4 rows of features and 3 labels"),
        ({"labels": [0, 1, 2, -1]}, "the label -1 of row 3 is of no class"),
        ({"labels": [0, 1, 2, 1 << 40]}, "the label 1099511627776 of row 3 is of no class"),
        (
            {"labels": [0.0, 1, 2, 0.5]},
            r"the label 0.5 is no whole number; .* labels.astype\(int\)",
        ),
        ({"labels": [0.0, 1, 2, np.nan]}, "the label nan is no whole number"),
        ({"labels": [0.0, 1, 2, np.inf]}, "the label inf of row 3 is of no class"),
        ({"labels": [0.0, 1, 2, -1]}, "the label -1.0 of row 3 is of no class"),
        ({"labels": [[0.0, 0.5]] * 4}, "the label 0.5 is no whole number"),
        (
            {"labels": [True] * 4},
            r"labels are bool \[4\], not numbers \[N\]; write labels.astype\(int",
        ),
        ({"labels": [0] * 4}, "a has one class, 'class 0', which each image is of"),
        ({"labels": 3}, "labels are one number of int64; write one row an image"),
        ({"labels": [[0, 2]] * 4}, "other numbers than 0 and 1"),
        ({"labels": np.array([print] * 4, object)}, r"labels are object \[4\]; .*astype\(int\)"),
        ({"labels": ["cat"] * 4}, r"labels are <U3 \[4\]; .*labels.astype\(int\)"),
        ({"features": np.full((4, 3), np.nan)}, "row 0 of features is not finite"),
        ({"features": np.array([[1.0], [1], [1e300], [1]])}, "row 2 of features is not finite"),
        (
            {"features": np.ones((4, 3), int)},
            r"write floating-point numbers: features.astype\(numpy",
        ),
        ({"features": np.ones(4)}, r"features have the shape \[4\], not \[N, W\]"),
        ({"features": np.ones((0, 3))}, r"features of shape \[0, 3\] hold no row or no column"),
        ({"features": np.asfortranarray(np.ones((4, 3)))}, r"write numpy.ascontiguousarray\(feat"),
        ({"features": np.array([[print] * 3] * 4, object)}, r"features are object \[4, 3\]"),
    ],
)
def test_features_that_cannot_be_used(tmp_path, changed, message):
    path = tmp_path / "a.npz"
    arrays = {"features": np.ones((4, 3)), "labels": np.arange(4), **changed}
    np.savez(path, **{name: np.asarray(values) for name, values in arrays.items()})
    refuse(path, message)


def test_files_of_features_that_are_none(tmp_path):
    path = tmp_path / "a.npz"
    refuse(path, "there is no data set")
    os.mkfifo(path)
    refuse(path, "Not a regular file")
    path.unlink()
    put(path, b"PK\3\4" + b"x" * 100)
    refuse(path, "is no .npz file, or is cut off")
    whole = write_features(path, [0] * 4).read_bytes()
    put(path, whole.replace(np.arange(12, dtype=np.float32).tobytes(), b"\0" * 48))
    refuse(path, "is damaged .*Bad CRC-32")
    # A compressed array of which all numbers come out before its checksum is due.
    noise = np.random.default_rng(0).standard_normal((4, 1 << 16))
    np.savez_compressed(path, features=noise, labels=np.arange(4))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + 16] ^= 1
    refuse(put(path, bytes(data)), "is damaged .*Bad CRC-32")
    np.savez(path, features=np.ones((4, 3)))
    refuse(path, "has no array labels or label_list; it holds 'features.npy'")
    # A header that promises what the file does not hold.
    content = npy(np.ones((4, 3)), "float32")
    large = content.replace(b"(4, 3), }       ", b"(4000000, 3), } ")
    for wrong in (content[:-1], content + b"x", large):
        assert wrong != content
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("features.npy", wrong)
            archive.writestr("labels.npy", npy([0] * 4, "int64"))
        refuse(path, "features of float32 .* does not fit its")
    # Gigabytes of zeros.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("features.npy", npy(np.zeros((1 << 18, 64)), "float32"))
        archive.writestr("labels.npy", npy(np.zeros(1 << 18), "int64"))
    refuse(path, "compressed are no features")
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(1500):
            archive.writestr(str(number), b"")
    refuse(path, "far more than features and labels")


def test_splits_of_features_have_to_fit(tmp_path):
    write_features(tmp_path / "a" / "train.npz", [0] * 4)
    write_features(tmp_path / "a" / "test.npz", [0] * 4, features=np.ones((4, 2)))
    refuse(tmp_path / "a", "features have different widths, 3 in train, 2 in test")
    write_features(tmp_path / "b" / "train.npz", [0] * 4)
    write_features(tmp_path / "b" / "test.npz", [[0, 1]] * 4)
    refuse(tmp_path / "b", "numbers in one split and rows of 0 and 1 in another")
    write_features(tmp_path / "b" / "train.npz", [[0, 1, 1]] * 4)
    refuse(tmp_path / "b", "2 classes in one split and 3 in another")


# Others, and fingerprints


def test_embedded_sets_are_the_splits_of_the_glyphs():
    of_each = ("", "/shift", "/seen-shift", "/style")
    assert list(EMBEDDED) == [name + part for name in ("glyphs", "icons") for part in of_each]
    for name, split in (("", "unseen"), ("/shift", "shift"), ("/seen-shift", "seen-shift")):
        found, source = open_set(f"glyphs{name}"), GlyphSource(split)
        assert found.split_names == ("test",) and found.templates == ZERO_SHOT_TEMPLATES
        assert found.classnames == tuple((name,) for name in source.classnames)
        test = found.split("test")
        assert np.array_equal(test.labels_N, source.labels_N)
        assert test.keys()[5] == source[5].key and len(test) == len(source)
    prints = {open_set(f"glyphs{part}").split("test").fingerprint() for part in of_each[:3]}
    assert len(prints) == 3


@pytest.mark.parametrize("name", ["glyphs", "icons"])
def test_styles_of_trained_pictures_train_and_those_of_unseen_ones_test(name):
    found, data = open_set(f"{name}/style"), EMBEDDED_DATA[name]
    for split, whole in (("train", data.open("train")), ("test", data.open("unseen"))):
        part = found.split(split)
        row_of = {whole.key(row): row for row in range(len(whole))}
        keys = part.keys()
        rows = [row_of[key] for key in keys]
        styles = [found.classnames[label][0] for label in part.labels_N]
        assert styles == [whole.style(row) for row in rows]
        assert np.array_equal(part.source[7].image, whole[rows[7]].image)
        assert part.source.captions(7) == whole.captions(rows[7])
        assert len(set(styles)) == len(found.classnames) and len(rows) >= 1400
        # Every so many-th picture, so that a probe has some thousands.
        step = max(1, len(whole) // 4000)
        names = {name for (name,) in found.classnames}
        assert rows == [row for row in range(0, len(whole), step) if whole.style(row) in names]
    assert not set(found.split("train").keys()) & set(found.split("test").keys())


def test_pairs_are_for_retrieval(tmp_path):
    specs = [write_folder(tmp_path / "a", 3), write_csv(tmp_path / "b", 3)]
    specs += [Path(write_shards(tmp_path / "c", 2, 2)), tmp_path / "c"]
    for spec, number in zip(specs, (3, 3, 4, 4), strict=True):
        data = open_set(str(spec))
        assert (data.task, data.split_names) == ("retrieval", ("test",))
        assert captions_of(data.split("test")) == [picture(i)[1] for i in range(number)]
        assert len(set(data.split("test").keys())) == number
    rows = "images/0000.jpg,cat\nimages/0001.jpg,dog\n"
    put(tmp_path / "a" / "metadata.csv", f"file_name,label\n{rows}")
    labelled = open_set(str(tmp_path / "a"))
    assert (labelled.name, labelled.classnames) == ("a", (("cat",), ("dog",)))


def test_a_fingerprint_is_of_the_images_alone(tmp_path):
    """It stays with a moved folder, and changes with an image's name, content, time, or absence."""
    made = {
        "folders": write_classes(tmp_path / "folders", a=1, b=2),
        "wds": write_wds(tmp_path / "wds", 0, 1),
        "pairs": write_folder(tmp_path / "pairs", 3),
        "features": write_features(tmp_path / "features" / "test.npz", [0, 1] * 2).parent,
        "table": write_table(tmp_path / "table", [{"label": "a"}, {"label": "b"}], "csv").parent,
        "parquet": write_table(
            tmp_path / "parquet", [{"label": "a"}, {"label": "b"}], "parquet"
        ).parent,
    }
    changed = {
        "folders": "b/1.jpg",
        "wds": "test/0.tar",
        "pairs": "images/0001.jpg",
        "features": "test.npz",
        "table": "images/0001.jpg",
        "parquet": "labels.parquet",
    }
    for name, folder in made.items():
        table = {"table": "labels.csv", "parquet": "labels.parquet"}.get(name, "")

        def fingerprint(where: Path, table: str = table) -> str:
            return open_set(str(where / table)).split("test").fingerprint()

        first = fingerprint(folder)
        assert first == fingerprint(folder), name
        moved = tmp_path / "moved" / name
        shutil.copytree(folder, moved)
        assert first == fingerprint(moved), name
        os.utime(moved / changed[name], ns=(1, 1))
        assert first != fingerprint(moved), name


def test_a_fingerprint_changes_with_a_name(tmp_path):
    folder = write_classes(tmp_path, a=1, b=2)
    first = open_set(str(folder)).split("test").fingerprint()
    (folder / "b" / "1.jpg").rename(folder / "b" / "2.jpg")
    assert open_set(str(folder)).split("test").fingerprint() != first


def test_what_the_system_refuses_to_a_split_comes_in_one_line(tmp_path):
    def open_split(name: str) -> Split:
        raise PermissionError(13, "Permission denied", str(tmp_path / "0.tar"))

    with pytest.raises(DataError, match=r"cannot read .*0.tar: Permission denied"):
        opened_once(open_split)("test")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "there is no data set ''"),
        ("no/such", "there is no data set 'no/such': name a folder, a table, .*glyphs/shift"),
        ("a\0b", "there is no data set"),
        ("x" * 5000, "there is no data set"),
        ("no/*.tar", "no file fits the pattern"),
        ("a{", "a brace is not closed"),
    ],
)
def test_what_is_no_data_set(spec, message):
    refuse(Path(spec) if "\0" not in spec and spec else spec, message)  # type: ignore[arg-type]


def test_large_pictures_are_read_where_that_is_asked_for(tmp_path):
    write_classes(tmp_path, a=1, b=1)
    few = open_set(str(tmp_path), max_pixels=100).split("test").source
    with pytest.raises(BadSample, match="--max-pixels"):
        few[0]
