"""Overlap with training pictures: the nearest one, planted copies, and what the test says of a raised score."""

from __future__ import annotations

import pytest
import torch
from shards import picture
from torch.nn import functional as F

from clipcore.data.transforms import decode_image
from clipcore.evaluate.overlap import (
    nearest_training,
    overlap_report,
    pixel_descriptors,
    propose_threshold,
)

pytestmark = pytest.mark.fast


def unit(num_rows: int, seed: int, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_rows, width, generator=generator), dim=1)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_the_nearest_over_all_parts(size):
    queries, training = unit(9, 0), unit(100, 1)
    training[63] = training[11] = queries[4]  # of equally near ones the first
    value, number = nearest_training(queries, training.split(size))
    dense = queries @ training.T
    assert number.tolist() == dense.argmax(1).tolist() and number[4] == 11
    torch.testing.assert_close(value, dense.amax(1))


def test_parts_without_pictures():
    queries = unit(3, 0)
    value, number = nearest_training(queries, [queries[:0], queries, queries[:0]])
    assert number.tolist() == [0, 1, 2] and torch.allclose(value, torch.ones(3))
    with pytest.raises(ValueError, match="no training picture"):
        nearest_training(queries, [queries[:0]])


def test_planted_copies_are_the_overlap():
    """200 pictures, of which 20 are in training: 18 of these are right, and 126 of the 180 others."""
    nearest = torch.full((200,), 0.4)
    nearest[:20] = torch.linspace(0.9, 1.0, 20)
    is_right = torch.zeros(200, dtype=torch.bool)
    is_right[:18] = is_right[20:146] = True
    found = overlap_report(nearest, is_right, 0.9)
    assert (found.num_overlap, found.contamination) == (20, 0.1)
    assert (found.score, found.clean_score, found.overlap_score) == (0.72, 0.7, 0.9)
    assert found.gain == pytest.approx(0.02, abs=1e-12)
    assert found.p_value == pytest.approx(0.035483, abs=5e-7)
    low, high = found.overlap_interval
    assert 0.5 < low < 0.9 < high < 1.0


def test_no_picture_and_all_pictures_overlap():
    nearest, is_right = torch.tensor([0.1, 0.2]), torch.tensor([True, False])
    none = overlap_report(nearest, is_right, 0.5)
    assert (none.num_overlap, none.clean_score, none.gain) == (0, 0.5, 0.0)
    assert none.overlap_score is none.p_value is none.overlap_interval is None
    every = overlap_report(nearest, is_right, 0.0)
    assert (every.contamination, every.overlap_score) == (1.0, 0.5)
    assert every.clean_score is every.gain is every.p_value is None
    with pytest.raises(ValueError, match="0 pictures have 0 answers"):
        overlap_report(nearest[:0], is_right[:0], 0.5)


def pixels(index: int) -> torch.Tensor:
    image = decode_image(picture(index)[0])
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(
        image.height, image.width, 3
    )


def test_pixels_find_a_copy_of_another_size_and_brightness():
    pictures = [pixels(index).permute(2, 0, 1)[None] for index in range(40)]
    training = torch.cat([pixel_descriptors(image) for image in pictures])
    altered = F.interpolate(pictures[17].float(), scale_factor=2.0, mode="nearest")[..., 2:-2, 1:-1]
    value, number = nearest_training(pixel_descriptors(0.8 * altered + 20), [training])
    assert number.item() == 17 and value.item() > 0.95
    assert torch.allclose(training.norm(dim=1), torch.ones(40))


def test_a_picture_of_one_colour_is_like_no_other():
    images = torch.full((2, 3, 20, 30), 77, dtype=torch.uint8)
    images[1, 0] = 255
    flat = pixel_descriptors(images)
    assert flat.shape == (2, 768) and not flat.any()


def test_a_threshold_from_copies():
    copies, others = torch.tensor([0.99, 0.95, 0.9, 0.6]), torch.tensor([0.7, 0.5, 0.3])
    assert propose_threshold(copies, others, 1.0) == pytest.approx(0.9)
    assert propose_threshold(copies, others, 0.75) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="use another descriptor"):
        propose_threshold(copies[:1], torch.ones(5))
    with pytest.raises(ValueError, match="there are none"):
        propose_threshold(copies[:0], others)
