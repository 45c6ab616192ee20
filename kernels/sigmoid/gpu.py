"""The sigmoid loss on a GPU: loss and gradients in one walk over blocks.

Legend and maths: ``clipcore.kernels.sigmoid``; the kernel: ``kernels.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipcore.kernels.logits.pairs import LOG2E, LossInputs
from clipcore.kernels.logits.program_sums import ProgramSums
from clipcore.kernels.logits.walk_gpu import GradientWanted, LogitWalk
from clipcore.kernels.sigmoid.kernels import sigmoid_kernel
from clipcore.kernels.sigmoid.launches import FP16_GRADIENT_SCALE, launch_row


def sigmoid_fwd_gpu(
    inputs: LossInputs, bias: Tensor, backward: bool, need: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs of ``clipcore::sigmoid_fwd``; a side that nobody needs costs no product."""
    device = inputs.image_BE.device
    grad_scale = FP16_GRADIENT_SCALE if inputs.operand == torch.float16 else 1.0
    factor = (inputs.scale.double().reshape(()) / grad_scale).float()
    factors = _kernel_factors(inputs, bias)
    sums = ProgramSums(3 if backward else 1, device)  # loss, d_scale, d_bias

    wanted = GradientWanted(need, factor, torch.float32) if backward else None
    walk = LogitWalk(inputs, launch_row(inputs), wanted=wanted)
    for block in walk:
        partial = sums.places(block)
        sigmoid_kernel[block.grid](
            product_ptr=block.product_RC,
            factor_ptr=factors,
            grad_ptr=block.grad_RC,
            partial_ptr=partial,
            stride_product=block.shape[1],
            stride_partial=partial.stride(0),
            GRADIENT_SCALE=grad_scale,
            GRADIENT=backward,
            **block.arguments,
        )
        if backward:
            walk.add_gradient(block)

    d_image, d_text = (torch.empty(0, dtype=torch.float32, device=device) for _ in range(2))
    if backward:
        d_image, d_text = walk.gradients()
    if not backward:
        return sums.total(0), d_image, d_text, *(torch.zeros_like(sums.total(0)) for _ in range(2))
    return sums.total(0), d_image, d_text, sums.total(1), sums.total(2)


def _kernel_factors(inputs: LossInputs, bias: Tensor) -> Tensor:
    """Return float32 [4]: the factor from cosines to powers of two, and the bias as one, each in two parts."""
    scale_log2, bias_log2 = (part.double().reshape(()) * LOG2E for part in (inputs.scale, bias))
    scale_high, bias_high = scale_log2.float(), bias_log2.float()
    scale_low, bias_low = (scale_log2 - scale_high).float(), (bias_log2 - bias_high).float()
    return torch.stack((scale_high, scale_low, bias_high, bias_low))
