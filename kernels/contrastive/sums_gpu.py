"""What ``sums.py`` computes, on a GPU: one launch a side for each formula, so that a small call is not all launches.

Legend and maths: ``clipcore.kernels.contrastive``; the kernels: ``vector_kernels.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipcore.kernels.contrastive.sums import (
    HEADROOM,
    Logarithms,
    Outputs,
    Sums,
    trusted_range,
)
from clipcore.kernels.contrastive.targets import Targets
from clipcore.kernels.contrastive.vector_kernels import (
    add_partials_kernel,
    completed_kernel,
    exponents_kernel,
    logarithms_kernel,
    relative_uniform_kernel,
    upstream_factors_kernel,
    upstream_largest_kernel,
)
from clipcore.kernels.launch import triton
from clipcore.kernels.logits.block import LogitBlock
from clipcore.kernels.logits.pairs import LOG2E, LossInputs

# Numbers that a program takes at once, and partial sums that it adds at once. Estimated, to be measured.
BLOCK = 512
ADD_BLOCK, ADD_TILES = 64, 16
# The most programs that reduce all numbers of a side; a power of two, as every vector's length in Triton.
PARTS = 128


class Exponents(NamedTuple):
    """The scale and the offset as powers of two."""

    exponents: Tensor  # float64 [2], as ``sums.exponents`` returns them
    factors: Tensor  # float32 [3]: the factor from cosines to powers in two parts, and the offset


class RunningState(NamedTuple):
    """A running maximum before its first block: which rows are untrusted, int32, largest power and sum, float32."""

    is_untrusted_N: Tensor
    largest_N: Tensor
    total_N: Tensor

    def part(self, rows: slice) -> RunningState:
        """Return the state of some rows."""
        return RunningState._make(values[rows] for values in self)


class GradientVectors(NamedTuple):
    """What the gradient pass reads of each row and each column, float32, and what it is over."""

    row_factor_B: Tensor
    column_factor_G: Tensor
    row_offset_B: Tensor
    column_offset_G: Tensor
    row_positive_B: Tensor
    column_positive_G: Tensor
    row_uniform_B: Tensor
    column_uniform_G: Tensor
    any_untrusted: Tensor  # int32
    largest: Tensor  # float64, the largest upstream gradient
    walk_factor: Tensor  # float32, what the walk multiplies its sums with

    def pointers(self, rows: slice, columns: slice) -> dict[str, Tensor]:
        """Return the launch keywords of a block."""
        return {
            "flag_ptr": self.any_untrusted,
            "row_factor_ptr": self.row_factor_B[rows],
            "row_offset_ptr": self.row_offset_B[rows],
            "column_factor_ptr": self.column_factor_G[columns],
            "column_offset_ptr": self.column_offset_G[columns],
            "row_positive_ptr": self.row_positive_B[rows],
            "row_uniform_ptr": self.row_uniform_B[rows],
            "column_positive_ptr": self.column_positive_G[columns],
            "column_uniform_ptr": self.column_uniform_G[columns],
        }


def exponents_gpu(inputs: LossInputs) -> Exponents:
    """Return ``sums.exponents``, and what the kernels over logits read of them."""
    exponents = empty_vector(inputs.scale, 2, torch.float64)
    factors = empty_vector(inputs.scale, 3, torch.float32)
    exponents_kernel[(1,)](
        scale_ptr=inputs.scale,
        exponent_ptr=exponents,
        factor_ptr=factors,
        LOG2E=LOG2E,
        HEADROOM=HEADROOM[torch.float32],
        num_warps=1,
    )
    return Exponents(exponents, factors)


def add_partials(block: LogitBlock, partial: Sums, sums: Sums, targets: Targets | None) -> None:
    """Add what the tiles of a block left to the sums."""
    (R, C), (tiles_m, tiles_n) = block.shape, (len(partial.row_B), len(partial.column_G))
    add_partials_kernel[(triton.cdiv(R, ADD_BLOCK) + triton.cdiv(C, ADD_BLOCK),)](
        row_partial_ptr=partial.row_B,
        column_partial_ptr=partial.column_G,
        row_target_partial_ptr=partial.row_target_log2_B,
        column_target_partial_ptr=partial.column_target_log2_G,
        row_sum_ptr=sums.row_B[block.rows],
        column_sum_ptr=sums.column_G[block.columns],
        row_target_ptr=sums.row_target_log2_B[block.rows],
        column_target_ptr=sums.column_target_log2_G[block.columns],
        R=R,
        C=C,
        tiles_n=tiles_n,
        tiles_m=tiles_m,
        TARGETS=targets is not None,
        TILES=ADD_TILES,
        BLOCK=ADD_BLOCK,
    )


def relative_uniform_gpu(targets: Targets) -> tuple[Tensor, Tensor]:
    """Return ``Targets.relative_uniform``."""
    sides = []
    for positive_N, uniform_N in (targets[:2], targets[2:]):
        relative_N = empty_vector(positive_N, len(positive_N), torch.float32)
        launch_over(
            relative_uniform_kernel,
            len(positive_N),
            positive_ptr=positive_N,
            uniform_ptr=uniform_N,
            out_ptr=relative_N,
        )
        sides.append(relative_N)
    return sides[0], sides[1]


def logarithms_gpu(
    exponents: Exponents, targets: Targets | None, sums: Sums
) -> tuple[Logarithms, tuple[RunningState, RunningState]]:
    """Return ``sums.logarithms``, and the beginning of a running maximum for rows and for columns.

    With targets their logits, summed over a positive's weight, become whole.
    """
    least, most = trusted_range(sums, torch.float32)
    sides, states = [], []
    weights = (None, None) if targets is None else targets[::2]
    for sum_N, target_log2_N, weight_N in (
        (sums.row_B, sums.row_target_log2_B, weights[0]),
        (sums.column_G, sums.column_target_log2_G, weights[1]),
    ):
        side = [empty_vector(sum_N, len(sum_N), torch.float64) for _ in range(3)]
        state = RunningState(
            empty_vector(sum_N, len(sum_N), torch.int32),
            empty_vector(sum_N, len(sum_N), torch.float32),
            empty_vector(sum_N, len(sum_N), torch.float32),
        )
        launch_over(
            logarithms_kernel,
            len(sum_N),
            sum_ptr=sum_N,
            target_ptr=target_log2_N,
            weight_ptr=weight_N,
            exponent_ptr=exponents.exponents,
            lse_ptr=side[0],
            rest_ptr=side[1],
            offset_ptr=side[2],
            untrusted_ptr=state.is_untrusted_N,
            largest_ptr=state.largest_N,
            total_ptr=state.total_N,
            least=least,
            most=most,
            TARGETS=targets is not None,
        )
        sides.append(side)
        states.append(state)
    rows, columns = sides
    logs = Logarithms(rows[0], columns[0], rows[1], columns[1], rows[2], columns[2])
    return logs, (states[0], states[1])


def complete(
    logs: Logarithms,
    exponents: Exponents,
    by_place: bool,
    sums: Sums,
    states: Sequence[RunningState],
) -> None:
    """Give the logarithms what a running maximum has found, in place; see ``Logarithms.completed``."""
    targets_log2 = sums.row_target_log2_B, sums.column_target_log2_G
    for lse_N, rest_N, offset_N, target_N, state in zip(
        logs[:2], logs[2:4], logs[4:], targets_log2, states, strict=True
    ):
        launch_over(
            completed_kernel,
            len(lse_N),
            untrusted_ptr=state.is_untrusted_N,
            largest_ptr=state.largest_N,
            total_ptr=state.total_N,
            target_ptr=target_N,
            exponent_ptr=exponents.exponents,
            lse_ptr=lse_N,
            rest_ptr=rest_N,
            offset_ptr=offset_N,
            TARGETS=not by_place,
        )


def gradient_vectors(
    exponents: Exponents,
    targets: Targets | None,
    upstream: Sequence[Tensor],
    outputs: Outputs,
    gradient_scale: float,
) -> GradientVectors:
    """Return ``Upstream.from_terms`` over its largest element, its factors, and whether any row is untrusted."""
    logs, like = outputs.logarithms, outputs.row_lse_log2_B
    row_lse, column_lse, row_target, column_target = upstream
    part_largest = empty_vector(like, 2 * PARTS, torch.float64)
    part_untrusted = empty_vector(like, 2 * PARTS, torch.int32)
    any_untrusted, largest = (
        empty_vector(like, 1, torch.int32),
        empty_vector(like, 1, torch.float64),
    )
    walk_factor = empty_vector(like, 1, torch.float32)

    # What both kernels read of a side.
    rows: dict[str, Any] = {
        "lse_grad_ptr": row_lse,
        "target_grad_ptr": row_target,
        "rest_ptr": logs.row_rest_B,
        "offset_ptr": logs.row_offset_log2_B,
        "positive_weight_ptr": None if targets is None else targets.row_positive_B,
        "uniform_weight_ptr": None if targets is None else targets.row_uniform_B,
    }
    columns: dict[str, Any] = {
        "lse_grad_ptr": column_lse,
        "target_grad_ptr": column_target,
        "rest_ptr": logs.column_rest_G,
        "offset_ptr": logs.column_offset_log2_G,
        "positive_weight_ptr": None if targets is None else targets.column_positive_G,
        "uniform_weight_ptr": None if targets is None else targets.column_uniform_G,
    }
    shared = {"exponent_ptr": exponents.exponents, "TARGETS": targets is not None}
    for i, side in enumerate((rows, columns)):
        upstream_largest_kernel[(num_parts(len(side["rest_ptr"])),)](
            largest_ptr=part_largest[i * PARTS :],
            untrusted_ptr=part_untrusted[i * PARTS :],
            N=len(side["rest_ptr"]),
            BLOCK=BLOCK,
            **side,
            **shared,
        )

    vectors: list[list[Tensor]] = []
    for side, lse_N in ((rows, logs.row_lse_log2_B), (columns, logs.column_lse_log2_G)):
        N = len(lse_N)
        out = [empty_vector(like, N, torch.float32) for _ in range(3)]
        # Without targets both are the gradient at the positive.
        out.append(out[2] if targets is None else empty_vector(like, N, torch.float32))
        launch_over(
            upstream_factors_kernel,
            N,
            lse_ptr=lse_N,
            part_largest_ptr=part_largest,
            part_untrusted_ptr=part_untrusted,
            factor_out_ptr=out[0],
            offset_out_ptr=out[1],
            positive_out_ptr=out[2],
            uniform_out_ptr=out[3],
            largest_out_ptr=largest,
            untrusted_out_ptr=any_untrusted,
            walk_factor_ptr=walk_factor,
            GRADIENT_SCALE=gradient_scale,
            row_parts=num_parts(len(logs.row_rest_B)),
            column_parts=num_parts(len(logs.column_rest_G)),
            PARTS=PARTS,
            **side,
            **shared,
        )
        vectors.append(out)
    of_rows, of_columns = vectors
    return GradientVectors(
        row_factor_B=of_rows[0],
        column_factor_G=of_columns[0],
        row_offset_B=of_rows[1],
        column_offset_G=of_columns[1],
        row_positive_B=of_rows[2],
        column_positive_G=of_columns[2],
        row_uniform_B=of_rows[3],
        column_uniform_G=of_columns[3],
        any_untrusted=any_untrusted,
        largest=largest,
        walk_factor=walk_factor,
    )


def empty_vector(like: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return a vector on the device of another tensor."""
    return torch.empty(length, dtype=dtype, device=like.device)


def num_parts(N: int) -> int:
    """Return how many programs reduce N numbers, in a fixed split of them."""
    return min(PARTS, triton.cdiv(N, BLOCK))


def launch_over(kernel: Any, N: int, **arguments: Any) -> None:
    """Launch a kernel over N numbers of one side; none over nothing."""
    if N > 0:
        kernel[(triton.cdiv(N, BLOCK),)](N=N, BLOCK=BLOCK, **arguments)
