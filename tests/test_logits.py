"""The walk over blocks of logits: sizes of blocks, what a block holds, and large buffers on the CPU."""

from __future__ import annotations

import math
import mmap
from types import SimpleNamespace

import pytest
import torch
from numerics import KERNEL_DEVICE
from problems import unit_embeddings

from clipcore.kernels.logits import pages, walk_gpu
from clipcore.kernels.logits.pairs import WORKSPACE_BYTES, LossInputs, Pairs
from clipcore.kernels.logits.program_sums import ProgramSums
from clipcore.kernels.logits.walk_gpu import LaunchRow, LogitWalk

LAUNCH_ROW = LaunchRow(block_n=64, block_m=128, block_d=16, num_warps=8, num_stages=1)


def inputs_of(num_pairs: int, engine: str) -> LossInputs:
    """Return pairs of length one in float32, where kernels run."""
    image, text = (t.float().to(KERNEL_DEVICE) for t in unit_embeddings(num_pairs, num_pairs, 16))
    scale, pairs = torch.tensor(20.0, device=KERNEL_DEVICE), Pairs(None, None, 0, "ignore")
    return LossInputs(image, text, scale, pairs, True, torch.float32, engine, 2**20)


@pytest.mark.fast
def test_operands_of_a_block_are_gone_when_the_next_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who walks still holds the block then."""
    monkeypatch.setattr(walk_gpu, "block_sides", lambda *_: (128, 128))
    blocks = iter(LogitWalk(inputs_of(256, "library"), LAUNCH_ROW))
    first = next(blocks)
    assert first.shape == (128, 128) and len(next(blocks).y_CE) == 128
    assert not hasattr(first, "x_RE") and not hasattr(first, "y_CE")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("engine", "reads_stash", "is_fused", "has_product"),
    [
        ("library", False, False, True),
        ("fused", False, True, False),
        ("library", True, False, False),
        ("fused", True, False, False),
    ],
)
def test_a_stash_is_read_and_nothing_multiplied(
    engine: str, reads_stash: bool, is_fused: bool, has_product: bool
) -> None:
    walk = LogitWalk(inputs_of(64, engine), LAUNCH_ROW, reads_stash=reads_stash)
    block = next(iter(walk))
    assert block.arguments["FUSED"] is is_fused
    assert (block.product_RC is not None) is has_product


@pytest.mark.parametrize("width", [512, 768, 1024])
@pytest.mark.parametrize("element_bytes", [2, 4, 6])
def test_a_block_and_all_that_goes_with_it_fit_the_workspace(
    width: int, element_bytes: int
) -> None:
    """The block, both operands and the sum of the image rows' gradients."""
    for workspace_bytes in (2**26, WORKSPACE_BYTES["cuda"]):
        rows, columns = walk_gpu.block_sides(width, element_bytes, workspace_bytes, 2)
        taken = rows * columns * element_bytes + (rows + columns) * width * 2 + rows * width * 4
        assert workspace_bytes / 2 < taken <= workspace_bytes


@pytest.mark.fast
def test_a_larger_block_has_a_place_for_each_program(poisoned_memory: None) -> None:
    """What programs of the blocks before have added is kept."""
    sums = ProgramSums(2, torch.device(KERNEL_DEVICE))
    assert sums.total(0) == 0
    for grid in ((3,), (2, 4), (1,)):
        places = sums.places(SimpleNamespace(grid=grid))
        assert places.shape[1] >= math.prod(grid)
        places[1, : math.prod(grid)] += 1.0
    assert sums.total(0) == 0 and sums.total(1) == 3 + 8 + 1


def test_large_buffers_keep_their_pages_but_never_share_them() -> None:
    """Pages of a buffer that is gone serve the next one of about its size; another size gives idle ones back."""
    shape, dtype = (5 * pages.HUGE_PAGE,), torch.uint8
    first, second = (pages.buffer(shape, dtype).fill_(i) for i in (1, 2))
    view, address = first[7:], first.data_ptr()
    del first
    third = pages.buffer(shape, dtype).fill_(3)
    assert (view == 1).all() and (second == 2).all() and (third == 3).all()
    del view
    assert pages.buffer(shape, dtype).data_ptr() == address
    idle = list(pages._idle_pages)
    assert idle and not any(kept.closed for kept in idle)
    pages.buffer((3 * shape[0],), dtype)
    assert [len(kept) for kept in pages._idle_pages] == [3 * shape[0]]
    pages.give_back_idle_pages()
    assert not pages._idle_pages


def test_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pages(mmap.mmap):
        def madvise(self, *_: object) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(pages.mmap, "mmap", Pages)
    monkeypatch.setattr(pages, "_idle_pages", [])
    assert pages.buffer((5 * pages.HUGE_PAGE,), torch.uint8).fill_(1).all()


def test_large_buffers_are_poisoned_too(poisoned_memory: None) -> None:
    assert pages.buffer((5 * pages.HUGE_PAGE,), torch.float32).isnan().all()
