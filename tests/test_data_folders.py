"""Folders as people have them: links, files of other programs, tables of captions, names that are ids."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
from shards import picture, write_images

from clipcore.data import BadSample, DataError
from clipcore.data.folders import ClassFolderSource, walk
from clipcore.data.sources import left_out_of, open_source
from clipcore.evaluate.tasks import class_folders

pytestmark = pytest.mark.fast


def put(path: Path, content: bytes | str | None = None) -> Path:
    """Write a file; without content, a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = picture(0)[0] if content is None else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_classes(folder: Path, *names: str) -> Path:
    """One picture a class."""
    for name in names:
        put(folder / name / "0.jpg")
    return folder


def test_what_a_folder_does_not_hand_out_is_counted_by_reason(tmp_path):
    for name in ("a.jpg", "shot 1.5 mm.jpg", "b.jpg", "c.gif", "d.jfif", "._a.jpg", ".hidden.jpg"):
        put(tmp_path / "in" / name)
    for name in ("a.txt", "shot 1.5 mm.txt", "c.txt", "lone.json", "._a.txt", "readme.md"):
        put(tmp_path / "in" / name, "words")
    put(tmp_path / ".cache" / "x.jpg")
    put(tmp_path / ".cache" / "x.txt", "words")
    source = open_source(str(tmp_path))
    assert sorted(source[i].key for i in range(len(source))) == ["in/a.jpg", "in/shot 1.5 mm.jpg"]
    assert str(left_out_of(source)) == (
        "1 x image without a caption, such as in/b.jpg; 2 x picture of another kind, such as in/c.gif; "
        "2 x caption without an image, such as in/c.txt"
    )


def test_a_caption_in_another_encoding_is_a_bad_sample(tmp_path):
    """Not a caption with holes: read as UTF-8, a word of Latin-1 loses its letters without a word."""
    put(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "a.txt").write_bytes("a caf\u00e9".encode("latin-1"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.jpg", "a.txt"):
            tar.add(tmp_path / "in" / name, name)
    for path in (tmp_path / "in", tmp_path / "a.tar"):
        with pytest.raises(
            BadSample, match=r"the caption is not UTF-8 \(byte 0xe9\); convert it with iconv"
        ):
            _ = open_source(str(path))[0]


def test_a_folder_that_holds_no_pair_says_what_it_holds(tmp_path):
    write_images(tmp_path / "a" / "one", 1)
    put(tmp_path / "a" / "one" / "images" / "other.txt", "words")
    with pytest.raises(DataError, match=r"which makes one class.*metadata.csv"):
        open_source(str(tmp_path / "a"))
    put(tmp_path / "b" / "x" / "1.gif")
    with pytest.raises(DataError, match=r"holds no image .*; found 1 x picture of another kind"):
        open_source(str(tmp_path / "b"))


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path):
    store = write_classes(tmp_path / "store", "n1", "n2")
    classes = tmp_path / "classes"
    classes.mkdir()
    (classes / "cat").symlink_to(store / "n1")
    (classes / "dog").symlink_to("../store/n2")
    (store / "n1" / "up").symlink_to(store)
    (store / "n2" / "self").symlink_to(".")
    source = ClassFolderSource(str(classes))
    assert source.classnames == ["cat", "dog"]
    # By way of the link up, n1 holds n2's picture too; each folder is entered once on a way.
    assert [source[i].key for i in range(len(source))] == [
        "cat/0.jpg",
        "cat/up/n2/0.jpg",
        "dog/0.jpg",
    ]


def test_odd_entries_cost_no_data(tmp_path):
    write_classes(tmp_path, "cat", "dog")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latest").symlink_to("cat")
    (tmp_path / "lost+found").mkdir(mode=0)
    source = ClassFolderSource(str(tmp_path))
    assert source.classnames == ["cat", "dog"] and len(source) == 2


def test_names_come_in_order_and_folders_behind_files(tmp_path):
    for name in ("b/2.jpg", "b/1.jpg", "a/c/3.jpg", "a/4.jpg", "5.jpg"):
        put(tmp_path / name)
    found = [os.path.join(folder, name) for folder, names in walk(str(tmp_path)) for name in names]
    assert found == ["5.jpg", "a/4.jpg", "a/c/3.jpg", "b/1.jpg", "b/2.jpg"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write_classes(tmp_path, "cat", "dog")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read the folder .*dog: Permission denied"):
        ClassFolderSource(str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ("misc", "n01440764"),
        ("0", "1"),
        ("n01440764", "n01443537"),
        ("class_0", "class_1"),
        ("cls01", "id_3"),
        ("1f600", "1f601"),
        ("001.Black_footed", "002.Laysan"),
        ("n01440764_tench", "n01443537_goldfish"),
        ("0x1f", "0x2a"),
    ],
)
def test_classes_named_by_ids_are_refused_until_they_are_named(tmp_path, names):
    write_classes(tmp_path, *names)
    for read in (lambda: open_source(str(tmp_path)), lambda: class_folders(tmp_path)):
        with pytest.raises(DataError, match=r"named by ids or numbers.*classes.json, an object"):
            read()
    (tmp_path / "classes.json").write_text(json.dumps({names[0]: "tench"}))
    with pytest.raises(
        DataError, match=f"named by ids or numbers, such as {names[1]}".replace("_", " ")
    ):
        open_source(str(tmp_path))
    (tmp_path / "classes.json").write_text(json.dumps({names[0]: "tench", names[1]: "goldfish"}))
    assert class_folders(tmp_path).classnames == ["tench", "goldfish"]
    # And the training reads the same names.
    source = open_source(str(tmp_path))
    assert [source[i].caption for i in range(2)] == ["tench", "goldfish"]


def test_names_with_numbers_in_them_are_names(tmp_path):
    """Of aircraft and cars; and one number of many."""
    for number, names in enumerate(
        (
            ["707-320", "A300B4", "DC-10", "F-16A", "E-170"],
            ["10_euro", "20_euro", "5_euro"],
            ["1_person", "2_people"],
            ["A320", "B747", "C130"],
            ["c3", "c4"],
            ["cafe1", "dada2"],
        )
    ):
        source = ClassFolderSource(str(write_classes(tmp_path / str(number), *names)))
        assert source.classnames == [name.replace("_", " ") for name in sorted(names)]
    mixed = write_classes(tmp_path / "b", "0", "1", "cat", "dog")
    with pytest.raises(DataError, match="named by ids or numbers"):
        ClassFolderSource(str(mixed))


def test_digits_may_be_names_where_somebody_says_so(tmp_path):
    write_classes(tmp_path, "0", "1")
    (tmp_path / "classes.json").write_text('{"0": "0", "1": "1"}')
    assert class_folders(tmp_path).classnames == ["0", "1"]


def test_a_prompt_without_a_place_for_the_name_is_named_with_its_file(tmp_path):
    write_classes(tmp_path, "cat", "dog")
    put(tmp_path / "templates.json", json.dumps(["a {}", "a {c}", "a\nphoto"]))
    with pytest.raises(DataError, match=r"templates.json: the prompt 'a.photo' has no {}"):
        class_folders(tmp_path)


def test_folders_of_other_programs_are_no_classes(tmp_path):
    write_classes(tmp_path, "cat", "dog", ".ipynb_checkpoints", "__MACOSX")
    source = ClassFolderSource(str(tmp_path))
    assert source.classnames == ["cat", "dog"]
    assert str(source.left_out) == "1 x image outside of class folders, such as __MACOSX/0.jpg"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classes.json", '["cat"]', "is not an object of folder names"),
        ("classes.json", '{"cat": 3}', "is not an object of folder names"),
        ("classes.json", "{", "cannot read .*classes.json"),
        ("classes.json", "[" * 100_000, "cannot read .*classes.json"),
        ("classes.json", '{"cow": "a cow"}', "names none of the folders beside it, such as cat"),
        ("templates.json", "[]", "is not a list of prompts"),
        ("templates.json", "[3]", "is not a list of prompts"),
    ],
)
def test_names_and_prompts_that_cannot_be(tmp_path, name, content, message):
    write_classes(tmp_path, "cat", "dog")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        class_folders(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "Metadata.CSV", "metadata.jsonl"])
@pytest.mark.parametrize("inner", ["", "train"])
def test_tables_of_captions_in_the_folder_or_one_below(tmp_path, name, inner):
    folder = tmp_path / "set" / inner
    rows = write_images(folder, 2)
    if name.lower().endswith("csv"):
        lines = ["file_name,text", *(f'{image},"{caption}"' for image, caption in rows)]
    else:
        lines = [json.dumps({"file_name": image, "text": caption}) for image, caption in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    source = open_source(str(tmp_path / "set"))
    assert source.name == "set"
    assert [source[i].caption for i in range(2)] == [caption for _, caption in rows]


@pytest.mark.parametrize("separator", ["\t", ";", ","])
def test_a_table_of_a_folder_may_have_other_separators(tmp_path, separator):
    rows = write_images(tmp_path, 2)
    lines = [("file_name", "text"), *((image, "words") for image, _ in rows)]
    put(tmp_path / "metadata.csv", "".join(f"{a}{separator}{b}\n" for a, b in lines))
    source = open_source(str(tmp_path))
    assert [source[i].caption for i in range(2)] == ["words", "words"]
    assert str(left_out_of(source)) == ""


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_images_that_a_table_does_not_name_are_counted(tmp_path, name):
    (image, _), *_ = write_images(tmp_path, 3)
    line = f"file_name,text\n./{image},words\n"
    if name.endswith("jsonl"):
        line = json.dumps({"file_name": f"./{image}", "text": "words"}) + "\n"
    put(tmp_path / name, line)
    source = open_source(str(tmp_path))
    assert len(source) == 1
    assert str(left_out_of(source)) == (
        "2 x image that the table does not name, such as images/0001.jpg"
    )


@pytest.mark.parametrize(
    "names", [("train", "val"), ("Train", "test_set"), ("images_1", "images_2"), ("dev", "data")]
)
def test_parts_of_a_data_set_are_no_classes(tmp_path, names):
    write_classes(tmp_path, *names)
    with pytest.raises(DataError, match="named as parts of a data set, not as classes; name one"):
        open_source(str(tmp_path))
    put(tmp_path / "classes.json", json.dumps({names[0]: "steam train"}))
    assert "steam train" in ClassFolderSource(str(tmp_path)).classnames
    # One class of many may be called so.
    assert (
        len(ClassFolderSource(str(write_classes(tmp_path / "b", "train", "car"))).classnames) == 2
    )


@pytest.mark.parametrize(
    "table", ["metadata.tsv", "captions.jsonl", "pairs.csv", "cat/captions.csv"]
)
def test_class_folders_with_a_table_of_captions_in_sight_are_refused(tmp_path, table):
    write_classes(tmp_path, "cat", "dog")
    image = "0.jpg" if table.startswith("cat/") else "cat/0.jpg"
    rows = [("file_name", "text"), (image, "a black cat")]
    separator = "\t" if table.endswith("tsv") else ","
    content = "".join(f"{a}{separator}{b}\n" for a, b in rows)
    if table.endswith("jsonl"):
        content = json.dumps({"file_name": image, "text": "a black cat"}) + "\n"
    put(tmp_path / table, content)
    with pytest.raises(DataError, match=rf"but the table .*{table}: name that as the data"):
        open_source(str(tmp_path))
    # An evaluation of class folders reads no captions.
    assert ClassFolderSource(str(tmp_path)).classnames == ["cat", "dog"]


@pytest.mark.parametrize(
    "other", ["labels.csv", "cat/metadata.yaml", "cat/captions.png", "README.txt", "cat/a.csv"]
)
def test_other_files_beside_class_folders_are_no_captions(tmp_path, other):
    write_classes(tmp_path, "cat", "dog")
    put(tmp_path / other, None if other.endswith("png") else "id,breed\n1,tabby\n")
    assert open_source(str(tmp_path)).classnames == ["cat", "dog"]


def test_links_and_folders_that_give_no_class_are_counted(tmp_path):
    write_classes(tmp_path, "cat", "dog")
    (tmp_path / "owl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "kitty").symlink_to(tmp_path / "cat")
    (tmp_path / "empty").mkdir()
    source = ClassFolderSource(str(tmp_path))
    assert source.classnames == ["cat", "dog"]
    said = str(source.left_out)
    for reason in (
        "1 x link to a folder that comes under its own name, such as kitty",
        "1 x link that leads nowhere, such as owl",
        "1 x folder without a picture, such as empty",
    ):
        assert reason in said


def test_tables_in_subfolders_beside_other_images_are_for_the_user_to_choose_from(tmp_path):
    for split in ("train", "test"):
        rows = write_images(tmp_path / split, 1)
        (tmp_path / split / "metadata.csv").write_text(f"file_name,text\n{rows[0][0]},words\n")
    with pytest.raises(DataError, match=r"images lie outside of its folder too; name the folders"):
        open_source(str(tmp_path))
    both = open_source(f"{tmp_path}/train::{tmp_path}/test")
    assert len(both) == 2
    (tmp_path / "test" / "metadata.csv").unlink()
    with pytest.raises(DataError, match=r"train/metadata.csv is a table of captions, but images"):
        open_source(str(tmp_path))


def test_a_table_without_captions_is_no_table_of_captions(tmp_path):
    put(tmp_path / "a.jpg")
    put(tmp_path / "a.txt", "words")
    put(tmp_path / "metadata.csv", "isic_id,age\n1,40\n")
    source = open_source(str(tmp_path))
    assert source[0].caption == "words"
    assert "1 x table without columns that are read" in str(left_out_of(source))
    (tmp_path / "metadata.csv").rename(tmp_path / "metadata.parquet")
    assert open_source(str(tmp_path))[0].caption == "words"
    (tmp_path / "metadata.parquet").rename(tmp_path / "metadata.csv")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match="its columns are isic_id, age"):
        open_source(str(tmp_path))
    (tmp_path / "metadata.csv").rename(tmp_path / "metadata.parquet")
    with pytest.raises(DataError, match=r"not read from parquet; write it as metadata.csv"):
        open_source(str(tmp_path))


def test_quotation_marks_of_a_table_in_a_folder_may_be_text(tmp_path):
    rows = write_images(tmp_path, 1)
    put(tmp_path / "metadata.csv", f'file_name,text\n{rows[0][0]},"a lone mark\n')
    with pytest.raises(DataError, match="--csv-no-quotes"):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path), quotes=False)[0].caption == '"a lone mark'


def test_a_large_flat_folder_is_listed_and_not_asked_for_each_file(tmp_path, monkeypatch):
    for index in range(50):
        put(tmp_path / f"{index}.jpg")
        put(tmp_path / f"{index}.txt", "words")
    asked = []
    for name in ("stat", "lstat"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=function, **k: (asked.append(a), f(*a, **k))[1])
    assert len(open_source(str(tmp_path))) == 50
    assert len(asked) < 20
