"""Blocks of logits on a GPU: parts of the tile kernels, block sides, operands, and the sums of gradients.

Legend and the two engines: logits.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipcore.kernels import tiles
from clipcore.kernels.logits import Pairs
from clipcore.kernels.normalize import normalize, normalize_bwd
from clipcore.kernels.tiles import tl, triton

# Blocks keep to multiples of every tile, so that each tile of the matrix lies in one block.
BLOCK_MULTIPLE = 256
# The largest side of a block that leaves sums only, and the least side of the tiles that write them.
SUM_SIDE = 32768
SUM_TILE = 32


@triton.jit
def tile_numbers(N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_N: tl.constexpr):
    """Place of this program's tile in the block: (tile_n, tile_m, n [BLOCK_N], m [BLOCK_M])."""
    tile_n, tile_m = tiles.grouped_tile(
        tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), GROUP_N
    )
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    return tile_n, tile_m, n, m


@triton.jit
def load_product(product_ptr, stride_n, n, m, inside):
    """The float32 tile of a block that the library has multiplied."""
    offsets = n.to(tl.int64)[:, None] * stride_n + m[None, :]
    return tl.load(product_ptr + offsets, mask=inside, other=0.0)


@triton.jit
def multiply(
    x_desc,
    y_desc,
    tile_n,
    tile_m,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The float32 tile of x . y by tensor descriptors; rows and columns past the ends count as 0."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        x = x_desc.load([tile_n * BLOCK_N, d])
        y = y_desc.load([tile_m * BLOCK_M, d])
        acc = tiles.add_product(acc, x, y.T)
    return acc


@triton.jit
def positives(n, m, inside, first_label, image_id_ptr, text_id_ptr, IDS: tl.constexpr):
    """(valid, positive) of a tile: which pairs count, and which of them match. IDS as in contrastive.py."""
    label = (m[None, :] - n[:, None]) == first_label
    if IDS == "none":
        valid = inside
        positive = label & inside
    else:
        in_n = tl.max(inside.to(tl.int32), axis=1) > 0
        in_m = tl.max(inside.to(tl.int32), axis=0) > 0
        image_id = tl.load(image_id_ptr + n, mask=in_n, other=0)
        text_id = tl.load(text_id_ptr + m, mask=in_m, other=0)
        same = image_id[:, None] == text_id[None, :]
        if IDS == "ignore":
            valid = inside & (label | (same == 0))
            positive = label & inside
        else:
            valid = inside
            positive = same & inside
    return valid, positive


def descriptor(x_ND: Tensor, block_n: int, block_d: int) -> Any:
    """A tensor descriptor of an operand for `multiply`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x_ND, [block_n, block_d])


def tile_arguments(
    pairs: Pairs, x_RE: Tensor, y_CE: Tensor, launch: tuple[int, int, int, int, int], fused: bool
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and the launch keywords that every tile kernel has, for one block and a row of its launch table."""
    block_n, block_m, block_d, num_warps, num_stages = launch
    R, C = len(x_RE), len(y_CE)
    return (triton.cdiv(R, block_n) * triton.cdiv(C, block_m),), {
        "x_desc": descriptor(x_RE, block_n, block_d) if fused else None,
        "y_desc": descriptor(y_CE, block_m, block_d) if fused else None,
        "image_id_ptr": pairs.image_ids,
        "text_id_ptr": pairs.text_ids,
        "N": R,
        "M": C,
        "D": x_RE.shape[1],
        "first_label": pairs.first_label,
        "IDS": pairs.ids,
        "FUSED": fused,
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "GROUP_N": 8,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "maxnreg": tiles.most_registers(tiles.architecture(x_RE.device), num_warps),
    }


def block_sides(
    width: int, element_bytes: int, workspace_bytes: int, operand_bytes: int
) -> tuple[int, int]:
    """Rows R and columns C of a block on a GPU whose logits take `element_bytes` each.

    The block, its operands and the float32 sum of its rows' gradients fit the workspace, unless it is smaller than the
    least block. Estimated, to be measured: the library's tiles are 128 x 256 and 132 processors want whole waves of them,
    for R x E and C x E results alike.
    """
    if element_bytes <= 2:
        rows, columns = 16896, 16896
    elif 512 < width <= 768:
        rows, columns = 16896, 5632
    else:
        rows, columns = 8448, 8448

    def taken(rows: int, columns: int) -> int:
        operands = (rows + columns) * width * operand_bytes
        return rows * columns * element_bytes + operands + rows * width * 4

    while taken(rows, columns) > workspace_bytes and max(rows, columns) > BLOCK_MULTIPLE:
        if columns >= rows:
            columns -= BLOCK_MULTIPLE
        else:
            rows -= BLOCK_MULTIPLE
    return rows, columns


def sum_side(width: int, workspace_bytes: int, operand_bytes: int) -> int:
    """Rows and columns of a block that leaves sums only: partial ones of 64-row tiles at least, and its operands."""
    side = SUM_SIDE
    while side > BLOCK_MULTIPLE and (
        2 * 4 * side * (side // SUM_TILE) + 2 * side * width * operand_bytes > workspace_bytes
    ):
        side //= 2
    return side


def operand(x_RE: Tensor, normalized: bool, dtype: torch.dtype) -> Tensor:
    """A block of rows as the kernels and the library multiply them: [R, E'] with E' >= E, zeros behind E."""
    x_RE = tiles.unit_inner_stride(x_RE)
    unit_RE = x_RE.to(dtype) if normalized else normalize(x_RE, dtype)
    return tiles.aligned_rows(unit_RE, 16 // dtype.itemsize)


class Gradients:
    """Sums of the gradients of both sides over blocks, float32, and what makes them the embeddings' own.

    A side that nobody needs has no sum and costs no product. The image rows are complete with their row of blocks,
    the text rows at the end, so that only the text's sums have the size of the embeddings; they are the gradient
    itself where that is float32. Gradients have the dtype of the embeddings unless another is given.
    """

    def __init__(
        self,
        image_BE: Tensor,
        text_GE: Tensor,
        normalized: bool,
        need: tuple[bool, bool],
        dtype: torch.dtype | None = None,
    ):
        self.image_BE, self.text_GE, self.normalized = image_BE, text_GE, normalized
        self.text_dtype = dtype or text_GE.dtype
        self.need_image, self.need_text = need
        device = image_BE.device
        self.image_grad = torch.empty(
            image_BE.shape if self.need_image else 0, dtype=dtype or image_BE.dtype, device=device
        )
        self._text_sum = torch.zeros(
            text_GE.shape if self.need_text else 0, dtype=torch.float32, device=device
        )
        self._image_sum = self._text_sum

    def begin_rows(self, rows: slice) -> None:
        """A new row of blocks."""
        if self.need_image:
            R = rows.stop - rows.start
            self._image_sum = torch.zeros(
                (R, self.image_BE.shape[1]), dtype=torch.float32, device=self.image_BE.device
            )

    def add(self, grad_RC: Tensor, x_RE: Tensor, y_CE: Tensor, columns: slice) -> None:
        """The products of one block's gradient with its operands."""
        E = self.image_BE.shape[1]
        if self.need_image:
            tiles.addmm_fp32_(self._image_sum, grad_RC, y_CE[:, :E])
        if self.need_text:
            tiles.addmm_fp32_(self._text_sum[columns], grad_RC.T, x_RE[:, :E])

    def end_rows(self, rows: slice, factor: Tensor) -> None:
        """The row of blocks is complete: its image gradient, times factor."""
        if self.need_image:
            self._finish(self.image_BE[rows], self._image_sum, factor, self.image_grad[rows])

    def text_grad(self, factor: Tensor) -> Tensor:
        """The text gradient, times factor; the last call."""
        total_GE, dtype = self._text_sum, self.text_dtype
        out_GE = total_GE if dtype == torch.float32 else torch.empty_like(total_GE, dtype=dtype)
        if self.need_text:
            self._finish(self.text_GE, total_GE, factor, out_GE)
        return out_GE

    def _finish(self, x_RE: Tensor, sum_RE: Tensor, factor: Tensor, out_RE: Tensor) -> None:
        if self.normalized:
            torch.mul(sum_RE, factor, out=sum_RE)
            out_RE.copy_(sum_RE)
        else:
            normalize_bwd(tiles.unit_inner_stride(x_RE), sum_RE, factor, out_RE)
