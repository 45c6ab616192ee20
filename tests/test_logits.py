"""The walk over blocks of logits: sizes of blocks, what a block holds, and large buffers on the CPU."""

from __future__ import annotations

import math
import mmap
from types import SimpleNamespace

import pytest
import torch
from numerics import KERNEL_DEVICE
from problems import unit_embeddings
from torch import Tensor

from clipcore.kernels.logits import pages, sides, walk_gpu
from clipcore.kernels.logits.gradient_sums import GradientWanted
from clipcore.kernels.logits.launch_rows import StripRow
from clipcore.kernels.logits.pairs import WORKSPACE_BYTES, LossInputs, Pairs, slices
from clipcore.kernels.logits.program_sums import ProgramSums
from clipcore.kernels.logits.sides import WalkShape
from clipcore.kernels.logits.walk_gpu import LogitWalk
from clipcore.kernels.normalize import normalize

LAUNCH_ROW = StripRow(columns=512, step=4)


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
    ("engine", "reads_stash", "has_product"),
    [
        ("library", False, True),
        ("fused", False, False),
        ("library", True, False),
        ("fused", True, False),
    ],
)
def test_a_stash_is_read_and_nothing_multiplied(
    engine: str, reads_stash: bool, has_product: bool
) -> None:
    walk = LogitWalk(inputs_of(64, engine), LAUNCH_ROW, reads_stash=reads_stash)
    block = next(iter(walk))
    assert (block.product_RC is not None) is has_product
    assert block.product_arguments.keys() == (
        {"product_ptr", "stride_product"} if has_product else set()
    )


# The walks of both losses on an H100 or H200, 16-bit operands but for the last: what a block's logits take, and products.
WALKS = {
    "forward": {"element_bytes": 4, "is_multiplied": True, "has_gradient": False},
    "backward": {"element_bytes": 6, "is_multiplied": True, "has_gradient": True},
    "from a stash": {"element_bytes": 2, "is_multiplied": False, "has_gradient": True},
    "float32": {
        "element_bytes": 4,
        "operand_bytes": 4,
        "is_multiplied": True,
        "has_gradient": True,
    },
}


def walk_shape(
    num_images: int, num_texts: int, width: int, kind: str, workspace_bytes: int
) -> WalkShape:
    return WalkShape(
        **{
            "num_images": num_images,
            "num_texts": num_texts,
            "width": width,
            "operand_bytes": 2,
            "workspace_bytes": workspace_bytes,
            "num_processors": 132,
            **WALKS[kind],
        }
    )


def tiles_and_waves(rows: int, columns: int) -> tuple[int, int]:
    """Return the tiles of 128 x 256 of a product, and the waves that 132 processors take for them."""
    tiles = -(-rows // 128) * -(-columns // 256)
    return tiles, -(-tiles // 132)


def possible_efficiency(walk: WalkShape) -> float:
    """Return a bound: however a side is cut, its gradient takes as many waves as all its tiles, and whole ones."""
    time = float(walk.is_multiplied)
    if walk.has_gradient:
        for length in (walk.num_images, walk.num_texts):
            tiles, waves = tiles_and_waves(length, walk.width)
            time += 132 * waves / tiles
    return (walk.is_multiplied + 2 * walk.has_gradient) / time


@pytest.mark.fast
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("width", [512, 768, 1024])
@pytest.mark.parametrize("kind", WALKS)
def test_products_fill_whole_waves(kind: str, width: int, ranks: int) -> None:
    """0.95 of the time of full waves, for all images or a rank's, wherever the tiles of a side make that possible.

    8,192 images of width 768 are 192 tiles, two waves of 132: there, and with few images a rank, the best is chosen.
    """
    below = []
    for num_texts in (2**power for power in range(13, 21)):
        walk = walk_shape(num_texts // ranks, num_texts, width, kind, WORKSPACE_BYTES["cuda"])
        efficiency = sides.wave_efficiency(walk, *sides.block_sides(walk))
        if efficiency < 0.95:
            assert possible_efficiency(walk) < 0.95, str(walk)
            most = max(sides.wave_efficiency(walk, *other) for other in sides._fitting_sides(walk))
            assert efficiency >= most - 0.01, str(walk)
            below.append(num_texts)
    assert all(num_texts <= 32768 for num_texts in below)
    assert ranks > 1 or below == ([8192] if width == 768 and kind != "forward" else [])


@pytest.mark.fast
@pytest.mark.parametrize("kind", WALKS)
def test_the_efficiency_is_that_of_the_blocks(kind: str) -> None:
    """Counted over the products of each block, odd ones at the ends included."""
    walk = walk_shape(30000, 50001, 768, kind, WORKSPACE_BYTES["cuda"])
    rows, columns = sides.block_sides(walk)
    time = 0
    for R in (part.stop - part.start for part in slices(walk.num_images, rows)):
        for C in (part.stop - part.start for part in slices(walk.num_texts, columns)):
            products = [(R, C, 768)] * walk.is_multiplied
            products += [(R, 768, C), (C, 768, R)] * walk.has_gradient
            time += sum(132 * 128 * 256 * tiles_and_waves(n, m)[1] * k for n, m, k in products)
    useful = (walk.is_multiplied + 2 * walk.has_gradient) * walk.num_images * walk.num_texts * 768
    assert sides.wave_efficiency(walk, rows, columns) == pytest.approx(useful / time, rel=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("width", [512, 768, 1024])
@pytest.mark.parametrize("kind", WALKS)
def test_a_block_and_all_that_goes_with_it_fit_the_workspace(width: int, kind: str) -> None:
    """The block, both operands and the sum of the image rows' gradients; no less full than the largest square."""
    for workspace_bytes in (2**24, 2**26, 2**28, WORKSPACE_BYTES["cuda"]):
        walk = walk_shape(65536, 65536, width, kind, workspace_bytes)
        rows, columns = sides.block_sides(walk)
        taken = rows * columns * walk.element_bytes + rows * width * 4
        taken += (rows + columns) * width * walk.operand_bytes
        assert taken <= workspace_bytes
        assert rows % sides.ROW_MULTIPLE == columns % sides.COLUMN_MULTIPLE == 0
        square = max(n for n, m in sides._fitting_sides(walk) if n == m)
        efficiency = sides.wave_efficiency(walk, rows, columns)
        assert efficiency >= sides.wave_efficiency(walk, square, square) - 0.001


@pytest.mark.fast
@pytest.mark.parametrize("lengths", [(0, 0), (0, 5), (5, 0), (1, 1), (300, 520)])
def test_the_least_block_is_taken_where_nothing_fits(lengths: tuple[int, int]) -> None:
    walk = walk_shape(*lengths, 512, "backward", 1)
    assert sides.block_sides(walk) == (sides.ROW_MULTIPLE, sides.COLUMN_MULTIPLE)


def walked_inputs(
    monkeypatch: pytest.MonkeyPatch, workspace_bytes: int, *, normalized: bool = True
) -> LossInputs:
    """Return 300 and 205 rows of small whole numbers, which float32 sums exactly, for blocks of 128 x 128."""
    monkeypatch.setattr(walk_gpu, "block_sides", lambda walk: (128, 128))
    image, text = (
        torch.randint(-3, 4, (rows, 24)).float().to(KERNEL_DEVICE) for rows in (300, 205)
    )
    scale, pairs = torch.tensor(20.0, device=KERNEL_DEVICE), Pairs(None, None, 0, "ignore")
    return LossInputs(
        image, text, scale, pairs, normalized, torch.float32, "library", workspace_bytes
    )


@pytest.mark.parametrize("operand", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("workspace_bytes", [2**20, WORKSPACE_BYTES["cuda"]])
def test_rows_of_odd_blocks_are_aligned_and_their_padding_is_not_used(
    operand: torch.dtype,
    workspace_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    poisoned_memory: None,
) -> None:
    """Memory that nobody wrote is NaN: the padding, and both sums before their first product."""
    inputs = walked_inputs(monkeypatch, workspace_bytes)._replace(operand=operand)
    wanted = GradientWanted((True, True), torch.ones((), device=KERNEL_DEVICE), torch.float32)
    walk, last = LogitWalk(inputs, LAUNCH_ROW, wanted=wanted), []
    product_BG = inputs.image_BE @ inputs.text_GE.T
    for block in walk:
        assert block.product_RC is not None and block.grad_RC is not None
        for values_RC in (block.product_RC, block.grad_RC):
            assert values_RC.shape == block.shape and values_RC.stride() == (block.stride, 1)
            assert values_RC.data_ptr() % 16 == 0
        assert block.stride % walk_gpu.ROW_MULTIPLE == 0 and block.stride >= block.shape[1]
        assert torch.equal(block.product_RC, product_BG[block.rows, block.columns])
        block.grad_RC.copy_(block.product_RC.sign())
        walk.add_gradient(block)
        last.append((block.shape, block.stride))
    assert len(last) == 6 and last[-1] == ((44, 77), 128)
    d_image, d_text = walk.gradients()
    assert torch.equal(d_image, product_BG.sign() @ inputs.text_GE)
    assert torch.equal(d_text, product_BG.sign().T @ inputs.image_BE)


@pytest.mark.parametrize(
    ("workspace_bytes", "normalized", "launches"),
    [(WORKSPACE_BYTES["cuda"], False, 3 + 1), (2**20, False, 3 + 6), (2**20, True, 0)],
)
def test_operands_of_a_side_are_made_once(
    workspace_bytes: int, normalized: bool, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of two blocks: texts once a walk, in a small workspace once a block; views of what is an operand."""
    inputs, made = walked_inputs(monkeypatch, workspace_bytes, normalized=normalized), []

    def counted(x_ND: Tensor, dtype: torch.dtype) -> Tensor:
        made.append(len(x_ND))
        return normalize(x_ND, dtype)

    monkeypatch.setattr(walk_gpu, "normalize", counted)
    storages = {inputs.image_BE.untyped_storage()._cdata, inputs.text_GE.untyped_storage()._cdata}
    for block in LogitWalk(inputs, LAUNCH_ROW):
        own = {x_NE.untyped_storage()._cdata for x_NE in (block.x_RE, block.y_CE)}
        assert (own == storages) is normalized
    assert len(made) == launches


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
