"""Prepared shards: a function of source and settings, whole or not there, and equal in training to what they are of."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image
from runs import LIMIT_S, PROGRAMS, ROOT, wait_until
from shards import picture, write_csv, write_folder, write_parquet, write_shards, write_tar

from clipcore.data import BadSample, DataError, shards
from clipcore.data.loader import PairLoader
from clipcore.data.prepare import MANIFEST, Settings, main, prepare
from clipcore.data.raw import decode_raw, encode_raw
from clipcore.data.shards import ImageFormat, shard_key
from clipcore.data.sources import open_source
from clipcore.data.tar import TarSource, load_index, sidecar_paths
from clipcore.data.transforms import Decoder, ImageTransform, decode_image, resize_shorter

SIZE = 30  # below the 36 to 42 pixels of the pictures


def settings(kind: str = "raw", shard_size: int = 8, size: int = SIZE) -> Settings:
    return Settings(ImageFormat(kind, size), shard_size)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def resized(index: int) -> np.ndarray:
    return np.asarray(resize_shorter(decode_image(picture(index)[0]), SIZE))


@pytest.mark.parametrize("write", [write_csv, write_folder, write_parquet])
@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_pairs_of_a_source_come_back_resized_in_order(tmp_path, write, kind):
    made = prepare(str(write(tmp_path / "source", 20)), tmp_path / "out", settings(kind))
    source = open_source(str(tmp_path / "out"))
    assert len(source) == 20 and [len(shard) for shard in source.shards] == [8, 8, 4]
    assert sum(report.pairs for report in made.shards.values()) == 20
    for index in range(20):
        pair = source[index]
        assert pair.caption == picture(index)[1]
        gap = np.abs(np.asarray(pair.image).astype(int) - resized(index))
        # Raw pixels are those of the resized image; a JPEG of quality 95 halves the colours' resolution.
        assert gap.max() == 0 if kind == "raw" else gap.mean() < 6
        assert pair.key.startswith(f"{index // 8:05d}.tar/")
    if write is not write_parquet:
        assert [source[i].key.partition("/")[2] for i in (0, 13)] == ["images/0000", "images/0013"]


def test_keys_of_shards_are_kept_and_small_images_are_not_enlarged(tmp_path):
    data = write_shards(tmp_path / "source", num_shards=2, pairs_per_shard=5)
    prepare(data, tmp_path / "out", settings(size=64))
    source = open_source(str(tmp_path / "out"))
    for index in range(10):
        assert source[index].key == f"{index // 8:05d}.tar/{index:06d}"
        assert np.array_equal(source[index].image, np.asarray(decode_image(picture(index)[0])))


def test_members_are_what_numpy_writes_and_other_readers_take(tmp_path):
    prepare(write_shards(tmp_path / "source", 1, 3), tmp_path / "out", settings())
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        names = [member.name for member in archive]
        assert names == [f"{i:06d}.{suffix}" for i in range(3) for suffix in ("npy", "txt")]
        for index in range(3):
            data = archive.extractfile(f"{index:06d}.npy").read()
            saved = io.BytesIO()
            np.save(saved, resized(index))
            assert data == saved.getvalue()
            assert np.array_equal(np.load(io.BytesIO(data), allow_pickle=False), resized(index))


def test_bytes_do_not_depend_on_the_number_of_processes_and_the_index_is_there(tmp_path):
    data = str(write_csv(tmp_path / "source", 30))
    for workers in (1, 2):
        prepare(data, tmp_path / str(workers), settings(), workers)
    one, two = (contents(tmp_path / str(workers)) for workers in (1, 2))
    assert one == two and len(one) == 4
    for name in one:
        path = str(tmp_path / "2" / name)
        assert sidecar_paths(path)[0].exists() and len(load_index(path)) in (8, 6)
    manifests = [json.loads((tmp_path / w / MANIFEST).read_text()) for w in "12"]
    assert manifests[0] == manifests[1] and manifests[0]["source"]["samples"] == 30


def test_several_captions_stay_several(tmp_path):
    images = [(f"{i}.jpg", picture(i)[0]) for i in range(2)]
    captions = [["one", "zw\u00f6lf"], "three"]
    texts = [(f"{i}.json", json.dumps({"caption": c}).encode()) for i, c in enumerate(captions)]
    prepare(str(write_tar(tmp_path / "a.tar", images + texts)), tmp_path / "out", settings())
    source = open_source(str(tmp_path / "out"))
    assert source[0].caption == ("one", "zw\u00f6lf") and source[1].caption == "three"


def test_keys_become_what_webdataset_takes_and_unique_in_a_shard(tmp_path):
    source = open_source("ignored", "synthetic")
    for key, expected in {
        "images/0001.jpg": "images/0001",
        "/data/../a.b/photo.v2.JPEG": "data/a.b/photo_v2",
        "DejaVuSans.ttf/U+0041": "DejaVuSans.ttf/U+0041",
        "pairs.parquet, row 7": "pairs_parquet, row 7",
        "__meta__": "key__meta__",
        "..": "sample",
        "a/.hidden.png": "a/_hidden",
        f"{'x' * 300}..{'/b' * 98}/c": f"{'b/' * 98}c",  # cut to 200 characters: what is left of it leads nowhere else
    }.items():
        assert shard_key(source, 0, key) == expected
    data, caption = picture(0)
    table = tmp_path / "pairs.csv"
    (tmp_path / "a.jpg").write_bytes(data)
    table.write_text("filepath\ttitle\n" + f"a.jpg\t{caption}\n" * 3)
    prepare(str(table), tmp_path / "out", settings())
    prepared = open_source(str(tmp_path / "out"))
    keys = [prepared[i].key.partition("/")[2] for i in range(3)]
    assert keys == ["a", "a-1", "a-2"]


def test_bad_samples_are_left_out_and_listed(tmp_path, capsys):
    folder = write_folder(tmp_path / "source", 10)
    (folder / "images" / "0003.jpg").write_bytes(picture(3)[0][:-300])
    (folder / "images" / "0009.txt").write_text("  ")
    flags = ["--output", str(tmp_path / "out"), "--shard-size", "4", "--workers", "2", "--quiet"]
    assert main([str(folder), *flags]) == 0
    listed = json.loads((tmp_path / "out" / MANIFEST).read_text())["shards"]
    assert [(name, len(report["bad"])) for name, report in listed.items()] == [
        ("00000.tar", 1),
        ("00001.tar", 0),
        ("00002.tar", 1),
    ]
    row, key, reason = listed["00000.tar"]["bad"][0]
    assert (row, key) == (3, "images/0003.jpg") and "truncated" in reason.lower()
    printed = capsys.readouterr().out
    flags[1] = str(tmp_path / "none")
    assert main([str(folder), *flags, "--max-pixels", "9"]) == 2
    assert "pixels are more than 9; --max-pixels" in capsys.readouterr().err
    assert "8 pairs in 3 shards" in printed and "2 samples could not be read" in printed
    pattern = printed.rpartition("--train-data ")[2].strip().strip("'")
    assert len(open_source(pattern)) == 8


def test_pictures_with_several_rows_are_said(tmp_path, capsys):
    """Each row becomes a pair, of which an evaluation could find but one."""
    table = write_csv(tmp_path / "source", 3)
    table.write_text(table.read_text() + "images/0001.jpg\tanother\n./images/0001.jpg\tmore\n")
    line = ["--output", str(tmp_path / "out"), "--workers", "1", "--quiet"]
    assert main([str(table), *line]) == 0
    said = capsys.readouterr().out
    assert "5 pairs in 1 shards" in said and "5 rows name 3 pictures, and each is a pair" in said
    line[1] = str(tmp_path / "plain")
    assert main([str(write_csv(tmp_path / "other", 3)), *line]) == 0
    assert "rows name" not in capsys.readouterr().out


def test_a_source_without_a_readable_sample_is_an_error(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"junk"), ("a.txt", b"a")])
    assert main([str(path), "--output", str(tmp_path / "out"), "--quiet"]) == 2
    assert "none of the 1 samples" in capsys.readouterr().err


def is_running(pid: str) -> bool:
    """Return whether a process has not ended yet; one that nobody has waited for may still be listed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_killed_in_between_and_run_again_gives_the_same_bytes(tmp_path, sign):
    data = str(write_csv(tmp_path / "source", 60))
    prepare(data, tmp_path / "whole", settings("jpeg", 4))
    out, marks = tmp_path / "out", tmp_path / "marks"
    marks.mkdir()
    flags = ["--output", str(out), "--shard-size", "4", "--size", str(SIZE)]
    program = [sys.executable, str(PROGRAMS / "hold_prepare_half_way.py"), str(marks)]
    command = [*program, data, *flags, "--quiet", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    children, pids = Path(f"/proc/{process.pid}/task/{process.pid}/children"), list[str]()

    def is_half_way() -> bool:
        """Return whether both processes wait in a shard, and all finished shards are noted."""
        assert process.poll() is None, process.communicate()[1].decode()
        pids[:] = children.read_text().split()
        marked = {path.name for path in marks.iterdir()}
        return len(pids) == 2 and marked == {*pids, *contents(out)}

    try:
        wait_until(is_half_way, "process in the middle of its shard")
        # Of 18 images in shards of 4, two or more are in shards that are not finished.
        assert len(list(out.glob("*.tar.*.tmp"))) == 2
        process.send_signal(sign)
        message = process.communicate(timeout=LIMIT_S)[1].decode()
        wait_until(lambda: not any(map(is_running, pids)), "end of its processes")
    except BaseException:
        process.kill()
        for pid in filter(is_running, pids):
            os.kill(int(pid), signal.SIGKILL)
        raise
    if sign == signal.SIGINT:
        assert process.returncode == 130 and "the same command continues" in message
        assert "Traceback" not in message and not list(out.glob("*.tmp"))
    finished = {path: path.stat().st_ino for path in out.glob("*.tar")}
    assert 3 <= len(finished) < 15
    noted = json.loads((out / MANIFEST).read_text())["shards"]
    damaged = sorted(finished)[1]
    flip(damaged, damaged.stat().st_size // 2)
    assert main([data, *flags, "--quiet", "--workers", "1"]) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.glob("*.tmp"))
    if sign == signal.SIGINT:
        assert noted.keys() == {path.name for path in finished}
        for name in noted:  # only the damaged one is made again
            path = out / name
            assert (path.stat().st_ino == finished[path]) == (path != damaged)


def test_finished_shards_are_not_made_again_and_damaged_ones_are(tmp_path, monkeypatch):
    data = write_shards(tmp_path / "source", 1, 20)
    prepare(data, tmp_path / "out", settings())
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "00001.tar").write_bytes(b"cut")
    made, write = [], shards.write_shard
    monkeypatch.setattr(
        "clipcore.data.prepare.write_shard",
        lambda path, *rest: (made.append(path.name), write(path, *rest))[1],
    )
    assert prepare(data, tmp_path / "out", settings()).made == 8
    assert made == ["00001.tar"] and contents(tmp_path / "out") == before


def flip(path: Path, at: int, keep_time: bool = True) -> None:
    """Change one byte of a file, by default without a trace in its size and time."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_a_shard_with_a_changed_byte_is_named_and_made_again(tmp_path, capsys, workers, kind):
    data, out = write_shards(tmp_path / "source", 1, 20), tmp_path / "out"
    line = [data, "--output", str(out), "--format", kind, "--size", str(SIZE), "--shard-size", "4"]
    line += ["--workers", str(workers), "--quiet"]
    assert main(line) == 0
    before = contents(out)
    capsys.readouterr()
    # In the first header, in the middle of an image, and in the padding at the end.
    for name, at in (("00000.tar", 3), ("00002.tar", 700), ("00003.tar", -1)):
        flip(out / name, at)
    assert main(line) == 0
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 3 and "12 of them now" in said.out
    for shown, name in zip(lines, ("00000.tar", "00002.tar", "00003.tar"), strict=True):
        assert f"{out / name} is damaged: its bytes are not those that were written" in shown
        assert shown.endswith("it is made again")
    assert contents(out) == before
    assert main(line) == 0 and capsys.readouterr().err == ""


def test_check_names_each_damaged_and_missing_shard_and_writes_nothing(tmp_path, capsys):
    data, out = write_shards(tmp_path / "source", 1, 20), tmp_path / "out"
    line = [data, "--output", str(out), "--size", str(SIZE), "--shard-size", "4", "--quiet"]
    check = ["--output", str(out), "--check", "--quiet"]
    assert main(line) == 0 and main(check) == 0
    assert (
        "5 shards" in (said := capsys.readouterr().out) and "all are as they were written" in said
    )

    flip(out / "00001.tar", 700)
    (out / "00002.tar").unlink()
    with open(out / "00003.tar", "ab") as file:
        file.write(b"x")
    manifest = json.loads((out / MANIFEST).read_text())
    del manifest["shards"]["00004.tar"]
    (out / MANIFEST).write_text(json.dumps(manifest))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([data, *check]) == 1
    said = capsys.readouterr()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    size = manifest["shards"]["00003.tar"]["bytes"]
    assert said.err == "" and said.out.splitlines() == [
        f"{out}/00001.tar is damaged: its bytes are not those that were written",
        f"{out}/00002.tar is missing",
        f"{out}/00003.tar has {size + 1:,} bytes instead of {size:,}",
        f"{out}/00004.tar is not made yet",
        "4 of 5 shards are damaged or missing; the command that made the others, without --check, makes them again",
    ]
    assert main(line) == 0 and main(check) == 0
    capsys.readouterr()

    assert main(["--output", str(tmp_path), "--check"]) == 2
    assert f"{tmp_path} has no manifest.json" in capsys.readouterr().err
    for source in ({}, {"samples": 1 << 60}):
        (out / MANIFEST).write_text(json.dumps({**manifest, "source": source}))
        assert main(check) == 2
        assert "no number of samples" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(out)])
    assert "required: source" in capsys.readouterr().err


def test_a_shard_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    data, out = write_shards(tmp_path / "source", 1, 8), tmp_path / "out"
    made = prepare(data, out, settings(shard_size=4))
    (out / "00000.tar").unlink()
    os.mkfifo(out / "00000.tar")  # whose reading would never end
    fault = shards.fault_of(out / "00000.tar", made.shards["00000.tar"])
    assert fault is not None and fault.startswith("cannot be read: Not a regular file")


def without_checksums(folder: Path) -> None:
    """Turn prepared shards into those of an earlier version, of the same sizes."""
    for path in folder.glob("*.tar"):
        content = bytearray(path.read_bytes())
        with tarfile.open(path) as archive:
            members = archive.getmembers()
        for member in members:
            header = content[member.offset : member.offset + 512]
            header[265:297] = bytes(32)
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            content[member.offset : member.offset + 512] = header
        path.write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    for report in manifest["shards"].values():
        del report["sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_shards_of_before_there_were_checksums_still_work_and_are_said_to_have_none(
    tmp_path, capsys
):
    data, out = write_shards(tmp_path / "source", 1, 12), tmp_path / "out"
    flags = ["--output", str(out), "--size", str(SIZE), "--shard-size", "4", "--quiet"]
    line = [data, *flags, "--format", "raw", "--workers", "1"]
    assert main(line) == 0
    pairs = [open_source(str(out))[i] for i in range(12)]
    without_checksums(out)
    flip(out / "00001.tar", 900)  # which is not seen
    (out / "00002.tar").unlink()
    capsys.readouterr()
    assert main(line) == 0
    note, missing = capsys.readouterr().err.splitlines()
    assert "00002.tar is missing; it is made again" in missing
    assert "2 shards of an earlier version have no checksums" in note
    assert "delete these shards and make them again" in note
    assert main([*flags, "--check"]) == 0
    assert "2 shards of an earlier version have no checksums" in capsys.readouterr().out

    source = open_source(str(out))
    assert [shard.checksums_2N.shape for shard in source.shards] == [(2, 0), (2, 0), (2, 4)]
    same = [np.array_equal(source[i].image, pairs[i].image) for i in range(12)]
    assert same == [True] * 4 + [False] + [True] * 7
    assert [source[i].caption for i in range(12)] == [pair.caption for pair in pairs]


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_each_member_has_the_checksum_of_its_bytes_in_its_header(tmp_path, kind):
    prepare(write_shards(tmp_path / "source", 1, 6), tmp_path / "out", settings(kind))
    path = tmp_path / "out" / "00000.tar"
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        contents = [archive.extractfile(member).read() for member in members]
        found = [xxhash.xxh3_64_intdigest(content) % 2**32 for content in contents]
        assert [member.uname for member in members] == [f"xxh3={each:08x}" for each in found]
    index = load_index(str(path))
    assert index.checksums_2N.T.reshape(-1).tolist() == found
    # The index that was kept says the same, and a shard of another program has none.
    assert np.array_equal(load_index(str(path)).checksums_2N, index.checksums_2N)
    assert load_index(str(tmp_path / "source" / "000.tar")).checksums_2N.shape == (2, 0)


def silent_byte(image: bytes) -> int:
    """Return the place of a byte whose change gives other pixels that decode without an error."""
    pixels = np.asarray(decode_image(image))
    for at in range(len(image) * 3 // 4, len(image)):
        changed = bytearray(image)
        changed[at] ^= 0x10
        with contextlib.suppress(BadSample):
            if not np.array_equal(np.asarray(decode_image(bytes(changed))), pixels):
                return at
    raise AssertionError("each change of a byte is an error or changes no pixel")


@pytest.mark.parametrize("keep_time", [True, False])
@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_a_changed_byte_of_a_sample_is_seen_as_it_is_read(tmp_path, kind, keep_time):
    out = tmp_path / "out"
    prepare(write_shards(tmp_path / "source", 1, 24), out, settings(kind, shard_size=24))
    whole = open_source(str(out))
    pairs, columns = [whole[i] for i in range(24)], whole.shards[0].columns_6N
    offset, size = columns[:2, 5].tolist()
    image = (out / "00000.tar").read_bytes()[offset : offset + size]
    whole.close()
    flip(out / "00000.tar", offset + (size - 1 if kind == "raw" else silent_byte(image)), keep_time)
    flip(out / "00000.tar", int(columns[2, 9]) + 3, keep_time)  # a letter of a caption

    source = open_source(str(out))
    for index in range(24):
        if index in (5, 9):
            with pytest.raises(BadSample, match=r"damaged: its bytes do not match.*copy or prep"):
                source[index]
        else:
            pair = source[index]
            assert np.array_equal(np.asarray(pair.image), np.asarray(pairs[index].image))
            assert pair.caption == pairs[index].caption
    with pytest.raises(BadSample, match="do not match their checksum"):
        source.captions(9)

    # In training they are replaced and named like other bad samples, whoever reads them.
    for workers in (0, 2):
        loader = PairLoader(
            *(source, ImageTransform(28, is_train=True), tokenize, 24),
            seed=3,
            workers=workers,
            max_bad_fraction=0.5,
        )
        batch = next(loader.batches())
        keys = sorted(key for key, _ in batch.bad)
        assert keys == ["00000.tar/000005", "00000.tar/000009"]
        assert all("do not match their checksum" in reason for _, reason in batch.bad)
        assert not {5, 9} & set(batch.indices.tolist())


def test_a_changed_byte_of_the_index_of_a_prepared_shard_is_seen(tmp_path):
    out = tmp_path / "out"
    prepare(write_shards(tmp_path / "source", 1, 8), out, settings())
    path = out / "00000.tar"
    place = sidecar_paths(str(path))[0]
    content, expected = place.read_bytes(), load_index(str(path)).checksums_2N
    for at in range(0, len(content), 7):
        flip(place, at)
        assert np.array_equal(load_index(str(path)).checksums_2N, expected)
        assert place.read_bytes() == content


@pytest.mark.parametrize(
    "report",
    [
        {"pairs": "8"},
        {"pairs": -1},
        {"bytes": 1.5},
        {"bad": 3},
        {"bad": [[1, "key"]]},
        {"bad": [["1", "key", "reason"]]},
        {"transparent": True},
        {"sha256": 3},
        {"sha256": "abc"},
        {"unknown": 1},
        [],
    ],
)
def test_a_manifest_of_other_types_is_named(tmp_path, report):
    data = write_shards(tmp_path / "source", 1, 3)
    prepare(data, tmp_path / "out", settings())
    path = tmp_path / "out" / MANIFEST
    content = json.loads(path.read_text())
    before = content["shards"]["00000.tar"]
    content["shards"]["00000.tar"] = {**before, **report} if report else report
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"cannot read .*manifest.json .*choose another --output"):
        prepare(data, tmp_path / "out", settings())


def test_other_settings_and_other_sources_are_refused(tmp_path):
    data = write_shards(tmp_path / "source", 1, 9)
    out = tmp_path / "out"
    prepare(data, out, settings())
    before = contents(out)
    for other, flag in [
        (settings("jpeg"), "--format raw"),
        (settings(size=20), "--size 30"),
        (settings(shard_size=4), "--shard-size 8"),
        (dataclasses.replace(settings(), max_pixels=1000), "--max-pixels 26000000"),
    ]:
        with pytest.raises(
            DataError, match=f"{flag}, now .*; use the old value to continue, or choose"
        ):
            prepare(data, out, other)
    # One of before there was the limit, and one that was begun without quotation marks.
    manifest = json.loads((out / MANIFEST).read_text())
    for flag, value in (("--max-pixels", None), ("--csv-no-quotes", True)):
        changed = {**manifest["settings"], flag: value}
        changed = {name: value for name, value in changed.items() if value is not None}
        (out / MANIFEST).write_text(json.dumps({**manifest, "settings": changed}))
        then = {"--max-pixels": 89478485}.get(flag, value)
        with pytest.raises(DataError, match=f"was begun with {flag} {then}, now it is"):
            prepare(data, out, settings())
    (out / MANIFEST).write_text(json.dumps(manifest))
    os.utime(tmp_path / "source" / "000.tar", ns=(0, 1))
    with pytest.raises(DataError, match=r"another state of it .*choose another --output"):
        prepare(data, out, settings())
    with pytest.raises(DataError, match="no manifest"):
        prepare(data, tmp_path / "source", settings())
    for malformed in (
        "{",
        '{"settings": [], "source": {}, "shards": {}}',
        '{"settings": {}, "source": "x", "shards": {}}',
    ):
        (out / MANIFEST).write_text(malformed)
        with pytest.raises(DataError, match="cannot read"):
            prepare(data, out, settings())
    assert contents(out) == before


def test_an_output_that_would_join_its_source_or_has_no_name_for_the_training_is_refused(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 40)).save(images / "a.png")
    (images / "a.txt").write_text("a square")
    for inside in (images, images / "small", tmp_path / "images" / ".." / "images" / "b"):
        with pytest.raises(DataError, match="choose one outside of it"):
            prepare(str(images), inside, settings())
    for name in ("a{b}", "a::b"):
        with pytest.raises(DataError, match="choose a name without them"):
            prepare(str(images), tmp_path / name, settings())
    assert sorted(path.name for path in images.iterdir()) == ["a.png", "a.txt"]
    prepare(str(images), tmp_path / "out", settings())
    assert prepare(str(images), tmp_path / "out", settings()).made == 0


def test_another_pillow_makes_no_shard_beside_those_of_the_first(tmp_path):
    data = write_shards(tmp_path / "source", 1, 20)
    out = tmp_path / "out"
    prepare(data, out, settings())
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(manifest | {"versions": {"Pillow": "1.0"}}))
    prepare(data, out, settings())  # nothing to make: the record stays
    assert json.loads((out / MANIFEST).read_text())["versions"] == {"Pillow": "1.0"}
    (out / "00001.tar").unlink()
    before = contents(out)
    with pytest.raises(DataError, match=r"begun with Pillow 1\.0, here is Pillow .*install those"):
        prepare(data, out, settings())
    assert contents(out) == before


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_processes_are_begun_is_not_lost(tmp_path, sign):
    """It comes within another module's hook of a fork, which swallows what is raised there."""
    program = [str(PROGRAMS / "signal_prepare_at_second_fork.py"), str(int(sign))]
    data = str(write_csv(tmp_path / "source", 40))
    flags = ["--output", str(tmp_path / "out"), "--shard-size", "4", "--size", str(SIZE)]
    done = subprocess.run(
        [sys.executable, *program, data, *flags, "--quiet", "--workers", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 128 + sign, done.stderr
    assert "Traceback" not in done.stderr and "the same command continues" in done.stderr


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_shard(tmp_path, monkeypatch, capsys):
    data = write_shards(tmp_path / "source", 1, 20)
    add, calls = tarfile.TarFile.addfile, itertools.count()

    def full(self: tarfile.TarFile, *rest: object) -> None:
        if next(calls) == 25:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, *rest)  # type: ignore[arg-type]

    flags = ["--output", str(tmp_path / "out"), "--shard-size", "8", "--workers", "1", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        assert main([data, *flags]) == 2
    error = capsys.readouterr().err
    assert "00001.tar: No space left on device" in error and error.count("\n") == 1
    assert list(contents(tmp_path / "out")) == ["00000.tar"]
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert main([data, *flags]) == 0 and len(open_source(str(tmp_path / "out"))) == 20


def test_a_shard_has_its_name_only_once_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    synced, seen, sync = set(), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), sync(fd)))
    replace = os.replace

    def watched(source: object, target: object) -> None:
        if str(target).endswith(".tar"):
            seen.append(target)
            assert not os.path.exists(target) and os.stat(source).st_ino in synced
            with tarfile.open(source) as archive:
                assert len(archive.getnames()) == 8
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    prepare(write_shards(tmp_path / "source", 1, 8), tmp_path / "out", settings(shard_size=4))
    assert len(seen) == 2


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text), int(text.split()[-1]), 999] for text in texts])


def first_batches(data: str, transform: ImageTransform) -> list[torch.Tensor]:
    source = open_source(data, min_side=transform.min_side)
    loader = PairLoader(source, transform, tokenize, 12, seed=3)
    return [
        tensor
        for batch in itertools.islice(loader.batches(), 4)
        for tensor in (batch.images, batch.tokens, batch.indices)
    ]


@pytest.mark.parametrize("crop", [{}, {"ratio": None}, {"resize": SIZE}, {"resize": 40}])
def test_training_on_raw_shards_is_training_on_images_of_the_same_pixels(tmp_path, crop):
    prepare(str(write_csv(tmp_path / "source", 24)), tmp_path / "out", settings())
    raw = open_source(str(tmp_path / "out"))
    members = []
    for index in range(24):
        buffer = io.BytesIO()
        Image.fromarray(raw[index].image).save(buffer, "PNG")
        members += [(f"{index}.png", buffer.getvalue()), (f"{index}.txt", raw[index].caption)]
    members = [(name, c if isinstance(c, bytes) else c.encode()) for name, c in members]
    png = write_tar(tmp_path / "png.tar", members)
    transform = ImageTransform(28, is_train=True, **crop)
    batches = first_batches(str(tmp_path / "out"), transform)
    for one, other in zip(batches, first_batches(str(png), transform), strict=True):
        assert torch.equal(one, other)
    if crop.get("resize") == SIZE:
        # Resized before or on the way makes no difference.
        direct = first_batches(str(tmp_path / "source" / "pairs.csv"), transform)
        assert all(torch.equal(one, other) for one, other in zip(batches, direct, strict=True))


def test_crops_of_a_raw_image_that_need_no_resampling_are_views_into_it():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 45, 3), np.uint8)
    rng = np.random.default_rng(1)
    for _ in range(5):
        window = ImageTransform(28, True, resize=32).crop_image(pixels, rng)
        assert window.base is pixels and window.shape == (28, 28, 3)
    numbered = np.broadcast_to(np.arange(45, dtype=np.uint8)[:, None], (32, 45, 3))
    window = ImageTransform(32, True, resize=32)
    lefts = [int(window.crop_image(numbered, rng)[0, 0, 0]) for _ in range(700)]
    counts = np.bincount(lefts)  # every place, each about as often
    assert len(counts) == 14 and counts.min() > 20 and counts.max() < 90
    whole = pixels[:, :32]
    for transform in (ImageTransform(32, True, resize=32), ImageTransform(32, False)):
        assert np.array_equal(transform.crop_image(whole, rng), whole)
    with pytest.raises(ValueError, match="--aug-resize is at least the model's 32"):
        ImageTransform(32, True, resize=31)


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_large_jpegs_are_reduced_on_decoding_and_never_below_the_side_asked_for(decoder):
    buffer = io.BytesIO()
    ramp = np.add.outer(np.arange(401), np.arange(603)) // 4
    Image.fromarray(np.stack([ramp] * 3, -1).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    for min_side, size in [(0, (603, 401)), (201, (603, 401)), (200, (302, 201)), (50, (76, 51))]:
        image = decode_image(buffer.getvalue(), Decoder(decoder, min_side))
        assert image.size == size
        full = decode_image(buffer.getvalue(), decoder).resize(size, Image.Resampling.BOX)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(full)).max() < 8
    png = io.BytesIO()
    Image.new("RGB", (400, 400)).save(png, "PNG")
    assert decode_image(png.getvalue(), Decoder(decoder, 50)).size == (400, 400)


def npy(array: np.ndarray, **settings: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **settings)  # type: ignore[arg-type]
    return buffer.getvalue()


class Bomb:
    def __reduce__(self) -> object:
        return os.mkdir, ("executed",)


def malformed() -> dict[str, tuple[bytes, str]]:
    """Contents of .npy members that are no raw images, and what the message says."""
    pixels = np.zeros((5, 7, 3), np.uint8)
    good = npy(pixels)

    def with_shape(shape: str) -> bytes:
        return good.replace(b"(5, 7, 3)", shape.encode()[:9].ljust(9))

    literal = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + b"(" * 90 + b"5, 7, 3), }"
    return {
        "pickle": (npy(np.array([Bomb()], object), allow_pickle=True), "object"),
        "fortran": (npy(np.asfortranarray(pixels)), "Fortran order"),
        "float": (npy(pixels.astype(np.float32)), "float32"),
        "grey": (npy(pixels[..., 0]), r"\[5, 7\]"),
        "four channels": (npy(np.zeros((5, 7, 4), np.uint8)), r"\[5, 7, 4\]"),
        "huge header": (good[:8] + b"\xff\xff" + good[10:] + b" " * 70_000, "1024 bytes"),
        "version 2": (good[:6] + b"\2\0" + b"\0\0" + good[8:], "version 1.0"),
        "cut": (good[:-1], "need 105 bytes, there are 104"),
        "longer": (good + b"\0", "there are 106"),
        "cut in the header": (good[:60], "header"),
        "only magic": (good[:6], "version 1.0"),
        "too many pixels": (with_shape("(9**9,7,3"), "header"),
        "larger than allowed": (with_shape("(99999,~0"), "header"),
        "negative": (with_shape("(-5,-7,3)"), "header|pixels"),
        "no pixels": (with_shape("(0, 7, 3)"), "7 x 0 pixels"),
        "nested": (good[:8] + len(literal).to_bytes(2, "little") + literal, "header"),
        "junk": (good[:10] + os.urandom(118) + good[128:], "header"),
    }


@pytest.mark.parametrize("name", malformed())
def test_malformed_raw_members_are_bad_samples_with_their_keys(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, reason = malformed()[name]
    members = [("a.npy", content), ("a.txt", b"a"), ("b.npy", npy(np.ones((3, 2, 3), np.uint8)))]
    path = str(write_tar(tmp_path / "a.tar", [*members, ("b.txt", b"b")]))
    source = TarSource([path])
    with pytest.raises(BadSample, match=reason) as caught:
        source[0]
    assert caught.value.key == "a.tar/a" and "\n" not in str(caught.value)
    assert source[1].image.shape == (3, 2, 3)
    assert not os.path.exists("executed")


def test_sizes_beyond_the_limit_are_refused_from_the_header():
    good = encode_raw(np.zeros((5, 7, 3), np.uint8))
    huge = good.replace(b"(5, 7, 3), }" + b" " * 8, b"(50000, 60000, 3), }")
    assert huge != good
    with pytest.raises(BadSample, match="60000 x 50000 pixels are more than"):
        decode_raw(huge)


def test_fuzzed_raw_headers_are_read_or_are_bad_samples():
    rng = random.Random(0)
    good = encode_raw(np.zeros((5, 7, 3), np.uint8))
    outcomes = {"read": 0, "bad": 0}
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 10])):
            data[rng.randrange(128)] = rng.choice([rng.randrange(256), 0x28, 0x27, 0x2D, 0x39])
        try:
            decoded = decode_raw(bytes(data))
            assert decoded.shape[2] == 3 and decoded.nbytes <= len(data)
            outcomes["read"] += 1
        except BadSample as error:
            assert "\n" not in str(error)
            outcomes["bad"] += 1
    assert outcomes["read"] > 10 and outcomes["bad"] > 1000


def test_pixels_are_not_copied_from_the_file():
    data = encode_raw(np.arange(105, dtype=np.uint8).reshape(5, 7, 3))
    image = decode_raw(data)
    assert np.shares_memory(image, np.frombuffer(data, np.uint8)) and not image.flags.writeable
    assert np.array_equal(pickle.loads(pickle.dumps(image)), image)


def test_an_index_of_before_raw_images_is_made_anew(tmp_path):
    members = [("a.npy", npy(np.zeros((2, 2, 3), np.uint8))), ("a.txt", b"a")]
    path = str(write_tar(tmp_path / "a.tar", members))
    load_index(path)
    place = sidecar_paths(path)[0]
    content = place.read_bytes()
    old = bytearray(b"CLIPIDX1" + content[8:40] + content[-4:])
    old[24:40] = bytes(16)  # no samples and no keys
    place.write_bytes(old[:-4] + struct.pack("<I", zlib.crc32(old[:-4])))
    assert len(load_index(path)) == 1 and place.read_bytes() == content


def test_a_jpeg_beside_an_npy_member_stays_the_image(tmp_path):
    members = [("a.npy", b"an embedding"), ("a.jpg", picture(0)[0]), ("a.txt", b"a")]
    source = TarSource([str(write_tar(tmp_path / "a.tar", members))])
    assert np.array_equal(np.asarray(source[0].image), np.asarray(decode_image(picture(0)[0])))
