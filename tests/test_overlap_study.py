"""Copies planted among training images: which share is found, what the score gains, and what is said of unreadable ones."""

from __future__ import annotations

import argparse
import base64
import io
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from evaluation_sets import nano_subject, noise_set, split_of
from given_features import GivenFeatures, GivenSource
from labelled_sets import put
from PIL import Image
from shards import picture, write_csv, write_folder, write_shards

from clipcore.data import DataError
from clipcore.data.glyphs import GlyphSource
from clipcore.data.loader import eval_batches
from clipcore.data.plain_images import PlainImages
from clipcore.data.sources import left_out_of
from clipcore.data.tables import CsvSource
from clipcore.data.transforms import ImageTransform
from clipcore.evaluate import arguments, commands, image_descriptors, overlap_study
from clipcore.evaluate.altered_copies import ALTERATIONS, altered_copy, shrunk
from clipcore.evaluate.arguments import add_overlap_arguments
from clipcore.evaluate.datasets import Split
from clipcore.evaluate.features import FeatureStore
from clipcore.evaluate.image_descriptors import (
    Descriptor,
    Reading,
    TrainingStream,
    model_descriptor,
    pixel_descriptor,
)
from clipcore.evaluate.overlap_study import adjust, measure_overlap, open_training
from clipcore.evaluate.results import OVERLAP, ZERO_SHOT, Result
from clipcore.terminal import Parser
from clipcore.towers.factory import create_model

pytestmark = pytest.mark.fast


def pattern(seed: int, width: int = 60, height: int = 48) -> np.ndarray:
    """Return a picture of soft random colours, uint8 [height, width, 3], like no other one."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


# Of 40 evaluation images every second of the first 20 is in training, altered.
NUM_IMAGES, PLANTED = 40, list(range(0, 20, 2))
# A cropped copy of so coarse a picture has a cosine of 0.84, the nearest other picture one of 0.3.
THRESHOLD = 0.6
# 9 of the 10 planted ones are right, and 21 of the 30 others.
IS_RIGHT = torch.zeros(NUM_IMAGES, dtype=torch.bool)
IS_RIGHT[PLANTED[:9]] = True
IS_RIGHT[[n for n in range(NUM_IMAGES) if n not in PLANTED][:21]] = True


def planted_copies() -> list[np.ndarray]:
    """Return a copy of each planted image, by the alterations in turn."""
    alterations = list(ALTERATIONS.values())
    copies = []
    for number, index in enumerate(PLANTED):
        image = Image.fromarray(pattern(index))
        copy = alterations[number % len(alterations)](image, np.random.default_rng(index))
        copies.append(np.asarray(copy))
    return copies


def evaluation() -> GivenFeatures:
    source = GivenSource([pattern(index) for index in range(NUM_IMAGES)], "evaluation")
    return GivenFeatures(torch.ones(NUM_IMAGES, 2), source)


def training() -> tuple[GivenSource, list[int]]:
    """Return 35 training images, of which every seventh cannot be read, and the rows of the copies in them."""
    pictures: list[np.ndarray | None] = [
        None if n % 7 == 0 else pattern(1000 + n) for n in range(35)
    ]
    rows = [n for n in range(35) if n % 7 in (1, 4)]
    for row, copy in zip(rows, planted_copies(), strict=True):
        pictures[row] = copy
    return GivenSource(pictures, "training"), rows


def test_training_images_are_read_once_for_several_data_sets(monkeypatch):
    monkeypatch.setattr(image_descriptors, "_BLOCK_ROWS", 9)
    source, _ = training()
    stream = TrainingStream(source, pixel_descriptor(), Reading(4), torch.device("cpu"), None)
    looked = []
    read = type(source).__getitem__
    monkeypatch.setattr(
        type(source), "__getitem__", lambda self, row: looked.append(self.name) or read(self, row)
    )
    found = []
    for _ in range(2):
        measured = measure_overlap(
            evaluation(), IS_RIGHT, source, "x", pixel_descriptor(), THRESHOLD, stream=stream
        )
        measured[1].pop("seconds")
        found.append(measured)
        # The nearest pairs' pictures are read again for the page.
        num_shown = sum(one["training_image"] is not None for one in measured[1]["nearest"])
        assert looked.count("training") == 35 + len(found) * num_shown
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("most_bytes", "free", "folder", "num_passes", "said"),
    [
        # All in memory; from the first block on in a file; two blocks in memory first; nowhere.
        (1 << 30, 0, "kept", 1, ""),
        (0, 1 << 30, "kept", 1, ""),
        (2 * 12 * 768 * 4, 1 << 30, "kept", 1, ""),
        (0, 1 << 30, None, 3, ""),
        (0, 200_000, "kept", 3, "kept: 107,520 bytes, of 200,000 that are free in "),
        (0, 1 << 30, "file/kept", 3, "kept: Not a directory"),
    ],
)
def test_descriptors_are_kept_where_there_is_room(
    monkeypatch, tmp_path, most_bytes, free, folder, num_passes, said
):
    """Training images are read once for all data sets also where their descriptors take too much memory."""
    monkeypatch.setattr(image_descriptors, "_BLOCK_ROWS", 9)
    monkeypatch.setattr(image_descriptors, "_MOST_KEPT_BYTES", most_bytes)
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(image_descriptors.shutil, "disk_usage", lambda _: usage)
    put(tmp_path / "file", "no folder")
    source, _ = training()
    looked = []
    read = type(source).__getitem__
    monkeypatch.setattr(
        type(source), "__getitem__", lambda self, row: looked.append(row) or read(self, row)
    )
    place = None if folder is None else tmp_path / folder
    cpu, counted = torch.device("cpu"), list[int]()
    stream = TrainingStream(source, pixel_descriptor(), Reading(4), cpu, counted.append, place)
    first, second, third = (list(stream.blocks()) for _ in range(3))

    assert len(looked) == num_passes * 35 and sum(counted) == 3 * 35
    for other in (second, third):
        assert [block.shape for block in other] == [block.shape for block in first]
        assert torch.equal(torch.cat(other), torch.cat(first))
    assert len(first) > 2 and (stream.num_read, len(stream.unreadable)) == (30, 5)
    kept = [note for note in stream.notes() if "read again" in note]
    assert len(kept) == bool(said) and said in "".join(kept)
    # The file has no name, so that nothing is left of a process that is killed.
    assert place is None or not place.is_dir() or not list(place.iterdir())


def test_a_block_that_cannot_be_written_or_read(monkeypatch, tmp_path):
    monkeypatch.setattr(image_descriptors, "_MOST_KEPT_BYTES", 0)
    block = torch.arange(12.0).reshape(4, 3)
    kept = image_descriptors._KeptBlocks(tmp_path, 8)
    kept.add(block)
    kept.add(block + 1)
    (first, second) = kept.blocks(torch.device("cpu"))
    assert torch.equal(first, block) and torch.equal(second, block + 1)
    # Of a half-read pass the next one begins at the first block again.
    next(kept.blocks(torch.device("cpu")))
    assert torch.equal(next(kept.blocks(torch.device("cpu"))), block)
    kept._file.truncate(90)
    with pytest.raises(OSError, match=r"were cut off; run the command again"):
        list(kept.blocks(torch.device("cpu")))

    full = image_descriptors._KeptBlocks(tmp_path, 8)
    full.add(block)
    with open("/dev/full", "wb") as file:
        full._file = file
        full.add(block)
    assert not full.is_whole and full.reason == "No space left on device"
    full.add(block)
    assert list(full.blocks(torch.device("cpu"))) == []


def overlap_arguments(**more: object) -> argparse.Namespace:
    parser = Parser()
    add_overlap_arguments(parser)
    parsed = parser.parse_args(["--train-data", "x", "--threshold", "0.5"])
    running = {"templates": [], "batch_size": 4, "workers": 0, "suite": None}
    return argparse.Namespace(**{**vars(parsed), **running, **more})


@pytest.mark.parametrize(("num_sets", "num_passes"), [(1, 2), (2, 1)])
def test_the_command_keeps_descriptors_for_several_data_sets(
    monkeypatch, tmp_path, num_sets, num_passes
):
    """A single data set has no use for them; that it asks twice here shows that none were kept."""
    monkeypatch.setattr(image_descriptors, "_MOST_KEPT_BYTES", 0)
    monkeypatch.setattr(overlap_study, "NUM_PAIRS_SHOWN", 0)
    for number in range(5):
        put(tmp_path / "set" / f"{number}.jpg", picture(number)[0])
    looked, read = [], PlainImages.__getitem__
    monkeypatch.setattr(
        PlainImages, "__getitem__", lambda self, row: looked.append(row) or read(self, row)
    )
    subject = nano_subject(cache=tmp_path / "features")
    names = [f"set {number}" for number in range(num_sets)]
    arguments = overlap_arguments(train_data=str(tmp_path / "set"), data=names)
    for name in ("first", "second"):
        dataset = noise_set(2, [split_of("test", [0, 1, 1], fingerprint=name)], name=name)
        result = commands.measure("overlap", subject, dataset, arguments)
        assert result.details["num_training"] == 5
    assert looked == num_passes * list(range(5))


@pytest.mark.parametrize("threshold", [THRESHOLD, None])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_planted_copies_are_found_and_the_gain_is_exact(monkeypatch, threshold, batch_size):
    monkeypatch.setattr(image_descriptors, "_BLOCK_ROWS", 9)
    source, rows = training()
    seen = []
    metrics, details = measure_overlap(
        evaluation(),
        IS_RIGHT,
        source,
        "my training data",
        pixel_descriptor(),
        threshold,
        Reading(batch_size),
        seen.append,
    )
    assert metrics["contamination"] == 10 / 40 and details["num_overlap"] == 10
    assert (metrics["score"], metrics["clean_score"]) == (30 / 40, 21 / 30)
    assert metrics["overlap_score"] == 9 / 10
    assert metrics["gain"] == pytest.approx(0.05, abs=1e-12)
    assert 0 < metrics["p_value"] < 1 and details["overlap_interval"][0] < 0.9
    assert details["threshold_from"] == ("proposed" if threshold is None else "given")
    assert (details["num_training"], details["num_training_unreadable"]) == (30, 5)
    assert details["notes"] == [
        "5 of 35 training images cannot be read, such as training/0: unreadable image"
    ]
    assert sum(seen) == 35

    # Each planted image beside its copy, whose number counts the unreadable ones.
    nearest = details["nearest"]
    assert len(nearest) == NUM_IMAGES
    assert [pair["cosine"] for pair in nearest] == sorted(
        (pair["cosine"] for pair in nearest), reverse=True
    )
    twins = {pair["image_key"]: pair["training_key"] for pair in nearest[:10]}
    planted = {f"image {n}": f"training/{row}" for n, row in zip(PLANTED, rows, strict=True)}
    assert twins == planted
    Result("set", "ViT", "w", OVERLAP, metrics, details).to_dict()


def test_the_nearest_pairs_are_small_pictures(monkeypatch):
    monkeypatch.setattr(overlap_study, "NUM_PAIRS_SHOWN", 3)
    source, _ = training()
    _, details = measure_overlap(evaluation(), IS_RIGHT, source, "x", pixel_descriptor(), THRESHOLD)
    assert len(details["nearest"]) == 3
    for pair in details["nearest"]:
        for name in ("image", "training_image"):
            prefix, content = pair[name].split(",")
            assert prefix == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(content))) as image:
                assert image.mode == "RGB" and max(image.size) <= 64
    assert shrunk(pattern(0, 1000, 500), 64).size == (64, 32)
    assert shrunk(np.zeros((1, 5000), np.uint8), 64).size == (64, 1)


def test_the_order_of_images_does_not_change_the_proposed_threshold(monkeypatch):
    """Those whose keys have the smallest hashes are altered, and how depends on the key."""
    monkeypatch.setattr(overlap_study, "NUM_COPIES", 15)
    source, _ = training()
    found = []
    for order in (list(range(NUM_IMAGES)), list(range(NUM_IMAGES))[::-1]):
        images = GivenSource([pattern(n) for n in order], "evaluation")
        keys = [f"image {n}" for n in order]
        features = GivenFeatures(torch.ones(NUM_IMAGES, 2), images, keys=keys)
        _, details = measure_overlap(features, IS_RIGHT, source, "x", pixel_descriptor())
        found.append(details["threshold"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_an_altered_copy_depends_on_the_key_alone():
    copies = [altered_copy(pattern(3), key).tobytes() for key in ("a", "b", "c", "a")]
    assert copies[0] == copies[3] and len(set(copies)) == 3
    kinds = {altered_copy(pattern(3), str(n)).size == (60, 48) for n in range(20)}
    assert kinds == {True, False}
    for key in map(str, range(20)):
        assert altered_copy(np.zeros((1, 1), np.uint8), key).mode == "RGB"


def test_images_that_are_there_twice_are_not_other_images():
    """Eight of forty: the threshold is that of the copies all the same."""
    pictures = [pattern(n % 36) for n in range(40)]
    features = GivenFeatures(torch.ones(40, 2), GivenSource(pictures, "evaluation"))
    source, _ = training()
    _, details = measure_overlap(features, IS_RIGHT, source, "x", pixel_descriptor())
    assert 0.5 < details["threshold"] < 0.9
    assert details["notes"][0] == ("8 of 40 images that the threshold is proposed from occur twice")


def test_no_threshold_where_other_images_are_as_near_as_copies():
    """Each picture is there twice."""
    source = GivenSource([pattern(n // 2) for n in range(20)], "twins")
    features = GivenFeatures(torch.ones(20, 2), source)
    message = "no threshold separates copies of images of twins from its other images .*; give --threshold"
    with pytest.raises(DataError, match=message):
        measure_overlap(features, IS_RIGHT[:20], source, "x", pixel_descriptor())
    flat = GivenSource([np.full((9, 9), 7, np.uint8)], "flat")
    with pytest.raises(DataError, match="no threshold"):
        measure_overlap(
            GivenFeatures(torch.ones(1, 2), flat), IS_RIGHT[:1], source, "x", pixel_descriptor()
        )


def test_pixels_of_images_that_the_model_could_read_alone():
    """The third image has no features, and so no answer: it is not compared."""
    source, _ = training()
    pictures = [pattern(0), pattern(1), pattern(2), pattern(3)]
    features = GivenFeatures(
        torch.ones(3, 2), GivenSource(pictures, "evaluation"), rows_N=[0, 1, 3]
    )
    metrics, details = measure_overlap(
        features, IS_RIGHT[:3], source, "x", pixel_descriptor(), THRESHOLD
    )
    assert metrics["contamination"] == 1 / 3
    keys = [pair["image_key"] for pair in details["nearest"]]
    assert keys[0] == "image 0" and set(keys) == {"image 0", "image 1", "image 3"}

    gone = GivenFeatures(torch.ones(2, 2), GivenSource([pattern(0), None], "evaluation"))
    with pytest.raises(DataError, match="1 images of evaluation can no longer be read"):
        measure_overlap(gone, IS_RIGHT[:2], source, "x", pixel_descriptor(), THRESHOLD)


def test_features_of_a_model():
    """The cached features and those of training images agree: a copy to the bit has a cosine of one."""
    model, transform = create_model("ViT-nano-8-32").eval(), ImageTransform(32, is_train=False)
    source = GivenSource([pattern(n) for n in range(5)], "evaluation")
    split = Split("test", source, None, lambda: "", lambda: [f"image {n}" for n in range(5)])
    features = FeatureStore(model, transform, progress=False).features(split)
    trained = GivenSource([pattern(n) for n in (7, 3, 8)], "training")
    descriptor = model_descriptor(model, transform, "cpu")
    _, details = measure_overlap(features, IS_RIGHT[:5], trained, "x", descriptor, 0.5)
    first = details["nearest"][0]
    assert (first["image_key"], first["training_key"]) == ("image 3", "training/1")
    assert first["cosine"] == pytest.approx(1, abs=1e-6) and details["descriptor"] == "model"


def test_pixels_see_through_another_ratio_of_sides():
    """The descriptor takes the whole picture, whatever the model's preprocessing cuts off."""
    source = GivenSource([pattern(5, width, 48) for width in (30, 60, 180)])
    stream = TrainingStream(source, pixel_descriptor(), Reading(), torch.device("cpu"), None)
    (described,) = stream.blocks()
    assert (described @ described.T).min() > 0.97


def test_training_images_that_cannot_be_compared():
    nothing = GivenSource([None, None], "training")
    with pytest.raises(
        DataError, match=r"2 of 2 training images cannot be read.*; see --train-data"
    ):
        measure_overlap(evaluation(), IS_RIGHT, nothing, "x", pixel_descriptor(), THRESHOLD)
    source, _ = training()
    broken = Descriptor(
        "pixels", ImageTransform(8, False), lambda images: torch.full((len(images), 2), torch.nan)
    )
    with pytest.raises(ValueError, match="not finite"):
        measure_overlap(evaluation(), IS_RIGHT, source, "x", broken, THRESHOLD)
    with pytest.raises(ValueError, match="not finite"):
        measure_overlap(
            evaluation(), IS_RIGHT, source, "x", broken._replace(name="model"), THRESHOLD
        )
    with pytest.raises(DataError, match="a file of features has no images"):
        measure_overlap(
            GivenFeatures(torch.ones(2, 2)),
            IS_RIGHT[:2],
            source,
            "x",
            pixel_descriptor(),
            THRESHOLD,
        )


def test_rows_of_images_between_unreadable_ones():
    readable = [n for n in range(30) if n not in (0, 1, 5, 12, 29)]
    source = GivenSource([pattern(0) if n in readable else None for n in range(30)])
    stream = TrainingStream(source, pixel_descriptor(), Reading(4), torch.device("cpu"), None)
    assert sum(len(block) for block in stream.blocks()) == len(readable)
    assert stream.rows(np.arange(25)).tolist() == readable


def test_workers_read_the_same_and_end(monkeypatch):
    source, _ = training()
    alone, together = (
        measure_overlap(
            evaluation(), IS_RIGHT, source, "x", pixel_descriptor(), THRESHOLD, Reading(8, workers)
        )
        for workers in (0, 1)
    )
    for details in (alone[1], together[1]):
        del details["seconds"]
    assert alone == together

    closed = []

    def watched(*arguments, **options):
        try:
            yield from eval_batches(*arguments, **options)
        finally:
            closed.append(True)

    monkeypatch.setattr(image_descriptors, "eval_batches", watched)
    stream = TrainingStream(source, pixel_descriptor(), Reading(8), torch.device("cpu"), _stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        overlap_study._nearest(torch.ones(1, 768), stream)
    with monkeypatch.context() as patch:
        patch.setattr(overlap_study, "nearest_training", _take_one)
        stream = TrainingStream(source, pixel_descriptor(), Reading(8), torch.device("cpu"), None)
        patch.setattr(image_descriptors, "_BLOCK_ROWS", 1)
        with pytest.raises(MemoryError) as failed:
            overlap_study._nearest(torch.ones(1, 768), stream)
    # At once, although the traceback keeps the frames, and with them the iterator over what was read.
    assert closed == [True, True] and stopped.tb is not None and failed.tb is not None


def _stop(number: int) -> None:
    raise KeyboardInterrupt


def _take_one(described: torch.Tensor, blocks: Iterator[torch.Tensor]) -> None:
    next(blocks)
    raise MemoryError


def test_bonferroni_over_the_sets_of_a_model():
    def result(
        dataset: str, p_value: float | None, model: str = "a", task: str = OVERLAP
    ) -> Result:
        return Result(dataset, model, "w", task, {"p_value": p_value}, {"num_images": 1})

    before = [
        result("x", 0.01),
        result("y", 0.6),
        result("z", None),
        result("x", 0.02, "b"),
        result("x", 0.01, "a", ZERO_SHOT),
    ]
    after = adjust(before)
    assert [r.details.get("p_value_adjusted") for r in after] == [0.02, 1.0, None, 0.02, None]
    assert [r.details.get("num_tests") for r in after] == [2, 2, None, 1, None]
    assert [r.metrics for r in after] == [r.metrics for r in before]
    assert after[0].details["num_images"] == 1 and "num_tests" not in before[0].details


def test_training_data_as_for_training(tmp_path):
    glyphs = open_training("glyphs")
    assert isinstance(glyphs, GlyphSource) and glyphs.name == "glyphs/train"
    assert len(open_training(str(write_folder(tmp_path / "folder", 3)))) == 3
    # Both captions of a picture name one image.
    path = write_csv(tmp_path / "csv", 4)
    path.write_text(path.read_text() + "images/0001.jpg\tanother caption\n")
    assert len(open_training(str(path), separator="\t")) == 4
    with pytest.raises(DataError, match="there is no"):
        open_training(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "names",
    [
        ("a.jpg", "b.png"),
        ("photos/a.jpg", "photos/b.png"),
        ("n01440764/a.jpg", "n01443537/b.png"),
        ("train/a.jpg", "val/deep/b.png"),
        ("a.jpg", "notes.txt", "photos/b.png"),
    ],
)
def test_images_without_captions_are_training_images(tmp_path, names):
    for name in names:
        put(tmp_path / "set" / name)
    put(tmp_path / "set/c.gif", "GIF89a")
    images = [name for name in names if not name.endswith(".txt")]
    source = open_training(str(tmp_path / "set"))
    assert [source[row].key for row in range(len(source))] == images
    stream = TrainingStream(source, pixel_descriptor(), Reading(4), torch.device("cpu"), None)
    assert len(torch.cat(list(stream.blocks()))) == stream.num_read == 2
    assert stream.notes() == [
        "not used of set: 1 x picture of another kind, such as c.gif",
        "set: 1 x folder, all of whose images are taken, with and without captions, such as set",
    ]


def test_images_with_and_without_captions_are_mixed(tmp_path):
    put(tmp_path / "plain-1/a.jpg")
    put(tmp_path / "plain-2/b.jpg")
    folder = write_folder(tmp_path / "folder", 3)
    assert len(open_training(f"{folder}::{tmp_path / 'plain-*'}")) == 5
    assert len(open_training(str(tmp_path / "plain-{1,2}"))) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image"):
        open_training(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("captions", "content"),
    [
        ("b.txt", "a dog"),
        ("b.txt", ""),
        ("metadata.csv", "file_name,text\nb.jpg,a dog\n"),
        ("metadata.csv", "file_name,text\nnone.jpg,a dog\n"),
        ("captions.txt", "image,caption\nb.jpg,a dog\n"),
        ("all.token.txt", "b.jpg#0\ta dog\n"),
        ("data.parquet", "PAR1"),
    ],
)
def test_all_images_of_a_folder_count_whatever_its_captions(tmp_path, captions, content):
    """A copy among the images that captions do not name would be missed, and the set be called clean."""
    names = ["a.jpg", "b.jpg", "cats/c.jpg", "dogs/d.jpg"]
    for name in names:
        put(tmp_path / "set" / name)
    put(tmp_path / "set" / captions, content)
    source = open_training(str(tmp_path / "set"))
    assert [source[row].key for row in range(len(source))] == names
    is_told = "1 x file of many images, which is not read, such as data.parquet" in str(
        source.left_out
    )
    assert is_told == (captions == "data.parquet")


def test_shards_beside_images_count_as_well(tmp_path):
    put(tmp_path / "set/a.jpg")
    write_shards(tmp_path / "set", 1, 3)
    for kind, number in (("auto", 4), ("folder", 1), ("webdataset", 3)):
        source = open_training(str(tmp_path / "set"), dataset_type=kind)
        assert len(source) == number
        assert ("not read, such as 000.tar" in str(left_out_of(source))) == (kind == "folder")


def test_each_part_of_the_training_data_is_opened_once(monkeypatch, tmp_path):
    put(tmp_path / "plain/a.jpg")
    write_csv(tmp_path / "csv", 4)
    opened, init = [], CsvSource.__init__

    def counted(self: CsvSource, path: str, *arguments: object, **options: object) -> None:
        opened.append(path)
        init(self, path, *arguments, **options)

    monkeypatch.setattr(CsvSource, "__init__", counted)
    table = str(tmp_path / "csv/pairs.csv")
    source = open_training(f"{table}::{tmp_path / 'plain'}::glyphs", separator="\t")
    assert len(source) == 5 + len(open_training("glyphs")) and opened == [table]


def test_the_arguments():
    parser = Parser()
    add_overlap_arguments(parser)
    parsed = parser.parse_args(["--train-data", "glyphs", "--threshold", "0.95"])
    assert (parsed.train_data, parsed.threshold, parsed.descriptor) == ("glyphs", 0.95, "model")
    assert parser.parse_args(["--train-data", "x"]).threshold is None
    assert "99%" in parser.format_help()
    for wrong in ("0", "1.01", "nan", "x", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"at most 1, such as 0\.95"):
            arguments._threshold(wrong)
