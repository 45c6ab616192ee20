"""Features of images, computed once per model and cached: zero-shot, probes, few-shot and prompts share them.

The cache holds the features before the projection, which the probes need; one matrix product gives the features that are
compared with texts. No array is ever held whole: features are written batch by batch and read block by block.

Legend: N images, B of a batch, C classes, W width before the projection, E embedding size.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.data import DataError
from clipcore.data.choices import JUDGED_ROWS
from clipcore.data.loader import eval_batches, no_tokens, too_many_bad
from clipcore.data.transforms import ImageTransform, normalize_images
from clipcore.evaluate.datasets import Split
from clipcore.evaluate.row_writer import RowWriter
from clipcore.files import read_regular
from clipcore.progress import Progress
from clipcore.towers.model import CLIP

# Part of each key: change it if the cached content changes, so that all features are computed again.
_FORMAT = "clipcore features 1"
_FEATURES_FILE, _ROWS_FILE, _RECORD_FILE = "pooled.npy", "rows.npy", "record.json"
_BLOCK_ROWS = 4096
_MAX_RECORD_BYTES = 1 << 16


class SplitFeatures:
    """The features of a split's readable images.

    Args:
        split: the split of the images.
        pooled_NW: features before the projection, float32 or float16.
        rows_N: the index of each image in the split's source.
        model: projects the features; None for a file of features.

    Attributes:
        key: their name in a feature store; empty for a file of features.
        num_unreadable, num_transparent: numbers of such images in the split.
        seconds: time of encoding them; 0 if they were cached.
    """

    def __init__(
        self,
        split: Split,
        pooled_NW: np.ndarray,
        rows_N: np.ndarray,
        model: CLIP | None = None,
        key: str = "",
        num_unreadable: int = 0,
        num_transparent: int = 0,
        seconds: float = 0.0,
    ) -> None:
        self.split, self.pooled_NW, self.rows_N = split, pooled_NW, rows_N
        self.key, self.seconds = key, seconds
        self.num_unreadable, self.num_transparent = num_unreadable, num_transparent
        self._model = model

    def __len__(self) -> int:
        return len(self.rows_N)

    @property
    def labels_N(self) -> Tensor:
        """Class indices, int64 [N], or 0 or 1 for each class, uint8 [N, C]; raises DataError if there are none."""
        if self.split.labels_N is None:
            raise DataError(f"the {self.split.name} split has no labels")
        return torch.from_numpy(np.asarray(self.split.labels_N[self.rows_N]))

    @property
    def keys(self) -> list[str]:
        """The names of the images."""
        keys = self.split.keys()
        return [keys[row] for row in self.rows_N.tolist()]

    @property
    def groups(self) -> dict[str, list[str]]:
        """The groups of the images by column."""
        rows = self.rows_N.tolist()
        return {name: [column[row] for row in rows] for name, column in self.split.groups.items()}

    @property
    def device(self) -> torch.device:
        """The model's device; the CPU for a file of features."""
        return torch.device("cpu") if self._model is None else self._model.logit_scale.device

    def blocks(
        self, projected: bool = True, unit: bool | None = None, rows: int = _BLOCK_ROWS
    ) -> Iterator[Tensor]:
        """Yield float32 features in blocks of rows, on the model's device.

        Args:
            projected: True yields features in the texts' space, [rows, E]; False features before the projection, [rows, W].
            unit: whether to scale them to unit length [as ``projected``].

        Raises:
            DataError: a file's features have no projection.
        """
        if projected and self._model is None:
            raise DataError(
                "a file of features cannot be compared with texts; give a data set of images"
            )
        for start in range(0, len(self), rows):
            # A copy, because torch does not accept read-only memory.
            block = np.array(self.pooled_NW[start : start + rows], np.float32)
            features = torch.from_numpy(block).to(self.device)
            if projected and self._model is not None:
                with torch.no_grad():
                    features = self._model.visual.project(features)
            is_unit = projected if unit is None else unit
            yield F.normalize(features, dim=-1) if is_unit else features

    def whole(self, projected: bool = False, unit: bool | None = None) -> Tensor:
        """Return all features at once, for a probe: see ``blocks``."""
        return torch.cat(list(self.blocks(projected, unit)))


def features_of_file(split: Split) -> SplitFeatures | None:
    """Return the features of a split that consists of features; None for images."""
    if split.features_NW is None:
        return None
    return SplitFeatures(split, split.features_NW, np.arange(len(split.features_NW)))


class FeatureStore:
    """Encodes each image once, and caches the features in a folder.

    The cache key covers everything that features depend on: the weights and shape of the image tower, the preprocessing,
    and the images, but not the names of models and data sets.

    Args:
        model: the model, in evaluation mode.
        cache: the folder; None keeps features only as long as the store exists.
        batch_size: images encoded at once.
        workers: processes that read images; 0 reads in this process.
        half: whether to store features as float16, in half the space; they are still computed in float32.
        max_bad_fraction: largest share of a split's images that may be unreadable.
        progress: whether to show progress on standard error.

    Attributes:
        num_encoded: images that were encoded, not found in the cache.
    """

    def __init__(
        self,
        model: CLIP,
        transform: ImageTransform,
        cache: str | Path | None = None,
        *,
        batch_size: int = 256,
        workers: int = 0,
        half: bool = False,
        max_bad_fraction: float = 0.01,
        progress: bool = True,
    ) -> None:
        self.model, self.transform = model, transform
        self.batch_size, self.workers, self.half = batch_size, workers, half
        self.max_bad_fraction, self.progress = max_bad_fraction, progress
        self.num_encoded = 0
        # Deleted with the store.
        self._temporary = tempfile.TemporaryDirectory()
        self._cache = Path(self._temporary.name if cache is None else cache)

    @functools.cached_property
    def tower_hash(self) -> str:
        """A hash of the image tower: see ``hash_of_tower``."""
        return hash_of_tower(self.model)

    @property
    def folder(self) -> Path:
        """The folder of the cache."""
        return self._cache

    def features(self, split: Split) -> SplitFeatures:
        """Return the features of a split, from the cache or newly computed.

        Raises:
            DataError: no image can be read, or too many cannot.
            OSError: the features cannot be written.
        """
        if (given := features_of_file(split)) is not None:
            return given
        assert split.source is not None
        key = self._key(split)
        return self._read(self._cache / key, split, key) or self._encode(key, split)

    def _key(self, split: Split) -> str:
        """Return the cache key of a split's features: a hash of everything that they depend on."""
        parts = {
            "format": _FORMAT,
            "model": self.tower_hash,
            "transform": settings_of(self.transform),
            "images": split.fingerprint(),
            "half": self.half,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _read(
        self, folder: Path, split: Split, key: str, seconds: float = 0.0
    ) -> SplitFeatures | None:
        """Return the features in a folder; None if they are missing or damaged."""
        try:
            record = json.loads(read_regular(folder / _RECORD_FILE, _MAX_RECORD_BYTES))
            rows_N = np.load(folder / _ROWS_FILE, allow_pickle=False)
            pooled_NW = np.load(folder / _FEATURES_FILE, mmap_mode="r", allow_pickle=False)
            counts = (int(record["num_unreadable"]), int(record["num_transparent"]))
            is_whole = (
                list(pooled_NW.shape) == record["shape"]
                and pooled_NW.dtype == self._dtype
                and _are_rows(rows_N, len(pooled_NW), len(split))
                and record["sha256"] == _hash_of(pooled_NW, rows_N)
            )
        # For damaged bytes, NumPy, its parser and its archives raise errors of many classes.
        except Exception:
            return None
        # The limit may have been higher when they were encoded; encoding again names the unreadable images.
        if not is_whole or self._is_too_bad(counts[0], split):
            return None
        return SplitFeatures(split, pooled_NW, rows_N, self.model, key, *counts, seconds)

    @property
    def _dtype(self) -> np.dtype[Any]:
        """The dtype of the features in their file."""
        return np.dtype(np.float16 if self.half else np.float32)

    def _is_too_bad(self, num_bad: int, split: Split) -> bool:
        """Return whether too many images of a split are unreadable."""
        # As in training: a share of few samples means little.
        return num_bad > self.max_bad_fraction * max(len(split), JUDGED_ROWS)

    def _encode(self, key: str, split: Split) -> SplitFeatures:
        """Compute the features of a split, and write them into a folder that is renamed when it is complete."""
        self._cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self._cache)
        folder = self._cache / key
        making = Path(tempfile.mkdtemp(prefix=_temporary_name(key), dir=self._cache))
        try:
            seconds = self._write(making, split)
            found = self._read(making, split, key, seconds)
            if found is None:
                raise DataError(f"features were changed in {self._cache} while they were written")
            try:
                os.rename(making, folder)
            except OSError:
                # Another process was faster and wrote the same features. Damaged ones are replaced.
                if self._read(folder, split, key) is None:
                    aside = making.with_name(f"{making.name}.old")
                    os.rename(folder, aside)
                    os.rename(making, folder)
                    _remove(aside)
            # The file is mapped, so it stays readable when its folder is moved.
            return found
        finally:
            _remove(making)

    @torch.no_grad()
    def _write(self, folder: Path, split: Split) -> float:
        """Write the features of a split into a folder; return the time in seconds."""
        source, device = split.source, self.model.logit_scale.device
        assert source is not None
        begun = time.perf_counter()
        rows, bad, num_transparent = list[np.ndarray](), list[tuple[str, str]](), 0
        batches = eval_batches(
            source, self.transform, no_tokens, self.batch_size, workers=self.workers
        )
        title = f"{source.name}, {split.name}"
        shown = Progress(len(source), "images", title, quiet=not self.progress)
        with (
            open(folder / _FEATURES_FILE, "wb") as file,
            shown,
            contextlib.closing(batches),
            exact_convolutions(),
        ):
            writer = RowWriter(file, self._dtype)
            for batch in batches:
                shown.update(len(batch.indices) + len(batch.bad))
                bad += batch.bad
                num_transparent += batch.num_transparent
                if not len(batch.indices):
                    continue
                images = batch.images.to(device)
                images = normalize_images(images, self.transform.mean, self.transform.std)
                pooled_BW = self.model.encode_image(images, projected=False).float().cpu().numpy()
                remedy = "leave --half-cache out"
                kept_BW = converted(pooled_BW, self._dtype, source.name, remedy)
                writer.add(kept_BW)
                rows.append(batch.indices.numpy())
                self.num_encoded += len(batch.indices)
            writer.close()

        if self._is_too_bad(len(bad), split):
            raise too_many_bad(len(bad), len(source), source.name, self.max_bad_fraction, bad)
        if not rows:
            reasons = f", such as {bad[0][0]}: {bad[0][1]}" if bad else ""
            raise DataError(f"no image of {source.name} can be read{reasons}")
        rows_N = np.concatenate(rows)
        np.save(folder / _ROWS_FILE, rows_N)
        pooled_NW = np.load(folder / _FEATURES_FILE, mmap_mode="r")
        record = {
            "shape": [writer.num_rows, writer.width],
            "sha256": _hash_of(pooled_NW, rows_N),
            "num_unreadable": len(bad),
            "num_transparent": num_transparent,
        }
        (folder / _RECORD_FILE).write_text(json.dumps(record))
        return time.perf_counter() - begun


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Disable cuDNN's default rounding of float32 to 10 bits in convolutions, for the enclosed code."""
    # `cudnn.allow_tf32` cannot be read if the user has set `fp32_precision`, and setting it then has no effect.
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def converted(pooled_BW: np.ndarray, dtype: np.dtype[Any], name: str, remedy: str) -> np.ndarray:
    """Return features in the dtype of their file; raise DataError with a remedy unless they are finite there."""
    with np.errstate(over="ignore"):
        kept_BW = pooled_BW.astype(dtype, copy=False)
    if not np.isfinite(pooled_BW).all():
        raise DataError(f"features of {name} are not finite; the model's weights are not usable")
    if not np.isfinite(kept_BW).all():
        raise DataError(f"features of {name} are too large for float16; {remedy}")
    return kept_BW


def _are_rows(rows_N: np.ndarray, number: int, num_images: int) -> bool:
    """Return whether an array holds ascending indices of this many images of a split."""
    is_list = rows_N.dtype == np.int64 and rows_N.shape == (number,) and number > 0
    return bool(
        is_list and rows_N[0] >= 0 and rows_N[-1] < num_images and (np.diff(rows_N) > 0).all()
    )


def _hash_of(pooled_NW: np.ndarray, rows_N: np.ndarray) -> str:
    """Return a hash of features and of their images' indices."""
    digest = hashlib.sha256(rows_N.tobytes())
    for start in range(0, len(pooled_NW), _BLOCK_ROWS):
        digest.update(np.ascontiguousarray(pooled_NW[start : start + _BLOCK_ROWS]).data)
    return digest.hexdigest()


def _temporary_name(key: str) -> str:
    """Return the prefix of the names of folders that this process is writing."""
    return f".{key}.{socket.gethostname()}.{os.getpid()}."


def _remove_abandoned(cache: Path) -> None:
    """Remove the unfinished folders of killed processes of this machine."""
    pattern = re.compile(rf"\.[0-9a-f]{{32}}\.{re.escape(socket.gethostname())}\.(\d+)\..*")
    for path in cache.iterdir():
        found = pattern.fullmatch(path.name)
        if found is None or int(found[1]) == os.getpid():
            continue
        try:
            os.kill(int(found[1]), 0)
        except ProcessLookupError:
            _remove(path)
        except (OSError, OverflowError):  # another user's process, or not a process id
            continue


def _remove(path: Path) -> None:
    """Remove a folder or a file, if it exists and may be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def settings_of(transform: ImageTransform) -> dict[str, str]:
    """Return the settings of a preprocessing as texts, to be hashed."""
    return {name: str(value) for name, value in sorted(vars(transform).items())}


def hash_of_tower(model: CLIP) -> str:
    """Return a hash of the image tower: its shape, its activation and each of its tensors."""
    digest = hashlib.sha256()
    config: dict[str, Any] = model.config.to_dict()
    shape = {key: value for key, value in config.items() if key != "text_cfg"}
    digest.update(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.visual.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()
