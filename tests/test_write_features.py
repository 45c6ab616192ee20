"""Features of images and captions in a file: any input, any death of the process, and what is not gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shards import picture, write_csv, write_images, write_shards
from weight_files import saved

from clipcore.data import DataError
from clipcore.data.transforms import ImageTransform, normalize_images
from clipcore.features.__main__ import main
from clipcore.features.row_file import RowFile
from clipcore.features.write import write_features
from clipcore.tokenizer import byte_tokenizer
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP

pytestmark = pytest.mark.fast

SIZE = 32


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    return create_model("ViT-nano-8-32", force_vocab_size=514).eval()


TRANSFORM = ImageTransform(SIZE, is_train=False)


def write(model: CLIP, data: Any, out: Path, **options: Any) -> np.ndarray:
    options = {"batch_size": 4, **options}
    return write_features(model, TRANSFORM, data, out, **options)


def files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of what lies beside features, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("x*")}


def test_rows_are_the_models_features_of_the_images_that_can_be_read(model, tmp_path):
    write_images(tmp_path, 9)
    folder = tmp_path / "images"
    (folder / "0004.jpg").write_bytes(b"nothing")
    single = tmp_path / "one.jpg"
    single.write_bytes(picture(20)[0])
    noted: list[str] = []
    rows = write(model, [str(folder), str(single)], tmp_path / "x.npy", note=noted.append)

    names = (tmp_path / "x.txt").read_text().splitlines()
    assert names == [f"{folder}/{n:04d}.jpg" for n in range(9) if n != 4] + [str(single)]
    assert isinstance(rows, np.memmap) and rows.shape == (9, model.config.embed_dim)
    assert rows.dtype == np.float32 and np.array_equal(rows, np.load(tmp_path / "x.npy"))
    numbers = [n for n in range(9) if n != 4] + [20]
    for start, end in ((0, 4), (4, 7), (7, 9)):  # the second batch has an image less
        crops = []
        for number in numbers[start:end]:
            path = single if number == 20 else folder / f"{number:04d}.jpg"
            crops.append(torch.from_numpy(TRANSFORM.crop(Image.open(path).convert("RGB")).copy()))
        with torch.no_grad():
            images = normalize_images(torch.stack(crops), TRANSFORM.mean, TRANSFORM.std)
            expected = model.encode_image(images)
        assert np.allclose(rows[start:end], expected.numpy(), atol=1e-5)

    record = json.loads((tmp_path / "x.json").read_text())
    assert record["shape"] == [9, model.config.embed_dim] and record["num_transparent"] == 0
    ((key, reason),) = record["unreadable"]
    assert key == f"{folder}/0004.jpg" and reason
    assert any("1 of 10 samples cannot be read and have no row" in line for line in noted)
    assert set(files(tmp_path)) == {"x.npy", "x.txt", "x.json"}


class Killed(BaseException):
    """As by SIGKILL: nothing is tidied up."""


def killed_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let a process die at the ``number``-th time that it puts something on the disk."""
    left = iter(range(number))

    def dying(do: Callable[..., Any]) -> Callable[..., Any]:
        def dies(*arguments: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return do(*arguments)

        return dies

    for name in ("fdatasync", "fsync", "replace"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


def test_a_killed_process_is_gone_on_with_to_the_same_bits(model, tmp_path, monkeypatch):
    """At each place where something is put on the disk, until there is none left."""
    data = str(write_csv(tmp_path / "data", 11))
    (tmp_path / "data/images/0002.jpg").write_bytes(b"nothing")
    (tmp_path / "whole").mkdir()
    write(model, data, tmp_path / "whole" / "x.npy")
    whole = files(tmp_path / "whole")

    encoded, encode = [], model.encode_image
    monkeypatch.setattr(
        model, "encode_image", lambda x, **more: encoded.append(len(x)) or encode(x, **more)
    )
    number, num_killed, is_done = 0, 0, False
    while not is_done:
        folder = tmp_path / str(number)
        folder.mkdir()
        with monkeypatch.context() as patch:
            killed_after(patch, number)
            try:
                write(model, data, folder / "x.npy")
                is_done = True
            except Killed:
                num_killed += 1
        encoded.clear()
        rows = write(model, data, folder / "x.npy")
        assert files(folder) == whole and len(rows) == 10
        # A batch with a line is not encoded again. First come the settings, then a batch's rows and its line.
        assert sum(encoded) == 10 - (0, 3, 7, 10)[min(number // 2, 3)]
        number += 1
    # The settings; three batches of rows and lines; the file, its names, its record, and their folder.
    assert num_killed >= 1 + 3 * 2 + 4


@pytest.mark.parametrize(
    ("name", "change", "num_kept"),
    [
        ("x.npy.part", lambda content: content[:-1], 4),
        ("x.npy.part", lambda content: content[:300] + b"?" + content[301:], 0),
        ("x.npy.part", lambda content: b"", 0),
        ("x.npy.part", lambda content: content + b"more", 8),
        ("x.npy.journal", lambda content: content[:-1], 4),
        ("x.npy.journal", lambda content: content + b'{"samp', 8),
        ("x.npy.journal", lambda content: b"", 0),
    ],
)
def test_what_a_crash_of_the_machine_damages_is_made_again(
    model, tmp_path, monkeypatch, name, change, num_kept
):
    data = str(tmp_path / "images")
    write_images(tmp_path, 12)
    rows = np.array(write(model, data, tmp_path / "y.npy"))
    with monkeypatch.context() as patch:
        killed_after(patch, 4)  # with two of three batches on the disk
        with pytest.raises(Killed):
            write(model, data, tmp_path / "x.npy")
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes()))
    if path.suffix == ".journal":
        with open(tmp_path / "x.npy.part", "ab") as part:
            part.write(b"?" * 100_000)
    noted: list[str] = []
    assert np.array_equal(write(model, data, tmp_path / "x.npy", note=noted.append), rows)
    for suffix in ("npy", "txt"):
        assert (tmp_path / f"x.{suffix}").read_bytes() == (tmp_path / f"y.{suffix}").read_bytes()
    kept = [f"goes on behind {num_kept} of 12 samples"] if num_kept else []
    assert noted == kept


@pytest.mark.parametrize("is_begun", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "with --batch-size 4, and another one rounds differently"),
        ({"dtype": "float16"}, "with --dtype float32"),
        ({"normalize": True}, "another choice of --normalize"),
        ({"captions_by": byte_tokenizer()}, "of images, not captions; leave --text out"),
        ({"data": "rewritten"}, "of other data, or of files that have changed since"),
        ({"data": "more"}, "of other data"),
        ({"model": "other"}, "of another model"),
        (
            {"transform": ImageTransform(SIZE, False, mean=(0, 0, 0))},
            "of another model, or with an",
        ),
    ],
)
def test_other_settings_are_not_gone_on_with(
    model, tmp_path, monkeypatch, is_begun, change, message
):
    data, out = tmp_path / "images", tmp_path / "x.npy"
    rows = write_images(tmp_path, 8)
    (tmp_path / "pairs.csv").write_text(
        "".join(f"{a},{b}\n" for a, b in [("filepath", "title"), *rows])
    )
    if is_begun:
        with monkeypatch.context() as patch:
            killed_after(patch, 3)
            with pytest.raises(Killed):
                write(model, str(data), out)
    else:
        write(model, str(data), out)
    before = files(tmp_path)

    options: dict[str, Any] = {"batch_size": 4, "data": str(data), "transform": TRANSFORM} | change
    if change == {"data": "rewritten"}:
        (data / "0001.jpg").write_bytes(picture(30)[0])
        options["data"] = str(data)
    elif change == {"data": "more"}:
        (data / "0100.jpg").write_bytes(picture(30)[0])
        options["data"] = str(data)
    elif "captions_by" in change:
        options["data"] = str(tmp_path / "pairs.csv")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = create_model("ViT-nano-8-32", force_vocab_size=514).eval()
    chosen = other if options.pop("model", None) else model
    with pytest.raises(ValueError, match=message) as caught:
        write_features(chosen, options.pop("transform"), options.pop("data"), out, **options)
    assert f"{out} {'was begun' if is_begun else 'is'}" in str(caught.value)
    assert str(caught.value).endswith("remove it or name another --out")
    assert files(tmp_path) == before


def test_a_whole_file_is_not_made_again(model, tmp_path, monkeypatch):
    write_images(tmp_path, 3)
    data, out = str(tmp_path / "images"), tmp_path / "x.npy"
    rows = np.array(write(model, data, out))
    monkeypatch.setattr(model, "encode_image", None)
    noted: list[str] = []
    assert np.array_equal(write(model, data, out, note=noted.append), rows)
    assert noted == [f"{out} is whole already"]
    np.save(out, rows[:2])
    with pytest.raises(ValueError, match="has changed since it was written; remove it"):
        write(model, data, out)


def test_files_of_others_are_not_replaced(model, tmp_path):
    write_images(tmp_path, 3)
    data, out = str(tmp_path / "images"), tmp_path / "x.npy"
    replaced = "would be replaced; remove it or name another --out"
    messages = {"x.npy": "x.json does not describe it", "x.json": replaced, "x.txt": replaced}
    for name, message in messages.items():
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=message):
            write(model, data, out)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
        assert not files(tmp_path)
    assert len(write(model, data, out)) == 3


def test_two_processes_do_not_write_one_file(tmp_path):
    """Such a lock is a process's own, so that the other one is a child."""
    settings = {"dtype": "float32"}
    with RowFile(tmp_path / "x.npy", settings):
        child = os.fork()
        if not child:
            try:
                with RowFile(tmp_path / "x.npy", settings):
                    os._exit(1)
            except ValueError as error:
                os._exit(0 if "another process is writing" in str(error) else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_captions_have_a_row_each(model, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.context_length = model.context_length
    folder = tmp_path / "data"
    folder.mkdir()
    captions = [["a cat", "one cat"], "a dog", "  ", "a bird"]
    lines = [{"image": f"{n}.jpg", "caption": text} for n, text in enumerate(captions)]
    for n in range(4):
        (folder / f"{n}.jpg").write_bytes(picture(n)[0])
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = write(
        model,
        str(folder / "pairs.jsonl"),
        tmp_path / "x.npy",
        captions_by=tokenizer,
        normalize=True,
    )
    names = (tmp_path / "x.txt").read_text().splitlines()
    assert [name.rpartition(" ")[2] for name in names] == ["1", "1", "2", "4"]
    assert json.loads((tmp_path / "x.json").read_text())["unreadable"][0][1] == "empty caption"
    with torch.no_grad():
        texts = ["a cat", "one cat", "a dog", "a bird"]
        expected = model.encode_text(tokenizer(texts), normalize=True)
    assert np.allclose(rows, expected.numpy(), atol=1e-6)

    # A changed caption changes no file of a picture.
    table = folder / "pairs.jsonl"
    table.write_text(table.read_text().replace("a bird", "a fish"))
    with pytest.raises(ValueError, match="of other data"):
        write(model, str(table), tmp_path / "x.npy", captions_by=tokenizer, normalize=True)


def test_the_command_reads_shards_tables_and_embedded_data(model, tmp_path, capsys):
    weights = saved(tmp_path / "weights.pt", model)
    byte_tokenizer().save(tmp_path / "bytes.txt.gz")
    shards = write_shards(tmp_path / "shards", 2, 3)
    table = write_csv(tmp_path / "table", 5)
    line = ["--pretrained", str(weights), "--bpe-path", str(tmp_path / "bytes.txt.gz")]
    line += ["--batch-size", "4", "--device", "cpu", "--dtype", "float16"]
    for name, data, number in (("tar", shards, 6), ("csv", table, 5)):
        for of, more in (("images", []), ("captions", ["--text"])):
            out = tmp_path / f"{name}-{of}.npy"
            assert main([str(data), "--out", str(out), *line, *more]) == 0, capsys.readouterr().err
            rows = np.load(out, mmap_mode="r")
            assert rows.shape == (number, model.config.embed_dim) and rows.dtype == np.float16
            assert f"{out}: {number} rows of" in capsys.readouterr().out
    # Several at once, in their order.
    out = tmp_path / "both.npy"
    image = table.parent / "images" / "0003.jpg"
    assert main([str(image), str(table), str(shards), "--out", str(out), *line]) == 0
    apart = [np.load(tmp_path / f"{name}-images.npy") for name in ("csv", "tar")]
    expected = np.concatenate([apart[0][3:4], *apart])
    assert np.allclose(np.load(out), expected, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--out", "x.pt"], "--out names a file that ends in .npy, got x.pt"),
        (["--out", "no/x.npy"], "there is no folder no; create it first"),
        (["--batch-size", "0"], "--batch-size is at least 1, got 0"),
        (["--workers", "-1"], "--workers is at least 0, got -1"),
        (["--max-bad-fraction", "2"], "--max-bad-fraction lies between 0 and 1"),
        (["--device", "tpu"], "--device is cpu or cuda, not 'tpu'"),
        (["--text"], "is an image without a caption; --text takes data with captions"),
        (["missing.jpg"], "there is no missing.jpg"),
        (["missing.tar"], "missing.tar"),
        (["broken.jpg"], "nothing of broken.jpg can be read, such as broken.jpg: "),
        (["broken.jpg", "--max-bad-fraction", "0"], "1 of 1 samples of broken.jpg cannot be read"),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ok.jpg").write_bytes(picture(0)[0])
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    saved(tmp_path / "weights.pt", model)
    byte_tokenizer().save(tmp_path / "bytes.txt.gz")
    line = ["--pretrained", "weights.pt", "--bpe-path", "bytes.txt.gz", "--out", "x.npy"]
    data = [] if change[0].endswith(("jpg", "tar")) else ["ok.jpg"]
    assert (
        main([*data, *change[:1], *line, *change[1:]] if not data else [*data, *line, *change]) == 2
    )
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1] and error[-1].startswith("clipcore.features: error: ")
    assert not (tmp_path / "x.npy").exists()


def test_features_that_are_too_large_for_float16_are_said(model, tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(picture(0)[0])
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda x, **more: encode(x, **more) * 1e6)
    with pytest.raises(DataError, match="too large for float16; take --dtype float32"):
        write(model, str(tmp_path / "a.jpg"), tmp_path / "x.npy", dtype="float16")
