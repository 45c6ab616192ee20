"""Data at URLs: the same pairs as on the disk, each byte read once, and no fault of the network ever becomes a sample."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import logging
import os
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from remote_store import FileServer
from runs import NANO, leave_process_alone
from shards import picture, write_csv, write_jsonl, write_parquet, write_shards, write_tar

from clipcore import train
from clipcore.checkpoint import latest_checkpoint
from clipcore.data import BadSample, DataError, PairSource, local_copies, random_access, remote
from clipcore.data.loader import PairLoader
from clipcore.data.local_copies import place_of
from clipcore.data.order import permutation
from clipcore.data.prepare import Settings, prepare
from clipcore.data.random_access import LocalFile, RemoteFile
from clipcore.data.remote import RemoteError
from clipcore.data.shards import ImageFormat
from clipcore.data.sources import open_source
from clipcore.data.tar import sidecar_paths
from clipcore.data.transforms import Decoder, ImageTransform
from clipcore.evaluate.retrieval_pairs import fingerprint_of_pairs
from clipcore.files import locked
from clipcore.run.parts import captions_sha256

NUM_SHARDS, PAIRS_A_SHARD = 3, 7
RUNS = ("whole", "broken")
PATTERN = f"shards/{{000..{NUM_SHARDS - 1:03d}}}.tar"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and tables on the disk."""
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder / "shards", NUM_SHARDS, PAIRS_A_SHARD)
    write_csv(folder / "csv", 5)
    write_jsonl(folder / "jsonl", 5)
    write_parquet(folder / "parquet", 5)
    table = (folder / "csv" / "pairs.csv").read_text()
    (folder / "csv" / "captions.txt").write_text(table.replace("filepath\ttitle", "image\tcaption"))
    return folder


@pytest.fixture(scope="module")
def started(data: Path) -> Iterator[FileServer]:
    """Return a web server of the data."""
    server = FileServer(data)
    yield server
    server.close()


@pytest.fixture
def web(started: FileServer, monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> FileServer:
    """Return the web server without faults; the pauses between tries are short, and the cache is empty."""
    started.reset()
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 1e-4)
    return started


@pytest.fixture(scope="module")
def bucket(data: Path) -> Iterator[str]:
    """Return the URL of the data in a local object store."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system = fsspec.filesystem("s3", use_listings_cache=False)
        system.mkdir("bucket")
        for path in data.rglob("*.*"):
            if path.is_file():
                system.pipe(f"bucket/{path.relative_to(data)}", path.read_bytes())
        yield "s3://bucket"
        # fsspec keeps a connection to the address of this store.
        type(system).clear_instance_cache()
    server.stop()


def assert_same_pairs(one: PairSource, other: PairSource) -> None:
    assert len(one) == len(other) and one.name == other.name
    for index in permutation(np.arange(len(one)), len(one), seed=0, epoch=0).tolist():
        ours, theirs = one[index], other[index]
        assert np.array_equal(np.asarray(ours.image), np.asarray(theirs.image))
        assert (ours.caption, ours.key) == (theirs.caption, theirs.key)


def total_bytes(data: Path) -> int:
    return sum(path.stat().st_size for path in (data / "shards").glob("*.tar"))


def release_copies() -> None:
    """Let go of the copies that this process has taken, as its end would."""
    for descriptor, _ in local_copies._leases.values():
        os.close(descriptor)
    local_copies._leases.clear()


@pytest.mark.parametrize("cache_gb", [None, 0])
@pytest.mark.parametrize("where", ["web", "bucket"])
def test_shards_at_urls_are_those_on_the_disk(data, web, bucket, where, cache_gb):
    base = web.url if where == "web" else bucket
    local = open_source(str(data / PATTERN))
    there = open_source(f"{base}/{PATTERN}", cache_gb=cache_gb)
    assert_same_pairs(local, there)
    assert_same_pairs(local, pickle.loads(pickle.dumps(there)))
    assert captions_sha256(there) == captions_sha256(local)
    # Copies are used where they may be made, and said to be missing where not.
    noted = f"{NUM_SHARDS} x shard read by byte ranges, as its copy does not fit into 0 GB"
    assert str(there.noted).startswith(noted) == (cache_gb == 0)
    is_ranges = [isinstance(there._shard(number), RemoteFile) for number in range(NUM_SHARDS)]
    assert is_ranges == [cache_gb == 0] * NUM_SHARDS


@pytest.mark.parametrize("pattern", ["shards/*.tar", "shards/00?.tar", "shards", "shards/"])
def test_objects_are_found_by_patterns_and_folders(data, web, bucket, pattern):
    local, there = (
        open_source(str(data / pattern)),
        open_source(f"{bucket}/{pattern}", cache_gb=0),
    )
    assert_same_pairs(local, there)
    with pytest.raises(DataError, match=r"no object matches the pattern s3://bucket/none\*.tar$"):
        open_source(f"{bucket}/none*.tar")
    with pytest.raises(DataError, match=r"csv holds no .tar files, .* local disks only"):
        open_source(f"{bucket}/csv")


def test_batches_that_workers_read_by_ranges_are_those_from_the_disk(data, web):
    def batches(base: str, workers: int) -> list[torch.Tensor]:
        source = open_source(f"{base}/{PATTERN}", cache_gb=0)
        loader = PairLoader(
            source, ImageTransform(16, is_train=True), tokenize, 8, seed=3, workers=workers
        )
        read = loader.batches(0)
        found = [next(read) for _ in range(4)]
        read.close()
        return [tensor for batch in found for tensor in (batch.images, batch.tokens)]

    for ours, theirs in zip(batches(web.url, 2), batches(str(data), 0), strict=True):
        assert torch.equal(ours, theirs)


def tokenize(texts: list[str]) -> torch.Tensor:
    rows = torch.zeros(len(texts), 16, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        row[0], row[1] = len(text), 999
    return rows


def test_a_shard_is_read_once_and_its_index_kept(data, web, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    url = f"{web.url}/{PATTERN}"
    source = open_source(url)
    assert read_bytes(web) == total_bytes(data)
    assert_same_pairs(open_source(str(data / PATTERN)), source)
    web.requests.clear()
    open_source(url)[3]
    assert not web.reads()
    # Without its copy, a shard has its index, and a sample is one request.
    release_copies()
    for place in (sidecar_paths("x")[1].parent / "copies").rglob("*.tar"):
        place.unlink()
    source = open_source(url, cache_gb=0)
    web.requests.clear()
    for index in range(PAIRS_A_SHARD):
        source[index]
    assert len(web.reads()) == PAIRS_A_SHARD


def test_without_room_a_shard_is_read_once_for_its_index(data, web):
    open_source(f"{web.url}/{PATTERN}", cache_gb=0)
    assert read_bytes(web) == total_bytes(data) and len(web.reads()) == NUM_SHARDS


def read_bytes(web: FileServer) -> int:
    """Return how many bytes of content were asked for."""
    ends = [request.range.removeprefix("bytes=").split("-") for request in web.reads()]
    return sum(int(last) - int(first) + 1 for first, last in ends)


def test_a_variable_limits_the_copies_of_commands_without_the_flag(web, monkeypatch):
    url = f"{web.url}/shards/000.tar"
    monkeypatch.setenv(local_copies.LIMIT_VARIABLE, "0")
    assert isinstance(open_source(url)._shard(0), RemoteFile)
    with pytest.raises(DataError, match="in 0 GB; raise --data-cache-gb or CLIPCORE_DATA_CACHE_GB"):
        open_source(f"{web.url}/csv/pairs.csv")
    assert isinstance(open_source(url, cache_gb=1)._shard(0), LocalFile)
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv(local_copies.LIMIT_VARIABLE, wrong)
        with pytest.raises(DataError, match=f"^CLIPCORE_DATA_CACHE_GB={wrong} is not a number"):
            open_source(f"{web.url}/shards/001.tar")


def test_several_readers_copy_a_shard_once(data, web):
    with ThreadPoolExecutor(4) as pool:
        sources = list(pool.map(open_source, [f"{web.url}/{PATTERN}"] * 4))
    assert read_bytes(web) == total_bytes(data)
    for source in sources:
        assert source[20].caption == sources[0][20].caption


@pytest.mark.parametrize("cache_gb", [None, 0])
@pytest.mark.parametrize("fault", ["drop", "short", "long", "silent", 503, 429])
def test_a_passing_fault_is_tried_again(data, web, monkeypatch, fault, cache_gb):
    if fault == "silent":
        # On a busy machine a right answer may take longer, and is asked for again.
        monkeypatch.setattr(remote, "READ_TIMEOUT_S", 0.4)
    local = open_source(str(data / "shards/000.tar"))
    # Of the copy, or of the pass over the headers.
    web.faults = [fault, fault]
    there = open_source(f"{web.url}/shards/000.tar", cache_gb=cache_gb)
    assert not web.faults
    if cache_gb == 0:
        web.faults = [fault]
    assert_same_pairs(local, there)
    assert not web.faults


@pytest.mark.parametrize("fault", ["drop", "short", 500])
def test_a_lasting_fault_ends_in_one_line_and_is_no_bad_sample(web, fault):
    source = open_source(f"{web.url}/{PATTERN}", cache_gb=0)
    web.requests.clear()
    web.faults = [fault] * remote.TRIES
    with pytest.raises(RemoteError) as caught:
        source[0]
    assert not isinstance(caught.value, BadSample) and len(web.reads()) == remote.TRIES
    message = str(caught.value)
    assert message.startswith(f"{web.url}/shards/000.tar: reading failed 8 times, at last with ")
    assert message.endswith("then run the same command again") and "\n" not in message
    # Nothing of the failed answers is left.
    assert source[0].caption == "a red square, number 0"


def test_a_run_that_a_network_fails_is_saved_and_goes_on_with_the_same_bits(
    web, tmp_path, monkeypatch, capfd
):
    leave_process_alone(monkeypatch)
    url = f"{web.url}/{PATTERN}"
    line = ["--train-data", url, "--data-cache-gb", "0", "--logs", str(tmp_path), *NANO]
    line += ["--batch-size", "8", "--epochs", "3", "--lr", "1e-3", "--save-frequency", "0"]
    line += ["--micro-batch-size", "8"]
    open_source(url, cache_gb=0)  # which makes the indices
    assert train.main([*line, "--name", "whole"]) == 0

    # All captions for the fingerprint of the data, three batches, and half of the fourth.
    web.faults = [""] * (NUM_SHARDS * PAIRS_A_SHARD + 3 * 8 + 4) + [500] * remote.TRIES
    capfd.readouterr()
    assert train.main([*line, "--name", "broken"]) == 2
    said = capfd.readouterr()
    assert said.err.splitlines()[-1].endswith("then run the same command again")
    assert "saved step 3 of 6; go on with: " in said.out
    assert train.main([*line, "--name", "broken", "--resume", "latest"]) == 0
    whole, broken = (latest_checkpoint(tmp_path / name / "checkpoints") for name in RUNS)
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "status, said", [(404, "there is no http"), (403, "is refused"), (401, "is refused")]
)
def test_what_a_server_refuses_is_an_error_at_once(web, status, said):
    web.refused = status
    with pytest.raises(DataError, match=said):
        open_source(f"{web.url}/shards/000.tar")
    assert [request.method for request in web.requests] == ["HEAD", "GET"]


def test_missing_objects_and_credentials_of_a_store(web, bucket, monkeypatch):
    with pytest.raises(DataError, match=r"^there is no s3://bucket/none.tar$"):
        open_source(f"{bucket}/none.tar")
    with pytest.raises(DataError, match=r"^there is no s3://elsewhere/000.tar$"):
        open_source("s3://elsewhere/000.tar")


def test_a_server_without_ranges_gives_whole_copies(data, web):
    web.has_ranges = False
    web.faults = ["drop"]
    assert_same_pairs(open_source(str(data / PATTERN)), open_source(f"{web.url}/{PATTERN}"))
    # Of the first shard again, as its first copy was broken off.
    assert len(web.reads()) == NUM_SHARDS + 1
    with pytest.raises(DataError, match="gives no byte ranges, and there is no room"):
        open_source(f"{web.url}/shards/000.tar?other=1", cache_gb=0)


def test_a_changed_object_is_read_anew_and_refused_in_the_middle_of_a_run(web, data):
    path = data / "changing.tar"
    image = (data / "csv/images/0000.jpg").read_bytes()
    write_tar(path, [("a.jpg", image), ("a.txt", b"before")])
    by_ranges = open_source(f"{web.url}/changing.tar", cache_gb=0)
    write_tar(path, [("a.jpg", image), ("a.txt", b"behind")])
    with pytest.raises(DataError, match=r"changing\.tar was changed after the run began"):
        by_ranges[0]
    assert open_source(f"{web.url}/changing.tar")[0].caption == "behind"


def test_the_least_recently_used_copy_makes_room_unless_a_process_has_it(data, web):
    urls = [f"{web.url}/shards/{number:03d}.tar" for number in range(NUM_SHARDS)]
    sizes = [(data / f"shards/{number:03d}.tar").stat().st_size for number in range(NUM_SHARDS)]
    places = [
        place_of(url, size, remote.state_of(url).version)
        for url, size in zip(urls, sizes, strict=True)
    ]
    two = (max(sizes) * 2 + 100) / 1e9
    for url in urls[:2]:
        open_source(url, cache_gb=two)
    assert places[0].exists() and places[1].exists()
    # This process has both, and the third is read by ranges.
    assert open_source(urls[2], cache_gb=two)[0].caption == picture(14)[1]
    assert not places[2].exists()
    release_copies()
    os.utime(places[0].parent, (2, 2))
    os.utime(places[1].parent, (1, 1))
    open_source(urls[2], cache_gb=two)
    assert [place.exists() for place in places] == [True, False, True]
    release_copies()
    os.utime(places[2].parent, (1, 1))
    # A use counts, not the time of making.
    open_source(urls[2], cache_gb=two)
    release_copies()
    os.utime(places[0].parent, (3, 3))
    open_source(urls[1], cache_gb=two)
    assert [place.exists() for place in places] == [False, True, True]
    assert len(list((places[0].parent.parent / "leases").iterdir())) == 1


def test_a_copy_stays_while_another_process_that_has_taken_it_lives(data, web):
    size, other_size = ((data / f"shards/{n:03d}.tar").stat().st_size for n in (0, 1))
    first, second = (f"{web.url}/shards/{n:03d}.tar" for n in (0, 1))
    room_for_one = (max(size, other_size) + 100) / 1e9
    open_source(first, cache_gb=room_for_one)
    place = place_of(first, size, remote.state_of(first).version)
    release_copies()

    # A lock belongs to an open file, so this one is as another process's.
    lease = place.parent.parent / "leases" / "other"
    other = os.open(lease, os.O_WRONLY | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    os.write(other, f"{place.parent.name}\n".encode())
    source = open_source(second, cache_gb=room_for_one)
    assert place.exists() and isinstance(source._shard(0), RemoteFile)

    os.close(other)
    source = open_source(second, cache_gb=room_for_one)
    assert not place.exists() and isinstance(source._shard(0), LocalFile)
    assert not lease.exists()


@pytest.mark.parametrize(
    "url, name",
    [
        ("https://host/a/0.tar?v=1", "0.tar"),
        ("https://host/a/..", "object"),
        ("s3://bucket/.reserved", "reserved"),
        ("s3://bucket/a/", "object"),
        (f"s3://bucket/{'x' * 300}.tar", "x" * 96 + ".tar"),
    ],
)
def test_a_copy_has_a_name_of_its_own_in_a_folder_of_its_own(url, name, cache_folder):
    place = place_of(url, 3, 4)
    assert place.name == name and place.parent.parent == cache_folder / "copies"
    others = (place_of(url + "x", 3, 4), place_of(url, 5, 4), place_of(url, 3, 5))
    assert place.parent not in [other.parent for other in others]


@pytest.mark.parametrize(
    "path", ["csv/pairs.csv", "csv/captions.txt", "jsonl/pairs.jsonl", "parquet/pairs.parquet"]
)
@pytest.mark.parametrize("where", ["web", "bucket"])
def test_tables_at_urls_are_those_on_the_disk(data, web, bucket, where, path):
    base = web.url if where == "web" else bucket
    assert_same_pairs(open_source(str(data / path)), open_source(f"{base}/{path}"))


def test_a_table_on_the_disk_may_name_images_at_urls(data, web, tmp_path):
    table = tmp_path / "pairs.csv"
    lines = [f"{web.url}/csv/images/{index:04d}.jpg\tcaption {index}" for index in (0, 1, 9)]
    table.write_text("\n".join(["filepath\ttitle", *lines]))
    source = open_source(str(table))
    expected = open_source(str(data / "csv/pairs.csv"))
    assert np.array_equal(source[1].image, expected[1].image)
    with pytest.raises(BadSample, match="there is no http"):
        source[2]
    # One server of many that fails is a bad sample, and not the end of the run.
    web.faults = [500] * (remote.IMAGE_TRIES - 1)
    assert np.array_equal(source[0].image, expected[0].image)
    web.faults = [500] * remote.IMAGE_TRIES
    with pytest.raises(BadSample, match="failed 3 times, at last with HTTP status 500"):
        source[0]
    assert not web.faults


def test_an_image_on_the_web_is_one_request(data, web):
    url, content = f"{web.url}/csv/images/0000.jpg", (data / "csv/images/0000.jpg").read_bytes()
    assert remote.read_object(url, 10**6) == content
    assert [(request.method, request.range) for request in web.requests] == [("GET", "")]
    web.faults = ["drop"]
    assert remote.read_object(url, 10**6) == content and len(web.requests) == 3


def test_an_image_on_the_web_that_is_too_large_is_refused_by_its_first_blocks(web, monkeypatch):
    path, url = web.root / "large.jpg", f"{web.url}/large.jpg"
    path.write_bytes(b"x" * 101)
    assert remote.read_object(url, 101) == b"x" * 101

    write, written = remote._CheckedFile.write, []
    monkeypatch.setattr(
        remote._CheckedFile,
        "write",
        lambda file, block: written.append(len(block)) or write(file, block),
    )
    for size in (101, 12_000_000):
        path.write_bytes(b"x" * size)
        with pytest.raises(RemoteError, match=r"large\.jpg: more than 100 bytes are too many$"):
            remote.read_object(url, 100)
    path.unlink()
    assert len(web.requests) == 3
    # A block has at most 5 MiB, and the second one is not written.
    assert sum(written) < size


@pytest.mark.parametrize(
    "url, said",
    [
        ("pipe:aws s3 cp s3://b/0.tar -", "cannot be read at random; name the URL itself"),
        ("az://container/0.tar", "data is read from s3://, gs://, hf://, https://"),
        ("https://user:secret@host/0.tar", "the URL holds a credential"),
        ("https://host/0.tar?X-Amz-Signature=secret", "the URL holds a credential"),
        ("https://host/0.tar?access_token=secret", "the URL holds a credential"),
        ("https://host/0.tar?a=1&access-key=secret", "the URL holds a credential"),
        ("https://host/0.tar?AWSAccessKeyId=secret", "the URL holds a credential"),
        ("https://host/0.tar?password=secret", "the URL holds a credential"),
        ("https://u:secret@secret@host/0.tar", "https://host/0.tar: the URL holds a credential"),
        ("S3://bucket/0.tar", "write s3:// in small letters"),
        ("gs://bucket/0.tar", r"needs the package gcsfs: pip install 'clipcore\[remote\]'"),
    ],
)
def test_what_cannot_be_read_is_one_line_without_secrets(url, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=said) as caught:
        open_source(url)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_plain_key_in_a_url_is_no_credential():
    remote.check_url("https://host/a.jpg?key=1")


def test_a_shard_that_changes_between_two_samples_ends_the_run(web, data, monkeypatch):
    path = data / "changing.tar"
    image = (data / "csv/images/0000.jpg").read_bytes()
    pairs = [(f"{n}.{end}", x) for n in "ab" for end, x in (("jpg", image), ("txt", b"before"))]
    write_tar(path, pairs)
    by_ranges = open_source(f"{web.url}/changing.tar", cache_gb=0)
    assert by_ranges[0].caption == "before"
    write_tar(path, [(name, x.replace(b"before", b"behind")) for name, x in pairs])
    monkeypatch.setattr(random_access, "CHECK_EVERY_S", 0.0)
    with pytest.raises(DataError, match=r"changing\.tar was changed after the run began"):
        by_ranges[1]
    path.unlink()


def test_an_error_of_one_shard_waits_for_no_other(web, data):
    """The second shard does not exist, and the first one's copy waits for a lock until it is told to stop."""
    url = f"{web.url}/shards/000.tar"
    place = place_of(url, *remote.state_of(url)[:2])
    place.parent.parent.mkdir(parents=True)
    with (
        locked(place.parent.parent / f"{place.parent.name}.lock"),
        pytest.raises(DataError, match="there is no http"),
    ):
        open_source(f"{web.url}/shards/{{000,missing}}.tar")


def test_a_full_disk_is_no_fault_of_the_network(web, monkeypatch):
    """A server without ranges sends the whole file, which fsspec writes."""
    web.has_ranges = False
    url = f"{web.url}/shards/000.tar"

    class FullDisk(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        remote.copy_object(url, remote.state_of(url), FullDisk(), lambda: None)
    assert len(web.reads()) == 1


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_pause_between_tries_ends_when_the_copy_is_stopped(web, monkeypatch, has_ranges):
    class Stopped(Exception):
        pass

    def stop_after_a_failed_try() -> None:
        if web.reads():
            raise Stopped

    web.has_ranges = has_ranges
    url = f"{web.url}/shards/000.tar"
    state = remote.state_of(url)
    web.faults = [500] * remote.TRIES
    # Its tries would take longer than this test may.
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 1000.0)
    with pytest.raises(Stopped):
        remote.copy_object(url, state, io.BytesIO(), stop_after_a_failed_try)
    assert len(web.reads()) == 1


def test_prepared_shards_of_a_url_are_those_of_the_disk(data, web, tmp_path):
    digests = []
    for base in (str(data), web.url):
        output = tmp_path / str(len(digests))
        prepare(f"{base}/{PATTERN}", output, Settings(ImageFormat("jpeg", 30), 8))
        shards = sorted(output.glob("*.tar"))
        digests.append([hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards])
    assert digests[0] == digests[1] and digests[0]


def test_features_know_the_version_of_data_at_urls(data, web, tmp_path):
    """Stored features are of an object's version, and of the same one after its copy is made anew."""
    decoder = Decoder("pillow")
    shard = web.root / "changing.tar"

    def fingerprint(path: str) -> str:
        return fingerprint_of_pairs(open_source(f"{web.url}/{path}", "auto"), "", decoder)

    found = []
    content = (data / "shards" / "000.tar").read_bytes()
    for end in (b"\0", b"\1"):  # behind the end of the archive: no member moves
        shard.write_bytes(content[:-1] + end)
        found += [fingerprint("changing.tar"), fingerprint("changing.tar")]
    shard.unlink()
    assert found[0] == found[1] != found[2] == found[3]

    table = fingerprint("parquet/pairs.parquet")
    (copy,) = (local_copies.cache_folder() / "copies").glob("*/pairs.parquet")
    copy.unlink()
    assert fingerprint("parquet/pairs.parquet") == table
