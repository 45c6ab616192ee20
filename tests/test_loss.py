"""ClipLoss and SigLipLoss: open_clip's call on one rank, and over ranks exactly the loss of all pairs on one.

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

import clipcore
from clipcore.kernels.contrastive import contrastive_ref
from clipcore.kernels.sigmoid import sigmoid_ref
from clipcore.loss import ClipLoss, SigLipLoss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from clipcore.distributed import World

NUM_RANKS = 3


def unit_embeddings(B: int, E: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Pairs that are somewhat alike; the same numbers in the test and in every rank."""
    generator = torch.Generator().manual_seed(B)
    image, noise = torch.randn(2, B, E, dtype=torch.float64, generator=generator)
    return F.normalize(image).to(dtype), F.normalize(image + noise).to(dtype)


# On one rank.


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("ClipLoss", (14.3,)),
        ("ClipLoss", (100.0,)),
        ("SigLipLoss", (10.0, -10.0)),
        ("SigLipLoss", (112.0, -16.5)),
    ],
)
def test_the_loss_is_open_clips(name: str, factors: tuple[float, ...]) -> None:
    """By the rule of accuracy; a loss is one number, so it compares those of several batches."""
    ours, theirs = getattr(clipcore, name)(), getattr(import_open_clip().loss, name)()
    one = torch.tensor(1.0)
    results: list[list[list[Tensor]]] = [[], [], []]
    for B in range(195, 201):
        inputs = (*unit_embeddings(B, 32), *(torch.tensor(factor) for factor in factors))
        for found, loss_fn in zip(results, (ours, theirs), strict=False):
            found.append(with_gradients(loss_fn, inputs, one))
        results[2].append(with_gradients(theirs, [t.double() for t in inputs], one))
    for name, *columns in zip(
        ("loss", "image", "text", "scale", "bias")[: len(results[0][0])],
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


def test_the_plan_is_of_all_ranks_texts() -> None:
    loss_fn = ClipLoss(world_size=4, stash_bytes=16 * 64 * 4 - 1)
    plan = loss_fn.plan(*unit_embeddings(16, 8))
    assert plan.shape == (16, 64, 8) and not plan.stash


def test_siglip_call_and_return() -> None:
    image, text = unit_embeddings(4, 8)
    loss_fn = SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl="shift")
    value = loss_fn(image, text, 10.0, torch.tensor(-10.0), output_dict=True)["contrastive_loss"]
    assert torch.equal(value, loss_fn(image, text, logit_scale=10.0, logit_bias=-10.0))
    assert torch.equal(loss_fn(image, text, 10.0, None), loss_fn(image, text, 10.0, 0.0))
    with pytest.raises(ValueError, match="dist_impl"):
        SigLipLoss(dist_impl="ring")


@pytest.mark.parametrize("extra", [(0, 5), (5, 0)])
def test_extra_rows_are_negatives(extra: tuple[int, int]) -> None:
    """On either side; pairs are the first rows."""
    image, text = unit_embeddings(9, 8, torch.float64)
    image, text = image[: 9 - extra[0]], text[: 9 - extra[1]]
    for loss_fn, reference, factors in (
        (ClipLoss(), contrastive_ref, (14.3,)),
        (SigLipLoss(), sigmoid_ref, (10.0, -10.0)),
    ):
        torch.testing.assert_close(
            loss_fn(image, text, *factors), reference(image, text, *factors), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize(("image", "text"), [((3, 4), (3, 5)), ((4,), (4,)), ((3, 4, 1), (3, 4))])
@pytest.mark.parametrize("loss", [ClipLoss, SigLipLoss])
def test_what_is_no_pairs_is_refused(
    loss: type[ClipLoss | SigLipLoss], image: tuple[int, ...], text: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="pairs of one shape"):
        loss()(torch.ones(image), torch.ones(text), 1.0)
    with pytest.raises(ValueError, match="pairs of one shape"):
        loss(world_size=2)(torch.ones(3, 4), torch.ones(2, 4), 1.0)


# Over ranks.


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS) as ranks:
        yield ranks


def ids_of(num_pairs: int) -> Tensor:
    """Ids of which some stand on several ranks."""
    return torch.arange(num_pairs) % (num_pairs * 2 // 3)


def rank_loss(
    world: World,
    name: str,
    B: int,
    factors: tuple[float, ...],
    settings: dict[str, Any],
    with_ids: bool,
) -> list[Tensor]:
    """[loss, d_image, d_text, d_scale, d_bias if any] of one rank's pairs."""
    image, text = unit_embeddings(B * world.world_size, 16, torch.float64)
    own = slice(world.rank * B, world.rank * B + B)
    ids = ids_of(B * world.world_size)[own]
    loss_fn = getattr(clipcore, name)(rank=world.rank, world_size=world.world_size, **settings)
    keywords = {"image_ids": ids, "text_ids": ids} if with_ids else {}
    return with_gradients(
        lambda *x: loss_fn(*x, **keywords),
        (image[own], text[own], *(torch.tensor(f, dtype=torch.float64) for f in factors)),
        torch.tensor(1.0),
    )


def assert_ranks_agree(
    pool: RankPool,
    name: str,
    reference: Callable[..., Tensor],
    B: int,
    factors: tuple[float, ...],
    settings: dict[str, Any],
) -> None:
    """The mean over ranks, which DistributedDataParallel takes, is the loss of all pairs; to 1e-12 in float64."""
    with_ids = "same_id" in settings
    image, text = unit_embeddings(B * NUM_RANKS, 16, torch.float64)
    ids = ids_of(B * NUM_RANKS)
    keywords = {**settings, **({"image_ids": ids, "text_ids": ids} if with_ids else {})}
    keywords.pop("dist_impl", None)
    expected = with_gradients(
        lambda *x: reference(*x, **keywords),
        (image, text, *(torch.tensor(f, dtype=torch.float64) for f in factors)),
        torch.tensor(1.0),
    )
    found = pool.run(rank_loss, name, B, factors, settings, with_ids)
    loss, d_image, d_text, *others = zip(*found, strict=True)
    actual = [
        torch.stack(loss).mean(),
        torch.cat(d_image) / NUM_RANKS,
        torch.cat(d_text) / NUM_RANKS,
        *(torch.stack(other).mean() for other in others),
    ]
    for ours, theirs in zip(actual, expected, strict=True):
        limit = 1e-12 * max(1.0, theirs.abs().max().item())
        assert (ours - theirs).abs().max().item() <= limit


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
def test_clip_loss_of_ranks_is_that_of_all_pairs(
    pool: RankPool, settings: dict[str, Any], B: int, scale: float
) -> None:
    assert_ranks_agree(pool, "ClipLoss", contrastive_ref, B, (scale,), settings)


@pytest.mark.parametrize("factors", [(1.0, 0.0), (10.0, -10.0), (100.0, -3.0)])
@pytest.mark.parametrize("B", [1, 7])
@pytest.mark.parametrize(
    "settings",
    [{}, {"dist_impl": "bidir"}, {"same_id": "ignore"}, {"same_id": "positive"}],
    ids=str,
)
def test_siglip_loss_of_ranks_is_that_of_all_pairs(
    pool: RankPool, settings: dict[str, Any], B: int, factors: tuple[float, float]
) -> None:
    assert_ranks_agree(pool, "SigLipLoss", sigmoid_ref, B, factors, settings)
