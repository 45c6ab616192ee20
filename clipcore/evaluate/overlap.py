"""Measures how many evaluation pictures are among the training pictures, and whether that raises the score.

Legend: N evaluation pictures, M training pictures, E width of a descriptor.

Source: Radford et al. 2021, section 5 and figure 17. A picture overlaps if its nearest training picture is nearer than a
threshold. The score of all pictures is compared with that of the clean ones. A binomial test tells whether the overlapping
ones are answered significantly better.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.evaluate.metrics import binomial_tail, clopper_pearson_interval
from clipcore.kernels.similarity_topk import similarity_topk

# Side of the reduced picture in the pixel descriptor.
_PIXEL_SIDE = 16


@dataclass(frozen=True)
class OverlapReport:
    """The scores of an evaluation with and without the overlapping pictures.

    Attributes:
        threshold: smallest cosine at which a picture overlaps.
        num_images: N.
        num_overlap: the number of overlapping pictures.
        contamination: the share of overlapping pictures.
        score: share of right answers on all pictures.
        clean_score: the same on pictures that do not overlap; None if all do.
        overlap_score: the same on pictures that overlap; None if none does.
        gain: how much the overlap raises the score, ``score - clean_score``.
        p_value: probability of at least this many right answers on overlapping pictures at the rate of the clean ones;
            one-sided, before any correction for several data sets.
        overlap_interval: interval of the rate on overlapping pictures, after Clopper and Pearson.
    """

    threshold: float
    num_images: int
    num_overlap: int
    contamination: float
    score: float
    clean_score: float | None
    overlap_score: float | None
    gain: float | None
    p_value: float | None
    overlap_interval: tuple[float, float] | None


def nearest_training(descriptors_NE: Tensor, training: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the cosine of the nearest training picture of each evaluation picture, and its index.

    The training pictures are passed in parts; neither they nor the N x M cosines are ever held whole.

    Args:
        training: descriptors [M', E] of one part after another.

    Returns:
        [N] cosines and int64 [N] indices, counted over all parts; the first one wins a tie.

    Raises:
        ValueError: there is no training picture.
    """
    best_N = descriptors_NE.new_full((len(descriptors_NE),), -torch.inf)
    number_N = torch.full_like(best_N, -1, dtype=torch.long)
    begun = 0
    for part_ME in training:
        if not len(part_ME):
            continue
        value_N1, place_N1 = similarity_topk(descriptors_NE, part_ME.to(descriptors_NE.device), 1)
        value_N, place_N = value_N1[:, 0].to(best_N.dtype), place_N1[:, 0]
        is_nearer = value_N > best_N
        best_N = torch.where(is_nearer, value_N, best_N)
        number_N = torch.where(is_nearer, place_N + begun, number_N)
        begun += len(part_ME)
    if not begun:
        raise ValueError("there is no training picture to compare with")
    return best_N, number_N


def pixel_descriptors(images_N3HW: Tensor) -> Tensor:
    """Return descriptors without a model: coarse pixels, minus each channel's mean, normalised to unit length.

    Args:
        images_N3HW: uint8, or floats from 0 to 255, of any size.

    Returns:
        float32 [N, 768]; zeros for a picture of a single colour, which matches no other.
    """
    coarse = F.interpolate(
        images_N3HW.float(), (_PIXEL_SIDE, _PIXEL_SIDE), mode="bilinear", antialias=True
    )
    free = (coarse - coarse.mean((2, 3), keepdim=True)).flatten(1)
    length = free.norm(dim=1, keepdim=True)
    # The rounding errors of a single colour are not a pattern.
    is_flat = length < 1e-3 * free.shape[1] ** 0.5
    return torch.where(is_flat, 0.0, free / length.clamp(min=1e-12))


def overlap_report(
    nearest_N: Tensor, is_right_N: Tensor, threshold: float, confidence: float = 0.995
) -> OverlapReport:
    """Compare the score of all pictures with that of those without a near training picture.

    Args:
        nearest_N: cosine of each picture's nearest training picture.
        is_right_N: whether its answer is right.
        threshold: smallest cosine at which a picture overlaps.
        confidence: coverage of the interval.

    Raises:
        ValueError: there are no pictures, or the lengths differ.
    """
    num_images = len(nearest_N)
    if not num_images or len(is_right_N) != num_images:
        raise ValueError(f"{num_images} pictures have {len(is_right_N)} answers")
    overlaps = nearest_N >= threshold
    is_right_N = is_right_N.bool()
    num_overlap, num_right = int(overlaps.sum()), int(is_right_N.sum())
    num_right_overlap = int((is_right_N & overlaps).sum())
    num_clean = num_images - num_overlap

    score = num_right / num_images
    clean = (num_right - num_right_overlap) / num_clean if num_clean else None
    p_value = None
    if num_overlap and clean is not None:
        p_value = binomial_tail(num_right_overlap, num_overlap, clean)
    return OverlapReport(
        threshold=threshold,
        num_images=num_images,
        num_overlap=num_overlap,
        contamination=num_overlap / num_images,
        score=score,
        clean_score=clean,
        overlap_score=num_right_overlap / num_overlap if num_overlap else None,
        gain=None if clean is None else score - clean,
        p_value=p_value,
        overlap_interval=clopper_pearson_interval(num_right_overlap, num_overlap, confidence)
        if num_overlap
        else None,
    )


def propose_threshold(copies: Tensor, others: Tensor, precision: float = 0.99) -> float:
    """Return the smallest cosine at which the share of copies reaches the precision.

    Args:
        copies: cosines of pictures with altered copies of themselves.
        others: cosines of pictures with their nearest other picture.

    Raises:
        ValueError: there are no copies, or none of their cosines reaches the precision.
    """
    if not len(copies):
        raise ValueError("a threshold is proposed from copies, and there are none")
    candidates = copies.double().sort(descending=True).values.unique().flip(0)
    ordered_copies, ordered_others = copies.double().sort().values, others.double().sort().values
    num_copies = len(copies) - torch.searchsorted(ordered_copies, candidates)
    num_others = len(others) - torch.searchsorted(ordered_others, candidates)
    is_precise = num_copies / (num_copies + num_others) >= precision
    if not is_precise.any():
        raise ValueError(
            f"no cosine separates copies from other pictures at a precision of {precision:g}; use another descriptor"
        )
    return float(candidates[is_precise].min())
