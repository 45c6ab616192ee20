"""Tables, parquet and folders, patterns and mixtures: every pair comes back; each mistake gets one clear line."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import re
import tracemalloc
from typing import Any

import numpy as np
import pytest
from shards import (
    picture,
    write_csv,
    write_folder,
    write_images,
    write_jsonl,
    write_parquet,
    write_shards,
)

from clipcore.data import BadSample, DataError, tables
from clipcore.data.folders import ClassFolderSource
from clipcore.data.pictures import PictureSource, by_picture
from clipcore.data.sources import (
    MixtureSource,
    expand_braces,
    left_out_of,
    noted_of,
    open_source,
    parse_factors,
)
from clipcore.data.tables import TextColumn
from clipcore.data.transforms import decode_image

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("cache_folder")]

WRITERS = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "folder": write_folder,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("dataset_type", ["auto", "named"])
def test_every_pair_comes_back_and_from_a_pickle(tmp_path, kind, dataset_type):
    path = WRITERS[kind](tmp_path / "data", 20)
    source = open_source(str(path), "auto" if dataset_type == "auto" else kind)
    assert len(source) == 20 and source.name == path.name
    for reader in (source, pickle.loads(pickle.dumps(source))):
        for index in (19, 0, 7, 13):
            data, caption = picture(index)
            pair = reader[index]
            assert pair.caption == caption and pair.key
            assert np.array_equal(np.asarray(pair.image), np.asarray(decode_image(data)))
    for index in (-1, 20):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("kind", WRITERS)
def test_what_one_sample_lacks_is_a_bad_sample_and_counts(tmp_path, kind):
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        image, path = picture(0)[0], tmp_path / "a.parquet"
        columns = {"image": [image, image[:200], None, image], "caption": [" ", "a", "b", "c"]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        reasons = ["empty caption", "unreadable", "no bytes", None]
    else:
        path = WRITERS[kind](tmp_path / "data", 4)
        images = sorted((tmp_path / "data" / "images").glob("*.jpg"))
        images[1].write_bytes(images[1].read_bytes()[:200])
        reasons = [None, "unreadable", None, None]
        if kind == "csv":
            path.write_text(path.read_text() + "images/0000.jpg\n\nnone.jpg\tx\n\tx\n")
            reasons += ["1 fields in a table of 2", "No such file", "no image path"]
        elif kind == "jsonl":
            odd = ['{"file_name": 3}', "{", "[1]", '{"file_name": "images/0000.jpg"}']
            path.write_text(path.read_text() + "\n".join(odd) + "\n\n")
            reasons += ["no image path", "not JSON", "not a JSON object", "empty caption"]
        else:
            (tmp_path / "data" / "images" / "0002.txt").write_text("\n")
            reasons[2] = "empty caption"
    source = open_source(str(path))
    assert len(source) == len(reasons)
    for index, reason in enumerate(reasons):
        if reason is None:
            source[index]
            continue
        with pytest.raises(BadSample, match=reason) as caught:
            source[index]
        assert caught.value.key and "\n" not in str(caught.value)


def test_csv_columns_separators_quotes_and_byte_order_mark(tmp_path):
    write_images(tmp_path, 2)
    path = tmp_path / "t.csv"
    path.write_text('\ufeffurl,text,file\nx,"one, ""two""\nthree",images/0001.jpg\n', "utf-8")
    source = open_source(str(path), img_key="file", caption_key="text", separator=",")
    assert len(source) == 1 and source[0].caption == 'one, "two"\nthree'


@pytest.mark.parametrize(
    "header, caption",
    [
        ("image,text", "b"),
        ("file_name\ttxt", "b"),
        ("image_path;caption", "b"),
        # open_clip's names come first, whatever else is there.
        ("filepath,title,caption", "b"),
        ("title,filepath,image,text", "images/0001.jpg"),
    ],
)
def test_csv_columns_are_found_by_their_usual_names(tmp_path, header, caption):
    write_images(tmp_path, 2)
    separator = next(character for character in "\t;," if character in header)
    row = separator.join(["images/0001.jpg", "b", "c", "d"][: len(header.split(separator))])
    if header.startswith("title"):
        row = separator.join(["images/0001.jpg", "images/0000.jpg", "c", "d"])
    (tmp_path / "t.csv").write_text(f"{header}\n{row}\n")
    assert open_source(str(tmp_path / "t.csv"))[0].caption == caption
    # A column that the user names has no substitute.
    with pytest.raises(DataError, match=r"has no column 'words'"):
        open_source(str(tmp_path / "t.csv"), caption_key="words", separator=separator)


def test_csv_rows_of_other_lengths_are_bad_samples_and_said_at_the_start(tmp_path):
    write_images(tmp_path, 2)
    rows = [
        "filepath,title,size",
        "images/0000.jpg,a dog, running,3",
        "images/0001.jpg,a cat,7,,",
        "x",
    ]
    rows += ["images/0000.jpg,a cow,4"]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    source = open_source(str(tmp_path / "t.csv"), separator=",")
    assert len(source) == 4
    assert (source[1].caption, source[3].caption) == ("a cat", "a cow")
    for index, reason in ((0, r"4 fields in a table of 3 \(line 2\)"), (2, "1 fields in a table")):
        with pytest.raises(BadSample, match=reason):
            source[index]
    assert str(left_out_of(source)) == (
        "1 x row of more fields than the header's 3, such as line 2; "
        "1 x row of fewer fields than the header's 3, such as line 4"
    )


def test_compressed_shards_of_a_folder_are_said(tmp_path):
    write_shards(tmp_path / "d", 1, 3)
    (tmp_path / "d" / "001.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "d" / "002.tgz").write_bytes(b"\x1f\x8b")
    source = open_source(str(tmp_path / "d"))
    assert len(source) == 3
    assert str(left_out_of(source)) == ("2 x compressed shard, to be gunzipped, such as 001.tar.gz")


@pytest.mark.parametrize("kind", [*WRITERS, "shards", "classes", "mixture"])
def test_captions_come_without_their_pictures(tmp_path, kind, monkeypatch):
    if kind == "classes":
        for name in ("cat", "dog"):
            write_images(tmp_path / "data" / name, 2)
        path = str(tmp_path / "data")
    elif kind in ("shards", "mixture"):
        path = write_shards(tmp_path / "data", 2, 3)
    else:
        path = str(WRITERS[kind](tmp_path / "data", 5))
    if kind == "mixture":
        path += f"::{write_csv(tmp_path / 'more', 5)}"
    source = open_source(path)
    expected = [source[i].caption for i in range(len(source))]
    monkeypatch.setattr("clipcore.data.tables.decode_image", None)
    monkeypatch.setattr("clipcore.data.tar.decode_image", None)
    assert [source.captions(i) for i in range(len(source))] == expected


def test_a_stray_quotation_mark_swallows_no_rows(tmp_path):
    write_images(tmp_path, 3)
    path = tmp_path / "t.tsv"
    lines = ["filepath\ttitle", *(f"images/000{i}.jpg\tcaption {i}" for i in range(3))]
    for stray, line in (('"a lone mark', 2), ('"closed" and on', 2), ('"', 2)):
        changed = [lines[0], f"images/0000.jpg\t{stray}", *lines[2:]]
        path.write_text("\n".join(changed) + "\n")
        with pytest.raises(
            DataError, match=rf"t.tsv, in the row that begins in line {line}: .*--csv-no-quotes"
        ):
            open_source(str(path))
        source = open_source(str(path), quotes=False)
        assert [source[i].caption for i in range(3)] == [stray, "caption 1", "caption 2"]


def test_two_stray_quotation_marks_swallow_no_rows_either(tmp_path):
    write_images(tmp_path, 6)
    lines = [f"images/000{i}.jpg\tcaption {i}" for i in range(6)]
    lines[1], lines[4] = 'images/0001.jpg\t"red car', 'images/0004.jpg\tgreen"'
    path = tmp_path / "t.tsv"
    path.write_text("\n".join(["filepath\ttitle", *lines]) + "\n")
    with pytest.raises(
        DataError, match=r"begins in line 3: other rows lie between .*--csv-no-quotes"
    ):
        open_source(str(path))
    assert open_source(str(path), quotes=False)[4].caption == 'green"'
    # A caption of several lines is one, whatever separators are in it.
    text = "title,filepath\n" + '"a dog,\nrunning, happy\nand a.jpg",images/0000.jpg\n'
    path.write_text(text)
    assert open_source(str(path), separator=",")[0].caption == "a dog,\nrunning, happy\nand a.jpg"
    path.write_text('filepath,title\nimages/0000.jpg,"Available as:\njpg, png"\n')
    assert open_source(str(path), separator=",")[0].caption == "Available as:\njpg, png"


def test_two_columns_of_one_name_are_named(tmp_path):
    (tmp_path / "t.tsv").write_text("filepath\ttitle\ttitle\na.jpg\tx\ty\n")
    with pytest.raises(DataError, match="more than one column 'title'; rename or remove one"):
        open_source(str(tmp_path / "t.tsv"))
    write_images(tmp_path, 1)
    (tmp_path / "t.tsv").write_text("filepath\ttitle\tnote\tnote\nimages/0000.jpg\tx\ty\tz\n")
    assert open_source(str(tmp_path / "t.tsv"))[0].caption == "x"


@pytest.mark.parametrize("separator", ["\t", "\\t", "tab"])
def test_a_tab_may_be_written_out(tmp_path, separator):
    path = write_csv(tmp_path / "d", 2)
    assert len(open_source(str(path), separator=separator)) == 2
    with pytest.raises(DataError, match="one character or `tab`, got 'xy'"):
        open_source(str(path), separator="xy")


@pytest.mark.parametrize("separator", [",", ";", "|"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_a_separator_is_read_off_the_header_and_said(tmp_path, separator, quote):
    rows = [("filepath", "title"), *write_images(tmp_path, 3)]
    path = tmp_path / "t.csv"
    # The captions hold commas.
    rows = [(image, title if separator != "," or quote else "x") for image, title in rows]
    rows[0] = ("filepath", "title")
    path.write_text("".join(f"{quote}{a}{quote}{separator}{quote}{b}{quote}\n" for a, b in rows))
    source = open_source(f"{path}::{path}")
    assert len(source) == 6 and source[0].caption == rows[1][1]
    assert str(noted_of(source)).startswith(f"2 x table with {separator!r} between its columns, by")
    assert str(noted_of(by_picture(source))) == str(noted_of(source))

    # One that is given is obeyed and no news; and a tab in the header is one.
    assert not noted_of(open_source(str(path), separator=separator))
    with pytest.raises(DataError, match=r"they look separated by|expected after"):
        open_source(str(path), separator="tab")
    assert not noted_of(open_source(str(write_csv(tmp_path / "tabs", 2))))


@pytest.mark.parametrize(
    "header",
    ["filepath,title,a\tb", "filepath,x;title", "filepath", "filepath,x,y", '"filepath,title'],
)
def test_a_header_that_shows_no_separator_is_read_by_tabs(tmp_path, header):
    write_images(tmp_path, 1)
    (tmp_path / "t.csv").write_text(f"{header}\nimages/0000.jpg,a dog\n")
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / "t.csv"))
    with pytest.raises(DataError) as by_tabs:
        open_source(str(tmp_path / "t.csv"), separator="\t")
    assert str(caught.value) == str(by_tabs.value)


def test_images_that_are_not_there_name_where_the_table_belongs(tmp_path, monkeypatch):
    write_images(tmp_path, 2)
    path = tmp_path / "results.csv"
    path.write_text("filepath\ttitle\n0000.jpg\ta dog\n")
    message = rf"table's folder: they lie in {re.escape(str(tmp_path))}/images, so that the table belongs there$"
    with pytest.raises(DataError, match=message):
        open_source(str(path))
    # Taken at its word.
    path.rename(tmp_path / "images" / "results.csv")
    assert len(open_source(str(tmp_path / "images" / "results.csv"))) == 1

    (tmp_path / "other").mkdir()
    write_lines = (tmp_path / "other" / "t.jsonl").write_text
    write_lines('{"image": "images/0000.jpg", "caption": "a dog"}\n')
    with pytest.raises(DataError, match=r"folder: move the table into the folder of its images$"):
        open_source(str(tmp_path / "other" / "t.jsonl"))
    monkeypatch.chdir(tmp_path)
    for table in (str(tmp_path / "other" / "t.jsonl"), "other/t.jsonl"):
        with pytest.raises(DataError, match="they are there from the current folder"):
            open_source(table)


def test_a_table_of_lines_that_changes_or_goes_is_noticed(tmp_path):
    path = write_jsonl(tmp_path / "d", 3)
    source = open_source(str(path))
    source[1]
    path.write_text(path.read_text().replace("number 1", "NUMBER 1") + "\n")
    with pytest.raises(DataError, match="was changed after the run began"):
        source[1]
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read the table .*No such file"):
        source[1]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_of_one_picture_are_one_sample_with_all_captions(tmp_path, kind):
    images = [image for image, _ in write_images(tmp_path, 3)]
    rows = [(images[0], "one"), (images[1], "two"), (images[0], "three"), (images[2], " ")]
    rows += [(images[2], " "), (images[1], ""), ("", "nothing")]
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        path.write_text("filepath\ttitle\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    else:
        path.write_text("".join(json.dumps({"image": a, "caption": b}) + "\n" for a, b in rows))
    source = by_picture(open_source(str(path)))
    assert isinstance(source, PictureSource) and len(source) == 4
    for reader in (source, pickle.loads(pickle.dumps(source))):
        assert (reader[0].caption, reader[1].caption) == (("one", "three"), ("two",))
        assert reader[0].key == images[0]
        for index, reason in ((2, "empty caption"), (3, "no image path")):
            with pytest.raises(BadSample, match=reason):
                reader[index]
    assert "1 x caption of a picture (empty caption)" in str(source.left_out)
    # However its path is written, also over several tables.
    others = [f"./{images[0]}", str(tmp_path / images[1])]
    (tmp_path / "u.csv").write_text("filepath\ttitle\n" + "".join(f"{a}\tmore\n" for a in others))
    joined = by_picture(open_source(f"{path}::{tmp_path / 'u.csv'}"))
    assert isinstance(joined, PictureSource) and len(joined) == 4
    assert joined[0].caption == ("one", "three", "more") and joined[1].caption == ("two", "more")
    # Where each picture has one row, nothing changes.
    plain = open_source(str(WRITERS[kind](tmp_path / "plain", 3)))
    assert by_picture(plain) is plain


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        (
            "t.csv",
            b"path\ttitle\na.jpg\tx\n",
            "no column 'filepath' or 'image' or .*; its columns are path, title",
        ),
        ("t.csv", b"path,title\na.jpg,x\n", "separated by ',': --csv-separator"),
        ("t.csv", b"filepath,title\na.jpg,x\n", r"none of the first 1 images .*/a\.jpg"),
        ("t.csv", b"filepath\ttitle\n", "no rows"),
        ("t.csv", b"", "its columns are none"),
        (
            "t.csv",
            b"root:x:0:0:root:/root\nbin:x:1:1\n",
            "no column 'filepath' or 'image' or .*; it has one column$",
        ),
        ("t.csv", b"filepath\ttitle\nno.jpg\tx\n", r"none of the first 1 images .*/no\.jpg"),
        ("t.csv", b"filepath\ttitle\na\tcaf\xe9\n", "not UTF-8"),
        ("t.csv", b"filepath\ttitle\na\t" + b"x" * 200_000, "begins in line 2: field larger"),
        ("t.jsonl", b"", "no lines"),
        ("t.jsonl", b"\n \n", "no lines"),
        ("t.jsonl", b"x\n", "record 1: the line is not JSON"),
        ("t.jsonl", b'{"url": "x", "caption": "y"}\n', "columns are url, caption"),
        ("t.parquet", b"PAR1 nothing", "cannot read the table"),
        ("t.xyz", b"", "--dataset-type"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, name, content, pattern):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=pattern) as caught:
        open_source(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no.csv", "no.jsonl", "no.parquet", "no.tar", "no", "no*.csv"])
def test_missing_data_is_named(tmp_path, name):
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / name))
    assert name in str(caught.value)


def test_a_column_that_the_user_named_must_be_there(tmp_path):
    for kind in ("jsonl", "parquet"):
        path = str(WRITERS[kind](tmp_path / kind, 2))
        with pytest.raises(DataError, match=r"no column 'text'; its columns are .*, caption"):
            open_source(path, caption_key="text")


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("pyarrow", "simplejpeg"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    path = write_parquet(tmp_path, 2)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'clipcore\[parquet\]'"):
        open_source(str(path))
    with pytest.raises(DataError, match=r"pip install 'clipcore\[jpeg\]'"):
        open_source(str(path), decoder="simplejpeg")
    with pytest.raises(DataError, match="pillow, simplejpeg"):
        open_source(str(path), decoder="opencv")


def test_several_captions(tmp_path):
    write_images(tmp_path, 1)
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"image": "images/0000.jpg", "text": ["one", " ", "two"]}))
    assert open_source(str(path))[0].caption == ("one", "two")


def test_folders_by_metadata_by_json_and_by_class(tmp_path):
    images = tmp_path / "a"
    rows = write_images(images, 3)
    lines = [json.dumps({"file_name": image, "text": caption}) for image, caption in rows]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(str(images))
    assert source.name == "a" and [p.caption for p in map(source.__getitem__, range(3))] == [
        caption for _, caption in rows
    ]

    write_images(tmp_path / "b", 2)
    (tmp_path / "b" / "images" / "0001.JSON").write_text('{"caption": "in json"}')
    source = open_source(str(tmp_path / "b"))
    assert len(source) == 1 and source[0].caption == "in json"

    for name in ("tabby_cat", "dog"):
        write_images(tmp_path / "c" / name, 2)
    (tmp_path / "c" / "0.jpg").write_bytes(picture(0)[0])
    source = open_source(str(tmp_path / "c"))
    assert isinstance(source, ClassFolderSource)
    assert source.classnames == ["dog", "tabby cat"] and source.labels_N.tolist() == [0, 0, 1, 1]
    assert [source[i].caption for i in range(4)] == ["dog", "dog", "tabby cat", "tabby cat"]


def test_a_folder_of_shards_means_the_shards_and_an_empty_one_an_error(tmp_path):
    write_shards(tmp_path / "shards", 2, 3)
    assert len(open_source(str(tmp_path / "shards"))) == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image"):
        open_source(str(tmp_path / "empty"))
    write_images(tmp_path / "flat", 1)
    (tmp_path / "flat" / "images" / "0000.jpg").rename(tmp_path / "flat" / "0.jpg")
    with pytest.raises(DataError, match=r"no image .* in a folder of its class, and none with"):
        open_source(str(tmp_path / "flat"))
    with pytest.raises(DataError, match="there is no folder"):
        open_source(str(tmp_path / "none"), "folder")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a", ["a"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{a,b{0..1},c}/x", ["a/x", "b0/x", "b1/x", "c/x"]),
        ("{x{0..1},{y,z}w}", ["x0", "x1", "yw", "zw"]),
        ("{a,}", ["a", ""]),
        ("x}y", ["x}y"]),
    ],
)
def test_braces_mean_what_they_mean_in_a_shell(pattern, expected):
    assert expand_braces(pattern) == expected


@pytest.mark.parametrize("pattern", ["{0..1", "{a}", "{}", "{0..99999999}", "{0..999}{0..9999}"])
def test_braces_that_mean_nothing(pattern):
    with pytest.raises(DataError, match=r"brace|neither a range|more than"):
        expand_braces(pattern)


def test_patterns_lists_and_parts(tmp_path):
    pattern = write_shards(tmp_path / "a", 3, 2)
    table = str(write_csv(tmp_path / "b", 5))
    folder = str(tmp_path / "a")
    for data in (pattern, f"{folder}/*.tar", f"{folder}/00?.tar", f"{folder}/00{{0,1,2}}.tar"):
        source = open_source(data)
        assert [source[i].caption for i in range(6)] == [picture(i)[1] for i in range(6)]
    for mixed in (f"{pattern}::{table}", [pattern, table]):
        source = open_source(mixed)
        assert len(source) == 11 and source.name == "{000..002}.tar::pairs.csv"
        assert source[5].caption == picture(5)[1] and source[6].caption == picture(0)[1]
    several = open_source(f"{tmp_path}/b/pairs.csv::{tmp_path}/?/*.csv")
    assert len(several) == 10


class Numbers:
    """A source whose captions are its indices."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        assert 0 <= index < self.size
        return f"{self.name}{index}"


@pytest.mark.parametrize(
    ("sizes", "factors", "counts"),
    [
        ([3, 4], None, [3, 4]),
        ([3, 4], [2.0, 2.0], [3, 4]),
        ([1000, 1], [0.001, 1.0], [1000, 1000]),
        ([4, 6], [1.0, 2.5], [4, 15]),
        ([5, 0, 2], [1.0, 1.0, 3.0], [5, 0, 6]),
    ],
)
def test_mixtures_see_every_sample_in_proportion(sizes, factors, counts):
    source = MixtureSource([Numbers("abc"[i], n) for i, n in enumerate(sizes)], factors)
    assert len(source) == sum(counts)
    seen: dict[Any, int] = {}
    for index in range(len(source)):
        seen[source[index]] = seen.get(source[index], 0) + 1
    for part, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        times = [seen[f"{'abc'[part]}{i}"] for i in range(size)]
        assert sum(times) == count and (not times or max(times) - min(times) <= 1)
        assert not times or min(times) >= 1
    with pytest.raises(IndexError):
        source[len(source)]


def test_what_is_seen_once_more_is_spread_over_the_source():
    source = MixtureSource([Numbers("a", 6), Numbers("b", 60)], [1.0, 1.5])
    rows = [row for number, row in map(source.locate, range(len(source))) if number == 1]
    assert len(rows) == 90
    often = [row for row in range(60) if rows.count(row) == 2]
    assert len(often) == 30 and max(np.diff(often)) == 2


def test_factors(tmp_path):
    assert parse_factors("1::2.5", 2) == [1.0, 2.5]
    for text, parts in (
        ("1", 2),
        ("1::x", 2),
        ("1::0", 2),
        ("1::-1", 2),
        ("1::nan", 2),
        ("inf", 1),
    ):
        with pytest.raises(DataError, match="--train-data-upsampling-factors"):
            parse_factors(text, parts)
    table = str(write_csv(tmp_path, 5))
    assert len(open_source(f"{table}::{table}", upsampling_factors="1::3")) == 20
    with pytest.raises(DataError, match=r"1e\+308 and 1 of mixed sources are further apart"):
        open_source(f"{table}::{table}", upsampling_factors="1::1e308")


def test_synthetic_pairs_are_fixed():
    source = open_source("ignored", "synthetic")
    assert np.array_equal(source[3].image, source[3].image) and source[3].image.shape == (
        224,
        224,
        3,
    )
    assert source[3].caption != source[4].caption
    with pytest.raises(DataError, match="data set types"):
        open_source("x", "wds")


def test_a_hundred_thousand_rows_cost_their_own_bytes():
    tracemalloc.start()
    column = TextColumn(f"images/{i:09d}.jpg" for i in range(100_000))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert column[99_999] == "images/000099999.jpg" and len(column) == 100_000
    assert held < 100_000 * (20 + 8) * 1.01 + 10_000
    assert peak < 3 * held


def test_file_names_that_are_no_text_survive(tmp_path):
    name = b"caf\xe9.jpg"
    for folder in ("cat", "dog"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dog" / "0.jpg").write_bytes(picture(0)[0])
    try:
        with open(bytes(tmp_path / "cat") + b"/" + name, "wb") as file:
            file.write(picture(0)[0])
    except OSError:
        return  # a file system that has text names only has no such problem
    source = ClassFolderSource(str(tmp_path))
    assert source[0].caption == "cat" and source[0].key.isprintable()


def test_an_image_file_that_is_too_large_is_not_read_whole(tmp_path, monkeypatch):
    path = write_csv(tmp_path, 2)
    monkeypatch.setattr(tables, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(BadSample, match="too large"):
        open_source(str(path))[0]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.tar"])
@pytest.mark.parametrize("what", ["a pipe", "a device", "a folder"])
def test_what_is_no_file_is_not_read(tmp_path, name, what):
    """A reader of a pipe would wait for good, one of /dev/zero for the end of memory."""
    path = tmp_path / name
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    kind = {".tar": "webdataset", ".tsv": "csv"}.get(path.suffix, path.suffix[1:])
    with pytest.raises(
        DataError, match=r"Not a regular file|Is a directory|no .tar|holds no"
    ) as caught:
        open_source(str(path), kind)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_pictures_and_captions_that_are_no_files_are_bad_samples(tmp_path):
    images = [name for name, _ in write_images(tmp_path, 4)]
    for name in images[1:3]:
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / images[1])
    (tmp_path / images[2]).symlink_to("/dev/zero")
    table = tmp_path / "t.csv"
    table.write_text("filepath\ttitle\n" + "".join(f"{name}\ta\n" for name in images))
    source = open_source(str(table))
    for row in (1, 2):
        with pytest.raises(BadSample, match="Not a regular file"):
            source[row]
    assert source[3].caption == "a"

    folder = write_folder(tmp_path / "folder", 3)
    caption = sorted(folder.glob("**/*.txt"))[1]
    caption.unlink()
    os.mkfifo(caption)
    source = open_source(str(folder))
    with pytest.raises(BadSample, match="Not a regular file"):
        source[1]
    assert source[2].caption


def test_lines_longer_than_any_row_take_no_memory(tmp_path):
    """They are read in pieces, and refused or counted by their length."""
    images = [name for name, _ in write_images(tmp_path, 2)]
    record = json.dumps({"image": images[0], "text": "a"}).encode()
    long = json.dumps({"image": images[1], "text": "x" * 2**24}).encode()
    (tmp_path / "t.jsonl").write_bytes(b"\n".join([record, b" " * 2**10, long, record, b""]))
    rows = "filepath\ttitle\n" + f"{images[0]}\ta\n" + f"{images[1]}\t" + "x\t" * 2**23 + "\n"
    (tmp_path / "t.csv").write_text(rows)
    del long, rows

    tracemalloc.start()
    source = open_source(str(tmp_path / "t.jsonl"))
    assert len(source) == 3 and source[2].caption == "a"
    with pytest.raises(BadSample, match=r"a line of .* bytes is too long"):
        source[1]
    with pytest.raises(DataError, match="line 3: more than 1048576 characters"):
        open_source(str(tmp_path / "t.csv"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24
