"""What a training step computes: hardly more floating-point operations than its gradients need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
import bench_counts
from step_providers import captions
from torch.overrides import TorchFunctionMode
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


# They make a tensor on the host, whichever device they are given, and copy it.
MADE_ON_HOST = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)


class Constants(TorchFunctionMode):
    """Notes the shapes of tensors of the device that are made from numbers of Python; on meta they copy nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, ...]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in MADE_ON_HOST and _is_on(out, "meta"):
            self.made.append(tuple(out.shape))
        return out


def _is_on(x: object, device: str) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == device


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(
    ("name", "patch_dropout"),
    [
        ("ViT-nano-8-32", 0.0),
        ("ViT-nano-8-32", 0.5),
        ("ViT-B-32", 0.5),
        ("RN-nano-32", 0.0),
        ("RN50", 0.0),
    ],
)
def test_a_micro_batch_copies_its_inputs_to_the_device_and_nothing_else(
    name, patch_dropout, with_ids
) -> None:
    """On a GPU any other copy would be of pageable memory, which waits; constants are the model's buffers.

    A number or a copy of the device's memory that the host asks for would raise here, since a meta tensor has none.
    """
    device = torch.device("meta")
    model = create_model(name, device=device, force_patch_dropout=patch_dropout or None).train()
    loss_fn = ClipLoss(same_id="ignore") if with_ids else ClipLoss()
    step = TrainingStep(
        model=model,
        loss_fn=loss_fn,
        world=World(0, 1, 0, device),
        precision="fp32",
        seed=0,
        global_batch_size=16,
        scale_loss=lambda loss: loss,
        micro_batch_size=8,
        num_kept_graphs=1,
        with_ids=with_ids,
    )
    torch.manual_seed(0)
    tokens = captions(16, model.vocab_size, model.context_length)
    side = model.config.vision.image_size
    batch = Batch(torch.zeros(16, 3, side, side, dtype=torch.uint8), tokens, torch.arange(16))
    inputs, packed = [], set()
    for rows in (slice(0, 8), slice(8, 16)):
        images, text, *seeds = step.cutter(batch, 0)(rows)
        parts = text if isinstance(text, PackedText) else [text]
        inputs.append([tuple(part.shape) for part in (images, *parts, *seeds)])
        packed.add(isinstance(text, PackedText))
        assert len(seeds) == bool(patch_dropout)
    assert True in packed
    assert len(packed) == 2 or "nano" not in name  # in a short context, one has too little padding

    with Constants() as constants, Transfers() as transfers:
        step.gradients(batch, 0)
    assert not constants.made
    # The first is kept, the second is embedded twice. The ids of all pairs come first.
    ids = [(16,)] if with_ids else []
    assert transfers.copied == ids + inputs[0] + inputs[1] + inputs[1]
