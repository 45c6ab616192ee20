"""The labels of shards are read once: what is kept of them fits the shard, or is made again."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from shards import picture, write_tar

from clipcore.data import DataError, tar
from clipcore.evaluate import label_shards
from clipcore.evaluate.datasets import open_set
from clipcore.evaluate.label_shards import load_labels

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("cache_folder")]
ROWS = [[0, 1, 1], [0, 0, 0], [1, 0, 0]]


def npy(row: list[int]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(row, np.uint8))
    return buffer.getvalue()


def write_shard(path: Path, suffix: str, labels: list[bytes]) -> str:
    members = [("none.jpg", picture(0)[0])]
    for number, label in enumerate(labels):
        members += [(f"{number}.jpg", picture(number)[0]), (f"{number}.{suffix}", label)]
    return str(write_tar(path, members))


def forbid_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_shards, "scan_members", lambda *_: pytest.fail("read again"))


@pytest.mark.parametrize("suffix", ["cls", "npy"])
def test_labels_are_read_once(tmp_path, monkeypatch, suffix):
    labels = [b"2", b" 0\n", b"1"] if suffix == "cls" else [npy(row) for row in ROWS]
    path = write_shard(tmp_path / "0.tar", suffix, labels)
    others = write_shard(tmp_path / "1.tar", suffix, labels[:1])
    (first, _), labels_N = load_labels([path, others], suffix, 3)
    wanted = np.array([2, 0, 1, 2]) if suffix == "cls" else np.array([*ROWS, ROWS[0]], np.uint8)
    assert labels_N.dtype == wanted.dtype and np.array_equal(labels_N, wanted)
    made = [f"{number}.tar{kept}" for number in "01" for kept in ("", f".clipcore-labels-{suffix}")]
    assert sorted(os.listdir(tmp_path)) == made

    forbid_scans(monkeypatch)
    (again, _), labels_N = load_labels([path, others], suffix, 3)
    assert np.array_equal(labels_N, wanted)
    assert np.array_equal(again.columns_6N, first.columns_6N) and again.key(2) == first.key(2)
    assert str(again.left_out) == str(first.left_out) != ""
    assert not again.labels and not first.labels


def test_a_folder_that_cannot_be_written_leaves_labels_in_the_cache_then_in_memory(
    tmp_path, monkeypatch, cache_folder
):
    path = write_shard(tmp_path / "data.tar", "cls", [b"1"])
    write, refused = tar._write_sidecar, {tmp_path}

    def write_unless_refused(place: Path, index: object) -> None:
        if place.parent in refused:
            raise PermissionError(13, "Permission denied")
        write(place, index)

    monkeypatch.setattr(tar, "_write_sidecar", write_unless_refused)
    assert load_labels([path], "cls", 2)[1].tolist() == [1]
    (kept,) = cache_folder.iterdir()
    assert kept.name.endswith(".clipcore-labels-cls")
    kept.unlink()
    refused.add(cache_folder)
    assert load_labels([path], "cls", 2)[1].tolist() == [1]


def test_what_is_kept_fits_the_shard_or_is_made_again(tmp_path):
    path = write_shard(tmp_path / "0.tar", "cls", [b"0", b"1"])
    kept = tmp_path / "0.tar.clipcore-labels-cls"
    assert load_labels([path], "cls", 2)[1].tolist() == [0, 1]
    whole = kept.read_bytes()
    damaged = [
        whole[:-9],
        whole + b"1",
        b"",
        *(_flipped(whole, at) for at in range(0, len(whole), 7)),
    ]
    for content in damaged:
        kept.write_bytes(content)
        assert load_labels([path], "cls", 2)[1].tolist() == [0, 1]
        assert kept.read_bytes() == whole
    os.utime(write_shard(tmp_path / "0.tar", "cls", [b"1", b"0"]), ns=(1, 1))
    assert load_labels([path], "cls", 2)[1].tolist() == [1, 0]


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_kept_labels_are_held_against_the_names(tmp_path):
    """The names of classes may change when the shards do not."""
    path = write_shard(tmp_path / "0.tar", "cls", [b"0", b"3"])
    load_labels([path], "cls", 4)
    with pytest.raises(DataError, match=r"0.tar/1: its class is 3, and classnames.txt names 3"):
        load_labels([path], "cls", 3)
    path = write_shard(tmp_path / "1.tar", "npy", [npy(row) for row in ROWS])
    load_labels([path], "npy", 3)
    with pytest.raises(DataError, match=r"1.tar/0: its label has the shape \[3\], and .* names 2"):
        load_labels([path], "npy", 2)


def test_labels_of_too_many_classes_are_refused_before_they_are_read(tmp_path, monkeypatch):
    paths = [write_shard(tmp_path / f"{n}.tar", "npy", [npy(row) for row in ROWS]) for n in "01"]
    monkeypatch.setattr(label_shards, "_MAX_LABEL_BYTES", 17)
    with pytest.raises(DataError, match=r"1.tar: labels of 6 images in 3 classes take too much"):
        load_labels(paths, "npy", 3)
    monkeypatch.setattr(label_shards, "_MAX_LABEL_BYTES", 8)
    monkeypatch.setattr(label_shards, "_row_of", lambda *_: pytest.fail("read"))
    (tmp_path / "0.tar.clipcore-labels-npy").unlink()
    with pytest.raises(DataError, match=r"0.tar: labels of 3 images in 3 classes take too much"):
        load_labels(paths, "npy", 3)


def test_a_set_reads_the_labels_of_its_shards_once(tmp_path, monkeypatch):
    (tmp_path / "set" / "test").mkdir(parents=True)
    write_shard(tmp_path / "set" / "test" / "0.tar", "cls", [b"0", b"1"])
    (tmp_path / "set" / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "set" / "dataset_type.txt").write_text("classification")
    first = open_set(str(tmp_path / "set")).split("test")
    forbid_scans(monkeypatch)
    again = open_set(str(tmp_path / "set")).split("test")
    assert again.labels_N is not None and again.labels_N.tolist() == [0, 1]
    assert again.keys() == first.keys() == ["0.tar/0", "0.tar/1"]
    assert again.fingerprint() == first.fingerprint() and again.notes == first.notes
