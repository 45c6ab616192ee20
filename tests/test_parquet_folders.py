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
    """A table of pictures by number, with the hub's notes on the names of classes where they are given."""
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
    path = tmp_path / "b" / "test.parquet"
    write(path, [0], caption=["a"], split=["train"])
    refuse(path.parent, r"b/\*.parquet: the tables have captions and a column split.*join them")


def test_tables_that_are_no_set_are_refused(tmp_path):
    folder = write_hub(tmp_path / "a" / "data")
    (folder / "test-00000-of-00002.parquet").unlink()
    refuse(tmp_path / "a", "has no test-00000-of-00002.parquet, one of the 2 tables")

    write(tmp_path / "b" / "train.parquet", [0], ("cat", "dog"), label=[0])
    write(tmp_path / "b" / "test.parquet", [0], ("dog", "cat"), label=[0])
    refuse(tmp_path / "b", "train.parquet and .*test.parquet name the classes of 'label' different")

    write(tmp_path / "c" / "pets.parquet", [0], label=["cat"])
    refuse(tmp_path / "c", r"names begin with no split \(train, val, test\), such as .*/pets.par")
    write(tmp_path / "d" / "data" / "pets.parquet", [0], label=["cat"])
    refuse(tmp_path / "d", r"names begin with no split .*, such as .*/data/pets.parquet; name one")

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
