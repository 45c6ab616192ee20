"""Tar shards with labels, as CLIP_benchmark exports data sets, and what is none."""

from __future__ import annotations

import io
import os
import pickle

import numpy as np
import pytest
from labelled_sets import captions_of, labels_of, npy, put, refuse, write_wds
from PIL import Image
from shards import picture, write_tar

from clipcore.data import BadSample, raw
from clipcore.evaluate.datasets import open_set

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("cache_folder")]


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
        (npy([0] * 9 + [2]), "numbers other than 0 and 1"),
        (npy([-1] * 10, "int8"), "numbers other than 0 and 1"),
        (npy([0.0] * 9 + [float("nan")], "float64"), "numbers other than 0 and 1"),
        (npy([0] * 10, "complex64"), "holds no numbers in C order"),
        (npy(["a"] * 10, "U1"), "holds no numbers in C order"),
        (npy([0] * 10)[:-1], r"uint8 \[10\] needs 10 bytes, there are 9"),
        (npy([0] * 10) + b"x", r"uint8 \[10\] needs 10 bytes, there are 11"),
        (npy([0] * 2000), "a label of 2,128 bytes is too long"),
        (b"\x93NUMPY\x01\x00\x10\x00((((((((((((((((", "unreadable .npy header"),
        (pickle.dumps([0] * 10), "not a .npy file of version 1.0"),
        (b"", "not a .npy file of version 1.0"),
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
        ("test/nshards.txt", "two", "says 'two', which is not a number of shards"),
        ("test/nshards.txt", "0", "says '0'"),
        ("test/nshards.txt", "-1", "says '-1'"),
        ("test/nshards.txt", "999999", "says '999999'"),
        ("test/nshards.txt", "1" * 65, "is longer than 64 bytes"),
        ("test/nshards.txt", "2", "has no 1.tar, one of the 2 shards that nshards.txt counts"),
        ("test/0.tar", b"x" * 1024, "is not a tar file"),
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
