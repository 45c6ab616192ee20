"""Files of features for probes without a model, and what is none."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
from labelled_sets import labels_of, npy, put, refuse, write_features

from clipcore.evaluate.datasets import open_set

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("cache_folder")]


def test_features_of_splits_and_of_one_file(tmp_path):
    write_features(tmp_path / "train.npz", [0, 1, 2, 4])
    test = {"feature_list": np.ones((2, 3), np.float16), "label_list": np.array([1, 0], np.int32)}
    np.savez_compressed(tmp_path / "test.npz", **test)
    data = open_set(str(tmp_path))
    assert data.split_names == ("train", "test") and len(data.classnames) == 5
    train = data.split("train")
    assert train.source is None and len(train) == 4 and labels_of(data) == [1, 0]
    assert train.features_NW is not None and train.features_NW.dtype == np.float32
    assert np.array_equal(train.features_NW, np.arange(12).reshape(4, 3))
    assert train.keys()[3] == "train.npz, row 4"
    alone = open_set(str(tmp_path / "train.npz"))
    assert (alone.name, alone.split_names) == ("train", ("test",))


def test_features_of_several_labels(tmp_path):
    rows = [[0, 1], [1, 1], [0, 0], [1, 0]]
    data = open_set(str(write_features(tmp_path / "a.npz", rows)))
    assert data.task == "multilabel"
    labels_N = data.split("test").labels_N
    assert labels_N is not None and labels_N.dtype == np.uint8 and labels_N.tolist() == rows


@pytest.mark.parametrize(
    "labels", [[[0], [1], [1], [0]], [0.0, 1.0, 1.0, 0.0], [[0.0], [1.0], [1.0], [0.0]]]
)
def test_labels_of_one_column_and_whole_floats_are_classes(tmp_path, labels):
    data = open_set(str(write_features(tmp_path / "a.npz", labels)))
    assert data.task == "classification" and len(data.classnames) == 2
    assert labels_of(data) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": [0, 1, 2]}, "4 rows of features and 3 labels"),
        ({"labels": [0, 1, 2, -1]}, "the label -1 of row 3 is of no class"),
        ({"labels": [0, 1, 2, 1 << 40]}, "the label 1099511627776 of row 3 is of no class"),
        (
            {"labels": [0.0, 1, 2, 0.5]},
            r"the label 0.5 is not a whole number; .* labels.astype\(int\)",
        ),
        ({"labels": [0.0, 1, 2, np.nan]}, "the label nan is not a whole number"),
        ({"labels": [0.0, 1, 2, np.inf]}, "the label inf of row 3 is of no class"),
        ({"labels": [0.0, 1, 2, -1]}, "the label -1.0 of row 3 is of no class"),
        ({"labels": [[0.0, 0.5]] * 4}, "the label 0.5 is not a whole number"),
        (
            {"labels": [True] * 4},
            r"labels are bool \[4\], not numbers \[N\]; write labels.astype\(int",
        ),
        ({"labels": [0] * 4}, "a has one class, 'class 0', for all images"),
        ({"labels": 3}, "labels are one number of int64; write one row per image"),
        ({"labels": [[0, 2]] * 4}, "numbers other than 0 and 1"),
        ({"labels": np.array([print] * 4, object)}, r"labels are object \[4\]; .*astype\(int\)"),
        ({"labels": ["cat"] * 4}, r"labels are <U3 \[4\]; .*labels.astype\(int\)"),
        ({"features": np.full((4, 3), np.nan)}, "row 0 of features is not finite"),
        ({"features": np.array([[1.0], [1], [1e300], [1]])}, "row 2 of features is not finite"),
        (
            {"features": np.ones((4, 3), int)},
            r"write floating-point numbers: features.astype\(numpy",
        ),
        ({"features": np.ones(4)}, r"features have the shape \[4\], not \[N, W\]"),
        ({"features": np.ones((0, 3))}, r"features of shape \[0, 3\] hold no row or no column"),
        ({"features": np.asfortranarray(np.ones((4, 3)))}, r"write numpy.ascontiguousarray\(feat"),
        ({"features": np.array([[print] * 3] * 4, object)}, r"features are object \[4, 3\]"),
    ],
)
def test_features_that_cannot_be_used(tmp_path, changed, message):
    path = tmp_path / "a.npz"
    arrays = {"features": np.ones((4, 3)), "labels": np.arange(4), **changed}
    np.savez(path, **{name: np.asarray(values) for name, values in arrays.items()})
    refuse(path, message)


def test_files_of_features_that_are_none(tmp_path):
    path = tmp_path / "a.npz"
    refuse(path, "there is no data set")
    os.mkfifo(path)
    refuse(path, "Not a regular file")
    path.unlink()
    put(path, b"PK\3\4" + b"x" * 100)
    refuse(path, "is not a .npz file, or is cut off")
    whole = write_features(path, [0] * 4).read_bytes()
    put(path, whole.replace(np.arange(12, dtype=np.float32).tobytes(), b"\0" * 48))
    refuse(path, "is damaged .*Bad CRC-32")
    # A compressed array of which all numbers come out before its checksum is due.
    noise = np.random.default_rng(0).standard_normal((4, 1 << 16))
    np.savez_compressed(path, features=noise, labels=np.arange(4))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + 16] ^= 1
    refuse(put(path, bytes(data)), "is damaged .*Bad CRC-32")
    np.savez(path, features=np.ones((4, 3)))
    refuse(path, "has no array labels or label_list; it holds 'features.npy'")
    # A header that promises what the file does not hold.
    content = npy(np.ones((4, 3)), "float32")
    large = content.replace(b"(4, 3), }       ", b"(4000000, 3), } ")
    for wrong in (content[:-1], content + b"x", large):
        assert wrong != content
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("features.npy", wrong)
            archive.writestr("labels.npy", npy([0] * 4, "int64"))
        refuse(path, "features of float32 .* does not fit its")
    # Gigabytes of zeros.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("features.npy", npy(np.zeros((1 << 18, 64)), "float32"))
        archive.writestr("labels.npy", npy(np.zeros(1 << 18), "int64"))
    refuse(path, "compressed are not features")
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(1500):
            archive.writestr(str(number), b"")
    refuse(path, "far more than features and labels")


def test_splits_of_features_have_to_fit(tmp_path):
    write_features(tmp_path / "a" / "train.npz", [0] * 4)
    write_features(tmp_path / "a" / "test.npz", [0] * 4, features=np.ones((4, 2)))
    refuse(tmp_path / "a", "features have different widths, 3 in train, 2 in test")
    write_features(tmp_path / "b" / "train.npz", [0] * 4)
    write_features(tmp_path / "b" / "test.npz", [[0, 1]] * 4)
    refuse(tmp_path / "b", "numbers in one split and rows of 0 and 1 in another")
    write_features(tmp_path / "b" / "train.npz", [[0, 1, 1]] * 4)
    refuse(tmp_path / "b", "2 classes in one split and 3 in another")
