"""Sums that are not to be trusted, again by a running maximum, on the CPU, and their gradients.

They are of rows and columns beyond what a fixed offset can hold. float64: float32 powers of two would round logits beyond
the scale's headroom more coarsely than natural ones. It makes these rows exact, for a cost that only they have.

Legend and maths: ``clipcore.kernels.contrastive``. N rows of one side, M of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipcore.kernels.contrastive.sums import Logarithms, RunningMax, exponents
from clipcore.kernels.contrastive.targets import Targets
from clipcore.kernels.logits.pairs import LossInputs, Pairs, slices
from clipcore.kernels.logits.walk_cpu import MOST_COLUMNS, masks_of_rows


def running_max_cpu(
    inputs: LossInputs,
    targets: Targets | None,
    x_BE: Tensor,
    y_GE: Tensor,
    untrusted: Sequence[Tensor],
) -> list[RunningMax]:
    """Return log-sum-exp and targets of untrusted rows and columns."""
    pairs = inputs.pairs
    rows, columns = (None, None) if targets is None else (targets[:2], targets[2:])
    return [
        _running_max_of_side(inputs, x_BE, y_GE, untrusted[0], pairs, rows),
        _running_max_of_side(inputs, y_GE, x_BE, untrusted[1], pairs.exchanged(), columns),
    ]


def _running_max_of_side(
    inputs: LossInputs,
    x_NE: Tensor,
    y_ME: Tensor,
    chosen_N: Tensor,
    pairs: Pairs,
    weights: tuple[Tensor, ...] | None,
) -> RunningMax:
    """Return what it finds for the chosen rows of x over y; weights are their targets' (positive, uniform)."""
    found = RunningMax._make(
        torch.full((len(x_NE),), -torch.inf, dtype=torch.float64) for _ in range(2)
    )
    scale_log2, _ = exponents(inputs)
    # A few matrices of a part's size, float64 and masks.
    num_columns = max(1, min(len(y_ME), MOST_COLUMNS))
    size = max(1, inputs.workspace_bytes // (4 * 8 * num_columns))
    chosen = chosen_N.nonzero()[:, 0]
    for part in slices(len(chosen), size):
        row_n = chosen[part]
        scaled_RE = x_NE[row_n].double() * scale_log2
        rest_R = torch.full((len(row_n),), -torch.inf, dtype=torch.float64)
        target_R = torch.full_like(rest_R, -torch.inf if weights is None else 0)

        for columns in slices(len(y_ME), num_columns):
            z_RC = scaled_RE @ y_ME[columns].double().T
            invalid_RC, positive_RC = masks_of_rows(pairs, row_n, columns)
            if weights is None:
                target_R = target_R.maximum(z_RC.masked_fill(~positive_RC, -torch.inf).amax(1))
                invalid_RC |= positive_RC
            else:
                positive, uniform = (weight[row_n].double()[:, None] for weight in weights)
                spread_RC = (positive * positive_RC + uniform).masked_fill_(invalid_RC, 0)
                target_R += (spread_RC * z_RC).sum(1)

            z_RC.masked_fill_(invalid_RC, -torch.inf)
            largest_R = z_RC.amax(1).clamp(min=torch.finfo(z_RC.dtype).min)
            total_R = torch.exp2(z_RC - largest_R[:, None]).sum(1)
            rest_R = torch.logaddexp2(rest_R, total_R.log2() + largest_R)
        found.rest_lse_log2_N[row_n], found.target_log2_N[row_n] = rest_R, target_R
    return found


class UntrustedGradients(NamedTuple):
    """What untrusted rows and columns add to the gradient of the logits on the CPU."""

    scale_log2: Tensor
    x_BE: Tensor
    y_GE: Tensor
    logs: Logarithms
    row_untrusted_B: Tensor
    column_untrusted_G: Tensor
    row_factor_B: Tensor
    column_factor_G: Tensor

    def add_to(self, grad_RC: Tensor, rows: slice, columns: slice) -> None:
        """Add the part of a chunk, with anything where the pair is a positive by place or not valid."""
        here = self.row_untrusted_B[rows].nonzero()[:, 0]
        if len(here) > 0:
            row_n = here + rows.start
            z_NC = (self.x_BE[row_n].double() * self.scale_log2) @ self.y_GE[columns].double().T
            z_NC -= self.logs.row_offset_log2_B[row_n, None]
            part_NC = z_NC.exp2_().mul_(self.row_factor_B[row_n, None])
            grad_RC[here] += part_NC.to(grad_RC.dtype)

        here = self.column_untrusted_G[columns].nonzero()[:, 0]
        if len(here) > 0:
            column_m = here + columns.start
            z_RM = (self.x_BE[rows].double() * self.scale_log2) @ self.y_GE[column_m].double().T
            z_RM -= self.logs.column_offset_log2_G[column_m]
            part_RM = z_RM.exp2_().mul_(self.column_factor_G[column_m])
            grad_RC[:, here] += part_RM.to(grad_RC.dtype)
