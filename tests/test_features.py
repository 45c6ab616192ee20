"""The feature store: what it keeps, when it encodes anew, and what a damaged folder costs."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_sets import nano, split_of
from numerics import LiveStorages
from torch.nn import functional as F

from clipcore.data import DataError, Pair
from clipcore.data.transforms import ImageTransform, normalize_images
from clipcore.evaluate.features import FeatureStore, SplitFeatures, hash_of_tower
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP

LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
TRANSFORM = ImageTransform(32, is_train=False)


def store_of(model: CLIP, cache: Path | None, batch_size: int = 4, **more: bool) -> FeatureStore:
    return FeatureStore(
        model, TRANSFORM, cache, batch_size=batch_size, progress=False, half=more.get("half", False)
    )


def pixels_of(split) -> torch.Tensor:
    crops = [TRANSFORM.crop_image(split.source[row].image, None) for row in range(len(LABELS))]
    images = torch.from_numpy(np.stack(crops))
    images = images.permute(0, 3, 1, 2) if images.shape[-1] == 3 else images
    return normalize_images(images.contiguous())


@pytest.mark.parametrize("name", ["ViT-nano-8-32", "RN-nano-32"])
def test_features_are_the_model_s_before_and_after_the_projection(name, tmp_path):
    model, split = nano(name=name), split_of("test", LABELS)
    features = store_of(model, tmp_path, batch_size=len(LABELS)).features(split)

    images = pixels_of(split)
    with torch.no_grad():
        pooled, projected = model.encode_image(images, projected=False), model.encode_image(images)
    assert torch.equal(features.whole(), pooled)
    assert torch.equal(features.whole(projected=True, unit=False), projected)
    assert torch.equal(features.whole(projected=True), F.normalize(projected, dim=-1))
    assert torch.equal(features.whole(unit=True), F.normalize(pooled, dim=-1))
    assert [len(block) for block in features.blocks(rows=4)] == [4, 4, 3]
    assert features.labels_N.tolist() == LABELS
    assert features.keys == [f"test/{row}" for row in range(len(LABELS))]


def test_a_second_store_encodes_nothing(tmp_path):
    split = split_of("test", LABELS)
    first, second = store_of(nano(), tmp_path), store_of(nano(), tmp_path)
    kept = first.features(split)
    found = second.features(split)
    assert (first.num_encoded, second.num_encoded) == (len(LABELS), 0)
    assert np.array_equal(kept.pooled_NW, found.pooled_NW) and found.key == kept.key
    assert found.seconds == 0 < kept.seconds


def test_what_features_depend_on_makes_them_anew(tmp_path):
    base, split = nano(), split_of("test", LABELS)
    store_of(base, tmp_path).features(split)
    config = dataclasses.replace(base.config, quick_gelu=not base.config.quick_gelu)
    other_activation = CLIP(config).eval()
    other_activation.load_state_dict(base.state_dict())
    other_crop = FeatureStore(
        base, ImageTransform(32, is_train=False, resize_mode="squash"), tmp_path, progress=False
    )
    stores = [
        (store_of(nano(seed=1), tmp_path), split),
        (store_of(other_activation, tmp_path), split),
        (store_of(base, tmp_path), split_of("test", LABELS, fingerprint="two")),
        (store_of(base, tmp_path, half=True), split),
        (other_crop, split),
    ]
    for store, asked in stores:
        store.features(asked)
        assert store.num_encoded == len(LABELS)
    assert len(list(tmp_path.iterdir())) == 1 + len(stores)


def test_text_tower_and_scale_do_not_matter_to_the_features():
    model = nano()
    before = hash_of_tower(model)
    with torch.no_grad():
        model.logit_scale += 1
        model.token_embedding.weight += 1
    assert hash_of_tower(model) == before
    with torch.no_grad():
        model.visual.proj[0, 0] += 1
    assert hash_of_tower(model) != before


def test_half_keeps_rounded_features_of_float32(tmp_path):
    split = split_of("test", LABELS)
    whole = store_of(nano(), tmp_path).features(split)
    half = store_of(nano(), tmp_path, half=True).features(split)
    assert half.pooled_NW.dtype == np.float16 and whole.pooled_NW.dtype == np.float32
    assert np.array_equal(half.pooled_NW, whole.pooled_NW.astype(np.float16))
    assert half.whole().dtype == torch.float32


def test_unreadable_images_are_left_out_and_labels_stay_with_theirs(tmp_path):
    split = split_of("test", LABELS, bad=[0, 5])
    store = FeatureStore(
        nano(), TRANSFORM, tmp_path, batch_size=4, max_bad_fraction=0.5, progress=False
    )
    features, again = store.features(split), store.features(split)
    assert store.num_encoded == 9
    for found in (features, again):
        assert found.rows_N.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10]
        assert found.labels_N.tolist() == [LABELS[row] for row in found.rows_N]
        assert found.num_unreadable == 2 and found.keys[0] == "test/1"


def test_features_with_more_unreadable_images_than_now_allowed_are_not_taken(tmp_path):
    labels = [0, 1] * 100
    split = split_of("test", labels, bad=range(0, 200, 10))
    generous = FeatureStore(nano(), TRANSFORM, tmp_path, max_bad_fraction=0.5, progress=False)
    assert len(generous.features(split)) == 180
    with pytest.raises(DataError, match=r"20 of 200 samples of noise cannot be read, more than"):
        store_of(nano(), tmp_path).features(split)
    assert len(generous.features(split)) == 180


def test_too_many_unreadable_images_leave_nothing_behind(tmp_path):
    labels = [0, 1] * 100
    store = store_of(nano(), tmp_path)
    with pytest.raises(DataError, match=r"more than --max-bad-fraction 0\.01: picture 0: made to"):
        store.features(split_of("test", labels, bad=range(0, 200, 2)))
    with pytest.raises(DataError, match="no image of noise can be read, such as picture 0"):
        store.features(split_of("test", [0], bad=[0]))
    assert list(tmp_path.iterdir()) == []


def test_features_that_are_not_finite_are_named(tmp_path):
    model = nano()
    with torch.no_grad():
        model.visual.ln_post.bias[0] = torch.inf
    with pytest.raises(DataError, match="features of noise are not finite"):
        store_of(model, tmp_path).features(split_of("test", LABELS))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("pooled.npy", b""),
        ("pooled.npy", b"\x93NUMPY\x01\x00garbage"),
        ("rows.npy", b"no numbers"),
        ("record.json", b"{"),
        ("record.json", b'{"shape": [3, 3]}'),
        ("record.json", b"[" * 100_000),
        ("record.json", None),
        ("pooled.npy", b"PK\x03\x04 no archive"),
    ],
)
def test_damaged_features_are_made_anew(tmp_path, file, content):
    split, store = split_of("test", LABELS), store_of(nano(), tmp_path)
    kept = np.array(store.features(split).pooled_NW)
    (folder,) = tmp_path.iterdir()
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    again = store.features(split)
    assert store.num_encoded == 2 * len(LABELS)
    assert np.array_equal(again.pooled_NW, kept)


def test_features_cut_short_are_made_anew(tmp_path):
    split, store = split_of("test", LABELS), store_of(nano(), tmp_path)
    store.features(split)
    (path,) = tmp_path.glob("*/pooled.npy")
    path.write_bytes(path.read_bytes()[:-4])
    assert len(store.features(split)) == len(LABELS) and store.num_encoded == 2 * len(LABELS)


@pytest.mark.parametrize(
    "rows",
    [
        np.arange(11)[::-1],
        np.arange(11) + 1000,
        np.arange(11.0),
        np.arange(11)[None],
        np.zeros(11, np.int64),
        np.arange(-1, 10),
    ],
)
def test_rows_that_are_not_those_of_the_images_are_made_anew(tmp_path, rows):
    split, store = split_of("test", LABELS), store_of(nano(), tmp_path)
    store.features(split)
    (path,) = tmp_path.glob("*/rows.npy")
    np.save(path, rows)
    assert store.features(split).rows_N.tolist() == list(range(11))
    assert store.num_encoded == 2 * len(LABELS)


def test_features_of_another_kind_of_number_are_made_anew(tmp_path):
    split, store = split_of("test", LABELS), store_of(nano(), tmp_path)
    kept = np.array(store.features(split).pooled_NW)
    (path,) = tmp_path.glob("*/pooled.npy")
    path.write_bytes(path.read_bytes().replace(b"<f4", b"<i4", 1))
    assert np.array_equal(store.features(split).pooled_NW, kept)
    assert store.num_encoded == 2 * len(LABELS)


def settings_of_tf32() -> list[object]:
    """Return what torch says of TF32 in convolutions, by both of its spellings."""
    cudnn, said = torch.backends.cudnn, list[object]()
    for read in (lambda: cudnn.conv.fp32_precision, lambda: cudnn.allow_tf32):
        try:
            said.append(read())
        except RuntimeError:
            said.append("mixed spellings")
    return said


@pytest.fixture(params=["older, on", "older, off", "newer, all", "newer, convolutions"])
def tf32_of_user(request):
    """Set TF32 as a user does, by one of torch's spellings."""
    backends = torch.backends
    if request.param.startswith("older"):
        backends.cudnn.allow_tf32 = request.param == "older, on"
    elif request.param == "newer, all":
        backends.fp32_precision = "tf32"
    else:
        backends.cudnn.conv.fp32_precision = "ieee"
    yield
    for part in (backends, backends.cuda.matmul, backends.mkldnn.matmul):
        part.fp32_precision = "none"
    for part in (backends.cudnn.conv, backends.cudnn.rnn):
        part.fp32_precision = "tf32"
    backends.cudnn.allow_tf32 = True


def test_convolutions_are_not_rounded_to_tf32_meanwhile(monkeypatch, tf32_of_user):
    model, seen, before = nano(), [], settings_of_tf32()
    encode = model.encode_image

    def noted(*arguments: object, **more: object) -> torch.Tensor:
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        return encode(*arguments, **more)

    monkeypatch.setattr(model, "encode_image", noted)
    store_of(model, None).features(split_of("test", LABELS))
    assert set(seen) == {"ieee"} and settings_of_tf32() == before


def test_lost_pages_of_features_are_made_anew(tmp_path):
    split, store = split_of("test", LABELS), store_of(nano(), tmp_path)
    kept = np.array(store.features(split).pooled_NW)
    (path,) = tmp_path.glob("*/pooled.npy")
    changed = np.load(path, mmap_mode="r+")
    changed[3] = 0
    changed.flush()
    assert np.array_equal(store.features(split).pooled_NW, kept)
    assert store.num_encoded == 2 * len(LABELS)


def test_two_processes_that_encode_the_same_both_end_well(tmp_path, monkeypatch):
    split = split_of("test", LABELS)
    first, second = store_of(nano(), tmp_path), store_of(nano(), tmp_path)
    write = first._write

    def slow(folder, asked):
        seconds = write(folder, asked)
        second.features(split)
        return seconds

    monkeypatch.setattr(first, "_write", slow)
    features = first.features(split)
    assert (first.num_encoded, second.num_encoded) == (len(LABELS), len(LABELS))
    assert np.array_equal(features.pooled_NW, second.features(split).pooled_NW)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_place_of_features_makes_way(tmp_path):
    split, store = split_of("test", LABELS), store_of(nano(), tmp_path)
    (tmp_path / store._key(split)).write_text("a file")
    assert len(store.features(split)) == len(LABELS)
    assert len(store.features(split)) == len(LABELS) and store.num_encoded == len(LABELS)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_killed_processes_were_writing_is_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = socket.gethostname()
    names = {
        "dead": f".{'a' * 32}.{host}.{ended.pid}.xyz",
        "alive": f".{'a' * 32}.{host}.1.xyz",
        "elsewhere": f".{'a' * 32}.another-{host}.{ended.pid}.xyz",
        "other": ".cache",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "pooled.npy").write_bytes(b"half")
    store_of(nano(), tmp_path).features(split_of("test", LABELS))
    left = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if names[name] in left} == {"alive", "elsewhere", "other"}


def test_features_too_large_for_half_are_named(tmp_path):
    model = nano()
    with torch.no_grad():
        model.visual.ln_post.bias[0] = 1e6
    with pytest.raises(DataError, match="too large for float16; leave --half-cache out"):
        store_of(model, tmp_path, half=True).features(split_of("test", LABELS))
    assert len(store_of(model, tmp_path).features(split_of("test", LABELS))) == len(LABELS)


def test_without_a_folder_features_live_as_long_as_the_store():
    store = store_of(nano(), None)
    features = store.features(split_of("test", LABELS))
    folder = Path(store._temporary.name)
    assert list(folder.iterdir()) and len(features) == len(LABELS)
    del features, store
    assert not folder.exists()


def test_a_stopped_encoding_leaves_no_features(tmp_path):
    class Stopped(type(split_of("test", LABELS).source)):
        def __getitem__(self, index: int) -> Pair:
            if index == 6:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    split = dataclasses.replace(split_of("test", LABELS), source=Stopped(LABELS, seed=2))
    store = store_of(nano(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.features(split)
    assert store.num_encoded == 4 and list(tmp_path.iterdir()) == []
    assert len(store.features(split_of("test", LABELS))) == len(LABELS)


def test_workers_give_the_same_features(tmp_path):
    split = split_of("test", LABELS)
    alone = store_of(nano(), None).features(split)
    store = FeatureStore(nano(), TRANSFORM, None, batch_size=4, workers=2, progress=False)
    assert np.array_equal(store.features(split).pooled_NW, alone.pooled_NW)


def test_tensors_do_not_grow_with_the_number_of_images():
    def peak_bytes(num_images: int) -> int:
        store = store_of(nano(), None)
        with LiveStorages() as storages:
            assert len(store.features(split_of("test", [0] * num_images))) == num_images
        return storages.peak_bytes

    # Their row numbers are kept, of eight bytes; a batch's images have 49,152.
    assert 0 <= peak_bytes(32) - peak_bytes(8) <= 24 * 8


def test_a_file_of_features_has_no_projection():
    split = dataclasses.replace(
        split_of("test", [0, 1]), source=None, features_NW=np.eye(2, dtype=np.float32)
    )
    features = store_of(nano(), None).features(split)
    assert torch.equal(features.whole(), torch.eye(2))
    with pytest.raises(DataError, match="a file of features cannot be compared with texts"):
        SplitFeatures(split, split.features_NW, np.arange(2)).whole(projected=True)


def test_published_shapes_project_as_they_encode():
    torch.manual_seed(0)
    model = create_model("ViT-nano-8-32").double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        pooled = model.encode_image(images, projected=False)
        torch.testing.assert_close(
            model.visual.project(pooled), model.encode_image(images), rtol=1e-12, atol=1e-12
        )
