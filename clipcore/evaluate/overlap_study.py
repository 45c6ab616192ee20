"""Measures how much of a data set is among the training images, and how much that raises the score.

Legend: N evaluation images, M training images, B of a block, S pixels of a side, W width of a descriptor.

Source: Radford et al. 2021, section 5 and appendix C. Each evaluation image is compared with all training images, which are
streamed in blocks and never held whole. It overlaps if its nearest training image reaches a threshold, which the user gives
or which is proposed from altered copies of evaluation images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import heapq
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipcore.data import BadSample, DataError, Pair, PairSource, printable
from clipcore.data.embedded import EMBEDDED
from clipcore.data.folders import holds_image
from clipcore.data.pictures import by_picture
from clipcore.data.plain_images import PlainImages
from clipcore.data.sources import (
    MixtureSource,
    expand_pattern,
    open_source,
)
from clipcore.data.transforms import stack_images
from clipcore.evaluate.altered_copies import altered_copy, picture_uri
from clipcore.evaluate.features import SplitFeatures
from clipcore.evaluate.image_descriptors import (
    READING,
    Descriptor,
    Progress,
    Reading,
    TrainingStream,
    check_finite,
    image_batches,
)
from clipcore.evaluate.overlap import nearest_training, overlap_report, propose_threshold
from clipcore.evaluate.results import OVERLAP, Result
from clipcore.kernels.similarity_topk import similarity_topk

METRICS = ("contamination", "score", "clean_score", "overlap_score", "gain", "p_value")
NUM_PAIRS_SHOWN = 60
THUMBNAIL_SIDE = 64
# Precision of a proposed threshold: the share of altered copies among the images that it matches.
PRECISION = 0.99
NUM_COPIES = 512
# Two images of a data set are the same from this cosine on, except for rounding.
SAME_COSINE = 0.9999
# Coverage of the interval of the rate on overlapping images.
CONFIDENCE = 0.995


def open_training(spec: str, **options: Any) -> PairSource:
    """Return the training images, each once even if several captions name it.

    A folder that holds images means all images in it and below it, with or without captions: an image without a caption
    may be a copy too.

    Args:
        spec: as for ``--train-data``; each part between ``::`` may also be one of ``EMBEDDED``.
        options: options of ``open_source``.

    Raises:
        DataError: it cannot be opened.
    """
    parts = [part for pattern in spec.split("::") for part in _open_part(pattern, options)]
    return by_picture(parts[0] if len(parts) == 1 else MixtureSource(parts))


def _open_part(pattern: str, options: dict[str, Any]) -> list[PairSource]:
    """Return the images of one part of the training data: one source per folder, and one for all files."""
    if pattern in EMBEDDED:
        return [EMBEDDED[pattern].open("train")]
    is_any_kind = options.get("dataset_type", "auto") in ("auto", "folder")
    if not is_any_kind:
        return [open_source(pattern, **options)]
    paths = expand_pattern(pattern)
    folders = [path for path in paths if os.path.isdir(path)]
    if not folders:
        return [open_source(pattern, **options)]

    parts = [part for folder in folders for part in _open_folder(folder, options)]
    files = [path for path in paths if not os.path.isdir(path)]
    return [*parts, open_source(files, **options)] if files else parts


def _open_folder(path: str, options: dict[str, Any]) -> list[PairSource]:
    """Return the images in a folder and in its shards; if there are neither, the images that captions name."""
    is_auto = options.get("dataset_type", "auto") == "auto"
    has_shards = is_auto and bool(glob.glob(f"{glob.escape(path)}/*.tar"))
    parts = list[PairSource]()
    if holds_image(path):
        parts.append(PlainImages(path, are_shards_read=has_shards))
    if has_shards or not parts:
        parts.append(open_source(path, **options))
    return parts


def measure_overlap(
    features: SplitFeatures,
    is_right_N: Tensor,
    training: PairSource,
    spec: str,
    descriptor: Descriptor,
    threshold: float | None = None,
    reading: Reading = READING,
    progress: Progress | None = None,
    stream: TrainingStream | None = None,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Return the metrics and the details of a result: contamination, and the score with and without it.

    Memory grows with N and a block of training images, not with M.

    Args:
        features: features of the evaluation's images, which the model descriptor uses.
        is_right_N: whether the model's answer for each image is right.
        training: see ``open_training``.
        spec: the user's name of it.
        threshold: smallest cosine at which two images match [proposed].
        progress: is called with the number of training images read since its last call.
        stream: the stream of the same training images and descriptor, perhaps filled by an earlier data set.

    Raises:
        DataError: there are no images to compare, or no threshold can be proposed.
        ValueError: descriptors are not finite.
    """
    source = features.split.source
    if source is None:
        raise DataError("a file of features has no images to compare; give a data set of images")
    begun = time.perf_counter()
    described_NW = _describe_evaluation(features, source, descriptor, reading)
    images = _Images(source, features.rows_N, features.keys)
    threshold_from, notes = "given", list[str]()
    if threshold is None:
        threshold_from = "proposed"
        threshold = _proposed(images, described_NW, descriptor, reading.batch_size, notes)
    seconds = {"evaluation": time.perf_counter() - begun}

    if stream is None:
        stream = TrainingStream(training, descriptor, reading, described_NW.device, progress)
    cosine_N, place_N = _nearest(described_NW, stream)
    seconds["training"] = time.perf_counter() - begun - seconds["evaluation"]

    report = overlap_report(cosine_N.cpu(), is_right_N.cpu(), threshold, CONFIDENCE)
    interval = report.overlap_interval
    notes += stream.notes()
    training_row_N = stream.rows(place_N.cpu().numpy())
    details = {
        "main_metric": METRICS[0],
        "num_images": report.num_images,
        "threshold": threshold,
        "threshold_from": threshold_from,
        "num_overlap": report.num_overlap,
        "overlap_interval": None if interval is None else list(interval),
        "descriptor": descriptor.name,
        "training": printable(spec),
        "num_training": stream.num_read,
        "num_training_unreadable": len(stream.unreadable),
        "nearest": _nearest_pairs(cosine_N, training_row_N, images, training, notes),
        "seconds": seconds,
        "notes": notes,
    }
    return {name: getattr(report, name) for name in METRICS}, details


def adjust(results: Sequence[Result]) -> list[Result]:
    """Return the results, with the p-values of overlap adjusted, after Bonferroni, for all data sets of a model.

    ``p_value_adjusted`` in the details is the p-value times ``num_tests``, the number of sets that have one, at most 1.
    """

    def is_tested(result: Result) -> bool:
        return result.task == OVERLAP and result.metrics.get("p_value") is not None

    tested = [(result.model, result.pretrained) for result in results if is_tested(result)]
    adjusted = []
    for result in results:
        p_value = result.metrics.get("p_value")
        if is_tested(result) and p_value is not None:
            number = tested.count((result.model, result.pretrained))
            more = {"p_value_adjusted": min(1.0, number * p_value), "num_tests": number}
            result = dataclasses.replace(result, details={**result.details, **more})
        adjusted.append(result)
    return adjusted


# Evaluation images


class _Images(NamedTuple):
    """Images of a source: the rows of the readable ones, and their names."""

    source: PairSource
    rows_N: np.ndarray
    keys: list[str]


def _describe_evaluation(
    features: SplitFeatures, source: PairSource, descriptor: Descriptor, reading: Reading
) -> Tensor:
    """Return the descriptors of the evaluation's images, [N, W]."""
    if descriptor.name == "model":
        described_NW = features.whole(projected=False)
    else:
        wanted = torch.from_numpy(features.rows_N)
        assert (wanted.diff() > 0).all(), "rows ascend in the order of the images"
        parts = list[Tensor]()
        for batch in image_batches(source, descriptor, reading):
            # Images that the model's own preprocessing could not read have no answer.
            is_wanted = torch.isin(batch.indices, wanted)
            if is_wanted.any():
                parts.append(descriptor.describe(batch.images[is_wanted]))
        described_NW = torch.cat(parts) if parts else torch.zeros(0, 1)
        if len(described_NW) != len(wanted):
            raise DataError(
                f"{len(wanted) - len(described_NW)} images of {source.name} can no longer be read; evaluate it again"
            )
    check_finite(described_NW)
    return described_NW


def _proposed(
    images: _Images,
    described_NW: Tensor,
    descriptor: Descriptor,
    batch_size: int,
    notes: list[str],
) -> float:
    """Return the threshold that separates altered copies from the nearest other image of the evaluation.

    Args:
        notes: receives a note on images that are left out because they occur twice.
    """

    # Chosen by a hash of the names, so that the order of a folder does not matter.
    def order(place: int) -> bytes:
        return hashlib.sha256(images.keys[place].encode("utf-8", "replace")).digest()

    chosen = torch.tensor(heapq.nsmallest(NUM_COPIES, range(len(images.keys)), key=order))
    copies = torch.cat(
        [
            _cosines_with_copies(
                images, places, described_NW[places.to(described_NW.device)], descriptor
            )
            for places in chosen.split(batch_size)
        ]
    )
    others = _cosines_with_others(described_NW, chosen)

    # A duplicate of a picture is not another picture.
    is_other = others < SAME_COSINE
    if not is_other.all():
        notes.append(
            f"{int((~is_other).sum())} of {len(others)} images that the threshold is proposed from occur twice"
        )
    proposed = 0.0
    # If most are equal, the descriptor cannot distinguish images.
    if 2 * is_other.sum() >= len(others):
        with contextlib.suppress(ValueError):
            proposed = propose_threshold(copies.cpu(), others[is_other].cpu(), PRECISION)

    # Images of a single colour match no other image, not even their copies.
    if proposed <= 0:
        remedy = "" if descriptor.name == "pixels" else ", or use --descriptor pixels"
        raise DataError(
            f"no threshold separates copies of images of {images.source.name} from its other images at a precision of "
            f"{PRECISION:.0%}; give --threshold{remedy}"
        )
    return proposed


def _cosines_with_copies(
    images: _Images, places: Tensor, described_BW: Tensor, descriptor: Descriptor
) -> Tensor:
    """Return the cosine of each image with an altered copy of itself; skip images that can no longer be read."""
    crops, kept = [], []
    for number, place in enumerate(places.tolist()):
        try:
            picture = images.source[int(images.rows_N[place])].image
            copy = altered_copy(picture, images.keys[place])
            crops.append(descriptor.transform.crop_image(copy))
            kept.append(number)
        except BadSample:
            continue
    if not crops:
        return described_BW.new_zeros(0)
    copies_BW = descriptor.describe(torch.from_numpy(stack_images(crops))).to(described_BW)
    return torch.cosine_similarity(copies_BW, described_BW[kept], dim=1)


def _cosines_with_others(described_NW: Tensor, chosen: Tensor) -> Tensor:
    """Return the cosine of each chosen image with the nearest other one; none for a single image."""
    if len(described_NW) < 2:
        return described_NW.new_zeros(0)
    # The largest cosine is that of an image with itself, or with an equal one.
    cosine_B2, _ = similarity_topk(described_NW[chosen.to(described_NW.device)], described_NW, 2)
    return cosine_B2[:, 1]


def _nearest(described_NW: Tensor, stream: TrainingStream) -> tuple[Tensor, Tensor]:
    """Return the cosine and the index of each image's nearest training image."""
    try:
        # An error or Ctrl-C ends the reading processes immediately.
        with contextlib.closing(stream.blocks()) as blocks:
            return nearest_training(described_NW, blocks)
    except ValueError:
        if stream.num_read:
            raise
        reason = "; ".join(stream.notes()) or "it is empty"
        raise DataError(
            f"there is no training image to compare with: {reason}; see --train-data"
        ) from None


# Pictures of the nearest pairs


def _nearest_pairs(
    cosine_N: Tensor,
    training_row_N: np.ndarray,
    images: _Images,
    training: PairSource,
    notes: list[str],
) -> list[dict[str, Any]]:
    """Return the images nearest to a training image, with both pictures, nearest first."""
    order = cosine_N.cpu().argsort(descending=True, stable=True)[:NUM_PAIRS_SHOWN].tolist()
    pairs, num_missing = [], 0
    for place in order:
        image = _read(images.source, int(images.rows_N[place]))
        twin = _read(training, int(training_row_N[place]))
        num_missing += (image is None) + (twin is None)
        pairs.append(
            {
                "cosine": cosine_N[place].item(),
                "image_key": printable(images.keys[place]),
                "training_key": None if twin is None else printable(twin.key),
                "image": None if image is None else picture_uri(image.image, THUMBNAIL_SIDE),
                "training_image": None if twin is None else picture_uri(twin.image, THUMBNAIL_SIDE),
            }
        )
    if num_missing:
        notes.append(f"{num_missing} pictures of the nearest pairs can no longer be read")
    return pairs


def _read(source: PairSource, row: int) -> Pair | None:
    """Return a pair; None if it can no longer be read."""
    try:
        return source[row]
    except BadSample:
        return None
