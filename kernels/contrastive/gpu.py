"""The contrastive loss on a GPU: forward and backward as walks over blocks.

Legend and maths: ``clipcore.kernels.contrastive``; the kernels: ``kernels.py`` those that multiply,
``sums_pass.py`` and ``gradient_pass.py`` those that pass over a block in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipcore.kernels.contrastive.gradient_pass import contrastive_gradient_pass
from clipcore.kernels.contrastive.kernels import (
    contrastive_gradient_kernel,
    contrastive_sums_kernel,
)
from clipcore.kernels.contrastive.launches import (
    FP16_GRADIENT_SCALE,
    dense_shape,
    gradient_row,
    packed_shapes,
    segment_columns,
    sums_row,
)
from clipcore.kernels.contrastive.running_max_gpu import running_max_gpu
from clipcore.kernels.contrastive.sums import Outputs, Sums, new_sums
from clipcore.kernels.contrastive.sums_gpu import (
    add_partials,
    complete,
    exponents_gpu,
    gradient_vectors,
    logarithms_gpu,
    relative_uniform_gpu,
)
from clipcore.kernels.contrastive.sums_pass import contrastive_sums_pass
from clipcore.kernels.contrastive.targets import Targets
from clipcore.kernels.logits.block import LogitBlock
from clipcore.kernels.logits.gradient_sums import GradientWanted
from clipcore.kernels.logits.pairs import LOG2E, LossInputs
from clipcore.kernels.logits.program_sums import ProgramSums
from clipcore.kernels.logits.walk_gpu import LogitWalk


def contrastive_fwd_gpu(inputs: LossInputs, targets: Targets | None, is_stash: bool) -> Outputs:
    """Return the outputs of ``clipcore::contrastive_fwd``."""
    by_place, exponents = targets is None, exponents_gpu(inputs)
    stash_BG, ranges = _new_stash(inputs, is_stash)
    # In a function of its own, so that the blocks' memory is free again when the running maximum begins.
    sums = _walk_sums(inputs, targets, exponents.factors, stash_BG, ranges)

    logs, states = logarithms_gpu(exponents, targets, sums)
    running_max_gpu(inputs, by_place, exponents.factors, states, stash_BG, ranges)
    complete(logs, exponents, by_place, sums, states)
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
    is_stash = stash_BG.numel() > 0 and inputs.engine != "dense"
    launch_row = sums_row(inputs, targets is None)
    sums = new_sums(inputs, targets)
    uniform = None if targets is None else relative_uniform_gpu(targets)
    product_BG = stash_BG if inputs.engine == "dense" else None
    kernel = contrastive_sums_kernel if inputs.engine == "fused" else contrastive_sums_pass
    for block in LogitWalk(inputs, launch_row, has_sums=True, product_BG=product_BG):
        rows, columns = block.rows, block.columns
        partial = _new_partial(block, sums, targets)
        kernel[block.grid](
            scale_ptr=scale,
            row_uniform_ptr=None if uniform is None else uniform[0][rows],
            column_uniform_ptr=None if uniform is None else uniform[1][columns],
            row_sum_ptr=partial.row_B,
            column_sum_ptr=partial.column_G,
            row_target_ptr=partial.row_target_log2_B,
            column_target_ptr=partial.column_target_log2_G,
            stash_ptr=stash_BG[rows, columns.start :] if is_stash else None,
            range_ptr=_block_ranges(ranges, launch_row.sides[1], block) if is_stash else None,
            stride_stash=stash_BG.stride(0),
            stride_range=ranges.stride(0),
            TARGETS=targets is not None,
            STASH=is_stash,
            **block.product_arguments,
            **block.arguments,
        )
        add_partials(block, partial, sums, targets)
    return sums


def contrastive_bwd_gpu(
    inputs: LossInputs,
    targets: Targets | None,
    upstream: Sequence[Tensor],
    outputs: Outputs,
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (d_image, d_text, d_scale); a side that nobody needs costs no product."""
    exponents = exponents_gpu(inputs)
    grad_scale = FP16_GRADIENT_SCALE if inputs.operand == torch.float16 else 1.0
    vectors = gradient_vectors(exponents, targets, upstream, outputs, grad_scale)
    along = ProgramSums(1, inputs.image_BE.device)

    launch_row = gradient_row(inputs, targets is None, outputs.has_stash)
    wanted = GradientWanted(need, vectors.walk_factor)
    walk = LogitWalk(inputs, launch_row, reads_stash=outputs.has_stash, wanted=wanted)
    is_fused = inputs.engine == "fused" and not outputs.has_stash
    kernel = contrastive_gradient_kernel if is_fused else contrastive_gradient_pass
    for block in walk:
        kernel[block.grid](
            scale_ptr=exponents.factors,
            grad_ptr=block.grad_RC,
            along_ptr=along.places(block),
            stride_grad=block.stride,
            GRADIENT_SCALE=grad_scale,
            TARGETS=targets is not None,
            **_logits_of(block, inputs, targets, outputs),
            **vectors.pointers(block.rows, block.columns),
            **block.arguments,
        )
        walk.add_gradient(block)

    d_image, d_text = walk.gradients()
    d_scale = along.total(0) * vectors.largest * LOG2E
    return d_image, d_text, d_scale.to(inputs.scale.dtype).reshape(inputs.scale.shape)


def _new_stash(inputs: LossInputs, is_stash: bool) -> tuple[Tensor, Tensor]:
    """Return a stash and the ranges of its tiles, or the dense matrix; empty ones where nothing is kept."""
    B, G, device = len(inputs.image_BE), len(inputs.text_GE), inputs.image_BE.device
    shape, range_shape, dtype = packed_shapes(B, G, inputs.engine)
    if inputs.engine == "dense":
        shape, range_shape, dtype = dense_shape(B, G), (0, 0, 2), torch.float32
    elif not is_stash:
        shape, range_shape = (0, 0), (0, 0, 2)
    stash_BG = torch.empty(shape, dtype=dtype, device=device)
    # What no tile writes: an output is a function of its inputs, to the last byte.
    if stash_BG.shape[1] > G:
        stash_BG[:, G:] = 0
    return stash_BG, torch.zeros(range_shape, dtype=torch.float32, device=device)


def _new_partial(block: LogitBlock, sums: Sums, targets: Targets | None) -> Sums:
    """Return what the programs of a block write: their sums, [programs along the other side, R] and C, float32.

    A target that is known by its place is one program's, which writes it where it stays.
    """
    (R, C), (along_rows, along_columns) = block.shape, block.num_programs
    device = block.x_RE.device
    rows = torch.empty((along_columns, R), dtype=torch.float32, device=device)
    columns = torch.empty((along_rows, C), dtype=torch.float32, device=device)
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
    """Return the launch keywords of where the gradient pass reads a block's logits; none where the kernel multiplies."""
    if not outputs.has_stash and inputs.engine == "fused":
        return {}
    no_ranges = {"range_ptr": None, "stride_range": 0, "RANGE_M": 1, "STASH": False}
    if not outputs.has_stash:
        return block.product_arguments | no_ranges

    kept = {
        "product_ptr": outputs.stash_BG[block.rows, block.columns.start :],
        "stride_product": outputs.stash_BG.stride(0),
    }
    if inputs.engine == "dense":
        return kept | no_ranges
    columns = segment_columns(inputs, targets is None)
    return kept | {
        "range_ptr": _block_ranges(outputs.ranges, columns, block),
        "stride_range": outputs.ranges.stride(0),
        "RANGE_M": columns,
        "STASH": True,
    }


def _block_ranges(ranges: Tensor, segment_columns: int, block: LogitBlock) -> Tensor:
    """Return the ranges from a block's first row and segment on."""
    return ranges[block.columns.start // segment_columns :, block.rows.start :]
