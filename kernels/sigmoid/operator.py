"""The sigmoid loss as a PyTorch operator: fakes, autograd, autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.logits.pairs import LossInputs, Pairs
from clipcore.kernels.sigmoid.cpu import sigmoid_fwd_cpu
from clipcore.kernels.sigmoid.gpu import sigmoid_fwd_gpu


def sigmoid_sum(inputs: LossInputs, bias: Tensor) -> Tensor:
    """Call the operator: the sum of the losses of all pairs, differentiable in embeddings, scale and bias."""
    leaves = (inputs.image_BE, inputs.text_GE, inputs.scale, bias)
    needs = [tensor.requires_grad and torch.is_grad_enabled() for tensor in leaves]
    total, *_ = torch.ops.clipcore.sigmoid_fwd(
        inputs.image_BE,
        inputs.text_GE,
        inputs.scale,
        bias,
        inputs.pairs.image_ids,
        inputs.pairs.text_ids,
        inputs.pairs.first_label,
        inputs.pairs.same_id,
        inputs.normalized,
        inputs.operand,
        inputs.engine,
        inputs.workspace_bytes,
        any(needs),
        needs[0],
        needs[1],
    )
    return total


@torch.library.custom_op("clipcore::sigmoid_fwd", mutates_args=())
def _sigmoid_fwd(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    first_label: int,
    same_id: str,
    normalized: bool,
    operand: torch.dtype,
    engine: str,
    workspace_bytes: int,
    backward: bool,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = Pairs(image_ids, text_ids, first_label, same_id)
    inputs = LossInputs(
        image_BE, text_GE, scale, pairs, normalized, operand, engine, workspace_bytes
    )
    forward = sigmoid_fwd_gpu if image_BE.is_cuda else sigmoid_fwd_cpu
    with launch.on_device(image_BE.device):
        return forward(inputs, bias, backward, (need_image, need_text))


@_sigmoid_fwd.register_fake
def _(image_BE: Tensor, text_GE: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    need_image, need_text = arguments[-2:]
    wide = launch.accumulate_dtype(torch.promote_types(image_BE.dtype, text_GE.dtype))
    loss, d_scale, d_bias = (image_BE.new_empty((), dtype=torch.float64) for _ in range(3))
    return (
        loss,
        image_BE.new_empty(image_BE.shape if need_image else (0,), dtype=wide),
        text_GE.new_empty(text_GE.shape if need_text else (0,), dtype=wide),
        d_scale,
        d_bias,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.likes = [(part.dtype, part.shape) for part in inputs[:4]]
    ctx.set_materialize_grads(False)
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    # The saved gradients would count as constants.
    launch.check_first_order("sigmoid_loss")
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    for i, (saved, (dtype, shape)) in enumerate(zip(ctx.saved_tensors, ctx.likes, strict=True)):
        if upstream is not None and ctx.needs_input_grad[i]:
            gradients[i] = (saved * upstream.to(saved.dtype)).to(dtype).reshape(shape)
    return tuple(gradients)


_sigmoid_fwd.register_autograd(_backward, setup_context=_setup_context)
launch.register_autocast("sigmoid_fwd", num_operands=0)
