"""Sums that are not to be trusted, again by a running maximum, on a GPU.

They are of rows and columns beyond what a fixed offset can hold.

Legend and maths: ``clipcore.kernels.contrastive``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.contrastive.kernels import contrastive_running_max_kernel
from clipcore.kernels.contrastive.launches import running_max_row, segment_columns
from clipcore.kernels.contrastive.sums_gpu import RunningState
from clipcore.kernels.launch import triton
from clipcore.kernels.logits.pairs import LossInputs, Pairs, slices
from clipcore.kernels.logits.walk_gpu import keeps_text_operands, operand_rows, sum_side


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


def running_max_gpu(
    inputs: LossInputs,
    by_place: bool,
    scale: Tensor,
    states: Sequence[RunningState],
    stash_BG: Tensor,
    ranges: Tensor,
) -> None:
    """Continue the running maxima of rows and of columns: kernels that return at once where none is untrusted."""
    has_stash = stash_BG.numel() > 0
    row = running_max_row(inputs, has_stash)

    def advance(side: _Side, own: RunningState) -> None:
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
        for own, side in zip(states, _stash_sides(inputs, by_place, stash_BG, ranges), strict=True):
            advance(side, own)
    else:
        width, workspace_bytes = inputs.image_BE.shape[1], inputs.workspace_bytes
        side_length = sum_side(width, workspace_bytes, inputs.operand.itemsize)
        texts_GE = None
        if keeps_text_operands(workspace_bytes) and len(inputs.image_BE) > side_length:
            texts_GE = operand_rows(inputs.text_GE, inputs.normalized, inputs.operand)
        for rows in slices(len(inputs.image_BE), side_length):
            x_RE = operand_rows(inputs.image_BE[rows], inputs.normalized, inputs.operand)
            x_RE = launch.aligned_rows(x_RE, row.block_d)
            for columns in slices(len(inputs.text_GE), side_length):
                if texts_GE is None:
                    y_CE = operand_rows(inputs.text_GE[columns], inputs.normalized, inputs.operand)
                else:
                    y_CE = texts_GE[columns]
                y_CE = launch.aligned_rows(y_CE, row.block_d)
                pairs = inputs.pairs.block(rows, columns)
                advance(_operand_side(x_RE, y_CE, pairs), states[0].part(rows))
                advance(_operand_side(y_CE, x_RE, pairs.exchanged()), states[1].part(columns))


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
    range_column, range_row = ranges.stride()[:2]
    columns = segment_columns(inputs, by_place)
    return (
        _Side(
            x=stash_BG,
            y=stash_BG,
            shape=(B, G),
            pairs=inputs.pairs,
            strides=(row, column),
            range_strides=(range_row, range_column),
            range_tile=(1, columns),
        ),
        _Side(
            x=stash_BG,
            y=stash_BG,
            shape=(G, B),
            pairs=inputs.pairs.exchanged(),
            strides=(column, row),
            range_strides=(range_column, range_row),
            range_tile=(columns, 1),
        ),
    )
