"""The collectives on three gloo ranks: with three, a sum over ranks has an inner rounding.

Letters: B rows on one rank, G rows of all ranks, E embedding size.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import RankPool
from runs import LIMIT_S

from clipcore import native
from clipcore.loss import all_gather, wire
from clipcore.loss.all_gather import start_gather
from clipcore.ranks import distributed
from clipcore.ranks.distributed import (
    World,
    all_reduce_flag,
    all_reduce_sum,
    barrier,
    broadcast_object,
    close_distributed,
    gather_rows,
    init_distributed,
    is_main,
)

NUM_RANKS = 3
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
extension_only = pytest.mark.skipif(
    native.load() is None, reason="clipcore._C is not built: pip install -e ."
)
both_paths = pytest.mark.parametrize(
    "path", ["reference", pytest.param("extension", marks=extension_only)]
)
devices = pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())


@contextmanager
def on_path(path: str) -> Iterator[None]:
    """Let the gather take this path."""
    with pytest.MonkeyPatch.context() as patch:
        if path == "reference":
            patch.setattr(native, "load", lambda: None)
        assert (native.load() is None) == (path == "reference")
        yield


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS) as ranks:
        yield ranks


def rows_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return the same numbers in the test and in the rank."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def shard(rank: int, sizes: list[int], columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows with what casts have to round, to flush and to overflow."""
    rows = rows_of(rank, (sizes[rank], columns), torch.float64)
    rows.view(-1)[::5] *= 1e5
    rows.view(-1)[::7] *= 1e-7
    return rows.to(dtype)


def ids_of(rank: int, sizes: list[int]) -> torch.Tensor:
    return rows_of(rank, (sizes[rank],), torch.float64, seed=3).mul(1e18).long()


FORWARD_CASES = [
    ([4, 4, 4], 8, False, False),
    ([4, 4, 4], 8, True, True),
    ([3, 0, 5], 7, True, False),
    ([3, 0, 5], 7, False, True),
    ([0, 0, 2], 1, True, True),
    ([0, 0, 0], 5, True, False),
    ([1, 2, 1], 0, True, True),
    ([33, 65, 64], 512, True, True),
]


def gathered_of(world: World, path: str, device: str, dtype: Any, wire_dtype: Any) -> Any:
    answers = []
    with on_path(path):
        for sizes, columns, has_ids, sizes_known in FORWARD_CASES:
            x_BE = shard(world.rank, sizes, columns, dtype).to(device)
            pending = start_gather(
                x_BE,
                ids_of(world.rank, sizes).to(device) if has_ids else None,
                wire_dtype=wire_dtype,
                step=17,
                shard_sizes=sizes if sizes_known or device == "cuda" else None,
            )
            assert torch.equal(pending.own_BE, x_BE)
            gathered = pending.wait()
            assert pending.wait() is gathered
            ids_G = None if gathered.ids_G is None else gathered.ids_G.cpu()
            assert not gathered.rows_GE.requires_grad
            answers.append((gathered.rows_GE.cpu(), ids_G, gathered.shard_sizes))
    return answers


@devices
@both_paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_the_concatenation(
    pool: RankPool, path: str, device: str, dtype: torch.dtype
) -> None:
    for wire_dtype in (None, *DTYPES):
        answers = pool.run(gathered_of, path, device, dtype, wire_dtype)
        for case, *by_rank in zip(FORWARD_CASES, *answers, strict=True):
            sizes, columns, has_ids, _ = case
            rows = [shard(rank, sizes, columns, dtype) for rank in range(NUM_RANKS)]
            expected_GE = torch.cat(rows).to(wire_dtype or dtype).to(dtype)
            expected_G = torch.cat([ids_of(rank, sizes) for rank in range(NUM_RANKS)])
            for rows_GE, ids_G, shard_sizes in by_rank:
                assert rows_GE.dtype == dtype
                assert torch.equal(rows_GE, expected_GE)
                assert shard_sizes == tuple(sizes)
                assert torch.equal(ids_G, expected_G) if has_ids else ids_G is None


def image_to_text_loss(
    image_BE: torch.Tensor, text_GE: torch.Tensor, first_row: int
) -> torch.Tensor:
    """One rank's share of the sum of losses; it touches every rank's text."""
    targets_B = torch.arange(first_row, first_row + image_BE.shape[0], device=image_BE.device)
    return F.cross_entropy(5.0 * image_BE @ text_GE.T, targets_B, reduction="sum")


def own_loss(own_BE: torch.Tensor) -> torch.Tensor:
    return own_BE.sin().sum()


def gradients_of(
    world: World,
    path: str,
    sizes: list[int],
    columns: int,
    dtype: torch.dtype,
    wire_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Any:
    shape = (sizes[world.rank], columns)
    image_BE = rows_of(world.rank, shape, dtype, seed=1).to(device).requires_grad_()
    text_BE = rows_of(world.rank, shape, dtype, seed=2).to(device).requires_grad_()
    first_row = sum(sizes[: world.rank])
    with on_path(path):
        images = start_gather(image_BE, wire_dtype=wire_dtype, shard_sizes=sizes)
        texts = start_gather(text_BE, wire_dtype=wire_dtype, shard_sizes=sizes)
        own = own_loss(images.own_BE) + 2 * own_loss(texts.own_BE)
        image_GE, text_GE = images.wait().rows_GE, texts.wait().rows_GE
        loss = own + image_to_text_loss(images.own_BE, text_GE, first_row)
        loss = loss + image_to_text_loss(texts.own_BE, image_GE, first_row)
        loss.backward()
    assert image_BE.grad is not None and text_BE.grad is not None
    return image_BE.grad.cpu(), text_BE.grad.cpu()


@devices
@both_paths
@pytest.mark.parametrize("sizes", [[7, 7, 7], [3, 0, 5], [0, 9, 1]], ids=str)
def test_gradient_is_that_of_one_process(
    pool: RankPool, path: str, sizes: list[int], device: str
) -> None:
    image_GE, text_GE = (
        torch.cat([rows_of(rank, (sizes[rank], 12), torch.float64, seed) for rank in range(3)])
        .clone()
        .requires_grad_()
        for seed in (1, 2)
    )
    loss = image_to_text_loss(image_GE, text_GE, 0) + image_to_text_loss(text_GE, image_GE, 0)
    (loss + own_loss(image_GE) + 2 * own_loss(text_GE)).backward()
    results = pool.run(gradients_of, path, sizes, 12, torch.float64, None, device)
    for exact_GE, found in zip(
        (image_GE.grad, text_GE.grad), zip(*results, strict=True), strict=True
    ):
        assert exact_GE is not None
        torch.testing.assert_close(torch.cat(found), exact_GE, rtol=1e-12, atol=1e-12)


@extension_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extension_has_the_bits_of_the_reference(pool: RankPool, dtype: torch.dtype) -> None:
    for sizes in ([33, 33, 33], [20, 0, 33]):
        for wire_dtype in (None, torch.bfloat16):
            found = pool.run(gradients_of, "extension", sizes, 65, dtype, wire_dtype)
            expected = pool.run(gradients_of, "reference", sizes, 65, dtype, wire_dtype)
            for found_pair, expected_pair in zip(found, expected, strict=True):
                for one, other in zip(found_pair, expected_pair, strict=True):
                    assert one.dtype == dtype
                    assert torch.equal(one, other)


def gradient_of_weighted_sum(world: World, path: str, dtype: torch.dtype) -> Any:
    x_BE = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    with on_path(path):
        pending = start_gather(x_BE)
        loss = pending.wait().rows_GE.sum().mul(256.0 if world.rank == 0 else 0.5)
        (loss + pending.own_BE.sum()).backward()
    assert x_BE.grad is not None
    return x_BE.grad


@both_paths
def test_bfloat16_gradient_is_summed_in_float32(pool: RankPool, path: str) -> None:
    # In bfloat16 256 + 1 rounds to 256, and so does 257, the sum over ranks, before the 1 of each rank's own
    # rows is added; in float32 every order gives 258, which bfloat16 holds.
    for grad_BE in pool.run(gradient_of_weighted_sum, path, torch.bfloat16):
        assert grad_BE.dtype == torch.bfloat16
        assert torch.equal(grad_BE, torch.full((2, 3), 258.0, dtype=torch.bfloat16))


def on_subgroup(world: World, path: str) -> Any:
    group = dist.new_group([0, 2])
    if world.rank == 1:
        return None
    x_BE = rows_of(world.rank, (4, 6), torch.float32).requires_grad_()
    with on_path(path):
        y_GE = start_gather(x_BE, group=group).wait().rows_GE
        y_GE.mul(world.rank + 1.0).sum().backward()
        message = message_of(world, path, {"step": [3, 3, 4]}, group)
    rows = gather_rows(x_BE[: world.rank + 1], group)
    told = broadcast_object(("from", world.rank), 1, group)
    raised = all_reduce_flag(world.rank == 0, group)
    barrier(group)
    return y_GE.detach(), x_BE.grad, rows, told, raised, message


@both_paths
def test_subgroup(pool: RankPool, path: str) -> None:
    first, outsider, second = pool.run(on_subgroup, path)
    assert outsider is None
    assert "rank 2 is at step 4, this rank at step 3" in first[-1]
    x_BE = [rows_of(rank, (4, 6), torch.float32) for rank in (0, 2)]
    for gathered, grad, rows, told, raised, _ in (first, second):
        assert torch.equal(gathered, torch.cat(x_BE))
        assert torch.equal(grad, torch.full((4, 6), 4.0))
        assert torch.equal(rows, torch.cat([x_BE[0][:1], x_BE[1][:3]]))
        assert told == ("from", 2)
        assert raised is True


def gather_views(world: World, path: str) -> Any:
    x_EB = rows_of(world.rank, (5, 4), torch.float32).requires_grad_()
    ids_2B = torch.arange(8) + 10 * world.rank
    with on_path(path):
        gathered = start_gather(x_EB.T, ids_2B[::2]).wait()
        # The gradient that arrives is the transpose of these weights, and its rows are not contiguous.
        gathered.rows_GE.T.mul(torch.arange(60.0).view(5, 12)).sum().backward()
    return gathered.rows_GE.detach(), gathered.ids_G, x_EB.grad


@both_paths
def test_strided_input_and_strided_gradient(pool: RankPool, path: str) -> None:
    expected = torch.cat([rows_of(rank, (5, 4), torch.float32).T for rank in range(NUM_RANKS)])
    weights_EG = torch.arange(60.0).view(5, 12)
    for rank, (gathered, ids_G, grad_EB) in enumerate(pool.run(gather_views, path)):
        assert torch.equal(gathered, expected)
        assert ids_G.tolist() == [0, 2, 4, 6, 10, 12, 14, 16, 20, 22, 24, 26]
        assert torch.equal(grad_EB, NUM_RANKS * weights_EG[:, 4 * rank : 4 * rank + 4])


def message_of(world: World, path: str, differing: dict[str, list[Any]], group: Any = None) -> str:
    """Return the error for ranks that differ in these settings, each given by rank."""
    mine = {name: values[world.rank] for name, values in differing.items()}
    rows = mine.get("rows", 4)
    x_BE = torch.zeros(rows, mine.get("columns", 8), dtype=mine.get("dtype", torch.float32))
    x_BE.requires_grad_(mine.get("gradient", False))
    with on_path(path), pytest.MonkeyPatch.context() as patch:
        if "format" in mine:
            patch.setattr(all_gather, "FORMAT", mine["format"])
        try:
            pending = start_gather(
                x_BE,
                torch.arange(rows) if mine.get("ids") else None,
                wire_dtype=mine.get("wire_dtype"),
                step=mine.get("step", 17),
                shard_sizes=mine.get("shard_sizes"),
                group=group,
            )
            pending.wait()
        except ValueError as error:
            return str(error)
    return "no error"


EVEN = [[4, 4, 4]] * 3


@both_paths
@pytest.mark.parametrize(
    ("differing", "said_of_2", "said_to_2"),
    [
        (
            {"step": [17, 17, 16]},
            "rank 2 is at step 16, this rank at step 17",
            "rank 0 is at step 17, this rank at step 16",
        ),
        (
            {"step": [17, 17, 16], "shard_sizes": EVEN},
            "rank 2 is at step 16, this rank at step 17",
            "rank 0 is at step 17, this rank at step 16",
        ),
        (
            {"columns": [8, 8, 16]},
            "rank 2 has columns 16, this rank 8",
            "rank 0 has columns 8, this rank 16",
        ),
        (
            {"dtype": [torch.float32, torch.float32, torch.float64]},
            "rank 2 has dtype torch.float64, this rank torch.float32, has wire dtype torch.float64",
            "rank 0 has dtype torch.float32, this rank torch.float64",
        ),
        (
            {"dtype": [torch.float16, torch.float16, torch.bfloat16], "shard_sizes": EVEN},
            "rank 2 has dtype torch.bfloat16, this rank torch.float16",
            "rank 0 has dtype torch.float16, this rank torch.bfloat16",
        ),
        (
            {"wire_dtype": [None, None, torch.bfloat16]},
            "rank 2 has wire dtype torch.bfloat16, this rank torch.float32",
            "rank 0 has wire dtype torch.float32, this rank torch.bfloat16",
        ),
        (
            {"ids": [True, True, False]},
            "rank 2 passes no ids, this rank does",
            "rank 0 passes ids, this rank none",
        ),
        (
            {"gradient": [True, True, False], "shard_sizes": EVEN},
            "rank 2 needs no gradient, this rank does",
            "rank 0 needs a gradient, this rank none",
        ),
        (
            {"format": [0x70, 0x70, 0x71], "step": [1, 1, 2], "shard_sizes": EVEN},
            "rank 2 sent a header of format 0x71, this rank 0x70: run one version of clipcore;",
            "rank 0 sent a header of format 0x70, this rank 0x71: run one version of clipcore;",
        ),
        (
            {"rows": [4, 4, 3], "shard_sizes": EVEN},
            "rank 2 has 3 rows, but shard_sizes has 4",
            "rank 2 has 3 rows, but shard_sizes has 4",
        ),
        (
            {"rows": [4, 4, 7], "shard_sizes": EVEN},
            "rank 2 has 7 rows, but shard_sizes has 4",
            "rank 2 has 7 rows, but shard_sizes has 4",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_ranks_that_disagree_are_told(
    pool: RankPool, path: str, differing: dict[str, list[Any]], said_of_2: str, said_to_2: str
) -> None:
    *others, second = pool.run(message_of, path, differing)
    assert all(f"start_gather: {said_of_2}" in told for told in others)
    assert f"start_gather: {said_to_2}" in second


def count_collectives(world: World, path: str) -> list[int]:
    counts = []

    def count(action: Any) -> Any:
        assert dist.group.WORLD is not None
        before = dist.group.WORLD._get_sequence_number_for_group()
        answer = action()
        counts.append(dist.group.WORLD._get_sequence_number_for_group() - before)
        return answer

    x_BE = torch.ones(2, 3, requires_grad=True)
    with on_path(path):
        for sizes in ([2, 2, 2], None):
            pending = count(lambda sizes=sizes: start_gather(x_BE, shard_sizes=sizes))
            rows_GE = count(pending.wait).rows_GE
            count(rows_GE.sum().backward)
    return counts


@both_paths
def test_rows_ids_and_header_are_one_collective(pool: RankPool, path: str) -> None:
    for counts in pool.run(count_collectives, path):
        assert counts == [1, 0, 1, 2, 0, 1]


class _Noted(torch.autograd.Function):
    """Identity whose backward calls a function."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, note: Any) -> torch.Tensor:
        ctx.note = note
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.note()
        return grads[0], None


def order_of_backward(world: World, path: str) -> list[str]:
    order: list[str] = []
    x_BE = rows_of(world.rank, (4, 6), torch.float32).requires_grad_()
    with on_path(path):
        pending = start_gather(x_BE, shard_sizes=[4, 4, 4])
        own_BE = _Noted.apply(pending.own_BE, lambda: order.append("own block"))
        rows_GE = pending.wait().rows_GE
        remote_GE = _Noted.apply(rows_GE, lambda: order.append("remote blocks"))
        assert rows_GE.grad_fn is not None and pending.own_BE.grad_fn is not None
        rows_GE.grad_fn.register_hook(lambda *_: order.append("gather"))
        pending.own_BE.grad_fn.register_prehook(lambda *_: order.append("anchor"))
        # The own block comes last in the sum, so that only the order of creation speaks for this order.
        (remote_GE.sum() + own_BE.sum()).backward()
    return order


@both_paths
def test_own_block_runs_between_start_and_end_of_the_sum(pool: RankPool, path: str) -> None:
    for order in pool.run(order_of_backward, path):
        assert order == ["remote blocks", "gather", "own block", "anchor"]


def overlap(world: World, path: str, folder: str) -> str:
    """Rank 1 enters each collective only when rank 0 has gone on from it; what it waited for in vain, or nothing."""
    started, summing = Path(folder, "started"), Path(folder, "summing")

    def wait_for(file: Path) -> str:
        # Less long than the pool waits for a rank. Afterwards this one enters all the same, so that the pool stays usable.
        limit = time.monotonic() + LIMIT_S / 3
        while not file.exists():
            if time.monotonic() > limit:
                return f"{file.name} within {LIMIT_S / 3:g} s"
            time.sleep(0.01)
        return ""

    x_BE = rows_of(world.rank, (4, 6), torch.float32).requires_grad_()
    with on_path(path):
        missed = wait_for(started) if world.rank == 1 else ""
        pending = start_gather(x_BE, shard_sizes=[4, 4, 4])
        if world.rank == 0:
            started.touch()
        own_BE = _Noted.apply(pending.own_BE, summing.touch if world.rank == 0 else bool)
        loss = pending.wait().rows_GE.sum() + own_BE.sum()
        if world.rank == 1:
            missed = missed or wait_for(summing)
        loss.backward()
    return missed


@both_paths
def test_computation_goes_on_during_both_collectives(
    pool: RankPool, path: str, tmp_path: Path
) -> None:
    assert pool.run(overlap, path, str(tmp_path)) == [""] * NUM_RANKS


def gradient_without_rows(world: World, path: str) -> Any:
    """Rank 0 uses its own rows only, rank 1 none with a weight, rank 2 all."""
    x_BE = torch.ones(2, 3, requires_grad=True)
    with on_path(path):
        pending = start_gather(x_BE)
        rows_GE = pending.wait().rows_GE
        if world.rank == 0:
            loss = 10 * pending.own_BE.sum()
        elif world.rank == 1:
            loss = 0 * pending.own_BE.sum()
        else:
            loss = (rows_GE * torch.arange(1.0, 7.0).view(6, 1)).sum()
        loss.backward()
    return x_BE.grad


@both_paths
def test_a_rank_without_gradient_brings_zeros(pool: RankPool, path: str) -> None:
    weights = torch.arange(1.0, 7.0).view(3, 2, 1).expand(3, 2, 3)
    for rank, grad_BE in enumerate(pool.run(gradient_without_rows, path)):
        assert torch.equal(grad_BE, weights[rank] + (10.0 if rank == 0 else 0.0))


def backward_again(world: World, path: str) -> Any:
    x_BE = rows_of(world.rank, (4, 6), torch.float32).requires_grad_()
    with on_path(path):
        pending = start_gather(x_BE)
        rows_GE = pending.wait().rows_GE
        loss = rows_GE.sin().sum() * (world.rank + 1) + pending.own_BE.cos().sum()
        rows_GE.retain_grad()
        first = torch.autograd.grad(loss, [x_BE, rows_GE], retain_graph=True)
        # Ends at the gather node, and leaves a sum behind that nobody takes.
        torch.autograd.grad(loss, pending.own_BE, retain_graph=True)
        second = torch.autograd.grad(loss, [x_BE, rows_GE], retain_graph=True)
        try:
            torch.autograd.grad(loss, x_BE, create_graph=True)
        except ValueError as error:
            return first, second, rows_GE.detach(), str(error)
    return first, second, rows_GE.detach(), "no error"


@both_paths
def test_backward_again(pool: RankPool, path: str) -> None:
    for rank, (first, second, rows_GE, said) in enumerate(pool.run(backward_again, path)):
        assert torch.equal(first[0], second[0])
        # The collective leaves what it sums as it was.
        assert torch.equal(first[1], rows_GE.cos() * (rank + 1)) and torch.equal(
            *first[1:], second[1]
        )
        own_BE = rows_GE[4 * rank : 4 * rank + 4]
        torch.testing.assert_close(first[0], 6 * own_BE.cos() - own_BE.sin())
        assert "no second derivative: call backward without create_graph=True" in said


def call_extension(world: World, changed: dict[str, Any]) -> str:
    assert dist.group.WORLD is not None
    arguments: dict[str, Any] = {
        "x_BE": torch.zeros(2, 4),
        "ids_B": None,
        "header": [0] * 8,
        "shard_sizes": [2, 2, 2],
        "ids_at": 64,
        "rows_at": 64,
        "part_bytes": 96,
        "wire_dtype": torch.float32,
        "group_name": dist.group.WORLD.group_name,
    }
    try:
        native.load().start_gather(**{**arguments, **changed})  # type: ignore[union-attr]
    except ValueError as error:
        return str(error)
    return "no error"


@extension_only
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x_BE": torch.zeros(3)}, "expected x [B, E], got shape [3]"),
        ({"x_BE": torch.zeros(2, 4, dtype=torch.int64)}, "floating-point"),
        ({"wire_dtype": torch.int64}, "floating-point"),
        ({"header": [0] * 7}, "a header has 8 numbers, got 7"),
        ({"ids_B": torch.zeros(3, dtype=torch.int64)}, "expected ids as int64 [2] on cpu"),
        ({"ids_B": torch.zeros(2)}, "expected ids as int64 [2] on cpu"),
        ({"shard_sizes": []}, "shard_sizes is empty"),
        ({"part_bytes": 80}, "one behind the other"),
        ({"rows_at": 72, "part_bytes": 112}, "multiple of 16"),
        ({"ids_B": torch.zeros(2, dtype=torch.int64)}, "one behind the other"),
    ],
    ids=str,
)
def test_extension_checks_its_arguments(pool: RankPool, changed: dict[str, Any], said: str) -> None:
    assert all(said in told for told in pool.run(call_extension, changed))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"x_BE": torch.zeros(3)}, r"x_BE must be \[B, E\]"),
        ({"x_BE": torch.zeros(2, 3, dtype=torch.int64)}, r"x_BE must be \[B, E\]"),
        ({"ids_B": torch.zeros(3, dtype=torch.int64)}, r"ids_B must be int64 \[2\] on cpu.*\[3\]"),
        ({"ids_B": torch.zeros(2)}, r"ids_B must be int64 \[2\] on cpu.*float32"),
        ({"wire_dtype": torch.int8}, "wire_dtype must be float16, .* got torch.int8"),
        ({"shard_sizes": [2, 2]}, "numbers of rows of the 1 ranks"),
        ({"shard_sizes": [-1]}, "numbers of rows of the 1 ranks"),
        ({"shard_sizes": [3]}, "the rank has 2 rows, but shard_sizes has 3"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        start_gather(**{"x_BE": torch.zeros(2, 3), **arguments})


class _Copied:
    """What the host knows of a copy from the GPU."""

    def __init__(self, state: bool | RuntimeError) -> None:
        self.state = state

    def query(self) -> bool:
        if isinstance(self.state, RuntimeError):
            raise self.state
        return self.state


def test_the_next_call_names_the_rank_that_a_gpu_found(monkeypatch: pytest.MonkeyPatch) -> None:
    x_BE = torch.zeros(2, 3)
    expected = wire.ExpectedHeaders([wire.FORMAT, 2, 3, 6, 6, 0, 0, 17], (2, 4), [3, 5])
    right = torch.tensor(expected.all_headers())
    wrong = right.clone()
    wrong[1, -1] = 16
    copies = [_Copied(True), _Copied(False), _Copied(True)]
    deferred = deque(zip([expected] * 3, (right, wrong, wrong), copies, strict=True))
    monkeypatch.setattr(wire, "_deferred", deferred)
    start_gather(x_BE)  # the first is right, the second still on its way
    assert len(deferred) == 2
    copies[1].state = True
    with pytest.raises(ValueError, match="rank 5 is at step 16, this rank at step 17"):
        start_gather(x_BE)
    copies[2].state = RuntimeError("device-side assert triggered")
    with pytest.raises(ValueError, match="rank 5 is at step 16, this rank at step 17"):
        start_gather(x_BE)
    assert not deferred
    deferred.append((expected, right, _Copied(RuntimeError("another error of the device"))))
    start_gather(x_BE)


UNEVEN = [[3, 0, 5], [1, 1, 1], [0, 0, 2], [0, 0, 0]]


def gather_uneven(world: World, counts: list[int], tail: tuple[int, ...], dtype: Any) -> Any:
    rows = rows_of(world.rank, (counts[world.rank], *tail), torch.float32).mul(9).to(dtype)
    gathered = gather_rows(rows.requires_grad_(rows.is_floating_point()))
    assert not gathered.requires_grad
    return gathered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("tail", [(), (4,), (2, 3), (0,)], ids=str)
def test_gather_rows(pool: RankPool, tail: tuple[int, ...], dtype: torch.dtype) -> None:
    for counts in UNEVEN:
        expected = torch.cat(
            [
                rows_of(rank, (count, *tail), torch.float32).mul(9).to(dtype)
                for rank, count in enumerate(counts)
            ]
        )
        for gathered in pool.run(gather_uneven, counts, tail, dtype):
            assert gathered.dtype == dtype
            assert torch.equal(gathered, expected)


def gather_rows_of_unequal_size(world: World) -> str:
    try:
        gather_rows(torch.zeros(2, 4 if world.rank == 1 else 3))
    except ValueError as error:
        return str(error)
    return "no error"


def test_gather_rows_of_unequal_size(pool: RankPool) -> None:
    assert all("[12, 16, 12]" in told for told in pool.run(gather_rows_of_unequal_size))


def talk(world: World, raising: int) -> Any:
    barrier()
    told = broadcast_object({"rank": world.rank}, source=1)
    sums = all_reduce_sum([float(world.rank), 0.1])
    return world, is_main(), all_reduce_flag(world.rank == raising), told, sums


@pytest.mark.parametrize("raising", [-1, 0, 2])
def test_flags_objects_and_places(pool: RankPool, raising: int) -> None:
    for rank, (world, main, raised, told, sums) in enumerate(pool.run(talk, raising)):
        assert sums == [3.0, 0.1 + 0.1 + 0.1]
        assert world == World(rank, NUM_RANKS, rank, torch.device("cpu"))
        assert world.is_main is main is (rank == 0)
        assert raised is (raising >= 0)
        assert told == {"rank": 1}


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = init_distributed("cpu")
    assert world == World(0, 1, 0, torch.device("cpu"))
    assert not dist.is_initialized()
    x_BE = torch.zeros(2, 3, requires_grad=True)
    ids_B = torch.tensor([5, 7])
    pending = start_gather(x_BE, ids_B, wire_dtype=torch.float16, step=3, shard_sizes=[2])
    gathered = pending.wait()
    assert pending.own_BE is x_BE and gathered.rows_GE is x_BE and gathered.ids_G is ids_B
    assert gathered.shard_sizes == (2,) and start_gather(x_BE).wait().ids_G is None
    assert not gather_rows(x_BE).requires_grad
    assert is_main() and all_reduce_flag(True) and not all_reduce_flag(False)
    assert broadcast_object("told") == "told"
    assert all_reduce_sum([1, 0.5]) == [1.0, 0.5]
    barrier()


def test_half_an_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=r"but not LOCAL_RANK; start several .*torchrun"):
        init_distributed("cpu")


def test_more_ranks_than_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="needs GPU 2, but this machine shows 2"):
        distributed.pick_device("cuda", 2)


def test_the_gpu_that_is_named_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed.pick_device("cuda:1", 0) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="this machine shows 2 GPUs"):
        distributed.pick_device("cuda:2", 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="pass --device cuda"):
        distributed.pick_device("cuda:1", 0)
    with pytest.raises(ValueError, match="--device is cpu or cuda, not 'gpu'"):
        distributed.pick_device("gpu", 0)


def test_what_holds_the_group_in_a_cycle_is_freed_before_the_group_ends(monkeypatch) -> None:
    """Such as the error of a lost worker, whose frames hold the run; the interpreter's own end would be too late."""

    class Holder:
        def __init__(self) -> None:
            self.itself = self

    holder = weakref.ref(Holder())
    assert holder() is not None
    alive: list[object] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: alive.append(holder()))
    close_distributed()
    assert alive == [None]
