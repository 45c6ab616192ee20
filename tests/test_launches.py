"""How many kernels a call of each loss launches on a GPU, forward and backward together, counted without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from launch_counts import Launches
from problems import ids_for
from torch import Tensor

from clipcore.kernels.contrastive import contrastive_loss, contrastive_terms
from clipcore.kernels.sigmoid import sigmoid_loss
from clipcore.loss import ClipLoss, SigLipLoss

STASH = 2**62
# At most these beside 6 a block.
LIMIT = 40

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "ignore": {"same_id": "ignore"},
    "ignore, smoothed": {"same_id": "ignore", "label_smoothing": 0.1},
    "positive": {"same_id": "positive"},
    "positive, smoothed": {"same_id": "positive", "label_smoothing": 0.1},
}


def features(num_pairs: int, width: int) -> list[Tensor]:
    """Return leaves without values: images and texts, and two scalars."""
    shapes = (num_pairs, width), (num_pairs, width), (), ()
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    return [
        torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def terms(image: Tensor, text: Tensor, scale: Tensor) -> None:
    found = list(contrastive_terms(image, text, scale, stash_bytes=0))
    torch.autograd.backward(found, [torch.empty_like(term) for term in found])


def loss_of(**how: object) -> Callable[..., None]:
    def call(image: Tensor, text: Tensor, scale: Tensor) -> None:
        contrastive_loss(image, text, scale, **how).backward()

    return call


# What is called, with how many scalars, and its launches at one block a pass.
CALLS: dict[str, tuple[Callable[..., None], int, int]] = {
    "contrastive_loss": (loss_of(stash_bytes=0), 1, 42),
    "contrastive_loss, stash": (loss_of(stash_bytes=STASH), 1, 40),
    "contrastive_loss, dense": (loss_of(engine="dense"), 1, 39),
    "contrastive_loss, fused": (loss_of(engine="fused", stash_bytes=0), 1, 40),
    "contrastive_terms": (terms, 1, 44),
    "sigmoid_loss": (lambda *x: sigmoid_loss(*x).backward(), 2, 28),
    "sigmoid_loss, fused": (lambda *x: sigmoid_loss(*x, engine="fused").backward(), 2, 27),
    "ClipLoss": (lambda *x: ClipLoss(stash_bytes=0)(*x).backward(), 1, 44),
    "ClipLoss, stash": (lambda *x: ClipLoss(stash_bytes=STASH)(*x).backward(), 1, 42),
    "SigLipLoss": (lambda *x: SigLipLoss()(*x).backward(), 2, 30),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_one_block(name: str) -> None:
    call, num_scalars, most = CALLS[name]
    inputs = features(1024, 512)[: 2 + num_scalars]
    with Launches.counted() as launches:
        call(*inputs)
    # The sigmoid loss has its gradients in the forward.
    assert launches.num_blocks == (1 if num_scalars == 2 else 2)
    assert launches.total == most, launches.counts


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("num_pairs", "width"), [(1024, 512), (32768, 768), (131072, 512)])
def test_at_most_6_a_block_beside_40(num_pairs: int, width: int, name: str) -> None:
    call, num_scalars, _ = CALLS[name]
    inputs = features(num_pairs, width)[: 2 + num_scalars]
    with Launches.counted() as launches:
        call(*inputs)
    assert launches.total <= LIMIT + 6 * launches.num_blocks, launches.counts


# Ids have to be sorted and counted, of each side: that is not done in a kernel of our own.
@pytest.mark.parametrize(
    ("option", "most"),
    [
        ("smoothed", 48),
        ("ignore", 42),
        ("ignore, smoothed", 76),
        ("positive", 64),
        ("positive, smoothed", 64),
    ],
)
def test_ids_and_smoothing(option: str, most: int) -> None:
    image, text, scale, _ = features(1024, 512)
    ids = ids_for(OPTIONS[option], 1024, 1024, "meta")
    with Launches.counted() as launches:
        contrastive_loss(image, text, scale, stash_bytes=0, **ids).backward()
    assert launches.total <= most, launches.counts


@pytest.mark.fast
def test_what_counts_as_a_launch() -> None:
    values = torch.empty(4, 4, device="meta")
    with Launches.counted() as launches:
        view = (
            values.T[1:].reshape(-1)[:3].expand(5, 3)
        )  # the reshape of a transposed matrix copies
        torch.empty(0, device="meta").zero_()
        torch.where(view > 0, view, 0.0)  # a comparison, a scalar on the device, a choice
    assert launches.counts == {"clone": 1, "gt": 1, "scalar_tensor": 1, "where": 1}
    with pytest.raises(AssertionError, match="waits for the GPU"), Launches.counted():
        values.sum().item()
