"""Sums of the embeddings' gradients over the blocks of a walk on a GPU.

Legend: ``clipcore.kernels.logits``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.logits.block import LogitBlock
from clipcore.kernels.logits.pairs import LossInputs
from clipcore.kernels.normalize import normalize_bwd


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
