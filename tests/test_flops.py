"""What a training step computes: hardly more floating-point operations than its gradients need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
import bench_counts
from step_providers import captions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from clipcore.data.loader import Batch
from clipcore.data.packing import PackedText
from clipcore.kernels import launch
from clipcore.loss import ClipLoss
from clipcore.ranks.distributed import World
from clipcore.run.flops import visible_pairs
from clipcore.run.train_step import TrainingStep
from clipcore.towers.factory import create_model

MODELS = ["ViT-B-32", "ViT-B-16", "ViT-L-14", "RN50"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("num_pairs", "micro_batch_size"), [(64, 64), (1024, 256)])
def test_a_step_computes_hardly_more_than_it_has_to(name, num_pairs, micro_batch_size) -> None:
    """Captions of 5 to 77 tokens, 16 on average: padded to 77 a step of ViT-B-32 has 1.46 times what is needed."""
    counted = bench_counts.flops_of_clipcore(name, num_pairs, micro_batch_size)
    assert 1.0 <= counted / bench_counts.needed(name, num_pairs) <= 1.05


def test_a_micro_batch_that_is_embedded_twice_costs_one_forward_pass() -> None:
    """A third of a step's products, since the backward pass has twice as many; the first of four is kept."""
    once, twice = (bench_counts.flops_of_clipcore("ViT-S-32", 64, 16, kept) for kept in (4, 1))
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
def test_a_counter_sees_what_a_run_computes() -> None:
    """Its hooks change nothing, and attention is counted within the halves of a block too."""
    model = create_model("ViT-nano-8-32")
    with FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(2, 3, 32, 32)).sum().backward()
    vision = model.config.vision
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    attention = 7 * 2 * vision.width * 2 * tokens**2 * (vision.layers - 1)
    counted = counter.get_flop_counts()["Global"]
    ops = torch.ops.clipcore
    assert counted[ops.attention_forward] + counted[ops.attention_backward] == attention

    with launch.visible_operators(), FlopCounterMode(display=False) as watched:
        model.encode_image(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert watched.get_total_flops() == counter.get_total_flops()


@pytest.mark.fast
def test_segments_without_values_count_as_one_caption_a_row() -> None:
    segments = torch.zeros(3, 5, dtype=torch.int32, device="meta")
    assert visible_pairs(3, 5, True, segments) == 3 * 15
    assert visible_pairs(3, 5, False, segments) == 3 * 25


class Transfers(TorchDispatchMode):
    """Notes the shapes of what is made on the device from tensors of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if _is_on(x, "meta")]
        if found and any(_is_on(x, "cpu") for x in torch.utils._pytree.tree_leaves((args, kwargs))):
            self.copied.append(tuple(found[0].shape))
        return out


def _is_on(x: object, device: str) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == device


@pytest.mark.parametrize("name", ["ViT-nano-8-32", "RN-nano-32"])
def test_a_micro_batch_copies_its_inputs_to_the_device_and_nothing_else(name) -> None:
    """On a GPU any other copy would be of pageable memory, which waits; constants are the model's buffers.

    A number of the device that the host asks for would raise here, since a meta tensor has none.
    """
    device = torch.device("meta")
    model = create_model(name, device=device).train()
    step = TrainingStep(
        *(model, model, ClipLoss(), World(0, 1, 0, device), "fp32", 0, 16, lambda loss: loss, 8, 1)
    )
    torch.manual_seed(0)
    tokens = captions(16, model.vocab_size, model.context_length)
    batch = Batch(torch.zeros(16, 3, 32, 32, dtype=torch.uint8), tokens, torch.arange(16))
    inputs = []
    for rows in (slice(0, 8), slice(8, 16)):
        images, text = step.cutter(batch, 0)(rows)
        parts = text if isinstance(text, PackedText) else [text]
        inputs.append([tuple(part.shape) for part in (images, *parts)])

    with Transfers() as transfers:
        step.gradients(batch, 0)
    # One is packed, one is not; the second is embedded twice.
    assert [len(parts) for parts in inputs] == [2, 6]
    assert transfers.copied == inputs[0] + inputs[1] + inputs[1]
