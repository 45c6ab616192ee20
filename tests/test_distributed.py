"""The collectives on three gloo ranks: with three, a sum over ranks has an inner rounding.

Letters: B rows on one rank, G rows of all ranks, E embedding size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import RankPool

from clipcore import distributed, native
from clipcore.distributed import (
    World,
    all_gather_with_grad,
    all_gather_with_grad_ref,
    all_reduce_flag,
    all_reduce_sum,
    barrier,
    broadcast_object,
    gather_rows,
    init_distributed,
    is_main,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

NUM_RANKS = 3
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(1, 1), (3, 5), (64, 512)]

extension = pytest.param(
    all_gather_with_grad,
    id="extension",
    marks=pytest.mark.skipif(
        native.load() is None, reason="clipcore._C is not built: pip install -e ."
    ),
)
both_paths = pytest.mark.parametrize(
    "gather", [pytest.param(all_gather_with_grad_ref, id="reference"), extension]
)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS) as ranks:
        yield ranks


def rows_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """The same numbers in the test and in the rank."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def forward_of(world: World, gather: Any, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    return gather(rows_of(world.rank, shape, dtype))


@both_paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_the_concatenation(pool: RankPool, gather: Any, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        expected = torch.cat([rows_of(rank, shape, dtype) for rank in range(NUM_RANKS)])
        for gathered in pool.run(forward_of, gather, shape, dtype):
            assert gathered.dtype == dtype
            assert torch.equal(gathered, expected)


def image_to_text_loss(
    image_BE: torch.Tensor, text_GE: torch.Tensor, first_row: int
) -> torch.Tensor:
    """One rank's share of the sum of losses; it touches every rank's text."""
    targets_B = torch.arange(first_row, first_row + image_BE.shape[0])
    return F.cross_entropy(5.0 * image_BE @ text_GE.T, targets_B, reduction="sum")


def gradients_of(world: World, gather: Any, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    image_BE = rows_of(world.rank, shape, dtype, seed=1).requires_grad_()
    text_BE = rows_of(world.rank, shape, dtype, seed=2).requires_grad_()
    first_row = world.rank * shape[0]
    image_GE, text_GE = gather(image_BE), gather(text_BE)
    loss = image_to_text_loss(image_BE, text_GE, first_row)
    loss = loss + image_to_text_loss(text_BE, image_GE, first_row)
    loss.backward()
    return image_BE.grad, text_BE.grad


@both_paths
def test_gradient_is_that_of_one_process(pool: RankPool, gather: Any) -> None:
    shape = (7, 12)
    image_GE, text_GE = (
        torch.cat([rows_of(rank, shape, torch.float64, seed) for rank in range(NUM_RANKS)])
        .clone()
        .requires_grad_()
        for seed in (1, 2)
    )
    loss = image_to_text_loss(image_GE, text_GE, 0) + image_to_text_loss(text_GE, image_GE, 0)
    loss.backward()
    results = pool.run(gradients_of, gather, shape, torch.float64)
    for exact_GE, found in zip(
        (image_GE.grad, text_GE.grad), zip(*results, strict=True), strict=True
    ):
        assert exact_GE is not None
        torch.testing.assert_close(torch.cat(found), exact_GE, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gather", [extension])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extension_has_the_bits_of_the_reference(
    pool: RankPool, gather: Any, dtype: torch.dtype
) -> None:
    found = pool.run(gradients_of, gather, (33, 65), dtype)
    expected = pool.run(gradients_of, all_gather_with_grad_ref, (33, 65), dtype)
    for found_pair, expected_pair in zip(found, expected, strict=True):
        for one, other in zip(found_pair, expected_pair, strict=True):
            assert torch.equal(one, other)


def gradient_of_weighted_sum(world: World, gather: Any, dtype: torch.dtype) -> Any:
    x_BE = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    gather(x_BE).sum().mul(256.0 if world.rank == 0 else 1.0).backward()
    assert x_BE.grad is not None
    return x_BE.grad


@both_paths
def test_bfloat16_gradient_is_summed_in_float32(pool: RankPool, gather: Any) -> None:
    # In bfloat16 256 + 1 rounds to 256, so a sum in any order but (1 + 1) + 256 would end at 256,
    # and no order is promised; in float32 every order gives 258, which bfloat16 holds.
    for grad_BE in pool.run(gradient_of_weighted_sum, gather, torch.bfloat16):
        assert grad_BE.dtype == torch.bfloat16
        assert torch.equal(grad_BE, torch.full((2, 3), 258.0, dtype=torch.bfloat16))


def on_subgroup(world: World, gather: Any) -> Any:
    group = dist.new_group([0, 2])
    if world.rank == 1:
        return None
    x_BE = rows_of(world.rank, (4, 6), torch.float32).requires_grad_()
    y_GE = gather(x_BE, group)
    y_GE.mul(world.rank + 1.0).sum().backward()
    rows = gather_rows(x_BE[: world.rank + 1], group)
    told = broadcast_object(("from", world.rank), 1, group)
    raised = all_reduce_flag(world.rank == 0, group)
    barrier(group)
    return y_GE.detach(), x_BE.grad, rows, told, raised


@both_paths
def test_subgroup(pool: RankPool, gather: Any) -> None:
    first, outsider, second = pool.run(on_subgroup, gather)
    assert outsider is None
    x_BE = [rows_of(rank, (4, 6), torch.float32) for rank in (0, 2)]
    for gathered, grad, rows, told, raised in (first, second):
        assert torch.equal(gathered, torch.cat(x_BE))
        assert torch.equal(grad, torch.full((4, 6), 4.0))
        assert torch.equal(rows, torch.cat([x_BE[0][:1], x_BE[1][:3]]))
        assert told == ("from", 2)
        assert raised is True


def gather_views(world: World, gather: Any) -> Any:
    x_EB = rows_of(world.rank, (5, 4), torch.float32).requires_grad_()
    y_GE = gather(x_EB.T)
    # The gradient that arrives is the transpose of these weights, and its rows are not contiguous.
    y_GE.T.mul(torch.arange(60.0).view(5, 12)).sum().backward()
    return y_GE.detach(), x_EB.grad


@both_paths
def test_strided_input_and_strided_gradient(pool: RankPool, gather: Any) -> None:
    expected = torch.cat([rows_of(rank, (5, 4), torch.float32).T for rank in range(NUM_RANKS)])
    weights_EG = torch.arange(60.0).view(5, 12)
    for rank, (gathered, grad_EB) in enumerate(pool.run(gather_views, gather)):
        assert torch.equal(gathered, expected)
        assert torch.equal(grad_EB, NUM_RANKS * weights_EG[:, 4 * rank : 4 * rank + 4])


def message_of(world: World, gather: Any, shapes: list[tuple[int, ...]], dtypes: list[Any]) -> str:
    try:
        gather(torch.zeros(shapes[world.rank], dtype=dtypes[world.rank]))
    except ValueError as error:
        return str(error)
    return "no error"


@both_paths
@pytest.mark.parametrize(
    ("shapes", "dtypes", "said"),
    [
        ([(4, 8), (4, 8), (3, 8)], [torch.float32] * 3, "[3, 8]"),
        ([(4, 8), (4, 8), (8, 4)], [torch.float32] * 3, "[8, 4]"),
        ([(4, 8)] * 3, [torch.float32, torch.float32, torch.bfloat16], "rank 2"),
        ([(4, 8)] * 3, [torch.float16, torch.float16, torch.bfloat16], "rank 2"),
    ],
)
def test_ranks_that_disagree_are_told(
    pool: RankPool, gather: Any, shapes: list[Any], dtypes: list[Any], said: str
) -> None:
    messages = pool.run(message_of, gather, shapes, dtypes)
    assert all("every rank must pass the same shape and dtype" in told for told in messages)
    assert all(said in told for told in messages[:2])
    assert "rank 2 has" in messages[2] and "and rank 0 has" in messages[2]


def call_extension(world: World, x: torch.Tensor) -> str:
    assert dist.group.WORLD is not None
    try:
        native.load().all_gather_with_grad(x, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("gather", [extension])
@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(3), "expected x [B, E], got shape [3]"),
        (torch.zeros(2, 3).T, "must be contiguous"),
        (torch.zeros(2, 3, dtype=torch.int64), "floating-point"),
    ],
    ids=["one axis", "strided", "integers"],
)
def test_extension_checks_its_argument(
    pool: RankPool, gather: Any, x: torch.Tensor, said: str
) -> None:
    assert all(said in told for told in pool.run(call_extension, x))


@pytest.mark.parametrize("gather", [all_gather_with_grad_ref, all_gather_with_grad])
@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64)])
def test_wrong_arguments(gather: Any, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \[B, E\]"):
        gather(x)


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
    assert all_gather_with_grad(x_BE) is x_BE
    assert all_gather_with_grad_ref(x_BE) is x_BE
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
        distributed._pick_device("cuda", 2)


def test_the_gpu_that_is_named_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed._pick_device("cuda:1", 0) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="this machine shows 2 GPUs"):
        distributed._pick_device("cuda:2", 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="pass --device cuda"):
        distributed._pick_device("cuda:1", 0)
    with pytest.raises(ValueError, match="--device is cpu or cuda, not 'gpu'"):
        distributed._pick_device("gpu", 0)


def forward_without_extension(world: World, shape: tuple[int, int]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load", lambda: None)
        return all_gather_with_grad(rows_of(world.rank, shape, torch.float32))


def test_without_the_extension_the_reference_runs(pool: RankPool) -> None:
    expected = torch.cat([rows_of(rank, (2, 3), torch.float32) for rank in range(NUM_RANKS)])
    for gathered in pool.run(forward_without_extension, (2, 3)):
        assert torch.equal(gathered, expected)
