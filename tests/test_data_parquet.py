"""Parquet tables: their copy is made once, of the table that is there, and nothing of it is used unchecked."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from runs import LIMIT_S
from shards import picture, write_parquet

from clipcore.data import BadSample, DataError, parquet
from clipcore.data.parquet import ParquetSource
from clipcore.data.pictures import PictureSource, by_picture
from clipcore.data.sources import open_source

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("cache_folder")]


def write_table(path: Path, images: Sequence[object], captions: Sequence[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": captions}), path)
    return path


def copy_of(folder: Path) -> Path:
    (copy,) = folder.glob("*.clipcore-rows")
    return copy


def test_parquet_is_written_out_once_and_again_when_it_changes(tmp_path):
    path = write_parquet(tmp_path, 3)
    open_source(str(path))
    copy = copy_of(tmp_path)
    first = copy.stat().st_mtime_ns
    open_source(str(path))
    assert copy.stat().st_mtime_ns == first
    write_parquet(tmp_path, 5)
    assert open_source(str(path))[4].caption == picture(4)[1]
    copy.write_bytes(b"damaged")
    assert open_source(str(path))[4].caption == picture(4)[1]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_leaves_the_copy_in_the_cache(
    tmp_path, cache_folder, monkeypatch
):
    path = write_parquet(tmp_path / "data", 3)
    own_open = os.open

    def refuse(name, flags, *arguments, **keywords):
        if str(name).startswith(str(tmp_path / "data")) and flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(13, "Permission denied")
        return own_open(name, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    for _ in range(2):
        assert open_source(str(path))[2].caption == picture(2)[1]
    assert copy_of(cache_folder) and os.listdir(tmp_path / "data") == ["pairs.parquet"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    with pytest.raises(DataError, match=r"neither .* nor .* can be written; make room"):
        open_source(str(path))


def test_no_flipped_bit_gives_another_pair(tmp_path):
    """A copy that was opened, and one that is opened: a row is right, or it is named as damaged."""
    path = write_table(
        tmp_path / "t.parquet", [picture(i)[0] for i in range(3)], [["a"], ["b", "c"], ["d"]]
    )
    source = ParquetSource(str(path))
    pairs = [source[i] for i in range(3)]
    opened, content = pickle.dumps(source), copy_of(tmp_path).read_bytes()
    size, stat = len(content), copy_of(tmp_path).stat()
    index_at = size - 24 - 8 - 144  # somewhat before the index
    flips = random.Random(0)
    places = [flips.randrange(8 * size) for _ in range(60)]
    places += [flips.randrange(8 * index_at, 8 * size) for _ in range(190)]
    num_damaged = num_made_again = 0
    for place in places:
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        copy_of(tmp_path).write_bytes(changed)
        os.utime(copy_of(tmp_path), ns=(stat.st_mtime_ns, stat.st_mtime_ns))
        # First the one that has been opened before, as the other may make the copy again.
        for is_opened in (True, False):
            reader = pickle.loads(opened) if is_opened else ParquetSource(str(path))
            for row, (image, captions, key) in enumerate(pairs):
                try:
                    pair = reader[row]
                except BadSample as error:
                    assert "delete that file, and it is made again" in str(error)
                    num_damaged += 1
                    continue
                except DataError as error:
                    # Its index is no longer what it was.
                    assert is_opened and "was changed after the run began" in str(error)
                    break
                assert pair[1:] == (captions, key) and pair.image.tobytes() == image.tobytes()
        num_made_again += copy_of(tmp_path).read_bytes() == content
    assert num_damaged > 60 and num_made_again > 20


def test_a_copy_that_is_cut_or_of_another_kind_is_made_again(tmp_path):
    path = write_parquet(tmp_path, 3)
    open_source(str(path))
    copy = copy_of(tmp_path)
    content = copy.read_bytes()
    for changed in (
        b"",
        content[:-1],
        content[:40],
        content + b"x",
        content[1:],
        b"\0" * len(content),
    ):
        copy.write_bytes(changed)
        assert open_source(str(path))[2].caption == picture(2)[1]
        assert copy.read_bytes() == content
    copy.unlink()
    os.mkfifo(copy)
    assert open_source(str(path))[2].caption == picture(2)[1]
    assert copy.read_bytes() == content


def test_a_copy_that_is_replaced_under_a_run_is_noticed(tmp_path):
    """By one of another table; one that another rank has made again has the same bytes."""
    path = write_parquet(tmp_path, 3)
    later = pickle.dumps(open_source(str(path)))
    copy = copy_of(tmp_path)
    copy.write_bytes(copy.read_bytes())
    assert pickle.loads(later)[2].caption == picture(2)[1]
    write_parquet(tmp_path, 4)
    open_source(str(path))
    with pytest.raises(DataError, match="was changed after the run began; start the run again"):
        pickle.loads(later)[0]


def open_and_read(path: str, gate: Any, answers: Any) -> None:
    """Be one of several ranks that begin at once."""
    source = open_source(path)
    gate.wait(LIMIT_S)  # all have their index
    answers.put([source[i].caption for i in range(len(source))])


def test_ranks_that_begin_at_once_make_one_copy(tmp_path):
    path = write_parquet(tmp_path, 40)
    context = multiprocessing.get_context("fork")
    gate, answers = context.Barrier(4), context.Queue()
    arguments = (str(path), gate, answers)
    ranks = [context.Process(target=open_and_read, args=arguments) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for _ in ranks:
        assert answers.get(timeout=LIMIT_S) == [picture(i)[1] for i in range(40)]
    for rank in ranks:
        rank.join(LIMIT_S)
        assert rank.exitcode == 0
    assert sorted(os.listdir(tmp_path)) == ["pairs.parquet", "pairs.parquet.clipcore-rows"]


def test_tables_of_empty_groups_are_read_and_damaged_ones_named(tmp_path):
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"image": [picture(0)[0], picture(1)[0]], "caption": ["a", "b"]})
    checked = {"write_page_checksum": True, "write_statistics": False, "compression": "none"}
    with pyarrow.parquet.ParquetWriter(path, table.schema, **checked) as writer:
        for rows in (table.slice(0, 0), table, table.slice(0, 0)):
            writer.write_table(rows)
    assert [open_source(str(path))[i].caption for i in range(2)] == ["a", "b"]

    content = bytearray(path.read_bytes())
    content[content.index(picture(1)[0][:200]) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the table .*t.parquet: ") as caught:
        open_source(str(path))
    assert "\n" not in str(caught.value) and "make room" not in str(caught.value)

    twice = pyarrow.Table.from_arrays(
        [*table.columns, table.column("caption")], ["image", "text", "text"]
    )
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(DataError, match="several columns 'text'; rename them"):
        open_source(str(path))


def test_rows_of_one_picture_are_there_once(tmp_path):
    first, second = picture(0)[0], picture(1)[0]
    images = [first, second, first, {"bytes": None}]
    images = [
        {"bytes": i, "path": "x"} if isinstance(i, bytes) else {**i, "path": "x"} for i in images
    ]
    path = write_table(tmp_path / "t.parquet", images, ["one", "two", "three", "four"])
    source = open_source(str(path))
    assert copy_of(tmp_path).read_bytes().count(first) == 1
    grouped = by_picture(source)
    assert isinstance(grouped, PictureSource) and len(grouped) == 3
    assert grouped[0].caption == ("one", "three") and grouped[1].caption == ("two",)
    with pytest.raises(BadSample, match="no bytes in the column 'image'"):
        grouped[2]
    plain = open_source(str(write_parquet(tmp_path / "plain", 3)))
    assert by_picture(plain) is plain


def test_parquet_cells_that_are_no_text_are_bad_samples(tmp_path):
    import pyarrow
    import pyarrow.parquet

    raw = pyarrow.array([b"\xff\xfe", b"fine"]).cast(pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    table = pyarrow.table({"image": [picture(0)[0]] * 2, "caption": text})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    with pytest.raises(BadSample, match="an unreadable cell") as caught:
        source[0]
    assert caught.value.key == "t.parquet, row 1" and source[1].caption == "fine"


def test_tables_that_swell_are_refused(tmp_path, monkeypatch):
    """By what their own headers say, and by what comes out."""
    one = write_table(tmp_path / "one.parquet", [bytes(2**23)] * 5, ["a"] * 5)
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(one), one, compression="zstd")
    monkeypatch.setattr(parquet, "MAX_IMAGE_BYTES", 2**22)
    with pytest.raises(DataError, match=r"one.parquet: .* bytes of 'image' in 5 rows") as caught:
        open_source(str(one))
    assert "\n" not in str(caught.value) and len(list(tmp_path.iterdir())) == 1

    # No group of rows is large.
    images = [bytes(2**16) + bytes([i]) for i in range(64)]
    pyarrow.parquet.write_table(
        pyarrow.table({"image": images, "caption": ["a"] * 64}),
        tmp_path / "many.parquet",
        row_group_size=1,
        compression="zstd",
    )
    monkeypatch.setattr(parquet, "MAX_SMALL_COPY_BYTES", 2**20)
    with pytest.raises(DataError, match=r"more than .* bytes come out of a table"):
        open_source(str(tmp_path / "many.parquet"))
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.clipcore-rows"))


def test_a_table_of_paths_says_that_it_holds_no_images(tmp_path):
    columns = {"url": ["https://a/b.jpg"], "caption": ["x"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"holds texts in 'url', .* with img2dataset, first"):
        open_source(str(tmp_path / "t.parquet"), img_key="url")


def test_rows_of_nothing_are_refused_by_their_number(tmp_path):
    number = 200_000
    columns = {"image": pyarrow.nulls(number, pyarrow.binary()), "caption": ["x"] * number}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t.parquet: 200,000 rows in [\d,]+ bytes are not images"):
        open_source(str(tmp_path / "t.parquet"))


def test_a_cell_that_is_too_large_is_a_bad_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_IMAGE_BYTES", 2**20)
    large = random.Random(0).randbytes(2**20 + 1)
    path = write_table(
        tmp_path / "t.parquet",
        [large, picture(0)[0], picture(0)[0]],
        [["a"], ["x" * 8000] * 200, ["c"]],
    )
    source = open_source(str(path))
    for row, reason in (
        (0, "1048577 bytes are too large"),
        (1, "captions of .* bytes are too long"),
    ):
        with pytest.raises(BadSample, match=reason):
            source[row]
    assert source[2].caption == ("c",)


def test_each_choice_of_columns_has_a_copy_of_its_own(tmp_path):
    """A worker of a training run opens its copy after an evaluation of other columns of the same table has begun."""
    first, second = ([picture(i)[0] for i in rows] for rows in ((0, 1), (2, 3)))
    columns = {"image": first, "right": second, "caption": ["a", "b"], "german": ["c", "d"]}
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)

    choices: list[tuple[dict[str, Any], Sequence[bytes], Sequence[str]]] = [
        ({}, first, "ab"),
        ({"has_captions": False}, first, ["", ""]),
        ({"img_key": "right"}, second, "ab"),
        ({"img_key": "right", "has_captions": False}, second, ["", ""]),
        ({"caption_key": "german"}, first, "cd"),
    ]
    sources = [ParquetSource(str(path), **options) for options, _, _ in choices]
    assert len(list(tmp_path.glob("t.parquet*.clipcore-rows"))) == len(choices)
    for source, (_, images, captions) in zip(sources, choices, strict=True):
        for row in range(2):
            assert source.captions(row) == captions[row]
            with Image.open(io.BytesIO(images[row])) as image:
                assert source.picture(row)[0].tobytes() == image.convert("RGB").tobytes()


def test_the_usual_columns_keep_the_name_of_their_copy_however_they_are_named(tmp_path):
    path = write_parquet(tmp_path, 2)
    open_source(str(path))
    ParquetSource(str(path), "image", "caption")
    assert sorted(os.listdir(tmp_path)) == ["pairs.parquet", "pairs.parquet.clipcore-rows"]
