"""The contrastive loss of its terms as a PyTorch operator: autograd over a dozen small operations would launch each.

Legend and maths: ``clipcore.kernels.contrastive``; the formulas: ``sums.mean_loss`` and ``sums.mean_gradients``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.contrastive.mean_gpu import mean_gradients_gpu, mean_loss_gpu
from clipcore.kernels.contrastive.sums import Outputs
from clipcore.kernels.contrastive.sums import mean_gradients as mean_gradients_cpu
from clipcore.kernels.contrastive.sums import mean_loss as mean_loss_cpu


def contrastive_mean(
    outputs: Outputs, weights: list[Tensor], first_label: int, dtype: torch.dtype
) -> Tensor:
    """Return the mean loss over the rows and columns that have a positive; see ``sums.mean_loss``."""
    loss, _ = torch.ops.clipcore.contrastive_mean(
        outputs.row_lse_log2_B,
        outputs.column_lse_log2_G,
        outputs.row_target_log2_B,
        outputs.column_target_log2_G,
        weights,
        first_label,
        dtype,
    )
    return loss


@torch.library.custom_op("clipcore::contrastive_mean", mutates_args=())
def _contrastive_mean(
    row_lse_log2_B: Tensor,
    column_lse_log2_G: Tensor,
    row_target_log2_B: Tensor,
    column_target_log2_G: Tensor,
    weights: list[Tensor],
    first_label: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    terms = row_lse_log2_B, column_lse_log2_G, row_target_log2_B, column_target_log2_G
    forward = mean_loss_gpu if row_lse_log2_B.is_cuda else mean_loss_cpu
    with launch.on_device(row_lse_log2_B.device):
        return forward(terms, weights, first_label, dtype)


@_contrastive_mean.register_fake
def _(row_lse_log2_B: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return row_lse_log2_B.new_empty((), dtype=arguments[-1]), row_lse_log2_B.new_empty(2)


@torch.library.custom_op("clipcore::contrastive_mean_bwd", mutates_args=())
def _contrastive_mean_bwd(
    upstream: Tensor,
    counts: Tensor,
    weights: list[Tensor],
    num_rows: int,
    num_columns: int,
    first_label: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backward = mean_gradients_gpu if counts.is_cuda else mean_gradients_cpu
    with launch.on_device(counts.device):
        return backward(upstream, counts, weights, (num_rows, num_columns), first_label)


@_contrastive_mean_bwd.register_fake
def _(
    upstream: Tensor,
    counts: Tensor,
    weights: list[Tensor],
    num_rows: int,
    num_columns: int,
    first_label: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_lse, column_lse, row_target, column_target = (
        counts.new_empty(length) for length in (num_rows, num_columns) * 2
    )
    return row_lse, column_lse, row_target, column_target


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    row_lse_B, column_lse_G, *_, weights, first_label, _ = inputs
    ctx.save_for_backward(output[1], *weights)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.first_label = (len(row_lse_B), len(column_lse_G)), first_label


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    launch.check_first_order("contrastive_loss")
    counts, *weights = ctx.saved_tensors
    # Of the list of weights one for each of its own.
    gradients: list[Any] = [None, None, None, None, [None] * len(weights), None, None]
    if upstream is not None:
        num_rows, num_columns = ctx.shape
        gradients[:4] = _contrastive_mean_bwd(
            upstream, counts, weights, num_rows, num_columns, ctx.first_label
        )
    return tuple(gradients)


_contrastive_mean.register_autograd(_backward, setup_context=_setup_context)
launch.register_autocast("contrastive_mean", num_operands=0)
launch.register_autocast("contrastive_mean_bwd", num_operands=0)
