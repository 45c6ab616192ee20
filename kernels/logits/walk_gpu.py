"""The walk over blocks of logits on a GPU: operands, products, launch arguments.

Legend and the two engines: ``clipcore.kernels.logits``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.logits.block import ROW_MULTIPLE, LogitBlock
from clipcore.kernels.logits.gradient_sums import GradientSums, GradientWanted
from clipcore.kernels.logits.launch_rows import LaunchRow, StripRow, block_arguments
from clipcore.kernels.logits.pairs import WORKSPACE_BYTES, LossInputs, slices
from clipcore.kernels.logits.sides import COLUMN_MULTIPLE, WalkShape, block_sides
from clipcore.kernels.normalize import normalize

# The largest side of a block that leaves sums only, and the least side of the tiles that write them.
SUM_SIDE = 32768
SUM_TILE = 32


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
