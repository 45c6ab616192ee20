"""What a training step computes: hardly more floating-point operations than its gradients need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
import bench_flops

from clipcore.flops import visible_pairs
from clipcore.model import create_model


@pytest.mark.parametrize("name", bench_flops.MODELS)
@pytest.mark.parametrize(("num_pairs", "micro_batch_size"), [(64, 64), (1024, 256)])
def test_a_step_computes_hardly_more_than_it_has_to(name, num_pairs, micro_batch_size) -> None:
    """Captions of 5 to 77 tokens, 16 on average: padded to 77 a step of ViT-B-32 would be 1.4 times what is needed."""
    counted = bench_flops.of_clipcore(name, num_pairs, micro_batch_size)
    assert 1.0 <= counted / bench_flops.needed(name, num_pairs) <= 1.05


def test_a_micro_batch_that_is_embedded_twice_costs_one_forward_pass() -> None:
    """A third of a step's products, since the backward pass has twice as many; the first of four is kept."""
    once, twice = (bench_flops.of_clipcore("ViT-S-32", 64, 16, kept) for kept in (4, 1))
    assert 0.75 * 0.31 <= twice / once - 1 <= 0.75 * 0.34


@pytest.mark.fast
def test_a_model_on_the_meta_device_has_shapes_only() -> None:
    model = create_model("ViT-nano-8-32", device="meta")
    assert all(weight.is_meta for weight in model.parameters())
    image_BE, text_BE, _ = model(
        torch.zeros(2, 3, 32, 32, device="meta"), torch.zeros(2, 8, dtype=torch.long, device="meta")
    )
    (image_BE.sum() + text_BE.sum()).backward()
    assert image_BE.shape == text_BE.shape == (2, model.config.embed_dim)
    assert all(weight.grad.shape == weight.shape for weight in model.visual.parameters())  # type: ignore[union-attr]


@pytest.mark.fast
def test_segments_without_values_count_as_one_caption_a_row() -> None:
    segments = torch.zeros(3, 5, dtype=torch.int32, device="meta")
    assert visible_pairs(3, 5, True, segments) == 3 * 15
    assert visible_pairs(3, 5, False, segments) == 3 * 25
