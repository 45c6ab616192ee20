"""The contrastive loss as PyTorch operators: what is saved between forward and backward, fakes, autograd, autocast."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.contrastive.cpu import contrastive_bwd_cpu, contrastive_fwd_cpu
from clipcore.kernels.contrastive.gpu import contrastive_bwd_gpu, contrastive_fwd_gpu
from clipcore.kernels.contrastive.launches import dense_shape, packed_shapes
from clipcore.kernels.contrastive.sums import Outputs
from clipcore.kernels.contrastive.targets import Targets
from clipcore.kernels.logits.pairs import LossInputs, Pairs


def contrastive_outputs(inputs: LossInputs, targets: Targets | None, is_stash: bool) -> Outputs:
    """Call the operator: differentiable in the embeddings and the scale."""
    return Outputs._make(
        torch.ops.clipcore.contrastive_fwd(
            inputs.image_BE,
            inputs.text_GE,
            inputs.scale,
            inputs.pairs.image_ids,
            inputs.pairs.text_ids,
            list(targets or ()),
            inputs.pairs.first_label,
            inputs.pairs.same_id,
            inputs.normalized,
            inputs.operand,
            inputs.engine,
            inputs.workspace_bytes,
            is_stash,
        )
    )


@torch.library.custom_op("clipcore::contrastive_fwd", mutates_args=())
def _contrastive_fwd(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    target_weights: list[Tensor],
    first_label: int,
    same_id: str,
    normalized: bool,
    operand: torch.dtype,
    engine: str,
    workspace_bytes: int,
    stash: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = Pairs(image_ids, text_ids, first_label, same_id)
    inputs = LossInputs(
        image_BE, text_GE, scale, pairs, normalized, operand, engine, workspace_bytes
    )
    targets = Targets._make(target_weights) if target_weights else None
    forward = contrastive_fwd_gpu if image_BE.is_cuda else contrastive_fwd_cpu
    with launch.on_device(image_BE.device):
        return forward(inputs, targets, stash)


@_contrastive_fwd.register_fake
def _(image_BE: Tensor, text_GE: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    engine, stash = arguments[-3], arguments[-1]
    B, G = image_BE.shape[0], text_GE.shape[0]
    on_cpu = image_BE.device.type == "cpu"
    wide = launch.accumulate_dtype(torch.promote_types(image_BE.dtype, text_GE.dtype))
    shape, range_shape, dtype = ((B, G), (0, 0, 2), wide) if on_cpu else packed_shapes(B, G, engine)
    if engine == "dense" and not on_cpu:
        shape, range_shape, dtype = dense_shape(B, G), (0, 0, 2), torch.float32
    elif not stash:
        shape, range_shape = (0, 0), (0, 0, 2)
    return (
        *(image_BE.new_empty(length, dtype=torch.float64) for length in (B, G, B, G, B, G, B, G)),
        image_BE.new_empty(shape, dtype=dtype),
        image_BE.new_empty(range_shape, dtype=torch.float32),
    )


@torch.library.custom_op("clipcore::contrastive_bwd", mutates_args=())
def _contrastive_bwd(
    upstream: list[Tensor],
    outputs: list[Tensor],
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    target_weights: list[Tensor],
    first_label: int,
    same_id: str,
    normalized: bool,
    operand: torch.dtype,
    engine: str,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if 0 in (len(image_BE), len(text_GE)):  # no logits, and sums whose logarithms are -inf
        return (
            image_BE.new_zeros(image_BE.shape if need_image else 0),
            text_GE.new_zeros(text_GE.shape if need_text else 0),
            torch.zeros_like(scale),
        )
    pairs = Pairs(image_ids, text_ids, first_label, same_id)
    inputs = LossInputs(
        image_BE, text_GE, scale, pairs, normalized, operand, engine, workspace_bytes
    )
    targets = Targets._make(target_weights) if target_weights else None
    backward = contrastive_bwd_gpu if image_BE.is_cuda else contrastive_bwd_cpu
    with launch.on_device(image_BE.device):
        return backward(inputs, targets, upstream, Outputs._make(outputs), (need_image, need_text))


@_contrastive_bwd.register_fake
def _(
    upstream: list[Tensor],
    outputs: list[Tensor],
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_image, need_text = arguments[-2:]
    return (
        image_BE.new_empty(image_BE.shape if need_image else (0,)),
        text_GE.new_empty(text_GE.shape if need_text else (0,)),
        scale.new_empty(scale.shape),
    )


class _Saved(NamedTuple):
    """The tensors between forward and backward; the forward's outputs and the targets' weights follow them."""

    image_BE: Tensor
    text_GE: Tensor
    scale: Tensor
    image_ids: Tensor | None
    text_ids: Tensor | None


# Where in the outputs the terms are: log-sum-exps and target logits, of rows and of columns.
_TERMS = [
    Outputs._fields.index(name)
    for name in (
        "row_lse_log2_B",
        "column_lse_log2_G",
        "row_target_log2_B",
        "column_target_log2_G",
    )
]


class _Settings(NamedTuple):
    """The arguments that are no tensors, in the operators' order."""

    first_label: int
    same_id: str
    normalized: bool
    operand: torch.dtype
    engine: str
    workspace_bytes: int


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    saved, target_weights, settings = _Saved._make(inputs[:5]), inputs[5], inputs[6:-1]
    ctx.save_for_backward(*saved, *output, *target_weights)
    ctx.settings = _Settings._make(settings)
    # The gradient of the stash that nobody asks for would be as large as the stash.
    ctx.set_materialize_grads(False)
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    launch.check_first_order("contrastive_loss")
    settings, tensors = ctx.settings, list(ctx.saved_tensors)
    first, last = len(_Saved._fields), len(_Saved._fields) + len(Outputs._fields)
    saved, outputs = _Saved._make(tensors[:first]), Outputs._make(tensors[first:last])
    target_weights = tensors[last:]
    # Of the terms in the order of the upstream gradients.
    upstream = [
        torch.zeros_like(term) if grad is None else grad.to(term.dtype).contiguous()
        for grad, term in ((grads[i], outputs[i]) for i in _TERMS)
    ]
    need_image, need_text, need_scale = ctx.needs_input_grad[:3]
    d_image, d_text, d_scale = _contrastive_bwd(
        upstream,
        list(outputs),
        saved.image_BE,
        saved.text_GE,
        saved.scale,
        saved.image_ids,
        saved.text_ids,
        target_weights,
        settings.first_label,
        settings.same_id,
        settings.normalized,
        settings.operand,
        settings.engine,
        settings.workspace_bytes,
        need_image,
        need_text,
    )

    gradients: list[Any] = [None] * ctx.num_inputs
    gradients[0] = d_image if need_image else None
    gradients[1] = d_text if need_text else None
    gradients[2] = d_scale if need_scale else None
    # Of the list of targets one for each of its own.
    gradients[5] = [None] * len(target_weights)
    return tuple(gradients)


_contrastive_fwd.register_autograd(_backward, setup_context=_setup_context)
launch.register_autocast("contrastive_fwd", num_operands=0)
launch.register_autocast("contrastive_bwd", num_operands=0)
