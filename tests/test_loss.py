"""ClipLoss: open_clip's call on one rank, and over ranks exactly the loss of all pairs on one.

Letters: B pairs of one rank, E embedding size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from numerics import assert_accurate, with_gradients
from openclip import import_open_clip
from ranks import RankPool
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.contrastive import contrastive_ref
from clipcore.loss import ClipLoss

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clipcore.distributed import World

NUM_RANKS = 3


def unit_embeddings(B: int, E: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Pairs that are somewhat alike; the same numbers in the test and in every rank."""
    generator = torch.Generator().manual_seed(B)
    image, noise = torch.randn(2, B, E, dtype=torch.float64, generator=generator)
    return F.normalize(image).to(dtype), F.normalize(image + noise).to(dtype)


# On one rank.


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_clip_loss_is_open_clips(scale: float) -> None:
    """By the rule of accuracy; a loss is one number, so it compares those of several batches."""
    theirs = import_open_clip().loss.ClipLoss()
    one = torch.tensor(1.0)
    results: list[list[list[Tensor]]] = [[], [], []]
    for B in range(195, 201):
        inputs = (*unit_embeddings(B, 32), torch.tensor(scale))
        for found, loss_fn in zip(results, (ClipLoss(), theirs), strict=False):
            found.append(with_gradients(loss_fn, inputs, one))
        results[2].append(with_gradients(theirs, [t.double() for t in inputs], one))
    for name, *columns in zip(
        ("loss", "image", "text", "scale"),
        *(zip(*found, strict=True) for found in results),
        strict=True,
    ):
        actual, reference, exact = (torch.cat([t.flatten() for t in column]) for column in columns)
        assert_accurate(name, actual, reference, exact)


def test_open_clip_call_and_return() -> None:
    image, text = unit_embeddings(4, 8)
    bias = torch.tensor(3.0, requires_grad=True)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)
    value = loss(image, text, 10.0, output_dict=True)["contrastive_loss"]
    with_bias = loss(image, text, logit_scale=10.0, logit_bias=bias)
    with_bias.backward()
    assert torch.equal(value, with_bias) and bias.grad == 0


def test_low_precision_features_are_summed_in_float32() -> None:
    image, text = (t.bfloat16().requires_grad_() for t in unit_embeddings(64, 32))
    loss = ClipLoss()(image, text, torch.tensor(100.0))
    loss.backward()
    exact = contrastive_ref(image.double(), text.double(), 100.0).float()
    assert loss.dtype == torch.float32 and image.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, exact)


@pytest.mark.parametrize(("image", "text"), [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((4,), (4,))])
def test_what_is_no_pairs_is_refused(image: tuple[int, ...], text: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pairs of one shape"):
        ClipLoss()(torch.ones(image), torch.ones(text), 1.0)


# Over ranks.


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS) as ranks:
        yield ranks


def ids_of(num_pairs: int) -> Tensor:
    """Ids of which some stand on several ranks."""
    return torch.arange(num_pairs) % (num_pairs * 2 // 3)


def rank_loss(
    world: World, B: int, scale: float, settings: dict[str, Any], with_ids: bool
) -> list[Tensor]:
    """[loss, d_image, d_text, d_scale] of one rank's pairs."""
    image, text = unit_embeddings(B * world.world_size, 16, torch.float64)
    own = slice(world.rank * B, world.rank * B + B)
    ids = ids_of(B * world.world_size)[own]
    loss_fn = ClipLoss(rank=world.rank, world_size=world.world_size, **settings)
    keywords = {"image_ids": ids, "text_ids": ids} if with_ids else {}
    return with_gradients(
        lambda *x: loss_fn(*x, **keywords),
        (image[own], text[own], torch.tensor(scale, dtype=torch.float64)),
        torch.tensor(1.0),
    )


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("B", [1, 7])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing": 0.1},
        {"same_id": "ignore"},
        {"same_id": "positive"},
        {"same_id": "positive", "label_smoothing": 0.2},
    ],
    ids=str,
)
def test_ranks_together_have_the_loss_and_gradients_of_one(
    pool: RankPool, settings: dict[str, Any], B: int, scale: float
) -> None:
    """The mean over ranks, which DistributedDataParallel takes, is the loss of all pairs; to 1e-12 in float64."""
    with_ids = "same_id" in settings
    image, text = unit_embeddings(B * NUM_RANKS, 16, torch.float64)
    ids = ids_of(B * NUM_RANKS)
    keywords = {**settings, **({"image_ids": ids, "text_ids": ids} if with_ids else {})}
    expected = with_gradients(
        lambda *x: contrastive_ref(*x, **keywords),
        (image, text, torch.tensor(scale, dtype=torch.float64)),
        torch.tensor(1.0),
    )
    loss, d_image, d_text, d_scale = zip(
        *pool.run(rank_loss, B, scale, settings, with_ids), strict=True
    )
    actual = [
        torch.stack(loss).mean(),
        torch.cat(d_image) / NUM_RANKS,
        torch.cat(d_text) / NUM_RANKS,
        torch.stack(d_scale).mean(),
    ]
    for ours, theirs in zip(actual, expected, strict=True):
        limit = 1e-12 * max(1.0, theirs.abs().max().item())
        assert (ours - theirs).abs().max().item() <= limit
