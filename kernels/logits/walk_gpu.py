"""The walk over blocks of logits on a GPU: operands, products, launch arguments, sums of gradients.

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
from clipcore.kernels.logits.launch_rows import LaunchRow, StripRow, block_arguments
from clipcore.kernels.logits.pairs import WORKSPACE_BYTES, LossInputs, slices
from clipcore.kernels.logits.sides import COLUMN_MULTIPLE, WalkShape, block_sides
from clipcore.kernels.normalize import normalize, normalize_bwd

# Rows of products and gradients begin at multiples of so many elements, 128 bytes of 16-bit ones: what memory moves at
# once. 16 would do for loads of 16 bytes and for the library's aligned products.
ROW_MULTIPLE = 64
# The largest side of a block that leaves sums only, and the least side of the tiles that write them.
SUM_SIDE = 32768
SUM_TILE = 32


@dataclass
class LogitBlock:
    """A block of logits that a kernel is launched on.

    Attributes:
        rows, columns: where it lies.
        x_RE, y_CE: its operands.
        stride: of a row of the product and of the gradient, a multiple of ROW_MULTIPLE; what lies between C and it is of
            no meaning.
        product_RC: x . y in float32, where the library has multiplied; None where the kernel multiplies or reads a stash.
        grad_RC: where the kernel is to write the block's gradient; None without gradients.
        sides: rows and columns that a program works on.
        arguments: the launch keywords that all kernels over a block have.
    """

    rows: slice
    columns: slice
    x_RE: Tensor
    y_CE: Tensor
    stride: int
    product_RC: Tensor | None
    grad_RC: Tensor | None
    sides: tuple[int, int]
    arguments: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """R and C."""
        return len(self.x_RE), len(self.y_CE)

    @property
    def num_programs(self) -> tuple[int, int]:
        """Programs along the rows and along the columns."""
        (R, C), (rows, columns) = self.shape, self.sides
        return triton.cdiv(R, rows), triton.cdiv(C, columns)

    @property
    def grid(self) -> tuple[int]:
        """Programs of a launch."""
        along_rows, along_columns = self.num_programs
        return (along_rows * along_columns,)

    @property
    def product_arguments(self) -> dict[str, Any]:
        """The launch keywords of the product; none where the kernel multiplies."""
        if self.product_RC is None:
            return {}
        return {"product_ptr": self.product_RC, "stride_product": self.product_RC.stride(0)}

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
        launch_row: LaunchRow | StripRow,
        *,
        reads_stash: bool = False,
        has_sums: bool = False,
        wanted: GradientWanted | None = None,
        product_BG: Tensor | None = None,
    ) -> None:
        self.inputs, self.launch_row = inputs, launch_row
        self._is_product = inputs.engine != "fused" and not reads_stash
        self._product_BG = product_BG
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
            walk_shape = WalkShape(
                num_images=len(inputs.image_BE),
                num_texts=len(inputs.text_GE),
                width=width,
                element_bytes=max(2, element_bytes),
                operand_bytes=operand.itemsize,
                workspace_bytes=workspace_bytes,
                num_processors=launch.NUM_PROCESSORS[launch.architecture(device)],
                is_multiplied=self._is_product,
                has_gradient=is_gradient,
            )
            self._sides = block_sides(walk_shape)

        rows, columns = (
            min(side, len(x_NE))
            for side, x_NE in zip(self._sides, (inputs.image_BE, inputs.text_GE), strict=True)
        )
        size = rows * row_stride(columns)
        self._products = torch.empty(size if is_product else 0, dtype=torch.float32, device=device)
        self._grads = self._products
        if not in_place:
            self._grads = torch.empty(size if own_gradient else 0, dtype=operand, device=device)
        self._sums = None if wanted is None else GradientSums(inputs, wanted)

    def __iter__(self) -> Iterator[LogitBlock]:
        """Yield the blocks, row by row of blocks."""
        inputs = self.inputs
        texts_GE = self._all_text_operands()
        for rows in slices(len(inputs.image_BE), self._sides[0]):
            x_RE = operand_rows(inputs.image_BE[rows], inputs.normalized, inputs.operand)
            if self._sums is not None:
                self._sums.begin_rows(rows)

            for columns in slices(len(inputs.text_GE), self._sides[1]):
                if texts_GE is None:
                    y_CE = operand_rows(inputs.text_GE[columns], inputs.normalized, inputs.operand)
                else:
                    y_CE = texts_GE[columns]
                block = self._block(rows, columns, x_RE, y_CE)
                yield block
                block.release()
                del y_CE

            if self._sums is not None:
                self._sums.end_rows(rows)

    def _all_text_operands(self) -> Tensor | None:
        """Return the operands of all texts, made once; None where each block has to make its own.

        One row of blocks would make them once too, in less room.
        """
        inputs = self.inputs
        is_kept = keeps_text_operands(inputs.workspace_bytes)
        if not is_kept or len(inputs.image_BE) <= self._sides[0]:
            return None
        return operand_rows(inputs.text_GE, inputs.normalized, inputs.operand)

    def _block(self, rows: slice, columns: slice, x_RE: Tensor, y_CE: Tensor) -> LogitBlock:
        R, C = len(x_RE), len(y_CE)
        stride = row_stride(C)
        product_RC = grad_RC = None
        if self._is_product:
            product_RC = (
                self._products[: R * stride].view(R, stride)[:, :C]
                if self._product_BG is None
                else self._product_BG[rows, columns]
            )
            launch.matmul_fp32(x_RE, y_CE.T, product_RC)
        if self._sums is not None:
            grad_RC = self._grads[: R * stride].view(R, stride)[:, :C]
        pairs = self.inputs.pairs.block(rows, columns)
        arguments = block_arguments(pairs, (R, C)) | self.launch_row.arguments(x_RE, y_CE)
        sides = self.launch_row.sides
        return LogitBlock(rows, columns, x_RE, y_CE, stride, product_RC, grad_RC, sides, arguments)

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


def row_stride(num_columns: int) -> int:
    """Return the elements from one row of a block to the next."""
    return -(-num_columns // ROW_MULTIPLE) * ROW_MULTIPLE


def keeps_text_operands(workspace_bytes: int) -> bool:
    """Return whether a walk makes the operands of all texts once, in room of their own beside the workspace.

    They are no larger than the texts' gradients. A workspace below the default says that room is scarce: then each block
    makes its own, once a row of blocks.
    """
    return workspace_bytes >= WORKSPACE_BYTES["cuda"]


def sum_side(width: int, workspace_bytes: int, operand_bytes: int) -> int:
    """Return the rows and columns of a block that leaves sums only: partial ones of its tiles, and its operands."""
    side = SUM_SIDE
    while side > COLUMN_MULTIPLE and (
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
        # The first product of a sum is written over what lies there. Without a block nothing is.
        empty = torch.empty if len(image_BE) > 0 else torch.zeros
        self._text_sum = empty(
            text_GE.shape if self._need_text else 0, dtype=torch.float32, device=device
        )
        self._image_sum = self._text_sum

    def begin_rows(self, rows: slice) -> None:
        """Begin a new row of blocks."""
        image_BE, text_GE = self._inputs.image_BE, self._inputs.text_GE
        if self._need_image:
            empty = torch.empty if len(text_GE) > 0 else torch.zeros
            self._image_sum = empty(
                (rows.stop - rows.start, image_BE.shape[1]),
                dtype=torch.float32,
                device=image_BE.device,
            )

    def add(self, block: LogitBlock) -> None:
        """Add the products of a block's gradient with its operands."""
        grad_RC, E = block.grad_RC, self._inputs.image_BE.shape[1]
        assert grad_RC is not None
        if self._need_image:
            y_CE = block.y_CE[:, :E]
            _add_product(self._image_sum, grad_RC, y_CE, is_first=block.columns.start == 0)
        if self._need_text:
            text_sum_CE, x_RE = self._text_sum[block.columns], block.x_RE[:, :E]
            _add_product(text_sum_CE, grad_RC.T, x_RE, is_first=block.rows.start == 0)

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


def _add_product(sum_NE: Tensor, grad_NM: Tensor, y_ME: Tensor, *, is_first: bool) -> None:
    """Add a product to a sum; the first one is written in its place."""
    if is_first:
        launch.matmul_fp32(grad_NM, y_ME, sum_NE)
    else:
        launch.addmm_fp32_(sum_NE, grad_NM, y_ME)
