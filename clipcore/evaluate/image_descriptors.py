"""What tells images apart, and the stream of it over all training images.

Legend: M training images, B of a block, S pixels of a side, W width of a descriptor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipcore.data import PairSource, printable
from clipcore.data.loader import Batch, eval_batches, no_tokens
from clipcore.data.sources import left_out_of, noted_of
from clipcore.data.transforms import ImageTransform, normalize_images
from clipcore.evaluate.overlap import pixel_descriptors
from clipcore.model import CLIP

DESCRIPTORS = ("model", "pixels")
# Training images that are compared at once: the rows of a chunk in similarity_topk.
_BLOCK_ROWS = 4096
# Bytes of descriptors that are kept for a further data set: those of a million images of 256 numbers.
_MOST_KEPT_BYTES = 1 << 30
# Pixels of a side of what the pixel descriptor makes coarser still.
_PIXEL_DESCRIPTOR_SIDE = 64

Progress = Callable[[int], None]


class Descriptor(NamedTuple):
    """How images are told apart.

    Attributes:
        name: one of ``DESCRIPTORS``.
        transform: makes crops of S x S pixels.
        describe: turns uint8 crops [B, 3, S, S] into descriptors [B, W].
    """

    name: str
    transform: ImageTransform
    describe: Callable[[Tensor], Tensor]


class Reading(NamedTuple):
    """How images are read: so many at once, by so many worker processes; 0 reads in this one."""

    batch_size: int = 256
    workers: int = 0


READING = Reading()


def model_descriptor(
    model: CLIP, transform: ImageTransform, device: str | torch.device
) -> Descriptor:
    """Return what tells images apart by a model's features before the projection; the model is in evaluation mode."""

    @torch.no_grad()
    def describe(images_B3SS: Tensor) -> Tensor:
        images = normalize_images(images_B3SS.to(device), transform.mean, transform.std)
        return model.encode_image(images, projected=False).float()

    return Descriptor("model", transform, describe)


def pixel_descriptor(device: str | torch.device = "cpu") -> Descriptor:
    """Return what tells images apart by their coarse pixels, whatever their size and the ratio of their sides."""
    transform = ImageTransform(_PIXEL_DESCRIPTOR_SIDE, is_train=False, resize_mode="squash")
    return Descriptor("pixels", transform, lambda images: pixel_descriptors(images.to(device)))


def image_batches(
    source: PairSource, descriptor: Descriptor, reading: Reading
) -> Generator[Batch, None, None]:
    """Return all images of a source that can be read, in batches of what a descriptor takes."""
    return eval_batches(
        source, descriptor.transform, no_tokens, reading.batch_size, workers=reading.workers
    )


def check_finite(described: Tensor) -> None:
    """Raise ValueError for descriptors with a value that is not a number."""
    if not described.isfinite().all():
        raise ValueError("the model's features are not finite; its weights are not usable")


class TrainingStream:
    """The descriptors of all training images in blocks, as often as asked.

    Those of a training set that is not too large are kept, so that its images are read once for all data sets.

    Args:
        device: where the evaluation's descriptors are.

    Attributes:
        num_read: images that were described so far.
        unreadable: the rows of those that could not be read, in order.
        progress: is called with the number of images that were gone through since its last call.
    """

    def __init__(
        self,
        source: PairSource,
        descriptor: Descriptor,
        reading: Reading,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self._source, self._descriptor, self._reading = source, descriptor, reading
        self._device, self.progress = device, progress
        self.num_read = 0
        self.unreadable: list[int] = []
        self._first_reason = ""
        self._kept: list[Tensor] | None = []
        self._is_read = False

    def blocks(self) -> Generator[Tensor, None, None]:
        """Yield descriptors [B, W] of the images that can be read, in order."""
        if self._is_read and self._kept is not None:
            if self.progress is not None:
                self.progress(len(self._source))
            yield from self._kept
            return

        self.num_read, self.unreadable, self._first_reason = 0, [], ""
        self._kept, self._is_read = [], False
        # Closed with this one, and its readers with it.
        with contextlib.closing(self._read()) as blocks:
            for block in blocks:
                self._keep(block)
                yield block
        self._is_read = True

    def _keep(self, block: Tensor) -> None:
        """Keep a block for the next time, unless all of them are too large."""
        if self._kept is None:
            return
        self._kept.append(block)
        if sum(kept.numel() * kept.element_size() for kept in self._kept) > _MOST_KEPT_BYTES:
            self._kept = None

    def _read(self) -> Generator[Tensor, None, None]:
        """Yield the descriptors of the images as they are read."""
        waiting, num_waiting, begun = list[Tensor](), 0, 0
        batches = image_batches(self._source, self._descriptor, self._reading)
        # An error, or Ctrl-C, ends the workers at once.
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
        """Return the rows of the source of images that are numbered without the unreadable ones."""
        unreadable = np.array(self.unreadable, np.int64)
        # So many readable images come before each unreadable one.
        before = unreadable - np.arange(len(unreadable))
        return place_N + np.searchsorted(before, place_N, side="right")

    def notes(self) -> list[str]:
        """Return what is left out of the training data, or taken for granted in it, once it was read."""
        notes = []
        if self.unreadable:
            notes.append(
                f"{len(self.unreadable)} of {len(self._source)} training images cannot be read, such as "
                f"{self._first_reason}"
            )
        if left_out := left_out_of(self._source):
            notes.append(f"not used of {printable(self._source.name)}: {left_out}")
        if noted := noted_of(self._source):
            notes.append(f"{printable(self._source.name)}: {noted}")
        return notes
