"""The contrastive loss in PyTorch on the CPU: the same walk over blocks, which stay in the cache.

Legend and maths: contrastive.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clipcore.kernels import logits, logits_cpu
from clipcore.kernels.contrastive_problem import (
    Problem,
    Targets,
    Upstream,
    logarithms,
    new_sums,
)
from clipcore.kernels.logits import LOG2E, Pairs


def contrastive_fwd_cpu(problem: Problem, stash: bool) -> tuple[Tensor, ...]:
    """The same sums in blocks that stay in the cache; a stash holds the exponentials."""
    x_BE = logits_cpu.unit_rows_cpu(problem.image_BE, problem.normalized)
    y_GE = logits_cpu.unit_rows_cpu(problem.text_GE, problem.normalized)
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
    logs = logarithms(problem, row_sum, column_sum, row_target, column_target, wide)
    if logs.flag:
        row_lse, column_lse = _online_cpu(problem, x_BE, y_GE)
        logs = logs._replace(row_lse_B=row_lse, column_lse_G=column_lse)
        logs = logs.with_rests(row_target, column_target)
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


def _online_cpu(problem: Problem, x_BE: Tensor, y_GE: Tensor) -> tuple[Tensor, Tensor]:
    """(row_lse, column_lse) in powers of two with a running maximum, for logits of any size."""
    lse = [torch.full((len(side),), -torch.inf, dtype=torch.float64) for side in (x_BE, y_GE)]
    scale = problem.scale.double().reshape(())
    side_R, side_C = logits_cpu.cpu_sides(len(y_GE), x_BE.dtype, problem.workspace_bytes)
    for rows in logits.blocks(len(x_BE), side_R):
        for columns in logits.blocks(len(y_GE), side_C):
            z_RC = logits_cpu.scaled(x_BE[rows], scale) @ y_GE[columns].T
            invalid, _ = logits_cpu.masks(problem.pairs.block(rows, columns))
            if invalid is not None:
                z_RC.masked_fill_(invalid, -torch.inf)
            for total, part, dim in ((lse[0], rows, 1), (lse[1], columns, 0)):
                largest = z_RC.amax(dim).clamp(min=torch.finfo(z_RC.dtype).min)
                power = (z_RC - largest.unsqueeze(dim)).exp_().sum(dim, dtype=torch.float64)
                total[part] = torch.logaddexp(total[part], power.log() + largest)
    return lse[0] * LOG2E, lse[1] * LOG2E


def contrastive_bwd_cpu(
    problem: Problem,
    upstream: Sequence[Tensor],
    terms: Sequence[Tensor],
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradients in blocks. The scale's is <d_x, x>, which float32 blocks make exact."""
    row_lse, column_lse, row_rest, column_rest, flag, stash_BG, _ = terms
    x_BE = logits_cpu.unit_rows_cpu(problem.image_BE, problem.normalized)
    y_GE = logits_cpu.unit_rows_cpu(problem.text_GE, problem.normalized)
    wide, flagged = x_BE.dtype, bool(flag)
    need_image, need_text = need[0] or not need[1], need[1]  # the scale takes one side at least
    d_x, d_y = torch.zeros_like(x_BE) if need_image else x_BE.new_empty(0), x_BE.new_empty(0)
    if need_text:
        d_y = torch.zeros_like(y_GE)
    parts = Upstream.spread(upstream, problem.targets, row_rest, column_rest)
    to_power, offset = problem.powers()
    scale = problem.scale.double().reshape(())
    row_factor, column_factor = (
        factor.to(wide) for factor in parts.factors(row_lse, column_lse, offset)
    )
    row_online, row_offset, column_online, column_offset = (
        part.to(wide) for part in parts.online_factors(row_lse, column_lse, 1 / LOG2E)
    )
    parts = parts.to(wide)
    side_R, side_C = logits_cpu.cpu_sides(len(y_GE), wide, problem.workspace_bytes)
    buffer = logits_cpu.buffer((min(side_R, len(x_BE)) * min(side_C, len(y_GE)),), wide)
    stashed = not flagged and stash_BG.numel() > 0
    for rows in logits.blocks(len(x_BE), side_R):
        # A flagged problem has natural exponents: powers of two would round its large logits more coarsely.
        scaled_RE = logits_cpu.scaled(x_BE[rows], scale if flagged else to_power)
        for columns in logits.blocks(len(y_GE), side_C):
            shape = rows.stop - rows.start, columns.stop - columns.start
            block = buffer[: math.prod(shape)].view(shape)
            if not stashed:
                torch.mm(scaled_RE, y_GE[columns].T, out=block)
            other = x_BE.new_empty(logits_cpu.strip_rows(shape[1], wide), shape[1])
            for strip, part in logits_cpu.strips(rows, shape[1], wide):
                grad_RC, pairs = block[part], problem.pairs.block(strip, columns)
                invalid, positive = logits_cpu.masks(pairs)
                other_RC = other[: len(grad_RC)]
                if flagged:
                    torch.sub(grad_RC, row_offset[strip, None], out=other_RC)
                    other_RC.exp_().mul_(row_online[strip, None])
                    grad_RC.sub_(column_offset[columns]).exp_().mul_(column_online[columns])
                    grad_RC += other_RC
                elif stashed:
                    torch.add(row_factor[strip, None], column_factor[columns], out=grad_RC)
                    grad_RC *= stash_BG[strip, columns]
                else:
                    if offset > 0:
                        grad_RC.sub_(offset.to(wide))
                    torch.add(row_factor[strip, None], column_factor[columns], out=other_RC)
                    grad_RC.exp2_().mul_(other_RC)
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
    d_image, d_text = problem.image_BE.new_empty(0), problem.text_GE.new_empty(0)
    if need[0]:
        d_image = logits_cpu.finish_cpu(problem.image_BE, d_x, problem.normalized, to_power)
        d_image = d_image.to(problem.image_BE.dtype)
    if need[1]:
        d_text = logits_cpu.finish_cpu(problem.text_GE, d_y, problem.normalized, to_power)
        d_text = d_text.to(problem.text_GE.dtype)
    return d_image, d_text, (along * LOG2E).to(problem.scale.dtype).reshape(problem.scale.shape)


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
