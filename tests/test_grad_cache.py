"""Batches in micro-batches: exact gradients, dropout, BatchNorm, memory, the plan, and the small step that verifies."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numerics import LiveStorages, assert_accurate
from ranks import RankPool
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipcore.data.loader import Batch, share_of_rank
from clipcore.kernels.weight_casts import WeightCasts, narrowed
from clipcore.loss import ClipLoss, SigLipLoss
from clipcore.ranks.distributed import World
from clipcore.run import grad_cache, memory, memory_plan, threads
from clipcore.run.grad_cache import differentiate, micro_batches
from clipcore.run.sharding import replicate
from clipcore.run.train_step import TrainingStep
from clipcore.run.verify import VerificationError, verify_gradients
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP

ONE_RANK = World(0, 1, 0, torch.device("cpu"))
NUM_PAIRS = 11


def tower(
    siglip: bool = False, name: str = "ViT-nano-8-32", dtype: str = "fp64", **forced: object
) -> CLIP:
    """Return a model with half of its patches dropped; a ResNet, which has no patches, has moving statistics."""
    torch.manual_seed(3)
    if name.startswith("ViT"):
        forced = {"force_patch_dropout": 0.5, **forced}
    if siglip:
        forced = {"init_logit_scale": 2.3, "init_logit_bias": -10.0, **forced}
    model = create_model(name, precision=dtype, **forced)  # type: ignore[arg-type]
    if name.startswith("RN"):  # blocks that start as the identity would hide most parameters
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.weight, 1.0, 0.1)
    return model.train()


def pairs(num_pairs: int = NUM_PAIRS, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    images = torch.from_numpy(random.integers(0, 256, (num_pairs, 3, 32, 32), np.uint8))
    tokens = torch.from_numpy(random.integers(1, 500, (num_pairs, 12)))
    tokens[:, 0] = 512
    tokens[torch.arange(num_pairs), torch.from_numpy(random.integers(1, 12, num_pairs))] = 513
    return Batch(images, tokens, torch.from_numpy(random.permutation(num_pairs)))


def training(
    model: CLIP,
    micro_batch_size: int | None = None,
    kept: int = 1,
    num_pairs: int = NUM_PAIRS,
    precision: str = "fp32",
) -> TrainingStep:
    loss_type = ClipLoss if model.logit_bias is None else SigLipLoss
    return TrainingStep(
        *(model, loss_type(), ONE_RANK, precision, 5),
        *(num_pairs, lambda loss: loss, micro_batch_size, kept),
    )


def gradients(step: TrainingStep, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    step.model.zero_grad()
    loss = step.gradients(batch, 7).loss
    named = step.model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_equal_to_1e12(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, exact in theirs.items():
        limit = 1e-12 * max(1.0, exact.abs().max().item())
        assert (ours[name] - exact).abs().max().item() <= limit, name


# The same gradients.


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize(
    ("size", "kept"), [(1, 1), (4, 1), (4, 2), (4, 3), (6, 9), (10, 1), (99, 1)]
)
def test_micro_batches_have_the_direct_gradients(siglip: bool, size: int, kept: int) -> None:
    """All parameters, logit scale and bias, with patch dropout, in float64."""
    model = tower(siglip)
    direct_loss, direct = gradients(training(model), pairs())
    loss, cached = gradients(training(model, size, kept), pairs())
    assert abs(loss - direct_loss) <= 1e-12
    assert len(direct) == len(list(model.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in direct.values())
    assert_equal_to_1e12(cached, direct)


def test_float32_follows_the_rule_of_accuracy() -> None:
    """The direct gradients in float32 are the reference, those in float64 exact; each parameter's in units of its largest,
    all together, since of single ones the reference's are right by luck too often."""
    model, wide = tower(dtype="fp32"), tower()
    _, cached = gradients(training(model, 3), pairs())
    _, direct = gradients(training(model), pairs())
    wide.load_state_dict(model.state_dict())
    _, exact = gradients(training(wide), pairs())
    largest = {name: gradient.abs().max() for name, gradient in exact.items()}
    together = (
        torch.cat([(found[name].double() / largest[name]).flatten() for name in exact])
        for found in (cached, direct, exact)
    )
    cached_all, direct_all, exact_all = together
    assert_accurate("all gradients", cached_all.float(), direct_all.float(), exact_all)


def test_the_embedded_models_gradients_over_512_pairs() -> None:
    model = tower(name="ViT-glyphs", force_vocab_size=514)
    _, direct = gradients(training(model, num_pairs=512), pairs(512))
    _, cached = gradients(training(model, 96, 2, 512), pairs(512))
    assert_equal_to_1e12(cached, direct)


def test_kept_graphs_change_no_bit() -> None:
    model = tower(dtype="fp32")
    (_, first), *others = (gradients(training(model, 3, kept), pairs()) for kept in (1, 2, 4))
    for _, other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_patch_dropout_is_of_the_sample_and_the_step() -> None:
    """The same sample in another place of the batch loses the same patches; in another step it loses others."""
    model, batch = tower(), pairs()
    step = training(model)
    found = step.gradients(batch, 7).image_features_BE
    order = torch.randperm(NUM_PAIRS)
    moved = Batch(batch.images[order], batch.tokens[order], batch.indices[order])
    torch.testing.assert_close(
        step.gradients(moved, 7).image_features_BE, found[order], rtol=0, atol=1e-14
    )
    assert (step.gradients(batch, 8).image_features_BE - found).abs().max() > 1e-3


def embedder(
    image_tower: nn.Module, text_tower: nn.Module, images: Tensor, texts: Tensor
) -> Callable:
    scale = torch.tensor(3.0, dtype=torch.float64)
    return lambda rows, _: (image_tower(images[rows]), text_tower(texts[rows]), scale)


def test_any_dropout_is_replayed() -> None:
    """torch's own dropout: the replay draws what the first pass has drawn, and the generator goes on from there."""
    torch.manual_seed(0)
    towers = [nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5)).double() for _ in range(2)]
    both = nn.ModuleList(towers)
    images, texts = torch.randn(2, 9, 6, dtype=torch.float64)
    embed = embedder(*towers, images, texts)
    found = []
    for kept in (1, 2, 3):
        both.zero_grad()
        torch.manual_seed(1)
        differentiate(embed, ClipLoss(), both, 9, 3, kept)
        found.append([*(p.grad.clone() for p in both.parameters()), torch.rand(3)])
    # What the micro-batches give when all graphs are there at once.
    both.zero_grad()
    torch.manual_seed(1)
    features = [embed(rows, None) for rows in micro_batches(9, 3)]
    image, text = (torch.cat([part[i] for part in features]) for i in range(2))
    ClipLoss()(image, text, 3.0).backward()
    for kept in found:
        expected = [*(p.grad for p in both.parameters())]
        for ours, theirs in zip(kept[:-1], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert torch.equal(found[0][-1], found[2][-1])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kept", [1, 2])
def test_a_resnet_normalises_by_micro_batch_and_counts_each_once(
    kept: int, checkpointing: bool
) -> None:
    """Gradients and running statistics are those of micro-batches whose graphs are all there, one after the other."""
    model, plain = (tower(name="RN-nano-32") for _ in range(2))
    model.set_grad_checkpointing(checkpointing)
    batch, step = pairs(10), training(plain)
    embed = step.embedder(batch, 7, plain)
    features = [embed(rows, None) for rows in micro_batches(10, 2)]
    image, text = (torch.cat([part[i] for part in features]) for i in range(2))
    ClipLoss()(image, text, features[0][2]).backward()
    _, cached = gradients(training(model, 5, kept, 10), batch)
    assert_equal_to_1e12(cached, {n: p.grad for n, p in plain.named_parameters()})
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(int(b) == 2 for n, b in model.named_buffers() if n.endswith("num_batches_tracked"))


@pytest.mark.parametrize("locked", ["image", "text", "scale"])
def test_locked_parts_have_no_gradient_and_the_others_theirs(locked: str) -> None:
    model = tower()
    if locked == "image":
        model.lock_image_tower()
    elif locked == "text":
        model.lock_text_tower()
    else:
        model.logit_scale.requires_grad_(False)
    (_, direct), (_, cached) = (
        gradients(training(model, size), pairs()) for size in (NUM_PAIRS, 4)
    )
    assert len(cached) < len(list(model.parameters()))
    assert_equal_to_1e12(cached, direct)


def test_a_scaled_loss_scales_every_gradient() -> None:
    model = tower()
    _, once = gradients(training(model, 4), pairs())
    scaled = dataclasses.replace(training(model, 4), scale_loss=lambda loss: 1024 * loss)
    _, found = gradients(scaled, pairs())
    assert_equal_to_1e12({name: gradient / 1024 for name, gradient in found.items()}, once)


def test_passes_and_phases_are_told() -> None:
    told: list[object] = []
    training(tower(), 3, 2, 12).gradients(
        pairs(12), 0, told.append, lambda *passes: told.append(passes)
    )
    assert told == [
        *[(i, 6) for i in range(1, 5)],
        *("forward", "loss"),
        *[(5, 6), (6, 6)],
        "backward",
    ]


def test_the_next_rows_are_announced() -> None:
    seen = []
    image, text = nn.Linear(6, 5), nn.Linear(6, 5)

    def embed(rows: slice, following: slice | None) -> tuple[Tensor, ...]:
        seen.append((rows, following))
        return (
            image(torch.ones(rows.stop - rows.start, 6)),
            text(torch.ones(rows.stop - rows.start, 6)),
            torch.tensor(1.0),
        )

    differentiate(embed, ClipLoss(), nn.ModuleList([image, text]), 8, 4, 2)
    for (_, announced), (rows, _) in itertools.pairwise(seen):
        assert announced == rows
    assert len(seen) == 6 and seen[-1][1] is None


@pytest.mark.parametrize("num_rows", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("number", [1, 2, 3, 64, 1000])
def test_micro_batches_cover_the_rows_evenly(num_rows: int, number: int) -> None:
    if number > num_rows:
        return
    parts = micro_batches(num_rows, number)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(num_rows))
    lengths = {part.stop - part.start for part in parts}
    assert len(parts) == number and max(lengths) - min(lengths) <= 1


def test_one_graph_at_a_time() -> None:
    """What is alive in the replay does not grow with the number of micro-batches."""

    def largest(num_pairs: int) -> int:
        # The same eight again, since a graph's size is that of its captions.
        eight, times = pairs(8), num_pairs // 8
        parts = (eight.images, eight.tokens, eight.indices)
        batch = Batch(*(part.repeat(times, *[1] * (part.dim() - 1)) for part in parts))
        alive, most = 0, 0

        def pack(tensor: Tensor) -> tuple[Tensor, _Alive]:
            return tensor, _Alive(tensor.nbytes)

        class _Alive:
            def __init__(self, size: int) -> None:
                nonlocal alive, most
                self.size = size
                alive += size
                most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
            training(tower(dtype="fp32"), 4, 1, num_pairs).gradients(batch, 0)
        return most

    assert largest(32) <= 1.3 * largest(8)


# Several ranks.

NUM_RANKS = 4
_groups: list[Any] = []


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS) as ranks:
        yield ranks


def gradients_of_rank(
    world: World, num_ranks: int, siglip: bool, size: int | None, kept: int
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Run this rank's share of the batch through DistributedDataParallel, in the group of the first ranks."""
    if not _groups:
        _groups.extend(dist.new_group(list(range(number))) for number in range(1, NUM_RANKS + 1))
    if world.rank >= num_ranks:
        return None
    group = _groups[num_ranks - 1]
    model, whole = tower(siglip), pairs()
    share = share_of_rank(NUM_PAIRS, world.rank, num_ranks)
    batch = Batch(whole.images[share], whole.tokens[share], whole.indices[share])
    loss_type = SigLipLoss if siglip else ClipLoss
    step = training(model, size, kept)
    step.world = dataclasses.replace(world, world_size=num_ranks)
    step.loss_fn = loss_type(rank=world.rank, world_size=num_ranks, group=group)
    step.reduced = replicate(model, group)
    return gradients(step, batch)


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize(
    ("num_ranks", "size", "kept"),
    [(2, None, 1), (3, None, 1), (4, None, 1), (2, 2, 1), (3, 1, 2), (4, 2, 9)],
)
def test_ranks_and_micro_batches_have_the_direct_gradients(
    pool: RankPool, siglip: bool, num_ranks: int, size: int | None, kept: int
) -> None:
    """Uneven shares of 11 pairs; only the last pass averages."""
    direct_loss, direct = gradients(training(tower(siglip)), pairs())
    found = pool.run(gradients_of_rank, num_ranks, siglip, size, kept)[:num_ranks]
    assert abs(torch.stack([loss for loss, _ in found]).mean() - direct_loss) <= 1e-12
    for _, of_rank in found:
        assert_equal_to_1e12(of_rank, direct)


# The small step that is verified.


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("name", ["ViT-nano-8-32", "RN-nano-32"])
def test_gradients_are_verified(siglip: bool, name: str) -> None:
    """And nothing is left of it: no gradient, no statistics, no random state that a step would see."""
    model = tower(siglip, name, "fp32")
    buffers = [buffer.clone() for buffer in model.buffers()]
    told = verify_gradients(training(model, num_pairs=20), pairs(20), 0)
    assert "gradients of 20 pairs verified against float64" in told and "logit_scale" in told
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


@pytest.mark.parametrize("precision", ["amp", "amp_bf16"])
def test_gradients_are_verified_in_the_precision_of_the_run(precision: str) -> None:
    """float16's loss scaler begins with a factor that overflows, which is no wrong gradient."""
    step = training(tower(dtype="fp32"))
    step.precision, step.scale_loss = precision, lambda loss: 65536.0 * loss
    assert "verified against float64" in verify_gradients(step, pairs(), 0)


def double_scale(features: Sequence[Tensor]) -> Tensor:
    image, text, scale = features
    return ClipLoss()(image, text, scale + 0.05 * (scale - scale.detach()))


def one_side(features: Sequence[Tensor]) -> Tensor:
    image, text, scale = features
    return ClipLoss()(image, 1.002 * text - 0.002 * text.detach(), scale)


@pytest.mark.parametrize("wrong", [double_scale, one_side])
def test_wrong_gradients_stop_a_run(wrong: Callable[[Sequence[Tensor]], Tensor]) -> None:
    """A twentieth too much of the logit scale's, a five-hundredth too much of the texts'."""
    step = training(tower(dtype="fp32"))
    broken = type("Broken", (TrainingStep,), {"loss": lambda _, *features, **__: wrong(features)})
    step.__class__ = broken
    with pytest.raises(VerificationError, match="not those of the plain computation"):
        verify_gradients(step, pairs(), 0)


def verified_on_rank(world: World) -> str:
    step = training(tower(dtype="fp32"), num_pairs=NUM_RANKS * 6 + 1)
    share = share_of_rank(NUM_RANKS * 6 + 1, world.rank, NUM_RANKS)
    whole = pairs(NUM_RANKS * 6 + 1)
    step.world, step.loss_fn = world, ClipLoss(rank=world.rank, world_size=NUM_RANKS)
    step.reduced = replicate(step.model)
    batch = Batch(whole.images[share], whole.tokens[share], whole.indices[share])
    return verify_gradients(step, batch, 0)


def test_gradients_are_verified_over_ranks(pool: RankPool) -> None:
    told = pool.run(verified_on_rank)
    assert all("gradients of 24 pairs verified" in line for line in told)


def threads_on_rank(world: World) -> tuple[int, int]:
    """Return (the number that the rank would choose alone, the number it uses) if only rank 0 gains by two threads."""
    step = training(tower(dtype="fp32"), num_pairs=NUM_RANKS * 40 + 1)
    share = share_of_rank(NUM_RANKS * 40 + 1, world.rank, NUM_RANKS)
    whole = pairs(NUM_RANKS * 40 + 1)
    step.world = world
    batch = Batch(whole.images[share], whole.tokens[share], whole.indices[share])

    gained = float(NUM_RANKS) if world.rank == 0 else -1.0
    seconds = {1: 10.0, 2: 10.0 - gained}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "_seconds", lambda *_: seconds[torch.get_num_threads()])
        torch.set_num_threads(2)
        timed = step.set_faster_threads(batch, 0)
        number = torch.get_num_threads()
        torch.set_num_threads(1)
    assert timed.number == number and timed.most_s == pytest.approx(10 * NUM_RANKS - 1)
    return 1 + (gained > 0), number


def test_ranks_compute_with_the_same_number_of_threads(pool: RankPool) -> None:
    """By the sum of their times: a rank that alone would choose otherwise does as the others."""
    chosen = pool.run(threads_on_rank)
    assert [alone for alone, _ in chosen] == [2, *[1] * (NUM_RANKS - 1)]
    assert {number for _, number in chosen} == {2}


# Copies of weights in 16 bits.


class CastsOfWeights(TorchDispatchMode):
    """Counts the casts of each parameter of a model to 16 bits, inside a ``with``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
        self.counts: Counter[str] = Counter()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            name = self.names.get(args[0].untyped_storage()._cdata)
            if name is not None:
                self.counts[name] += 1
                self.bytes[name] = out.nbytes
        return out


def shared_by_blocks(name: str) -> bool:
    """Return whether a block's operation casts the weight; the last block's attention, read at a token, is another."""
    return ".resblocks." in f".{name}" and ".resblocks.1.attn." not in f".{name}"


@pytest.mark.parametrize("name", ["ViT-nano-8-32", "RN-nano-32"])
@pytest.mark.parametrize("kept", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_share_copies_of_the_weights_and_no_bit_changes(
    name: str, kept: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block's weight is cast once a step, and what autocast casts once for the embeddings and once for the replays."""
    model = tower(name=name, dtype="fp32")
    model.set_grad_checkpointing(checkpointing)
    step = training(model, 3, kept, precision="amp_bf16")
    assert step.num_parts == 4
    with CastsOfWeights(model) as casts:
        _, shared = gradients(step, pairs())
    in_blocks = [n for name, n in casts.counts.items() if shared_by_blocks(name)]
    assert len(in_blocks) == 12 * (1 + name.startswith("ViT")) and set(in_blocks) == {1}
    # With all graphs kept, nothing is replayed but blocks that were to be recomputed.
    assert casts.counts["text_projection"] == (1 if kept == 4 else 2)
    if name.startswith("RN"):
        is_once = kept == 4 and not checkpointing
        assert casts.counts["visual.layer3.0.conv2.weight"] == (1 if is_once else 2)

    monkeypatch.setattr(grad_cache, "sharing", lambda *_: contextlib.nullcontext())
    with CastsOfWeights(model) as casts:
        _, alone = gradients(step, pairs())
    assert min(n for name, n in casts.counts.items() if shared_by_blocks(name)) >= 4
    assert shared.keys() == alone.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(shared[name], alone[name]) for name in alone)


def test_a_copy_is_made_anew_for_a_changed_weight_and_not_kept_of_a_sum() -> None:
    weight, casts = nn.Parameter(torch.ones(3, 4)), WeightCasts()
    assert narrowed(weight, torch.float32) is weight
    with casts.kept():
        first = narrowed(weight, torch.bfloat16)
        # As autograd hands it back where its hooks are in use.
        assert narrowed(weight.detach(), torch.bfloat16) is first
        assert narrowed(weight, torch.float16).dtype == torch.float16
        assert casts.nbytes == 2 * 2 * weight.numel()
        narrowed(weight + 1, torch.bfloat16)
        narrowed(weight[:2], torch.bfloat16)
        assert casts.nbytes == 2 * 2 * weight.numel()
        with torch.no_grad():
            weight += 1
        assert narrowed(weight, torch.bfloat16).unique().item() == 2
        with torch.inference_mode():
            assert narrowed(torch.ones(3), torch.bfloat16).dtype == torch.bfloat16
    assert narrowed(weight, torch.bfloat16) is not narrowed(weight, torch.bfloat16)


def test_autocast_forgets_its_copies_between_passes_with_and_without_a_graph() -> None:
    layer = nn.Linear(4, 2)
    out = {}
    for is_enabled in (False, True):
        with WeightCasts().kept(), torch.set_grad_enabled(is_enabled), torch.autocast("cpu"):
            out[is_enabled] = layer(torch.ones(1, 4))
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.zero_()
    assert out[False].abs().max() > 0 and out[True].abs().max() == 0
    out[True].sum().backward()
    assert layer.weight.grad is not None


def test_the_plan_counts_the_copies_and_a_direct_step_only_those_of_autocast(
    counted_memory: None,
) -> None:
    model = tower(name="RN-nano-32", dtype="fp32")
    found = []
    for size in (8, 32):
        step = training(model, size, num_pairs=32, precision="amp_bf16")
        step.num_kept_graphs = None
        plan = memory_plan.make_plan(
            *(step.embedder(pairs(32), 0, model), model, 32, ONE_RANK.device),
            fixed={},
            loss_bytes=0,
            budget_bytes=10**9,
            micro_batch_size=size,
        )
        found.append(plan.parts["weights in 16 bits"])
    with CastsOfWeights(model) as casts:
        step.gradients(pairs(32), 0)
    in_blocks = sum(size for name, size in casts.bytes.items() if shared_by_blocks(name))
    assert found[0] - found[1] == in_blocks > 0
    # Of the weights that products keep; the pool casts keys and values itself, and positions are added.
    others = {name: size for name, size in casts.bytes.items() if not shared_by_blocks(name)}
    by_autocast = (
        "conv",
        "downsample",
        "q_proj.weight",
        "c_proj.weight",
        "out_proj.weight",
        "projection",
    )
    kept = (size for name, size in others.items() if any(part in name for part in by_autocast))
    assert found[1] == sum(kept)


# The plan.


@pytest.fixture
def counted_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans on the CPU count the bytes of tensors, in place of the pages that the process holds, which others move."""

    @contextlib.contextmanager
    def watch(_: torch.device) -> Iterator[memory.Watched]:
        watched = memory.Watched()
        with LiveStorages() as live:
            yield watched
        watched.peak, watched.held = live.peak_bytes, live.alive_bytes

    monkeypatch.setattr(memory, "watch", watch)
    monkeypatch.setattr(memory_plan, "CPU_OVERHEAD", 1.0)  # which is for what lies between tensors


def test_a_plan_is_made_of_what_was_measured(counted_memory: None) -> None:
    model = tower(dtype="fp32")
    step = training(model, num_pairs=256)
    step.num_kept_graphs = None
    assert step.needs_plan()
    plan = step.plan(pairs(256), 0)
    assert not step.needs_plan() and (step.micro_batch_size, step.num_kept_graphs) == (
        plan.micro_batch_size,
        plan.num_kept_graphs,
    )
    assert 1 <= plan.num_kept_graphs <= -(-256 // plan.micro_batch_size)
    assert 0 <= plan.cost < 0.5 and plan.peak_bytes <= plan.budget_bytes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "256 pairs on this device" in str(plan) and "kept graphs" in str(plan)


def test_a_probe_that_runs_out_of_memory_ends_the_search_and_leaves_no_gradient(
    counted_memory: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tower(dtype="fp32")
    step = training(model, num_pairs=256)
    step.num_kept_graphs, backward = None, memory_plan._backward

    def limited(trained: list[Tensor]) -> None:
        backward(trained)
        if len(trained[0]) >= 64:
            raise torch.cuda.OutOfMemoryError("a test")

    monkeypatch.setattr(memory_plan, "_backward", limited)
    assert step.plan(pairs(256), 0).micro_batch_size == 32
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("name", ["ViT-nano-8-32", "RN-nano-32"])
def test_a_plan_leaves_no_memory_behind(counted_memory: None, name: str, precision: str) -> None:
    """A block's operation keeps an output for its backward pass, which autograd's hooks can tie to itself."""
    step, batch = (
        training(tower(name=name, dtype="fp32"), num_pairs=128, precision=precision),
        pairs(128),
    )
    step.num_kept_graphs = None
    with LiveStorages() as live:
        step.plan(batch, 0)
    assert live.peak_bytes > 100_000 and live.alive_bytes == 0


def test_a_graph_is_counted_without_the_batch_that_it_is_of() -> None:
    model, whole = tower(dtype="fp32"), pairs(4096)
    first = Batch(*(part[:16] for part in (whole.images, whole.tokens, whole.indices)))
    counted = [
        memory_plan._forward_counted(training(model).embedder(batch, 0, model), model, 16)[1]
        for batch in (first, whole)
    ]
    of_first, of_whole = (sum(size for _, size in saved) for saved in counted)
    assert of_first == of_whole > 16 * 1000


def test_little_memory_keeps_few_graphs_and_too_little_is_told(counted_memory: None) -> None:
    model = tower(dtype="fp32")
    step = training(model, 64, num_pairs=1024)
    step.num_kept_graphs = None
    plan = step.plan(pairs(1024), 0, step_memory=0.05)
    assert 1 <= plan.num_kept_graphs < 16 and plan.peak_bytes <= 50_000_000
    assert f"16 micro-batches of 64, {plan.num_kept_graphs} of which keep their graphs" in str(plan)
    step = training(model, num_pairs=1024)
    with pytest.raises(ValueError, match="raise --step-memory"):
        step.plan(pairs(1024), 0, step_memory=0.0001)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("micro_batch_size", [16, 64])
def test_a_step_takes_no_more_than_its_plan(
    counted_memory: None, micro_batch_size: int, precision: str
) -> None:
    """The bytes of all tensors that are alive at once, against what was planned from a count of one micro-batch."""
    model, batch = tower(name="ViT-glyphs", dtype="fp32", force_vocab_size=514), pairs(256)
    step = training(model, micro_batch_size, num_pairs=256, precision=precision)
    step.num_kept_graphs = None
    plan = step.plan(batch, 0, step_memory=0.025 if precision == "fp32" else 0.02)
    assert ("weights in 16 bits" in plan.parts) == (precision == "amp_bf16")
    assert (
        1 < plan.num_kept_graphs < 256 / micro_batch_size and plan.peak_bytes <= plan.budget_bytes
    )
    with LiveStorages() as live:
        step.gradients(batch, 0)
    peak_bytes = live.peak_bytes + batch.images.nbytes + batch.tokens.nbytes
    assert 0.75 * plan.peak_bytes < peak_bytes <= plan.peak_bytes
