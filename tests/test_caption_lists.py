"""Captions in text files, as Flickr8k and Flickr30k come, wherever tables of captions are read."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
from shards import write_images

from clipcore.data import BadSample, DataError
from clipcore.data.folders import open_folder
from clipcore.data.pictures import by_picture, num_pictures
from clipcore.data.sources import left_out_of, noted_of, open_source
from clipcore.evaluate.datasets import open_set

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("cache_folder")]

# A quotation mark, a comma and a tab are text in a caption.
NUMBERED = '{0}#0\ta "dog, on\ta beach\n{0}#1\ta dog\n\n{1}#0\ta cat\r\n'
HEADED = '{2}image{1}caption\n{0[0]}{1}"a ""dog"", on a beach"\n{0[0]}{1}a dog\n{0[1]}{1}a cat\n'


def write(folder: Path, name: str, form: str = NUMBERED) -> Path:
    images = [path for path, _ in write_images(folder, 2)]
    path = folder / name
    path.write_bytes(form.format(*images).encode())
    return path


@pytest.mark.parametrize("name", ["Flickr8k.token.txt", "results_20130124.token", "a.TXT"])
def test_lines_of_numbered_captions_are_pairs(tmp_path, name):
    source = open_source(str(write(tmp_path, name)))
    assert [source.captions(row) for row in range(len(source))] == [
        'a "dog, on\ta beach',
        "a dog",
        "a cat",
    ]
    again = pickle.loads(pickle.dumps(source))
    assert again[2].caption == "a cat" and again[2].image.size == source[2].image.size
    assert not left_out_of(source)
    # Training and retrieval have each picture once.
    assert num_pictures(source) == 2 and by_picture(source)[0].caption[1] == "a dog"


@pytest.mark.parametrize("separator", ",\t;|")
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_header_shows_the_separator(tmp_path, separator, mark):
    images = [path for path, _ in write_images(tmp_path, 2)]
    path = tmp_path / "captions.txt"
    path.write_text(HEADED.format(images, separator, mark))
    source = open_source(str(path))
    assert [source[row].caption for row in range(3)] == ['a "dog", on a beach', "a dog", "a cat"]
    assert bool(noted_of(source)) == (separator != "\t")


@pytest.mark.parametrize("name", ["Flickr8k.token.txt", "captions.txt"])
def test_a_text_file_is_a_set_for_retrieval(tmp_path, name):
    form = NUMBERED if "token" in name else HEADED.format(("{0}", "{1}"), ",", "")
    data = open_set(str(write(tmp_path, name, form)))
    split = data.split("test")
    assert (data.task, len(split), split.source.name) == ("retrieval", 2, name)
    assert split.source[1].caption == ("a cat",) and len(split.source[0].caption) == 2


def test_lines_of_another_form_are_bad_samples_and_counted(tmp_path):
    path = write(tmp_path, "t.token.txt", NUMBERED + "{1}\tno number\n{1}#2 no tab\n{1}#3\t \n")
    source = open_source(str(path))
    assert str(left_out_of(source)) == (
        "2 x line without an image#number before a tab, such as line 5"
    )
    for row, reason in ((3, "line 5"), (4, "line 6"), (5, "empty caption")):
        with pytest.raises(BadSample, match=reason):
            source[row]
    # What is not there is one bad sample too, as Flickr8k has.
    path.write_text(path.read_text() + "2258277193.jpg.1#0\ta word\n")
    with pytest.raises(BadSample, match=r"2258277193\.jpg\.1: No such file"):
        open_source(str(path))[6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a dog on a beach\na cat\n", "neither a header .* nor 'image.jpg#0', a tab and a caption"),
        ("", "is empty; write a header"),
        ("\n \n", "is empty; write a header"),
        ("n01440764 tench\n", "is not a table of captions"),
        ("image,label\na.jpg,dog\n", "is not a table of captions"),
        ("word#0\ta caption\n", "is not a table of captions"),
        ("image,caption\n", "no rows"),
        ("none.jpg#0\ta dog\n", "none of the first 1 images"),
        ("caf\u00e9.jpg#0\ta dog\n".encode("latin-1"), "not UTF-8"),
        (b"x" * (1 << 21), "are not a row of an image and its captions"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, content, message):
    path = tmp_path / "t.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        open_source(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_columns_and_separators_of_the_user(tmp_path):
    path = write(tmp_path, "t.txt", "image!caption!title\n{0}!no!yes\n")
    source = open_source(str(path), img_key="image", caption_key="caption", separator="!")
    assert source[0].caption == "no"
    with pytest.raises(DataError, match=r"one of captions \(words\)"):
        open_source(str(path), caption_key="words", separator="!")


@pytest.mark.parametrize("name", ["captions.txt", "x.token.txt", "x.token"])
def test_a_folder_names_the_table_beside_its_images(tmp_path, name):
    path = write(tmp_path, name)
    with pytest.raises(DataError, match=r"but the table .*: name that as the data") as caught:
        open_folder(str(tmp_path), None, None, "pillow")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("form", [HEADED.format(("0.jpg", "1.jpg"), ",", ""), "0.jpg#0\ta dog\n"])
def test_folders_beside_a_table_without_its_images_are_no_classes(tmp_path, form):
    for name in ("Images", "Thumbs"):
        write_images(tmp_path / name, 2)
    path = tmp_path / "captions.txt"
    path.write_text(form.replace("0.jpg", "none.jpg").replace("1.jpg", "none.jpg"))
    with pytest.raises(DataError, match=r"none of the first . images .* move the table") as caught:
        open_folder(str(tmp_path), None, None, "pillow")
    assert str(path) in str(caught.value)
    # What is no table is passed over.
    path.write_text("a dog on a beach\n")
    assert open_folder(str(tmp_path), None, None, "pillow").classnames == ["Images", "Thumbs"]


@pytest.mark.parametrize("name", ["captions.txt", "Flickr8k.token.txt"])
def test_images_are_read_from_the_only_folder_that_holds_them(tmp_path, name, monkeypatch):
    form = NUMBERED if "token" in name else HEADED.format(("{0}", "{1}"), ",", "")
    write_images(tmp_path / "Flicker8k_Dataset", 2)
    folder = tmp_path / "Flicker8k_Dataset" / "images"
    (folder.parent / "licences").mkdir()
    path = tmp_path / "Flicker8k_Dataset" / name
    path.write_text(form.format("0000.jpg", "0001.jpg"))
    source = open_source(str(path))
    assert source[2].image.size and source.picture(0)[1] == "0000.jpg"
    assert list(source.picture_names())[2] == str(folder / "0001.jpg")
    assert "read from a folder beside it, such as images" in str(noted_of(source))

    # A table in the current folder has no folder in its name.
    monkeypatch.chdir(path.parent)
    assert list(open_source(name).picture_names())[2] == str(folder / "0001.jpg")
    # Of two folders with these names none is taken.
    shutil.copytree(folder, path.parent / "Thumbs")
    with pytest.raises(DataError, match=r"none of the first . images .* they lie in"):
        open_source(str(path))


def test_commas_without_quotation_marks_are_part_of_the_caption(tmp_path):
    rows = 'image,caption\n{0},A dog , a cat .\n{0},"a, b"\n{1},one,\n{1},"a, b",c\n'
    source = open_source(str(write(tmp_path, "captions.txt", rows)))
    assert [source.captions(row) for row in range(3)] == ["A dog , a cat .", "a, b", "one"]
    assert "1 x caption with commas and no quotation marks" in str(noted_of(source))
    # After a field in quotation marks comes another.
    with pytest.raises(BadSample, match="3 fields in a table of 2"):
        source.captions(3)
    # In a table of three columns nothing tells which field is cut.
    rows = "image,caption,number\n{0},A dog , a cat .,1\n"
    source = open_source(str(write(tmp_path / "3", "captions.txt", rows)))
    with pytest.raises(BadSample, match="4 fields in a table of 3"):
        source.captions(0)


@pytest.mark.parametrize("header", ["Image , Caption", "\n \nimage,caption", "image_name,comment"])
def test_headers_are_known_by_their_words(tmp_path, header):
    path = write(tmp_path, "captions.txt", header + "\n{0},a dog\n{1},a cat\n")
    source = open_source(str(path))
    assert [source[row].caption for row in range(len(source))] == ["a dog", "a cat"]


def test_a_column_is_named_in_any_capitals(tmp_path):
    path = write(tmp_path, "captions.txt", "image,Words\n{0},a dog\n")
    assert open_source(str(path), caption_key="Words")[0].caption == "a dog"


def test_a_space_before_the_number_is_no_part_of_the_name(tmp_path):
    path = write(tmp_path, "t.token", "{0} #0\ta dog\n\n{1}#0\ta cat\n")
    source = open_source(str(path))
    assert source[0].caption == "a dog" and source.picture(0)[1] == "images/0000.jpg"


@pytest.mark.parametrize("named", [{"img_key": "image"}, {"caption_key": "caption"}])
def test_columns_cannot_be_named_where_there_are_none(tmp_path, named):
    path = write(tmp_path, "t.token")
    for data in (path, tmp_path):
        with pytest.raises(DataError, match=r"no columns to name; leave --csv-img-key"):
            open_source(str(data), **named)
