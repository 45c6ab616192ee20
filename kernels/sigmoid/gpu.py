"""The sigmoid loss on a GPU: loss and gradients in one walk over blocks.

Legend and maths: ``clipcore.kernels.sigmoid``; the kernel: ``kernels.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipcore.kernels.logits.gradient_sums import GradientWanted
from clipcore.kernels.logits.pairs import LOG2E, LossInputs
from clipcore.kernels.logits.program_sums import ProgramSums
from clipcore.kernels.logits.walk_gpu import LogitWalk
from clipcore.kernels.sigmoid.factor_kernels import sigmoid_factors_kernel
from clipcore.kernels.sigmoid.kernels import sigmoid_kernel, sigmoid_pass
from clipcore.kernels.sigmoid.launches import FP16_GRADIENT_SCALE, launch_row


def sigmoid_fwd_gpu(
    inputs: LossInputs, bias: Tensor, backward: bool, need: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs of ``clipcore::sigmoid_fwd``; a side that nobody needs costs no product."""
    device = inputs.image_BE.device
    grad_scale = FP16_GRADIENT_SCALE if inputs.operand == torch.float16 else 1.0
    factors, walk_factor = _factors(inputs, bias, grad_scale)
    sums = ProgramSums(3, device)  # loss, d_scale, d_bias

    wanted = GradientWanted(need, walk_factor, torch.float32) if backward else None
    walk = LogitWalk(inputs, launch_row(inputs), wanted=wanted)
    kernel = sigmoid_kernel if inputs.engine == "fused" else sigmoid_pass
    for block in walk:
        partial = sums.places(block)
        kernel[block.grid](
            factor_ptr=factors,
            grad_ptr=block.grad_RC,
            partial_ptr=partial,
            stride_grad=block.stride,
            stride_partial=partial.stride(0),
            GRADIENT_SCALE=grad_scale,
            GRADIENT=backward,
            **block.product_arguments,
            **block.arguments,
        )
        if backward:
            walk.add_gradient(block)

    d_image, d_text = (torch.empty(0, dtype=torch.float32, device=device) for _ in range(2))
    if backward:
        d_image, d_text = walk.gradients()
    return sums.total(0), d_image, d_text, sums.total(1), sums.total(2)


def _factors(inputs: LossInputs, bias: Tensor, grad_scale: float) -> tuple[Tensor, Tensor]:
    """Return float32 [4], the factor from cosines to powers of two and the bias, and [1], that of the gradients' sums."""
    factors = torch.empty(4, dtype=torch.float32, device=bias.device)
    walk_factor = torch.empty(1, dtype=torch.float32, device=bias.device)
    sigmoid_factors_kernel[(1,)](
        scale_ptr=inputs.scale,
        bias_ptr=bias,
        factor_ptr=factors,
        walk_factor_ptr=walk_factor,
        LOG2E=LOG2E,
        GRADIENT_SCALE=grad_scale,
        num_warps=1,
    )
    return factors, walk_factor
