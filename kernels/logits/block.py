"""A block of logits on a GPU: where it lies, its operands, and what a kernel over it is launched with.

Legend and the two engines: ``clipcore.kernels.logits``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clipcore.kernels.launch import triton

# Rows of products and gradients begin at multiples of so many elements, 128 bytes of 16-bit ones: what memory moves at
# once. 16 would do for loads of 16 bytes and for the library's aligned products.
ROW_MULTIPLE = 64


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
