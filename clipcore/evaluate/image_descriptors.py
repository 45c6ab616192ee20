"""Descriptors that identify images, and their stream over all training images.

Legend: M training images, B of a block, S pixels of a side, W width of a descriptor.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from clipcore.data import PairSource, printable
from clipcore.data.loader import Batch, eval_batches, no_tokens
from clipcore.data.sources import left_out_of, noted_of
from clipcore.data.transforms import ImageTransform, normalize_images
from clipcore.evaluate.overlap import pixel_descriptors
from clipcore.towers.model import CLIP

# Training images compared at once: the rows of a chunk in similarity_topk.
_BLOCK_ROWS = 4096
# Bytes of descriptors kept in memory for later data sets: a million images of 256 numbers.
_MOST_KEPT_BYTES = 1 << 30
# Share of a disk's free space that further descriptors may take.
_MOST_OF_DISK = 0.5
# Side of the crops, pixels, that the pixel descriptor reduces further.
_PIXEL_DESCRIPTOR_SIDE = 64

Progress = Callable[[int], None]


class Descriptor(NamedTuple):
    """A function that identifies images.

    Attributes:
        name: one of ``arguments.DESCRIPTORS``.
        transform: makes crops of S x S pixels.
        describe: turns uint8 crops [B, 3, S, S] into descriptors [B, W].
    """

    name: str
    transform: ImageTransform
    describe: Callable[[Tensor], Tensor]


class Reading(NamedTuple):
    """The settings for reading images: batch size and number of worker processes; 0 reads in this process."""

    batch_size: int = 256
    workers: int = 0


READING = Reading()


def model_descriptor(
    model: CLIP, transform: ImageTransform, device: str | torch.device
) -> Descriptor:
    """Return the descriptor by a model's features before the projection; the model is in evaluation mode."""

    @torch.no_grad()
    def describe(images_B3SS: Tensor) -> Tensor:
        images = normalize_images(images_B3SS.to(device), transform.mean, transform.std)
        return model.encode_image(images, projected=False).float()

    return Descriptor("model", transform, describe)


def pixel_descriptor(device: str | torch.device = "cpu") -> Descriptor:
    """Return the descriptor by coarse pixels, whatever the images' size and aspect ratio."""
    transform = ImageTransform(_PIXEL_DESCRIPTOR_SIDE, is_train=False, resize_mode="squash")
    return Descriptor("pixels", transform, lambda images: pixel_descriptors(images.to(device)))


def image_batches(
    source: PairSource, descriptor: Descriptor, reading: Reading
) -> Generator[Batch, None, None]:
    """Return the readable images of a source, in batches of a descriptor's crops."""
    return eval_batches(
        source, descriptor.transform, no_tokens, reading.batch_size, workers=reading.workers
    )


def check_finite(described: Tensor) -> None:
    """Raise ValueError for descriptors with a value that is not finite."""
    if not described.isfinite().all():
        raise ValueError("the model's features are not finite; its weights are not usable")


class _KeptBlocks:
    """Descriptors in blocks [B, W]: in memory up to a limit, then in an unnamed file, which disappears with the process.

    Args:
        folder: folder of the file; None keeps nothing beyond the limit.
        num_rows: the largest number of rows.

    Attributes:
        is_whole: whether all added blocks are kept.
        reason: why they are not, if there is a folder.
    """

    def __init__(self, folder: Path | None, num_rows: int) -> None:
        self._folder, self._num_rows = folder, num_rows
        self._blocks: list[Tensor] = []
        self._file: BinaryIO | None = None
        self._rows: list[int] = []
        self._width = 0
        self.is_whole, self.reason = True, ""

    def add(self, block_BW: Tensor) -> None:
        """Keep a further block; if the blocks take too much space, keep none from now on."""
        if not self.is_whole:
            return
        self._blocks.append(block_BW)
        num_bytes = sum(block.numel() * block.element_size() for block in self._blocks)
        if self._file is None and num_bytes <= _MOST_KEPT_BYTES:
            return
        blocks, self._blocks = self._blocks, []
        try:
            if self._file is None:
                self._file = self._open(block_BW.shape[1])
            for block in blocks:
                self._file.write(np.ascontiguousarray(block.float().cpu().numpy()).data)
                self._rows.append(len(block))
            # A full disk raises here, not when the blocks are read.
            self._file.flush()
        except OSError as error:
            self._discard(error.strerror or str(error))

    def _open(self, width: int) -> BinaryIO:
        """Return an open file for all rows; raise OSError if the disk has no room for them."""
        if self._folder is None:
            raise OSError("they are too large")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._width = width
        num_bytes, free = 4 * self._num_rows * width, shutil.disk_usage(self._folder).free
        if num_bytes > _MOST_OF_DISK * free:
            raise OSError(f"{num_bytes:,} bytes, of {free:,} that are free in {self._folder}")
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # closed when the blocks are no longer used
        weakref.finalize(self, file.close)
        return cast(BinaryIO, file)

    def _discard(self, reason: str) -> None:
        """Keep nothing."""
        if self._file is not None:
            # On a full disk, the buffered rest cannot be written.
            with contextlib.suppress(OSError):
                self._file.close()
        self._blocks, self._file, self.is_whole = [], None, False
        self.reason = reason if self._folder is not None else ""

    def blocks(self, device: torch.device) -> Iterator[Tensor]:
        """Yield the blocks in the order of ``add``; raise OSError if the file cannot be read."""
        yield from self._blocks
        if self._file is None:
            return
        begun = 0
        for rows in self._rows:
            block_BW = np.empty((rows, self._width), np.float32)
            self._file.seek(begun)
            if self._file.readinto(block_BW.data.cast("B")) != block_BW.nbytes:  # type: ignore[attr-defined]
                raise OSError(f"descriptors in {self._folder} were cut off; run the command again")
            begun += block_BW.nbytes
            yield torch.from_numpy(block_BW).to(device)


class TrainingStream:
    """The descriptors of all training images in blocks, for any number of passes.

    They are kept in memory or in a file, so that the images are read once for all data sets. Only the descriptors of a
    training set that fits into neither are computed again.

    Args:
        device: the device of the evaluation's descriptors.
        folder: folder for a file of descriptors; None keeps them in memory, or not at all.

    Attributes:
        num_read: the number of images described so far.
        unreadable: the rows of unreadable images, in order.
        progress: is called with the number of images processed since its last call.
    """

    def __init__(
        self,
        source: PairSource,
        descriptor: Descriptor,
        reading: Reading,
        device: torch.device,
        progress: Progress | None,
        folder: Path | None = None,
    ) -> None:
        self._source, self._descriptor, self._reading = source, descriptor, reading
        self._device, self.progress = device, progress
        self.num_read = 0
        self.unreadable: list[int] = []
        self._first_reason = ""
        self._folder = folder
        self._kept = _KeptBlocks(folder, len(source))
        self._is_read = False

    def blocks(self) -> Generator[Tensor, None, None]:
        """Yield descriptors [B, W] of the readable images, in order."""
        if self._is_read and self._kept.is_whole:
            if self.progress is not None:
                self.progress(len(self._source))
            yield from self._kept.blocks(self._device)
            return

        self.num_read, self.unreadable, self._first_reason = 0, [], ""
        self._kept, self._is_read = _KeptBlocks(self._folder, len(self._source)), False
        # Closed with this generator, and its readers with it.
        with contextlib.closing(self._read()) as blocks:
            for block in blocks:
                self._kept.add(block)
                yield block
        self._is_read = True

    def _read(self) -> Generator[Tensor, None, None]:
        """Yield the descriptors of the images while they are read."""
        waiting, num_waiting, begun = list[Tensor](), 0, 0
        batches = image_batches(self._source, self._descriptor, self._reading)
        # An error or Ctrl-C ends the workers immediately.
        with contextlib.closing(batches):
            for batch in batches:
                end = min(begun + self._reading.batch_size, len(self._source))
                self._count(batch, begun, end)
                begun = end
                if len(batch.indices):
                    described_BW = self._descriptor.describe(batch.images).to(self._device)
                    check_finite(described_BW)
                    waiting.append(described_BW)
                    num_waiting += len(described_BW)
                if num_waiting >= _BLOCK_ROWS:
                    yield torch.cat(waiting)
                    waiting, num_waiting = [], 0
        if waiting:
            yield torch.cat(waiting)

    def _count(self, batch: Batch, begun: int, end: int) -> None:
        """Count a batch of the rows from ``begun`` to ``end``."""
        self.num_read += len(batch.indices)
        self.unreadable += sorted({*range(begun, end)} - {*batch.indices.tolist()})
        if batch.bad and not self._first_reason:
            key, reason = batch.bad[0]
            self._first_reason = printable(f"{key}: {reason}")
        if self.progress is not None:
            self.progress(end - begun)

    def rows(self, place_N: np.ndarray) -> np.ndarray:
        """Return the source's rows of images that are counted without the unreadable ones."""
        unreadable = np.array(self.unreadable, np.int64)
        # The number of readable images before each unreadable one.
        before = unreadable - np.arange(len(unreadable))
        return place_N + np.searchsorted(before, place_N, side="right")

    def notes(self) -> list[str]:
        """Return notes on skipped and inferred parts of the training data, after it was read."""
        notes = []
        if self.unreadable:
            notes.append(
                f"{len(self.unreadable)} of {len(self._source)} training images cannot be read, such as "
                f"{self._first_reason}"
            )
        if self._kept.reason:
            notes.append(
                "training images are read again for each data set, as their descriptors cannot be kept: "
                f"{printable(self._kept.reason)}"
            )
        if left_out := left_out_of(self._source):
            notes.append(f"not used of {printable(self._source.name)}: {left_out}")
        if noted := noted_of(self._source):
            notes.append(f"{printable(self._source.name)}: {noted}")
        return notes
