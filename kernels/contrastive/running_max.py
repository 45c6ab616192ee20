"""Sums that are not to be trusted, again by a running maximum: rows and columns beyond what a fixed offset can hold.

Legend and maths: ``clipcore.kernels.contrastive``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.contrastive.kernels import contrastive_running_max_kernel
from clipcore.kernels.contrastive.launches import running_max_row, sums_row
from clipcore.kernels.contrastive.sums import Logarithms, RunningMax, Sums, exponents
from clipcore.kernels.contrastive.targets import Targets
from clipcore.kernels.launch import triton
from clipcore.kernels.logits.pairs import LossInputs, Pairs, slices
from clipcore.kernels.logits.walk_cpu import MOST_COLUMNS, masks_of_rows
from clipcore.kernels.logits.walk_gpu import operand_rows, sum_side

# The GPU.


class _Side(NamedTuple):
    """Untrusted rows x [N, E], and the rows y [M, E] that they are compared with.

    With a stash x and y are the stash itself, of which ``strides`` are those of a row and of a column.
    """

    x: Tensor
    y: Tensor
    shape: tuple[int, int]
    pairs: Pairs
    strides: tuple[int, int]
    range_strides: tuple[int, int]
    range_tile: tuple[int, int]


class _Progress(NamedTuple):
    """Which rows are untrusted, int32, and their largest power and sum so far, float32."""

    is_untrusted_N: Tensor
    largest_N: Tensor
    total_N: Tensor

    def part(self, rows: slice) -> _Progress:
        return _Progress._make(values[rows] for values in self)


def running_max_gpu(
    inputs: LossInputs,
    by_place: bool,
    scale: Tensor,
    sums: Sums,
    untrusted: Sequence[Tensor],
    stash_BG: Tensor,
    ranges: Tensor,
) -> list[RunningMax]:
    """Return what a running maximum finds for rows and columns: kernels that return at once where none is untrusted."""
    has_stash = stash_BG.numel() > 0
    row = running_max_row(inputs, has_stash)
    progress = [
        _Progress(
            side.to(torch.int32),
            torch.full_like(side, -torch.inf, dtype=torch.float32),
            torch.zeros_like(side, dtype=torch.float32),
        )
        for side in untrusted
    ]

    def advance(side: _Side, own: _Progress) -> None:
        contrastive_running_max_kernel[(triton.cdiv(side.shape[0], row.block_n),)](
            x_ptr=side.x,
            y_ptr=side.y,
            range_ptr=ranges,
            scale_ptr=scale,
            image_id_ptr=side.pairs.image_ids,
            text_id_ptr=side.pairs.text_ids,
            untrusted_ptr=own.is_untrusted_N,
            largest_ptr=own.largest_N,
            total_ptr=own.total_N,
            stride_x_n=side.strides[0],
            stride_y_m=side.strides[1],
            stride_range_n=side.range_strides[0],
            stride_range_m=side.range_strides[1],
            N=side.shape[0],
            M=side.shape[1],
            D=side.x.shape[1],
            first_label=side.pairs.first_label,
            RANGE_N=side.range_tile[0],
            RANGE_M=side.range_tile[1],
            IDS=side.pairs.ids,
            TARGETS=not by_place,
            STASH=has_stash,
            BLOCK_N=row.block_n,
            BLOCK_M=row.block_m,
            BLOCK_D=row.block_d,
            num_warps=row.num_warps,
            num_stages=row.num_stages,
            maxnreg=launch.most_registers(
                launch.architecture(inputs.image_BE.device), row.num_warps
            ),
        )

    if has_stash:
        for own, side in zip(
            progress, _stash_sides(inputs, by_place, stash_BG, ranges), strict=True
        ):
            advance(side, own)
    else:
        width, workspace_bytes = inputs.image_BE.shape[1], inputs.workspace_bytes
        side_length = sum_side(width, workspace_bytes, inputs.operand.itemsize)
        for rows in slices(len(inputs.image_BE), side_length):
            x_RE = operand_rows(inputs.image_BE[rows], inputs.normalized, inputs.operand)
            x_RE = launch.aligned_rows(x_RE, row.block_d)
            for columns in slices(len(inputs.text_GE), side_length):
                y_CE = operand_rows(inputs.text_GE[columns], inputs.normalized, inputs.operand)
                y_CE = launch.aligned_rows(y_CE, row.block_d)
                pairs = inputs.pairs.block(rows, columns)
                advance(_operand_side(x_RE, y_CE, pairs), progress[0].part(rows))
                advance(_operand_side(y_CE, x_RE, pairs.exchanged()), progress[1].part(columns))

    targets_log2 = sums.row_target_log2_B, sums.column_target_log2_G
    return [
        RunningMax(own.largest_N.double() + own.total_N.double().log2(), target_log2)
        for own, target_log2 in zip(progress, targets_log2, strict=True)
    ]


def _operand_side(x_NE: Tensor, y_ME: Tensor, pairs: Pairs) -> _Side:
    """Return a side that multiplies its operands."""
    strides = x_NE.stride(0), y_ME.stride(0)
    return _Side(x_NE, y_ME, (len(x_NE), len(y_ME)), pairs, strides, (0, 0), (1, 1))


def _stash_sides(
    inputs: LossInputs, by_place: bool, stash_BG: Tensor, ranges: Tensor
) -> tuple[_Side, _Side]:
    """Return rows and columns as they read the stash."""
    B, G = len(inputs.image_BE), len(inputs.text_GE)
    row, column = stash_BG.stride()
    range_row, range_column = ranges.stride()[:2]
    tile_n, tile_m = sums_row(inputs, by_place)[:2]
    return (
        _Side(
            x=stash_BG,
            y=stash_BG,
            shape=(B, G),
            pairs=inputs.pairs,
            strides=(row, column),
            range_strides=(range_row, range_column),
            range_tile=(tile_n, tile_m),
        ),
        _Side(
            x=stash_BG,
            y=stash_BG,
            shape=(G, B),
            pairs=inputs.pairs.exchanged(),
            strides=(column, row),
            range_strides=(range_column, range_row),
            range_tile=(tile_m, tile_n),
        ),
    )


# The CPU, in float64: float32 powers of two would round logits beyond the scale's headroom more coarsely than natural
# ones. It makes these rows exact, for a cost that only they have.


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
    """Return it for the chosen rows of x over y; weights are their targets' (positive, uniform)."""
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
