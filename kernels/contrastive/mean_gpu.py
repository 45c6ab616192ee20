"""The mean of the loss's terms on a GPU, and its gradients: ``sums.mean_loss`` and ``sums.mean_gradients`` in few launches.

Legend and maths: ``clipcore.kernels.contrastive``; the kernels: ``mean_kernels.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipcore.kernels.contrastive.mean_kernels import (
    mean_bwd_kernel,
    mean_kernel,
    mean_parts_kernel,
)
from clipcore.kernels.contrastive.sums import counted_rows
from clipcore.kernels.contrastive.sums_gpu import (
    BLOCK,
    PARTS,
    empty_vector,
    launch_over,
    num_parts,
)
from clipcore.kernels.logits.pairs import LOG2E


def mean_loss_gpu(
    terms: Sequence[Tensor], weights: Sequence[Tensor], first_label: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``sums.mean_loss``."""
    row_lse_B, column_lse_G, row_target_B, column_target_G = terms
    counted = counted_rows(len(row_lse_B), len(column_lse_G), weights, first_label)
    parts = empty_vector(row_lse_B, 4 * PARTS, torch.float64)
    for i, (lse_N, target_N) in enumerate(
        ((row_lse_B, row_target_B), (column_lse_G, column_target_G))
    ):
        mean_parts_kernel[(num_parts(len(lse_N)),)](
            lse_ptr=lse_N,
            target_ptr=target_N,
            weight_ptr=weights[i] if weights else None,
            part_ptr=parts[2 * i * PARTS :],
            first=counted[i].start,
            last=counted[i].stop,
            PARTS=PARTS,
            BY_WEIGHT=len(weights) > 0,
            BLOCK=BLOCK,
        )
    loss, counts = row_lse_B.new_empty((), dtype=dtype), row_lse_B.new_empty(2)
    mean_kernel[(1,)](
        part_ptr=parts,
        loss_ptr=loss,
        count_ptr=counts,
        row_parts=num_parts(len(row_lse_B)),
        column_parts=num_parts(len(column_lse_G)),
        LOG2E=LOG2E,
        PARTS=PARTS,
    )
    return loss, counts


def mean_gradients_gpu(
    upstream: Tensor,
    counts: Tensor,
    weights: Sequence[Tensor],
    shape: tuple[int, int],
    first_label: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``sums.mean_gradients``."""
    counted = counted_rows(shape[0], shape[1], weights, first_label)
    sides = []
    for i, N in enumerate(shape):
        side = empty_vector(counts, N, torch.float64), empty_vector(counts, N, torch.float64)
        launch_over(
            mean_bwd_kernel,
            N,
            upstream_ptr=upstream,
            count_ptr=counts[i:],
            weight_ptr=weights[i] if weights else None,
            lse_grad_ptr=side[0],
            target_grad_ptr=side[1],
            first=counted[i].start,
            last=counted[i].stop,
            LOG2E=LOG2E,
            BY_WEIGHT=len(weights) > 0,
        )
        sides.append(side)
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]
