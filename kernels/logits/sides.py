"""The sides of a block of logits on a GPU, chosen so that the library's products fill the chip in whole waves.

Legend: ``clipcore.kernels.logits``.

A product of the library is cut into tiles, and a chip computes as many tiles at once as it has processors: one wave. The
last wave of a product costs as much as a full one. A block of R x C logits makes up to three products: the logits
[R, C] over E, the gradient of the images [R, E] over C, and that of the texts [C, E] over R. So a wave of the second is
C long, and R decides how many there are: 3 waves of 0.73 in place of 2 full ones are a quarter of the time.

The sides follow from the sizes, the workspace and the generation of the chip alone: every rank and every run that has
these has the same blocks, and with them the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

# Blocks keep to multiples of every tile and strip of a kernel, so that each lies in one block, as a stash wants it.
ROW_MULTIPLE, COLUMN_MULTIPLE = 256, 512
# The longest side of a block. Longer ones would gain less than half a wave in 66.
LONGEST_SIDE = 16896
# The rows and columns of a tile of the library's products. Estimated, to be measured.
PRODUCT_TILE = 128, 256
# What a block costs beside its products, while its kernels start and drain, as the length of a wave's sums that takes as
# long: 256 are some 3 us of an H200. Estimated, to be measured.
BLOCK_COST = 256


class WalkShape(NamedTuple):
    """What the sides of a walk's blocks depend on."""

    num_images: int  # B
    num_texts: int  # G
    width: int  # E
    element_bytes: int  # of a block's buffers, for each logit
    operand_bytes: int  # of an element of the operands
    workspace_bytes: int
    num_processors: int
    is_multiplied: bool  # whether the library makes the logits
    has_gradient: bool  # whether it makes the embeddings' gradients of the block's


@functools.lru_cache(maxsize=1024)
def block_sides(walk: WalkShape) -> tuple[int, int]:
    """Return the rows R and columns C of the blocks that cost least; of equal ones the largest.

    The block, its operands and the float32 sum of its rows' gradients fit the workspace, unless it is smaller than the
    least block. Blocks at the end of a side may be smaller.
    """

    def order(sides: tuple[int, int]) -> tuple[int, int, int]:
        rows, columns = sides
        return walk_cost(walk, rows, columns), -rows * columns, rows

    return min(_fitting_sides(walk), key=order)


def block_bytes(walk: WalkShape, rows: int, columns: int) -> int:
    """Return what a block takes: its logits, its operands, and the float32 sum of its rows' gradients."""
    operands = (rows + columns) * walk.width * walk.operand_bytes
    return rows * columns * walk.element_bytes + operands + rows * walk.width * 4


def walk_cost(walk: WalkShape, rows: int, columns: int) -> int:
    """Return the time of all products over all blocks: waves, times the length of the sums in them."""
    row_parts, column_parts = _parts(walk.num_images, rows), _parts(walk.num_texts, columns)
    num_row_blocks = sum(count for _, count in row_parts)
    num_blocks = num_row_blocks * sum(count for _, count in column_parts)
    cost = num_blocks * BLOCK_COST
    if walk.is_multiplied:
        for R, num_rows in row_parts:
            for C, num_columns in column_parts:
                cost += num_rows * num_columns * _waves(walk, R, C) * walk.width
    if walk.has_gradient:
        # Along a row of blocks the sums over their columns add up to G, along a column of blocks to B.
        for R, num_rows in row_parts:
            cost += num_rows * _waves(walk, R, walk.width) * walk.num_texts
        for C, num_columns in column_parts:
            cost += num_columns * _waves(walk, C, walk.width) * walk.num_images
    return cost


def wave_efficiency(walk: WalkShape, rows: int, columns: int) -> float:
    """Return the share of the time of all products that full waves of whole tiles would take."""
    num_products = walk.is_multiplied + 2 * walk.has_gradient
    tile_rows, tile_columns = PRODUCT_TILE
    per_wave = walk.num_processors * tile_rows * tile_columns
    least = num_products * walk.num_images * walk.num_texts * walk.width / per_wave
    num_blocks = -(-walk.num_images // rows) * -(-walk.num_texts // columns)
    return least / (walk_cost(walk, rows, columns) - num_blocks * BLOCK_COST)


def _fitting_sides(walk: WalkShape) -> Iterator[tuple[int, int]]:
    """Yield the sides of the least block, and of all others that fit the workspace."""
    yield ROW_MULTIPLE, COLUMN_MULTIPLE
    for rows in _sides_of(walk.num_images, ROW_MULTIPLE):
        for columns in _sides_of(walk.num_texts, COLUMN_MULTIPLE):
            if block_bytes(walk, rows, columns) > walk.workspace_bytes:
                break
            yield rows, columns


def _sides_of(length: int, multiple: int) -> range:
    """Return the multiples that a side of a length can have."""
    whole = -(-length // multiple) * multiple
    return range(multiple, min(whole, LONGEST_SIDE) + 1, multiple)


def _parts(length: int, side: int) -> list[tuple[int, int]]:
    """Return the lengths of the parts of a side, and how many there are of each."""
    number, rest = divmod(length, side)
    return [(part, count) for part, count in ((side, number), (rest, 1 if rest else 0)) if count]


def _waves(walk: WalkShape, rows: int, columns: int) -> int:
    """Return the waves of a product with rows x columns results."""
    tiles = -(-rows // PRODUCT_TILE[0]) * -(-columns // PRODUCT_TILE[1])
    return -(-tiles // walk.num_processors)
