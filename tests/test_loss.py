"""ClipLoss and SigLipLoss: open_clip's call on one rank, and over ranks exactly the loss of all pairs on one.

Letters: B pairs of one rank, E embedding size.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from numerics import assert_accurate, with_gradients
from openclip import import_open_clip
from ranks import RankPool
from torch import Tensor
from torch.nn import functional as F

import clipcore
from clipcore.kernels.contrastive.reference import _cross_entropy_ref, contrastive_ref
from clipcore.kernels.sigmoid import sigmoid_ref
from clipcore.loss import ClipLoss, DistillClipLoss, SigLipLoss
from clipcore.loss.options import warn_once
from clipcore.ranks.distributed import World

NUM_RANKS = 4
NAMES = ("loss", "image", "text", "scale", "bias")


def unit_embeddings(B: int, E: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Pairs that are somewhat alike; the same numbers in the test and in every rank."""
    generator = torch.Generator().manual_seed(B)
    image, noise = torch.randn(2, B, E, dtype=torch.float64, generator=generator)
    return F.normalize(image).to(dtype), F.normalize(image + noise).to(dtype)


# On one rank.


@pytest.mark.fast
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


@pytest.mark.fast
def test_open_clip_call_and_return() -> None:
    image, text = unit_embeddings(4, 8)
    bias = torch.tensor(3.0, requires_grad=True)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)
    value = loss(image, text, 10.0, output_dict=True)["contrastive_loss"]
    with_bias = loss(image, text, logit_scale=10.0, logit_bias=bias)
    with_bias.backward()
    assert torch.equal(value, with_bias) and bias.grad == 0


def test_flags_of_open_clipsay_once_that_they_change_nothing() -> None:
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="always computes the exact loss") as told:
        for _ in range(3):
            kept = ClipLoss(local_loss=True, rank=1, world_size=2)
    assert len(told) == 1 and kept.local_loss and not kept.gather_with_grad


@pytest.mark.fast
def test_calls_that_open_clip_takes() -> None:
    """The bias as a number, output_dict in its old place, an integer scale, a subclass with logits of its own."""
    image, text = unit_embeddings(4, 8)
    value = ClipLoss()(image, text, 10.0)
    assert torch.equal(ClipLoss()(image, text, 10.0, -10.0), value)
    assert torch.equal(ClipLoss()(image, text, 10.0, True)["contrastive_loss"], value)
    assert torch.equal(ClipLoss()(image, text, torch.tensor(10)), value)
    with pytest.raises(ValueError, match="same_id"):
        ClipLoss(same_id="drop")

    class Harder(ClipLoss):
        def get_logits(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
            image_logits, _ = super().get_logits(*arguments, **keywords)
            return image_logits + 1 - torch.eye(4), image_logits.T + 1 - torch.eye(4)

    theirs = import_open_clip().loss.ClipLoss
    hard = type(
        "Theirs", (theirs,), {"get_logits": lambda _, *x, **k: Harder().get_logits(*x, **k)}
    )
    assert torch.equal(Harder()(image, text, 10.0), hard()(image, text, 10.0))
    for ours, other in (
        (ClipLoss(), theirs()),
        (SigLipLoss(), import_open_clip().loss.SigLipLoss()),
    ):
        found, expected = (x.get_logits(image, text, torch.tensor(10.0)) for x in (ours, other))
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.fast
def test_logits_of_ones_own_refuse_what_they_would_drop() -> None:
    image, text = unit_embeddings(4, 8)
    ids = torch.arange(4)
    own = type(
        "Own", (ClipLoss,), {"get_logits": lambda _, *x, **k: ClipLoss().get_logits(*x, **k)}
    )
    assert own()(image, text, 10.0).isfinite()
    with pytest.raises(ValueError, match="supports neither ids nor label smoothing"):
        own()(image, text, 10.0, image_ids=ids, text_ids=ids)
    with pytest.raises(ValueError, match="supports neither ids nor label smoothing"):
        own(label_smoothing=0.1)(image, text, 10.0)


@pytest.mark.fast
def test_options_may_be_set_later() -> None:
    image, text = unit_embeddings(4, 8)
    loss_fn, ids = ClipLoss(), torch.tensor([0, 1, 0, 2])
    loss_fn.label_smoothing, loss_fn.same_id = 0.2, "positive"
    made = ClipLoss(label_smoothing=0.2, same_id="positive")
    keywords = {"image_ids": ids, "text_ids": ids}
    assert torch.equal(loss_fn(image, text, 10.0, **keywords), made(image, text, 10.0, **keywords))
    with pytest.raises(ValueError, match="label_smoothing"):
        loss_fn.label_smoothing = 1.0


@pytest.mark.fast
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


@pytest.mark.fast
def test_siglip_call_and_return() -> None:
    image, text = unit_embeddings(4, 8)
    loss_fn = SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl="shift")
    value = loss_fn(image, text, 10.0, torch.tensor(-10.0), output_dict=True)["contrastive_loss"]
    assert torch.equal(value, loss_fn(image, text, logit_scale=10.0, logit_bias=-10.0))
    assert torch.equal(loss_fn(image, text, 10.0, None), loss_fn(image, text, 10.0, 0.0))
    with pytest.raises(ValueError, match="dist_impl"):
        SigLipLoss(dist_impl="ring")


@pytest.mark.fast
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


@pytest.mark.fast
@pytest.mark.parametrize(("image", "text"), [((3, 4), (3, 5)), ((4,), (4,)), ((3, 4, 1), (3, 4))])
@pytest.mark.parametrize("loss", [ClipLoss, SigLipLoss])
def test_what_is_no_pairs_is_refused(
    loss: type[ClipLoss | SigLipLoss], image: tuple[int, ...], text: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="pairs of one shape"):
        loss()(torch.ones(image), torch.ones(text), 1.0)


# Over ranks. One pool serves all: groups of its first ranks are the smaller numbers of ranks.

_groups: dict[int, Any] = {}


def group_of(num_ranks: int) -> Any:
    """Within a rank: the group of the first ``num_ranks``, which all ranks have to ask for alike."""
    for number in range(1, NUM_RANKS + 1):
        if number not in _groups:
            _groups[number] = dist.new_group(list(range(number)))
    return _groups[num_ranks]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS) as ranks:
        yield ranks


@dataclass(frozen=True)
class Case:
    """A problem over several ranks, drawn from its number; the same in the test and in every rank."""

    number: int

    def __post_init__(self) -> None:
        draw = random.Random(self.number)

        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("num_ranks", draw.choice([1, 2, 2, 3, 3, 4]))
        put("is_siglip", draw.random() < 0.4)
        shape = draw.choice(
            ["even", "even", "uneven", "uneven", "empty", "more texts", "more images"]
        )
        images = [draw.randint(1, 7)] * self.num_ranks
        if shape != "even":
            images = [draw.randint(1, 7) for _ in images]
        if shape == "empty":
            images[draw.randrange(self.num_ranks)] = 0
            images[0] += not any(images)
        texts = list(images)
        for side, name in ((texts, "more texts"), (images, "more images")):
            if shape == name:
                side[:] = [rows + draw.randint(0, 4) for rows in side]
        put("images", images)
        put("texts", texts)
        option = draw.choice(["plain", "ignore", "positive"])
        put("ids", option != "plain")
        settings: dict[str, Any] = {"same_id": option} if option != "plain" else {}
        if not self.is_siglip and draw.random() < 0.3:
            settings["label_smoothing"] = 0.2
        wire = draw.choice([None, None, torch.float16, torch.bfloat16, torch.float32])
        put("wire", wire)
        put("settings", settings)
        put("scale", draw.choice([1.0, 5.0, 14.3, 50.0, 100.0]))
        put("frozen", draw.choice([None, None, None, "image", "text"]))

    def rows(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.number)
        image, text = (
            torch.randn(sum(side), 6, generator=generator, dtype=torch.float64)
            for side in (self.images, self.texts)
        )
        return F.normalize(image), F.normalize(text)

    def all_ids(self) -> tuple[Tensor, Tensor]:
        """Return ids of all images and texts; some occur twice, on one rank or two, and both of a pair have the same one."""
        generator = torch.Generator().manual_seed(self.number)
        image, text = (
            torch.randint(0, 2 * sum(side) + 1, (sum(side),), generator=generator)
            for side in (self.images, self.texts)
        )
        for rows, columns in self.own_pairs():
            text[columns] = image[rows]
        return image, text

    def own_pairs(self) -> Iterator[tuple[slice, slice]]:
        """Of each rank: its pairs among all images and among all texts."""
        for rank, number in enumerate(map(min, self.images, self.texts)):
            starts = sum(self.images[:rank]), sum(self.texts[:rank])
            yield tuple(slice(start, start + number) for start in starts)  # type: ignore[misc]

    def factors(self) -> list[Tensor]:
        values = (self.scale, -3.0) if self.is_siglip else (self.scale,)
        return [torch.tensor(value, dtype=torch.float64) for value in values]

    def dense(self) -> list[Tensor]:
        """[loss, gradients] of all ranks' pairs by the whole matrix, with what travels rounded as it is on the wire."""
        image, text = self.rows()
        leaves = [t.requires_grad_() for t in (image, text, *self.factors())]
        label = torch.zeros(len(image), len(text), dtype=torch.bool)
        same_rank = torch.zeros_like(label)
        for rank, (rows, columns) in enumerate(self.own_pairs()):
            label[rows, columns] = torch.eye(rows.stop - rows.start, dtype=torch.bool)
            ends = rows.start + self.images[rank], columns.start + self.texts[rank]
            same_rank[rows.start : ends[0], columns.start : ends[1]] = True
        sent = image if sum(self.images) < sum(self.texts) else text
        rounded = sent + (sent.to(self.wire or sent.dtype).double() - sent).detach()
        remote = rounded @ text.T if sent is image else image @ rounded.T
        z = leaves[2] * torch.where(same_rank, image @ text.T, remote)
        valid, positive = torch.ones_like(label), label
        if self.ids:
            image_ids, text_ids = self.all_ids()
            same = image_ids[:, None] == text_ids
            if self.settings["same_id"] == "positive":
                positive = same
            else:
                valid = label | ~same
        if self.is_siglip:
            sign = 2 * positive.double() - 1
            losses = -F.logsigmoid(sign * (z + leaves[3])).masked_fill(~valid, 0)
            loss = losses.sum() / len(image)
        else:
            smoothing = self.settings.get("label_smoothing", 0.0)
            sides = ((z, valid, positive), (z.T, valid.T, positive.T))
            loss = sum(_cross_entropy_ref(*side, smoothing) for side in sides) / 2
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def of_rank(world: World, numbers: list[int]) -> list[list[Tensor] | None]:
    """[loss, d_image, d_text, d_scale, d_bias if any] of this rank for each case that it has a part in."""
    found: list[list[Tensor] | None] = []
    for number in numbers:
        case = Case(number)
        group = group_of(case.num_ranks)
        if world.rank >= case.num_ranks:
            found.append(None)
            continue
        name = "SigLipLoss" if case.is_siglip else "ClipLoss"
        loss_fn = getattr(clipcore, name)(
            rank=world.rank,
            world_size=case.num_ranks,
            wire_dtype=case.wire,
            group=group,
            **case.settings,
        )
        parts = [
            rows[sum(side[: world.rank]) : sum(side[: world.rank + 1])]
            for rows, side in zip(
                (*case.rows(), *case.all_ids()), (case.images, case.texts) * 2, strict=True
            )
        ]
        keywords = {"image_ids": parts[2], "text_ids": parts[3]} if case.ids else {}
        leaves = [*parts[:2], *case.factors()]
        for leaf, name in zip(leaves, ("image", "text", "scale", "bias"), strict=False):
            leaf.requires_grad_(name != case.frozen)
        loss = loss_fn(*leaves, **keywords)
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    return found


@pytest.mark.parametrize("block", range(4))
def test_a_loss_over_ranks_is_that_of_all_pairs(pool: RankPool, block: int) -> None:
    """The mean over ranks, which DistributedDataParallel takes, to 1e-12 in float64, gradients included."""
    numbers = list(range(100 * block, 100 * block + 100))
    found = pool.run(of_rank, numbers)
    for number, *of_ranks in zip(numbers, *found, strict=True):
        case = Case(number)
        loss, d_image, d_text, *others = zip(*of_ranks[: case.num_ranks], strict=True)
        actual = [
            torch.stack(loss).mean(),
            None if case.frozen == "image" else torch.cat(d_image) / case.num_ranks,
            None if case.frozen == "text" else torch.cat(d_text) / case.num_ranks,
            *(torch.stack(other).mean() for other in others),
        ]
        for name, ours, theirs in zip(NAMES, actual, case.dense(), strict=False):
            if ours is not None:
                limit = 1e-12 * max(1.0, theirs.abs().max().item())
                assert (ours - theirs).abs().max().item() <= limit, (case, vars(case), name)


SHARES = [(3, 5), (4, 4), (0, 6)]


def taught(num_pairs: int) -> list[Tensor]:
    """Return [image, text, scale] of a student, and of a teacher of another width."""
    scales = (torch.tensor(scale, dtype=torch.float64) for scale in (30.0, 50.0))
    student, teacher = (unit_embeddings(num_pairs, E, torch.float64) for E in (6, 10))
    return [*student, next(scales), *teacher, next(scales)]


def distilled(loss_fn: DistillClipLoss, inputs: list[Tensor]) -> list[Tensor]:
    """Return [loss, its gradients, both parts]."""
    leaves = [part.clone().requires_grad_() for part in inputs[:3]]
    parts = loss_fn(*leaves, *inputs[3:])
    total = sum(parts)
    gradients = torch.autograd.grad(total, leaves)
    return [total.detach(), *gradients, *(part.detach() for part in parts)]


def distilled_on_rank(world: World) -> list[list[Tensor]]:
    """Return what this rank finds of its pairs of each share; ranks without a share have no part in it."""
    group, found = group_of(2), []
    for shares in SHARES if world.rank < 2 else ():
        first = sum(shares[: world.rank])
        rows = slice(first, first + shares[world.rank])
        loss_fn = DistillClipLoss(rank=world.rank, world_size=2, workspace_bytes=300, group=group)
        own = [part[rows] if part.ndim else part for part in taught(sum(shares))]
        found.append(distilled(loss_fn, own))
    return found


def test_distillation_over_ranks_is_that_of_all_pairs(pool: RankPool) -> None:
    """Also of uneven and empty shares, in blocks of some rows."""
    for shares, first, second in zip(SHARES, *pool.run(distilled_on_rank)[:2], strict=True):
        expected = distilled(DistillClipLoss(), taught(sum(shares)))
        for ours, other, theirs in zip(first, second, expected, strict=True):
            # A gradient of rows lies with their ranks; averaged like a parameter's, it counts once.
            mean = torch.cat([ours, other]) / 2 if theirs.ndim else (ours + other) / 2
            assert (mean - theirs).abs().max() <= 1e-12 * max(1.0, theirs.abs().max().item())


def test_the_cases_are_of_all_kinds() -> None:
    cases = [Case(number) for number in range(400)]
    assert {case.num_ranks for case in cases} == {1, 2, 3, 4}
    for kind in (
        lambda case: len(set(case.images)) > 1,
        lambda case: 0 in case.images,
        lambda case: sum(case.images) < sum(case.texts),
        lambda case: sum(case.images) > sum(case.texts),
        lambda case: case.wire in (torch.float16, torch.bfloat16),
        lambda case: case.ids and len(set(case.all_ids()[1].tolist())) < sum(case.texts),
        lambda case: case.scale == 100.0,
        lambda case: case.frozen is not None,
    ):
        for is_siglip in (False, True):
            assert sum(kind(case) and case.is_siglip == is_siglip for case in cases) >= 10


def open_clips(world: World, gather: bool) -> list[Tensor]:
    """Gradients of open_clip's own loss, where it is exact, or of ours."""
    image, text = (t.requires_grad_() for t in unit_embeddings(4 * world.world_size, 8))
    own = slice(4 * world.rank, 4 * world.rank + 4)
    scale = torch.tensor(20.0, requires_grad=True)
    if gather:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it gathers by a name that torch has given up
            theirs = import_open_clip().loss.ClipLoss(
                local_loss=True, gather_with_grad=True, rank=world.rank, world_size=world.world_size
            )
            theirs(image[own], text[own], scale).backward()
    else:
        ours = ClipLoss(rank=world.rank, world_size=world.world_size)
        ours(image[own], text[own], scale).backward()
    return [image.grad, text.grad, scale.grad]  # type: ignore[list-item]


def test_open_clips_loss_over_ranks_agrees(pool: RankPool) -> None:
    import_open_clip()  # here as well, where a missing package is told from a failing rank
    theirs, ours = (
        [torch.stack(parts).sum(0) for parts in zip(*pool.run(open_clips, gather), strict=True)]
        for gather in (True, False)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_ranks_cannot_do_is_refused() -> None:
    image, text = unit_embeddings(4, 8)
    own = type(
        "Own", (ClipLoss,), {"get_logits": lambda _, *x, **k: ClipLoss().get_logits(*x, **k)}
    )
    with pytest.raises(ValueError, match="covers only this rank's pairs"):
        own(world_size=2)(image, text, 10.0)
    for loss_fn in (ClipLoss(world_size=2), SigLipLoss(world_size=2)):
        with pytest.raises(ValueError, match="both or none"):
            loss_fn(image, text, 10.0, image_ids=torch.arange(4))


def call_once_too_often(world: World, name: str) -> str:
    image, text = unit_embeddings(3, 8)
    loss_fn = getattr(clipcore, name)(rank=world.rank, world_size=world.world_size)
    loss_fn.loss_group.num_calls += world.rank == 2
    try:
        loss_fn(image, text, 10.0)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_a_rank_in_another_call_is_named(pool: RankPool, name: str) -> None:
    told = pool.run(call_once_too_often, name)
    assert all("rank 2 is at step 2, this rank at step 1" in message for message in told[:2])


def without_pairs(world: World, name: str) -> str:
    loss_fn = getattr(clipcore, name)(rank=world.rank, world_size=world.world_size)
    try:
        loss_fn(torch.ones(0, 4), torch.ones(2, 4), 1.0)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("name", ["ClipLoss"])
def test_ranks_without_any_pair_are_told(pool: RankPool, name: str) -> None:
    assert all("no rank has a pair" in message for message in pool.run(without_pairs, name))
