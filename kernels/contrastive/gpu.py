"""The contrastive loss on a GPU: forward and backward as walks over blocks.

Legend and maths: ``clipcore.kernels.contrastive``; the kernels: ``kernels.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipcore.kernels.contrastive.kernels import (
    contrastive_gradient_kernel,
    contrastive_sums_kernel,
)
from clipcore.kernels.contrastive.launches import (
    FP16_GRADIENT_SCALE,
    gradient_row,
    packed_shapes,
    sums_row,
)
from clipcore.kernels.contrastive.running_max_gpu import running_max_gpu
from clipcore.kernels.contrastive.sums import (
    Outputs,
    Sums,
    Upstream,
    exponents,
    logarithms,
    new_sums,
)
from clipcore.kernels.contrastive.targets import Targets
from clipcore.kernels.logits.pairs import LOG2E, LossInputs
from clipcore.kernels.logits.walk_gpu import GradientWanted, LaunchRow, LogitBlock, LogitWalk


def contrastive_fwd_gpu(inputs: LossInputs, targets: Targets | None, is_stash: bool) -> Outputs:
    """Return the outputs of ``clipcore::contrastive_fwd``."""
    scale = scale_factors(inputs)
    stash_BG, ranges = _new_stash(inputs, is_stash)
    # In a function of its own, so that the blocks' memory is free again when the running maximum begins.
    sums = _walk_sums(inputs, targets, scale, stash_BG, ranges)
    if targets is not None:
        # The kernel counts in units of a positive's weight.
        sums.row_target_log2_B.mul_(targets.row_positive_B)
        sums.column_target_log2_G.mul_(targets.column_positive_G)

    logs, untrusted = logarithms(inputs, targets is None, sums, torch.float32)
    running = running_max_gpu(inputs, targets is None, scale, sums, untrusted, stash_BG, ranges)
    logs = logs.completed(inputs, targets is None, untrusted, running)
    targets_log2 = sums.row_target_log2_B, sums.column_target_log2_G
    return Outputs._make((*logs, *targets_log2, stash_BG, ranges))


def _walk_sums(
    inputs: LossInputs,
    targets: Targets | None,
    scale: Tensor,
    stash_BG: Tensor,
    ranges: Tensor,
) -> Sums:
    """Return the sums over all blocks, which also fill a stash."""
    is_stash = stash_BG.numel() > 0
    launch_row = sums_row(inputs, targets is None)
    sums = new_sums(inputs, targets)
    uniform = None if targets is None else targets.relative_uniform()
    for block in LogitWalk(inputs, launch_row, has_sums=True):
        rows, columns = block.rows, block.columns
        partial = _new_partial(block, sums, targets)
        contrastive_sums_kernel[block.grid](
            product_ptr=block.product_RC,
            scale_ptr=scale,
            row_uniform_ptr=None if uniform is None else uniform[0][rows],
            column_uniform_ptr=None if uniform is None else uniform[1][columns],
            row_sum_ptr=partial.row_B,
            column_sum_ptr=partial.column_G,
            row_target_ptr=partial.row_target_log2_B,
            column_target_ptr=partial.column_target_log2_G,
            stash_ptr=stash_BG[rows, columns.start :] if is_stash else None,
            range_ptr=_block_ranges(ranges, launch_row, block) if is_stash else None,
            stride_product=block.stride,
            stride_stash=stash_BG.stride(0),
            stride_range=ranges.stride(0),
            TARGETS=targets is not None,
            STASH=is_stash,
            **block.arguments,
        )
        sums.row_B[rows] += partial.row_B.sum(0)
        sums.column_G[columns] += partial.column_G.sum(0)
        if targets is not None:
            sums.row_target_log2_B[rows] += partial.row_target_log2_B.sum(0)
            sums.column_target_log2_G[columns] += partial.column_target_log2_G.sum(0)
    return sums


def contrastive_bwd_gpu(
    inputs: LossInputs,
    targets: Targets | None,
    upstream: Sequence[Tensor],
    outputs: Outputs,
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (d_image, d_text, d_scale); a side that nobody needs costs no product."""
    device = inputs.image_BE.device
    logs = outputs.logarithms
    scale_log2, offset_log2 = exponents(inputs)
    parts, largest = Upstream.from_terms(upstream, targets, logs).over_largest()

    # What the kernel reads for each row and each column.
    any_untrusted = torch.cat(logs.untrusted(offset_log2)).any().to(torch.int32)
    row_factor, column_factor = (factor.float() for factor in parts.factors(logs))
    row_offset, column_offset = logs.row_offset_log2_B.float(), logs.column_offset_log2_G.float()
    parts = parts.to(torch.float32)
    scale, d_scale = scale_factors(inputs), torch.zeros((), dtype=torch.float64, device=device)

    grad_scale = FP16_GRADIENT_SCALE if inputs.operand == torch.float16 else 1.0
    factor = (scale_log2 * largest / grad_scale).float()
    launch_row = gradient_row(inputs, targets is None, outputs.has_stash)
    wanted = GradientWanted(need, factor)
    walk = LogitWalk(inputs, launch_row, reads_stash=outputs.has_stash, wanted=wanted)
    for block in walk:
        rows, columns = block.rows, block.columns
        along = torch.zeros(block.grid, dtype=torch.float32, device=device)
        contrastive_gradient_kernel[block.grid](
            scale_ptr=scale,
            flag_ptr=any_untrusted,
            row_factor_ptr=row_factor[rows],
            row_offset_ptr=row_offset[rows],
            column_factor_ptr=column_factor[columns],
            column_offset_ptr=column_offset[columns],
            grad_ptr=block.grad_RC,
            along_ptr=along,
            stride_grad=block.stride,
            GRADIENT_SCALE=grad_scale,
            TARGETS=targets is not None,
            **_logits_of(block, inputs, targets, outputs),
            **parts.block(rows, columns).pointers(),
            **block.arguments,
        )
        d_scale += along.sum(dtype=torch.float64)
        walk.add_gradient(block)

    d_image, d_text = walk.gradients()
    d_scale = (d_scale * largest * LOG2E).to(inputs.scale.dtype).reshape(inputs.scale.shape)
    return d_image, d_text, d_scale


def scale_factors(inputs: LossInputs) -> Tensor:
    """Return float32 [3]: the factor from cosines to powers of two in two parts, and the offset of the powers."""
    scale_log2, offset_log2 = exponents(inputs)
    high = scale_log2.float()
    return torch.stack((high, (scale_log2 - high).float(), offset_log2.float()))


def _new_stash(inputs: LossInputs, is_stash: bool) -> tuple[Tensor, Tensor]:
    """Return a stash and the ranges of its tiles; empty ones without a stash."""
    B, G, device = len(inputs.image_BE), len(inputs.text_GE), inputs.image_BE.device
    shape, range_shape, dtype = packed_shapes(B, G)
    if not is_stash:
        shape, range_shape = (0, 0), (0, 0, 2)
    stash_BG = torch.empty(shape, dtype=dtype, device=device)
    # What no tile writes: an output is a function of its inputs, to the last byte.
    stash_BG[:, G:] = 0
    return stash_BG, torch.zeros(range_shape, dtype=torch.float32, device=device)


def _new_partial(block: LogitBlock, sums: Sums, targets: Targets | None) -> Sums:
    """Return what the tiles of a block write: sums by tile, [tiles, R] and [tiles, C], float32.

    A target that is known by its place lies in one tile, which writes it where it stays.
    """
    (R, C), (tiles_n, tiles_m) = block.shape, block.num_tiles
    device = block.x_RE.device
    rows = torch.empty((tiles_m, R), dtype=torch.float32, device=device)
    columns = torch.empty((tiles_n, C), dtype=torch.float32, device=device)
    if targets is None:
        return Sums(
            rows,
            columns,
            sums.row_target_log2_B[block.rows],
            sums.column_target_log2_G[block.columns],
        )
    return Sums(rows, columns, torch.empty_like(rows), torch.empty_like(columns))


def _logits_of(
    block: LogitBlock, inputs: LossInputs, targets: Targets | None, outputs: Outputs
) -> dict[str, Any]:
    """Return the launch keywords of where the gradient pass reads a block's logits."""
    if not outputs.has_stash:
        return {
            "product_ptr": block.product_RC,
            "stride_product": block.stride,
            "range_ptr": None,
            "stride_range": 0,
            "RANGE_N": 1,
            "RANGE_M": 1,
            "STASH": False,
        }
    writer = sums_row(inputs, targets is None)
    return {
        "product_ptr": outputs.stash_BG[block.rows, block.columns.start :],
        "stride_product": outputs.stash_BG.stride(0),
        "range_ptr": _block_ranges(outputs.ranges, writer, block),
        "stride_range": outputs.ranges.stride(0),
        "RANGE_N": writer.block_n,
        "RANGE_M": writer.block_m,
        "STASH": True,
    }


def _block_ranges(ranges: Tensor, writer: LaunchRow, block: LogitBlock) -> Tensor:
    """Return the ranges from a block's first tile on, in the grid of the tiles that wrote them."""
    return ranges[block.rows.start // writer.block_n :, block.columns.start // writer.block_m :]
