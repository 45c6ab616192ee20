"""The contrastive loss in PyTorch on the CPU: the same walk over blocks, which stay in the cache.

Legend and maths: contrastive.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import logits, logits_cpu
from clipcore.kernels.contrastive_problem import (
    Logarithms,
    Online,
    Problem,
    Targets,
    Upstream,
    logarithms,
    new_sums,
)
from clipcore.kernels.logits import LOG2E, Pairs


def contrastive_fwd_cpu(problem: Problem, stash: bool) -> tuple[Tensor, ...]:
    """The same sums in blocks that stay in the cache; a stash holds the exponentials."""
    x_BE = logits_cpu.unit_rows_cpu(problem.image_BE, problem.normalized, problem.operand)
    y_GE = logits_cpu.unit_rows_cpu(problem.text_GE, problem.normalized, problem.operand)
    B, G, wide = len(x_BE), len(y_GE), x_BE.dtype
    row_sum, row_target = new_sums(problem, B)
    column_sum, column_target = new_sums(problem, G)
    stash_BG = logits_cpu.buffer((B, G) if stash else (0, 0), wide)
    to_power, offset = problem.powers()
    side_R, side_C = logits_cpu.cpu_sides(G, wide, problem.workspace_bytes)
    buffer = logits_cpu.buffer((0 if stash else min(side_R, B) * min(side_C, G),), wide)
    for rows in logits.blocks(B, side_R):
        scaled_RE = logits_cpu.scaled(x_BE[rows], to_power)
        for columns in logits.blocks(G, side_C):
            shape = rows.stop - rows.start, columns.stop - columns.start
            out = stash_BG[rows, columns] if stash else buffer[: math.prod(shape)].view(shape)
            block = torch.mm(scaled_RE, y_GE[columns].T, out=out)
            for strip, part in logits_cpu.strips(rows, shape[1], wide):
                power_RC, pairs = block[part], problem.pairs.block(strip, columns)
                invalid, positive = logits_cpu.masks(pairs)
                _add_targets_cpu(
                    *(problem.targets, pairs, power_RC, strip, columns, invalid, positive),
                    *(row_target[strip], column_target[columns]),
                )
                if offset > 0:
                    power_RC.sub_(offset.to(wide))
                power_RC.exp2_()
                if invalid is not None:
                    power_RC.masked_fill_(invalid, 0)
                if problem.by_place:
                    # A positive that is known by its place is added from its logit, in `logarithms`.
                    logits_cpu.diagonal(power_RC, pairs)[0].zero_()
                row_sum[strip] += power_RC.sum(1)
                column_sum[columns] += power_RC.sum(0)
    logs, untrusted = logarithms(problem, row_sum, column_sum, row_target, column_target, wide)
    if untrusted[0].any() or untrusted[1].any():
        online = _online_cpu(problem, x_BE, y_GE, untrusted)
        logs = logs.completed(problem, untrusted, online)
        row_target, column_target = (
            torch.where(chosen, found.target, target)
            for chosen, found, target in zip(
                untrusted, online, (row_target, column_target), strict=True
            )
        )
    return (*logs[:2], row_target, column_target, *logs[2:], stash_BG, torch.empty(0, 0, 2))


def _add_targets_cpu(
    targets: Targets | None,
    pairs: Pairs,
    power_RC: Tensor,
    rows: slice,
    columns: slice,
    invalid: Tensor | None,
    positive: Tensor | None,
    row_target_R: Tensor,
    column_target_C: Tensor,
) -> None:
    """Add a block's part of the targets, in powers of two, before the block is exponentiated."""
    diagonal, own_rows, own_columns = logits_cpu.diagonal(power_RC, pairs)
    if targets is None:
        row_target_R[own_rows] = diagonal
        column_target_C[own_columns] = diagonal
        return
    row_positive_R, row_uniform_R = targets.row_positive_B[rows], targets.row_uniform_B[rows]
    column_positive_C = targets.column_positive_G[columns]
    column_uniform_C = targets.column_uniform_G[columns]
    valid_RC = power_RC if invalid is None else power_RC.masked_fill(invalid, 0)
    row_target_R += row_uniform_R * valid_RC.sum(1)
    column_target_C += column_uniform_C * valid_RC.sum(0)
    if positive is None:
        row_target_R[own_rows] += row_positive_R[own_rows] * diagonal
        column_target_C[own_columns] += column_positive_C[own_columns] * diagonal
    else:
        matched_RC = power_RC.masked_fill(~positive, 0)
        row_target_R += row_positive_R * matched_RC.sum(1)
        column_target_C += column_positive_C * matched_RC.sum(0)


def _online_cpu(
    problem: Problem, x_BE: Tensor, y_GE: Tensor, untrusted: Sequence[Tensor]
) -> list[Online]:
    """Log-sum-exp and targets of untrusted rows and columns by a running maximum, in float64.

    float32 powers of two would round logits beyond the scale's headroom more coarsely than natural ones; and float64
    makes these rows exact, for a cost that only they have.
    """
    pairs, targets = problem.pairs, problem.targets
    weights = (None, None) if targets is None else (targets[:2], targets[2:])
    return [
        _online_side(problem, x_BE, y_GE, untrusted[0], pairs, weights[0]),
        _online_side(problem, y_GE, x_BE, untrusted[1], pairs.exchanged(), weights[1]),
    ]


def _online_side(
    problem: Problem,
    x_BE: Tensor,
    y_GE: Tensor,
    chosen_B: Tensor,
    pairs: Pairs,
    weights: tuple[Tensor, ...] | None,
) -> Online:
    """`Online` of the chosen rows of x over y; weights are their targets' (positive, uniform)."""
    found = Online(*(torch.full((len(x_BE),), -torch.inf, dtype=torch.float64) for _ in range(2)))
    to_power, _ = problem.powers()
    # A few matrices of a part's size, float64 and masks.
    num_columns = max(1, min(len(y_GE), logits_cpu.CPU_COLUMNS))
    size = max(1, problem.workspace_bytes // (4 * 8 * num_columns))
    chosen = chosen_B.nonzero()[:, 0]
    for part in logits.blocks(len(chosen), size):
        row_n = chosen[part]
        scaled_ND = x_BE[row_n].double() * to_power
        rest_N = torch.full((len(row_n),), -torch.inf, dtype=torch.float64)
        target_N = torch.full_like(rest_N, -torch.inf if weights is None else 0)
        for columns in logits.blocks(len(y_GE), num_columns):
            z_NM = scaled_ND @ y_GE[columns].double().T
            invalid_NM, positive_NM = logits_cpu.masks_of_rows(pairs, row_n, columns)
            if weights is None:
                target_N = target_N.maximum(z_NM.masked_fill(~positive_NM, -torch.inf).amax(1))
                invalid_NM |= positive_NM
            else:
                positive, uniform = (weight[row_n].double()[:, None] for weight in weights)
                spread_NM = (positive * positive_NM + uniform).masked_fill_(invalid_NM, 0)
                target_N += (spread_NM * z_NM).sum(1)
            z_NM.masked_fill_(invalid_NM, -torch.inf)
            largest_N = z_NM.amax(1).clamp(min=torch.finfo(z_NM.dtype).min)
            total_N = torch.exp2(z_NM - largest_N[:, None]).sum(1)
            rest_N = torch.logaddexp2(rest_N, total_N.log2() + largest_N)
        found.rest_lse[row_n], found.target[row_n] = rest_N, target_N
    return found


def contrastive_bwd_cpu(
    problem: Problem,
    upstream: Sequence[Tensor],
    terms: Sequence[Tensor],
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradients in blocks. The scale's is <d_x, x>, which float32 blocks make exact."""
    *sums, stash_BG, _ = terms
    logs = Logarithms(*sums)
    x_BE = logits_cpu.unit_rows_cpu(problem.image_BE, problem.normalized, problem.operand)
    y_GE = logits_cpu.unit_rows_cpu(problem.text_GE, problem.normalized, problem.operand)
    wide = x_BE.dtype
    need_image, need_text = need[0] or not need[1], need[1]  # the scale takes one side at least
    # Contiguous, whatever the embeddings are: the operator's fakes say so.
    d_x = x_BE.new_zeros(x_BE.shape if need_image else 0)
    d_y = y_GE.new_zeros(y_GE.shape if need_text else 0)
    # Over the largest: with what is left of a mean over the batch the factors of large sums would be no normal numbers.
    parts, largest = Upstream.spread(
        upstream, problem.targets, logs.row_rest_B, logs.column_rest_G
    ).over_largest()
    to_power, offset = problem.powers()
    row_untrusted, column_untrusted = logs.untrusted(offset)
    any_untrusted = bool(row_untrusted.any() or column_untrusted.any())
    row_factor, column_factor = parts.factors(logs)
    online = _OnlineGradients(
        *(to_power, x_BE, y_GE, logs, row_untrusted, column_untrusted, row_factor, column_factor)
    )
    row_factor = row_factor.masked_fill(row_untrusted, 0).to(wide)
    column_factor = column_factor.masked_fill(column_untrusted, 0).to(wide)
    parts = parts.to(wide)
    side_R, side_C = logits_cpu.cpu_sides(len(y_GE), wide, problem.workspace_bytes)
    buffer = logits_cpu.buffer((min(side_R, len(x_BE)) * min(side_C, len(y_GE)),), wide)
    stashed = stash_BG.numel() > 0
    for rows in logits.blocks(len(x_BE), side_R):
        scaled_RE = logits_cpu.scaled(x_BE[rows], to_power)
        for columns in logits.blocks(len(y_GE), side_C):
            shape = rows.stop - rows.start, columns.stop - columns.start
            block = buffer[: math.prod(shape)].view(shape)
            if not stashed:
                torch.mm(scaled_RE, y_GE[columns].T, out=block)
            other = x_BE.new_empty(logits_cpu.strip_rows(shape[1], wide), shape[1])
            for strip, part in logits_cpu.strips(rows, shape[1], wide):
                grad_RC, pairs = block[part], problem.pairs.block(strip, columns)
                invalid, positive = logits_cpu.masks(pairs)
                power_RC, other_RC = grad_RC, other[: len(grad_RC)]
                if stashed:
                    power_RC = stash_BG[strip, columns]
                else:
                    if offset > 0:
                        grad_RC.sub_(offset.to(wide))
                    grad_RC.exp2_()
                if any_untrusted:
                    # Where row and column are untrusted it may be inf, and the factors are zero.
                    power_RC = torch.clamp(power_RC, max=torch.finfo(wide).max)
                torch.add(row_factor[strip, None], column_factor[columns], out=other_RC)
                torch.mul(power_RC, other_RC, out=grad_RC)
                if any_untrusted:
                    online.add_to(grad_RC, strip, columns)
                _add_target_gradients_cpu(
                    problem.by_place, pairs, grad_RC, parts.block(strip, columns), positive
                )
                if invalid is not None:
                    grad_RC.masked_fill_(invalid, 0)
            if need_image:
                d_x[rows].addmm_(block, y_GE[columns])
            if need_text:
                d_y[columns].addmm_(block.T, x_BE[rows])
    along = logits_cpu.dot(d_x, x_BE) if need_image else logits_cpu.dot(d_y, y_GE)
    along, back = along * largest * LOG2E, to_power * largest
    d_image, d_text = problem.image_BE.new_empty(0), problem.text_GE.new_empty(0)
    if need[0]:
        d_image = logits_cpu.finish_cpu(problem.image_BE, d_x, problem.normalized, back)
        d_image = d_image.to(problem.image_BE.dtype)
    if need[1]:
        d_text = logits_cpu.finish_cpu(problem.text_GE, d_y, problem.normalized, back)
        d_text = d_text.to(problem.text_GE.dtype)
    return d_image, d_text, along.to(problem.scale.dtype).reshape(problem.scale.shape)


class _OnlineGradients(NamedTuple):
    """What untrusted rows and columns add to the gradient of the logits, in float64 as `_online_cpu`."""

    to_power: Tensor
    x_BE: Tensor
    y_GE: Tensor
    logs: Logarithms
    row_untrusted_B: Tensor
    column_untrusted_G: Tensor
    row_factor_B: Tensor
    column_factor_G: Tensor

    def add_to(self, grad_RC: Tensor, rows: slice, columns: slice) -> None:
        """Add the part of a strip, with anything where the pair is a positive by place or not valid."""
        here = self.row_untrusted_B[rows].nonzero()[:, 0]
        if len(here) > 0:
            row_n = here + rows.start
            z_NC = (self.x_BE[row_n].double() * self.to_power) @ self.y_GE[columns].double().T
            z_NC -= self.logs.row_offset_B[row_n, None]
            part_NC = z_NC.exp2_().mul_(self.row_factor_B[row_n, None])
            grad_RC[here] += part_NC.to(grad_RC.dtype)
        here = self.column_untrusted_G[columns].nonzero()[:, 0]
        if len(here) > 0:
            column_m = here + columns.start
            z_RM = (self.x_BE[rows].double() * self.to_power) @ self.y_GE[column_m].double().T
            z_RM -= self.logs.column_offset_G[column_m]
            part_RM = z_RM.exp2_().mul_(self.column_factor_G[column_m])
            grad_RC[:, here] += part_RM.to(grad_RC.dtype)


def _add_target_gradients_cpu(
    by_place: bool, pairs: Pairs, grad_RC: Tensor, parts: Upstream, positive: Tensor | None
) -> None:
    """Add what the targets give to a block's gradient; `parts` are the block's."""
    if positive is None:
        view, own_rows, own_columns = logits_cpu.diagonal(grad_RC, pairs)
        at_positive = parts.row_positive_B[own_rows] + parts.column_positive_G[own_columns]
        if by_place:
            view.copy_(at_positive)  # the whole gradient
        else:
            view += at_positive
    else:
        both_RC = parts.row_positive_B[:, None] + parts.column_positive_G
        grad_RC += both_RC.masked_fill_(~positive, 0)
    if not by_place:
        grad_RC += parts.row_uniform_B[:, None]
        grad_RC += parts.column_uniform_G
