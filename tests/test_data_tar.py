"""Tar shards: what webdataset would read is read, in any order; what could harm is refused, in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from runs import open_descriptors
from shards import picture, write_shards, write_tar

from clipcore.data import BadSample, DataError, tar
from clipcore.data.sources import open_source
from clipcore.data.tar import TarSource, build_index, load_index, scan_members, sidecar_paths

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("cache_folder")]


def sample(key: str, caption: str = "a caption") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", picture(0)[0]), (f"{key}.txt", caption.encode())]


def test_every_pair_comes_back_in_any_order_and_from_a_pickle(tmp_path):
    source = open_source(write_shards(tmp_path, num_shards=3, pairs_per_shard=7))
    assert len(source) == 21 and source.name == "{000..002}.tar"
    order = random.Random(0).sample(range(21), 21)
    for reader in (source, pickle.loads(pickle.dumps(source))):
        for index in order:
            pair = reader[index]
            data, caption = picture(index)
            assert pair.caption == caption
            assert pair.key == f"{index // 7:03d}.tar/{index:06d}"
            assert np.array_equal(np.asarray(pair.image), np.asarray(tar.decode_image(data)))
    for index in (-1, 21):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_members_are_those_of_the_standard_library(tmp_path, tar_format):
    path = tmp_path / "a.tar"
    names = ["a.jpg", "d/b.jpg", "x" * 90 + "/" + "y" * 60 + ".txt", "empty.txt", "n\u00e9.txt"]
    if tar_format != tarfile.USTAR_FORMAT:
        names.append("long/" * 60 + "z.txt")
    with tarfile.open(path, "w", format=tar_format) as archive:
        folder = tarfile.TarInfo("d")
        folder.type, folder.size = tarfile.DIRTYPE, 600  # a hint; nothing follows
        archive.addfile(folder)
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 0 if "empty" in name else 600 * number + 1
            member.mtime = 1234.5  # a fraction makes pax write an extended header
            archive.addfile(member, io.BytesIO(bytes([number]) * member.size))
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    assert [tuple(member)[:3] for member in scan_members(str(path))] == expected
    assert [name for name, _, _ in expected] == names


def test_sizes_of_large_files_in_base_256_and_in_pax_headers(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("a"))
    data = bytearray(path.read_bytes())
    size = len(picture(0)[0])
    data[124:136] = b"\x80" + size.to_bytes(11, "big")
    path.write_bytes(with_checksum(data, 0))
    assert next(iter(scan_members(str(path)))).size == size

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.txt")
        member.size, member.pax_headers = 5, {"size": "5"}
        archive.addfile(member, io.BytesIO(b"hello"))
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 136] = b"00000000000\0"  # only the extended header knows
    path.write_bytes(with_checksum(data, 1024))
    assert [m.size for m in scan_members(str(path))] == [5]


def with_checksum(data: bytearray, at: int) -> bytes:
    header = data[at : at + 512]
    header[148:156] = b" " * 8
    data[at + 148 : at + 156] = f"{sum(header):06o}\0 ".encode()
    return bytes(data)


def test_keys_end_at_the_first_dot_of_the_last_component(tmp_path):
    image = picture(0)[0]
    members = [
        ("d.e/0001.jpg", image),
        ("d.e/0001.seg.png", b"another kind"),
        ("d.e/0001.txt", b"one"),
        ("./0002.JPEG", image),
        ("./0002.json", json.dumps({"caption": "two"}).encode()),
        ("0003.txt", b"an image is missing"),
        (".0004.jpg", image),
        (".0004.txt", b"a hidden file has no key"),
        ("../../etc/0005.webp", image),
        ("../../etc/0005.txt", b"only a key"),
        ("__meta__", b""),
        ("0006.txt", b"six"),
        ("0007.txt", b"seven"),
        ("0006.jpg", image),
        ("0007.cls", b"7"),
    ]
    source = TarSource([str(write_tar(tmp_path / "a.tar", members))])
    found = {source[i].key.partition("/")[2]: source[i].caption for i in range(len(source))}
    assert found == {
        "d.e/0001": "one",
        "0002": "two",
        "../../etc/0005": "only a key",
        "0006": "six",
    }
    assert not any(path.name == "etc" for path in tmp_path.parent.parent.iterdir())


def test_a_shard_without_its_end_is_said(tmp_path):
    """Cut between two members, where nothing else shows it."""
    members = [m for i in range(4) for m in sample(f"{i:04d}")]
    path = write_tar(tmp_path / "whole.tar", members)
    assert str(TarSource([str(path)]).left_out) == ""
    with tarfile.open(path) as archive:
        cut_at = archive.getmembers()[4].offset
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:cut_at])
    source = TarSource([str(tmp_path / "cut.tar")])
    assert len(source) == 2
    assert str(source.left_out) == (
        "1 x shard without its end, which may be cut off, such as cut.tar"
    )


def test_numbered_copies_are_samples_of_their_own(tmp_path):
    """``photo.1.jpg`` has a text of its own, and is no field of the sample ``photo``."""
    image = picture(0)[0]
    names = ("photo", "photo.1", "photo.2", "photo.10", "1", "1.5")
    members = [(f"{n}.{s}", c) for n in names for s, c in (("jpg", image), ("txt", n.encode()))]
    members += [("photo.png", image), ("photo.3.jpg", image), ("photo.4.npy", b"an embedding")]
    source = TarSource([str(write_tar(tmp_path / "a.tar", members))])
    assert {source[i].caption for i in range(len(source))} == set(names)
    assert str(source.left_out) == "2 x further picture of a sample, such as photo.3.jpg"


def test_dots_inside_of_names_and_what_belongs_to_no_sample(tmp_path, monkeypatch):
    image = picture(0)[0]
    members = [
        ("shot 1.5 mm.jpg", image),
        ("shot 1.5 mm.txt", b"wide"),
        ("v1.2/b.c.jpeg", image),
        ("v1.2/b.c.json", b'{"caption": "letters"}'),
        ("lone.jpg", image),
        ("lone2.PNG", image),
        ("__a__.jpg", image),
        ("__a__.txt", b"no metadata"),
        ("c.jpg", image),
        ("c.txt", b"one sample"),
        ("c.mask.png", image),
        ("c.mask.json", b'{"caption": "no sample"}'),
        ("shot 1.5 mm.gif", image),
        ("A.jpg", image),
        ("a.txt", b"another case"),
        ("words.json", b"{}"),
        ("d.gif", image),
        ("d.txt", b"of a gif"),
        ("embedding.npy", b""),
        ("x.cls", b"7"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    source = TarSource([str(path)])
    found = {source[i].key.partition("/")[2]: source[i].caption for i in range(len(source))}
    assert found == {
        "__a__": "no metadata",
        "c": "one sample",
        "shot 1.5 mm": "wide",
        "v1.2/b.c": "letters",
    }
    said = (
        "2 x picture of another kind, such as shot 1.5 mm.gif; 1 x further picture of a sample, such as c.mask.png; "
        "3 x image without a caption, such as lone.jpg; 3 x caption without an image, such as a.txt"
    )
    assert str(source.left_out) == said
    # The kept index says the same.
    monkeypatch.setattr(tar, "build_index", lambda _: pytest.fail("made again"))
    assert str(TarSource([str(path)]).left_out) == said
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"holds no samples.*; found 1 x image without a caption"):
        TarSource([str(write_tar(tmp_path / "b.tar", members[4:5]))])


def test_text_wins_over_json_and_several_captions_stay_several(tmp_path):
    image = picture(0)[0]
    both = {"caption": ["first", "", "second"], "text": "x"}
    members = [
        ("a.jpg", image),
        ("a.json", b'{"caption": "json"}'),
        ("a.txt", b"text\n"),
        ("b.jpg", image),
        ("b.json", json.dumps(both).encode()),
    ]
    path = str(write_tar(tmp_path / "a.tar", members))
    source = open_source(path)
    assert source[0].caption == "text" and source[1].caption == ("first", "second")
    assert open_source(path, caption_key="text")[1].caption == "x"


@pytest.mark.parametrize(
    ("caption", "suffix", "reason"),
    [
        (b" \n\0", "txt", "empty caption"),
        (b"{", "json", "damaged JSON"),
        (b"[" * 100_000, "json", "damaged JSON"),
        (b"[1]", "json", "no caption"),
        (b'{"caption": 7}', "json", "not text but int"),
        (b'{"caption": []}', "json", "empty caption"),
        (b"x" * ((1 << 20) + 1), "txt", "too large"),
    ],
)
def test_captions_that_cannot_be_used_are_bad_samples(tmp_path, caption, suffix, reason):
    members = [("k.jpg", picture(0)[0]), (f"k.{suffix}", caption)]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    with pytest.raises(BadSample, match=reason) as caught:
        source[0]
    assert caught.value.key == "a.tar/k"


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    members = [("k.jpg", picture(0)[0]), ("k.txt", "\ufeffa cat\r\n".encode())]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert source[0].caption == "a cat"


def test_odd_captions_and_names_come_out_as_plain_text(tmp_path):
    members = [*sample("a\nb"), *sample("c"), *sample("d", "x" * 100_000)]
    members[3] = ("c.txt", b"caf\xc3\xa9\0 \xef\xbf\xbf")
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert source[0].key == "a.tar/a\ufffdb"
    assert source[1].caption == "caf\xe9  \uffff"
    assert len(source[2].caption) == 8192


def link(kind: bytes, name: str = "a.jpg") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.BLKTYPE, "block device"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
    ],
)
def test_what_points_elsewhere_is_refused(tmp_path, kind, word):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(link(kind))
    with pytest.raises(DataError, match=word):
        load_index(str(path))


def broken_shards(tmp_path: Path) -> dict[str, tuple[bytes, str]]:
    """Contents of damaged shards, and what the message says."""
    good = write_tar(tmp_path / "good.tar", sample("a")).read_bytes()

    def changed(start: int, field: bytes) -> bytes:
        data = bytearray(good)
        data[start : start + len(field)] = field
        return with_checksum(data, 0)

    long_name = bytearray(good)
    long_name[124:136], long_name[156:157] = b"00000011611\0", b"L"
    pax = bytearray(good)
    pax[156:157] = b"x"
    pax[124:136] = b"00000000020\0"
    bombs = {
        "pax length": b"99999 path=a\n",
        "pax sparse": b"25 GNU.sparse.size=999\n\0",
        "pax junk": b"path=a",
    }
    cases = {
        "gzip": (b"\x1f\x8b" + good, "gunzip it first"),
        "empty": (b"", "is empty"),
        "text": (b"this is no tar file" * 100, "not a tar file"),
        "cut in data": (good[:700], "cut off"),
        "cut in header": (good[: len(picture(0)[0]) // 512 * 512 + 1024 + 100], "damaged"),
        "too large": (changed(124, b"77777777777\0"), "cut off"),
        "negative": (changed(124, b"\xff" * 12), "valid size"),
        "base 256 overflow": (changed(124, b"\x80" + b"\xff" * 11), "cut off"),
        "no number": (changed(124, b"00000x00000\0"), "valid size"),
        "long name bomb": (with_checksum(long_name, 0), "extended header of"),
        "checksum": (good[:3] + b"X" + good[4:], "checksum"),
    }
    for name, record in bombs.items():
        data = pax.copy()
        data[512 : 512 + 32] = record.ljust(32, b"\0")
        cases[name] = (with_checksum(data, 0), "extended header|sparse")
    return cases


def test_damaged_shards_get_one_line_that_names_them(tmp_path):
    for name, (content, pattern) in broken_shards(tmp_path).items():
        path = tmp_path / f"{name.replace(' ', '-')}.tar"
        path.write_bytes(content)
        with pytest.raises(DataError, match=pattern) as caught:
            open_source(str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value), name
        assert not sidecar_paths(str(path))[0].exists()


def test_other_mistakes(tmp_path):
    with pytest.raises(DataError, match=r"no-000\.tar"):
        open_source(str(tmp_path / "no-{000..002}.tar"))
    with pytest.raises(DataError, match=r"no file matches .*\*\.tar"):
        open_source(str(tmp_path / "*.tar"))
    twice = write_tar(tmp_path / "twice.tar", [*sample("a"), *sample("b"), *sample("a")])
    with pytest.raises(DataError, match=r"twice\.tar holds 'a\.jpg' twice"):
        open_source(str(twice))
    lonely = write_tar(tmp_path / "lonely.tar", [("a.jpg", b""), ("b.txt", b"")])
    with pytest.raises(DataError, match=r"lonely\.tar holds no samples"):
        open_source(str(lonely))
    for command in ("pipe:cat a.tar", "pipe:aws s3 cp s3://bucket/{000..002}.tar -"):
        with pytest.raises(DataError, match="name the URL itself"):
            open_source(command)


def test_a_damaged_image_is_a_bad_sample_with_its_key(tmp_path):
    data = picture(1)[0]
    members = [("a.jpg", data[:-300]), ("a.txt", b"cut"), ("b.jpg", b""), ("b.txt", b"empty")]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    for index, reason in enumerate(("truncated", "empty")):
        with pytest.raises(BadSample, match=reason) as caught:
            source[index]
        assert caught.value.key == f"a.tar/{'ab'[index]}"


def test_the_index_is_made_once_and_kept_beside_the_shard(tmp_path, monkeypatch):
    path = str(write_tar(tmp_path / "a.tar", [*sample("a"), *sample("b")]))
    first = load_index(path)
    assert sidecar_paths(path)[0].exists() and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(tar, "build_index", lambda _: pytest.fail("made again"))
    again = load_index(path)
    assert np.array_equal(first.columns_6N, again.columns_6N)
    assert [again.key(i) for i in range(2)] == ["a", "b"]


def test_the_index_is_made_anew_when_the_shard_changed_or_the_index_is_damaged(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("a"))
    load_index(str(path))
    write_tar(path, [*sample("a"), *sample("b")])
    assert len(load_index(str(path))) == 2
    place = sidecar_paths(str(path))[0]
    content = place.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        data = bytearray(content)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        place.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        index = load_index(str(path))
        assert np.array_equal(index.columns_6N, build_index(str(path)).columns_6N)
        assert place.read_bytes() == content


def test_a_folder_that_cannot_be_written_puts_the_index_into_the_cache_then_into_memory(
    tmp_path, monkeypatch, cache_folder
):
    path = str(write_tar(tmp_path / "a.tar", sample("a")))
    write = tar._write_sidecar
    refused = {Path(path).parent}

    def write_unless_refused(place: Path, index: tar.ShardIndex) -> None:
        if place.parent in refused:
            raise PermissionError(13, "Permission denied")
        write(place, index)

    monkeypatch.setattr(tar, "_write_sidecar", write_unless_refused)
    assert len(load_index(path)) == 1
    assert len(list(cache_folder.iterdir())) == 1 and not sidecar_paths(path)[0].exists()
    refused.add(cache_folder)
    next(cache_folder.iterdir()).unlink()
    assert len(load_index(path)) == 1
    assert not list(cache_folder.iterdir())


def test_a_shard_that_changes_under_the_run_is_noticed(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*sample("a"), *sample("b")])
    source = TarSource([str(path)])
    source[0]
    write_tar(path, [*sample("a"), *sample("c")])
    os.utime(path, ns=(0, 1))
    source.close()
    with pytest.raises(DataError, match="changed after the run began"):
        source[0]


def test_few_shards_are_open_at_a_time_and_none_after_closing(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_OPEN_SHARDS", 2)
    source = open_source(write_shards(tmp_path, num_shards=5, pairs_per_shard=1))
    before = open_descriptors()
    for index in (0, 1, 2, 3, 4, 0, 1):
        source[index]
        assert open_descriptors() <= before + 2
    source.close()
    assert open_descriptors() <= before


def test_ten_thousand_samples_cost_their_own_bytes(tmp_path):
    path = str(write_tar(tmp_path / "a.tar", [
        (f"{i:09d}.{suffix}", b"x") for i in range(10_000) for suffix in ("jpg", "txt")
    ]))  # fmt: skip
    build_index(path)
    load_index(path)
    tracemalloc.start()
    index = load_index(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == 10_000
    assert held < 10_000 * (48 + 9) + 20_000  # six numbers and the key a sample
