"""Embedded data sets, pairs, fingerprints, and what is no data set."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from labelled_sets import (
    captions_of,
    put,
    refuse,
    write_classes,
    write_features,
    write_table,
    write_wds,
)
from shards import picture, write_csv, write_folder, write_shards

from clipcore.data import BadSample, DataError
from clipcore.data.embedded import EMBEDDED as EMBEDDED_DATA
from clipcore.data.glyphs import ZERO_SHOT_TEMPLATES, GlyphSource
from clipcore.evaluate.datasets import EMBEDDED, Split, open_set
from clipcore.evaluate.splits import opened_once

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("cache_folder")]


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
        ("no/*.tar", "no file matches the pattern"),
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
