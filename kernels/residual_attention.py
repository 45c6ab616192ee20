"""The first half of a transformer block: residual add, LayerNorm and attention, with a backward pass of its own.

Legend: R rows of L tokens, D width, H heads.

    x' = x + delta                                             delta: what the half before adds to the stream
    delta' = out_proj(attention(in_proj(LayerNorm(x'))))

A half takes the stream in two parts and returns it in two, so that the sum is computed where it is next read.

Kept for the backward pass, numbers a token: the stream D, the packed projection 3 D, attention's output D and its
log-sum-exp. LayerNorm's output is recomputed. With the other half (residual_mlp.py) a block keeps 10 D numbers, 20 bytes a
token and unit of width in 16 bits; autograd, module by module, keeps 16 D and more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.attention import attention_backward, attention_forward, attention_ref
from clipcore.kernels.launch import as_fresh, column_sum, eager, first_order, is_portable, uncast
from clipcore.kernels.layer_norm import (
    add_layer_norm_forward,
    layer_norm_apply,
    layer_norm_backward,
    layer_norm_forward,
    layer_norm_ref,
)
from clipcore.kernels.weight_casts import narrowed


class Stream(NamedTuple):
    """The residual stream in two parts, [..., D] each.

    Attributes:
        delta: None counts as 0.
        delta_bias_D: a bias that ``delta`` already includes and whose gradient is still missing. That gradient is the
            column sum of the stream's gradient, and the function that adds the parts computes it in the same pass.
    """

    x: Tensor
    delta: Tensor | None = None
    delta_bias_D: Tensor | None = None

    def joined(self) -> Tensor:
        """Return x + delta, differentiable in all three."""
        if self.delta is None:
            return self.x
        if is_portable():
            return self.x + self.delta
        return _Joined.apply(*self)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, delta_bias_D: Tensor | None) -> Tensor:
        ctx.bias_dtype = None if delta_bias_D is None else delta_bias_D.dtype
        return x + delta

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        needs_bias = ctx.needs_input_grad[2]
        return grad, grad, column_sum(rows(grad)).to(ctx.bias_dtype) if needs_bias else None


class AttentionWeights(NamedTuple):
    """Parameters of the half, in the layout of ``nn.MultiheadAttention``, of any floating dtype."""

    norm_weight_D: Tensor
    norm_bias_D: Tensor
    in_weight_3DD: Tensor
    in_bias_3D: Tensor
    out_weight_DD: Tensor
    out_bias_D: Tensor


def residual_attention_ref(
    stream: Stream,
    weights: AttentionWeights,
    heads: int,
    *,
    is_causal: bool = False,
    segments_RL: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return x' + delta' by the operations' references."""
    x = stream.x if stream.delta is None else stream.x + stream.delta
    y = layer_norm_ref(x, weights.norm_weight_D, weights.norm_bias_D, eps)
    qkv = F.linear(y, weights.in_weight_3DD, weights.in_bias_3D).unflatten(-1, (3, heads, -1))
    out = attention_ref(qkv, is_causal, segments_RL)
    return x + F.linear(out, weights.out_weight_DD, weights.out_bias_D)


def residual_attention(
    stream: Stream,
    weights: AttentionWeights,
    heads: int,
    *,
    is_causal: bool = False,
    segments_RL: Tensor | None = None,
    eps: float = 1e-5,
) -> Stream:
    """Return (x', delta') of a stream [R, L, D], all computed in the stream's dtype; differentiable once.

    Args:
        is_causal, segments_RL: which tokens a token sees, see ``attention``.

    >>> weights = AttentionWeights(*(torch.zeros(s) for s in ((8,), (8,), (24, 8), (24,), (8, 8), (8,))))
    >>> residual_attention(Stream(torch.ones(2, 5, 8)), weights, heads=2).joined().shape
    torch.Size([2, 5, 8])
    """
    x, delta = _ResidualAttention.apply(*stream, *weights, segments_RL, heads, is_causal, eps)
    return Stream(stream.x if stream.delta is None else x, delta, weights.out_bias_D)


class _ResidualAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        delta_bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        in_weight: Tensor,
        in_bias: Tensor,
        out_weight: Tensor,
        out_bias: Tensor,
        segments: Tensor | None,
        heads: int,
        is_causal: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        with uncast(x.device):
            dtype = x.dtype
            stream, y, mean, rstd = norm_of_sum(x, delta, norm_weight, norm_bias, eps)
            added_to = outgoing(ctx, x, delta, stream)
            qkv = F.linear(y, narrowed(in_weight, dtype), narrowed(in_bias, dtype)).unflatten(
                -1, (3, heads, -1)
            )
            out, lse = eager(attention_forward)(qkv, is_causal, segments)
            added = F.linear(out, narrowed(out_weight, dtype), narrowed(out_bias, dtype))
        ctx.save_for_backward(
            *(x if delta is None else added_to, mean, rstd, qkv, out, lse, segments),
            *(norm_weight, norm_bias, in_weight, out_weight),
        )
        ctx.is_causal, ctx.eps = is_causal, eps
        ctx.bias_dtypes = in_bias.dtype, None if delta_bias is None else delta_bias.dtype
        return added_to, as_fresh(added)

    @staticmethod
    @first_order("residual_attention")
    def backward(
        ctx: Any, grad_stream: Tensor | None, grad_added: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        stream, mean, rstd, qkv, out, lse, segments, *weights = ctx.saved_tensors
        norm_weight, norm_bias, in_weight, out_weight = weights
        needs = ctx.needs_input_grad
        in_bias_dtype, _ = ctx.bias_dtypes
        with uncast(stream.device):
            dtype = stream.dtype
            grad_added = zeros_for(grad_added, stream)
            grad_out_weight = weight_gradient(grad_added, out, out_weight) if needs[7] else None
            grad_out = grad_added @ narrowed(out_weight, dtype)
            grad_qkv = eager(attention_backward)(
                grad_out, qkv, out, lse, ctx.is_causal, segments
            ).flatten(-3)
            del qkv, out, grad_out
            grad_in_weight = grad_in_bias = None
            if needs[5]:
                y = eager(layer_norm_apply)(
                    rows(stream), mean, rstd, norm_weight, norm_bias, ctx.eps
                )
                grad_in_weight = weight_gradient(grad_qkv, y, in_weight)
                del y
            if needs[6]:
                grad_in_bias = column_sum(rows(grad_qkv)).to(in_bias_dtype)
            grad_y = grad_qkv @ narrowed(in_weight, dtype)
            del grad_qkv
            grads = norm_gradients(ctx, grad_y, stream, mean, rstd, norm_weight, grad_stream)
        return (
            *grads,
            *(grad_in_weight, grad_in_bias, grad_out_weight),
            None,  # the output's bias: the function that adds delta' to the stream computes its gradient
            *(None,) * 4,
        )


# Parts that both halves share.


def rows(x: Tensor) -> Tensor:
    """Return x [..., D] as [N, D]."""
    return x.flatten(0, -2)


def outgoing(ctx: Any, x: Tensor, delta: Tensor | None, stream: Tensor) -> Tensor:
    """Return the sum x + delta as an output, which is kept for the backward pass, so that a change in place is seen there.

    Without delta the sum is the caller's own tensor, and this output is empty and unused.
    """
    ctx.set_materialize_grads(False)
    ctx.has_delta = delta is not None
    if delta is not None:
        return as_fresh(stream)
    nothing = x.new_empty(0)
    ctx.mark_non_differentiable(nothing)
    return nothing


def zeros_for(grad: Tensor | None, like: Tensor) -> Tensor:
    """Return an output's gradient, zeros if the output was not used."""
    return torch.zeros_like(like) if grad is None else grad.contiguous()


def norm_of_sum(
    x: Tensor, delta: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (x + delta, its LayerNorm, means, reciprocal standard deviations)."""
    if delta is None:
        stream, (y, mean, rstd) = x, eager(layer_norm_forward)(rows(x), weight_D, bias_D, eps)
    else:
        stream, y, mean, rstd = eager(add_layer_norm_forward)(
            rows(x), rows(delta), weight_D, bias_D, eps
        )
    return stream.view(x.shape), y.view(x.shape), mean, rstd


def norm_gradients(
    ctx: Any,
    grad_y: Tensor,
    stream: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight_D: Tensor,
    grad_stream: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a half's first arguments: x, delta, delta_bias, LayerNorm's weight and bias.

    Args:
        ctx: with `has_delta`, and with the dtype of delta_bias last in `bias_dtypes`.
        grad_y: of LayerNorm's output.
        grad_stream: of the sum x + delta where it is an output. Without delta it is ignored: a compiler passes an empty one.
    """
    needs = ctx.needs_input_grad
    if not ctx.has_delta:
        grad_stream = None

    grad_x, grad_weight_D, grad_bias_D, column_sum_D = eager(layer_norm_backward)(
        *(rows(grad_y), rows(stream), mean, rstd, weight_D),
        None if grad_stream is None else rows(grad_stream.contiguous()),
        needs[2],
    )
    grad_x = grad_x.view(stream.shape)

    return (
        grad_x,
        grad_x if needs[1] else None,
        column_sum_D.to(ctx.bias_dtypes[-1]) if needs[2] else None,
        grad_weight_D.to(weight_D.dtype) if needs[3] else None,
        grad_bias_D.to(weight_D.dtype) if needs[4] else None,
    )


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of a linear layer's weight from its output's gradient and its input."""
    return (rows(grad).mT @ rows(x)).to(weight.dtype)
