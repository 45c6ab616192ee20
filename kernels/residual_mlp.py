"""The second half of a transformer block: residual add, LayerNorm and MLP, with a backward pass of its own.

Legend: [..., D] tokens of width D, F width of the hidden layer.

    x' = x + delta
    delta' = c_proj(GELU(c_fc(LayerNorm(x'))))

Kept for the backward pass, numbers a token: the stream D and the hidden layer before its activation F = 4 D. The outputs
of LayerNorm and GELU are recomputed, the latter in the pass that computes its gradient. See residual_attention.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.gelu import gelu_backward, gelu_forward, gelu_ref
from clipcore.kernels.launch import as_fresh, column_sum, eager, first_order, uncast
from clipcore.kernels.layer_norm import layer_norm_apply, layer_norm_ref
from clipcore.kernels.residual_attention import (
    Stream,
    norm_gradients,
    norm_of_sum,
    outgoing,
    rows,
    weight_gradient,
    zeros_for,
)
from clipcore.kernels.weight_casts import narrowed


class MLPWeights(NamedTuple):
    """Parameters of the half, of any floating dtype."""

    norm_weight_D: Tensor
    norm_bias_D: Tensor
    fc_weight_FD: Tensor
    fc_bias_F: Tensor
    proj_weight_DF: Tensor
    proj_bias_D: Tensor


def residual_mlp_ref(
    stream: Stream, weights: MLPWeights, kind: str = "erf", *, eps: float = 1e-5
) -> Tensor:
    """Return x' + delta' by the operations' references."""
    x = stream.x if stream.delta is None else stream.x + stream.delta
    y = layer_norm_ref(x, weights.norm_weight_D, weights.norm_bias_D, eps)
    hidden = gelu_ref(F.linear(y, weights.fc_weight_FD, weights.fc_bias_F), kind)
    return x + F.linear(hidden, weights.proj_weight_DF, weights.proj_bias_D)


def residual_mlp(
    stream: Stream, weights: MLPWeights, kind: str = "erf", *, eps: float = 1e-5
) -> Stream:
    """Return (x', delta') of a stream [..., D], all computed in the stream's dtype; differentiable once.

    Args:
        kind: of the activation, see ``gelu``.

    >>> weights = MLPWeights(*(torch.zeros(s) for s in ((8,), (8,), (32, 8), (32,), (8, 32), (8,))))
    >>> residual_mlp(Stream(torch.ones(2, 5, 8)), weights).joined().shape
    torch.Size([2, 5, 8])
    """
    x, delta = _ResidualMLP.apply(*stream, *weights, kind, eps)
    return Stream(stream.x if stream.delta is None else x, delta)


class _ResidualMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        delta_bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        fc_weight: Tensor,
        fc_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
        kind: str,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        with uncast(x.device):
            dtype = x.dtype
            stream, y, mean, rstd = norm_of_sum(x, delta, norm_weight, norm_bias, eps)
            added_to = outgoing(ctx, x, delta, stream)
            hidden = F.linear(y, narrowed(fc_weight, dtype), narrowed(fc_bias, dtype))
            active = eager(gelu_forward)(rows(hidden), kind).view(hidden.shape)
            added = F.linear(active, narrowed(proj_weight, dtype), narrowed(proj_bias, dtype))
        ctx.save_for_backward(
            *(x if delta is None else added_to, mean, rstd, hidden),
            *(norm_weight, norm_bias, fc_weight, proj_weight),
        )
        ctx.kind, ctx.eps = kind, eps
        delta_bias_dtype = None if delta_bias is None else delta_bias.dtype
        ctx.bias_dtypes = fc_bias.dtype, proj_bias.dtype, delta_bias_dtype
        return added_to, as_fresh(added)

    @staticmethod
    @first_order("residual_mlp")
    def backward(
        ctx: Any, grad_stream: Tensor | None, grad_added: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        stream, mean, rstd, hidden, *weights = ctx.saved_tensors
        norm_weight, norm_bias, fc_weight, proj_weight = weights
        needs = ctx.needs_input_grad
        fc_bias_dtype, proj_bias_dtype, _ = ctx.bias_dtypes
        grad_fc_weight = grad_fc_bias = grad_proj_weight = grad_proj_bias = None
        with uncast(stream.device):
            dtype = stream.dtype
            grad_added = zeros_for(grad_added, stream)
            if needs[8]:
                grad_proj_bias = column_sum(rows(grad_added)).to(proj_bias_dtype)
            grad_active = grad_added @ narrowed(proj_weight, dtype)
            grad_hidden, hidden_sum, active = eager(gelu_backward)(
                rows(grad_active), rows(hidden), ctx.kind, needs[6], needs[7]
            )
            del hidden, grad_active
            if needs[6]:
                grad_fc_bias = hidden_sum.to(fc_bias_dtype)
            if needs[7]:
                grad_proj_weight = weight_gradient(grad_added, active, proj_weight)
            del active
            if needs[5]:
                y = eager(layer_norm_apply)(
                    rows(stream), mean, rstd, norm_weight, norm_bias, ctx.eps
                )
                grad_fc_weight = weight_gradient(grad_hidden, y, fc_weight)
                del y
            grad_y = grad_hidden @ narrowed(fc_weight, dtype)
            del grad_hidden
            grads = norm_gradients(ctx, grad_y, stream, mean, rstd, norm_weight, grad_stream)
        return (
            *grads,
            *(grad_fc_weight, grad_fc_bias, grad_proj_weight, grad_proj_bias),
            *(None,) * 2,
        )
