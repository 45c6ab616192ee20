"""What a teacher's probabilities say that a student's logits should be, in blocks.

Legend: B image rows, G text rows, E embedding size of the student, F of the teacher, R rows of a block.

    q_bg = exp(teacher's logit - its row's log-sum-exp),   u_bg = exp(teacher's logit - its column's log-sum-exp)
    target = scale sum_bg (q_bg + u_bg) <x_b, y_g>          x, y = the student's image and text rows
    dx = scale (q + u) y,   dy = scale (q + u)^T x

The teacher has no gradient, so both gradients are made in the forward pass with the target: one block of weights serves
both products, and the backward pass multiplies by a number.

Memory: two blocks [R, G] within the workspace, and until the backward pass the gradients, (B + G) E numbers.
Precision: products in the features' dtype, float32 at least; sums of the target in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipcore.kernels.launch import accumulate_dtype


class Teacher(NamedTuple):
    """A teacher's unit features, its scale, and the log-sum-exps of its logits over all texts and over all images."""

    image_BF: Tensor
    text_GF: Tensor
    scale: Tensor
    row_lse_B: Tensor
    column_lse_G: Tensor

    def of_texts(self, columns: slice) -> Teacher:
        """Return the teacher of some of the texts."""
        return self._replace(text_GF=self.text_GF[columns], column_lse_G=self.column_lse_G[columns])


def soft_target(
    image_BE: Tensor, text_GE: Tensor, scale: Tensor, teacher: Teacher, workspace_bytes: int
) -> Tensor:
    """Return the sum of all rows' and all columns' target logits, float64, as the module's docstring has it.

    Args:
        image_BE, text_GE: the student's rows.
        scale: of one element.
        workspace_bytes: what the two blocks may take; they have one row at least.
    """
    target = _SoftTarget.apply(image_BE, text_GE, scale, teacher, workspace_bytes)
    assert isinstance(target, Tensor)
    return target


def rows_of_a_block(num_columns: int, dtype: torch.dtype, workspace_bytes: int) -> int:
    """Return how many rows two blocks of so many columns have in a workspace."""
    return max(1, workspace_bytes // (2 * max(1, num_columns) * dtype.itemsize))


class _SoftTarget(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BE: Tensor, y_GE: Tensor, scale: Tensor, teacher: Teacher, workspace_bytes: int
    ) -> Tensor:
        wide = accumulate_dtype(torch.promote_types(x_BE.dtype, y_GE.dtype))
        ctx.dtypes = x_BE.dtype, y_GE.dtype
        x_BE, y_GE = x_BE.to(wide), y_GE.to(wide)
        teacher_x_BF, teacher_y_GF = teacher.image_BF.to(wide), teacher.text_GF.to(wide)
        teacher_scale = teacher.scale.to(wide)
        row_lse_B, column_lse_G = teacher.row_lse_B.to(wide), teacher.column_lse_G.to(wide)

        dx_BE, dy_GE = torch.empty_like(x_BE), torch.zeros_like(y_GE)
        cosines = torch.zeros((), dtype=torch.float64, device=x_BE.device)
        num_rows = rows_of_a_block(len(y_GE), wide, workspace_bytes)
        # Autocast would round the products to 16 bits.
        with torch.autocast(x_BE.device.type, enabled=False):
            for first in range(0, len(x_BE), num_rows):
                rows = slice(first, first + num_rows)
                logits_RG = (teacher_x_BF[rows] @ teacher_y_GF.T).mul_(teacher_scale)
                weights_RG = (logits_RG - row_lse_B[rows, None]).exp_()
                weights_RG += logits_RG.sub_(column_lse_G).exp_()
                del logits_RG

                dx_BE[rows] = weights_RG @ y_GE
                dy_GE.addmm_(weights_RG.T, x_BE[rows])
                # Before the next block, which needs the place.
                del weights_RG
                cosines += (x_BE[rows] * dx_BE[rows]).sum(dtype=torch.float64)
        ctx.save_for_backward(dx_BE, dy_GE, scale, cosines)
        return cosines * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx_BE, dy_GE, scale, cosines = ctx.saved_tensors
        factor = (grad * scale).to(dx_BE.dtype)
        needs_x, needs_y, needs_scale = ctx.needs_input_grad[:3]
        return (
            (factor * dx_BE).to(ctx.dtypes[0]) if needs_x else None,
            (factor * dy_GE).to(ctx.dtypes[1]) if needs_y else None,
            (grad * cosines).to(scale.dtype) if needs_scale else None,
            None,
            None,
        )
