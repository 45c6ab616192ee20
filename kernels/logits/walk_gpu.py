"""The walk over blocks of logits on a GPU: block sides, operands, products, launch arguments, sums of gradients.

Legend and the two engines: ``clipcore.kernels.logits``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.launch import triton
from clipcore.kernels.logits.pairs import LossInputs, Pairs, slices
from clipcore.kernels.normalize import normalize, normalize_bwd

# Blocks keep to multiples of every tile, so that each tile of the matrix lies in one block.
BLOCK_MULTIPLE = 256
# The largest side of a block that leaves sums only, and the least side of the tiles that write them.
SUM_SIDE = 32768
SUM_TILE = 32


class LaunchRow(NamedTuple):
    """A row of a launch table: the sides of a tile, and how it is compiled."""

    block_n: int
    block_m: int
    block_d: int
    num_warps: int
    num_stages: int


@dataclass
class LogitBlock:
    """A block of logits that a kernel is launched on.

    Attributes:
        rows, columns: where it lies.
        x_RE, y_CE: its operands.
        product_RC: x . y in float32, where the library has multiplied; None where the kernel multiplies or reads a stash.
        grad_RC: where the kernel is to write the block's gradient; None without gradients.
        grid: of the launch.
        arguments: the launch keywords that all kernels over a block have.
    """

    rows: slice
    columns: slice
    x_RE: Tensor
    y_CE: Tensor
    product_RC: Tensor | None
    grad_RC: Tensor | None
    grid: tuple[int]
    arguments: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """R and C."""
        return len(self.x_RE), len(self.y_CE)

    @property
    def num_tiles(self) -> tuple[int, int]:
        """Tiles along the rows and along the columns."""
        R, C = self.shape
        block_n, block_m = self.arguments["BLOCK_N"], self.arguments["BLOCK_M"]
        return triton.cdiv(R, block_n), triton.cdiv(C, block_m)

    def release(self) -> None:
        """Drop all tensors: who walks holds the block until the next one is made, and two blocks' operands take room."""
        del self.x_RE, self.y_CE, self.product_RC, self.grad_RC, self.arguments


class GradientWanted(NamedTuple):
    """What a walk makes of the blocks' gradients.

    Attributes:
        need: whether those of the images and of the texts are wanted; one that nobody needs costs no product.
        factor: what the sums are multiplied with, one element in float32.
        dtype: of the results [that of the embeddings].
    """

    need: tuple[bool, bool]
    factor: Tensor
    dtype: torch.dtype | None = None


class LogitWalk:
    """Walk over the blocks of B x G logits, and add up the gradients that a kernel leaves of each.

    Args:
        inputs: the rows.
        launch_row: how the kernel is launched.
        reads_stash: whether the kernel reads its logits from a stash. If not, the library or the kernel itself multiplies
            them, as ``inputs.engine`` says.
        has_sums: whether tiles leave sums of rows and of columns; where a block leaves nothing else, they limit its size.
        wanted: what to make of the blocks' gradients; None where a block leaves sums only.
        product_BG: where the library's products go, each to its place; None for a buffer of one block.

    >>> for block in walk:  # doctest: +SKIP
    ...     kernel[block.grid](grad_ptr=block.grad_RC, **block.arguments)
    ...     walk.add_gradient(block)
    """

    def __init__(
        self,
        inputs: LossInputs,
        launch_row: LaunchRow,
        *,
        reads_stash: bool = False,
        has_sums: bool = False,
        wanted: GradientWanted | None = None,
        product_BG: Tensor | None = None,
    ) -> None:
        self.inputs, self.launch_row = inputs, launch_row
        self._is_product = inputs.engine != "fused" and not reads_stash
        self._product_BG = product_BG
        self._is_fused = inputs.engine == "fused" and not reads_stash
        operand, device = inputs.operand, inputs.image_BE.device

        # float32 gradients take the place of the products.
        is_product = self._is_product and product_BG is None
        is_gradient = wanted is not None
        in_place = is_product and is_gradient and operand == torch.float32
        own_gradient = is_gradient and not in_place
        element_bytes = (4 if is_product else 0) + (operand.itemsize if own_gradient else 0)
        width, workspace_bytes = inputs.image_BE.shape[1], inputs.workspace_bytes
        if has_sums and element_bytes == 0:
            self._sides = (sum_side(width, workspace_bytes, operand.itemsize),) * 2
        else:
            self._sides = block_sides(
                width, max(2, element_bytes), workspace_bytes, operand.itemsize
            )

        size = min(self._sides[0], len(inputs.image_BE)) * min(self._sides[1], len(inputs.text_GE))
        self._products = torch.empty(size if is_product else 0, dtype=torch.float32, device=device)
        self._grads = self._products
        if not in_place:
            self._grads = torch.empty(size if own_gradient else 0, dtype=operand, device=device)
        self._sums = None if wanted is None else GradientSums(inputs, wanted)

    def __iter__(self) -> Iterator[LogitBlock]:
        """Yield the blocks, row by row of blocks."""
        inputs = self.inputs
        for rows in slices(len(inputs.image_BE), self._sides[0]):
            x_RE = operand_rows(inputs.image_BE[rows], inputs.normalized, inputs.operand)
            if self._sums is not None:
                self._sums.begin_rows(rows)

            for columns in slices(len(inputs.text_GE), self._sides[1]):
                y_CE = operand_rows(inputs.text_GE[columns], inputs.normalized, inputs.operand)
                block = self._block(rows, columns, x_RE, y_CE)
                yield block
                block.release()
                del y_CE

            if self._sums is not None:
                self._sums.end_rows(rows)

    def _block(self, rows: slice, columns: slice, x_RE: Tensor, y_CE: Tensor) -> LogitBlock:
        R, C = len(x_RE), len(y_CE)
        product_RC = grad_RC = None
        if self._is_product:
            product_RC = (
                self._products[: R * C].view(R, C)
                if self._product_BG is None
                else self._product_BG[rows, columns]
            )
            launch.matmul_fp32(x_RE, y_CE.T, product_RC)
        if self._sums is not None:
            grad_RC = self._grads[: R * C].view(R, C)
        pairs = self.inputs.pairs.block(rows, columns)
        grid, arguments = tile_arguments(
            pairs, x_RE, y_CE, self.launch_row, is_fused=self._is_fused
        )
        return LogitBlock(rows, columns, x_RE, y_CE, product_RC, grad_RC, grid, arguments)

    def add_gradient(self, block: LogitBlock) -> None:
        """Add the products of a block's gradient with its operands to the sums."""
        assert self._sums is not None and block.grad_RC is not None
        self._sums.add(block)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of images and texts; empty tensors for those that nobody needs. The last call."""
        assert self._sums is not None
        return self._sums.image_grad, self._sums.text_grad()


def operand_rows(x_RE: Tensor, normalized: bool, dtype: torch.dtype) -> Tensor:
    """Return a block of rows as the kernels and the library multiply them: [R, E'] with E' >= E, zeros behind E."""
    x_RE = launch.unit_inner_stride(x_RE)
    unit_RE = x_RE.to(dtype) if normalized else normalize(x_RE, dtype)
    return launch.aligned_rows(unit_RE, 16 // dtype.itemsize)


def tile_arguments(
    pairs: Pairs, x_RE: Tensor, y_CE: Tensor, row: LaunchRow, is_fused: bool
) -> tuple[tuple[int], dict[str, Any]]:
    """Return the grid and the launch keywords that every tile kernel has, for one block."""
    R, C = len(x_RE), len(y_CE)
    return (triton.cdiv(R, row.block_n) * triton.cdiv(C, row.block_m),), {
        "x_desc": descriptor(x_RE, row.block_n, row.block_d) if is_fused else None,
        "y_desc": descriptor(y_CE, row.block_m, row.block_d) if is_fused else None,
        "image_id_ptr": pairs.image_ids,
        "text_id_ptr": pairs.text_ids,
        "N": R,
        "M": C,
        "D": x_RE.shape[1],
        "first_label": pairs.first_label,
        "IDS": pairs.ids,
        "FUSED": is_fused,
        "BLOCK_N": row.block_n,
        "BLOCK_M": row.block_m,
        "BLOCK_D": row.block_d,
        "GROUP_N": 8,
        "num_warps": row.num_warps,
        "num_stages": row.num_stages,
        "maxnreg": launch.most_registers(launch.architecture(x_RE.device), row.num_warps),
    }


def descriptor(x_ND: Tensor, block_n: int, block_d: int) -> Any:
    """Return a tensor descriptor of an operand for ``tiles.multiply``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x_ND, [block_n, block_d])


def block_sides(
    width: int, element_bytes: int, workspace_bytes: int, operand_bytes: int
) -> tuple[int, int]:
    """Return the rows R and columns C of a block whose logits take ``element_bytes`` each.

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
    """Return the rows and columns of a block that leaves sums only: partial ones of its tiles, and its operands."""
    side = SUM_SIDE
    while side > BLOCK_MULTIPLE and (
        2 * 4 * side * (side // SUM_TILE) + 2 * side * width * operand_bytes > workspace_bytes
    ):
        side //= 2
    return side


class GradientSums:
    """Sums of the gradients of both sides over blocks, float32, and what makes them the embeddings' own.

    A side that nobody needs has no sum and costs no product. The image rows are complete with their row of blocks,
    the text rows at the end, so that only the text's sums have the size of the embeddings; they are the gradient
    itself where that is float32.

    Attributes:
        image_grad: complete after the last row of blocks.
    """

    def __init__(self, inputs: LossInputs, wanted: GradientWanted) -> None:
        self._inputs, self._wanted = inputs, wanted
        self._need_image, self._need_text = wanted.need
        image_BE, text_GE, device = inputs.image_BE, inputs.text_GE, inputs.image_BE.device
        self.image_grad = torch.empty(
            image_BE.shape if self._need_image else 0,
            dtype=wanted.dtype or image_BE.dtype,
            device=device,
        )
        self._text_sum = torch.zeros(
            text_GE.shape if self._need_text else 0, dtype=torch.float32, device=device
        )
        self._image_sum = self._text_sum

    def begin_rows(self, rows: slice) -> None:
        """Begin a new row of blocks."""
        image_BE = self._inputs.image_BE
        if self._need_image:
            self._image_sum = torch.zeros(
                (rows.stop - rows.start, image_BE.shape[1]),
                dtype=torch.float32,
                device=image_BE.device,
            )

    def add(self, block: LogitBlock) -> None:
        """Add the products of a block's gradient with its operands."""
        grad_RC, E = block.grad_RC, self._inputs.image_BE.shape[1]
        assert grad_RC is not None
        if self._need_image:
            launch.addmm_fp32_(self._image_sum, grad_RC, block.y_CE[:, :E])
        if self._need_text:
            launch.addmm_fp32_(self._text_sum[block.columns], grad_RC.T, block.x_RE[:, :E])

    def end_rows(self, rows: slice) -> None:
        """Complete the image gradient of a row of blocks."""
        if self._need_image:
            image_RE = self._inputs.image_BE[rows]
            self._finish(image_RE, self._image_sum, self.image_grad[rows])

    def text_grad(self) -> Tensor:
        """Return the text gradient; the last call."""
        text_GE, total_GE = self._inputs.text_GE, self._text_sum
        dtype = self._wanted.dtype or text_GE.dtype
        out_GE = total_GE if dtype == torch.float32 else torch.empty_like(total_GE, dtype=dtype)
        if self._need_text:
            self._finish(text_GE, total_GE, out_GE)
        return out_GE

    def _finish(self, x_RE: Tensor, sum_RE: Tensor, out_RE: Tensor) -> None:
        """Turn the sum of unit rows' gradients into that of the rows as they were given."""
        factor = self._wanted.factor
        if self._inputs.normalized:
            torch.mul(sum_RE, factor, out=sum_RE)
            out_RE.copy_(sum_RE)
        else:
            normalize_bwd(launch.unit_inner_stride(x_RE), sum_RE, factor, out_RE)
