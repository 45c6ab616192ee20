"""Which images share features: a fingerprint tells each set of images, and each way of reading them, from others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from shards import (
    picture,
    write_csv,
    write_folder,
    write_images,
    write_jsonl,
    write_parquet,
    write_tar,
)

from clipcore.data import folders, tables
from clipcore.data.folders import holds_image
from clipcore.data.glyphs import GlyphSource
from clipcore.data.tables import JsonlSource
from clipcore.evaluate import splits
from clipcore.evaluate.datasets import open_set
from clipcore.files import open_regular

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("cache_folder")]


def fingerprint(spec: Path, split: str = "test", **options: object) -> str:
    return open_set(str(spec), **options).split(split).fingerprint()  # type: ignore[arg-type]


def write_wds(folder: Path, suffix: str, rows: list[int], split: str = "test") -> Path:
    """One shard of pictures with labels or captions, whose size and time are those of any other of few pictures."""
    members = []
    for number, row in enumerate(rows):
        label = str(number % 2) if suffix == "cls" else f"number {number}"
        members += [(f"{number}.jpg", picture(row)[0]), (f"{number}.{suffix}", label.encode())]
    (folder / split).mkdir(parents=True, exist_ok=True)
    shard = write_tar(folder / split / "0.tar", members)
    os.utime(shard, ns=(1, 1))
    (folder / "classnames.txt").write_text("cat\ndog\n")
    return folder


def write_class_folders(folder: Path) -> Path:
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.jpg").write_bytes(picture(number)[0])
    return folder


def write_labels(folder: Path) -> Path:
    folder.mkdir()
    paths = [path for path, _ in write_images(folder, 2)]
    (folder / "labels.csv").write_text(f"image,label\n{paths[0]},cat\n{paths[1]},dog\n")
    return folder / "labels.csv"


def write_parquet_labels(folder: Path) -> Path:
    """Two columns of images, with labels and captions."""
    folder.mkdir()
    left, right = ([picture(row)[0] for row in rows] for rows in ((0, 1), (2, 3)))
    columns = {"image": left, "right": right, "label": ["cat", "dog"], "caption": ["a", "b"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "labels.parquet")
    return folder / "labels.parquet"


@pytest.mark.parametrize("suffix", ["cls", "txt"])
def test_shards_of_one_size_and_time_are_told_apart_by_their_members(tmp_path, suffix):
    folders = [
        write_wds(tmp_path / name, suffix, rows)
        for name, rows in (("a", [0, 1]), ("b", [2, 3]), ("again", [0, 1]))
    ]
    stats = [(folder / "test" / "0.tar").stat() for folder in folders]
    assert len({(stat.st_size, stat.st_mtime_ns) for stat in stats}) == 1
    first, other, again = map(fingerprint, folders)
    assert first == again != other


def test_shards_of_pairs_are_told_apart_by_their_members(tmp_path):
    for name, rows in (("a", [0, 1]), ("b", [2, 3]), ("again", [0, 1])):
        write_wds(tmp_path / name, "txt", rows)
    first, other, again = (
        fingerprint(tmp_path / name / "test" / "{0,0}.tar") for name in ("a", "b", "again")
    )
    assert first == again != other


@pytest.mark.parametrize("is_labelled", [True, False])
def test_each_column_of_images_of_a_parquet_table_is_its_own(tmp_path, is_labelled):
    path = write_parquet_labels(tmp_path / "a")
    if not is_labelled:
        table = pyarrow.parquet.read_table(path).drop_columns(["label"])
        pyarrow.parquet.write_table(table, path)
    first, right = fingerprint(path), fingerprint(path, img_key="right")
    assert first == fingerprint(path, img_key="image") != right
    if not is_labelled:
        several = path.with_name("{labels,labels}.parquet")
        assert fingerprint(several) != fingerprint(several, img_key="right")


MAKERS: dict[str, Callable[[Path], Path]] = {
    "class folders": write_class_folders,
    "shards of labels": lambda folder: write_wds(folder, "cls", [0, 1]),
    "shards of captions": lambda folder: write_wds(folder, "txt", [0, 1]),
    "csv of labels": write_labels,
    "parquet of labels": write_parquet_labels,
    "csv of captions": lambda folder: write_csv(folder, 2),
    "parquet of captions": lambda folder: write_parquet(folder, 2),
    "folder of captions": lambda folder: write_folder(folder, 2),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_one_limit_of_pixels_refuses_is_read_again_with_another(tmp_path, kind):
    spec = MAKERS[kind](tmp_path / "data")
    few, many = (fingerprint(spec, max_pixels=number) for number in (100, 10_000))
    assert few != many == fingerprint(spec, max_pixels=10_000)


@pytest.mark.parametrize("kind", ["class folders", "shards of labels", "folder of captions"])
def test_a_link_names_the_set(tmp_path, monkeypatch, kind):
    """Its target may lie in a store whose names are hashes."""
    (tmp_path / "imagenet-a").symlink_to(MAKERS[kind](tmp_path / "0f3c"))
    assert open_set(str(tmp_path / "imagenet-a")).name == "imagenet-a"
    monkeypatch.chdir(tmp_path / "0f3c")
    assert open_set(".").name == "0f3c"


@pytest.mark.parametrize("name", ["glyphs", "glyphs/style"])
def test_drawn_pictures_are_told_apart_by_how_they_are_drawn(name, monkeypatch):
    first = open_set(name).split("test").fingerprint()
    assert first == open_set(name).split("test").fingerprint()
    monkeypatch.setattr(GlyphSource, "font_size", GlyphSource.font_size + 1)
    assert first != open_set(name).split("test").fingerprint()


# What is read once


@pytest.mark.parametrize("kind", ["class folders", "shards of labels", "csv of captions"])
def test_a_split_is_asked_once_for_its_images(tmp_path, monkeypatch, kind):
    """However many models are evaluated on it, as each file of a folder is looked at."""
    split = open_set(str(MAKERS[kind](tmp_path / "data"))).split("test")
    first = split.fingerprint(), split.keys()
    monkeypatch.setattr(splits, "os", None)
    monkeypatch.setattr(type(split.source), "key", None, raising=False)
    monkeypatch.setattr(type(split.source), "__len__", None)
    assert (split.fingerprint(), split.keys()) == first


def test_a_table_is_opened_once_for_the_paths_of_all_its_rows(tmp_path, monkeypatch):
    numbers_of_opens = []
    for number in (2, 20):
        source = JsonlSource(str(write_jsonl(tmp_path / str(number), number)))
        opened = list[object]()

        def count(path: str, opened: list[object] = opened) -> object:
            opened.append(path)
            return open_regular(path)

        monkeypatch.setattr(tables, "open_regular", count)
        names = list(source.picture_names())
        assert [os.path.basename(name) for name in names] == [
            f"{row:04d}.jpg" for row in range(number)
        ]
        numbers_of_opens.append(len(opened))
    assert numbers_of_opens == [1, 1]


def test_class_folders_are_listed_a_few_times_only(tmp_path, monkeypatch):
    """A class folder may hold thousands of images: its names are listed to find captions, tables and images."""
    whole = write_class_folders(tmp_path / "whole")
    for split in ("train", "test"):
        write_class_folders(tmp_path / "splits" / split)
    own_scan, entries = os.scandir, Counter[str]()

    def scan(path: str) -> object:
        entries[os.path.relpath(path, tmp_path)] += 1
        return own_scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    fingerprint(whole)
    assert entries["whole/dog"] == 3
    fingerprint(tmp_path / "splits")
    assert entries["splits/test/dog"] == 2


def test_an_image_is_found_without_a_look_at_the_whole_folder(tmp_path, monkeypatch):
    write_class_folders(tmp_path / "a")
    (tmp_path / "b" / "c.jpg").mkdir(parents=True)
    assert holds_image(str(tmp_path / "a")) and not holds_image(str(tmp_path / "b"))
    monkeypatch.setattr(folders, "walk", lambda *_: pytest.fail("listed"))
    assert holds_image(str(tmp_path / "a" / "cat"))
