"""The contrastive loss on the CPU: the same walks over blocks, whose chunks stay in the cache.

Legend and maths: ``clipcore.kernels.contrastive``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipcore.kernels.contrastive.running_max_cpu import UntrustedGradients, running_max_cpu
from clipcore.kernels.contrastive.sums import (
    Outputs,
    Sums,
    Upstream,
    exponents,
    logarithms,
    new_sums,
)
from clipcore.kernels.contrastive.targets import Targets
from clipcore.kernels.logits.pages import buffer
from clipcore.kernels.logits.pairs import LOG2E, LossInputs
from clipcore.kernels.logits.walk_cpu import LogitChunk, LogitWalk, diagonal, masks


def contrastive_fwd_cpu(inputs: LossInputs, targets: Targets | None, is_stash: bool) -> Outputs:
    """Return the outputs of ``clipcore::contrastive_fwd``; a stash holds the exponentials."""
    scale_log2, offset_log2 = exponents(inputs)
    shape = (len(inputs.image_BE), len(inputs.text_GE)) if is_stash else (0, 0)
    stash_BG = buffer(shape, inputs.operand)
    sums = new_sums(inputs, targets)

    walk = LogitWalk(inputs, scale_log2, stash_BG=stash_BG if is_stash else None)
    for block in walk:
        for chunk in walk.chunks(block):
            power_RC = chunk.values_RC
            invalid, positive = masks(chunk.pairs)
            _add_targets(sums, targets, chunk, block.columns, invalid, positive)
            if offset_log2 > 0:
                power_RC.sub_(offset_log2.to(walk.dtype))
            power_RC.exp2_()
            if invalid is not None:
                power_RC.masked_fill_(invalid, 0)
            if targets is None:
                # A positive that is known by its place is added from its logit, in `logarithms`.
                diagonal(power_RC, chunk.pairs)[0].zero_()
            sums.row_B[chunk.rows] += power_RC.sum(1)
            sums.column_G[block.columns] += power_RC.sum(0)

    logs, untrusted = logarithms(inputs, targets is None, sums, walk.dtype)
    targets_log2 = sums.row_target_log2_B, sums.column_target_log2_G
    if untrusted[0].any() or untrusted[1].any():
        running = running_max_cpu(inputs, targets, walk.x_BE, walk.y_GE, untrusted)
        logs = logs.completed(inputs, targets is None, untrusted, running)
        targets_log2 = (
            torch.where(untrusted[0], running[0].target_log2_N, targets_log2[0]),
            torch.where(untrusted[1], running[1].target_log2_N, targets_log2[1]),
        )
    return Outputs._make((*logs, *targets_log2, stash_BG, torch.empty(0, 0, 2)))


def contrastive_bwd_cpu(
    inputs: LossInputs,
    targets: Targets | None,
    upstream: Sequence[Tensor],
    outputs: Outputs,
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (d_image, d_text, d_scale); the scale's is <d_x, x>, which float32 blocks make exact."""
    logs = outputs.logarithms
    scale_log2, offset_log2 = exponents(inputs)
    # Over the largest: with what is left of a mean over the batch the factors of large sums would be no normal numbers.
    parts, largest = Upstream.from_terms(upstream, targets, logs).over_largest()
    walk = LogitWalk(
        inputs,
        scale_log2,
        is_multiplied=not outputs.has_stash,
        need=need,
    )

    row_untrusted, column_untrusted = logs.untrusted(offset_log2)
    any_untrusted = bool(row_untrusted.any() or column_untrusted.any())
    row_factor, column_factor = parts.factors(logs)
    of_untrusted = UntrustedGradients(
        scale_log2,
        walk.x_BE,
        walk.y_GE,
        logs,
        row_untrusted,
        column_untrusted,
        row_factor,
        column_factor,
    )
    row_factor = row_factor.masked_fill(row_untrusted, 0).to(walk.dtype)
    column_factor = column_factor.masked_fill(column_untrusted, 0).to(walk.dtype)
    parts = parts.to(walk.dtype)

    for block in walk:
        columns = block.columns
        for chunk in walk.chunks(block):
            rows, grad_RC = chunk.rows, chunk.values_RC
            invalid, positive = masks(chunk.pairs)
            if outputs.has_stash:
                power_RC = outputs.stash_BG[rows, columns]
            else:
                if offset_log2 > 0:
                    grad_RC.sub_(offset_log2.to(walk.dtype))
                power_RC = grad_RC.exp2_()
            if any_untrusted:
                # Where row and column are untrusted it may be inf, and the factors are zero.
                power_RC = torch.clamp(power_RC, max=torch.finfo(walk.dtype).max)
            torch.add(row_factor[rows, None], column_factor[columns], out=chunk.spare_RC)
            torch.mul(power_RC, chunk.spare_RC, out=grad_RC)
            if any_untrusted:
                of_untrusted.add_to(grad_RC, rows, columns)
            _add_target_gradients(targets is None, chunk, parts.block(rows, columns), positive)
            if invalid is not None:
                grad_RC.masked_fill_(invalid, 0)
        walk.add_gradient(block)

    d_scale = walk.along() * largest * LOG2E
    d_image, d_text = walk.gradients(scale_log2 * largest)
    return d_image, d_text, d_scale.to(inputs.scale.dtype).reshape(inputs.scale.shape)


def _add_targets(
    sums: Sums,
    targets: Targets | None,
    chunk: LogitChunk,
    columns: slice,
    invalid: Tensor | None,
    positive: Tensor | None,
) -> None:
    """Add a chunk's part of the target logits, before it is exponentiated."""
    z_RC = chunk.values_RC
    row_target_R = sums.row_target_log2_B[chunk.rows]
    column_target_C = sums.column_target_log2_G[columns]
    own, own_rows, own_columns = diagonal(z_RC, chunk.pairs)
    if targets is None:
        row_target_R[own_rows] = own
        column_target_C[own_columns] = own
        return

    row_positive_R = targets.row_positive_B[chunk.rows]
    column_positive_C = targets.column_positive_G[columns]
    valid_RC = z_RC if invalid is None else z_RC.masked_fill(invalid, 0)
    row_target_R += targets.row_uniform_B[chunk.rows] * valid_RC.sum(1)
    column_target_C += targets.column_uniform_G[columns] * valid_RC.sum(0)
    if positive is None:
        row_target_R[own_rows] += row_positive_R[own_rows] * own
        column_target_C[own_columns] += column_positive_C[own_columns] * own
    else:
        matched_RC = z_RC.masked_fill(~positive, 0)
        row_target_R += row_positive_R * matched_RC.sum(1)
        column_target_C += column_positive_C * matched_RC.sum(0)


def _add_target_gradients(
    by_place: bool, chunk: LogitChunk, parts: Upstream, positive: Tensor | None
) -> None:
    """Add what the targets give to a chunk's gradient; ``parts`` are the chunk's."""
    grad_RC = chunk.values_RC
    if positive is None:
        own, own_rows, own_columns = diagonal(grad_RC, chunk.pairs)
        at_positive = parts.row_positive_B[own_rows] + parts.column_positive_G[own_columns]
        if by_place:
            own.copy_(at_positive)  # the whole gradient
        else:
            own += at_positive
    else:
        both_RC = parts.row_positive_B[:, None] + parts.column_positive_G
        grad_RC += both_RC.masked_fill_(~positive, 0)
    if not by_place:
        grad_RC += parts.row_uniform_B[:, None]
        grad_RC += parts.column_uniform_G
